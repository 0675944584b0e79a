//! One host of a migration: an image, an address, a control socket, an ownership record.
//! Starts flexnbd there and sends it commands over the control socket. Never uses the library.

use crate::{Builder, Endpoint, Program, Server, TIMEOUT, poll_until, unused_loopback_address};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The reply to `mirror` when the migration has begun.
pub const MIRROR_STARTED: &str = "0: Mirror started";
/// The variable that names the state directory.
const STATE_DIRECTORY: &str = "STATE_DIRECTORY";

/// An image, and the address and control socket of the process that serves or receives it.
#[derive(Clone, Debug)]
pub struct Host {
    /// The image, which need not exist.
    pub image: PathBuf,
    /// The address at which the process listens.
    pub address: SocketAddr,
    /// The control socket.
    pub control: PathBuf,
    state: PathBuf,
    wrapper: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Host {
    /// A host whose files in `directory` have this name. Creates no files.
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

    /// The state directory, which holds records that cannot be stored with the image.
    pub fn state_directory(&self) -> &Path {
        &self.state
    }

    /// Starts every process of this host through a wrapper that executes its arguments.
    pub fn through(mut self, wrapper: &[&str]) -> Host {
        self.wrapper = wrapper.iter().map(ToString::to_string).collect();
        self
    }

    /// Sets the address.
    pub fn at(mut self, address: SocketAddr) -> Host {
        self.address = address;
        self
    }

    /// Adds a variable to the environment of every process of this host.
    pub fn env(mut self, name: &str, value: &str) -> Host {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `flexnbd MODE` on this image with a control socket, to be started by the caller.
    pub fn mode(&self, mode: &str) -> Builder {
        let _ = std::fs::create_dir_all(&self.state);
        let mut builder = Builder::mode(mode, &self.image)
            .args(["--verbose".as_ref(), "--sock".as_ref(), self.control.as_os_str()])
            .env(STATE_DIRECTORY, &self.state)
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

    /// Sends `mirror` to this address and returns the reply. `more` are the arguments after the
    /// port: action, bind address, speed.
    #[track_caller]
    pub fn mirror_to(&self, to: SocketAddr, more: &[&str]) -> String {
        let (ip, port) = (to.ip().to_string(), to.port().to_string());
        self.command(&[&["mirror", &ip, &port], more].concat())
    }

    /// Sends a command and returns the reply. Retries for [`TIMEOUT`] while no process replies.
    #[track_caller]
    pub fn command(&self, lines: &[&str]) -> String {
        let mut reply = None;
        let replied = poll_until(TIMEOUT, || {
            reply = self.try_command(lines);
            reply.is_some()
        });
        assert!(replied, "no reply at the control socket {}", self.control.display());
        reply.unwrap()
    }

    /// Sends a command once. Returns the reply; `None` if no process listens or replies.
    pub fn try_command(&self, lines: &[&str]) -> Option<String> {
        let mut socket = UnixStream::connect(&self.control).ok()?;
        socket.set_read_timeout(Some(TIMEOUT)).ok()?;
        socket.write_all(format!("{}\n\n", lines.join("\n")).as_bytes()).ok()?;
        let mut reply = String::new();
        socket.read_to_string(&mut reply).ok()?;
        (!reply.is_empty()).then(|| reply.trim_end().to_owned())
    }

    /// The keys and values of `status`; empty if there is no reply.
    pub fn status(&self) -> BTreeMap<String, String> {
        let reply = self.try_command(&["status"]).unwrap_or_default();
        let pairs = reply.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// One value of `status`; empty if it is missing.
    pub fn status_of(&self, key: &str) -> String {
        self.status().remove(key).unwrap_or_default()
    }

    /// Waits until `status` has this value of this key.
    #[track_caller]
    pub fn wait_for_status(&self, key: &str, value: &str) {
        let mut last = BTreeMap::new();
        let matched = poll_until(TIMEOUT, || {
            last = self.status();
            last.get(key).is_some_and(|now| now == value)
        });
        assert!(matched, "no {key}={value} within {TIMEOUT:?}; last status: {last:?}");
    }

    /// The id of the disk in the image, which no process need serve; empty if it has none.
    #[track_caller]
    pub fn disk_id(&self) -> String {
        let state = format!("{STATE_DIRECTORY}={}", self.state.display());
        let status = Program::new("env").args([state.as_ref(), crate::flexnbd().as_os_str()]);
        let text = status.words("status --file").args([&self.image]).ok();
        let id = text.split_whitespace().find_map(|pair| pair.strip_prefix("disk_id="));
        id.unwrap_or_default().to_owned()
    }

    /// Waits until the process that serves the image has given its disk an id, and returns that.
    #[track_caller]
    pub fn wait_for_disk_id(&self) -> String {
        let has_id = poll_until(TIMEOUT, || !self.status_of("disk_id").is_empty());
        assert!(has_id, "the disk has no id within {TIMEOUT:?}: {:?}", self.status());
        self.status_of("disk_id")
    }

    /// The state in the ownership record, such as `departed`; empty if there is no record.
    pub fn record(&self) -> String {
        // In the order of flexnbd, which prefers a record in the state directory.
        let record = self.record_in_state_directory();
        let record = record.or_else(|| xattr::get(&self.image, "user.flexnbd").ok().flatten());
        let text = String::from_utf8(record.unwrap_or_default()).unwrap();
        text.split_whitespace().nth(2).unwrap_or_default().to_owned()
    }

    /// The newest record in the state directory, without ids of disks, temporary files and tombstones of
    /// deleted images.
    fn record_in_state_directory(&self) -> Option<Vec<u8>> {
        let is_record = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("%2F")
                && !["~new", "~spare", ".departed"].iter().any(|end| name.ends_with(end))
        };
        let age = |path: &PathBuf| std::fs::metadata(path).and_then(|data| data.modified()).ok();
        let paths = std::fs::read_dir(&self.state).ok()?.flatten().map(|entry| entry.path());
        std::fs::read(paths.filter(is_record).max_by_key(age)?).ok()
    }
}
