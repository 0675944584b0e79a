//! The package as such: what lintian thinks, what comes with it, and what stays when it goes.
//! Never judges the programs in it.

use crate::common::{MIB, require_tool, run};
use crate::host::{DISK, Host, IMAGE};
use crate::knock::{Turned, try_door};
use crate::package;
use crate::session::in_lab;
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
            "man7/flexnbd.service.7",
            "man5/flexnbd.conf.5",
        ] {
            host.ok(&format!("test -s /usr/share/man/{page}.gz"));
        }
        host.ok("test -s /usr/share/doc/flexnbd/examples/disk.conf");
    });
}
