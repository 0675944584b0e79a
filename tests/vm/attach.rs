//! `flexnbd-attach@.service`: the links of devices, their users, and the loss of a server.

use crate::host::{DISK, Host};
use crate::machine::{KernelLog, ok, sh};
use crate::session::on_host;
use harness::wait_until;
use std::path::Path;

/// The unit that attaches the instance `disk`.
pub(crate) const ATTACH: &str = "flexnbd-attach@disk.service";
/// The link that it makes.
pub(crate) const DEVICE: &str = "/dev/flexnbd/disk";
const IMAGE: &str = "/var/lib/flexnbd/disk.img";
/// How long a stop waits for the users of a device in these tests, in seconds.
const WAIT_SECS: u64 = 1;

/// Installs the package, and configures the instance `disk` on a unix socket.
#[track_caller]
pub(crate) fn installed() -> Host {
    let host = Host::installed();
    configure(&host, "disk");
    host
}

#[track_caller]
fn configure(host: &Host, instance: &str) {
    let image = format!("FILE=/var/lib/flexnbd/{instance}.img\nCREATE=64M\n");
    host.configure(instance, &format!("{image}ADDR=/run/flexnbd/{instance}.nbd\n"));
}

/// The kernel's name of a link in `/dev/flexnbd`.
#[track_caller]
pub(crate) fn kernel_name(link: &str) -> String {
    let target = std::fs::read_link(link).unwrap();
    target.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Fails unless a stop leaves the device attached and has logged `part`; then starts again.
#[track_caller]
fn assert_stays_attached(host: &Host, part: &str) {
    sh(&format!("systemctl stop {ATTACH}"));
    assert_eq!(host.state(ATTACH), "failed");
    let messages = host.messages("flexnbd-attach");
    let last = messages.last().unwrap();
    assert!(last.contains(part) && last.contains("stays attached"), "{last}");
    host.systemctl(&format!("start {ATTACH}"));
}

/// Runs a line of shell in the background, in which `$ready` tells that it is ready; returns its
/// process id, which `exec` keeps.
#[track_caller]
fn background(line: &str) -> String {
    ok(&format!(
        "rm -f /run/ready; ready='eval echo $$ >/run/ready'; export ready
        {line} >/dev/null 2>&1 </dev/null &
        until [ -s /run/ready ]; do sleep 0.1; done"
    ));
    ok("cat /run/ready").trim().to_owned()
}

/// A device that is in use in different ways.
#[track_caller]
fn check_users(host: &Host) {
    ok(&format!("mkfs.ext4 -q {DEVICE} && mkdir -p /srv/data && mount {DEVICE} /srv/data"));
    let busy = background("sh -c 'cd /srv/data && $ready && exec sleep 600'");
    assert_stays_attached(host, "mounted on /srv/data");
    let (removed, text) = sh("dpkg --remove flexnbd");
    assert!(!removed && text.contains("is attached and in use"), "{text}");
    host.systemctl(&format!("start {ATTACH}"));
    ok(&format!("cp -r /etc /srv/data && kill {busy} && umount /srv/data"));
    let hidden = format!("mount {DEVICE} /srv/data && $ready && exec sleep 600");
    let hidden = background(&format!("unshare --mount sh -c '{hidden}'"));
    assert_stays_attached(host, "in another mount namespace");
    ok(&format!("kill {hidden}"));
}

/// Two instances, beside a device that is not ours.
#[track_caller]
fn check_links(host: &Host) {
    configure(host, "my-disk");
    ok(&format!("systemctl start {DISK} && nbd-client -unix /run/flexnbd/disk.nbd /dev/nbd0"));
    host.systemctl(&format!("start {ATTACH} flexnbd-attach@my-disk.service"));
    let names = [kernel_name(DEVICE), kernel_name("/dev/flexnbd/my-disk")];
    assert!(names[0] != names[1] && !names.contains(&"nbd0".to_owned()), "{names:?}");
    ok("echo , | sfdisk --quiet --no-reread /dev/flexnbd/my-disk");
    let partition = Path::new("/dev/flexnbd/my-disk-part1");
    wait_until("the link of the partition", || partition.exists());
    assert_eq!(kernel_name("/dev/flexnbd/my-disk-part1"), format!("{}p1", names[1]));
    host.systemctl("stop flexnbd-attach@my-disk.service");
    wait_until("the link to disappear", || !partition.exists());
    assert!(!Path::new("/dev/flexnbd/my-disk").exists() && Path::new(DEVICE).exists());
    let has_connection = |name: &str| Path::new(&format!("/sys/block/{name}/pid")).exists();
    assert!(has_connection("nbd0") && !has_connection(&names[1]), "{names:?}");
    ok("nbd-client -d /dev/nbd0");
}

#[test]
fn devices_stay_attached_while_in_use() {
    on_host(|| {
        let host = installed();
        host.systemctl(&format!("set-environment FLEXNBD_ATTACH_WAIT_SECS={WAIT_SECS}"));
        ok("echo 'install nbd /bin/false' >/etc/modprobe.d/test.conf");
        let (started, _) = sh(&format!("systemctl start {ATTACH}"));
        let status = sh(&format!("systemctl status --no-pager --full {ATTACH}")).1;
        assert!(!started && status.contains("there is no module nbd for "), "{status}");
        ok("rm /etc/modprobe.d/test.conf && modprobe nbd");
        let log = KernelLog::from_now();
        check_links(&host);
        check_users(&host);
        // Detaches first.
        host.systemctl("stop flexnbd@disk.socket");
        assert_eq!(host.state(ATTACH), "inactive");
        ok(&format!("e2fsck -fn {IMAGE}"));
        log.assert_no_error();

        // The kernel's client does not connect again.
        host.systemctl(&format!("start {ATTACH}"));
        let read = format!("dd if={DEVICE} of=/dev/null iflag=direct bs=1M count=1");
        ok(&format!("{read} && systemctl kill --signal=KILL {DISK}"));
        wait_until("the connection to be lost", || !sh(&read).0);
        host.systemctl(&format!("restart {ATTACH}"));
        ok(&format!("{read} && dpkg --remove flexnbd"));
        assert!(!Path::new(DEVICE).exists());
    });
}
