//! The systemd generator: reads a directory of configurations, writes directories of drop-ins.
//! How systemd loads the drop-ins is tested in the lab.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use harness::{TempDir, project_path, temp_dir};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const VALID: &str = "FILE=/srv/disks/a.img\nADDR=::\nPORT=10810\nAUTOSTART=yes\n";

/// A directory of configurations, `etc`, in a temporary directory.
struct Configurations {
    root: TempDir,
}

/// The result of one run of the generator.
struct Output {
    status: Option<i32>,
    errors: Vec<String>,
    /// The text of a file or the target of a link, by its path in the first output directory.
    files: BTreeMap<String, String>,
}

impl Configurations {
    fn new(files: &[(&str, &str)]) -> Self {
        let configurations = Self { root: temp_dir() };
        fs::create_dir(configurations.directory()).unwrap();
        for (name, text) in files {
            fs::write(configurations.directory().join(name), text).unwrap();
        }
        configurations
    }

    fn directory(&self) -> PathBuf {
        self.root.path().join("etc")
    }

    /// Runs the generator with empty output directories.
    fn run(&self) -> Output {
        let create = |name: &str| {
            let path = self.root.path().join(name);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            path
        };
        let directories = ["normal", "early", "late"].map(create);
        let output = Command::new(env!("CARGO_BIN_EXE_flexnbd-generator"))
            .args(&directories)
            .env("FLEXNBD_CONFIGURATIONS", self.directory())
            .env_remove("SYSTEMD_SCOPE")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let [normal, early, late] = directories;
        assert!(
            files_below(&early).is_empty() && files_below(&late).is_empty(),
            "files in the wrong directory"
        );
        assert_eq!(output.stdout, b"");
        let stderr = String::from_utf8(output.stderr).unwrap();
        let stderr = stderr.replace(self.root.path().to_str().unwrap(), "");
        Output {
            status: output.status.code(),
            errors: stderr.lines().map(str::to_owned).collect(),
            files: files_below(&normal),
        }
    }
}

impl Output {
    fn text(&self, path: &str) -> &str {
        &self.files[path]
    }

    fn contains(&self, paths: &[&str]) -> bool {
        paths.iter().all(|path| self.files.contains_key(*path))
    }
}

/// The text of every file and the target of every link below `directory`.
fn files_below(directory: &Path) -> BTreeMap<String, String> {
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

/// The output for the valid configuration `a.conf`.
const FILES_OF_A: [&str; 8] = [
    "dev-flexnbd-a.device.requires/flexnbd-attach@a.service",
    "flexnbd-attach@a.service.d/00-flexnbd-a.conf",
    "flexnbd-listen@a.service.d/00-flexnbd-a.conf",
    "flexnbd@a.service.d/00-flexnbd-a.conf",
    "flexnbd@a.socket.d/00-flexnbd-a.conf",
    "multi-user.target.wants/flexnbd@a.service",
    "sockets.target.wants/flexnbd-control@a.socket",
    "sockets.target.wants/flexnbd@a.socket",
];

#[test]
fn configuration_generates_drop_ins_and_links() {
    let run = Configurations::new(&[("a.conf", VALID)]).run();
    assert_eq!((run.status, &run.errors[..]), (Some(0), &[][..]));
    assert!(run.files.keys().eq(FILES_OF_A), "{:?}", run.files);
    assert!(run.text(FILES_OF_A[1]).contains("Requires=flexnbd@a.socket\n"));
    assert!(run.text(FILES_OF_A[2]).contains("ReadWritePaths=\"-/srv/disks\"\n"));
    assert!(run.text(FILES_OF_A[4]).contains("ListenStream=\nListenStream=[::]:10810\n"));
    assert_eq!(run.text(FILES_OF_A[5]), "/usr/lib/systemd/system/flexnbd@.service");
}

#[test]
fn links_point_to_templates_of_the_package() {
    let proxy = "TO=nbd://a\nAUTOSTART=yes\n";
    let run = Configurations::new(&[("a.conf", VALID), ("b.conf", proxy)]).run();
    let is_link = |path: &&str| path.contains(".wants/") || path.contains(".requires/");
    let links: Vec<&str> = run.files.keys().map(String::as_str).filter(is_link).collect();
    assert_eq!(links.len(), 8, "{links:?}");
    for link in links {
        let template = run.text(link).strip_prefix("/usr/lib/systemd/system/").unwrap();
        let source = project_path("systemd").join(template);
        assert!(source.is_file(), "there is no {}", source.display());
        let package = include_str!("../Cargo.toml");
        let asset = format!("[\"systemd/{template}\", \"usr/lib/systemd/system/\"");
        assert!(package.contains(&asset), "{asset} is not in the package");
    }
}

#[test]
fn invalid_configurations_are_named_and_affect_no_other() {
    let broken = "FILE=/srv/b.img\nADDR=::\nPORT=10811\nREADONLY=yes\nAUTOSTART=yes\n";
    let run =
        Configurations::new(&[("a.conf", VALID), ("b.conf", broken), ("c.conf", "nonsense")]).run();
    assert_eq!(run.status, Some(0), "the boot continues");
    let expected = [
        "flexnbd-generator: /etc/b.conf, line 4: unknown key READONLY; perhaps READ_ONLY is meant",
        "flexnbd-generator: /etc/c.conf, line 1: `nonsense` is not KEY=VALUE",
    ];
    assert_eq!(run.errors, expected);
    assert!(run.contains(&FILES_OF_A));
    // The sockets exist, so that the service refuses clients with an error message.
    let listens = |name| run.text(&format!("flexnbd@{name}.socket.d/00-flexnbd-{name}.conf"));
    assert!(listens("b").contains("ListenStream=[::]:10811\n"));
    assert!(listens("c").contains("ListenStream=/run/flexnbd/c.none\n"));
}

#[test]
fn unreadable_files_are_reported_without_blocking() {
    let configurations = Configurations::new(&[("a.conf", VALID)]);
    fs::create_dir(configurations.directory().join("directory.conf")).unwrap();
    mkfifo(&configurations.directory().join("fifo.conf"), Mode::S_IRUSR).unwrap();
    symlink("/nowhere", configurations.directory().join("gone.conf")).unwrap();
    fs::write(configurations.directory().join("binary.conf"), [0xff]).unwrap();
    fs::write(configurations.directory().join("huge.conf"), vec![b'\n'; (1 << 20) + 1]).unwrap();
    let run = configurations.run();
    assert_eq!(run.status, Some(0));
    let expected = [
        "flexnbd-generator: /etc/binary.conf: it is not UTF-8 text",
        "flexnbd-generator: /etc/directory.conf: not a regular file",
        "flexnbd-generator: /etc/fifo.conf: not a regular file",
        "flexnbd-generator: /etc/gone.conf: No such file or directory (os error 2)",
        "flexnbd-generator: /etc/huge.conf: longer than 1048576 bytes",
    ];
    assert_eq!(run.errors, expected);
    assert!(run.contains(&FILES_OF_A));
}

#[test]
fn other_files_are_ignored_and_invalid_names_reported() {
    let ignored = ["a.conf~", "a.conf.dpkg-new", ".a.conf.swp", "README"];
    let configurations: Vec<_> =
        ignored.into_iter().chain(["a.conf", "my disk.conf"]).map(|name| (name, VALID)).collect();
    let run = Configurations::new(&configurations).run();
    assert!(run.files.keys().eq(FILES_OF_A), "{:?}", run.files);
    let expected = "flexnbd-generator: /etc/my disk.conf: the name of an instance has letters, digits \
        and : - _ . @ only; skipped";
    assert_eq!((run.status, &run.errors[..]), (Some(0), &[expected.to_owned()][..]));
}

#[test]
fn without_configurations_nothing_is_generated() {
    let configurations = Configurations::new(&[]);
    assert_eq!(
        (configurations.run().status, configurations.run().files),
        (Some(0), BTreeMap::new())
    );
    fs::remove_dir(configurations.directory()).unwrap();
    let run = configurations.run();
    assert_eq!((run.status, run.errors, run.files), (Some(0), Vec::new(), BTreeMap::new()));
}

#[test]
fn unwritable_output_directory_is_an_error() {
    let configurations = Configurations::new(&[("a.conf", VALID)]);
    let output = Command::new(env!("CARGO_BIN_EXE_flexnbd-generator"))
        .args(["/proc/nowhere", "/proc/nowhere", "/proc/nowhere"])
        .env("FLEXNBD_CONFIGURATIONS", configurations.directory())
        .env_remove("SYSTEMD_SCOPE")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("a.conf: cannot write below /proc/nowhere: "), "{stderr}");
}

#[test]
fn packaged_examples_are_valid_and_have_every_key() {
    let examples = [
        include_str!("../systemd/examples/disk.conf"),
        include_str!("../systemd/examples/proxy.conf"),
    ];
    for key in flexnbd::cli::config::KEYS {
        let sets = |line: &str| line.trim_start_matches('#').starts_with(&format!("{key}="));
        let count = |example: &str| example.lines().filter(|line| sets(line)).count();
        let counts = examples.map(count);
        // A proxy has addresses as well.
        let in_one = if key == "ADDR" { counts == [1, 1] } else { counts[0] + counts[1] == 1 };
        assert!(in_one, "{key}: {counts:?}");
    }
    for example in examples {
        let run = Configurations::new(&[("disk.conf", example)]).run();
        assert_eq!((run.status, &run.errors[..]), (Some(0), &[][..]));
        // Commented lines are valid, too.
        let all: String = example
            .lines()
            .filter(|line| !line.starts_with("# "))
            .map(|line| format!("{line}\n"))
            .collect();
        let all = all.replace('#', "").replace("SOCK=\n", "SOCK=/run/x\n");
        let run = Configurations::new(&[("disk.conf", &all)]).run();
        assert_eq!((run.status, &run.errors[..]), (Some(0), &[][..]), "{all}");
    }
}
