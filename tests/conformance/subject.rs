//! Which server is asked: our own, started for one test, or a foreign one somewhere.
//! Never lets two tests write to the one export of a foreign server at the same time.

use harness::raw::{FIXED_NEWSTYLE, NO_ZEROES, Wire};
use harness::session::{MODES, Mode, Request, Session};
use harness::{Builder, Endpoint, MIB, Server, TempDir, skip, sparse_image, temp_dir};
use std::net::ToSocketAddrs as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const ADDRESS: &str = "FLEXNBD_CONFORMANCE_ADDR";

/// Size of our own image when a test has no wish.
const IMAGE_SIZE: u64 = 64 * MIB;

/// The server that a test asks.
pub(crate) enum Subject {
    Ours(Box<Ours>),
    Foreign { target: Endpoint, _turn: MutexGuard<'static, ()> },
}

/// A server that we have started, with its image.
pub(crate) struct Ours {
    pub(crate) server: Server,
    pub(crate) image: PathBuf,
    _dir: TempDir,
}

impl Ours {
    /// A server over a sparse image of `size` bytes, after `adapt` has had its way with both.
    /// `None`, and a visible skip, when another server is to be asked.
    #[track_caller]
    pub(crate) fn start_with(
        what: &str,
        size: u64,
        adapt: impl FnOnce(Builder, &Path, &TempDir) -> Builder,
    ) -> Option<Ours> {
        if foreign().is_some() {
            skip(what, "it needs a server of our own, and another one is asked");
            return None;
        }
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", size);
        let server = adapt(Builder::serve(&image), &image, &dir).start();
        Some(Ours { server, image, _dir: dir })
    }

    /// The same, with arguments only.
    #[track_caller]
    pub(crate) fn start(what: &str, size: u64, arguments: &[&str]) -> Option<Ours> {
        Ours::start_with(what, size, |builder, _, _| builder.args(arguments))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        self.server.endpoint()
    }

    /// A session with our own server, which speaks every dialect.
    #[track_caller]
    pub(crate) fn session(&self, mode: Mode) -> Session {
        Session::open(self.endpoint(), mode).expect("our own server speaks every dialect")
    }
}

impl Subject {
    /// Whatever server is to be asked.
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

    /// Our own server must do what a foreign one may do otherwise.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self, Subject::Ours(_))
    }

    /// A session, or a visible skip when a foreign server does not speak the dialect.
    #[track_caller]
    pub(crate) fn session(&self, mode: Mode) -> Option<Session> {
        let session = Session::open(self.endpoint(), mode);
        if session.is_none() {
            assert!(!self.is_ours(), "our own server speaks {mode:?}");
            skip(&format!("what is asked in the {mode:?} dialect"), "the server does not speak it");
        }
        session
    }

    /// A session for each dialect that the server speaks.
    #[track_caller]
    pub(crate) fn sessions(&self) -> Vec<Session> {
        MODES.iter().filter_map(|mode| self.session(*mode)).collect()
    }

    /// A connection that has exchanged flags and may send options.
    #[track_caller]
    pub(crate) fn haggle(&self) -> Wire {
        Wire::haggle(self.endpoint(), FIXED_NEWSTYLE | NO_ZEROES)
    }

    /// Fails unless a new client is served.
    #[track_caller]
    pub(crate) fn still_serves(&self) {
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
    Some(Endpoint::Tcp(resolved.unwrap_or_else(|| panic!("{ADDRESS}={address} is no address"))))
}
