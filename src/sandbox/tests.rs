//! What a confined process can and cannot do. Each test confines a process of its own, an ignored test of this
//! file, because confinement lasts.

use super::rules::{Grant, ImageFiles, Needs, PathRule};
use super::{Restrictions, drop_capabilities, enter};
use nix::errno::Errno;
use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable that tells the child its directory.
const DIRECTORY: &str = "FLEXNBD_TEST_DIRECTORY";

/// Runs the ignored test `name` of this file, which must pass.
#[track_caller]
fn passes_in_child(name: &str, directory: &Path) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("sandbox::tests::{name}"), "--ignored", "--test-threads=1"])
        .env(DIRECTORY, directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
}

fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY).expect("run by another test").into()
}

/// A directory with the image `a/disk`, and others beside it.
fn images() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a", "state", "sockets"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    for name in ["a/disk", "a/other", "secret", "state/record"] {
        fs::write(directory.path().join(name), "secret").unwrap();
    }
    directory
}

/// Whether Landlock is there; the kernel of a container may lack it.
fn has_landlock() -> bool {
    // SAFETY: with this flag the call only returns a number.
    let version = unsafe {
        let none = std::ptr::null::<u8>();
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, 1)
    };
    if version < 1 {
        eprintln!("skipped: no Landlock here");
    }
    version >= 1
}

/// The error of a system call with these arguments.
fn errno(number: libc::c_long, arguments: [libc::c_long; 4]) -> Option<Errno> {
    let [a, b, c, d] = arguments;
    // SAFETY: all callers pass numbers, or null pointers that the kernel refuses.
    let result = unsafe { libc::syscall(number, a, b, c, d) };
    Errno::result(result).err()
}

fn needs(directory: &Path) -> Needs {
    Needs {
        image: Some(ImageFiles {
            image: directory.join("a/disk"),
            is_device: false,
            read_only: false,
            state: directory.join("state"),
        }),
        sockets: vec![directory.join("sockets/s")],
        ..Needs::default()
    }
}

#[test]
fn files_of_others_are_out_of_reach() {
    let images = images();
    passes_in_child("child_opens_files", images.path());
    assert_eq!(fs::read(images.path().join("a/other")).unwrap(), b"secret");
}

#[test]
#[ignore = "run by the test above"]
fn child_opens_files() {
    let directory = directory();
    let path = |name: &str| directory.join(name);
    if !has_landlock() {
        return;
    }
    let restrictions = Restrictions { paths: needs(&directory).rules(), no_tcp_connect: false };
    assert!(enter(&restrictions).word().starts_with("landlock"));
    let denied = |result: io::Result<File>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    };
    denied(File::open(path("secret")));
    denied(File::open(path("a/other")));
    denied(OpenOptions::new().write(true).open(path("a/other")));
    denied(OpenOptions::new().write(true).create_new(true).open(path("new")));
    denied(File::open("/etc/passwd"));
    assert!(fs::read_dir(&directory).is_err());
    assert!(fs::rename(path("a/other"), path("state/other")).is_err());
    assert!(UnixListener::bind(path("a/socket")).is_err());

    OpenOptions::new().read(true).write(true).open(path("a/disk")).unwrap();
    File::open(path("state/record")).unwrap();
    fs::write(path("state/new"), "record").unwrap();
    fs::rename(path("state/new"), path("state/record")).unwrap();
    UnixListener::bind(path("sockets/s")).unwrap();
    fs::remove_file(path("sockets/s")).unwrap();
    fs::rename(path("a/disk"), path("a/.deleting")).unwrap();
    fs::remove_file(path("a/.deleting")).unwrap();
}

#[test]
fn forbidden_system_calls_fail() {
    passes_in_child("child_calls", Path::new("/"));
}

#[test]
#[ignore = "run by the test above"]
fn child_calls() {
    assert!(enter(&Restrictions::default()).word().ends_with("seccomp"));
    // Each of them would fail with another error, or succeed, without the filter.
    let pid = libc::c_long::from(std::process::id());
    for (name, number, arguments) in [
        ("execve", libc::SYS_execve, [0; 4]),
        ("execveat", libc::SYS_execveat, [-1, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0; 4]),
        ("mount", libc::SYS_mount, [0; 4]),
        ("unshare", libc::SYS_unshare, [0; 4]),
        ("kill", libc::SYS_kill, [pid, 0, 0, 0]),
        ("setuid", libc::SYS_setuid, [0; 4]),
        ("bpf", libc::SYS_bpf, [0; 4]),
        ("keyctl", libc::SYS_keyctl, [0; 4]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [pid, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0; 4]),
        ("fork", libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0]),
        ("packet socket", libc::SYS_socket, [libc::AF_PACKET.into(), 3, 0, 0]),
        ("memory to execute", libc::SYS_mmap, [0, 4096, 7, 0x22]),
        ("to execute memory", libc::SYS_mprotect, [0, 0, 5, 0]),
        ("signal to another", libc::SYS_tgkill, [1, 1, 0, 0]),
        ("terminal input", libc::SYS_ioctl, [-1, 0x5412, 0, 0]),
        ("unknown call", 100_000, [0; 4]),
    ] {
        assert_eq!(errno(number, arguments), Some(Errno::ENOSYS), "{name}");
    }
    assert_eq!(errno(libc::SYS_ioctl, [-1, 0x5421, 0, 0]), Some(Errno::EBADF), "FIONBIO");
    assert_eq!(errno(libc::SYS_tgkill, [pid, pid, 0, 0]), None, "itself");
    // The C library tries clone3(2) first.
    std::thread::spawn(|| ()).join().unwrap();
}

#[test]
fn connections_are_forbidden_only_on_request() {
    for child in ["child_without_connections", "child_with_connections"] {
        passes_in_child(child, Path::new("/"));
    }
}

/// Connects to a listener of its own, in a child without files.
fn connect(no_tcp_connect: bool) -> io::Result<TcpStream> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _ = enter(&Restrictions { no_tcp_connect, ..Restrictions::default() });
    TcpStream::connect(listener.local_addr().unwrap())
}

#[test]
#[ignore = "run by the test above"]
fn child_without_connections() {
    // Linux 6.7 and later.
    if has_landlock() {
        assert_eq!(connect(true).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}

#[test]
#[ignore = "run by the test above"]
fn child_with_connections() {
    connect(false).unwrap();
}

#[test]
fn status_of_the_process_shows_the_confinement() {
    passes_in_child("child_reads_its_status", Path::new("/"));
}

#[test]
#[ignore = "run by the test above"]
fn child_reads_its_status() {
    let status = |thread: &str| fs::read_to_string(format!("/proc/{thread}/status")).unwrap();
    drop_capabilities().unwrap();
    let paths = vec![PathRule { path: "/proc".into(), grant: Grant::Read }];
    let confined = enter(&Restrictions { paths, no_tcp_connect: false });
    assert!(confined.to_string().ends_with("seccomp in force"), "{confined}");
    let of_thread = std::thread::spawn(move || status("thread-self")).join().unwrap();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapInh:\t0000000000000000"] {
        assert!(of_thread.contains(line), "{line}: {of_thread}");
    }
    let effective = of_thread.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    let effective = u64::from_str_radix(effective, 16).unwrap();
    // Without CAP_SYS_ADMIN (21), CAP_SYS_PTRACE (19), CAP_SETUID (7), CAP_NET_ADMIN (12).
    assert_eq!(effective & (1 << 21 | 1 << 19 | 1 << 7 | 1 << 12), 0);
}
