//! The generator as systemd runs it: a directory of configurations in, directories of drop-ins out.
//! Never asks systemd what it makes of them; that is for the tests that boot one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use harness::{TempDir, project_path, temp_dir};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const GOOD: &str = "FILE=/srv/disks/a.img\nADDR=::\nPORT=10810\nAUTOSTART=yes\n";

/// Configurations, and what was made of them.
struct Etc {
    root: TempDir,
}

struct Run {
    status: Option<i32>,
    told: Vec<String>,
    /// Everything that was made, by its path in the first directory: text, or where a link leads.
    made: BTreeMap<String, String>,
}

impl Etc {
    fn new(configurations: &[(&str, &str)]) -> Self {
        let etc = Self { root: temp_dir() };
        fs::create_dir(etc.directory()).unwrap();
        for (name, text) in configurations {
            fs::write(etc.directory().join(name), text).unwrap();
        }
        etc
    }

    fn directory(&self) -> PathBuf {
        self.root.path().join("etc")
    }

    /// Runs the generator on it, into directories that are empty.
    fn run(&self) -> Run {
        let place = |name: &str| {
            let path = self.root.path().join(name);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            path
        };
        let places = ["normal", "early", "late"].map(place);
        let output = Command::new(env!("CARGO_BIN_EXE_flexnbd-generator"))
            .args(&places)
            .env("FLEXNBD_CONFIGURATIONS", self.directory())
            .env_remove("SYSTEMD_SCOPE")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let [normal, early, late] = places;
        assert!(found(&early).is_empty() && found(&late).is_empty(), "in the wrong directory");
        assert_eq!(output.stdout, b"");
        let told = String::from_utf8(output.stderr).unwrap();
        let told = told.replace(self.root.path().to_str().unwrap(), "");
        Run {
            status: output.status.code(),
            told: told.lines().map(str::to_owned).collect(),
            made: found(&normal),
        }
    }
}

impl Run {
    fn text(&self, path: &str) -> &str {
        &self.made[path]
    }

    fn has(&self, paths: &[&str]) -> bool {
        paths.iter().all(|path| self.made.contains_key(*path))
    }
}

/// Everything below `directory` that is no directory: its text, or where it leads.
fn found(directory: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut unvisited = vec![directory.to_owned()];
    while let Some(visited) = unvisited.pop() {
        for entry in fs::read_dir(visited).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
            if path.is_symlink() {
                all.insert(name, fs::read_link(&path).unwrap().to_str().unwrap().to_owned());
            } else if path.is_dir() {
                unvisited.push(path);
            } else {
                all.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    all
}

/// What a good configuration named `a` is turned into.
const OF_A: [&str; 6] = [
    "flexnbd-listen@a.service.d/00-flexnbd-a.conf",
    "flexnbd@a.service.d/00-flexnbd-a.conf",
    "flexnbd@a.socket.d/00-flexnbd-a.conf",
    "multi-user.target.wants/flexnbd@a.service",
    "sockets.target.wants/flexnbd-control@a.socket",
    "sockets.target.wants/flexnbd@a.socket",
];

#[test]
fn a_configuration_becomes_drop_ins_and_links_to_the_templates() {
    let run = Etc::new(&[("a.conf", GOOD)]).run();
    assert_eq!((run.status, &run.told[..]), (Some(0), &[][..]));
    assert!(run.made.keys().eq(OF_A), "{:?}", run.made);
    assert!(run.text(OF_A[0]).contains("ReadWritePaths=\"-/srv/disks\"\n"));
    assert!(run.text(OF_A[2]).contains("ListenStream=\nListenStream=[::]:10810\n"));
    assert_eq!(run.text(OF_A[3]), "/usr/lib/systemd/system/flexnbd@.service");
}

#[test]
fn the_templates_that_links_lead_to_are_those_of_the_package() {
    let run = Etc::new(&[("a.conf", GOOD)]).run();
    for link in &OF_A[3..] {
        let template = run.text(link).strip_prefix("/usr/lib/systemd/system/").unwrap();
        let source = project_path("systemd").join(template);
        assert!(source.is_file(), "there is no {}", source.display());
        let package = include_str!("../Cargo.toml");
        let asset = format!("[\"systemd/{template}\", \"usr/lib/systemd/system/\"");
        assert!(package.contains(&asset), "{asset} is not in the package");
    }
}

#[test]
fn a_broken_configuration_is_named_with_line_and_key_and_breaks_no_other() {
    let broken = "FILE=/srv/b.img\nADDR=::\nPORT=10811\nREADONLY=yes\nAUTOSTART=yes\n";
    let run = Etc::new(&[("a.conf", GOOD), ("b.conf", broken), ("c.conf", "nonsense")]).run();
    assert_eq!(run.status, Some(0), "boot goes on");
    let expected = [
        "flexnbd-generator: /etc/b.conf, line 4: unknown key READONLY; perhaps READ_ONLY is meant",
        "flexnbd-generator: /etc/c.conf, line 1: `nonsense` is not KEY=VALUE",
    ];
    assert_eq!(run.told, expected);
    assert!(run.has(&OF_A));
    // The service refuses them and says why; that nobody is elsewhere meanwhile is the sockets' part.
    let listens = |name| run.text(&format!("flexnbd@{name}.socket.d/00-flexnbd-{name}.conf"));
    assert!(listens("b").contains("ListenStream=[::]:10811\n"));
    assert!(listens("c").contains("ListenStream=/run/flexnbd/c.none\n"));
}

#[test]
fn what_is_no_readable_file_keeps_nobody_waiting() {
    let etc = Etc::new(&[("a.conf", GOOD)]);
    fs::create_dir(etc.directory().join("directory.conf")).unwrap();
    mkfifo(&etc.directory().join("fifo.conf"), Mode::S_IRUSR).unwrap();
    symlink("/nowhere", etc.directory().join("gone.conf")).unwrap();
    fs::write(etc.directory().join("binary.conf"), [0xff]).unwrap();
    fs::write(etc.directory().join("huge.conf"), vec![b'\n'; (1 << 20) + 1]).unwrap();
    let run = etc.run();
    assert_eq!(run.status, Some(0));
    let expected = [
        "flexnbd-generator: /etc/binary.conf: it is not UTF-8 text",
        "flexnbd-generator: /etc/directory.conf: not a regular file",
        "flexnbd-generator: /etc/fifo.conf: not a regular file",
        "flexnbd-generator: /etc/gone.conf: No such file or directory (os error 2)",
        "flexnbd-generator: /etc/huge.conf: longer than 1048576 bytes",
    ];
    assert_eq!(run.told, expected);
    assert!(run.has(&OF_A));
}

#[test]
fn files_that_are_not_meant_are_passed_over_and_odd_names_are_told() {
    let others = ["a.conf~", "a.conf.dpkg-new", ".a.conf.swp", "README"];
    let configurations: Vec<_> =
        others.into_iter().chain(["a.conf", "my disk.conf"]).map(|name| (name, GOOD)).collect();
    let run = Etc::new(&configurations).run();
    assert!(run.made.keys().eq(OF_A), "{:?}", run.made);
    let expected = "flexnbd-generator: /etc/my disk.conf: the name of an instance has letters, digits \
        and : - _ . @ only; skipped";
    assert_eq!((run.status, &run.told[..]), (Some(0), &[expected.to_owned()][..]));
}

#[test]
fn without_configurations_there_is_nothing_to_do() {
    let etc = Etc::new(&[]);
    assert_eq!((etc.run().status, etc.run().made), (Some(0), BTreeMap::new()));
    fs::remove_dir(etc.directory()).unwrap();
    let run = etc.run();
    assert_eq!((run.status, run.told, run.made), (Some(0), Vec::new(), BTreeMap::new()));
}

#[test]
fn a_directory_that_cannot_be_written_is_told_and_is_a_failure() {
    let etc = Etc::new(&[("a.conf", GOOD)]);
    let output = Command::new(env!("CARGO_BIN_EXE_flexnbd-generator"))
        .args(["/proc/nowhere", "/proc/nowhere", "/proc/nowhere"])
        .env("FLEXNBD_CONFIGURATIONS", etc.directory())
        .env_remove("SYSTEMD_SCOPE")
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("a.conf: cannot write below /proc/nowhere: "), "{told}");
}

#[test]
fn the_example_of_the_package_is_a_good_configuration_with_every_key_in_it() {
    let example = include_str!("../systemd/examples/disk.conf");
    let run = Etc::new(&[("disk.conf", example)]).run();
    assert_eq!((run.status, &run.told[..]), (Some(0), &[][..]));
    for key in flexnbd::cli::config::KEYS {
        let said = |line: &str| line.trim_start_matches('#').starts_with(&format!("{key}="));
        assert_eq!(example.lines().filter(|line| said(line)).count(), 1, "{key}");
    }
    // What is commented out is as good as it looks.
    let all: String = example
        .lines()
        .filter(|line| !line.starts_with("# "))
        .map(|line| format!("{line}\n"))
        .collect();
    let all = all.replace('#', "").replace("SOCK=\n", "SOCK=/run/x\n");
    let run = Etc::new(&[("disk.conf", &all)]).run();
    assert_eq!((run.status, &run.told[..]), (Some(0), &[][..]), "{all}");
}
