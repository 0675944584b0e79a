//! The options of `serve`, `listen` and `proxy` that confine the process.

use crate::sandbox::user::UserName;

/// How the process is confined.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxFlags {
    /// Do not restrict the process to the files and system calls that it needs
    #[arg(long)]
    pub no_sandbox: bool,

    /// Become USER, or USER:GROUP, when the sockets and the image are open; for root
    #[arg(long, value_name = "USER")]
    pub user: Option<UserName>,
}

impl SandboxFlags {
    /// Merges these settings with `fallback`; the sandbox is off if either switches it off.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        Self {
            no_sandbox: self.no_sandbox || fallback.no_sandbox,
            user: self.user.or(fallback.user),
        }
    }
}
