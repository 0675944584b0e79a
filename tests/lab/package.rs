//! The Debian package of the program under test, in two versions.

use crate::session::packages;
use harness::package;
use std::path::PathBuf;

/// Outside a session: the directory of both packages, which the first call builds.
pub(crate) fn directory() -> PathBuf {
    package::build(env!("CARGO_PKG_VERSION"))
}

/// Inside a session: the package under test.
pub(crate) fn current() -> PathBuf {
    packages().join(package::CURRENT)
}

/// Inside a session: the package with the higher version.
pub(crate) fn next() -> PathBuf {
    packages().join(package::NEXT)
}
