//! What the Debian package is made of: that its files are there, and what its units and scripts
//! promise as far as that can be seen without a service manager.
//! Never installs anything; that is for the tests that boot a systemd.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use harness::{project_path, sparse_image, temp_dir};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

const SERVICE: &str = include_str!("../systemd/flexnbd@.service");
const RECEIVER: &str = include_str!("../systemd/flexnbd-listen@.service");
const SOCKET: &str = include_str!("../systemd/flexnbd@.socket");
const CONTROL: &str = include_str!("../systemd/flexnbd-control@.socket");

/// The settings of a unit, or of one of its sections, without comments.
fn settings<'a>(unit: &'a str, section: &str) -> Vec<&'a str> {
    let mut current = "";
    let mut found = Vec::new();
    for line in unit.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line.starts_with('[') {
            current = line;
        } else if current == section {
            found.push(line);
        }
    }
    found
}

/// Each asset of the package: where it is here, and where it goes.
fn assets() -> Vec<(&'static str, &'static str)> {
    let manifest = include_str!("../Cargo.toml");
    let list = manifest.split("\nassets = [").nth(1).unwrap().split("\n]").next().unwrap();
    let lines = list.lines().map(str::trim).filter(|line| line.starts_with("[\""));
    let pair = |line: &'static str| {
        let mut words = line.split('"').skip(1).step_by(2);
        (words.next().unwrap(), words.next().unwrap())
    };
    lines.map(pair).collect()
}

#[test]
fn every_file_of_the_package_is_there_and_every_unit_in_the_package() {
    let assets = assets();
    assert!(assets.len() > 10, "only {assets:?}");
    for (path, _) in assets.iter().filter(|(path, _)| !path.starts_with("target/")) {
        assert!(project_path(path).is_file(), "{path} is missing");
    }
    for directory in ["systemd", "man"] {
        for entry in fs::read_dir(project_path(directory)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(project_path("")).unwrap().to_str().unwrap();
            let packed = assets.iter().any(|(path, _)| *path == name);
            assert!(path.is_dir() || packed, "{name} is not in the package");
        }
    }
}

#[test]
fn scripts_can_be_run_and_are_no_worse_than_sh() {
    for script in [
        "systemd/retire",
        "systemd/debian/postinst",
        "systemd/debian/prerm",
        "systemd/debian/postrm",
    ] {
        let mode = fs::metadata(project_path(script)).unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0o111, "{script} is not executable");
        let checked = Command::new("/bin/sh").arg("-n").arg(project_path(script)).status().unwrap();
        assert!(checked.success(), "{script}");
    }
}

#[test]
fn the_receiving_service_lives_in_the_same_sandbox() {
    // What one has and the other not, on purpose.
    let own = [
        "ExecStart",
        "ExecReload",
        "ExecStopPost",
        "KillSignal",
        "RestartPreventExitStatus",
        "FileDescriptorStoreMax",
        "Environment",
        "SyslogIdentifier",
    ];
    let common = |unit| {
        let mut all = settings(unit, "[Service]");
        all.retain(|line| !own.iter().any(|key| line.starts_with(&format!("{key}="))));
        all
    };
    assert!(common(SERVICE).len() > 30);
    assert_eq!(common(SERVICE), common(RECEIVER));
}

#[test]
fn neither_service_begins_without_its_sockets_or_beside_the_other() {
    let sockets = "flexnbd@%i.socket flexnbd-control@%i.socket";
    for (unit, other) in [(SERVICE, "flexnbd-listen@%i.service"), (RECEIVER, "flexnbd@%i.service")]
    {
        assert!(settings(unit, "[Unit]").contains(&&*format!("Requires={sockets}")));
        assert!(settings(unit, "[Service]").contains(&&*format!("Sockets={sockets}")));
        assert!(settings(unit, "[Unit]").contains(&&*format!("Conflicts={other}")));
    }
    assert!(settings(RECEIVER, "[Unit]").contains(&"OnSuccess=flexnbd@%i.service"));
}

#[test]
fn nothing_counts_starts_since_that_would_close_the_sockets() {
    for unit in [SERVICE, RECEIVER, SOCKET, CONTROL] {
        assert!(settings(unit, "[Unit]").contains(&"StartLimitIntervalSec=0"));
    }
}

#[test]
fn sockets_have_the_names_that_the_program_goes_by() {
    use flexnbd::systemd::sockets::{CONTROL_NAME, NBD_NAME};
    for (unit, name) in [(SOCKET, NBD_NAME), (CONTROL, CONTROL_NAME)] {
        let line = format!("FileDescriptorName={name}");
        assert!(settings(unit, "[Socket]").contains(&&*line), "{name}");
    }
    let path = "ListenStream=/run/flexnbd/%i.sock";
    assert!(settings(CONTROL, "[Socket]").contains(&path), "where --instance looks for it");
}

/// A host whose `systemctl` writes down what it is told.
struct Host {
    root: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { root: tempfile::tempdir_in("/var/tmp").unwrap() };
        fs::create_dir(host.path("bin")).unwrap();
        symlink(env!("CARGO_BIN_EXE_flexnbd"), host.path("bin/flexnbd")).unwrap();
        host.systemctl("");
        let image = sparse_image(host.root.path(), "disk.img", 4096);
        fs::write(host.path("disk.conf"), format!("FILE={}\n", image.display())).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The job that the service that receives has, if any.
    fn systemctl(&self, job: &str) {
        self.systemctl_with(job, "");
    }

    /// The same, and the jobs of the service that serves.
    fn systemctl_with(&self, job: &str, jobs: &str) {
        let path = self.path("bin/systemctl");
        let told = self.path("told");
        let text = format!(
            "#!/bin/sh\ncase \"$1\" in show) echo {job} ;; list-jobs) echo '{jobs}' ;; \
             *) echo \"$*\" >>{} ;; esac\n",
            told.display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn record(&self, record: &str) {
        let image = self.path("disk.img");
        xattr::set(&image, "user.flexnbd", format!("flexnbd 1 {record}\n").as_bytes()).unwrap();
        let mut status = Command::new(env!("CARGO_BIN_EXE_flexnbd"));
        let told = status.args(["status", "--file"]).arg(&image).output().unwrap();
        assert!(told.status.success(), "{record}: {told:?}");
    }

    /// What systemd is told when the service has ended with this result.
    fn retired(&self, result: &str) -> String {
        self.retires(result);
        fs::read_to_string(self.path("told")).unwrap_or_default()
    }

    /// What is told in the journal then.
    fn retires(&self, result: &str) -> String {
        let output = Command::new(project_path("systemd/retire"))
            .arg("disk")
            .env("PATH", format!("{}:/usr/bin:/bin", self.path("bin").display()))
            .env("FLEXNBD_CONFIGURATIONS", self.root.path())
            .env("SERVICE_RESULT", result)
            .env("STATE_DIRECTORY", self.root.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

const DEPARTED: &str =
    "departed id=00112233445566778899aabbccddeeff when=1700000000 to=192.0.2.7:10809";
const STOP: &str = "--no-block stop flexnbd@disk.socket flexnbd-control@disk.socket\n";

#[test]
fn sockets_stay_where_the_disk_is() {
    let host = Host::new();
    for result in ["success", "exit-code", "signal", "watchdog"] {
        assert_eq!(host.retired(result), "", "{result}");
    }
    for record in ["incoming id=-", "ours title=adopted"] {
        host.record(record);
        assert_eq!(host.retired("success"), "", "{record}");
    }
}

#[test]
fn sockets_go_with_a_disk_that_has_moved() {
    let host = Host::new();
    host.record(DEPARTED);
    assert_eq!(host.retired("success"), STOP);
}

#[test]
fn sockets_go_with_an_image_that_was_deleted_when_it_had_moved() {
    let host = Host::new();
    fs::remove_file(host.path("disk.img")).unwrap();
    for result in ["success", "exit-code"] {
        assert_eq!(host.retired(result), "", "it is merely missing: {result}");
    }
    let name = host.path("disk.img").display().to_string().replace('/', "%2F");
    let note = host.root.path().join(name + ".departed");
    fs::write(note, format!("flexnbd 1 {DEPARTED}\n")).unwrap();
    assert_eq!(host.retired("success"), STOP);
}

#[test]
fn sockets_stay_for_a_disk_that_comes_back() {
    let host = Host::new();
    host.record(DEPARTED);
    host.systemctl("4711");
    assert_eq!(host.retired("success"), "");
    host.systemctl("0");
    assert_eq!(host.retired("success"), STOP);
}

#[test]
fn a_receiver_that_replaces_a_serving_service_is_announced() {
    let host = Host::new();
    assert_eq!(host.retires("success"), "", "an ordinary stop");
    host.systemctl("4711");
    let told = host.retires("success");
    let remedy = "systemctl start flexnbd@disk.service";
    assert!(told.contains("clients of disk are disconnected") && told.contains(remedy), "{told}");
    host.record(DEPARTED);
    assert_eq!(host.retires("success"), "", "no client has a disk here");
}

#[test]
fn sockets_stay_while_the_service_is_restarted() {
    let host = Host::new();
    host.record(DEPARTED);
    for job in ["restart running", "start waiting"] {
        host.systemctl_with("0", &format!("7 flexnbd@disk.service {job}"));
        assert_eq!(host.retired("success"), "", "{job}");
    }
    host.systemctl_with("0", "7 flexnbd@disk.service stop running");
    assert_eq!(host.retired("success"), STOP);
}

#[test]
fn sockets_stay_when_nothing_can_be_found_out() {
    let host = Host::new();
    fs::write(host.path("disk.conf"), "nonsense\n").unwrap();
    assert_eq!(host.retired("success"), "");
    let image = temp_dir();
    fs::write(host.path("disk.conf"), format!("FILE={}\n", image.path().display())).unwrap();
    assert_eq!(host.retired("success"), "", "a directory");
}

#[test]
fn records_can_be_looked_up_and_the_directory_of_sockets_is_roots() {
    let lines = include_str!("../systemd/flexnbd.tmpfiles").lines();
    let made: Vec<&str> = lines.filter(|line| !line.starts_with('#')).collect();
    assert!(made.contains(&"d /run/flexnbd 0750 root flexnbd -"), "{made:?}");
    assert!(made.contains(&"d /var/lib/flexnbd 0711 flexnbd flexnbd -"), "{made:?}");
    for unit in [SERVICE, RECEIVER] {
        assert!(settings(unit, "[Service]").contains(&"StateDirectoryMode=0711"));
    }
}

/// Runs `tests/install` where apt-get says this once before it works; what it said, and how often
/// it was asked.
fn installs_after(complaint: &str) -> (bool, String, usize) {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    let asked = path("asked").display().to_string();
    let script = format!(
        "#!/bin/sh\necho \"$*\" >>{asked}\n[ $(wc -l <{asked}) = 1 ] || exit 0\n\
         echo \"{complaint}\" >&2\nexit 100\n"
    );
    fs::write(path("apt-get"), script).unwrap();
    fs::write(path("sudo"), "#!/bin/sh\nexec \"$@\"\n").unwrap();
    for name in ["apt-get", "sudo"] {
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut install = Command::new(project_path("tests/install"));
    install.arg("no-such-package").env("PATH", format!("{}:/usr/bin:/bin", dir.path().display()));
    let output = install.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let count = fs::read_to_string(asked).unwrap().lines().count();
    (output.status.success(), said, count)
}

#[test]
fn installing_for_tests_waits_for_the_locks_of_apt() {
    let lock = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)";
    assert_eq!(installs_after(lock), (true, String::new(), 3), "update twice, and install");
    let (worked, said, count) = installs_after("E: no network");
    assert_eq!((worked, said.as_str(), count), (false, "E: no network\n", 1));
}
