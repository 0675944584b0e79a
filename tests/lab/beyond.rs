//! The README's block device: another engine keeps it, an instance serves it, and it moves to a
//! block device of another host. A loop device stands for the engine's.

use crate::host::{DISK, Host};
use crate::moving::{send, wait_for_arrival};
use crate::session::{in_lab, lab};
use crate::steady::{Calamity, Steady};
use harness::session::Mode;
use harness::{MIB, project_path};

const SIZE: u64 = 64 * MIB;

/// The configuration in the README, for this device instead of the one there.
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

fn host_with_device(name: &'static str) -> Host {
    let host = Host::installed(name);
    let output = lab(&["block", name, &SIZE.to_string()]);
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    host.configure("disk", &configuration(&device));
    host
}

#[test]
fn a_block_device_moves_to_a_block_device() {
    in_lab(|| {
        let (a, b) = (host_with_device("a"), host_with_device("b"));
        a.systemctl(&format!("start {DISK}"));
        let client = Steady::start(&a.nbd(), Mode::Extended, 0..SIZE);
        client.wait_for_answers(200);
        send(&a, &b, "");
        wait_for_arrival(&a, &b);
        let ended = client.lost();
        ended.memory.clone().verify(&b.nbd(), Calamity::Death);
    });
}
