//! Started by four lines, on demand, side by side, on every kind of address.
//! Never restarts anything under load; that is for `restart.rs`.

use crate::host::{DISK, Host, PORT, SOCKETS};
use crate::knock::Knocker;
use crate::session::in_lab;
use crate::steady::{Steady, wait_for_answers};
use harness::session::{MODES, Mode};
use harness::{Endpoint, MIB, wait_until};
use std::net::SocketAddr;

const SIZE: u64 = 64 * MIB;
/// Enough for a client to have done everything it does.
const A_FEW: u64 = 100;

/// A host whose disk is served on demand: only this socket, and what it brings along, is enabled.
fn on_demand(socket: &str) -> Host {
    let host = Host::installed("a");
    host.configure_disk(SIZE);
    host.systemctl(&format!("enable --now {socket}"));
    assert_eq!(host.state(DISK), "inactive");
    host
}

#[test]
fn four_lines_and_a_start_are_all() {
    in_lab(|| {
        let host = Host::installed("a");
        let lines = "FILE=/var/lib/flexnbd/disk.img\nCREATE=64M\nADDR=::\nPORT=10809\n";
        host.write("/etc/flexnbd/disk.conf", lines);
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.disk_status("disk")["size"], SIZE.to_string());
        let client = Steady::start(&host.nbd(), Mode::Extended, 0..SIZE);
        client.wait_for_answers(A_FEW);
        client.stop();
        let owner = host.ok("stat --format=%U:%a /var/lib/flexnbd/disk.img");
        assert_eq!(owner.trim(), "flexnbd:600");
    });
}

#[test]
fn the_first_client_starts_the_service() {
    in_lab(|| {
        let host = on_demand(SOCKETS[0]);
        let client = Steady::start(&host.nbd(), Mode::Structured, 0..SIZE / 2);
        client.wait_for_answers(A_FEW);
        assert_eq!(host.state(DISK), "active");
        for socket in SOCKETS {
            assert_eq!(host.state(socket), "active", "{socket} came along");
        }
        client.stop();
        host.reboot();
        assert_eq!(host.state(DISK), "inactive", "nobody has come since the machine started");
        assert_eq!(host.state(SOCKETS[0]), "active");
        let client = Steady::start(&host.nbd(), Mode::Simple, SIZE / 2..SIZE);
        client.wait_for_answers(A_FEW);
        client.stop();
    });
}

#[test]
fn the_first_order_starts_the_service() {
    in_lab(|| {
        let host = on_demand(SOCKETS[1]);
        assert_eq!(host.disk_status("disk")["size"], SIZE.to_string());
        assert_eq!(host.state(DISK), "active");
        let client = Steady::start(&host.nbd(), Mode::Structured, 0..SIZE);
        client.wait_for_answers(A_FEW);
        client.stop();
    });
}

#[test]
fn it_ends_when_nobody_has_come_for_a_while_and_the_next_client_starts_it_again() {
    in_lab(|| {
        let host = on_demand(SOCKETS[0]);
        host.ok("echo IDLE_EXIT=1 >>/etc/flexnbd/disk.conf");
        let mut memory = crate::steady::Memory::of(0..SIZE);
        for _ in 0..2 {
            let client = Steady::resume(&host.nbd(), Mode::Structured, memory);
            client.wait_for_answers(A_FEW);
            memory = client.stop().memory;
            host.wait_for_state(DISK, "inactive");
            assert_eq!(host.show(DISK, "Result"), "success");
            assert_eq!(host.state(SOCKETS[0]), "active");
        }
    });
}

#[test]
fn two_instances_live_side_by_side_and_one_ends_alone() {
    in_lab(|| {
        let host = Host::installed("a");
        host.configure_disk(SIZE);
        host.make_image("/srv/other.img", SIZE);
        host.configure("other", "FILE=/srv/other.img\nADDR=10.99.0.11\nPORT=10810\n");
        host.systemctl("start flexnbd@disk.service flexnbd@other.service");
        let other = Endpoint::Tcp(SocketAddr::new(host.ip4(), PORT + 1));
        let clients = [&host.nbd(), &other].map(|t| Steady::start(t, Mode::Structured, 0..SIZE));
        wait_for_answers(&clients, A_FEW);
        let [first, second] = clients;
        let knocker = Knocker::start(&other);
        host.systemctl("stop flexnbd@disk.service flexnbd@disk.socket flexnbd-control@disk.socket");
        first.lost();
        second.wait_for_answers(A_FEW);
        wait_until("new connections", || knocker.served() > 10);
        let knocks = knocker.stop();
        assert_eq!((knocks.refused, knocks.failed.len()), (0, 0), "{knocks:?}");
        assert_eq!(host.disk_status("other")["num_clients"], "1");
        assert_eq!(host.sh("flexnbd status --instance disk").code, 1, "its socket is gone");
        host.systemctl("start flexnbd@disk.service");
        assert_eq!(host.disk_status("disk")["num_clients"], "0");
        second.stop();
    });
}

#[test]
fn one_instance_is_served_over_ipv4_ipv6_and_unix_sockets() {
    in_lab(|| {
        let host = Host::installed("a");
        host.write(
            "/etc/systemd/system/flexnbd@disk.socket.d/more.conf",
            "[Socket]\nListenStream=/run/flexnbd/disk.nbd\nListenStream=[fd99::11]:10811\n",
        );
        host.make_image(crate::host::IMAGE, SIZE);
        host.configure("disk", "FILE=/srv/disk.img\nADDR=0.0.0.0\nPORT=10809\n");
        host.systemctl("start flexnbd@disk.socket");
        let Endpoint::Tcp(mut six) = host.nbd6() else { panic!("a TCP address") };
        six.set_port(10811);
        let doors =
            [host.nbd(), Endpoint::Tcp(six), Endpoint::Unix(host.path("/run/flexnbd/disk.nbd"))];
        let part = |n: u64| n * SIZE / 4..(n + 1) * SIZE / 4;
        let clients: Vec<_> = (0..)
            .zip(doors.iter().zip(MODES))
            .map(|(n, (door, mode))| Steady::start(door, mode, part(n)))
            .collect();
        wait_for_answers(&clients, A_FEW);
        assert_eq!(host.disk_status("disk")["num_clients"], "3");
        clients.into_iter().for_each(|client| drop(client.stop()));
    });
}
