//! One side of a migration as a test sees it: an image, an address, a control socket, a record.
//! Starts flexnbd there and talks to it in the words of the control socket. Never uses the library.

use crate::{Builder, Endpoint, Server, TIMEOUT, poll_until, unused_loopback_address};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The reply to `mirror` when the migration has begun.
pub const MIRROR_STARTED: &str = "0: Mirror started";
/// Where records are kept when they cannot be kept with the image.
const STATE: &str = "STATE_DIRECTORY";

/// An image and where it is served, received and administered.
#[derive(Clone, Debug)]
pub struct Host {
    /// The image, which need not exist.
    pub image: PathBuf,
    /// Where clients and sources connect.
    pub address: SocketAddr,
    /// The control socket.
    pub control: PathBuf,
    state: PathBuf,
    wrapper: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Host {
    /// A host whose files are in `directory` and bear this name; nothing exists yet.
    pub fn new(directory: &Path, name: &str) -> Host {
        let state = directory.join(format!("{name}.state"));
        Host {
            image: directory.join(format!("{name}.img")),
            address: unused_loopback_address(),
            control: directory.join(format!("{name}.sock")),
            state,
            wrapper: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Where records are kept that cannot be kept with the image.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Runs everything through a program that executes its arguments.
    pub fn through(mut self, wrapper: &[&str]) -> Host {
        self.wrapper = wrapper.iter().map(ToString::to_string).collect();
        self
    }

    /// Listens at this address instead.
    pub fn at(mut self, address: SocketAddr) -> Host {
        self.address = address;
        self
    }

    /// Adds a variable to the environment of every process of this host.
    pub fn env(mut self, name: &str, value: &str) -> Host {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `flexnbd MODE` on this image, with the control socket, ready to be started.
    pub fn mode(&self, mode: &str) -> Builder {
        let _ = std::fs::create_dir_all(&self.state);
        let mut builder = Builder::mode(mode, &self.image)
            .args(["--verbose".as_ref(), "--sock".as_ref(), self.control.as_os_str()])
            .env(STATE, &self.state)
            .through(&self.wrapper)
            .at(Endpoint::Tcp(self.address));
        for (name, value) in &self.environment {
            builder = builder.env(name, value);
        }
        builder
    }

    /// Starts `flexnbd serve` and returns when it listens.
    #[track_caller]
    pub fn serve(&self) -> Server {
        self.mode("serve").start()
    }

    /// Starts `flexnbd listen` and returns when it listens.
    #[track_caller]
    pub fn listen(&self) -> Server {
        self.mode("listen").start()
    }

    /// Orders the migration there; the reply. `more` follows the port: action, bind, speed.
    #[track_caller]
    pub fn mirror_to(&self, to: SocketAddr, more: &[&str]) -> String {
        let (ip, port) = (to.ip().to_string(), to.port().to_string());
        self.command(&[&["mirror", &ip, &port], more].concat())
    }

    /// Gives an order; fails when nobody takes it.
    #[track_caller]
    pub fn command(&self, lines: &[&str]) -> String {
        let mut reply = None;
        let asked = poll_until(TIMEOUT, || {
            reply = self.try_command(lines);
            reply.is_some()
        });
        assert!(asked, "nobody takes orders at {}", self.control.display());
        reply.unwrap()
    }

    /// The reply to an order, when somebody is there to obey it.
    pub fn try_command(&self, lines: &[&str]) -> Option<String> {
        let mut socket = UnixStream::connect(&self.control).ok()?;
        socket.set_read_timeout(Some(TIMEOUT)).ok()?;
        socket.write_all(format!("{}\n\n", lines.join("\n")).as_bytes()).ok()?;
        let mut reply = String::new();
        socket.read_to_string(&mut reply).ok()?;
        (!reply.is_empty()).then(|| reply.trim_end().to_owned())
    }

    /// What `status` says, when somebody answers.
    pub fn status(&self) -> BTreeMap<String, String> {
        let reply = self.try_command(&["status"]).unwrap_or_default();
        let pairs = reply.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// One value of `status`; empty when it is not there.
    pub fn status_of(&self, key: &str) -> String {
        self.status().remove(key).unwrap_or_default()
    }

    /// Waits until `status` shows this value of this key.
    #[track_caller]
    pub fn wait_for_status(&self, key: &str, value: &str) {
        let mut seen = BTreeMap::new();
        let came = poll_until(TIMEOUT, || {
            seen = self.status();
            seen.get(key).is_some_and(|now| now == value)
        });
        assert!(came, "waited in vain for {key}={value}; at last: {seen:?}");
    }

    /// The word of the ownership record; empty when there is none.
    pub fn record(&self) -> String {
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
