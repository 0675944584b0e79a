//! Migrations under load: content, sparseness and records of both images afterwards.
//! Never kills a process or cuts the network; `handover.rs` does.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "migration/qemu.rs"]
mod qemu;
#[path = "migration/unlinked.rs"]
mod unlinked;

use harness::host::{Host, MIRROR_STARTED};
use harness::image::{assert_as_sparse, assert_same, stamped_image, used_image};
use harness::writers::{NO_PAUSE, Writers};
use harness::{
    Endpoint, FILE_SYSTEMS, GIB, MIB, Program, Running, allocated, poll_until, require_root,
    require_tool, sparse_file, temp_dir_in,
};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

/// Pause between two batches of a writer, so that the copy keeps up with it.
const PAUSE: Duration = Duration::from_millis(20);
/// Deadline of a migration of many passes: the throttling of writers changes once in each pass.
const CONVERGENCE_TIMEOUT: Duration = Duration::from_secs(120);

/// Migrates a disk of 128 MiB, a quarter of it data, under four writers onto an image with old
/// data.
fn migrate_under_writers(parent: &str) {
    const SIZE: u64 = 128 * MIB;
    let dir = temp_dir_in(parent);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, SIZE);
    used_image(&destination.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let writers = Writers::start(Endpoint::Tcp(source.address), SIZE, (4, 1, PAUSE));
    writers.wait_for_writes(200);
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 4, "sessions stay open until the handover");
    assert_same(&source.image, &destination.image);
    written.assert_all_present(&destination.image, parent);
    assert_as_sparse(&source.image, &destination.image);
    assert_eq!((source.record(), destination.record()), ("departed".into(), "ours".into()));
}

#[test]
fn destination_has_acknowledged_writes_on_disk_file_system() {
    migrate_under_writers(FILE_SYSTEMS[0]);
}

#[test]
fn destination_has_acknowledged_writes_on_tmpfs() {
    migrate_under_writers(FILE_SYSTEMS[1]);
}

/// Migrates an image that `fill` has written to; both processes must succeed, with equal images.
fn migrate_filled(parent: &str, size: u64, fill: impl FnOnce(&File)) {
    let dir = temp_dir_in(parent);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    sparse_file(&source.image, size);
    sparse_file(&destination.image, size);
    fill(&File::options().write(true).open(&source.image).unwrap());
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_same(&source.image, &destination.image);
    assert_as_sparse(&source.image, &destination.image);
}

#[test]
fn sparse_tebibyte_migrates_within_the_timeout() {
    for parent in FILE_SYSTEMS {
        migrate_filled(parent, 1024 * GIB, |image| {
            for part in 0..100 {
                let data = harness::noise(MIB as usize, part);
                image.write_all_at(&data, part * 10 * GIB + part * 4096).unwrap();
            }
        });
    }
}

#[test]
fn disk_without_data_migrates() {
    migrate_filled(FILE_SYSTEMS[0], 64 * MIB, |_| {});
}

#[test]
fn smallest_allowed_disk_migrates() {
    migrate_filled(FILE_SYSTEMS[0], 4096, |image| image.write_all_at(b"small", 4000).unwrap());
}

#[test]
fn mirror_of_a_disk_below_4096_bytes_is_refused() {
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    sparse_file(&source.image, 3584);
    sparse_file(&destination.image, 3584);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let reply = source.mirror_to(destination.address, &[]);
    assert_eq!(reply, "1: the disk is smaller than 4096 bytes, which cannot be mirrored");
    assert_eq!(source.status_of("is_mirroring"), "false");
    assert!(serving.stop().success());
    assert_eq!(listening.stop().code(), Some(1), "`listen` exits without a disk");
}

#[test]
fn allocated_zeros_become_holes_at_the_destination() {
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    std::fs::write(&source.image, vec![0; 64 * MIB as usize]).unwrap();
    used_image(&destination.image, 64 * MIB);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_same(&source.image, &destination.image);
    let (before, after) = (allocated(&source.image), allocated(&destination.image));
    assert!(
        before >= 64 * MIB && after < MIB,
        "allocated: {before} bytes at the source, {after} at the destination"
    );
}

/// A `mirror` to a destination of `size` bytes is refused; the source still serves, and migrates
/// to another destination afterwards.
fn assert_size_is_refused(size: u64) {
    const SIZE: u64 = MIB;
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let [source, wrong, right] = ["source", "wrong", "right"].map(|n| Host::new(dir.path(), n));
    stamped_image(&source.image, SIZE);
    sparse_file(&wrong.image, size);
    sparse_file(&right.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), wrong.listen());
    let writers = Writers::start(Endpoint::Tcp(source.address), SIZE, (1, 1, PAUSE));
    writers.wait_for_writes(10);
    let reply = source.mirror_to(wrong.address, &[]);
    assert!(reply.starts_with("1: Remote size does not match local size"), "{reply}");
    writers.wait_for_writes(10);
    assert_eq!(wrong.record(), "", "no write reaches the refused destination");
    assert!(listening.is_running());
    let mut listening = right.listen();
    assert_eq!(source.mirror_to(right.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 1);
    written.assert_all_present(&right.image, "the second destination");
}

#[test]
fn smaller_destination_is_refused() {
    assert_size_is_refused(MIB - 512);
}

#[test]
fn larger_destination_is_refused() {
    assert_size_is_refused(MIB + 512);
}

#[test]
fn second_mirror_is_refused_until_break_ends_the_first() {
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, 16 * MIB);
    sparse_file(&destination.image, 16 * MIB);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let writers = Writers::start(Endpoint::Tcp(source.address), 16 * MIB, (2, 1, PAUSE));
    let options = ["exit", "0.0.0.0", "100000"];
    assert_eq!(source.mirror_to(destination.address, &options), MIRROR_STARTED);
    assert_eq!(source.status_of("migration_speed_limit"), "100000");
    assert_eq!(source.mirror_to(destination.address, &[]), "1: mirror already running");
    assert_eq!(source.command(&["mirror_max_bps", "200000"]), "0: updated");
    source.wait_for_status("migration_speed_limit", "200000");
    assert_eq!(source.command(&["break"]), "0: mirror stopped");
    source.wait_for_status("is_mirroring", "false");
    assert_eq!(source.command(&["break"]), "1: not mirroring");
    assert_eq!(source.command(&["mirror_max_bps", "1"]), "1: Not currently mirroring");
    writers.wait_for_writes(10);
    assert_eq!((source.record(), destination.record()), (String::new(), "incoming".into()));
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 2);
    written.assert_all_present(&destination.image, "after the second mirror");
}

#[test]
fn migration_converges_although_writers_outpace_the_link() {
    const SIZE: u64 = 4 * MIB;
    let dir = temp_dir_in(FILE_SYSTEMS[1]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, SIZE);
    sparse_file(&destination.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let writers = Writers::start(Endpoint::Tcp(source.address), SIZE, (4, 1, NO_PAUSE));
    writers.wait_for_writes(1000);
    let link = harness::proxy::Proxy::slow(destination.address, 2 * SIZE);
    assert_eq!(source.mirror_to(link.address, &[]), MIRROR_STARTED);
    let ended = poll_until(CONVERGENCE_TIMEOUT, || !serving.is_running());
    assert!(ended, "the migration does not converge: {:?}", source.status());
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 4);
    written.assert_all_present(&destination.image, "after convergence");
    assert!(serving.stderr().contains("holding each write back"), "{}", serving.stderr());
}

#[test]
fn source_read_error_ends_the_migration_without_a_retry() {
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, 16 * MIB);
    sparse_file(&destination.image, 16 * MIB);
    let (mut serving, _listening) = (source.serve(), destination.listen());
    let options = ["exit", "0.0.0.0", "2000000"];
    assert_eq!(source.mirror_to(destination.address, &options), MIRROR_STARTED);
    // Blocks past the new end cannot be read, as when a volume shrinks.
    File::options().write(true).open(&source.image).unwrap().set_len(8 * MIB).unwrap();
    source.wait_for_status("is_mirroring", "false");
    let image = source.image.display();
    // The source changes its status before it logs.
    serving.wait_for_stderr(&format!("failed: cannot read {image} at byte "));
    let log = serving.stderr();
    assert!(!log.contains("trying again"), "{log}");
    assert_eq!(source.record(), "");
    assert!(serving.stop().success());
}

#[test]
fn full_destination_exits_with_an_error_and_source_retries() {
    const SIZE: u64 = 32 * MIB;
    if !require_root("a full destination") {
        return;
    }
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let [source, mut full, roomy] = ["source", "full", "roomy"].map(|n| Host::new(dir.path(), n));
    full.image = small.join("dest.img");
    let mount = format!(
        "mount -t tmpfs -o size=4m tmpfs {0} && truncate -s {SIZE} {0}/dest.img && exec \"$@\"",
        small.display()
    );
    let full = full.through(&["unshare", "--mount", "sh", "-c", &mount, "sh"]);
    let roomy = roomy.at(full.address);
    stamped_image(&source.image, SIZE);
    sparse_file(&roomy.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), full.listen());
    let writers = Writers::start(Endpoint::Tcp(source.address), SIZE, (2, 1, PAUSE));
    assert_eq!(source.mirror_to(full.address, &[]), MIRROR_STARTED);
    assert_eq!(listening.wait_for_end().code(), Some(1));
    let stderr = listening.stderr();
    assert!(stderr.contains("cannot write the incoming disk: No space left on device"), "{stderr}");
    writers.wait_for_writes(50);
    serving.wait_for_stderr("trying again every second");
    let mut listening = roomy.listen();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 2);
    written.assert_all_present(&roomy.image, "the destination with room");
}

/// Migrates a disk under writers to an NBD server other than flexnbd, which cannot acknowledge a
/// handover.
fn migrate_to_third_party(start: impl FnOnce(&Host) -> Running) {
    const SIZE: u64 = 32 * MIB;
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, SIZE);
    used_image(&destination.image, SIZE);
    let mut serving = source.serve();
    let server = start(&destination);
    let writers = Writers::start(Endpoint::Tcp(source.address), SIZE, (2, 1, PAUSE));
    writers.wait_for_writes(50);
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(serving.stderr().contains("as far as we know"), "{}", serving.stderr());
    drop(server);
    let written = writers.stop();
    assert_eq!(written.connections, 2);
    assert_same(&source.image, &destination.image);
    written.assert_all_present(&destination.image, "a third-party destination");
    assert_as_sparse(&source.image, &destination.image);
    assert_eq!(source.record(), "departed");
}

/// Whether a process listens at the host's address. Reads `/proc/net/tcp` instead of connecting:
/// some servers accept only one client.
fn is_listening(host: &Host) -> bool {
    let octets = match host.address.ip() {
        std::net::IpAddr::V4(ip) => ip.octets(),
        std::net::IpAddr::V6(_) => unreachable!("hosts have IPv4 addresses"),
    };
    let entry = format!("{:08X}:{:04X}", u32::from_le_bytes(octets), host.address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().any(|line| line.contains(&entry) && line.contains(" 0A "))
}

#[test]
fn disk_migrates_to_qemu_nbd() {
    if !require_tool("qemu-nbd") {
        return;
    }
    migrate_to_third_party(|host| {
        let (ip, port) = (host.address.ip().to_string(), host.address.port().to_string());
        let image = host.image.to_str().unwrap();
        let command =
            ["qemu-nbd", "-f", "raw", "--discard=unmap", "-t", "-b", &ip, "-p", &port, image];
        Program::new(command[0]).args(&command[1..]).start_until(|| is_listening(host))
    });
}

#[test]
fn disk_migrates_to_nbdkit() {
    if !require_tool("nbdkit") {
        return;
    }
    migrate_to_third_party(|host| {
        let (ip, port) = (host.address.ip().to_string(), host.address.port().to_string());
        let image = host.image.to_str().unwrap();
        let command = ["nbdkit", "-f", "-i", &ip, "-p", &port, "file", image];
        Program::new(command[0]).args(&command[1..]).start_until(|| is_listening(host))
    });
}

#[test]
fn read_only_destination_is_refused() {
    if !require_tool("nbdkit") {
        return;
    }
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, MIB);
    let (ip, port) = (destination.address.ip().to_string(), destination.address.port().to_string());
    let command = ["nbdkit", "-f", "-r", "-i", &ip, "-p", &port, "memory", "1M"];
    let _plain =
        Program::new(command[0]).args(&command[1..]).start_until(|| is_listening(&destination));
    let mut serving = source.serve();
    let reply = source.mirror_to(destination.address, &[]);
    assert_eq!(reply, "1: Mirror was rejected (the destination's disk is read-only)");
    let writers = Writers::start(Endpoint::Tcp(source.address), MIB, (1, 1, PAUSE));
    writers.wait_for_writes(10);
    writers.stop();
    assert!(serving.stop().success());
}

#[test]
fn qemu_blockdev_mirror_copies_a_disk_to_flexnbd() {
    if !require_tool("qemu-storage-daemon") {
        return;
    }
    const SIZE: u64 = 32 * MIB;
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (qemu_image, destination) = (dir.path().join("qemu.img"), Host::new(dir.path(), "dest"));
    stamped_image(&qemu_image, SIZE);
    used_image(&destination.image, SIZE);
    let mut serving = destination.serve();
    let socket = dir.path().join("monitor");
    let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
    let image =
        format!("driver=file,node-name=file,filename={},discard=unmap", qemu_image.display());
    let command = [
        "qemu-storage-daemon",
        "--chardev",
        &chardev,
        "--monitor",
        "chardev=c",
        "--blockdev",
        &image,
        "--blockdev",
        "driver=raw,node-name=disk,file=file",
    ];
    let program = Program::new(command[0]).args(&command[1..]).start_until(|| socket.exists());
    let mut monitor = qemu::Monitor::connect(&socket);
    let (ip, port) = (destination.address.ip(), destination.address.port());
    monitor.execute(
        &format!(
            r#"{{"execute": "blockdev-add", "arguments": {{"driver": "nbd", "node-name": "target",
        "discard": "unmap", "detect-zeroes": "unmap",
        "server": {{"type": "inet", "host": "{ip}", "port": "{port}"}}}}}}"#
        )
        .replace('\n', ""),
    );
    monitor.execute(
        r#"{"execute": "blockdev-mirror", "arguments": {"job-id": "move", "device": "disk", "target": "target", "sync": "full"}}"#,
    );
    monitor.wait_for("BLOCK_JOB_READY");
    monitor.execute(r#"{"execute": "block-job-complete", "arguments": {"device": "move"}}"#);
    monitor.wait_for("BLOCK_JOB_COMPLETED");
    program.stop();
    assert!(serving.stop().success());
    assert_same(&qemu_image, &destination.image);
    assert_as_sparse(&qemu_image, &destination.image);
}

#[test]
fn qemu_guest_survives_migration_with_address_takeover() {
    if !require_tool("qemu-storage-daemon") {
        return;
    }
    const SIZE: u64 = 32 * MIB;
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, SIZE);
    sparse_file(&destination.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let socket = dir.path().join("guest");
    let (ip, port) = (source.address.ip(), source.address.port());
    let disk = format!(
        "driver=nbd,node-name=disk,server.type=inet,server.host={ip},server.port={port},\
         reconnect-delay=60"
    );
    let server_address = format!("addr.type=unix,addr.path={}", socket.display());
    let command = [
        "qemu-storage-daemon",
        "--blockdev",
        &disk,
        "--nbd-server",
        &server_address,
        "--export",
        "type=nbd,id=guest,node-name=disk,writable=on,name=",
    ];
    let _program = Program::new(command[0]).args(&command[1..]).start_until(|| socket.exists());
    let writers = Writers::start(Endpoint::Unix(socket), SIZE, (2, 1, PAUSE));
    writers.wait_for_writes(50);
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let mut serving = destination.clone().at(source.address).serve();
    writers.wait_for_writes(200);
    let written = writers.stop();
    assert_eq!(written.connections, 2, "connections of the guest stay open");
    assert!(serving.stop().success());
    written.assert_all_present(&destination.image, "the writes of the guest");
}
