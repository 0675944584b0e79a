//! A session packed up for the next process, and unpacked there: what it is in the middle of ⇄ bytes.
//! Knows no socket: who passes the bytes and the connections on is not decided here.
//!
//! The bytes are a magic number, a version, and a MessagePack map with named fields. Whoever reads
//! another version, another field, or one field too few takes nothing: a session that is misread
//! would write one client's bytes where another one's belong, and one that is closed only has to be
//! opened again. [`VERSION`] changes whenever a field changes its meaning.

use super::settings::Style;
use crate::disk::Identity;
use crate::nbd::handshake::server::{Export, HandshakePosition};
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::wire::{ClientFlags, TransmissionFlags};
use crate::range::Range;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Not;

/// Of what is written here, and the only one that is read.
pub const VERSION: u32 = 1;
/// What the bytes begin with.
const MAGIC: [u8; 8] = *b"FLEXNBDc";
/// Magic and version.
const HEAD: usize = MAGIC.len() + size_of::<u32>();

/// Why packed sessions cannot be taken over. They have to be closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SnapshotError {
    /// These are no packed sessions.
    Foreign,
    /// Another version of the program has packed them.
    Version(u32),
    /// They are not what they should be.
    Garbled(String),
    /// What the clients were promised no longer holds.
    Promise(&'static str),
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("they are in no form that this program knows"),
            Self::Version(version) => write!(
                f,
                "another version of the program has packed them (form {version}, this one reads \
                 {VERSION})"
            ),
            Self::Garbled(how) => write!(f, "they are garbled: {how}"),
            Self::Promise(what) => write!(f, "{what} is not what their clients were told"),
        }
    }
}

/// All sessions of a server.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerSnapshot {
    promise: ExportFingerprint,
    sessions: Vec<SessionSnapshot>,
}

/// What clients were told about the export, and the disk behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExportFingerprint {
    disk: Option<Identity>,
    name: String,
    size: u64,
    flags: u16,
    oldstyle: bool,
}

/// One session. Its connection goes beside it, under the session's number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SessionSnapshot {
    /// Number of the session.
    pub(super) session: u64,
    /// What arrived and was not used.
    #[serde(with = "serde_bytes")]
    pub(super) inbox: Vec<u8>,
    pub(super) outbox: UnsentSnapshot,
    pub(super) phase: PhaseSnapshot,
}

/// What is still to be sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UnsentSnapshot {
    #[serde(with = "serde_bytes")]
    pub(super) bytes: Vec<u8>,
    /// Behind `bytes`, from the disk.
    pub(super) from_disk: RangeSnapshot,
    /// Behind that, once the read that is being sent is complete.
    #[serde(with = "serde_bytes")]
    pub(super) held: Option<Vec<u8>>,
}

/// How far a session has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum PhaseSnapshot {
    /// In the handshake.
    Greeting(HandshakeSnapshot),
    /// Past it.
    Transmission(TransmissionSnapshot),
}

/// A handshake that is not over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HandshakeSnapshot {
    client_flags: Option<u32>,
    skipping: u32,
    form: ReplyFormSnapshot,
    allocation_for: Option<String>,
    #[serde(default, skip_serializing_if = "Not::not")]
    introduced: bool,
}

/// A session that serves requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TransmissionSnapshot {
    pub(super) form: ReplyFormSnapshot,
    pub(super) allocation_selected: bool,
    /// Whether the private command is understood. Left out where it is not, as all versions of this
    /// program that do not know the field leave it out.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub(super) introduced: bool,
    pub(super) outstanding: PendingSnapshot,
}

/// What a session still owes its client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PendingSnapshot {
    pub(super) payload: Option<PayloadSnapshot>,
    pub(super) reads: Vec<ReadSnapshot>,
    /// Whatever comes behind what the client has said counts no more.
    pub(super) said_goodbye: bool,
}

/// The form of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ReplyFormSnapshot {
    Simple,
    Structured,
    Extended,
}

/// A payload of which not everything has arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PayloadSnapshot {
    pub(super) to: RequestSnapshot,
    pub(super) left: u64,
    pub(super) purpose: PurposeSnapshot,
}

/// What a payload is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) enum PurposeSnapshot {
    /// To be written to the end of this part of the disk.
    Write { range: RangeSnapshot, rest: RangeSnapshot, durable: bool },
    /// To be read past: the request was refused, and that is answered already.
    Skip,
    /// To be read past: a write failed with this error, which is still to be answered.
    SkipFailed { range: RangeSnapshot, durable: bool, errno: i32 },
    /// To be understood once it is all there.
    Private {
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
}

/// A read that is not completely answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadSnapshot {
    pub(super) to: RequestSnapshot,
    pub(super) rest: RangeSnapshot,
    pub(super) whole: bool,
    pub(super) begun: bool,
    pub(super) attached: bool,
}

/// A request, as far as its reply repeats it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RequestSnapshot {
    cookie: u64,
    offset: u64,
    chunked: bool,
}

/// A range that was not checked against the disk yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RangeSnapshot {
    offset: u64,
    length: u64,
}

impl SessionSnapshot {
    /// Whether it is in the handshake.
    pub(super) fn is_in_handshake(&self) -> bool {
        matches!(self.phase, PhaseSnapshot::Greeting(_))
    }
}

impl RangeSnapshot {
    /// The same as a range of a disk of `disk_size` bytes, if it lies within.
    pub(super) fn within(self, disk_size: u64) -> Option<Range> {
        Range::within(disk_size, self.offset, self.length)
    }
}

impl From<Range> for RangeSnapshot {
    fn from(range: Range) -> Self {
        Self { offset: range.offset(), length: range.length() }
    }
}

impl From<ReplyTo> for RequestSnapshot {
    fn from(ReplyTo { cookie, offset, chunked }: ReplyTo) -> Self {
        Self { cookie, offset, chunked }
    }
}

impl From<RequestSnapshot> for ReplyTo {
    fn from(RequestSnapshot { cookie, offset, chunked }: RequestSnapshot) -> Self {
        Self { cookie, offset, chunked }
    }
}

impl From<Dialect> for ReplyFormSnapshot {
    fn from(dialect: Dialect) -> Self {
        match dialect {
            Dialect::Simple => Self::Simple,
            Dialect::Structured => Self::Structured,
            Dialect::Extended => Self::Extended,
        }
    }
}

impl From<ReplyFormSnapshot> for Dialect {
    fn from(form: ReplyFormSnapshot) -> Self {
        match form {
            ReplyFormSnapshot::Simple => Self::Simple,
            ReplyFormSnapshot::Structured => Self::Structured,
            ReplyFormSnapshot::Extended => Self::Extended,
        }
    }
}

impl From<HandshakePosition> for HandshakeSnapshot {
    fn from(position: HandshakePosition) -> Self {
        let HandshakePosition { client, skipping, dialect, allocation_for, introduced } = position;
        let client_flags = client.map(|flags| flags.bits());
        Self { client_flags, skipping, form: dialect.into(), allocation_for, introduced }
    }
}

impl HandshakeSnapshot {
    /// The same for the handshake itself, if its flags are known.
    pub(super) fn position(self) -> Option<HandshakePosition> {
        let Self { client_flags, skipping, form, allocation_for, introduced } = self;
        let client = match client_flags {
            Some(bits) => Some(ClientFlags::from_bits(bits)?),
            None => None,
        };
        Some(HandshakePosition {
            client,
            skipping,
            dialect: form.into(),
            allocation_for,
            introduced,
        })
    }
}

impl ExportFingerprint {
    pub(super) fn of(export: &Export, style: Style, disk: Option<Identity>) -> Self {
        let (name, size) = (export.name.clone(), export.size);
        Self { disk, name, size, flags: export.flags.bits(), oldstyle: style == Style::Oldstyle }
    }

    /// Whether a server that promises something else keeps it. That may be able to do more.
    fn kept_by(&self, now: &Self) -> Result<(), SnapshotError> {
        let read_only = TransmissionFlags::READ_ONLY.bits();
        let promised = self.flags & !read_only;
        let broken = [
            (self.size != now.size, "the size of the disk"),
            (self.disk != now.disk, "the disk itself"),
            (self.name != now.name, "the name of the export"),
            (self.oldstyle != now.oldstyle, "the style of the handshake"),
            ((self.flags ^ now.flags) & read_only != 0, "whether the disk can be changed"),
            (promised & !now.flags != 0, "what can be done with the disk"),
        ];
        match broken.into_iter().find(|(is_broken, _)| *is_broken) {
            Some((_, what)) => Err(SnapshotError::Promise(what)),
            None => Ok(()),
        }
    }
}

/// `sessions` of a server that has promised this, in one piece.
///
/// # Errors
/// When they cannot be put in a row, which can only be a mistake in this file.
pub(super) fn encode(
    promise: ExportFingerprint,
    sessions: Vec<SessionSnapshot>,
) -> Result<Vec<u8>, SnapshotError> {
    let cargo = ServerSnapshot { promise, sessions };
    let mut bytes = Vec::from(MAGIC);
    bytes.extend_from_slice(&VERSION.to_be_bytes());
    let body = rmp_serde::to_vec_named(&cargo)
        .map_err(|error| SnapshotError::Garbled(error.to_string()))?;
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// The sessions in `bytes`, if a server that promises this can go on with them.
///
/// # Errors
/// Why none of them can be taken over.
pub(super) fn decode(
    bytes: &[u8],
    promise: &ExportFingerprint,
) -> Result<Vec<SessionSnapshot>, SnapshotError> {
    let (head, body) = bytes.split_at_checked(HEAD).ok_or(SnapshotError::Foreign)?;
    let (magic, version) = head.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(SnapshotError::Foreign);
    }
    let version = version.first_chunk().map_or(0, |version| u32::from_be_bytes(*version));
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    let mut left = body;
    let cargo: ServerSnapshot = rmp_serde::from_read(&mut left)
        .map_err(|error| SnapshotError::Garbled(error.to_string()))?;
    if !left.is_empty() {
        return Err(SnapshotError::Garbled(format!("{} bytes too many", left.len())));
    }
    cargo.promise.kept_by(promise)?;
    Ok(cargo.sessions)
}

#[cfg(test)]
mod golden_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::BlockSizes;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;

    fn export() -> Export {
        Export {
            name: "disk".to_owned(),
            description: String::new(),
            size: SIZE,
            flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
            block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 1 << 25 },
        }
    }

    fn promise(export: &Export) -> ExportFingerprint {
        ExportFingerprint::of(export, Style::Newstyle, Some((8, 1)))
    }

    fn sessions() -> Vec<SessionSnapshot> {
        let to = RequestSnapshot { cookie: u64::MAX, offset: 7, chunked: true };
        let (range, rest) =
            (RangeSnapshot { offset: 0, length: 9 }, RangeSnapshot { offset: 4, length: 5 });
        let purposes = [
            PurposeSnapshot::Write { range, rest, durable: true },
            PurposeSnapshot::Skip,
            PurposeSnapshot::SkipFailed { range, durable: false, errno: 28 },
            PurposeSnapshot::Private { data: vec![0xff; 3] },
        ];
        let read = ReadSnapshot { to, rest, whole: true, begun: false, attached: true };
        let serving = |purpose| TransmissionSnapshot {
            form: ReplyFormSnapshot::Extended,
            allocation_selected: true,
            introduced: true,
            outstanding: PendingSnapshot {
                payload: Some(PayloadSnapshot { to, left: 5, purpose }),
                reads: vec![read.clone(); 2],
                said_goodbye: true,
            },
        };
        let outbox = UnsentSnapshot { bytes: vec![1; 300], from_disk: rest, held: Some(vec![2]) };
        let mut all: Vec<SessionSnapshot> = (1..)
            .zip(purposes)
            .map(|(session, purpose)| SessionSnapshot {
                session,
                inbox: vec![3; 70_000],
                outbox: outbox.clone(),
                phase: PhaseSnapshot::Transmission(serving(purpose)),
            })
            .collect();
        let greeting = HandshakeSnapshot {
            client_flags: Some(3),
            skipping: 4,
            form: ReplyFormSnapshot::Structured,
            allocation_for: Some("disk".to_owned()),
            introduced: true,
        };
        let (inbox, outbox) = (Vec::new(), UnsentSnapshot::default());
        all.push(SessionSnapshot {
            session: 9,
            inbox,
            outbox,
            phase: PhaseSnapshot::Greeting(greeting),
        });
        all
    }

    fn packed() -> Vec<u8> {
        encode(promise(&export()), sessions()).unwrap()
    }

    fn unpacked(bytes: &[u8]) -> Result<Vec<SessionSnapshot>, SnapshotError> {
        decode(bytes, &promise(&export()))
    }

    #[test]
    fn what_is_unpacked_is_what_was_packed() {
        assert_eq!(unpacked(&packed()), Ok(sessions()));
    }

    #[test]
    fn a_session_without_introduction_has_the_earlier_form() {
        let mut plain = sessions();
        for carried in &mut plain {
            match &mut carried.phase {
                PhaseSnapshot::Greeting(greeting) => greeting.introduced = false,
                PhaseSnapshot::Transmission(serving) => serving.introduced = false,
            }
        }
        let bytes = encode(promise(&export()), plain.clone()).unwrap();
        assert!(!bytes.windows(10).any(|window| window == b"introduced"));
        assert_eq!(unpacked(&bytes), Ok(plain));
    }

    #[test]
    fn another_version_is_never_misread() {
        let mut bytes = packed();
        for version in [0, VERSION - 1, VERSION + 1, u32::MAX] {
            bytes[MAGIC.len()..HEAD].copy_from_slice(&version.to_be_bytes());
            assert_eq!(unpacked(&bytes), Err(SnapshotError::Version(version)));
        }
        bytes[0] ^= 1;
        assert_eq!(unpacked(&bytes), Err(SnapshotError::Foreign));
    }

    #[test]
    fn a_field_more_or_less_is_never_misread() {
        #[derive(Serialize)]
        struct More {
            promise: ExportFingerprint,
            sessions: Vec<SessionSnapshot>,
            more: u8,
        }
        #[derive(Serialize)]
        struct Less {
            promise: ExportFingerprint,
        }
        let promise = promise(&export());
        let more = More { promise: promise.clone(), sessions: sessions(), more: 0 };
        let bodies = [rmp_serde::to_vec_named(&more), rmp_serde::to_vec_named(&Less { promise })];
        for body in bodies {
            let bytes = [&packed()[..HEAD], &body.unwrap()].concat();
            assert!(matches!(unpacked(&bytes), Err(SnapshotError::Garbled(_))));
        }
    }

    #[test]
    fn nor_is_one_within_what_a_payload_is_for() {
        #[derive(Serialize)]
        enum Newer {
            SkipFailed { range: RangeSnapshot, durable: bool, errno: i32, more: u8 },
        }
        let range = RangeSnapshot { offset: 0, length: 9 };
        let newer = Newer::SkipFailed { range, durable: false, errno: 28, more: 0 };
        let bytes = rmp_serde::to_vec_named(&newer).unwrap();
        assert!(rmp_serde::from_slice::<PurposeSnapshot>(&bytes).is_err());
    }

    #[test]
    fn every_end_but_the_last_is_too_early_and_one_more_is_too_late() {
        let bytes = packed();
        for end in (0..300).chain(bytes.len() - 300..bytes.len()) {
            assert!(unpacked(&bytes[..end]).is_err(), "{end}");
        }
        let long = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(unpacked(&long), Err(SnapshotError::Garbled(_))));
    }

    #[test]
    fn a_server_that_does_not_keep_the_promise_takes_nobody_over() {
        let with = |change: fn(&mut Export)| {
            let mut other = export();
            change(&mut other);
            decode(&packed(), &promise(&other))
        };
        let broken = |what| Err(SnapshotError::Promise(what));
        assert_eq!(with(|export| export.size -= 512), broken("the size of the disk"));
        assert_eq!(with(|export| export.name.clear()), broken("the name of the export"));
        let read_only = |export: &mut Export| export.flags |= TransmissionFlags::READ_ONLY;
        assert_eq!(with(read_only), broken("whether the disk can be changed"));
        let less = |export: &mut Export| export.flags -= TransmissionFlags::SEND_FLUSH;
        assert_eq!(with(less), broken("what can be done with the disk"));
        let more = |export: &mut Export| export.flags |= TransmissionFlags::SEND_CACHE;
        assert_eq!(with(more), Ok(sessions()));
        let replaced = ExportFingerprint { disk: Some((8, 2)), ..promise(&export()) };
        assert_eq!(decode(&packed(), &replaced), broken("the disk itself"));
        let oldstyle =
            decode(&packed(), &ExportFingerprint { oldstyle: true, ..promise(&export()) });
        assert_eq!(oldstyle, broken("the style of the handshake"));
    }

    #[test]
    fn a_part_of_the_disk_that_lies_outside_is_none() {
        let span = |offset, length| RangeSnapshot { offset, length };
        assert!(span(SIZE - 1, 1).within(SIZE).is_some());
        for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1)] {
            assert_eq!(span(offset, length).within(SIZE), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in HEAD..400usize, byte: u8, tail in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = packed();
            bytes[at] = byte;
            let _ = unpacked(&bytes);
            let _ = unpacked(&[&bytes[..at], &tail].concat());
        }
    }
}
