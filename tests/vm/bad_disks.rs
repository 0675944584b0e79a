//! Disks that fail in part, hang, or vanish: device-mapper targets over a SCSI disk with sectors of 512 and
//! 4096 bytes, with and without the page cache. A client of the bad part gets the right error; clients of
//! the other parts, and the server, go on.

use crate::log_writes::{attach_loop, dmsetup};
use crate::machine::ok;
use crate::session::with_modules;
use harness::host::{Host, MIRROR_STARTED};
use harness::raw::*;
use harness::session::{Mode, Request, Session};
use harness::{Endpoint, MIB, Server, TempDir, sparse_file, temp_dir, wait_until};
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

const MODULES: &str = "dm_mod dm_flakey dm_delay loop sd_mod scsi_debug";
/// Size of the SCSI disk.
const SIZE: u64 = 16 * MIB;
/// The part of the disk that is made to fail.
const BAD: u64 = 8 * MIB;
const BAD_SIZE: u64 = 4 * MIB;
/// A device of device-mapper on the disk.
const NAME: &str = "bad";
const DEVICE: &str = "/dev/mapper/bad";

/// A new SCSI disk of zeros in memory.
struct ScsiDisk {
    name: String,
}

impl ScsiDisk {
    #[track_caller]
    fn new(sector: u32) -> ScsiDisk {
        ok("rmmod scsi_debug 2>/dev/null; true");
        ok(&format!("modprobe scsi_debug dev_size_mb={} sector_size={sector} delay=0", SIZE / MIB));
        let mut name = None;
        wait_until("the disk", || {
            let disks = "/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/*";
            let found = ok(&format!("ls -d {disks} 2>/dev/null; true"));
            name =
                found.trim().rsplit('/').next().map(str::to_owned).filter(|name| !name.is_empty());
            name.as_ref().is_some_and(|name| fs::metadata(format!("/dev/{name}")).is_ok())
        });
        ScsiDisk { name: name.unwrap() }
    }

    fn device(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// Removes the disk, as when its cable is pulled.
    #[track_caller]
    fn delete(&self) {
        fs::write(format!("/sys/block/{}/device/delete", self.name), "1").unwrap();
    }
}

/// The device [`DEVICE`]: a disk of which one part can fail.
struct PartlyBad {
    /// The device that stores it.
    under: String,
    /// The part, in sectors of 512 bytes.
    start: u64,
    length: u64,
    size: u64,
}

impl PartlyBad {
    /// A sound device.
    #[track_caller]
    fn new(under: &str, (start, length): (u64, u64)) -> PartlyBad {
        let size = ok(&format!("blockdev --getsz {under}")).trim().parse().unwrap();
        let device =
            PartlyBad { under: under.to_owned(), start: start / 512, length: length / 512, size };
        dmsetup(&format!("create {NAME} --table \"{}\"", device.table(&device.linear())));
        device
    }

    fn linear(&self) -> String {
        format!("linear {} {}", self.under, self.start)
    }

    fn table(&self, part: &str) -> String {
        let PartlyBad { under, start, length, size } = self;
        let (end, rest) = (start + length, size - start - length);
        format!(
            "0 {start} linear {under} 0\n{start} {length} {part}\n{end} {rest} linear {under} {end}"
        )
    }

    /// Replaces the target of the part.
    #[track_caller]
    fn set(&self, part: &str) {
        dmsetup(&format!("suspend --noflush --nolockfs {NAME}"));
        dmsetup(&format!("load {NAME} --table \"{}\"", self.table(part)));
        dmsetup(&format!("resume {NAME}"));
    }

    /// Has every access to the part fail.
    #[track_caller]
    fn fail(&self) {
        self.set("error");
    }

    /// Has writes and flushes of the part fail, but not reads.
    #[track_caller]
    fn fail_writes(&self) {
        self.set(&format!("flakey {} {} 0 3600 1 error_writes", self.under, self.start));
    }

    #[track_caller]
    fn repair(&self) {
        self.set(&self.linear());
    }
}

impl Drop for PartlyBad {
    fn drop(&mut self) {
        dmsetup(&format!("remove --retry {NAME}"));
    }
}

/// A host whose image is this device or file.
fn host(dir: &TempDir, name: &str, image: &str) -> Host {
    let mut host = Host::new(dir.path(), name);
    host.image = PathBuf::from(image);
    host
}

fn connect(host: &Host) -> Session {
    Session::open(&Endpoint::Tcp(host.address), Mode::Structured).unwrap()
}

fn write(offset: u64, byte: u8) -> Request {
    Request::write(offset, &[byte; 4096])
}

fn flush() -> Request {
    Request::new(FLUSH, 0, 0)
}

/// Writes to and reads from sound parts before and after the bad one.
#[track_caller]
fn assert_unharmed(session: &mut Session, byte: u8) {
    for offset in [0, BAD - 4096, BAD + BAD_SIZE, SIZE - 4096] {
        session.ok(write(offset, byte));
        assert_eq!(session.read(offset, 4096), [byte; 4096]);
    }
}

/// Fails unless the log names the failed request with this error, and the server answers `status`.
#[track_caller]
fn assert_reported(host: &Host, server: &Server, request: &str) {
    server.wait_for_stderr(request);
    assert_eq!(host.status_of("pid"), server.pid().to_string());
}

#[track_caller]
fn stop(mut server: Server) -> String {
    assert!(server.stop().success(), "{}", server.stderr());
    server.stderr()
}

fn flags(direct: bool) -> &'static [&'static str] {
    if direct { &["--direct"] } else { &[] }
}

/// EIO of a part, on read, write and flush.
fn check_failing_part(sector: u32, direct: bool) {
    let disk = ScsiDisk::new(sector);
    let dir = temp_dir();
    let device = PartlyBad::new(&disk.device(), (BAD, BAD_SIZE));
    let host = host(&dir, "a", DEVICE);
    let server = host.mode("serve").args(flags(direct)).start();
    let (mut victim, mut other) = (connect(&host), connect(&host));
    assert_eq!(victim.size, SIZE);

    device.fail();
    victim.refused(Request::new(READ, BAD, 4096), &[EIO]);
    assert_reported(&host, &server, "read of");
    assert_unharmed(&mut other, 1);
    other.ok(flush());
    // A migration cannot copy it, and leaves it where it is.
    let copy = Host::new(dir.path(), "b");
    sparse_file(&copy.image, SIZE);
    let listening = copy.listen();
    assert_eq!(host.mirror_to(copy.address, &[]), MIRROR_STARTED);
    host.wait_for_status("is_mirroring", "false");
    let why = host.status_of("migration_failed");
    assert!(why.contains("cannot%20read%20/dev/mapper/bad%20at%20byte"), "{why}");
    assert_unharmed(&mut other, 2);
    drop(listening);
    device.repair();
    assert_eq!(victim.read(BAD, 4096), [0; 4096]);

    // With the page cache only the flush finds out.
    device.fail_writes();
    if direct {
        victim.refused(write(BAD, 3), &[EIO]);
        victim.refused(Request::new(WRITE_ZEROES, BAD, 4096).flags(NO_HOLE), &[EIO]);
        assert_reported(&host, &server, "Write");
    } else {
        victim.ok(write(BAD, 3));
    }
    assert_unharmed(&mut other, 3);
    victim.refused(flush(), &[EIO]);
    assert_reported(&host, &server, "Flush");
    device.repair();
    for session in [&mut victim, &mut other] {
        session.refused(flush(), &[EIO]);
        session.refused(write(0, 4).flags(FUA), &[EIO]);
        assert_unharmed(session, 5);
    }
    assert_ne!(host.status_of("flush_failed"), "");
    drop((victim, other));
    stop(server);

    let server = host.mode("serve").args(flags(direct)).start();
    server.wait_for_stderr("so that data may be lost");
    let mut session = connect(&host);
    session.ok(write(BAD, 6));
    session.ok(flush());
    assert_eq!(session.read(BAD, 4096), [6; 4096]);
    drop(session);
    stop(server);
}

#[test]
fn errors_of_a_part_reach_only_its_clients() {
    with_modules(MODULES, || {
        for (sector, direct) in [(512, false), (512, true), (4096, true)] {
            check_failing_part(sector, direct);
        }
    });
}

/// Where the kernel has failed to write a page back, it keeps the page as if it had: a process that knows
/// of the failure must not answer from it.
#[test]
fn a_restart_after_a_failed_flush_reads_the_disk() {
    with_modules(MODULES, || {
        let dir = temp_dir();
        let file = dir.path().join("file");
        sparse_file(&file, 2 * SIZE);
        let under = attach_loop(&file.display().to_string());
        ok(&format!("mkfs.ext4 -q -b 4096 {under} && mount {under} /mnt"));
        fs::write("/mnt/image", vec![1; MIB as usize]).unwrap();
        ok("sync; umount /mnt");
        let place = ok(&format!("debugfs -R 'bmap /image 128' {under} 2>/dev/null"));
        let block: u64 = place.trim().parse().unwrap();
        let device = PartlyBad::new(&under, (block * 4096, 4096));
        ok(&format!("mount {DEVICE} /mnt"));
        let host = host(&dir, "a", "/mnt/image");
        let server = host.serve();
        let mut session = connect(&host);
        let offset = 128 * 4096;
        assert_eq!(session.read(offset, 4096), [1; 4096]);

        device.fail_writes();
        session.ok(write(offset, 2));
        session.refused(flush(), &[EIO]);
        device.repair();
        assert_eq!(session.read(offset, 4096), [2; 4096], "the kernel keeps the page");
        drop(session);
        stop(server);

        let server = host.serve();
        let mut session = connect(&host);
        assert_eq!(session.read(offset, 4096), [1; 4096], "a read is answered from a lost page");
        session.ok(flush());
        drop(session);
        stop(server);
        ok("umount /mnt");
    });
}

/// Accesses to the suspended part wait, those to the others do not. A slow disk is no bad disk.
fn check_hanging_part(direct: bool) {
    let disk = ScsiDisk::new(512);
    let dir = temp_dir();
    let sectors = SIZE / 512;
    dmsetup(&format!("create hung --table '0 {sectors} linear {} 0'", disk.device()));
    let device = PartlyBad::new(&disk.device(), (BAD, BAD_SIZE));
    device.set(&format!("linear /dev/mapper/hung {}", BAD / 512));
    let host = host(&dir, "a", DEVICE);
    let server = host.mode("serve").args(flags(direct)).start();
    let (mut victim, mut other) = (connect(&host), connect(&host));
    dmsetup("suspend --noflush --nolockfs hung");
    let hanging = Request::new(READ, BAD, 4096);
    let pending = HashMap::from([(victim.send(&hanging), hanging)]);
    assert_unharmed(&mut other, 1);
    assert_eq!(host.status_of("num_clients"), "2");
    dmsetup("resume hung");
    assert_eq!(victim.recv_reply(&pending).1.error, 0);

    device.set(&format!("delay {} {} 20", disk.device(), BAD / 512));
    victim.ok(write(BAD, 2).flags(FUA));
    victim.ok(flush());
    assert_unharmed(&mut other, 3);
    drop((victim, other));
    stop(server);
    drop(device);
    dmsetup("remove --retry hung");
}

fn check_vanishing_disk(direct: bool) {
    let disk = ScsiDisk::new(512);
    let dir = temp_dir();
    let host = host(&dir, "a", &disk.device());
    let server = host.mode("serve").args(flags(direct)).start();
    let (mut victim, mut other) = (connect(&host), connect(&host));
    victim.ok(write(0, 1));
    victim.ok(flush());
    disk.delete();
    for session in [&mut victim, &mut other] {
        let reply = session.ask(Request::new(READ, BAD, 4096));
        assert_eq!(reply.error, EIO);
        let reply = session.ask(write(BAD, 2).flags(FUA));
        assert_eq!(reply.error, EIO);
        let reply = session.ask(flush());
        assert_eq!(reply.error, EIO);
    }
    assert_reported(&host, &server, "Flush");
    let copy = Host::new(dir.path(), "b");
    let reply = host.mirror_to(copy.address, &[]);
    assert!(reply.contains("failed"), "{reply}");
    drop((victim, other));
    stop(server);
}

/// A device that grows keeps the size that its clients know.
fn check_growing_device() {
    let disk = ScsiDisk::new(512);
    let dir = temp_dir();
    let (size, linear) = (BAD / 512, format!("linear {} 0", disk.device()));
    dmsetup(&format!("create {NAME} --table '0 {size} {linear}'"));
    let host = host(&dir, "a", DEVICE);
    let server = host.serve();
    let mut session = connect(&host);
    dmsetup(&format!("suspend {NAME}"));
    dmsetup(&format!("load {NAME} --table '0 {} {linear}'", 2 * size));
    dmsetup(&format!("resume {NAME}"));
    session.ok(write(BAD - 4096, 1).flags(FUA));
    session.refused(Request::new(READ, BAD, 4096), &[EINVAL]);
    session.refused(write(BAD, 2), &[ENOSPC]);
    assert_eq!(connect(&host).size, BAD);
    drop(session);
    stop(server);
    let server = host.serve();
    assert_eq!(connect(&host).size, 2 * BAD);
    stop(server);
    dmsetup(&format!("remove --retry {NAME}"));
}

#[test]
fn disks_that_hang_vanish_or_grow_are_survived() {
    with_modules(MODULES, || {
        for direct in [false, true] {
            check_hanging_part(direct);
            check_vanishing_disk(direct);
        }
        check_growing_device();
    });
}
