//! Confines the process: from then on it opens only the files that it needs, calls only the system calls
//! that it uses, and never gains a privilege.
//! Best effort: [`enter`] never fails, because a server must also work where the kernel lacks a part, or
//! a container forbids it; [`Confined`] names the restrictions in force. It never decides which files are needed.
//!
//! Two parts of the kernel, independent of each other:
//!
//! * Landlock (landlock(7)) restricts which files are opened, created and removed, by path
//!   ([`rules`] computes them, `files` applies them). It also holds for operations of io_uring.
//! * seccomp (seccomp(2)) restricts the system calls (`filter` compiles the list, `seccomp` loads it).
//!
//! Landlock and capabilities belong to a thread, and later threads inherit them. So [`enter`] and
//! [`drop_capabilities`] are called before any other thread starts; even the writer of the log
//! starts after them.

mod capabilities;
mod files;
mod filter;
pub mod rules;
mod seccomp;
#[cfg(test)]
mod tests;
pub mod user;

use rules::PathRule;
use std::fmt;

pub use capabilities::drop_capabilities;

/// What [`enter`] restricts, besides the system calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restrictions {
    /// The paths that stay accessible.
    pub paths: Vec<PathRule>,
    /// Whether TCP connections to other hosts are forbidden.
    pub no_tcp_connect: bool,
}

/// What confines the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confined {
    /// Why files are not restricted; none if they are.
    files: Option<String>,
    /// Why system calls are not restricted; none if they are.
    system_calls: Option<String>,
}

/// Confines the calling thread, and all threads that it starts from now on, for good.
#[must_use]
pub fn enter(restrictions: &Restrictions) -> Confined {
    // Both parts demand this of a process without CAP_SYS_ADMIN, and execve(2) must give no privilege.
    if let Err(errno) = nix::sys::prctl::set_no_new_privs() {
        let why = format!("PR_SET_NO_NEW_PRIVS: {errno}");
        return Confined { files: Some(why.clone()), system_calls: Some(why) };
    }
    // The system calls last, because the filter admits none of those of Landlock.
    let files = files::restrict(restrictions).err();
    Confined { files, system_calls: seccomp::restrict().err() }
}

impl Confined {
    /// The parts in force, as one word for `status`: `landlock,seccomp`, one of the two, or `none`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match (&self.files, &self.system_calls) {
            (None, None) => "landlock,seccomp",
            (None, Some(_)) => "landlock",
            (Some(_), None) => "seccomp",
            (Some(_), Some(_)) => "none",
        }
    }
}

/// For the log: the restrictions in force, and why the others are not.
impl fmt::Display for Confined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |without: &Option<String>| match without {
            None => "in force".to_owned(),
            Some(why) => format!("not in force ({why})"),
        };
        let (files, calls) = (part(&self.files), part(&self.system_calls));
        write!(f, "landlock {files}, seccomp {calls}")
    }
}
