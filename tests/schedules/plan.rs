//! The plan of one schedule: the storage of the images, and the faults with their triggers and
//! durations. Pure: the same seed gives the same plan. `execution.rs` executes it.

use fastrand::Rng;
use harness::clients::Role;
use std::time::Duration;

/// The errors of storage: no space, no quota, an I/O error, an unsupported operation.
pub(crate) const ENOSPC: i32 = 28;
pub(crate) const EDQUOT: i32 = 122;
pub(crate) const EIO: i32 = 5;
pub(crate) const EOPNOTSUPP: i32 = 95;

/// The approximate duration of a migration without faults, in milliseconds.
const MIGRATION_MS: u64 = 1500;
/// The longest delay between a record and the action that it triggers, in milliseconds.
const RECORD_DELAY_MS_MAX: u64 = 60;
/// The longest fault, in milliseconds; longer than any [`Plan::request_timeout_secs`].
const FAULT_MS_MAX: u64 = 4000;
/// The number of kinds of events. The seed selects the kind of a plan's first event, so that this
/// many consecutive seeds have every kind.
pub(crate) const EVENT_KINDS: u64 = 16;

/// The kind of file system that holds an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StorageKind {
    /// The file system of large temporary files.
    Disk,
    /// A tmpfs.
    Tmpfs,
    /// An ext4 without a free block. In inodes of 256 bytes a small extended attribute still fits.
    FullExt4 { inode_bytes: u32 },
}

/// The configuration of one host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostConfig {
    pub(crate) storage: StorageKind,
    /// Whether the directory can be created that holds records which do not fit into extended
    /// attributes of the image.
    pub(crate) has_state_directory: bool,
    pub(crate) has_io_uring: bool,
}

/// A class of system calls of `faults.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Setting or removing an extended attribute.
    SetXattr,
    /// Reading an extended attribute.
    GetXattr,
    /// Creating, linking or renaming a file.
    CreateOrRename,
    /// Writing a record to a file.
    WriteRecord,
    /// `fsync(2)`, `fdatasync(2)`.
    Sync,
    /// `fallocate(2)`.
    Fallocate,
}

/// A fault of one class of calls: a delay, then an error or normal execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) call: Call,
    /// The error; 0 executes the call.
    pub(crate) errno: i32,
    pub(crate) delay_ms: u64,
    /// Extended attributes up to this size can be set without the fault.
    pub(crate) bytes_allowed_max: u64,
}

/// The condition that starts an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// Before the processes start.
    BeforeStart,
    /// This long after the operator begins to start the migration.
    After(Duration),
    /// This long after the record of this host has reached this state.
    Record(Role, &'static str, Duration),
}

/// A fault or an intervention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// SIGKILL.
    Kill(Role),
    /// SIGKILL to both processes.
    KillBoth,
    /// The signal by which the service manager stops the process.
    Terminate(Role),
    /// SIGSTOP, and SIGCONT after this time.
    Freeze(Role, Duration),
    /// The link drops everything; after this time it accepts new connections again.
    CutLink(Duration),
    /// The link delays everything by up to this time, and loses nothing.
    StallLink(Duration),
    /// Resets every connection over the link.
    ResetConnections,
    /// The operator aborts the migration and soon starts it again.
    AbortMigration,
    /// System calls fail or are delayed, for this time.
    InjectFaults(Role, Vec<Fault>, Duration),
}

/// An action and its trigger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) trigger: Trigger,
    pub(crate) action: Action,
}

/// The plan of one migration.
#[derive(Clone, Debug)]
pub(crate) struct MigrationPlan {
    pub(crate) events: Vec<Event>,
    pub(crate) unlink: bool,
}

/// The plan of one schedule.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) source: HostConfig,
    pub(crate) destination: HostConfig,
    /// `FLEXNBD_MS_REQUEST_LIMIT_SECS`: a connection without progress for this long is closed.
    pub(crate) request_timeout_secs: u64,
    /// One migration, or two; the second moves the disk back.
    pub(crate) migrations: Vec<MigrationPlan>,
}

impl Plan {
    /// The plan of a seed.
    pub(crate) fn new(seed: u64) -> Plan {
        let mut random = Rng::with_seed(seed);
        let (source, destination) = (HostConfig::new(&mut random), HostConfig::new(&mut random));
        let request_timeout_secs = 1 + random.u64(..2);
        let count = if random.u64(..4) == 0 { 2 } else { 1 };
        let migrations =
            (0..count).map(|number| MigrationPlan::new(&mut random, seed + number)).collect();
        let mut plan = Plan { seed, source, destination, request_timeout_secs, migrations };
        plan.choose_full_file_system(&mut random);
        plan.disable_io_uring_for_fallocate_faults();
        plan
    }

    /// seccomp(2) sees no operation of io_uring, so [`Call::Fallocate`] needs its absence.
    fn disable_io_uring_for_fallocate_faults(&mut self) {
        let events = self.migrations.iter().flat_map(|migration| &migration.events);
        let has_fallocate_fault = |event: &Event| match &event.action {
            Action::InjectFaults(_, faults, _) => {
                faults.iter().any(|fault| fault.call == Call::Fallocate)
            }
            _ => false,
        };
        if events.into_iter().any(has_fallocate_fault) {
            self.source.has_io_uring = false;
            self.destination.has_io_uring = false;
        }
    }

    /// Puts one image on a full file system, in few plans only, because its creation takes time.
    fn choose_full_file_system(&mut self, random: &mut Rng) {
        let inode_bytes =
            if self.seed.is_multiple_of(2 * FULL_FILE_SYSTEM_INTERVAL) { 128 } else { 256 };
        if self.seed.is_multiple_of(FULL_FILE_SYSTEM_INTERVAL) {
            let config =
                if random.u64(..3) == 0 { &mut self.destination } else { &mut self.source };
            config.storage = StorageKind::FullExt4 { inode_bytes };
        }
    }

    /// Whether an event waits for the record *departing*, which exists only briefly.
    pub(crate) fn triggers_on_departing(&self) -> bool {
        let mut events = self.migrations.iter().flat_map(|migration| &migration.events);
        events.any(|event| matches!(event.trigger, Trigger::Record(_, "departing", _)))
    }

    pub(crate) fn host_config(&self, role: Role) -> HostConfig {
        match role {
            Role::Source => self.source,
            Role::Destination => self.destination,
        }
    }
}

/// One in this many consecutive seeds has an image on a full file system.
const FULL_FILE_SYSTEM_INTERVAL: u64 = 6;

impl HostConfig {
    fn new(random: &mut Rng) -> HostConfig {
        HostConfig {
            storage: if random.u64(..2) == 0 { StorageKind::Disk } else { StorageKind::Tmpfs },
            has_state_directory: random.u64(..4) != 0,
            has_io_uring: random.u64(..3) != 0,
        }
    }
}

impl MigrationPlan {
    fn new(random: &mut Rng, kind: u64) -> MigrationPlan {
        let mut events = vec![Event::of_kind(random, kind % EVENT_KINDS)];
        for _ in 0..random.u64(..4) {
            let kind = random.u64(..EVENT_KINDS);
            events.push(Event::of_kind(random, kind));
        }
        MigrationPlan { events, unlink: random.u64(..4) == 0 }
    }
}

impl Event {
    fn of_kind(random: &mut Rng, kind: u64) -> Event {
        let role = if random.u64(..2) == 0 { Role::Source } else { Role::Destination };
        let action = match kind {
            0 => Action::Kill(Role::Source),
            1 => Action::Kill(Role::Destination),
            2 => Action::KillBoth,
            3 => Action::Terminate(role),
            4 => Action::Freeze(Role::Source, random_duration(random)),
            5 => Action::Freeze(Role::Destination, random_duration(random)),
            6 => Action::CutLink(random_duration(random)),
            7 => Action::StallLink(random_duration(random)),
            8 if random.u64(..2) == 0 => Action::ResetConnections,
            8 => Action::AbortMigration,
            9 | 10 => return Event::record_failure(random, role),
            11 => return Event::record_failure(random, Role::Source),
            12 => return Event::call_failure(random, role, Call::Sync, EIO),
            13 => return Event::call_failure(random, role, Call::GetXattr, EIO),
            14 => {
                let delay_ms = 500 + random.u64(..FAULT_MS_MAX);
                let slow = Fault { call: Call::Sync, errno: 0, delay_ms, bytes_allowed_max: 0 };
                Action::InjectFaults(role, vec![slow], random_duration(random))
            }
            _ => {
                let delay_ms = 100 + random.u64(..FAULT_MS_MAX / 2);
                let slow =
                    Fault { call: Call::Fallocate, errno: 0, delay_ms, bytes_allowed_max: 0 };
                Action::InjectFaults(Role::Source, vec![slow], random_duration(random))
            }
        };
        Event { trigger: Trigger::new(random), action }
    }

    /// Setting the extended attribute of a record fails: always, or above 60 bytes. In half of the
    /// cases writing the record to a file fails as well.
    fn record_failure(random: &mut Rng, role: Role) -> Event {
        let errno = [ENOSPC, EDQUOT, EIO, EOPNOTSUPP][random.u64(..4) as usize];
        let bytes_allowed_max = [0, 60][random.u64(..2) as usize];
        let mut faults =
            vec![Fault { call: Call::SetXattr, errno, delay_ms: 0, bytes_allowed_max }];
        if random.u64(..2) == 0 {
            let call = if random.u64(..2) == 0 { Call::CreateOrRename } else { Call::WriteRecord };
            let errno = if errno == EOPNOTSUPP { ENOSPC } else { errno };
            faults.push(Fault { call, errno, delay_ms: 0, bytes_allowed_max: 0 });
        }
        let trigger =
            if random.u64(..2) == 0 { Trigger::BeforeStart } else { Trigger::new(random) };
        Event { trigger, action: Action::InjectFaults(role, faults, random_duration(random)) }
    }

    /// Every call of this class fails.
    fn call_failure(random: &mut Rng, role: Role, call: Call, errno: i32) -> Event {
        let faults = vec![Fault { call, errno, delay_ms: 0, bytes_allowed_max: 0 }];
        let trigger = Trigger::new(random);
        Event { trigger, action: Action::InjectFaults(role, faults, random_duration(random)) }
    }
}

impl Trigger {
    fn new(random: &mut Rng) -> Trigger {
        let delay = Duration::from_millis(random.u64(..RECORD_DELAY_MS_MAX));
        match random.u64(..8) {
            0..4 => Trigger::After(Duration::from_millis(random.u64(..MIGRATION_MS))),
            4 => Trigger::Record(Role::Destination, "incoming", delay),
            5 => Trigger::Record(Role::Source, "departing", delay),
            6 => Trigger::Record(Role::Destination, "ours", delay),
            _ => Trigger::Record(Role::Source, "departed", delay),
        }
    }
}

fn random_duration(random: &mut Rng) -> Duration {
    Duration::from_millis(50 + random.u64(..FAULT_MS_MAX))
}

#[test]
fn equal_seeds_give_equal_plans() {
    for seed in 0..100 {
        assert_eq!(format!("{:?}", Plan::new(seed)), format!("{:?}", Plan::new(seed)));
    }
}

#[test]
fn consecutive_seeds_cover_every_kind_of_fault() {
    for first in [1, 100] {
        let plans: Vec<Plan> = (first..first + EVENT_KINDS).map(Plan::new).collect();
        let events = || {
            plans.iter().flat_map(|plan| &plan.migrations).flat_map(|migration| &migration.events)
        };
        let has = |wanted: fn(&Action) -> bool| events().any(|event| wanted(&event.action));
        assert!(has(|action| matches!(action, Action::Kill(Role::Source))));
        assert!(has(|action| matches!(action, Action::Kill(Role::Destination))));
        assert!(has(|action| matches!(action, Action::KillBoth)));
        assert!(has(|action| matches!(action, Action::Terminate(_))));
        assert!(has(|action| matches!(action, Action::Freeze(Role::Source, _))));
        assert!(has(|action| matches!(action, Action::Freeze(Role::Destination, _))));
        assert!(has(|action| matches!(action, Action::CutLink(_))));
        assert!(has(|action| matches!(action, Action::StallLink(_))));
        assert!(has(|action| matches!(action, Action::ResetConnections | Action::AbortMigration)));
        for call in [Call::SetXattr, Call::GetXattr, Call::Sync, Call::Fallocate] {
            let has_fault = |event: &Event| match &event.action {
                Action::InjectFaults(_, faults, _) => faults.iter().any(|fault| fault.call == call),
                _ => false,
            };
            assert!(events().any(has_fault), "no {call:?} fault from seed {first}");
        }
        assert!(plans.iter().any(|plan| plan.migrations.len() == 2));
        assert!(
            plans.iter().any(|plan| matches!(plan.source.storage, StorageKind::FullExt4 { .. }))
        );
    }
}
