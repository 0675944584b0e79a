//! The kernel's client on several connections: reads, writes, FLUSH, FUA, TRIM and zeroes.

use crate::machine::{KernelLog, ok};
use crate::nbd_device::{DEVICE, NbdDevice};
use crate::session::with_kernel;
use harness::{Builder, MIB, Program, allocated, read_at, sparse_image, temp_dir};
use std::path::Path;

const SIZE: u64 = 64 * MIB;
const CONNECTIONS: u32 = 4;

/// Runs fio on the device, which verifies what it has written.
#[track_caller]
fn write_and_verify(words: &str) {
    let fio = Program::new("fio").words(
        "--name=verify --filename=/dev/nbd0 --size=16m --rw=randwrite --direct=1 \
         --verify=crc32c --verify_fatal=1 --verify_state_save=0",
    );
    fio.words(words).ok();
}

fn check_client(block_size: u32) {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", SIZE);
    let control = dir.path().join("control");
    let server = Builder::serve(&image).args(["--quiet", "--sock"]).args([&control]).start();
    let log = KernelLog::from_now();
    let device = NbdDevice::attach(server.endpoint(), CONNECTIONS, block_size);
    assert_eq!(device.attribute("size"), (SIZE / 512).to_string());
    assert_eq!(device.attribute("queue/logical_block_size"), block_size.to_string());
    assert_eq!(device.attribute("queue/write_cache"), "write back", "it will send FLUSH");
    assert_eq!(device.attribute("queue/fua"), "1", "it will send FUA");
    assert_ne!(device.attribute("queue/discard_max_bytes"), "0", "it will send TRIM");
    let status = Program::flexnbd("status --sock").args([&control]).ok();
    assert!(status.contains(&format!("num_clients={CONNECTIONS} ")), "{status}");

    write_and_verify(&format!(
        "--ioengine=libaio --iodepth=32 --bsrange={block_size}-64k --bs_unaligned=0 --fsync=32"
    ));
    write_and_verify("--ioengine=psync --bs=4k --sync=dsync --io_size=1m");
    check_trim_and_zeroes(&image);
    device.detach();
    log.assert_no_error();
    assert_eq!(server.stderr(), "", "no warnings");
}

/// Trims and zeroes parts of a range full of ones, and reads the image.
#[track_caller]
fn check_trim_and_zeroes(image: &Path) {
    let start = 32 * MIB;
    ok(&format!(
        "head -c 4194304 /dev/zero | tr '\\0' '\\1' | dd of={DEVICE} bs=1M seek=32 conv=fsync iflag=fullblock"
    ));
    let before = allocated(image);
    ok(&format!("blkdiscard --offset 32M --length 1M {DEVICE}"));
    assert_eq!(allocated(image), before - MIB, "the trimmed range is a hole");
    ok(&format!("blkdiscard --zeroout --offset 34M --length 1M {DEVICE}"));
    let megabyte = |value: u8| vec![value; MIB as usize];
    for (number, value) in (0..).zip([0, 1, 0, 1]) {
        let found = read_at(image, start + number * MIB, MIB as usize);
        assert!(found == megabyte(value), "MiB {number} has other bytes than {value}");
    }
}

#[test]
fn requests_of_four_connections_are_executed() {
    with_kernel(|| {
        for block_size in [512, 4096] {
            check_client(block_size);
        }
    });
}
