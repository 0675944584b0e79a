//! Started on demand, side by side, on every kind of address.
//! Never restarts anything under load; that is for `restart.rs`.

use crate::common::MIB;
use crate::common::session::Mode;
use crate::host::{DISK, Host, SOCKETS};
use crate::session::in_lab;
use crate::steady::Steady;

const SIZE: u64 = 64 * MIB;

/// A host whose disk is served on demand: only the sockets are enabled.
fn on_demand() -> Host {
    let host = Host::installed("a");
    host.configure_disk(SIZE);
    host.systemctl("enable --now flexnbd@disk.socket");
    assert_eq!(host.state(DISK), "inactive");
    host
}

#[test]
fn the_first_client_starts_the_service() {
    in_lab(|| {
        let host = on_demand();
        let client = Steady::start(&host.nbd(), Mode::Structured, 0..SIZE);
        client.wait_for_answers(100);
        assert_eq!(host.state(DISK), "active");
        client.stop();
        for socket in SOCKETS {
            assert_eq!(host.state(socket), "active", "{socket} came along");
        }
    });
}
