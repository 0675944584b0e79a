//! QEMU: qemu-io, qemu-img, and qemu-storage-daemon with flexnbd as the target of a mirror job.

use crate::{assert_same_files, image_with_holes, write_sparse_data};
use harness::{
    MIB, Program, Served, Style, TIMEOUT, Transport, allocated, for_each_transport_and_style,
    read_at, require_tool, wait_for_exit,
};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver};

/// Runs qemu-io, which exits with 1 if a command fails.
#[track_caller]
fn qemu_io(served: &Served, commands: &[&str]) {
    let qemu_io = Program::new("qemu-io").words("-f raw");
    let qemu_io = qemu_io.args(commands.iter().flat_map(|command| ["-c", command]));
    qemu_io.args([served.uri()]).ok();
}

fn qemu_img(arguments: &str) -> Program {
    Program::new("qemu-img").words(arguments)
}

#[test]
fn qemu_io_reads_back_writes_zeroes_and_discards() {
    if !require_tool("qemu-io") {
        return;
    }
    for_each_transport_and_style(|served, _| check_reads_after_changes(served));
}

/// Changes the disk in several ways, and reads each part back.
#[track_caller]
pub(crate) fn check_reads_after_changes(served: &Served) {
    qemu_io(
        served,
        &[
            "read -P 0 0 64M",
            "write -P 7 64k 5M",
            "write -f -P 8 33 1000",
            "flush",
            "read -P 7 64k 5M",
            "read -P 8 33 1000",
            "read -P 0 1033 64503",
            "write -z 1M 1M",
            "write -z -u 2M 1M",
            "write -z -n -u 3M 4k",
            "discard 4M 1M",
            "read -P 0 1M 2M",
            "read -P 0 3M 4k",
            "read -P 0 4M 1M",
            "read -P 7 3076k 1020k",
            "aio_write -P 9 8M 4M",
            "aio_write -P 10 12M 4M",
            "aio_flush",
            "read -P 9 8M 4M",
            "read -P 10 12M 4M",
        ],
    );
    let data = read_at(&served.image, 64 << 10, 4096);
    assert_eq!((data[0], data[4095]), (7, 7), "data in the image");
    assert_eq!(served.server.stderr(), "");
}

#[test]
fn qemu_img_converts_both_ways() {
    if !require_tool("qemu-img") {
        return;
    }
    for_each_transport_and_style(|served, _| {
        let original = image_with_holes(served.dir.path(), "original");
        let (out, qcow) = (served.path("out"), served.path("out.qcow2"));
        let convert = |formats: &str| qemu_img("convert -m 8 -W").words(formats);
        convert("-n -f raw -O raw").args([&original]).args([served.uri()]).ok();
        assert_same_files(&original, &served.image);
        convert("-f raw -O raw").args([served.uri()]).args([&out]).ok();
        assert_same_files(&original, &out);
        convert("-f raw -O qcow2").args([served.uri()]).args([&qcow]).ok();
        qemu_img("compare -f raw -F qcow2").args([served.uri()]).args([&qcow]).ok();
        qemu_img("compare -f raw -F raw").args([&original]).args([served.uri()]).ok();
    });
}

#[test]
fn qemu_img_maps_the_holes_of_the_file() {
    if !require_tool("qemu-img") {
        return;
    }
    for transport in [Transport::Tcp, Transport::Unix] {
        let served = Served::start(transport, Style::New);
        write_sparse_data(&served.image);
        let map = |disk: &str| {
            let json = qemu_img("map -U -f raw --output=json").args([disk]).ok();
            let map: serde_json::Value = serde_json::from_str(&json).unwrap();
            let extents = map.as_array().unwrap().iter();
            extents
                .map(|s| format!("{} {} {}", s["start"], s["length"], s["data"]))
                .collect::<Vec<_>>()
        };
        let file = served.image.to_str().unwrap();
        assert_eq!(map(&served.uri()), map(file));
        let output = qemu_img("compare -s -U -f raw -F raw").args([&served.uri(), file]).ok();
        assert_eq!(output, "Images are identical.\n");
    }
}

#[test]
fn qemu_img_bench_succeeds_at_depth_64() {
    if !require_tool("qemu-img") {
        return;
    }
    for_each_transport_and_style(|served, _| {
        let bench = |options: &str| qemu_img("bench -f raw").words(options).args([served.uri()]);
        bench("-c 2000 -d 64 -s 4096").ok();
        bench("-c 1000 -d 64 -s 65536 -S 65536").ok();
        bench("-c 1000 -d 64 -s 4096 -w --pattern=165 --flush-interval=100 --no-drain").ok();
        assert_eq!(read_at(&served.image, 0, 1000 * 4096), [165; 1000 * 4096]);
    });
}

/// A QMP connection to qemu-storage-daemon.
struct Monitor {
    daemon: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Monitor {
    #[track_caller]
    fn start(arguments: &[String]) -> Monitor {
        let daemon = Program::new("qemu-storage-daemon").args(arguments);
        let daemon = daemon.words("--chardev stdio,id=monitor --monitor chardev=monitor");
        let mut daemon = daemon.start(Stdio::piped(), Stdio::piped());
        let (stdin, stdout) = (daemon.stdin.take().unwrap(), daemon.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines.all(|line| sender.send(line).is_ok())
        });
        Monitor { daemon, stdin, lines }
    }

    #[track_caller]
    fn execute(&mut self, command: &serde_json::Value) {
        writeln!(self.stdin, "{command}").unwrap();
        self.wait_for("\"return\"");
    }

    /// Waits for a line that contains `part`; fails on an error before it.
    #[track_caller]
    fn wait_for(&mut self, part: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(TIMEOUT);
            let line = line.unwrap_or_else(|e| panic!("waited for {part}: {e}"));
            assert!(!line.contains("\"error\""), "waited for {part}: {line}");
            if line.contains(part) {
                return line;
            }
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Ok(None) = self.daemon.try_wait() {
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
    }
}

#[test]
fn qemu_storage_daemon_mirrors_to_flexnbd() {
    if !require_tool("qemu-storage-daemon") {
        return;
    }
    for_each_transport_and_style(|served, style| {
        let original = image_with_holes(served.dir.path(), "original");
        let server = match served.uri().strip_prefix("nbd://127.0.0.1:") {
            Some(port) => format!("server.type=inet,server.host=127.0.0.1,server.port={port}"),
            None => format!("server.type=unix,server.path={}", served.path("nbd.sock").display()),
        };
        let mut qemu = Monitor::start(&[
            "--blockdev".into(),
            format!("driver=file,node-name=source,filename={}", original.display()),
            "--blockdev".into(),
            format!("driver=nbd,node-name=target,discard=unmap,detect-zeroes=unmap,{server}"),
        ]);
        qemu.wait_for("QMP");
        qemu.execute(&serde_json::json!({ "execute": "qmp_capabilities" }));
        qemu.execute(&serde_json::json!({ "execute": "blockdev-mirror", "arguments": {
            "job-id": "mirror", "device": "source", "target": "target", "sync": "full" } }));
        qemu.wait_for("BLOCK_JOB_READY");
        qemu.execute(&serde_json::json!({ "execute": "block-job-complete", "arguments": {
            "device": "mirror" } }));
        qemu.wait_for("BLOCK_JOB_COMPLETED");
        qemu.execute(&serde_json::json!({ "execute": "quit" }));
        assert!(wait_for_exit(&mut qemu.daemon, "qemu-storage-daemon").success());
        assert_same_files(&original, &served.image);
        if style == Style::New {
            assert!(allocated(&served.image) <= allocated(&original) + MIB, "the copy is sparse");
        }
    });
}
