//! The Debian package: its files, and its units and scripts as far as they can be tested without a
//! service manager. The lab tests the installed package.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use harness::{project_path, sparse_image, temp_dir};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

const SERVICE: &str = include_str!("../systemd/flexnbd@.service");
const RECEIVER: &str = include_str!("../systemd/flexnbd-listen@.service");
const ATTACH: &str = include_str!("../systemd/flexnbd-attach@.service");
const SOCKET: &str = include_str!("../systemd/flexnbd@.socket");
const CONTROL: &str = include_str!("../systemd/flexnbd-control@.socket");
const PROXY: &str = include_str!("../systemd/flexnbd-proxy@.service");
const PROXY_SOCKET: &str = include_str!("../systemd/flexnbd-proxy@.socket");
const PROXY_CONTROL: &str = include_str!("../systemd/flexnbd-proxy-control@.socket");

/// The settings in a section of a unit, without comments.
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

/// The assets of the package: path in the repository and destination.
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
fn packaged_files_exist_and_all_units_are_packaged() {
    let assets = assets();
    assert!(assets.len() > 10, "only {assets:?}");
    for (path, _) in assets.iter().filter(|(path, _)| !path.starts_with("target/")) {
        assert!(project_path(path).is_file(), "{path} is missing");
    }
    for directory in ["systemd", "man"] {
        for entry in fs::read_dir(project_path(directory)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(project_path("")).unwrap().to_str().unwrap();
            let is_packaged = assets.iter().any(|(path, _)| *path == name);
            assert!(path.is_dir() || is_packaged, "{name} is not in the package");
        }
    }
}

#[test]
fn scripts_are_executable_and_valid_sh() {
    for script in [
        "systemd/attach",
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
fn both_services_have_the_same_sandbox() {
    // Settings that differ on purpose.
    let differing = [
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
        all.retain(|line| !differing.iter().any(|key| line.starts_with(&format!("{key}="))));
        all
    };
    assert!(common(SERVICE).len() > 30);
    assert_eq!(common(SERVICE), common(RECEIVER));
}

#[test]
fn services_require_their_sockets_and_conflict() {
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
fn units_have_no_start_limit() {
    for unit in [SERVICE, RECEIVER, ATTACH, SOCKET, CONTROL, PROXY, PROXY_SOCKET, PROXY_CONTROL] {
        assert!(settings(unit, "[Unit]").contains(&"StartLimitIntervalSec=0"));
    }
}

#[test]
fn socket_units_set_the_expected_descriptor_names() {
    use flexnbd::systemd::sockets::{CONTROL_NAME, NBD_NAME};
    let sockets = [(SOCKET, NBD_NAME), (PROXY_SOCKET, NBD_NAME)];
    let controls = [(CONTROL, CONTROL_NAME), (PROXY_CONTROL, CONTROL_NAME)];
    for (unit, name) in sockets.into_iter().chain(controls) {
        let line = format!("FileDescriptorName={name}");
        assert!(settings(unit, "[Socket]").contains(&&*line), "{name}");
    }
    let path = "ListenStream=/run/flexnbd/%i.sock";
    for unit in [CONTROL, PROXY_CONTROL] {
        assert!(settings(unit, "[Socket]").contains(&path), "the path that --instance uses");
    }
}

#[test]
fn the_sockets_of_a_proxy_are_those_of_a_disk() {
    let of_disk = |text: &str| text.replace("flexnbd-proxy", "flexnbd");
    for (proxy, disk) in [(PROXY_SOCKET, SOCKET), (PROXY_CONTROL, CONTROL)] {
        for section in ["[Socket]", "[Install]"] {
            assert_eq!(settings(&of_disk(proxy), section), settings(disk, section));
        }
    }
}

#[test]
fn a_proxy_requires_its_sockets() {
    let sockets = "flexnbd-proxy@%i.socket flexnbd-proxy-control@%i.socket";
    assert!(settings(PROXY, "[Unit]").contains(&&*format!("Requires={sockets}")));
    assert!(settings(PROXY, "[Service]").contains(&&*format!("Sockets={sockets}")));
    assert!(settings(PROXY, "[Install]").contains(&&*format!("Also={sockets}")));
}

#[test]
fn a_proxy_has_the_sandbox_of_a_server_without_images() {
    // Settings that differ on purpose.
    let differing = [
        "ExecStart",
        "ExecStopPost",
        "Sockets",
        "RestartSec",
        "StateDirectory",
        "StateDirectoryMode",
    ];
    let common = |unit| {
        let mut all = settings(unit, "[Service]");
        all.retain(|line| !differing.iter().any(|key| line.starts_with(&format!("{key}="))));
        all
    };
    assert!(common(SERVICE).len() > 30);
    assert_eq!(common(PROXY), common(SERVICE));
}

#[test]
fn the_package_links_flexnbd_proxy_to_the_program() {
    let link = r#"{ dest = "usr/bin/flexnbd-proxy", link_name = "flexnbd" },"#;
    let manifest = include_str!("../Cargo.toml");
    assert!(manifest.lines().any(|line| line.trim() == link));
    assert!(assets().contains(&("target/release/flexnbd", "usr/bin/")));
}

/// A host with a stub of `systemctl` that records its arguments.
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

    /// Installs the stub; `job` is the pending job of the receiving unit, if any.
    fn systemctl(&self, job: &str) {
        self.systemctl_with(job, "");
    }

    /// Installs the stub with `jobs` as the job list of the serving unit.
    fn systemctl_with(&self, job: &str, jobs: &str) {
        let path = self.path("bin/systemctl");
        let calls = self.path("calls");
        let text = format!(
            "#!/bin/sh\ncase \"$1\" in show) echo {job} ;; list-jobs) echo '{jobs}' ;; \
             *) echo \"$*\" >>{} ;; esac\n",
            calls.display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn record(&self, record: &str) {
        let image = self.path("disk.img");
        xattr::set(&image, "user.flexnbd", format!("flexnbd 1 {record}\n").as_bytes()).unwrap();
        let mut status = Command::new(env!("CARGO_BIN_EXE_flexnbd"));
        let output = status.args(["status", "--file"]).arg(&image).output().unwrap();
        assert!(output.status.success(), "{record}: {output:?}");
    }

    /// Runs the script after a stop with this result; returns the recorded calls of systemctl.
    fn calls_of_retire(&self, result: &str) -> String {
        self.output_of_retire(result);
        fs::read_to_string(self.path("calls")).unwrap_or_default()
    }

    /// Runs the script after a stop with this result; returns its output to the journal.
    fn output_of_retire(&self, result: &str) -> String {
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
fn sockets_stay_while_the_disk_is_here() {
    let host = Host::new();
    for result in ["success", "exit-code", "signal", "watchdog"] {
        assert_eq!(host.calls_of_retire(result), "", "{result}");
    }
    for record in ["incoming id=-", "ours title=adopted"] {
        host.record(record);
        assert_eq!(host.calls_of_retire("success"), "", "{record}");
    }
}

#[test]
fn sockets_stop_after_the_disk_departed() {
    let host = Host::new();
    host.record(DEPARTED);
    assert_eq!(host.calls_of_retire("success"), STOP);
}

#[test]
fn sockets_stop_after_a_departed_image_was_deleted() {
    let host = Host::new();
    fs::remove_file(host.path("disk.img")).unwrap();
    for result in ["success", "exit-code"] {
        assert_eq!(host.calls_of_retire(result), "", "missing without a record: {result}");
    }
    let name = host.path("disk.img").display().to_string().replace('/', "%2F");
    let tombstone = host.root.path().join(name + ".departed");
    fs::write(tombstone, format!("flexnbd 1 {DEPARTED}\n")).unwrap();
    assert_eq!(host.calls_of_retire("success"), STOP);
}

#[test]
fn sockets_stay_while_the_receiver_is_starting() {
    let host = Host::new();
    host.record(DEPARTED);
    host.systemctl("4711");
    assert_eq!(host.calls_of_retire("success"), "");
    host.systemctl("0");
    assert_eq!(host.calls_of_retire("success"), STOP);
}

#[test]
fn a_receiver_replacing_the_service_is_logged() {
    let host = Host::new();
    assert_eq!(host.output_of_retire("success"), "", "an ordinary stop");
    host.systemctl("4711");
    let output = host.output_of_retire("success");
    let remedy = "systemctl start flexnbd@disk.service";
    assert!(
        output.contains("clients of disk are disconnected") && output.contains(remedy),
        "{output}"
    );
    host.record(DEPARTED);
    assert_eq!(host.output_of_retire("success"), "", "no client uses the disk here");
}

#[test]
fn sockets_stay_while_the_service_is_restarted() {
    let host = Host::new();
    host.record(DEPARTED);
    for job in ["restart running", "start waiting"] {
        host.systemctl_with("0", &format!("7 flexnbd@disk.service {job}"));
        assert_eq!(host.calls_of_retire("success"), "", "{job}");
    }
    host.systemctl_with("0", "7 flexnbd@disk.service stop running");
    assert_eq!(host.calls_of_retire("success"), STOP);
}

#[test]
fn sockets_stay_if_the_ownership_is_unknown() {
    let host = Host::new();
    fs::write(host.path("disk.conf"), "nonsense\n").unwrap();
    assert_eq!(host.calls_of_retire("success"), "");
    let image = temp_dir();
    fs::write(host.path("disk.conf"), format!("FILE={}\n", image.path().display())).unwrap();
    assert_eq!(host.calls_of_retire("success"), "", "a directory");
}

/// Runs `attach start` for the instance `disk` with stubs of these programs; returns its stderr. It must
/// fail, and reserve no device.
#[track_caller]
fn refusal_of_attach(socket_unit: &str, stubs: &[(&str, &str)]) -> String {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    for name in ["bin", "devices"] {
        fs::create_dir(path(name)).unwrap();
    }
    for (name, script) in stubs.iter().chain(&[("modprobe", "exit 0")]) {
        let stub = path("bin").join(name);
        fs::write(&stub, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&stub, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut attach = Command::new(project_path("systemd/attach"));
    attach.args(["start", "disk", socket_unit]).env("FLEXNBD_DEVICES", path("devices"));
    let output = attach.env("PATH", format!("{}:/usr/bin:/bin", path("bin").display())).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(fs::read_dir(path("devices")).unwrap().count(), 0, "it has reserved a device");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_disk_that_cannot_be_attached_is_explained() {
    let unit = "flexnbd@disk.socket";
    let client =
        "echo 'Warning: the oldstyle protocol is no longer supported.'; echo 'E: no'; exit 1";
    let client = ("nbd-client", client);
    let tcp = ("systemctl", "echo '[::]:10809 (Stream)'");
    let unix = ("systemctl", "echo '[::]:10809 (Stream)'; echo '/run/a b.nbd (Stream)'");
    for (socket_unit, stubs, expected) in [
        (unit, &[][..], "nbd-client is missing: install the package of that name\n"),
        (
            "",
            &[client],
            "flexnbd-attach@disk.service knows no socket: run systemctl daemon-reload; ",
        ),
        (
            unit,
            &[client, tcp],
            "flexnbd@disk.socket has no unix socket: set ADDR=/run/flexnbd/disk.nbd ",
        ),
        (unit, &[client, unix], "nbd-client cannot connect to /run/a b.nbd: E: no\n"),
    ] {
        let stderr = refusal_of_attach(socket_unit, stubs);
        assert!(stderr.starts_with(expected), "{stderr}");
    }
}

#[test]
fn tmpfiles_set_modes_of_state_and_socket_directories() {
    let lines = include_str!("../systemd/flexnbd.tmpfiles").lines();
    let directories: Vec<&str> = lines.filter(|line| !line.starts_with('#')).collect();
    assert!(directories.contains(&"d /run/flexnbd 0750 root flexnbd -"), "{directories:?}");
    assert!(directories.contains(&"d /var/lib/flexnbd 0711 flexnbd flexnbd -"), "{directories:?}");
    for unit in [SERVICE, RECEIVER] {
        assert!(settings(unit, "[Service]").contains(&"StateDirectoryMode=0711"));
    }
}

/// Runs `tests/install` with a stub of apt-get that fails once with this error. Returns success,
/// stderr, and the number of calls.
fn install_after_error(error: &str) -> (bool, String, usize) {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    let log = path("calls").display().to_string();
    let script = format!(
        "#!/bin/sh\necho \"$*\" >>{log}\n[ $(wc -l <{log}) = 1 ] || exit 0\n\
         echo \"{error}\" >&2\nexit 100\n"
    );
    fs::write(path("apt-get"), script).unwrap();
    fs::write(path("sudo"), "#!/bin/sh\nexec \"$@\"\n").unwrap();
    for name in ["apt-get", "sudo"] {
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut install = Command::new(project_path("tests/install"));
    install.arg("no-such-package").env("PATH", format!("{}:/usr/bin:/bin", dir.path().display()));
    let output = install.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let count = fs::read_to_string(log).unwrap().lines().count();
    (output.status.success(), stderr, count)
}

#[test]
fn the_install_script_waits_for_apt_locks() {
    let lock = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)";
    assert_eq!(install_after_error(lock), (true, String::new(), 3), "update twice, then install");
    let (success, stderr, count) = install_after_error("E: no network");
    assert_eq!((success, stderr.as_str(), count), (false, "E: no network\n", 1));
}
