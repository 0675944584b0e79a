//! A client of the QEMU Machine Protocol (QMP), for tests with QEMU as the peer.

use harness::{TIMEOUT, poll_until};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to the QMP socket of a QEMU program.
pub(crate) struct Monitor {
    replies: BufReader<UnixStream>,
}

impl Monitor {
    #[track_caller]
    pub(crate) fn connect(path: &Path) -> Monitor {
        let mut stream = None;
        let connected = poll_until(TIMEOUT, || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        assert!(connected, "no QMP socket at {}", path.display());
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut monitor = Monitor { replies: BufReader::new(stream) };
        monitor.wait_for("\"QMP\"");
        monitor.execute(r#"{"execute": "qmp_capabilities"}"#);
        monitor
    }

    /// Executes a command, given in JSON, which must succeed.
    #[track_caller]
    pub(crate) fn execute(&mut self, command: &str) {
        writeln!(self.replies.get_mut(), "{command}").unwrap();
        self.wait_for("\"return\"");
    }

    /// Reads lines up to the first that contains `word`, and returns it.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            self.replies.read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "QEMU closed the connection before {word}");
            assert!(!line.contains("\"error\":"), "an error instead of {word}: {line}");
            if line.contains(word) {
                return line;
            }
        }
    }
}
