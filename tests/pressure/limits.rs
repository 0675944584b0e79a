//! Limits of the system that a server runs into: one request or one session fails, no more.

use crate::common::raw::ENOSPC;
use crate::common::session::{MODES, Request, Session};
use crate::common::{Builder, KIB, sparse_image, temp_dir};
use std::path::Path;

/// A shell that sets limits and then becomes the server.
fn limited(limit: &str) -> [String; 4] {
    ["sh", "-c", &format!("ulimit {limit} && exec \"$@\""), "sh"].map(str::to_owned)
}

#[test]
fn a_write_beyond_the_file_size_limit_is_enospc() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 64 * KIB);
    // Blocks of 512 bytes: the second half of the image cannot be written.
    let server = Builder::serve(Path::new(&image)).through(limited("-f 64")).start();
    let half = 32 * KIB;
    for mode in MODES {
        let mut session = Session::open(server.target(), mode).unwrap();
        for offset in [half, half + 512, 63 * KIB] {
            assert_eq!(session.ask(Request::write(offset, &[7; 512])).error, ENOSPC, "{mode:?}");
        }
        session.ok(Request::write(half - 512, &[7; 512]));
        assert_eq!(session.read(half, 512), [0; 512]);
    }
}
