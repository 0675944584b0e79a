//! Power cuts at every kind of moment: two hosts with their images on ext4 and XFS, clients that write,
//! zero, trim and flush, and two migrations between them. The writes of both file systems are
//! logged in one order; the log is replayed to a flush, FUA write or promise, and the file systems are mounted as
//! after a power cut at that moment.
//!
//! Then every change that a FUA or FLUSH had made durable must be there, and the ownership records must
//! be those of one step of flexnbd-migration(7), never of an earlier step than before.

use crate::crash_load::{History, Load, Promise, SLOT, SLOTS};
use crate::log_writes::{self, Entry, LOGGED, Log, LogWrites, attach_loop, dmsetup};
use crate::machine::ok;
use crate::session::with_kernel;
use harness::host::{Host, MIRROR_STARTED};
use harness::nested::report;
use harness::{Endpoint, MIB, TempDir, sparse_file, temp_dir, wait_until};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, mount, umount};
use nix::unistd::{Whence, lseek};
use std::collections::HashSet;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Size of a disk.
const SIZE: u64 = SLOTS as u64 * SLOT;
/// Size of the file systems; XFS demands so much.
const EXT4: u64 = 32 * MIB;
const XFS: u64 = 320 * MIB;
/// Bytes of the log at most.
const LOG: u64 = 192 * MIB;
/// Promises to wait for before each migration.
const PROMISES: usize = 20;
/// Moments to check in each phase, and at the end of a move.
const OTHERS: usize = 6;
const LAST: usize = 10;

/// The steps of both migrations, from flexnbd-migration(7): the records of the two hosts after each.
const STEPS: [[&str; 2]; 9] = [
    ["", ""],
    ["", "incoming"],
    ["departing", "incoming"],
    ["departing", "ours"],
    ["departed", "ours"],
    ["incoming", "ours"],
    ["incoming", "departing"],
    ["ours", "departing"],
    ["ours", "departed"],
];

/// The marks that begin a phase: clients write; the disk moves as well; neither.
const WRITING: &str = "writing";
const MOVING: &str = "moving";
const RESTING: &str = "resting";

/// The devices of the two file systems, and their parts of the file that stores both.
const PARTS: [Part; 2] = [
    Part { name: "a", kind: "ext4", offset: 0, length: EXT4 },
    Part { name: "b", kind: "xfs", offset: EXT4, length: XFS },
];

struct Part {
    name: &'static str,
    /// The type of the file system.
    kind: &'static str,
    offset: u64,
    length: u64,
}

impl Part {
    fn directory(&self) -> PathBuf {
        Path::new("/mnt").join(self.name)
    }

    /// Attaches a loop device to this part of the file; returns its path.
    #[track_caller]
    fn attach(&self, file: &Path) -> String {
        let place = format!("--offset {} --sizelimit {}", self.offset, self.length);
        attach_loop(&format!("{place} {}", file.display()))
    }

    /// Creates the file system, with an empty image.
    #[track_caller]
    fn create(&self, file: &Path) {
        let device = self.attach(file);
        fs::create_dir_all(self.directory()).unwrap();
        ok(&format!("mkfs.{} -q {device}", self.kind));
        self.with_mounted(&device, || sparse_file(&self.host().image, SIZE));
        ok(&format!("losetup --detach {device}"));
    }

    /// Mounts the file system of a device, calls `look`, and unmounts it.
    #[track_caller]
    fn with_mounted<T>(&self, device: &str, look: impl FnOnce() -> T) -> T {
        let (directory, none) = (self.directory(), None::<&str>);
        mount(Some(device), &directory, Some(self.kind), MsFlags::empty(), none).unwrap();
        let seen = look();
        umount(&directory).unwrap();
        seen
    }

    /// Whether the entry changes this part.
    fn has(&self, entry: &Entry) -> bool {
        (self.offset..self.offset + self.length).contains(&entry.to) && entry.length > 0
    }

    fn host(&self) -> Host {
        Host::new(&self.directory(), self.name)
    }
}

/// The promises about the disk of one host.
struct Promised {
    /// Numbers of the promises that hold while the disk is this host's.
    durable: Range<usize>,
    /// What the disk must have once it has arrived here.
    arrived: Promise,
}

/// Clients write at `from`, which is a phase of the log; then, which is another, the disk moves to `to`. Returns the changes that were acknowledged.
#[track_caller]
fn write_and_move(
    (from, to): (&Host, &Host),
    history: &Arc<Mutex<History>>,
    flags: &[&str],
) -> Promise {
    log_writes::mark(WRITING);
    let mut source = from.mode("serve").args(flags).start();
    let before = history.lock().unwrap().promises.len();
    let load = Load::start(&Endpoint::Tcp(from.address), history);
    let goal = before + PROMISES;
    wait_until("promises", || history.lock().unwrap().promises.len() >= goal);
    let mut destination = to.listen();
    log_writes::mark(MOVING);
    assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
    assert!(destination.wait_for_end().success(), "{}", destination.stderr());
    assert!(source.wait_for_end().success(), "{}", source.stderr());
    load.wait_for_end();
    log_writes::mark(RESTING);
    history.lock().unwrap().acknowledged()
}

/// What a host has after a power cut.
struct Survivor {
    record: String,
    /// The word that fills each slot.
    words: Vec<u64>,
}

impl Survivor {
    /// Looks at the mounted file system of a host.
    #[track_caller]
    fn see(host: &Host) -> Survivor {
        let bytes = fs::read(&host.image).unwrap();
        assert_eq!(bytes.len() as u64, SIZE);
        let words = bytes.chunks(SLOT as usize).enumerate().map(|(number, slot)| {
            let word = &slot[..8];
            assert!(slot.chunks(8).all(|other| other == word), "slot {number} is torn");
            u64::from_le_bytes(word.try_into().unwrap())
        });
        Survivor { record: host.record(), words: words.collect() }
    }

    #[track_caller]
    fn assert_keeps(&self, promise: &Promise, history: &History, what: &str) {
        for &(slot, version) in promise {
            let word = self.words[slot];
            assert!(
                history.is_kept((slot, version), word),
                "{what}: slot {slot} has {word}, which is older than version {version}"
            );
        }
    }
}

/// The moments to check: some of each phase, and the last ones of a move, which are those of the handover.
/// Each is at a FLUSH or FUA, or at the last promise before the next change of the device.
fn moments(log: &Log) -> Vec<usize> {
    let mut phases = vec![(RESTING, Vec::new())];
    for (number, entry) in log.entries.iter().enumerate() {
        let moments = &mut phases.last_mut().unwrap().1;
        if [WRITING, MOVING, RESTING].contains(&entry.mark.as_str()) {
            phases.push((&entry.mark, Vec::new()));
        } else if entry.is_mark() && moments.last().is_some_and(|last| last + 1 == number) {
            *moments.last_mut().unwrap() = number;
        } else if entry.is_mark() || entry.is_flush_or_fua() {
            moments.push(number);
        }
    }
    let sample = |(phase, all): &(&str, Vec<usize>)| {
        let last = if *phase == MOVING { LAST } else { 0 };
        sample(all, last)
    };
    phases.iter().flat_map(sample).collect()
}

/// The last `last` of them, and [`OTHERS`] of the others, evenly spaced.
fn sample(all: &[usize], last: usize) -> Vec<usize> {
    let (others, last) = all.split_at(all.len().saturating_sub(last));
    let count = others.len().min(OTHERS);
    let others = (0..count).map(|number| others[number * others.len() / count]);
    others.chain(last.iter().copied()).collect()
}

/// A disk that has lost power at ever later moments of a log.
struct Replay<'a> {
    log: &'a Log,
    /// The device after the entries so far, in a file, and its copy in which the file systems recover.
    state: File,
    copy: File,
    /// A loop device for each part of the copy.
    devices: [String; 2],
    /// The number of the next entry.
    next: usize,
    /// The marks so far.
    marks: HashSet<&'a str>,
}

impl<'a> Replay<'a> {
    #[track_caller]
    fn new(log: &'a Log, state: &Path) -> Replay<'a> {
        let copy = state.with_extension("copy");
        sparse_file(&copy, EXT4 + XFS);
        let devices = PARTS.map(|part| part.attach(&copy));
        let [state, copy] =
            [state, &copy].map(|path| File::options().read(true).write(true).open(path).unwrap());
        Replay { log, state, copy, devices, next: 0, marks: HashSet::new() }
    }

    /// Executes the entries up to this one. Returns which parts have changed.
    #[track_caller]
    fn advance_to(&mut self, moment: usize) -> [bool; 2] {
        let entries = &self.log.entries[self.next..=moment];
        self.next = moment + 1;
        for entry in entries {
            self.log.replay(entry, &self.state);
            self.marks.insert(&entry.mark);
        }
        PARTS.map(|part| entries.iter().any(|entry| part.has(entry)))
    }

    /// What a host has after its file system has recovered.
    #[track_caller]
    fn survivor(&self, number: usize, host: &Host) -> Survivor {
        let part = &PARTS[number];
        copy_part(&self.state, &self.copy, part);
        part.with_mounted(&self.devices[number], || Survivor::see(host))
    }
}

/// Makes a part of the copy, which has been mounted, equal to the state.
#[track_caller]
fn copy_part(state: &File, copy: &File, part: &Part) {
    let end = part.offset + part.length;
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(copy, hole, part.offset as i64, part.length as i64).unwrap();
    let seek =
        |from: u64, whence| lseek(state, from as i64, whence).map_or(end, |at| at as u64).min(end);
    let mut from = part.offset;
    loop {
        from = seek(from, Whence::SeekData);
        if from >= end {
            return;
        }
        let to = seek(from, Whence::SeekHole);
        let mut data = vec![0; (to - from) as usize];
        state.read_exact_at(&mut data, from).unwrap();
        copy.write_all_at(&data, from).unwrap();
        from = to;
    }
}

/// A run of both hosts, to be replayed.
struct Run {
    hosts: [Host; 2],
    history: Arc<Mutex<History>>,
    promised: [Promised; 2],
    log: Log,
    /// The device as it was before the log.
    state: PathBuf,
    _dir: TempDir,
}

impl Run {
    /// Moves the disk to the second host and back while clients write, and logs all writes.
    #[track_caller]
    fn record() -> Run {
        let dir = temp_dir();
        let [file, state] = ["file", "state"].map(|name| dir.path().join(name));
        sparse_file(&file, EXT4 + XFS);
        PARTS.iter().for_each(|part| part.create(&file));
        ok(&format!("cp {} {}", file.display(), state.display()));

        let device = LogWrites::start(&file, dir.path().join("log"), LOG);
        for part in &PARTS {
            let table = format!("0 {} linear {LOGGED} {}", part.length / 512, part.offset / 512);
            dmsetup(&format!("create {} --table '{table}'", part.name));
            ok(&format!("mount /dev/mapper/{} {}", part.name, part.directory().display()));
        }
        let hosts = PARTS.map(|part| part.host());
        let [a, b] = &hosts;
        let history = History::new();
        let arrived_at_b = write_and_move((a, b), &history, &[]);
        let first = history.lock().unwrap().promises.len();
        let arrived_at_a = write_and_move((b, a), &history, &["--direct"]);
        let all = history.lock().unwrap().promises.len();
        let promised = [
            Promised { durable: 0..first, arrived: arrived_at_a },
            Promised { durable: first..all, arrived: arrived_at_b },
        ];
        for part in &PARTS {
            ok(&format!("umount {}", part.directory().display()));
            dmsetup(&format!("remove {}", part.name));
        }
        Run { hosts, history, promised, log: device.finish(), state, _dir: dir }
    }

    /// Fails unless the hosts keep the promises. `step` is that of their records.
    #[track_caller]
    fn assert_kept(
        &self,
        survivors: &[Survivor; 2],
        marks: &HashSet<&str>,
        step: usize,
        what: &str,
    ) {
        let history = self.history.lock().unwrap();
        if step == 0 {
            let untouched = survivors[1].words.iter().all(|word| *word == 0);
            assert!(untouched, "{what}: the image has changed before its record");
        }
        for (survivor, promised) in survivors.iter().zip(&self.promised) {
            if survivor.record == "incoming" {
                continue;
            }
            if survivor.record == "ours" {
                survivor.assert_keeps(&promised.arrived, &history, what);
            }
            for number in promised.durable.clone() {
                if marks.contains(number.to_string().as_str()) {
                    survivor.assert_keeps(&history.promises[number], &history, what);
                }
            }
        }
    }
}

#[test]
fn acknowledged_changes_and_records_survive_power_cuts() {
    with_kernel(|| {
        let run = Run::record();
        let (log, hosts) = (&run.log, &run.hosts);
        let moments = moments(log);
        let mut replay = Replay::new(log, &run.state);
        let mut survivors = [0, 1].map(|number| replay.survivor(number, &hosts[number]));
        let (mut step, mut steps) = (0, vec![0]);
        for &moment in &moments {
            let changed = replay.advance_to(moment);
            for number in [0, 1].into_iter().filter(|number| changed[*number]) {
                survivors[number] = replay.survivor(number, &hosts[number]);
            }
            let records = [0, 1].map(|number: usize| survivors[number].record.as_str());
            let what = format!("at entry {moment}, {:?}, records {records:?}", log.entries[moment]);
            let later = STEPS[step..].iter().position(|step| *step == records);
            step += later.unwrap_or_else(|| panic!("{what} after {:?}", STEPS[step]));
            steps.push(step);
            run.assert_kept(&survivors, &replay.marks, step, &what);
        }
        steps.dedup();
        assert_eq!(
            steps,
            (0..STEPS.len()).collect::<Vec<_>>(),
            "every step is durable at a moment"
        );
        let promises = moments.iter().filter(|moment| log.entries[**moment].is_mark()).count();
        report(&format!("{} moments, {promises} of them at promises", moments.len()));
    });
}
