//! A service that cannot do its work any more ends, so that it is started again.

use crate::common::{Builder, MIB, require_tool, run, sparse_image, temp_dir};
use std::net::TcpStream;

#[test]
fn a_server_that_can_let_nobody_in_any_more_ends_with_an_error() {
    if !require_tool("prlimit") {
        return;
    }
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "disk.img", MIB);
    let mut server = Builder::serve(&image).start();
    // poll(2) refuses more descriptors than a process may have.
    run("prlimit", &["--pid", &server.pid().to_string(), "--nofile=0:0"]);
    // Makes it look up.
    let _client = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    assert_eq!(server.wait_for_end().code(), Some(1));
    assert!(server.stderr().contains(":F:"), "{}", server.stderr());
    assert!(server.stderr().contains("no longer accepting clients: "), "{}", server.stderr());
}
