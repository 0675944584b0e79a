//! An unprivileged user on a machine where the package has created `/var/lib/flexnbd`. Each test
//! uses its own mount namespace.

use crate::{NOBODY, as_nobody, permit};
use harness::{Outcome, Program, TempDir, require_root, temp_dir};
use nix::unistd::{Uid, chown};
use std::fs::DirEntry;

/// Modes of the state directory: of the package, of older packages, of `mkdir`.
const MODES: [&str; 3] = ["711", "750", "755"];

/// Environments that name a home directory, or none. `$D` is the test's directory.
const HOMES: [&str; 5] = [
    "HOME=$D/home",
    "HOME=$D/missing",
    "HOME=$D/sealed",
    "-u HOME",
    "HOME=/root XDG_STATE_HOME=$D/sealed",
];

/// Script: serves an image, receives into another one, and queries the status of both servers.
const SERVE_AND_LISTEN: &str = "
    up() { for i in $(seq 300); do [ -S $1 ] && return; sleep .1; done; echo \"no $1\"; exit 9; }
    $F serve --file $I/disk.img --create 1M --addr $D/own/nbd --sock $D/own/sock & server=$!
    up $D/own/sock; $F status --sock $D/own/sock; kill $server; wait $server || exit 2
    $F listen --file $I/new.img --create 1M --addr $D/own/nbd --sock $D/own/in & server=$!
    up $D/own/in; $F status --sock $D/own/in; kill $server; wait $server; [ $? = 1 ] || exit 3
    $F adopt --file $I/disk.img && $F status --file $I/disk.img";

/// The directories that the user's processes see.
struct Machine {
    dir: TempDir,
}

impl Machine {
    /// `None`, with a skip line, unless the test runs as root.
    fn new() -> Option<Self> {
        if !require_root("an unprivileged user") {
            return None;
        }
        let dir = temp_dir();
        as_nobody(dir.path())?;
        for (name, mode) in [("own", 0o755), ("home", 0o755), ("sealed", 0o555), ("plain", 0o755)] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            permit(&dir.path().join(name), mode);
        }
        let user = Uid::from_raw(NOBODY.parse().unwrap());
        for name in ["own", "home"] {
            chown(&dir.path().join(name), Some(user), None).unwrap();
        }
        Some(Self { dir })
    }

    /// Runs `prepare` as root and then `script` as the user. `$I` is the directory of images: `$D/own`,
    /// or `$D/plain`, whose file system has no extended attributes. `$F` is the program, and `$(R)` the
    /// record file of `$I/disk.img` in the package's state directory.
    fn user(
        &self,
        (mode, home, images): (&str, &str, &str),
        prepare: &str,
        script: &str,
    ) -> Outcome {
        let line = format!(
            "set -e; mount -t tmpfs none /var/lib; mkdir -m {mode} /var/lib/flexnbd
            mount -t ramfs none $D/plain; chown {NOBODY} $D/plain; export I=$D/{images}
            R() {{ echo /var/lib/flexnbd/$(echo $I/disk.img | sed s,/,%2F,g); }}
            {prepare}
            exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups env {home} sh -c \"$SCRIPT\""
        );
        let directory = self.dir.path().display();
        let program = format!("F={directory}/flexnbd");
        let (directory, script) = (format!("D={directory}"), format!("SCRIPT={script}"));
        Program::new("env")
            .args([&directory, &program, &script])
            .words("unshare --mount --propagation private sh -c")
            .args([&line])
            .run()
    }
}

#[test]
fn unprivileged_users_serve_and_listen_with_any_home() {
    let Some(machine) = Machine::new() else { return };
    let standard = MODES.map(|mode| (mode, HOMES[0]));
    for (mode, home) in standard.into_iter().chain(HOMES.map(|home| (MODES[0], home))) {
        let outcome = machine.user((mode, home, "own"), "rm -f $D/own/*", SERVE_AND_LISTEN);
        let output = outcome.succeeded().text().to_owned();
        for part in ["ownership=none", "ownership=incoming", "is now ours", "ownership=ours"] {
            assert!(output.contains(part), "{mode} {home}: no {part} in {output}");
        }
    }
}

#[test]
fn records_go_to_the_users_state_directory() {
    let Some(machine) = Machine::new() else { return };
    let outcome = machine.user((MODES[0], HOMES[0], "plain"), "", SERVE_AND_LISTEN);
    assert!(outcome.succeeded().text().contains("ownership=ours"));
    let state = machine.dir.path().join("home/.local/state/flexnbd");
    let names: Vec<_> = std::fs::read_dir(&state).unwrap().flatten().collect();
    let is_record = |entry: &&DirEntry| entry.file_name().to_string_lossy().starts_with('%');
    let records = names.iter().filter(is_record).count();
    assert_eq!(
        (records, names.len()),
        (2, 3),
        "a record for each, and the id of the adopted: {names:?}"
    );
}

#[test]
fn an_unwritable_record_names_its_path() {
    let Some(machine) = Machine::new() else { return };
    let adopt = "truncate -s 1M $I/disk.img; exec $F adopt --file $I/disk.img";
    let outcome = machine.user((MODES[0], HOMES[2], "plain"), "", adopt);
    outcome.refused(1, &["/sealed/.local/state/flexnbd/", "Permission denied"]);
}

/// Script: the service's record says that the disk has departed.
const DEPARTED: &str = "echo 'flexnbd 1 departed id=00112233445566778899aabbccddeeff \
    when=1700000000 to=192.0.2.7:10809' >$(R); truncate -s 1M $I/disk.img; chown 65534 $I/disk.img";

#[test]
fn records_of_the_service_bind_other_users() {
    let Some(machine) = Machine::new() else { return };
    for mode in ["711", "755"] {
        let user = |script: &str| machine.user((mode, HOMES[0], "plain"), DEPARTED, script);
        let serve = user("exec $F serve --file $I/disk.img --addr $D/own/nbd");
        serve.refused(78, &["has moved to 192.0.2.7:10809"]);
        let status = user("exec $F status --file $I/disk.img");
        assert!(status.succeeded().text().contains("ownership=departed"));
        let adopt = user("exec $F adopt --force --file $I/disk.img");
        adopt.refused(1, &["/var/lib/flexnbd/", "Permission denied"]);
    }
}

#[test]
fn a_disk_deleted_by_the_service_stays_deleted() {
    let Some(machine) = Machine::new() else { return };
    let prepare = format!("{DEPARTED}; mv $(R) $(R).departed; rm $I/disk.img");
    let serve = "exec $F serve --file $I/disk.img --create 1M --addr $D/own/nbd";
    let outcome = machine.user((MODES[0], HOMES[0], "plain"), &prepare, serve);
    outcome.refused(78, &["has moved to 192.0.2.7:10809 and was deleted here"]);
}
