//! A proxy as a service of one host, for a disk of another host: clients that never reconnect live through
//! restarts, crashes and upgrades on both sides, and wait for a disk that is served later.

use crate::host::{DISK, Host, PORT};
use crate::package;
use crate::session::{in_lab, report};
use crate::verifier::{Verifier, wait_for_replies};
use harness::MIB;
use harness::raw::Wire;
use harness::session::MODES;

const PROXY: &str = "flexnbd-proxy@disk.service";
const SOCKETS: &str = "flexnbd-proxy@disk.socket flexnbd-proxy-control@disk.socket";
const SIZE: u64 = 64 * MIB;
/// The size of each client's part of the disk, in bytes.
const PART: u64 = 8 * MIB;
/// The number of replies to each client before the next disturbance.
const REPLIES: u64 = 50;
const ROUNDS: usize = 3;
/// The highest exposure allowed, in tenths.
const TENTHS: u32 = 12;

/// The host of the disk, and that of the proxy, whose sockets are open.
fn hosts() -> (Host, Host) {
    let (server, proxy) = (Host::installed("a"), Host::installed("b"));
    server.configure_disk(SIZE);
    proxy.configure("disk", &format!("TO=nbd://{}\nADDR=::\nPORT={PORT}\n", server.ip4()));
    proxy.systemctl(&format!("start {SOCKETS}"));
    (server, proxy)
}

#[test]
fn clients_of_a_proxy_notice_nothing() {
    in_lab(|| {
        let (server, proxy) = hosts();
        server.systemctl(&format!("enable --now {DISK}"));
        let parts = MODES.into_iter().zip(0..);
        let clients: Vec<Verifier> = parts
            .map(|(mode, n)| Verifier::start(&proxy.nbd(), mode, n * PART..(n + 1) * PART))
            .collect();
        let upstream = format!("{}:{PORT}", server.ip4());
        let status = format!("proxying {upstream} (64 MiB) on [::]:{PORT}, 3 clients");
        proxy.wait_for("the status", || proxy.status(PROXY).contains(&status));
        for _ in 0..ROUNDS {
            wait_for_replies(&clients, REPLIES);
            let before = proxy.pid(PROXY);
            proxy.systemctl(&format!("restart {PROXY}"));
            assert_ne!(proxy.pid(PROXY), before, "another process serves now");
            wait_for_replies(&clients, REPLIES);
            server.systemctl(&format!("restart {DISK}"));
            wait_for_replies(&clients, REPLIES);
            server.systemctl(&format!("kill --signal=KILL {DISK}"));
        }
        for deb in [package::next(), package::current()] {
            wait_for_replies(&clients, REPLIES);
            let before = proxy.pid(PROXY);
            proxy.install(&deb);
            assert_ne!(proxy.pid(PROXY), before, "another process serves now");
            wait_for_replies(&clients, REPLIES);
            server.install(&deb);
        }
        // An upgrade does not wait for a server that is lost.
        wait_for_replies(&clients, REPLIES);
        server.systemctl(&format!("stop flexnbd@disk.socket {DISK}"));
        proxy.wait_for("the loss", || proxy.status(PROXY).contains("; the connection is lost: "));
        assert_eq!(proxy.disk_status("disk")["upstream_connected"], "false");
        let before = proxy.pid(PROXY);
        let output = proxy.install(&package::next());
        assert!(output.contains("waits for the server of its disk; not restarting it"), "{output}");
        assert_eq!(proxy.pid(PROXY), before);
        server.systemctl(&format!("start {DISK}"));
        wait_for_replies(&clients, REPLIES);
        proxy.systemctl(&format!("restart {PROXY}"));
        wait_for_replies(&clients, REPLIES);
        let status = proxy.disk_status("disk");
        assert_eq!((&*status["num_clients"], &*status["upstream"]), ("3", &*upstream));
        let summaries: Vec<_> = clients.into_iter().map(Verifier::stop).collect();
        let stall = summaries.iter().map(|summary| summary.worst_stall).max().unwrap();
        report(&format!("a proxy: longest stall {stall:?}"));
    });
}

#[test]
fn clients_of_a_proxy_wait_for_a_later_server() {
    in_lab(|| {
        let (server, proxy) = hosts();
        let mut client = Wire::connect(&proxy.nbd());
        proxy.wait_for("three failed starts", || {
            proxy.show(PROXY, "NRestarts").parse::<u32>().unwrap() >= 3
        });
        assert_eq!(proxy.state("flexnbd-proxy@disk.socket"), "active");
        proxy.wait_for_message(PROXY, "refused");
        server.systemctl(&format!("start {DISK}"));
        assert_eq!(client.recv(8), b"NBDMAGIC");
        proxy.wait_for_state(PROXY, "active");
    });
}

#[test]
fn units_of_a_proxy_verify_and_are_confined() {
    in_lab(|| {
        let (server, proxy) = hosts();
        server.systemctl(&format!("start {DISK}"));
        proxy.systemctl(&format!("start {PROXY}"));
        let units = format!("{PROXY} {SOCKETS}");
        let output = proxy.sh(&format!("systemd-analyze verify --man=no {units}"));
        assert_eq!((output.code, &*output.out, &*output.err), (0, "", ""));
        let security = format!("systemd-analyze security --threshold={TENTHS} {PROXY}");
        let output = proxy.sh(&security);
        assert_eq!(output.code, 0, "{output}");
        report(output.out.lines().rfind(|line| line.contains("exposure")).unwrap_or_default());
        // A socket of this host, to which the user of the service may connect.
        proxy.make_image("/srv/own.img", SIZE);
        proxy.configure("own", "FILE=/srv/own.img\nADDR=/run/flexnbd/own.nbd\n");
        proxy.systemctl("start flexnbd@own.socket");
        let to = "TO=nbd+unix:///?socket=/run/flexnbd/own.nbd\n";
        proxy.configure("chained", &format!("{to}ADDR=/run/flexnbd/chained.nbd\n"));
        proxy.systemctl("start flexnbd-proxy@chained.service");
        assert_eq!(proxy.state("flexnbd@own.service"), "active", "started for the proxy");
        proxy.systemctl("reload flexnbd-proxy@chained.service");
        proxy.systemctl("stop flexnbd-proxy@chained.socket");
        proxy.wait_for_state("flexnbd-proxy@chained.service", "inactive");
    });
}
