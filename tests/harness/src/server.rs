//! A `flexnbd` server process: starts it, waits until it listens, reads its stderr and `/proc`
//! entries, stops it. Never waits by connecting, so that the server has no clients but those of the
//! test.

use crate::wait::POLL_INTERVAL;
use crate::{Endpoint, TIMEOUT, free_port, poll_until, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

/// The command line and environment of a server, before it is started.
pub struct Builder {
    program: PathBuf,
    arguments: Vec<OsString>,
    wrapper: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    endpoint: Option<Endpoint>,
}

impl Builder {
    /// `flexnbd serve --file IMAGE` on a free port of 127.0.0.1.
    pub fn serve(image: &Path) -> Builder {
        Builder::mode("serve", image)
    }

    /// `flexnbd MODE --file IMAGE`, such as `listen`, on a free port of 127.0.0.1.
    pub fn mode(mode: &str, image: &Path) -> Builder {
        Builder::new(crate::flexnbd(), vec![mode.into(), "--file".into(), image.into()])
    }

    /// `flexnbd proxy` on a free port of 127.0.0.1; the arguments must name the upstream.
    pub fn proxy() -> Builder {
        Builder::new(crate::flexnbd(), vec!["proxy".into()])
    }

    /// `flexnbd-proxy`, a link to the program, on a free port of 127.0.0.1.
    pub fn proxy_by_name(link: &Path) -> Builder {
        Builder::new(link.to_owned(), Vec::new())
    }

    fn new(program: PathBuf, arguments: Vec<OsString>) -> Builder {
        Builder { program, arguments, wrapper: Vec::new(), environment: Vec::new(), endpoint: None }
    }

    /// Listens on this unix socket instead of a TCP port.
    pub fn unix(self, socket: &Path) -> Builder {
        self.at(Endpoint::Unix(socket.to_owned()))
    }

    /// Listens at this endpoint.
    pub fn at(mut self, endpoint: Endpoint) -> Builder {
        self.endpoint = Some(endpoint);
        self
    }

    /// Adds command line arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Starts the server through a wrapper such as prlimit(1), which must `exec` its arguments, so
    /// that the process id stays the same.
    pub fn through<S: AsRef<OsStr>>(mut self, wrapper: impl IntoIterator<Item = S>) -> Self {
        self.wrapper = wrapper.into_iter().map(|a| a.as_ref().to_owned()).collect();
        self
    }

    /// Adds a variable to the server's environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Builder {
        self.environment.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Starts the server and returns once it listens. Without an endpoint, tries up to three ports,
    /// since another process may bind a free port first.
    #[track_caller]
    pub fn start(self) -> Server {
        let mut last = String::new();
        for _ in 0..3 {
            let free = || Endpoint::localhost(free_port());
            let mut server = self.spawn_at(self.endpoint.clone().unwrap_or_else(free));
            if server.starts_listening() {
                return server;
            }
            last = server.failure();
        }
        panic!("the server does not listen: {last}");
    }

    /// Starts the server, which must have an endpoint, and returns without waiting.
    #[track_caller]
    pub fn spawn(self) -> Server {
        let endpoint = self.endpoint.clone().expect("`at` was called");
        self.spawn_at(endpoint)
    }

    fn spawn_at(&self, endpoint: Endpoint) -> Server {
        let mut words: Vec<OsString> = self.wrapper.clone();
        words.push(self.program.clone().into());
        words.extend(self.arguments.iter().cloned());
        words.push("--addr".into());
        match &endpoint {
            Endpoint::Tcp(address) => {
                words.push(address.ip().to_string().into());
                words.push("--port".into());
                words.push(address.port().to_string().into());
            }
            Endpoint::Unix(path) => words.push(path.into()),
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {words:?}: {e}"));
        let stderr = StderrReader::start(&mut child);
        Server { child, endpoint, stderr }
    }
}

/// Reads a child's stderr to its end on a thread, so that the child never blocks on a full pipe.
pub struct StderrReader {
    text: Arc<Mutex<String>>,
    thread: Option<JoinHandle<()>>,
}

impl StderrReader {
    /// Waits until a process exits, and for the end of its stderr, which this reads.
    #[track_caller]
    pub fn wait_for_exit(&mut self, child: &mut Child) -> ExitStatus {
        let mut status = None;
        wait_until("the process to end", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        self.wait();
        status.unwrap()
    }

    /// Starts to read the stderr of a child, which must be a pipe.
    pub fn start(child: &mut Child) -> StderrReader {
        let mut pipe = child.stderr.take().unwrap();
        let text = Arc::new(Mutex::new(String::new()));
        let copy = Arc::clone(&text);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                copy.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        StderrReader { text, thread: Some(thread) }
    }

    /// The text read so far.
    pub fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    /// Waits for the end of the pipe. Afterwards [`StderrReader::text`] is complete.
    pub fn wait(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A running server. Dropping it kills it, and prints its stderr if the test fails.
pub struct Server {
    child: Child,
    endpoint: Endpoint,
    stderr: StderrReader,
}

impl Server {
    /// The endpoint at which it listens.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The TCP port; fails for a unix socket.
    pub fn port(&self) -> u16 {
        match &self.endpoint {
            Endpoint::Tcp(address) => address.port(),
            Endpoint::Unix(path) => panic!("{} has no port", path.display()),
        }
    }

    /// The NBD URI of its default export.
    pub fn uri(&self) -> String {
        self.endpoint.uri()
    }

    /// The text printed to stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until `part` is on its stderr.
    #[track_caller]
    pub fn wait_for_stderr(&self, part: &str) {
        let found = poll_until(TIMEOUT, || self.stderr().contains(part));
        assert!(found, "no {part:?} within {TIMEOUT:?} on stderr: {}", self.stderr());
    }

    /// Waits until it accepts connections at this control socket.
    #[track_caller]
    pub fn wait_for_control(&self, path: &Path) {
        wait_until("the control socket", || std::os::unix::net::UnixStream::connect(path).is_ok());
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    /// Waits until the process exits.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> ExitStatus {
        self.stderr.wait_for_exit(&mut self.child)
    }

    /// Sends SIGTERM and waits until the process exits.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_for_end()
    }

    /// Its exit status; `None` while it runs.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Whether the process has not exited.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its present resources.
    pub fn resources(&self) -> Resources {
        Resources::of(self.pid())
    }

    /// Its resources once the counts of descriptors and threads are stable. A server that listens
    /// may still start threads, and sessions of closed connections may still end.
    #[track_caller]
    pub fn settled_resources(&self) -> Resources {
        const SAME_SAMPLES: u32 = 20;
        let mut last = self.resources();
        let mut same = 0;
        wait_until("the resources of the server to settle", || {
            let now = self.resources();
            let still = now.descriptors == last.descriptors && now.threads == last.threads;
            same = if still { same + 1 } else { 0 };
            last = now;
            same >= SAME_SAMPLES
        });
        last
    }

    /// Waits until it listens or exits. Returns whether it listens.
    pub fn starts_listening(&mut self) -> bool {
        let start = Instant::now();
        while !self.listens() {
            if !self.is_running() {
                return false;
            }
            assert!(
                start.elapsed() < TIMEOUT,
                "the server neither listens nor exits: {}",
                self.stderr()
            );
            std::thread::sleep(POLL_INTERVAL);
        }
        true
    }

    fn listens(&self) -> bool {
        let inodes = listening_inodes(self.pid(), &self.endpoint);
        !inodes.is_empty() && descriptors(self.pid()).iter().any(|d| inodes.contains(d))
    }

    fn failure(&mut self) -> String {
        let status = self.wait_for_end();
        format!("it exited with {status}, stderr: {}", self.stderr())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("stderr of the server:\n{}", self.stderr());
        }
    }
}

/// The listening sockets at `endpoint` in the network namespace of the process, as the targets of
/// links in `/proc/PID/fd`.
fn listening_inodes(pid: u32, endpoint: &Endpoint) -> HashSet<String> {
    let table = match endpoint {
        Endpoint::Tcp(address) if address.is_ipv4() => "tcp",
        Endpoint::Tcp(_) => "tcp6",
        Endpoint::Unix(_) => "unix",
    };
    let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        listening_inode(endpoint, &fields).map(|inode| format!("socket:[{inode}]"))
    };
    text.lines().filter_map(inode).collect()
}

/// The inode in a line of `/proc/PID/net/*` if it describes a listening socket at `endpoint`.
fn listening_inode<'a>(endpoint: &Endpoint, fields: &[&'a str]) -> Option<&'a str> {
    let field = |i: usize| fields.get(i).copied();
    match endpoint {
        Endpoint::Tcp(address) => {
            let port = format!(":{:04X}", address.port());
            (field(3)? == "0A" && field(1)?.ends_with(&port)).then(|| field(9)).flatten()
        }
        Endpoint::Unix(path) => {
            let is_path = field(7).is_some_and(|p| path == Path::new(p));
            (field(3)? == "00010000" && is_path).then(|| field(6)).flatten()
        }
    }
}

/// The targets of the links in `/proc/PID/fd`; empty if the process has exited.
fn descriptors(pid: u32) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let link = |entry: std::fs::DirEntry| std::fs::read_link(entry.path()).ok();
    entries.flatten().filter_map(link).map(|l| l.to_string_lossy().into_owned()).collect()
}

/// Resources of a process, from `/proc`.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: u64,
    /// Resident memory. The kernel updates its counters in batches, so that this and the peak may be
    /// some pages lower than before.
    pub rss_bytes: u64,
    /// The peak of resident memory.
    pub rss_bytes_peak: u64,
}

impl Resources {
    /// The resources of any process; zero if it has exited.
    pub fn of(pid: u32) -> Resources {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let number = |key: &str| -> u64 {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or("0");
            line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        Resources {
            descriptors: descriptors(pid).len(),
            threads: number("Threads:"),
            rss_bytes: number("VmRSS:") * 1024,
            rss_bytes_peak: number("VmHWM:") * 1024,
        }
    }
}
