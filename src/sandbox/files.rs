//! Restricts files and connections with Landlock.

use super::Restrictions;
use super::rules::{Grant, PathRule};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest rights that are restricted. Those of later kernels would also restrict connections to unix
/// sockets, by which the journal, the service manager and name services are reached.
const RIGHTS: ABI = ABI::V5;

/// Restricts the calling thread. On a kernel without some of the rights the others are restricted.
///
/// # Errors
/// Why nothing is restricted.
pub(super) fn restrict(restrictions: &Restrictions) -> Result<(), String> {
    match try_restrict(restrictions) {
        Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => Ok(()),
        Ok(RulesetStatus::NotEnforced) => Err("the kernel does not offer it".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn try_restrict(restrictions: &Restrictions) -> Result<RulesetStatus, RulesetError> {
    let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(RIGHTS))?;
    if restrictions.no_tcp_connect {
        ruleset = ruleset.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut ruleset = ruleset.scope(Scope::Signal)?.create()?;
    for PathRule { path, grant } in &restrictions.paths {
        // A path that does not exist, or that this user may not reach, cannot be used anyway.
        let Ok(descriptor) = PathFd::new(path) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(descriptor, rights(*grant)))?;
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

fn rights(grant: Grant) -> BitFlags<AccessFs> {
    use AccessFs::{
        IoctlDev, MakeReg, MakeSock, ReadDir, ReadFile, RemoveFile, Truncate, WriteFile,
    };
    match grant {
        Grant::Read => ReadFile | ReadDir | IoctlDev,
        Grant::ReadWrite => ReadFile | WriteFile | Truncate | IoctlDev,
        Grant::Names => ReadDir | MakeReg | RemoveFile,
        Grant::Sockets => MakeSock | RemoveFile,
        Grant::Files => ReadDir | ReadFile | WriteFile | Truncate | MakeReg | RemoveFile,
    }
}
