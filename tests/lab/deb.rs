//! The package as such: what lintian thinks, what comes with it, and what stays when it goes.
//! Never judges the programs in it.

use crate::host::{DISK, Host, IMAGE};
use crate::knock::{Turned, try_door};
use crate::package;
use crate::session::in_lab;
use harness::{MIB, require_tool, run};
use std::path::Path;

#[test]
fn lintian_finds_no_error() {
    if !require_tool("lintian") || !require_tool("cargo-deb") {
        return;
    }
    let deb = Path::new(&package::both()).join("current.deb");
    run(
        "lintian",
        &["--allow-root", "--fail-on=error", "--no-tag-display-limit", deb.to_str().unwrap()],
    );
}

#[test]
fn removing_it_ends_the_service_and_leaves_disks_and_configuration() {
    in_lab(|| {
        let host = Host::installed("a");
        host.configure_disk(MIB);
        host.systemctl(&format!("enable --now {DISK}"));
        assert_eq!(try_door(&host.nbd()), Turned::In);
        host.ok("dpkg --remove flexnbd");
        assert_eq!(try_door(&host.nbd()), Turned::Refused);
        host.ok(&format!("test -e {IMAGE} -a -e /etc/flexnbd/disk.conf"));
        host.ok("dpkg --purge flexnbd");
        host.ok(&format!("test -e {IMAGE}"));
        assert_eq!(host.ok("find /etc/systemd/system -lname '*flexnbd*'"), "", "dangling links");
        assert_eq!(host.ok("systemctl --failed --no-legend"), "");
        host.install(&package::current());
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(try_door(&host.nbd()), Turned::In);
    });
}

#[test]
fn the_manuals_come_with_it() {
    in_lab(|| {
        let host = Host::installed("a");
        for page in [
            "man1/flexnbd.1",
            "man7/flexnbd-migration.7",
            "man7/flexnbd-release-notes.7",
            "man7/flexnbd.service.7",
            "man5/flexnbd.conf.5",
        ] {
            host.ok(&format!("test -s /usr/share/man/{page}.gz"));
        }
        host.ok("test -s /usr/share/doc/flexnbd/examples/disk.conf");
    });
}

/// What an ordinary user runs beside the package; `wait` returns the server's status.
const OWN: &str = "cd /srv/own; flexnbd serve --file disk.img --create 1M --addr $PWD/nbd --sock c & \
    until [ -S c ]; do sleep 0.05; done; flexnbd status --sock c; kill $!; wait $!; \
    flexnbd adopt --file disk.img; flexnbd status --file disk.img";

#[test]
fn ordinary_users_serve_their_own_files_beside_it() {
    in_lab(|| {
        let host = Host::installed("a");
        let modes = "stat --format '%a %U:%G' /var/lib/flexnbd /run/flexnbd";
        assert_eq!(host.ok(modes), "711 flexnbd:flexnbd\n750 root:flexnbd\n");
        host.ok("install --directory --owner=nobody /srv/own");
        for home in ["HOME=/root", "-u HOME", "HOME=/srv/own"] {
            let user = "setpriv --reuid nobody --regid nogroup --clear-groups";
            let told = host.ok(&format!("{user} env {home} sh -ec '{OWN}'; rm /srv/own/disk.img"));
            assert!(told.contains("ownership=none") && told.contains("ownership=ours"), "{told}");
        }
        host.configure("disk", "FILE=/var/lib/flexnbd/disk.img\nCREATE=1M\nADDR=::\nPORT=10809\n");
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.ok(modes), "711 flexnbd:flexnbd\n750 root:flexnbd\n");
        assert_eq!(try_door(&host.nbd()), Turned::In);
    });
}

#[test]
fn an_upgrade_that_opens_the_directory_keeps_images_closed() {
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
fn an_upgrade_leaves_a_service_with_a_wrong_configuration_alone() {
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
            let said = host.install(&package::next());
            assert!(said.contains("not restarting it") && said.contains(why), "{said}");
            assert_eq!((host.pid(DISK), try_door(&host.nbd())), (before, Turned::In));
        }
        host.ok("chmod 644 /etc/flexnbd/disk.conf");
        host.install(&package::next());
        assert_ne!(host.pid(DISK), before);
        assert_eq!(try_door(&host.nbd()), Turned::In);
    });
}
