//! What systemd itself thinks of the units: nothing to complain of, and little that they may do.
//! Never a matter of taste: the numbers are those of `systemd-analyze`.

use crate::host::{DISK, Host, LISTEN, SOCKETS};
use crate::session::{in_lab, lab, tell};
use crate::steady::Steady;
use harness::session::Mode;
use harness::{Endpoint, MIB};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

const SIZE: u64 = 64 * MIB;
/// After so long without an answer nobody answers; on this network one takes microseconds.
const SILENCE: Duration = Duration::from_secs(2);
/// The exposure that is allowed with an image in a file, in tenths.
const FILE_TENTHS: u32 = 12;
/// The same with a block device.
const DEVICE_TENTHS: u32 = 16;

#[track_caller]
fn assert_exposed_at_most(host: &Host, unit: &str, tenths: u32) {
    let said = host.sh(&format!("systemd-analyze security --threshold={tenths} {unit}"));
    assert_eq!(said.code, 0, "{unit}: {said}");
    tell(said.out.lines().rfind(|line| line.contains("exposure level")).unwrap_or_default());
}

/// Neither a template nor an instance, with whatever the generator adds, may be complained of.
#[track_caller]
fn assert_verified(host: &Host) {
    let instances = format!("{DISK} {LISTEN} {}", SOCKETS.join(" "));
    for units in [instances.as_str(), "/usr/lib/systemd/system/flexnbd*@.*"] {
        let said = host.sh(&format!("systemd-analyze verify --man=no {units}"));
        assert_eq!((said.code, &*said.out, &*said.err), (0, "", ""), "{units}");
    }
}

#[test]
fn an_instance_with_a_file_is_in_order_and_shut_in() {
    in_lab(|| {
        let host = Host::installed("a");
        host.configure_disk(SIZE);
        assert_verified(&host);
        assert_exposed_at_most(&host, DISK, FILE_TENTHS);
        assert_exposed_at_most(&host, LISTEN, FILE_TENTHS);
    });
}

#[test]
fn who_is_not_in_the_list_does_not_even_reach_the_port() {
    in_lab(|| {
        let host = Host::installed("a");
        host.make_image(crate::host::IMAGE, SIZE);
        let lines = "FILE=/srv/disk.img\nADDR=::\nPORT=10809\nIP_FILTER=yes\nACL=";
        host.configure("disk", &format!("{lines}10.99.0.99\n"));
        host.systemctl("start flexnbd@disk.socket");
        let Endpoint::Tcp(address) = host.nbd() else { panic!("a TCP address") };
        let error = TcpStream::connect_timeout(&address, SILENCE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(host.state(DISK), "inactive", "nobody has woken the service");

        host.configure("disk", &format!("{lines}10.99.0.1\n"));
        host.systemctl("reload-or-restart flexnbd@disk.socket");
        let client = Steady::start(&host.nbd(), Mode::Structured, 0..SIZE);
        client.wait_for_answers(100);
        client.stop();
    });
}

#[test]
fn an_instance_with_a_block_device_is_in_order_and_shut_in_and_serves_it() {
    in_lab(|| {
        let host = Host::installed("a");
        let output = lab(&["block", "a", "64M"]);
        let device = String::from_utf8(output.stdout).unwrap();
        host.configure("disk", &format!("FILE={device}ADDR=::\nPORT=10809\n"));
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.disk_status("disk")["size"], SIZE.to_string());
        let client = Steady::start(&host.nbd(), Mode::Extended, 0..SIZE);
        client.wait_for_answers(200);
        host.systemctl(&format!("restart {DISK}"));
        client.wait_for_answers(200);
        client.stop();
        assert_verified(&host);
        assert_exposed_at_most(&host, DISK, DEVICE_TENTHS);
        assert_exposed_at_most(&host, LISTEN, DEVICE_TENTHS);
        host.systemctl(&format!("stop {DISK}"));
    });
}
