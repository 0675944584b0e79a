//! A server with its own image, reached over TCP or a unix socket, newstyle or oldstyle.

use crate::{Builder, MIB, Server, sparse_image, temp_dir};
use std::path::PathBuf;
use tempfile::TempDir;

/// The two handshakes of NBD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Fixed newstyle.
    New,
    /// Oldstyle, with `--oldstyle`.
    Old,
}

/// The two kinds of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A port of 127.0.0.1.
    Tcp,
    /// A unix socket in the directory of the image.
    Unix,
}

/// A server and its image, in a temporary directory.
pub struct Served {
    /// The process.
    pub server: Server,
    /// The served image.
    pub image: PathBuf,
    /// The directory of the image and of the unix socket.
    pub dir: TempDir,
}

impl Served {
    /// Serves a sparse image of 64 MiB.
    #[track_caller]
    pub fn start(transport: Transport, style: Style) -> Served {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 64 * MIB);
        Served::existing(dir, image, transport, style, &[])
    }

    /// Serves such an image in newstyle over TCP, with more arguments.
    #[track_caller]
    pub fn with(arguments: &[&str]) -> Served {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 64 * MIB);
        Served::existing(dir, image, Transport::Tcp, Style::New, arguments)
    }

    /// Serves an existing image.
    #[track_caller]
    pub fn existing(
        dir: TempDir,
        image: PathBuf,
        transport: Transport,
        style: Style,
        arguments: &[&str],
    ) -> Served {
        let mut builder = Builder::serve(&image).args(arguments);
        if transport == Transport::Unix {
            builder = builder.unix(&dir.path().join("nbd.sock"));
        }
        if style == Style::Old {
            builder = builder.args(["--oldstyle"]);
        }
        Served { server: builder.start(), image, dir }
    }

    /// The NBD URI of the export.
    pub fn uri(&self) -> String {
        self.server.uri()
    }

    /// A path in the directory of the image.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

const TRANSPORTS_AND_STYLES: [(Transport, Style); 4] = [
    (Transport::Tcp, Style::New),
    (Transport::Unix, Style::New),
    (Transport::Tcp, Style::Old),
    (Transport::Unix, Style::Old),
];

/// Runs `test` against a new server of 64 MiB for each transport and style. Prints them, so that
/// the output of a failed test names them.
#[track_caller]
pub fn for_each_transport_and_style(test: impl Fn(&Served, Style)) {
    for (transport, style) in TRANSPORTS_AND_STYLES {
        let served = Served::start(transport, style);
        eprintln!("over {transport:?}, {style:?} style:");
        test(&served, style);
    }
}
