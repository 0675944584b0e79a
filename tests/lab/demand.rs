//! Starting instances: a configuration of four lines, socket activation, two instances side by
//! side, and every kind of address. Restarts under load are tested in `restart.rs`.

use crate::connect::Reconnector;
use crate::host::{DISK, Host, PORT, SOCKETS};
use crate::session::in_lab;
use crate::verifier::{Verifier, wait_for_replies};
use harness::session::{MODES, Mode};
use harness::{Endpoint, MIB, wait_until};
use std::net::SocketAddr;

const SIZE: u64 = 64 * MIB;
/// Enough replies for a client to have sent every kind of request.
const A_FEW: u64 = 100;

/// A host where only `socket`, with the units that it pulls in, is enabled.
fn host_with_socket(socket: &str) -> Host {
    let host = Host::installed("a");
    host.configure_disk(SIZE);
    host.systemctl(&format!("enable --now {socket}"));
    assert_eq!(host.state(DISK), "inactive");
    host
}

#[test]
fn four_lines_configure_a_working_instance() {
    in_lab(|| {
        let host = Host::installed("a");
        let lines = "FILE=/var/lib/flexnbd/disk.img\nCREATE=64M\nADDR=::\nPORT=10809\n";
        host.write("/etc/flexnbd/disk.conf", lines);
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.disk_status("disk")["size"], SIZE.to_string());
        let client = Verifier::start(&host.nbd(), Mode::Extended, 0..SIZE);
        client.wait_for_replies(A_FEW);
        client.stop();
        let owner = host.ok("stat --format=%U:%a /var/lib/flexnbd/disk.img");
        assert_eq!(owner.trim(), "flexnbd:600");
    });
}

#[test]
fn the_first_client_starts_the_service() {
    in_lab(|| {
        let host = host_with_socket(SOCKETS[0]);
        let client = Verifier::start(&host.nbd(), Mode::Structured, 0..SIZE / 2);
        client.wait_for_replies(A_FEW);
        assert_eq!(host.state(DISK), "active");
        for socket in SOCKETS {
            assert_eq!(host.state(socket), "active", "{socket} is pulled in");
        }
        client.stop();
        host.reboot();
        assert_eq!(host.state(DISK), "inactive", "no client has connected since the boot");
        assert_eq!(host.state(SOCKETS[0]), "active");
        let client = Verifier::start(&host.nbd(), Mode::Simple, SIZE / 2..SIZE);
        client.wait_for_replies(A_FEW);
        client.stop();
    });
}

#[test]
fn the_first_control_command_starts_the_service() {
    in_lab(|| {
        let host = host_with_socket(SOCKETS[1]);
        assert_eq!(host.disk_status("disk")["size"], SIZE.to_string());
        assert_eq!(host.state(DISK), "active");
        let client = Verifier::start(&host.nbd(), Mode::Structured, 0..SIZE);
        client.wait_for_replies(A_FEW);
        client.stop();
    });
}

#[test]
fn an_idle_service_exits_until_the_next_client() {
    in_lab(|| {
        let host = host_with_socket(SOCKETS[0]);
        host.ok("echo IDLE_EXIT=1 >>/etc/flexnbd/disk.conf");
        let mut model = crate::verifier::Model::of(0..SIZE);
        for _ in 0..2 {
            let client = Verifier::resume(&host.nbd(), Mode::Structured, model);
            client.wait_for_replies(A_FEW);
            model = client.stop().model;
            host.wait_for_state(DISK, "inactive");
            assert_eq!(host.show(DISK, "Result"), "success");
            assert_eq!(host.state(SOCKETS[0]), "active");
        }
    });
}

#[test]
fn stopping_one_instance_keeps_the_other_serving() {
    in_lab(|| {
        let host = Host::installed("a");
        host.configure_disk(SIZE);
        host.make_image("/srv/other.img", SIZE);
        host.configure("other", "FILE=/srv/other.img\nADDR=10.99.0.11\nPORT=10810\n");
        host.systemctl("start flexnbd@disk.service flexnbd@other.service");
        let other = Endpoint::Tcp(SocketAddr::new(host.ip4(), PORT + 1));
        let clients = [&host.nbd(), &other].map(|t| Verifier::start(t, Mode::Structured, 0..SIZE));
        wait_for_replies(&clients, A_FEW);
        let [first, second] = clients;
        let reconnector = Reconnector::start(&other);
        host.systemctl("stop flexnbd@disk.service flexnbd@disk.socket flexnbd-control@disk.socket");
        first.wait_for_loss();
        second.wait_for_replies(A_FEW);
        wait_until("new connections", || reconnector.served() > 10);
        let connections = reconnector.stop();
        assert_eq!((connections.refused, connections.failed.len()), (0, 0), "{connections:?}");
        assert_eq!(host.disk_status("other")["num_clients"], "1");
        assert_eq!(host.sh("flexnbd status --instance disk").code, 1, "its socket is removed");
        host.systemctl("start flexnbd@disk.service");
        assert_eq!(host.disk_status("disk")["num_clients"], "0");
        second.stop();
    });
}

#[test]
fn one_instance_serves_ipv4_ipv6_and_unix_sockets() {
    in_lab(|| {
        let host = Host::installed("a");
        host.write(
            "/etc/systemd/system/flexnbd@disk.socket.d/more.conf",
            "[Socket]\nListenStream=/run/flexnbd/disk.nbd\nListenStream=[fd99::11]:10811\n",
        );
        host.make_image(crate::host::IMAGE, SIZE);
        host.configure("disk", "FILE=/srv/disk.img\nADDR=0.0.0.0\nPORT=10809\n");
        host.systemctl("start flexnbd@disk.socket");
        let Endpoint::Tcp(mut ipv6) = host.nbd6() else { panic!("a TCP address") };
        ipv6.set_port(10811);
        let endpoints =
            [host.nbd(), Endpoint::Tcp(ipv6), Endpoint::Unix(host.path("/run/flexnbd/disk.nbd"))];
        let part = |n: u64| n * SIZE / 4..(n + 1) * SIZE / 4;
        let clients: Vec<_> = (0..)
            .zip(endpoints.iter().zip(MODES))
            .map(|(n, (endpoint, mode))| Verifier::start(endpoint, mode, part(n)))
            .collect();
        wait_for_replies(&clients, A_FEW);
        assert_eq!(host.disk_status("disk")["num_clients"], "3");
        clients.into_iter().for_each(|client| drop(client.stop()));
    });
}
