//! A device-mapper device that logs every write (dm-log-writes), and the replay of its log.
//! Exists to show what a disk holds if its host loses power at any flush: the kernel appends a write to
//! the log once a later flush covers it, or at once if it carries FUA.
//!
//! The format is that of `struct log_write_super` and `struct log_write_entry` of the kernel's
//! `drivers/md/dm-log-writes.c`; see `Documentation/admin-guide/device-mapper/log-writes.rst`.

use crate::machine::ok;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// The device that logs.
pub(crate) const LOGGED: &str = "/dev/mapper/logged";

/// The first word of a log.
const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
/// Bits of an entry's flags.
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Length of an entry's header, which the text of a mark follows, in bytes.
const HEADER: usize = 32;

/// Runs dmsetup, which must not wait for udev: the machine has none.
#[track_caller]
pub(crate) fn dmsetup(words: &str) -> String {
    ok(&format!("DM_DISABLE_UDEV=1 dmsetup {words}"))
}

/// Attaches a loop device with these arguments of losetup; returns its path.
#[track_caller]
pub(crate) fn attach_loop(words: &str) -> String {
    ok(&format!("losetup --find --show {words}")).trim().to_owned()
}

/// The device at [`LOGGED`], and its log in a file.
pub(crate) struct LogWrites {
    log: PathBuf,
    loops: [String; 2],
}

impl LogWrites {
    /// Logs all writes to `file` from now on, in a new file `log` of at most `log_bytes`.
    #[track_caller]
    pub(crate) fn start(file: &Path, log: PathBuf, log_bytes: u64) -> LogWrites {
        harness::sparse_file(&log, log_bytes);
        let loops = [file, &log].map(|file| attach_loop(&file.display().to_string()));
        let sectors = std::fs::metadata(file).unwrap().len() / 512;
        dmsetup(&format!("create logged --table '0 {sectors} log-writes {}'", loops.join(" ")));
        LogWrites { log, loops }
    }

    /// Removes the device, which completes the log, and reads it.
    #[track_caller]
    pub(crate) fn finish(self) -> Log {
        dmsetup("remove logged");
        for device in &self.loops {
            ok(&format!("losetup --detach {device}"));
        }
        Log::read(File::open(&self.log).unwrap())
    }
}

/// Appends a mark to the log, behind all writes that are durable now.
#[track_caller]
pub(crate) fn mark(name: &str) {
    dmsetup(&format!("message logged 0 mark {name}"));
}

/// One entry of a log.
#[derive(Debug)]
pub(crate) struct Entry {
    flags: u64,
    /// Place of the change on the device, in bytes.
    pub(crate) to: u64,
    /// Its length in bytes.
    pub(crate) length: u64,
    /// Place of its data in the log, in bytes.
    from: u64,
    /// The text of a mark; empty otherwise.
    pub(crate) mark: String,
}

impl Entry {
    /// Whether the device has acknowledged a FLUSH or a write with FUA here.
    pub(crate) fn is_flush_or_fua(&self) -> bool {
        self.flags & (FLUSH | FUA) != 0
    }

    /// Whether it is a mark, which changes nothing.
    pub(crate) fn is_mark(&self) -> bool {
        self.flags & MARK != 0
    }
}

/// All writes to a device, each behind the writes that were durable before it.
pub(crate) struct Log {
    file: File,
    pub(crate) entries: Vec<Entry>,
}

impl Log {
    #[track_caller]
    fn read(file: File) -> Log {
        let word = |at: u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        assert_eq!((word(0), word(8)), (MAGIC, VERSION), "a log of this version");
        let (count, sector) = (word(16), word(24) & 0xffff_ffff);
        let mut at = sector;
        let mut entries = Vec::new();
        for _ in 0..count {
            let [to, sectors, flags, data_length] = [0, 8, 16, 24].map(|field| word(at + field));
            let mut mark = Vec::new();
            if flags & MARK != 0 {
                mark.resize(data_length as usize, 0);
                file.read_exact_at(&mut mark, at + HEADER as u64).unwrap();
            }
            let mark = String::from_utf8(mark).unwrap();
            let from = at + sector;
            let length = sectors * sector;
            at = if flags & DISCARD == 0 { from + length } else { from };
            entries.push(Entry { flags, to: to * sector, length, from, mark });
        }
        Log { file, entries }
    }

    /// Executes an entry on a copy of the device.
    #[track_caller]
    pub(crate) fn replay(&self, entry: &Entry, copy: &File) {
        let mut data = vec![0; entry.length as usize];
        if entry.flags & DISCARD == 0 {
            self.file.read_exact_at(&mut data, entry.from).unwrap();
        }
        copy.write_all_at(&data, entry.to).unwrap();
    }
}
