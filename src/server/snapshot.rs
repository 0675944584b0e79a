//! Session snapshots: the state of suspended sessions as bytes, for the next process.
//! Knows no socket, and never decides where the bytes go.
//!
//! The bytes are a magic number, a version, and a MessagePack map with named fields. Another version,
//! an unknown field or a missing one makes the whole snapshot unreadable, and all sessions are closed:
//! a misread session could write one client's bytes to the wrong place, whereas the client of a closed
//! one only has to reconnect. Whenever a field changes its meaning, [`VERSION`] has to change. The
//! names in the bytes stay: a field that is renamed in Rust gets `#[serde(rename)]`.

use super::settings::Style;
use crate::disk::Identity;
use crate::nbd::handshake::BlockSizes;
use crate::nbd::handshake::server::{Export, HandshakePosition};
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::wire::{ClientFlags, TransmissionFlags};
use crate::range::Range;
use serde::{Deserialize, Serialize};
use std::ops::Not;
use thiserror::Error;

/// Version of the format; no other is read.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"FLEXNBDc";
/// Length of magic number and version in bytes.
const HEADER: usize = MAGIC.len() + size_of::<u32>();

/// Why a snapshot cannot be restored. All its sessions have to be closed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum SnapshotError {
    /// The bytes do not begin with [`MAGIC`].
    #[error("they are in no form that this program knows")]
    NotASnapshot,
    #[error("another version of the program has packed them (form {0}, this one reads {VERSION})")]
    Version(u32),
    #[error("they are garbled: {0}")]
    Malformed(String),
    /// The export has changed in a way that its clients would notice.
    #[error("{0} is not what their clients were told")]
    ExportChanged(&'static str),
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerSnapshot {
    #[serde(rename = "promise")]
    fingerprint: ExportFingerprint,
    sessions: Vec<SessionSnapshot>,
}

/// The export as its clients know it, and the identity of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExportFingerprint {
    disk: Option<Identity>,
    name: String,
    size: u64,
    flags: u16,
    oldstyle: bool,
    /// Omitted if it is that of a file, because versions of this program that do not know the field
    /// serve only files. So is the next one.
    #[serde(default = "minimum_block_of_file", skip_serializing_if = "is_minimum_block_of_file")]
    minimum_block: u32,
    #[serde(default = "payload_max_of_file", skip_serializing_if = "is_payload_max_of_file")]
    payload_max: u32,
}

/// The block sizes of files in bytes, as long as the version of the format stays.
const fn minimum_block_of_file() -> u32 {
    1
}

fn is_minimum_block_of_file(size: &u32) -> bool {
    *size == minimum_block_of_file()
}

const fn payload_max_of_file() -> u32 {
    32 << 20
}

fn is_payload_max_of_file(size: &u32) -> bool {
    *size == payload_max_of_file()
}

/// One session. The caller stores its connection under the session's id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SessionSnapshot {
    pub(super) session: u64,
    /// Received bytes that are not consumed.
    #[serde(with = "serde_bytes")]
    pub(super) inbox: Vec<u8>,
    pub(super) outbox: UnsentSnapshot,
    pub(super) phase: PhaseSnapshot,
    /// The encoded introduction of its client. Omitted without one, as by versions of this program that
    /// do not know the field.
    #[serde(default, with = "serde_bytes", skip_serializing_if = "Option::is_none")]
    pub(super) introduction: Option<Vec<u8>>,
}

/// Replies that are not sent: three parts, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UnsentSnapshot {
    #[serde(with = "serde_bytes")]
    pub(super) bytes: Vec<u8>,
    /// The rest of a simple read's data, still to be read from the disk.
    #[serde(rename = "from_disk")]
    pub(super) announced: RangeSnapshot,
    /// Replies deferred until the simple read is complete.
    #[serde(rename = "held", with = "serde_bytes")]
    pub(super) deferred: Option<Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum PhaseSnapshot {
    #[serde(rename = "Greeting")]
    Handshake(HandshakeSnapshot),
    Transmission(TransmissionSnapshot),
}

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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TransmissionSnapshot {
    pub(super) form: ReplyFormSnapshot,
    pub(super) allocation_selected: bool,
    /// Whether the private command is enabled. Omitted if not, because versions of this program that
    /// do not know the field omit it.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub(super) introduced: bool,
    #[serde(rename = "outstanding")]
    pub(super) pending: PendingSnapshot,
}

/// Requests that are not completed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PendingSnapshot {
    pub(super) payload: Option<PayloadSnapshot>,
    pub(super) reads: Vec<ReadSnapshot>,
    /// The client has sent `NBD_CMD_DISC`: bytes behind it are ignored.
    #[serde(rename = "said_goodbye")]
    pub(super) disconnect_received: bool,
}

/// The form of requests and replies ([`Dialect`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ReplyFormSnapshot {
    Simple,
    Structured,
    Extended,
}

/// A payload that has not completely arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PayloadSnapshot {
    pub(super) to: RequestSnapshot,
    /// Bytes still to be received.
    #[serde(rename = "left")]
    pub(super) remaining: u64,
    pub(super) purpose: PurposeSnapshot,
}

/// What to do with a payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) enum PurposeSnapshot {
    /// Write it to `rest`, the end of `range`.
    Write { range: RangeSnapshot, rest: RangeSnapshot, durable: bool },
    /// Skip it: the request was refused, and is answered.
    Skip,
    /// Skip it, then reply with this error: an earlier piece of the write failed.
    SkipFailed { range: RangeSnapshot, durable: bool, errno: i32 },
    /// Pass it to the policy once it is complete.
    Private {
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
}

/// A read with a part still to be answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadSnapshot {
    pub(super) to: RequestSnapshot,
    pub(super) rest: RangeSnapshot,
    pub(super) whole: bool,
    pub(super) begun: bool,
    /// The rest of the data is announced in the outbox.
    #[serde(rename = "attached")]
    pub(super) announced: bool,
}

/// The fields of a request that its reply needs ([`ReplyTo`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RequestSnapshot {
    cookie: u64,
    offset: u64,
    chunked: bool,
}

/// A range that is not checked against the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RangeSnapshot {
    offset: u64,
    length: u64,
}

impl SessionSnapshot {
    pub(super) fn is_in_handshake(&self) -> bool {
        matches!(self.phase, PhaseSnapshot::Handshake(_))
    }
}

impl RangeSnapshot {
    /// The range on a disk of `disk_size` bytes, if it lies within.
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
        let HandshakePosition { client, skipping, dialect, allocation_for, private_negotiated } =
            position;
        let client_flags = client.map(|flags| flags.bits());
        let (form, introduced) = (dialect.into(), private_negotiated);
        Self { client_flags, skipping, form, allocation_for, introduced }
    }
}

impl HandshakeSnapshot {
    /// The position in the handshake; `None` if it has unknown flags.
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
            private_negotiated: introduced,
        })
    }
}

impl ExportFingerprint {
    pub(super) fn of(export: &Export, style: Style, disk: Option<Identity>) -> Self {
        let BlockSizes { minimum, maximum, .. } = export.block_sizes;
        Self {
            disk,
            name: export.name.clone(),
            size: export.size,
            flags: export.flags.bits(),
            oldstyle: style == Style::Oldstyle,
            minimum_block: minimum,
            payload_max: maximum,
        }
    }

    /// Checks that the export `now` can serve clients of this one. It may have more capabilities.
    fn check_compatible(&self, now: &Self) -> Result<(), SnapshotError> {
        let read_only = TransmissionFlags::READ_ONLY.bits();
        let capabilities = self.flags & !read_only;
        // That of a disk on another server may not be known.
        let is_other_disk = self.disk.zip(now.disk).is_some_and(|(before, now)| before != now);
        let changes = [
            (self.size != now.size, "the size of the disk"),
            (is_other_disk, "the disk itself"),
            (self.name != now.name, "the name of the export"),
            (self.oldstyle != now.oldstyle, "the style of the handshake"),
            ((self.flags ^ now.flags) & read_only != 0, "whether the disk can be changed"),
            (capabilities & !now.flags != 0, "what can be done with the disk"),
            (self.minimum_block < now.minimum_block, "the smallest block"),
            (self.payload_max > now.payload_max, "the longest read or write"),
        ];
        match changes.into_iter().find(|(has_changed, _)| *has_changed) {
            Some((_, what)) => Err(SnapshotError::ExportChanged(what)),
            None => Ok(()),
        }
    }
}

/// Encodes the sessions of a server. Only a mistake in this file can make that fail.
pub(super) fn encode(
    fingerprint: ExportFingerprint,
    sessions: Vec<SessionSnapshot>,
) -> Result<Vec<u8>, SnapshotError> {
    let snapshot = ServerSnapshot { fingerprint, sessions };
    let mut bytes = Vec::from(MAGIC);
    bytes.extend_from_slice(&VERSION.to_be_bytes());
    let body = rmp_serde::to_vec_named(&snapshot)
        .map_err(|error| SnapshotError::Malformed(error.to_string()))?;
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Decodes the sessions in `bytes` for a server with this fingerprint.
pub(super) fn decode(
    bytes: &[u8],
    fingerprint: &ExportFingerprint,
) -> Result<Vec<SessionSnapshot>, SnapshotError> {
    let (header, body) = bytes.split_at_checked(HEADER).ok_or(SnapshotError::NotASnapshot)?;
    let (magic, version) = header.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(SnapshotError::NotASnapshot);
    }
    let version = version.first_chunk().map_or(0, |version| u32::from_be_bytes(*version));
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    let mut rest = body;
    let snapshot: ServerSnapshot = rmp_serde::from_read(&mut rest)
        .map_err(|error| SnapshotError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(SnapshotError::Malformed(format!("{} bytes too many", rest.len())));
    }
    snapshot.fingerprint.check_compatible(fingerprint)?;
    Ok(snapshot.sessions)
}

#[cfg(test)]
mod golden_tests;

#[cfg(test)]
mod tests {
    use super::*;
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

    fn fingerprint(export: &Export) -> ExportFingerprint {
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
        let read = ReadSnapshot { to, rest, whole: true, begun: false, announced: true };
        let serving = |purpose| TransmissionSnapshot {
            form: ReplyFormSnapshot::Extended,
            allocation_selected: true,
            introduced: true,
            pending: PendingSnapshot {
                payload: Some(PayloadSnapshot { to, remaining: 5, purpose }),
                reads: vec![read.clone(); 2],
                disconnect_received: true,
            },
        };
        let outbox =
            UnsentSnapshot { bytes: vec![1; 300], announced: rest, deferred: Some(vec![2]) };
        let mut all: Vec<SessionSnapshot> = (1..)
            .zip(purposes)
            .map(|(session, purpose)| SessionSnapshot {
                session,
                inbox: vec![3; 70_000],
                outbox: outbox.clone(),
                phase: PhaseSnapshot::Transmission(serving(purpose)),
                introduction: (session % 2 == 0).then(|| vec![4; 28]),
            })
            .collect();
        let handshake = HandshakeSnapshot {
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
            phase: PhaseSnapshot::Handshake(handshake),
            introduction: None,
        });
        all
    }

    fn encoded() -> Vec<u8> {
        encode(fingerprint(&export()), sessions()).unwrap()
    }

    fn decoded(bytes: &[u8]) -> Result<Vec<SessionSnapshot>, SnapshotError> {
        decode(bytes, &fingerprint(&export()))
    }

    #[test]
    fn decoding_restores_the_encoded_sessions() {
        assert_eq!(decoded(&encoded()), Ok(sessions()));
    }

    #[test]
    fn a_session_without_the_private_command_omits_the_field() {
        let mut plain = sessions();
        for session in &mut plain {
            match &mut session.phase {
                PhaseSnapshot::Handshake(handshake) => handshake.introduced = false,
                PhaseSnapshot::Transmission(serving) => serving.introduced = false,
            }
        }
        let bytes = encode(fingerprint(&export()), plain.clone()).unwrap();
        assert!(!bytes.windows(10).any(|window| window == b"introduced"));
        assert_eq!(decoded(&bytes), Ok(plain));
    }

    #[test]
    fn block_sizes_other_than_those_of_files_are_saved() {
        let mut coarse = export();
        coarse.block_sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 };
        let bytes = encode(fingerprint(&coarse), sessions()).unwrap();
        assert_eq!(decode(&bytes, &fingerprint(&coarse)), Ok(sessions()));
        assert_eq!(decoded(&bytes), Ok(sessions()), "finer blocks and longer requests");
        let names = [&b"minimum_block"[..], b"payload_max"];
        let has = |bytes: &[u8], name: &[u8]| bytes.windows(name.len()).any(|part| part == name);
        assert!(names.iter().all(|name| has(&bytes, name) && !has(&encoded(), name)));
    }

    #[test]
    fn another_version_is_refused() {
        let mut bytes = encoded();
        for version in [0, VERSION - 1, VERSION + 1, u32::MAX] {
            bytes[MAGIC.len()..HEADER].copy_from_slice(&version.to_be_bytes());
            assert_eq!(decoded(&bytes), Err(SnapshotError::Version(version)));
        }
        bytes[0] ^= 1;
        assert_eq!(decoded(&bytes), Err(SnapshotError::NotASnapshot));
    }

    #[test]
    fn an_unknown_or_missing_field_is_refused() {
        #[derive(Serialize)]
        struct More {
            #[serde(rename = "promise")]
            fingerprint: ExportFingerprint,
            sessions: Vec<SessionSnapshot>,
            more: u8,
        }
        #[derive(Serialize)]
        struct Less {
            #[serde(rename = "promise")]
            fingerprint: ExportFingerprint,
        }
        let fingerprint = fingerprint(&export());
        let more = More { fingerprint: fingerprint.clone(), sessions: sessions(), more: 0 };
        let bodies =
            [rmp_serde::to_vec_named(&more), rmp_serde::to_vec_named(&Less { fingerprint })];
        for body in bodies {
            let bytes = [&encoded()[..HEADER], &body.unwrap()].concat();
            assert!(matches!(decoded(&bytes), Err(SnapshotError::Malformed(_))));
        }
    }

    #[test]
    fn an_unknown_field_in_a_purpose_is_refused() {
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
    fn truncated_and_longer_snapshots_are_refused() {
        let bytes = encoded();
        for end in (0..300).chain(bytes.len() - 300..bytes.len()) {
            assert!(decoded(&bytes[..end]).is_err(), "{end}");
        }
        let long = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(decoded(&long), Err(SnapshotError::Malformed(_))));
    }

    #[test]
    fn a_changed_export_restores_no_session() {
        let with = |change: fn(&mut Export)| {
            let mut other = export();
            change(&mut other);
            decode(&encoded(), &fingerprint(&other))
        };
        let refused = |what| Err(SnapshotError::ExportChanged(what));
        assert_eq!(with(|export| export.size -= 512), refused("the size of the disk"));
        assert_eq!(with(|export| export.name.clear()), refused("the name of the export"));
        let read_only = |export: &mut Export| export.flags |= TransmissionFlags::READ_ONLY;
        assert_eq!(with(read_only), refused("whether the disk can be changed"));
        let less = |export: &mut Export| export.flags -= TransmissionFlags::SEND_FLUSH;
        assert_eq!(with(less), refused("what can be done with the disk"));
        let more = |export: &mut Export| export.flags |= TransmissionFlags::SEND_CACHE;
        assert_eq!(with(more), Ok(sessions()));
        let coarse = |export: &mut Export| export.block_sizes.minimum = 2;
        assert_eq!(with(coarse), refused("the smallest block"));
        let short = |export: &mut Export| export.block_sizes.maximum -= 1;
        assert_eq!(with(short), refused("the longest read or write"));
        let replaced = ExportFingerprint { disk: Some((8, 2)), ..fingerprint(&export()) };
        assert_eq!(decode(&encoded(), &replaced), refused("the disk itself"));
        let unknown = ExportFingerprint { disk: None, ..fingerprint(&export()) };
        assert_eq!(decode(&encoded(), &unknown), Ok(sessions()));
        let oldstyle =
            decode(&encoded(), &ExportFingerprint { oldstyle: true, ..fingerprint(&export()) });
        assert_eq!(oldstyle, refused("the style of the handshake"));
    }

    #[test]
    fn a_range_outside_the_disk_is_refused() {
        let range = |offset, length| RangeSnapshot { offset, length };
        assert!(range(SIZE - 1, 1).within(SIZE).is_some());
        for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1)] {
            assert_eq!(range(offset, length).within(SIZE), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(at in HEADER..400usize, byte: u8, tail in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = encoded();
            bytes[at] = byte;
            let _ = decoded(&bytes);
            let _ = decoded(&[&bytes[..at], &tail].concat());
        }
    }
}
