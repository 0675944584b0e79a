//! The block device example in the README: an instance serves a device of another storage engine
//! and migrates it to a block device of another host, or with direct I/O to a file. A loop device replaces the engine's.

use crate::host::{DISK, Host};
use crate::migration::{send, wait_for_arrival};
use crate::session::{in_lab, lab};
use crate::verifier::{Crash, Verifier};
use harness::session::Mode;
use harness::{MIB, project_path};

const SIZE: u64 = 64 * MIB;

/// The configuration from the README, with `FILE` set to `device`.
fn configuration(device: &str) -> String {
    let readme = std::fs::read_to_string(project_path("README.md")).unwrap();
    let (_, block) = readme.split_once("```conf device\n").expect("the README has a device");
    let (text, _) = block.split_once("```").unwrap();
    let lines = text.lines().map(|line| match line.strip_prefix("FILE=") {
        Some(_) => format!("FILE={device}\n"),
        None => format!("{line}\n"),
    });
    lines.collect()
}

/// A host with such an instance, and with more lines in its configuration.
fn host_with_device(name: &'static str, more: &str) -> Host {
    let host = Host::installed(name);
    let output = lab(&["block", name, &SIZE.to_string()]);
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    host.configure("disk", &(configuration(&device) + more));
    host
}

#[test]
fn a_block_device_moves_to_a_block_device() {
    in_lab(|| {
        let (a, b) = (host_with_device("a", ""), host_with_device("b", ""));
        a.systemctl(&format!("start {DISK}"));
        let client = Verifier::start(&a.nbd(), Mode::Extended, 0..SIZE);
        client.wait_for_replies(200);
        send(&a, &b, "");
        wait_for_arrival(&a, &b);
        let summary = client.wait_for_loss();
        summary.model.clone().verify(&b.nbd(), Crash::Process);
    });
}

/// The sandbox permits to open the image a second time; a restart does that while a client stays.
#[test]
fn a_block_device_moves_to_a_file_with_direct_io() {
    in_lab(|| {
        let (a, b) = (host_with_device("a", "DIRECT=yes\n"), Host::installed("b"));
        b.configure_disk(SIZE);
        b.ok("echo DIRECT=yes >> /etc/flexnbd/disk.conf");
        a.systemctl(&format!("start {DISK}"));
        let client = Verifier::start(&a.nbd(), Mode::Extended, 0..SIZE);
        client.wait_for_replies(200);
        a.systemctl(&format!("restart {DISK}"));
        client.wait_for_replies(200);
        send(&a, &b, "");
        wait_for_arrival(&a, &b);
        let summary = client.wait_for_loss();
        let opened = b.ok(&format!("cat /proc/{}/fdinfo/*", b.pid(DISK)));
        let flags = opened.lines().filter_map(|line| line.strip_prefix("flags:"));
        let flags = flags.map(|flags| i32::from_str_radix(flags.trim(), 8).unwrap());
        let count = flags.filter(|flags| flags & nix::libc::O_DIRECT != 0).count();
        assert_eq!(count, 1, "descriptors with O_DIRECT");
        summary.model.clone().verify(&b.nbd(), Crash::Process);
    });
}
