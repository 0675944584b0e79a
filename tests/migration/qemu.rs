//! Other people's programs as peers: started where a test wants them, and ended with the test.
//! Never decides whether they did well; the tests do.

use harness::{TIMEOUT, poll_until};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A program of somebody else's that runs until it is dropped.
pub(crate) struct Program(Child);

impl Program {
    /// Starts it and waits until `ready` says that it can be used.
    #[track_caller]
    pub(crate) fn start(words: &[&str], mut ready: impl FnMut() -> bool) -> Program {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut program = Program(command.spawn().unwrap());
        let came = poll_until(TIMEOUT, || {
            assert!(program.0.try_wait().unwrap().is_none(), "{words:?} has ended");
            ready()
        });
        assert!(came, "{words:?} is never ready");
        program
    }

    /// Ends it, politely, and waits until it has ended.
    pub(crate) fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        assert!(poll_until(TIMEOUT, || self.0.try_wait().unwrap().is_some()), "it does not end");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A connection to the monitor of a qemu program.
pub(crate) struct Monitor {
    replies: BufReader<UnixStream>,
}

impl Monitor {
    #[track_caller]
    pub(crate) fn connect(path: &Path) -> Monitor {
        let mut stream = None;
        let came = poll_until(TIMEOUT, || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        assert!(came, "no monitor at {}", path.display());
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut monitor = Monitor { replies: BufReader::new(stream) };
        monitor.wait_for("\"QMP\"");
        monitor.execute(r#"{"execute": "qmp_capabilities"}"#);
        monitor
    }

    /// Gives an order in JSON, which must succeed.
    #[track_caller]
    pub(crate) fn execute(&mut self, order: &str) {
        writeln!(self.replies.get_mut(), "{order}").unwrap();
        self.wait_for("\"return\"");
    }

    /// Reads until something holds this word.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            self.replies.read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "the monitor closed before it said {word}");
            assert!(!line.contains("\"error\":"), "waiting for {word}: {line}");
            if line.contains(word) {
                return line;
            }
        }
    }
}
