//! The monitor of a qemu program (QMP), for tests in which qemu is the peer.

use harness::{TIMEOUT, poll_until};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

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
