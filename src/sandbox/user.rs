//! The user that a server becomes after root has started it (`--user`).
//! Never keeps a group or a capability of root.

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid, User, geteuid, setgroups, setresgid, setresuid};
use std::fmt;
use std::str::FromStr;

/// A user and a group, each a name or a number, as an operator writes them: `USER[:GROUP]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName {
    user: String,
    group: Option<String>,
}

/// The numbers of a user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    /// The user id.
    pub uid: Uid,
    /// The group id.
    pub gid: Gid,
}

/// Why the process does not become a user; the text is for the operator.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// The text has no user, or an empty group.
    #[error("`{0}` is not USER or USER:GROUP")]
    Malformed(String),
    /// The user database has no such user.
    #[error("there is no user {0}")]
    NoUser(String),
    /// The group database has no such group.
    #[error("there is no group {0}")]
    NoGroup(String),
    /// A user number without a name has no group of its own.
    #[error("user {0} has no name and so no group: give {0}:GROUP")]
    GroupMissing(Uid),
    /// Only root may become another user.
    #[error("only root can become user {0}")]
    NotRoot(String),
    /// A system call failed.
    #[error("cannot become user {0}: {errno}", errno = .1.desc())]
    System(String, Errno),
}

impl FromStr for UserName {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        let (user, group) = match text.split_once(':') {
            None => (text, None),
            Some((user, group)) => (user, Some(group)),
        };
        let is_bad = |word: &str| word.is_empty() || word.contains(':');
        if is_bad(user) || group.is_some_and(is_bad) {
            return Err(UserError::Malformed(text.to_owned()));
        }
        Ok(Self { user: user.to_owned(), group: group.map(str::to_owned) })
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.user)?;
        self.group.as_ref().map_or(Ok(()), |group| write!(f, ":{group}"))
    }
}

impl UserName {
    /// The numbers, from the databases of users and groups.
    ///
    /// # Errors
    /// There is no such user or group.
    fn lookup(&self) -> Result<Account, UserError> {
        let failed = |errno| UserError::System(self.to_string(), errno);
        let (uid, own_group) = match self.user.parse() {
            Ok(number) => {
                let uid = Uid::from_raw(number);
                (uid, User::from_uid(uid).map_err(failed)?.map(|user| user.gid))
            }
            Err(_) => {
                let user = User::from_name(&self.user).map_err(failed)?;
                let user = user.ok_or_else(|| UserError::NoUser(self.user.clone()))?;
                (user.uid, Some(user.gid))
            }
        };
        let gid = match &self.group {
            None => own_group.ok_or(UserError::GroupMissing(uid))?,
            Some(group) => match group.parse() {
                Ok(number) => Gid::from_raw(number),
                Err(_) => {
                    let found = Group::from_name(group).map_err(failed)?;
                    found.ok_or_else(|| UserError::NoGroup(group.clone()))?.gid
                }
            },
        };
        Ok(Account { uid, gid })
    }

    /// The account that the process must switch to; none if it is not root's and is that user's already.
    ///
    /// # Errors
    /// There is no such user or group, or the process is neither root's nor that user's.
    pub fn pending(&self) -> Result<Option<Account>, UserError> {
        let account = self.lookup()?;
        match geteuid() {
            now if now.is_root() => Ok(Some(account)),
            now if now == account.uid => Ok(None),
            _ => Err(UserError::NotRoot(self.to_string())),
        }
    }

    /// Makes a process of root that user's, with that group alone and without capabilities, for good.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn switch_to(&self, Account { uid, gid }: Account) -> Result<(), UserError> {
        // The user last, because only root may change groups. The kernel removes the capabilities.
        setgroups(&[])
            .and_then(|()| setresgid(gid, gid, gid))
            .and_then(|()| setresuid(uid, uid, uid))
            .map_err(|errno| UserError::System(self.to_string(), errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_group_are_names_or_numbers() {
        for text in ["root", "root:root", "0", "0:0", "root:0"] {
            let name: UserName = text.parse().unwrap();
            assert_eq!(name.to_string(), text);
            let root = Account { uid: Uid::from_raw(0), gid: Gid::from_raw(0) };
            assert_eq!(name.lookup(), Ok(root), "{text}");
        }
    }

    #[test]
    fn malformed_names_are_refused() {
        for text in ["", ":", ":g", "u:", "u:g:h"] {
            let error = text.parse::<UserName>().unwrap_err();
            assert_eq!(error, UserError::Malformed(text.to_owned()));
        }
    }

    #[test]
    fn unknown_users_and_groups_are_refused() {
        let lookup = |text: &str| text.parse::<UserName>().unwrap().lookup().unwrap_err();
        assert_eq!(lookup("no-such-user"), UserError::NoUser("no-such-user".to_owned()));
        assert_eq!(lookup("root:no-such"), UserError::NoGroup("no-such".to_owned()));
        let nameless = Uid::from_raw(3_999_999_999);
        assert_eq!(lookup("3999999999"), UserError::GroupMissing(nameless));
    }
}
