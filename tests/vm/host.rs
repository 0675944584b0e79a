//! Inside a machine with systemd: the installed package and its units, as an operator uses them.

use crate::machine::{ok, sh};
use crate::session::package_file;
use harness::package;

/// The unit that serves the instance `disk`.
pub(crate) const DISK: &str = "flexnbd@disk.service";
/// The port of the instance `disk`.
pub(crate) const PORT: u16 = 10809;
/// The number of journal lines to print when a test fails.
const JOURNAL_LINES: u32 = 60;

/// The host that the test runs on, with the package installed.
pub(crate) struct Host;

impl Host {
    /// Installs the package under test.
    #[track_caller]
    pub(crate) fn installed() -> Host {
        let host = Host;
        host.install(package::CURRENT);
        host
    }

    /// Installs or upgrades the package with dpkg.
    #[track_caller]
    pub(crate) fn install(&self, name: &str) {
        ok(&format!("dpkg --install {}", package_file(name).display()));
    }

    /// Writes `/etc/flexnbd/INSTANCE.conf` and reloads systemd, which runs the generator.
    #[track_caller]
    pub(crate) fn configure(&self, instance: &str, text: &str) {
        std::fs::create_dir_all("/etc/flexnbd").unwrap();
        std::fs::write(format!("/etc/flexnbd/{instance}.conf"), text).unwrap();
        self.systemctl("daemon-reload");
    }

    /// Configures the instance `disk`, with a new image of 256 MiB, at [`PORT`], and starts it.
    #[track_caller]
    pub(crate) fn configure_disk(&self) {
        let image = "FILE=/var/lib/flexnbd/disk.img\nCREATE=256M\n";
        self.configure("disk", &format!("{image}ADDR=127.0.0.1\nPORT={PORT}\n"));
        self.systemctl(&format!("start {DISK}"));
    }

    /// `active`, `inactive`, `failed`, `activating` …
    #[track_caller]
    pub(crate) fn state(&self, unit: &str) -> String {
        self.show(unit, "ActiveState")
    }

    /// The messages of this boot from the program of this name, oldest first.
    #[track_caller]
    pub(crate) fn messages(&self, program: &str) -> Vec<String> {
        ok("journalctl --sync");
        let text = ok(&format!("journalctl --boot --identifier={program} --output=cat"));
        text.lines().map(str::to_owned).collect()
    }

    #[track_caller]
    pub(crate) fn systemctl(&self, words: &str) {
        ok(&format!("systemctl {words}"));
    }

    /// One property of a unit.
    #[track_caller]
    pub(crate) fn show(&self, unit: &str, property: &str) -> String {
        ok(&format!("systemctl show --property={property} --value '{unit}'")).trim().to_owned()
    }

    /// The main process id of a service; 0 if it does not run.
    #[track_caller]
    pub(crate) fn pid(&self, unit: &str) -> u32 {
        self.show(unit, "MainPID").parse().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let units = "'flexnbd*' --all --no-pager --full --lines=0";
            let (_, text) = sh(&format!(
                "systemctl status {units}; journalctl --no-pager --lines={JOURNAL_LINES}"
            ));
            eprintln!("{text}");
        }
    }
}
