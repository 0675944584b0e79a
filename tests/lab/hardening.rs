//! The units pass `systemd-analyze verify`, and their exposure in `systemd-analyze security` stays
//! below fixed limits; the IP filter of the socket unit works.

use crate::host::{DISK, Host, LISTEN, SOCKETS};
use crate::session::{in_lab, lab, report};
use crate::verifier::Verifier;
use harness::session::Mode;
use harness::{Endpoint, MIB};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

const SIZE: u64 = 64 * MIB;
/// The time after which an unanswered SYN counts as dropped; replies take microseconds here.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The highest exposure allowed with an image in a file, in tenths.
const FILE_TENTHS: u32 = 12;
/// The highest exposure allowed with a block device, in tenths.
const DEVICE_TENTHS: u32 = 16;

#[track_caller]
fn assert_exposed_at_most(host: &Host, unit: &str, tenths: u32) {
    let output = host.sh(&format!("systemd-analyze security --threshold={tenths} {unit}"));
    assert_eq!(output.code, 0, "{unit}: {output}");
    report(output.out.lines().rfind(|line| line.contains("exposure level")).unwrap_or_default());
}

/// Fails if `systemd-analyze verify` prints anything about a template or an instance, with the
/// generator's drop-ins.
#[track_caller]
fn assert_verified(host: &Host) {
    let instances = format!("{DISK} {LISTEN} {}", SOCKETS.join(" "));
    for units in [instances.as_str(), "/usr/lib/systemd/system/flexnbd*@.*"] {
        let output = host.sh(&format!("systemd-analyze verify --man=no {units}"));
        assert_eq!((output.code, &*output.out, &*output.err), (0, "", ""), "{units}");
    }
}

#[test]
fn units_with_a_file_verify_and_are_confined() {
    in_lab(|| {
        let host = Host::installed("a");
        host.configure_disk(SIZE);
        assert_verified(&host);
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.disk_status("disk")["sandbox"], "landlock,seccomp");
        assert_exposed_at_most(&host, DISK, FILE_TENTHS);
        assert_exposed_at_most(&host, LISTEN, FILE_TENTHS);
    });
}

#[test]
fn the_ip_filter_drops_unlisted_clients() {
    in_lab(|| {
        let host = Host::installed("a");
        host.make_image(crate::host::IMAGE, SIZE);
        let lines = "FILE=/srv/disk.img\nADDR=::\nPORT=10809\nIP_FILTER=yes\nACL=";
        host.configure("disk", &format!("{lines}10.99.0.99\n"));
        host.systemctl("start flexnbd@disk.socket");
        let Endpoint::Tcp(address) = host.nbd() else { panic!("a TCP address") };
        let error = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(host.state(DISK), "inactive", "no connection has started the service");

        host.configure("disk", &format!("{lines}10.99.0.1\n"));
        host.systemctl("reload-or-restart flexnbd@disk.socket");
        let client = Verifier::start(&host.nbd(), Mode::Structured, 0..SIZE);
        client.wait_for_replies(100);
        client.stop();
    });
}

#[test]
fn units_with_a_block_device_verify_and_serve() {
    in_lab(|| {
        let host = Host::installed("a");
        let output = lab(&["block", "a", "64M"]);
        let device = String::from_utf8(output.stdout).unwrap();
        host.configure("disk", &format!("FILE={device}ADDR=::\nPORT=10809\n"));
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.disk_status("disk")["size"], SIZE.to_string());
        let client = Verifier::start(&host.nbd(), Mode::Extended, 0..SIZE);
        client.wait_for_replies(200);
        host.systemctl(&format!("restart {DISK}"));
        client.wait_for_replies(200);
        client.stop();
        assert_verified(&host);
        assert_exposed_at_most(&host, DISK, DEVICE_TENTHS);
        assert_exposed_at_most(&host, LISTEN, DEVICE_TENTHS);
        host.systemctl(&format!("stop {DISK}"));
    });
}
