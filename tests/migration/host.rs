//! One side of a migration as a test sees it: an image, an address, a control socket, a record.
//! Starts flexnbd there and talks to it in the words of the control socket. Never uses the library.

use crate::common::{Builder, DEADLINE, Server, comes_true, server::Target};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The port of NBD, and where it begins. Every host has an address of its own, so that ports cannot collide.
const PORT: u16 = 10809;
/// Where records are kept when they cannot be kept with the image.
const STATE: &str = "STATE_DIRECTORY";

/// An image and where it is served, received and administered.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) image: PathBuf,
    pub(crate) address: SocketAddr,
    pub(crate) control: PathBuf,
    state: PathBuf,
    wrapper: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Host {
    /// A host whose files are in `directory` and bear this name; nothing exists yet.
    pub(crate) fn new(directory: &Path, name: &str) -> Host {
        let state = directory.join(format!("{name}.state"));
        Host {
            image: directory.join(format!("{name}.img")),
            address: fresh_address(),
            control: directory.join(format!("{name}.sock")),
            state,
            wrapper: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Where records are kept that cannot be kept with the image.
    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    /// Runs everything through a program that executes its arguments.
    pub(crate) fn through(mut self, wrapper: &[&str]) -> Host {
        self.wrapper = wrapper.iter().map(ToString::to_string).collect();
        self
    }

    pub(crate) fn at(mut self, address: SocketAddr) -> Host {
        self.address = address;
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Host {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `flexnbd MODE` on this image, with the control socket, ready to be started.
    pub(crate) fn mode(&self, mode: &str) -> Builder {
        let _ = std::fs::create_dir_all(&self.state);
        let mut builder = Builder::mode(mode, &self.image)
            .args(["--verbose".as_ref(), "--sock".as_ref(), self.control.as_os_str()])
            .env(STATE, &self.state)
            .through(&self.wrapper)
            .at(Target::Tcp(self.address));
        for (name, value) in &self.environment {
            builder = builder.env(name, value);
        }
        builder
    }

    #[track_caller]
    pub(crate) fn serve(&self) -> Server {
        self.mode("serve").start()
    }

    #[track_caller]
    pub(crate) fn listen(&self) -> Server {
        self.mode("listen").start()
    }

    /// Orders the migration there; the reply. `more` follows the port: action, bind, speed.
    #[track_caller]
    pub(crate) fn mirror_to(&self, to: SocketAddr, more: &[&str]) -> String {
        let (ip, port) = (to.ip().to_string(), to.port().to_string());
        self.order(&[&["mirror", &ip, &port], more].concat())
    }

    /// Gives an order; fails when nobody takes it.
    #[track_caller]
    pub(crate) fn order(&self, lines: &[&str]) -> String {
        let mut reply = None;
        let asked = comes_true(DEADLINE, || {
            reply = self.try_order(lines);
            reply.is_some()
        });
        assert!(asked, "nobody takes orders at {}", self.control.display());
        reply.unwrap()
    }

    /// The reply to an order, when somebody is there to obey it.
    pub(crate) fn try_order(&self, lines: &[&str]) -> Option<String> {
        let mut socket = UnixStream::connect(&self.control).ok()?;
        socket.set_read_timeout(Some(DEADLINE)).ok()?;
        socket.write_all(format!("{}\n\n", lines.join("\n")).as_bytes()).ok()?;
        let mut reply = String::new();
        socket.read_to_string(&mut reply).ok()?;
        (!reply.is_empty()).then(|| reply.trim_end().to_owned())
    }

    /// What `status` says, when somebody answers.
    pub(crate) fn status(&self) -> BTreeMap<String, String> {
        let reply = self.try_order(&["status"]).unwrap_or_default();
        let pairs = reply.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// One value of `status`; empty when it is not there.
    pub(crate) fn status_of(&self, key: &str) -> String {
        self.status().remove(key).unwrap_or_default()
    }

    #[track_caller]
    pub(crate) fn wait_for_status(&self, key: &str, value: &str) {
        let mut seen = BTreeMap::new();
        let came = comes_true(DEADLINE, || {
            seen = self.status();
            seen.get(key).is_some_and(|now| now == value)
        });
        assert!(came, "waited in vain for {key}={value}; at last: {seen:?}");
    }

    /// The word of the ownership record; empty when there is none.
    pub(crate) fn record(&self) -> String {
        // A record in the state directory wins.
        let record = self.record_apart();
        let record = record.or_else(|| xattr::get(&self.image, "user.flexnbd").ok().flatten());
        let text = String::from_utf8(record.unwrap_or_default()).unwrap();
        text.split_whitespace().nth(2).unwrap_or_default().to_owned()
    }

    /// The youngest record in the state directory, without what is temporary and what tells of
    /// images that were deleted.
    fn record_apart(&self) -> Option<Vec<u8>> {
        let is_record = |path: &PathBuf| {
            let name = path.to_string_lossy();
            !["~new", "~spare", ".departed"].iter().any(|end| name.ends_with(end))
        };
        let age = |path: &PathBuf| std::fs::metadata(path).and_then(|data| data.modified()).ok();
        let paths = std::fs::read_dir(&self.state).ok()?.flatten().map(|entry| entry.path());
        std::fs::read(paths.filter(is_record).max_by_key(age)?).ok()
    }
}

/// An address of the loopback network that no other test uses.
pub(crate) fn fresh_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id() % 0xff00 + 0x100;
    let [high, low] = u16::try_from(process).unwrap().to_be_bytes();
    let (round, last) = (u16::try_from(number / 250).unwrap(), (number % 250 + 1) as u8);
    SocketAddr::from((Ipv4Addr::new(127, high, low, last), PORT + round))
}
