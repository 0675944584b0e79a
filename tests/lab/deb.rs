//! The Debian package: lintian, its files, installation, upgrade, removal and purge.
//! The behaviour of its programs is tested elsewhere.

use crate::connect::{Probe, probe};
use crate::host::{DISK, Host, IMAGE};
use crate::package;
use crate::session::in_lab;
use harness::{MIB, require_tool, run};

#[test]
fn lintian_finds_no_error() {
    if !require_tool("lintian") || !require_tool("cargo-deb") {
        return;
    }
    let deb = package::directory().join(harness::package::CURRENT);
    run(
        "lintian",
        &["--allow-root", "--fail-on=error", "--no-tag-display-limit", deb.to_str().unwrap()],
    );
}

#[test]
fn removal_stops_the_service_and_keeps_disks() {
    in_lab(|| {
        let host = Host::installed("a");
        host.configure_disk(MIB);
        host.systemctl(&format!("enable --now {DISK}"));
        assert_eq!(probe(&host.nbd()), Probe::Greeted);
        host.ok("dpkg --remove flexnbd");
        assert_eq!(probe(&host.nbd()), Probe::Refused);
        host.ok(&format!("test -e {IMAGE} -a -e /etc/flexnbd/disk.conf"));
        host.ok("dpkg --purge flexnbd");
        host.ok(&format!("test -e {IMAGE}"));
        assert_eq!(host.ok("find /etc/systemd/system -lname '*flexnbd*'"), "", "dangling links");
        assert_eq!(host.ok("systemctl --failed --no-legend"), "");
        host.install(&package::current());
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(probe(&host.nbd()), Probe::Greeted);
    });
}

#[test]
fn the_package_contains_the_manual_pages() {
    in_lab(|| {
        let host = Host::installed("a");
        for page in [
            "man1/flexnbd.1",
            "man1/flexnbd-proxy.1",
            "man7/flexnbd-migration.7",
            "man7/flexnbd-release-notes.7",
            "man7/flexnbd.service.7",
            "man5/flexnbd.conf.5",
        ] {
            host.ok(&format!("test -s /usr/share/man/{page}.gz"));
        }
        host.ok("test -s /usr/share/doc/flexnbd/examples/disk.conf");
        assert_eq!(host.ok("readlink /usr/bin/flexnbd-proxy"), "flexnbd\n");
        assert!(host.ok("flexnbd-proxy --help").contains("--conn-addr"));
    });
}

/// Commands of an ordinary user beside the package; `wait` returns the server's exit status.
const USER_COMMANDS: &str = "cd /srv/own; flexnbd serve --file disk.img --create 1M --addr $PWD/nbd --sock c & \
    until [ -S c ]; do sleep 0.05; done; flexnbd status --sock c; kill $!; wait $!; \
    flexnbd adopt --file disk.img; flexnbd status --file disk.img";

#[test]
fn ordinary_users_serve_their_own_files() {
    in_lab(|| {
        let host = Host::installed("a");
        let modes = "stat --format '%a %U:%G' /var/lib/flexnbd /run/flexnbd";
        assert_eq!(host.ok(modes), "711 flexnbd:flexnbd\n750 root:flexnbd\n");
        host.ok("install --directory --owner=nobody /srv/own");
        for home in ["HOME=/root", "-u HOME", "HOME=/srv/own"] {
            let user = "setpriv --reuid nobody --regid nogroup --clear-groups";
            let output = host
                .ok(&format!("{user} env {home} sh -ec '{USER_COMMANDS}'; rm /srv/own/disk.img"));
            assert!(
                output.contains("ownership=none") && output.contains("ownership=ours"),
                "{output}"
            );
        }
        host.configure("disk", "FILE=/var/lib/flexnbd/disk.img\nCREATE=1M\nADDR=::\nPORT=10809\n");
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.ok(modes), "711 flexnbd:flexnbd\n750 root:flexnbd\n");
        assert_eq!(probe(&host.nbd()), Probe::Greeted);
    });
}

#[test]
fn an_upgrade_makes_images_unreadable_to_others() {
    in_lab(|| {
        let host = Host::installed("a");
        let state = "cd /var/lib/flexnbd && touch own.img %2Fsrv%2Fother.img && chmod 644 *.img";
        host.ok(&format!("{state} && chmod 750 ."));
        host.install(&package::next());
        let modes = host.ok("cd /var/lib/flexnbd && stat --format '%a %n' . *.img");
        assert_eq!(modes, "711 .\n644 %2Fsrv%2Fother.img\n640 own.img\n");
    });
}

#[test]
fn an_upgrade_skips_services_with_invalid_configurations() {
    in_lab(|| {
        let host = Host::installed("a");
        host.configure_disk(MIB);
        host.systemctl(&format!("start {DISK}"));
        let before = host.pid(DISK);
        for (mistake, why) in [
            ("echo PROT=7 >>$F", "line 4: unknown key PROT"),
            ("sed -i /PROT/d $F; sed -i s/10809/0/ $F", "PORT: a socket unit needs a port"),
            ("sed -i s/=0/=10809/ $F; chmod 600 $F", "may not read /etc/flexnbd/disk.conf"),
        ] {
            host.ok(&format!("F=/etc/flexnbd/disk.conf; {mistake}"));
            let output = host.install(&package::next());
            assert!(output.contains("not restarting it") && output.contains(why), "{output}");
            assert_eq!((host.pid(DISK), probe(&host.nbd())), (before, Probe::Greeted));
        }
        host.ok("chmod 644 /etc/flexnbd/disk.conf");
        host.install(&package::next());
        assert_ne!(host.pid(DISK), before);
        assert_eq!(probe(&host.nbd()), Probe::Greeted);
    });
}
