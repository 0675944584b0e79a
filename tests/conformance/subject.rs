//! The server under test: flexnbd, started for one test, or a foreign server that is already
//! running. Never lets two tests write to the export of a foreign server at the same time.

use harness::raw::{FIXED_NEWSTYLE, NO_ZEROES, Wire};
use harness::session::{MODES, Mode, Request, Session};
use harness::{Builder, Endpoint, MIB, Server, TempDir, skip, sparse_image, temp_dir};
use std::net::ToSocketAddrs as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const ADDRESS: &str = "FLEXNBD_CONFORMANCE_ADDR";

/// Size of the image in bytes, unless the test chooses it.
const IMAGE_SIZE: u64 = 64 * MIB;

/// The server under test.
pub(crate) enum Subject {
    Ours(Box<Ours>),
    Foreign { target: Endpoint, _turn: MutexGuard<'static, ()> },
}

/// A flexnbd server, with its image.
pub(crate) struct Ours {
    pub(crate) server: Server,
    pub(crate) image: PathBuf,
    _dir: TempDir,
}

impl Ours {
    /// Starts a server of a sparse image of `size` bytes; `adapt` changes the command and the image
    /// before. Returns `None`, and reports `what` as skipped, if a foreign server is under test.
    #[track_caller]
    pub(crate) fn start_with(
        what: &str,
        size: u64,
        adapt: impl FnOnce(Builder, &Path, &TempDir) -> Builder,
    ) -> Option<Ours> {
        if foreign().is_some() {
            skip(what, "it needs a flexnbd server, and a foreign server is under test");
            return None;
        }
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", size);
        let server = adapt(Builder::serve(&image), &image, &dir).start();
        Some(Ours { server, image, _dir: dir })
    }

    /// Like [`Ours::start_with`], with additional arguments only.
    #[track_caller]
    pub(crate) fn start(what: &str, size: u64, arguments: &[&str]) -> Option<Ours> {
        Ours::start_with(what, size, |builder, _, _| builder.args(arguments))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        self.server.endpoint()
    }

    /// Opens a session; flexnbd supports every mode.
    #[track_caller]
    pub(crate) fn session(&self, mode: Mode) -> Session {
        Session::open(self.endpoint(), mode).expect("flexnbd supports every mode")
    }
}

impl Subject {
    /// The foreign server if one is configured, else a new flexnbd server.
    #[track_caller]
    pub(crate) fn any() -> Subject {
        static TURN: Mutex<()> = Mutex::new(());
        match foreign() {
            Some(target) => {
                let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
                Subject::Foreign { target, _turn: turn }
            }
            None => Subject::Ours(Box::new(Ours::start("", IMAGE_SIZE, &[]).unwrap())),
        }
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        match self {
            Subject::Ours(ours) => ours.endpoint(),
            Subject::Foreign { target, .. } => target,
        }
    }

    /// Whether to check choices of flexnbd that the specification leaves to the server.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self, Subject::Ours(_))
    }

    /// Opens a session; skips, with a line on stderr, a mode that a foreign server does not
    /// support.
    #[track_caller]
    pub(crate) fn session(&self, mode: Mode) -> Option<Session> {
        let session = Session::open(self.endpoint(), mode);
        if session.is_none() {
            assert!(!self.is_ours(), "flexnbd supports {mode:?}");
            skip(&format!("requests in {mode:?} mode"), "the server does not support it");
        }
        session
    }

    /// Opens a session in each mode that the server supports.
    #[track_caller]
    pub(crate) fn sessions(&self) -> Vec<Session> {
        MODES.iter().filter_map(|mode| self.session(*mode)).collect()
    }

    /// Connects and exchanges flags; the next bytes are options.
    #[track_caller]
    pub(crate) fn haggle(&self) -> Wire {
        Wire::haggle(self.endpoint(), FIXED_NEWSTYLE | NO_ZEROES)
    }

    /// Fails unless a new client can read.
    #[track_caller]
    pub(crate) fn assert_serves(&self) {
        let mut session = Session::open(self.endpoint(), Mode::Simple).unwrap();
        session.ok(Request::new(harness::raw::READ, 0, 4096));
    }
}

fn foreign() -> Option<Endpoint> {
    let address = std::env::var(ADDRESS).ok().filter(|a| !a.is_empty())?;
    if address.starts_with('/') {
        return Some(Endpoint::Unix(address.into()));
    }
    let resolved = address.to_socket_addrs().ok().and_then(|mut all| all.next());
    Some(Endpoint::Tcp(resolved.unwrap_or_else(|| panic!("{ADDRESS}={address} is not an address"))))
}
