//! What happens in one schedule: where the images lie, which faults come when, for how long.
//! Pure: the same seed gives the same plan. Carrying it out is for `schedule.rs`.

use fastrand::Rng;
use harness::clients::Role;
use std::time::Duration;

/// Errors that a medium gives when it has no room, no quota left, is broken, or cannot do it.
pub(crate) const ENOSPC: i32 = 28;
pub(crate) const EDQUOT: i32 = 122;
pub(crate) const EIO: i32 = 5;
pub(crate) const EOPNOTSUPP: i32 = 95;

/// As long as an undisturbed migration takes, roughly, in milliseconds.
const MIGRATION_MS: u64 = 1500;
/// Something happens within so many milliseconds after a record was written.
const SOON_MS: u64 = 60;
/// Longest time that a fault lasts, in milliseconds. Longer than any [`Plan::patience`].
const FAULT_MS_MAX: u64 = 4000;
/// A quarter of the first faults that [`Plan::new`] chooses from go by the seed, so that any so
/// many plans in a row have every one.
pub(crate) const KINDS: u64 = 16;

/// Where an image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Medium {
    /// The file system of large temporary files.
    Disk,
    /// A tmpfs.
    Memory,
    /// An ext4 without a free block, whose inodes have so many bytes.
    FullExt4 { inode_bytes: u32 },
}

/// One host as the schedule finds it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) medium: Medium,
    /// Whether the directory for records that do not fit beside the image can be made.
    pub(crate) has_state_directory: bool,
    pub(crate) has_io_uring: bool,
}

/// A kind of system call, as `faults.c` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// An extended attribute is set or removed.
    Set,
    /// An extended attribute is read.
    Get,
    /// A file is made or renamed.
    Name,
    /// A record is written to a file.
    Write,
    /// `fsync(2)`, `fdatasync(2)`.
    Sync,
    /// `fallocate(2)`.
    Zero,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) call: Call,
    /// Zero: it is carried out, after the delay.
    pub(crate) errno: i32,
    pub(crate) delay_ms: u64,
    /// Attributes of so many bytes still fit.
    pub(crate) fits_bytes: u64,
}

/// When something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Before the processes are started.
    Before,
    /// So long after the operator begins to order the migration.
    After(Duration),
    /// So long after the record of that host has this word.
    Record(Role, &'static str, Duration),
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// SIGKILL.
    Kill(Role),
    /// Both at once.
    KillBoth,
    /// The signal that asks for an end, as the service manager sends it.
    Terminate(Role),
    /// SIGSTOP, and SIGCONT after this time.
    Freeze(Role, Duration),
    /// Nothing gets through the link any more; it works again after this time, for new connections.
    Cut(Duration),
    /// The link holds everything back, and delivers it after this time.
    Silence(Duration),
    /// Every connection over the link is reset.
    Reset,
    /// The operator breaks the migration off, to order it again soon.
    CallOff,
    /// System calls fail or wait, for this time.
    Break(Role, Vec<Fault>, Duration),
}

/// Something that happens at some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) moment: Moment,
    pub(crate) deed: Deed,
}

/// One migration, and what happens to it.
#[derive(Clone, Debug)]
pub(crate) struct Leg {
    pub(crate) events: Vec<Event>,
    pub(crate) unlink: bool,
}

/// One schedule.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) source: Setting,
    pub(crate) destination: Setting,
    /// Seconds without progress after which a connection is given up.
    pub(crate) patience: u64,
    /// The second one goes back to where the disk came from.
    pub(crate) legs: Vec<Leg>,
}

impl Plan {
    /// The plan of this seed.
    pub(crate) fn new(seed: u64) -> Plan {
        let mut random = Rng::with_seed(seed);
        let (source, destination) = (Setting::new(&mut random), Setting::new(&mut random));
        let patience = 1 + random.u64(..2);
        let count = if random.u64(..4) == 0 { 2 } else { 1 };
        let legs = (0..count).map(|leg| Leg::new(&mut random, seed + leg)).collect();
        let mut plan = Plan { seed, source, destination, patience, legs };
        plan.choose_media(&mut random);
        plan.show_slow_calls();
        plan
    }

    /// What io_uring does is not seen by [`Call::Zero`].
    fn show_slow_calls(&mut self) {
        let events = self.legs.iter().flat_map(|leg| &leg.events);
        let is_slow_zero = |event: &Event| match &event.deed {
            Deed::Break(_, faults, _) => faults.iter().any(|fault| fault.call == Call::Zero),
            _ => false,
        };
        if events.into_iter().any(is_slow_zero) {
            self.source.has_io_uring = false;
            self.destination.has_io_uring = false;
        }
    }

    /// File systems that are full take time to make, so that few plans have them.
    fn choose_media(&mut self, random: &mut Rng) {
        let inode_bytes = if self.seed.is_multiple_of(2 * FULL_EVERY) { 128 } else { 256 };
        if self.seed.is_multiple_of(FULL_EVERY) {
            let setting =
                if random.u64(..3) == 0 { &mut self.destination } else { &mut self.source };
            setting.medium = Medium::FullExt4 { inode_bytes };
        }
    }

    /// Whether something happens while a record is there that is there for a moment only.
    pub(crate) fn waits_for_departing(&self) -> bool {
        let mut events = self.legs.iter().flat_map(|leg| &leg.events);
        events.any(|event| matches!(event.moment, Moment::Record(_, "departing", _)))
    }

    pub(crate) fn setting(&self, role: Role) -> Setting {
        match role {
            Role::Source => self.source,
            Role::Destination => self.destination,
        }
    }
}

/// Every so many seeds an image lies on a full file system.
const FULL_EVERY: u64 = 6;

impl Setting {
    fn new(random: &mut Rng) -> Setting {
        Setting {
            medium: if random.u64(..2) == 0 { Medium::Disk } else { Medium::Memory },
            has_state_directory: random.u64(..4) != 0,
            has_io_uring: random.u64(..3) != 0,
        }
    }
}

impl Leg {
    fn new(random: &mut Rng, kind: u64) -> Leg {
        let mut events = vec![Event::of_kind(random, kind % KINDS)];
        for _ in 0..random.u64(..4) {
            let kind = random.u64(..KINDS);
            events.push(Event::of_kind(random, kind));
        }
        Leg { events, unlink: random.u64(..4) == 0 }
    }
}

impl Event {
    fn of_kind(random: &mut Rng, kind: u64) -> Event {
        let role = if random.u64(..2) == 0 { Role::Source } else { Role::Destination };
        let deed = match kind {
            0 => Deed::Kill(Role::Source),
            1 => Deed::Kill(Role::Destination),
            2 => Deed::KillBoth,
            3 => Deed::Terminate(role),
            4 => Deed::Freeze(Role::Source, some_time(random)),
            5 => Deed::Freeze(Role::Destination, some_time(random)),
            6 => Deed::Cut(some_time(random)),
            7 => Deed::Silence(some_time(random)),
            8 if random.u64(..2) == 0 => Deed::Reset,
            8 => Deed::CallOff,
            9 | 10 => return Event::unable_to_record(random, role),
            11 => return Event::unable_to_record(random, Role::Source),
            12 => return Event::broken(random, role, Call::Sync, EIO),
            13 => return Event::broken(random, role, Call::Get, EIO),
            14 => {
                let delay_ms = 500 + random.u64(..FAULT_MS_MAX);
                let slow = Fault { call: Call::Sync, errno: 0, delay_ms, fits_bytes: 0 };
                Deed::Break(role, vec![slow], some_time(random))
            }
            _ => {
                let delay_ms = 100 + random.u64(..FAULT_MS_MAX / 2);
                let slow = Fault { call: Call::Zero, errno: 0, delay_ms, fits_bytes: 0 };
                Deed::Break(Role::Source, vec![slow], some_time(random))
            }
        };
        Event { moment: Moment::new(random), deed }
    }

    /// A record that fits nowhere, or a large one that does not where a small one does.
    fn unable_to_record(random: &mut Rng, role: Role) -> Event {
        let errno = [ENOSPC, EDQUOT, EIO, EOPNOTSUPP][random.u64(..4) as usize];
        let fits_bytes = [0, 60][random.u64(..2) as usize];
        let mut faults = vec![Fault { call: Call::Set, errno, delay_ms: 0, fits_bytes }];
        if random.u64(..2) == 0 {
            let call = if random.u64(..2) == 0 { Call::Name } else { Call::Write };
            let errno = if errno == EOPNOTSUPP { ENOSPC } else { errno };
            faults.push(Fault { call, errno, delay_ms: 0, fits_bytes: 0 });
        }
        let moment = if random.u64(..2) == 0 { Moment::Before } else { Moment::new(random) };
        Event { moment, deed: Deed::Break(role, faults, some_time(random)) }
    }

    fn broken(random: &mut Rng, role: Role, call: Call, errno: i32) -> Event {
        let faults = vec![Fault { call, errno, delay_ms: 0, fits_bytes: 0 }];
        let moment = Moment::new(random);
        Event { moment, deed: Deed::Break(role, faults, some_time(random)) }
    }
}

impl Moment {
    fn new(random: &mut Rng) -> Moment {
        let soon = Duration::from_millis(random.u64(..SOON_MS));
        match random.u64(..8) {
            0..4 => Moment::After(Duration::from_millis(random.u64(..MIGRATION_MS))),
            4 => Moment::Record(Role::Destination, "incoming", soon),
            5 => Moment::Record(Role::Source, "departing", soon),
            6 => Moment::Record(Role::Destination, "ours", soon),
            _ => Moment::Record(Role::Source, "departed", soon),
        }
    }
}

fn some_time(random: &mut Rng) -> Duration {
    Duration::from_millis(50 + random.u64(..FAULT_MS_MAX))
}

#[test]
fn a_seed_always_gives_the_same_plan() {
    for seed in 0..100 {
        assert_eq!(format!("{:?}", Plan::new(seed)), format!("{:?}", Plan::new(seed)));
    }
}

#[test]
fn consecutive_seeds_have_every_kind_of_fault() {
    for first in [1, 100] {
        let plans: Vec<Plan> = (first..first + KINDS).map(Plan::new).collect();
        let events = || plans.iter().flat_map(|plan| &plan.legs).flat_map(|leg| &leg.events);
        let has = |wanted: fn(&Deed) -> bool| events().any(|event| wanted(&event.deed));
        assert!(has(|deed| matches!(deed, Deed::Kill(Role::Source))));
        assert!(has(|deed| matches!(deed, Deed::Kill(Role::Destination))));
        assert!(has(|deed| matches!(deed, Deed::KillBoth)));
        assert!(has(|deed| matches!(deed, Deed::Terminate(_))));
        assert!(has(|deed| matches!(deed, Deed::Freeze(Role::Source, _))));
        assert!(has(|deed| matches!(deed, Deed::Freeze(Role::Destination, _))));
        assert!(has(|deed| matches!(deed, Deed::Cut(_))));
        assert!(has(|deed| matches!(deed, Deed::Silence(_))));
        assert!(has(|deed| matches!(deed, Deed::Reset | Deed::CallOff)));
        for call in [Call::Set, Call::Get, Call::Sync, Call::Zero] {
            let fails = |event: &Event| matches!(&event.deed, Deed::Break(_, faults, _) if faults.iter().any(|fault| fault.call == call));
            assert!(events().any(fails), "{call:?} from {first}");
        }
        assert!(plans.iter().any(|plan| plan.legs.len() == 2));
        assert!(plans.iter().any(|plan| matches!(plan.source.medium, Medium::FullExt4 { .. })));
    }
}
