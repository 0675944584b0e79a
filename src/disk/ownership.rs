//! The ownership record of a disk, and the decisions that follow from it.
//! Pure: bytes in, values out. [`super::record_store`] reads and writes the record.
//!
//! ```text
//!            first byte            handover acknowledged
//!   none ───────────────▶ incoming ─────────────────────▶ ours (id)
//!    │                        ▲                              │
//!    │ before the handover    │ received                     │ before the handover
//!    ▼        acknowledged    │                              ▼
//!   departing ────────────▶ departed                     departing …
//!    │
//!    └─ "not arrived and never will": back to what it was before
//! ```
//!
//! The record is one line of text, `flexnbd 1 STATE key=value …`, ended by a newline, so that an
//! operator can read it with `getfattr` or `cat`. Version 2 adds two fields: the local address that
//! the operator chose for a migration, in *departing*, and the time of a failed flush, in *ours*. Any
//! other line than one that [`Record::encode`] writes is an error ([`BadRecord`]), and a disk with such a record is not
//! served.
//!
//! `ownership/decisions.txt` lists every decision; a test compares it with the code.

pub mod disk_id;

use crate::human::utc;
use crate::ids;
use std::fmt;
use std::net::IpAddr;

/// Longest record in bytes. Every file system with extended attributes takes one of this size.
pub const RECORD_MAX: usize = 512;

/// Longest [`RemoteAddress`] in bytes.
pub const REMOTE_ADDRESS_MAX: usize = 255;

/// The first word of every record.
const MAGIC: &str = "flexnbd";
/// Version of every record that needs no [`VERSION_2`].
pub const VERSION: &str = "1";
/// The version of a record with a local address or a failed flush. Programs that know only [`VERSION`]
/// refuse the disk then, rather than ignore that.
pub const VERSION_2: &str = "2";

/// The id of a migration: 128 random bits, chosen by its source.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// Parses exactly what [`Display`](fmt::Display) writes: 32 lower-case hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        ids::parse(text).map(Self)
    }

    /// The id of the next copy of the same migration.
    #[must_use]
    pub fn next(self) -> Self {
        Self(u128::from_be_bytes(self.0).wrapping_add(1).to_be_bytes())
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ids::write(self.0, f)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({self})")
    }
}

/// The destination of a disk as an operator writes it: an address and port, or a socket's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteAddress(String);

impl RemoteAddress {
    /// `text`, if a record can hold it: not empty, at most [`REMOTE_ADDRESS_MAX`] bytes, no control
    /// characters.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let has_length = !text.is_empty() && text.len() <= REMOTE_ADDRESS_MAX;
        (has_length && !text.chars().any(char::is_control)).then(|| Self(text.to_owned()))
    }

    /// The address as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RemoteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a disk became ours. A handover that did not happen restores this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provenance {
    /// It never moved: no record.
    Native,
    /// It arrived with the migration of this id.
    Arrived(Id),
    /// It arrived from a source that could not introduce itself.
    Received,
    /// An operator declared it ours (`flexnbd adopt`).
    Adopted,
}

impl Provenance {
    /// The record of a disk with this provenance; none for [`Provenance::Native`].
    #[must_use]
    pub fn record(self) -> Option<Record> {
        match self {
            Self::Native => None,
            provenance => Some(Record::Ours(provenance)),
        }
    }
}

/// The ownership record of an image. An image without a record never moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An incomplete copy, which is not served.
    Incoming {
        /// The migration that sends it; none of a sender that could not introduce itself.
        id: Option<Id>,
    },
    /// Complete, and served from here.
    Ours(Provenance),
    /// The same, but a flush has failed: data that clients had written may be lost. Stays until an
    /// operator adopts the disk, or another one is received in its place.
    FlushFailed {
        /// How the disk became ours.
        provenance: Provenance,
        /// Time of the first failure in seconds since 1970.
        since: u64,
    },
    /// In doubt: a handover was begun, and only the destination knows its outcome.
    Departing {
        /// The migration that hands it over.
        id: Id,
        /// What to restore if the handover did not happen.
        before: Provenance,
        /// The destination.
        to: RemoteAddress,
        /// The local address to ask from, if the operator chose one (`mirror --bind`).
        from: Option<IpAddr>,
    },
    /// Handed over; another host owns the disk.
    Departed {
        /// The migration that handed it over.
        id: Id,
        /// Time of the handover in seconds since 1970.
        when: u64,
        /// The destination.
        to: RemoteAddress,
    },
}

impl Record {
    /// The record as text, newline included; at most [`RECORD_MAX`] bytes.
    #[must_use]
    pub fn encode(&self) -> String {
        let body = match self {
            Self::Incoming { id: None } => "incoming id=-".to_owned(),
            Self::Incoming { id: Some(id) } => format!("incoming id={id}"),
            Self::Ours(provenance) => format!("ours title={}", encode_provenance(*provenance)),
            Self::FlushFailed { provenance, since } => {
                format!("ours title={} flush-failed={since}", encode_provenance(*provenance))
            }
            Self::Departing { id, before, to, from } => {
                let from = from.map_or_else(String::new, |ip| format!(" from={ip}"));
                format!("departing id={id} before={}{from} to={to}", encode_provenance(*before))
            }
            Self::Departed { id, when, to } => format!("departed id={id} when={when} to={to}"),
        };
        format!("{MAGIC} {} {body}\n", self.version())
    }

    fn version(&self) -> &'static str {
        match self {
            Self::Departing { from: Some(_), .. } | Self::FlushFailed { .. } => VERSION_2,
            _ => VERSION,
        }
    }

    /// Parses exactly what [`Record::encode`] writes.
    ///
    /// # Errors
    /// For all other bytes; the disk must then not be served.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRecord> {
        let garbage = || BadRecord::Garbage(excerpt(bytes));
        let line = std::str::from_utf8(bytes).ok().and_then(|text| text.strip_suffix('\n'));
        let rest = line.and_then(|line| line.strip_prefix(MAGIC)?.strip_prefix(' '));
        let (version, body) = rest.and_then(|rest| rest.split_once(' ')).ok_or_else(garbage)?;
        if ![VERSION, VERSION_2].contains(&version) {
            let plain = version.len() <= 9 && version.bytes().all(|b| b.is_ascii_digit());
            return Err(if plain { BadRecord::Version(version.to_owned()) } else { garbage() });
        }
        // Each record has one spelling: a leading zero is an error like any other.
        let record = decode_body(body).filter(|record| record.encode().as_bytes() == bytes);
        // Later programs may extend the second version, so a misfit there is no damage.
        record.ok_or_else(|| match version {
            VERSION => garbage(),
            version => BadRecord::Version(version.to_owned()),
        })
    }

    /// Whether this record may stay when `next` could not be written: a disk that has departed is
    /// not served with the record *departing* either.
    pub(super) fn remains_valid_after(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Departing { id: old, .. }, Self::Departed { id, .. }) => old == id,
            _ => false,
        }
    }

    /// The kind of record, as messages and `status` name it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Incoming { .. } => "incoming",
            Self::Ours(_) | Self::FlushFailed { .. } => "ours",
            Self::Departing { .. } => "departing",
            Self::Departed { .. } => "departed",
        }
    }
}

fn encode_provenance(provenance: Provenance) -> String {
    match provenance {
        Provenance::Native => "native".to_owned(),
        Provenance::Adopted => "adopted".to_owned(),
        Provenance::Received => "received".to_owned(),
        Provenance::Arrived(id) => id.to_string(),
    }
}

fn decode_provenance(text: &str) -> Option<Provenance> {
    match text {
        "native" => Some(Provenance::Native),
        "adopted" => Some(Provenance::Adopted),
        "received" => Some(Provenance::Received),
        id => Id::parse(id).map(Provenance::Arrived),
    }
}

fn decode_body(body: &str) -> Option<Record> {
    let (state, rest) = body.split_once(' ')?;
    match state {
        "incoming" => match rest.strip_prefix("id=")? {
            "-" => Some(Record::Incoming { id: None }),
            id => Some(Record::Incoming { id: Some(Id::parse(id)?) }),
        },
        "ours" => match rest.strip_prefix("title=")?.split_once(' ') {
            None => decode_provenance(rest.strip_prefix("title=")?)?.record(),
            Some((provenance, failed)) => Some(Record::FlushFailed {
                provenance: decode_provenance(provenance)?,
                since: failed.strip_prefix("flush-failed=")?.parse().ok()?,
            }),
        },
        "departing" => {
            let (id, before, rest) = decode_id_and(rest, "before=")?;
            let (from, to) = match rest.strip_prefix("from=") {
                None => (None, rest),
                Some(rest) => {
                    let (ip, to) = rest.split_once(' ')?;
                    (Some(ip.parse().ok()?), to)
                }
            };
            Some(Record::Departing {
                id,
                before: decode_provenance(before)?,
                to: decode_to(to)?,
                from,
            })
        }
        "departed" => {
            let (id, when, to) = decode_id_and(rest, "when=")?;
            Some(Record::Departed { id, when: when.parse().ok()?, to: decode_to(to)? })
        }
        _ => None,
    }
}

/// Splits `id=… KEY… REST`, which `departing` and `departed` begin with.
fn decode_id_and<'a>(rest: &'a str, key: &str) -> Option<(Id, &'a str, &'a str)> {
    let (id, rest) = rest.strip_prefix("id=")?.split_once(' ')?;
    let (value, rest) = rest.strip_prefix(key)?.split_once(' ')?;
    Some((Id::parse(id)?, value, rest))
}

/// Parses `to=…`, the last field, since the address may contain spaces.
fn decode_to(to: &str) -> Option<RemoteAddress> {
    RemoteAddress::new(to.strip_prefix("to=")?)
}

/// The first bytes of a record, escaped for one line of a message.
fn excerpt(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(60)];
    start.escape_ascii().to_string()
}

/// Why the bytes beside an image are no record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// A newer flexnbd wrote it, in this version.
    #[error(
        "its ownership record has version {0}, in a form that this flexnbd does not know; use the \
         flexnbd that wrote it"
    )]
    Version(String),
    /// It is damaged; holds its first bytes, escaped.
    #[error(
        "its ownership record is damaged (it starts with \"{0}\"), so nobody can tell whose disk \
         this is; if you know that this copy is the right one, run `flexnbd adopt --force`"
    )]
    Garbage(String),
}

/// What `serve` does with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForServe {
    /// Serve it. A source that asks whether its disk has arrived is answered from the provenance.
    Serve(Provenance),
    /// Ask the destination whether migration `id` has arrived. If it answers that it has not and
    /// never will, restore `before` durably, then serve; otherwise refuse.
    Ask {
        /// The migration that was handing the disk over.
        id: Id,
        /// The destination to ask.
        to: RemoteAddress,
        /// The local address to ask from, if the record has one.
        from: Option<IpAddr>,
        /// The provenance to restore if the disk has not arrived.
        before: Provenance,
        /// The reason to refuse after every other answer.
        refusal: OwnershipRefusal,
    },
    /// Refuse to serve it.
    Refuse(OwnershipRefusal),
}

/// Decides what `serve` does with an image that has this record.
#[must_use]
pub fn for_serve(record: Option<&Record>) -> ForServe {
    match record {
        None => ForServe::Serve(Provenance::Native),
        Some(Record::Ours(provenance) | Record::FlushFailed { provenance, .. }) => {
            ForServe::Serve(*provenance)
        }
        Some(Record::Incoming { .. }) => ForServe::Refuse(OwnershipRefusal::Incomplete),
        Some(Record::Departed { id, when, to }) => {
            ForServe::Refuse(OwnershipRefusal::Departed { id: *id, when: *when, to: to.clone() })
        }
        Some(Record::Departing { id, before, to, from }) => ForServe::Ask {
            id: *id,
            to: to.clone(),
            from: *from,
            before: *before,
            refusal: OwnershipRefusal::Departing { id: *id, to: to.clone() },
        },
    }
}

/// What `listen` does with an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForListen {
    /// Receive a disk into it, from the start.
    Accept {
        /// The migration whose incomplete copy the image holds, if it holds one: the inner value
        /// is none for a sender that could not introduce itself.
        incomplete_copy: Option<Option<Id>>,
    },
    /// Report that the disk has arrived, and exit with success; none of a disk that came without an
    /// id.
    AlreadyArrived(Option<Id>),
    /// Refuse to receive into it.
    Refuse(OwnershipRefusal),
}

/// Decides what `listen` does with an image that has this record; `overwrite` is its option.
#[must_use]
pub fn for_listen(record: Option<&Record>, overwrite: bool) -> ForListen {
    match record {
        Some(Record::FlushFailed { provenance, .. }) => {
            for_listen(provenance.record().as_ref(), overwrite)
        }
        None | Some(Record::Departed { .. } | Record::Ours(Provenance::Native)) => {
            ForListen::Accept { incomplete_copy: None }
        }
        Some(Record::Incoming { id }) => ForListen::Accept { incomplete_copy: Some(*id) },
        Some(Record::Ours(_)) if overwrite => ForListen::Accept { incomplete_copy: None },
        Some(Record::Ours(Provenance::Arrived(id))) => ForListen::AlreadyArrived(Some(*id)),
        Some(Record::Ours(Provenance::Received)) => ForListen::AlreadyArrived(None),
        Some(Record::Ours(Provenance::Adopted)) => ForListen::Refuse(OwnershipRefusal::Adopted),
        Some(Record::Departing { id, to, .. }) => {
            ForListen::Refuse(OwnershipRefusal::Departing { id: *id, to: to.clone() })
        }
    }
}

/// Decides what `adopt` does with an image that has this record: returns the record to write.
/// An image that is ours keeps its record, so that a source that asks for its disk still finds it. A
/// failed flush is forgotten.
///
/// # Errors
/// Without `force`, when another host may hold the disk or this copy is incomplete.
pub fn for_adopt(record: Option<&Record>, force: bool) -> Result<Record, OwnershipRefusal> {
    let refusal = match (record, for_serve(record)) {
        (Some(ours @ Record::Ours(_)), _) => return Ok(ours.clone()),
        (Some(Record::FlushFailed { provenance, .. }), _) => {
            return Ok(provenance.record().unwrap_or(Record::Ours(Provenance::Adopted)));
        }
        (_, ForServe::Refuse(refusal) | ForServe::Ask { refusal, .. }) => refusal,
        (_, ForServe::Serve(_)) => return Ok(Record::Ours(Provenance::Adopted)),
    };
    if force { Ok(Record::Ours(Provenance::Adopted)) } else { Err(refusal) }
}

/// Why a disk is not served, or not received into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnershipRefusal {
    /// The copy is incomplete.
    Incomplete,
    /// The disk is in doubt: it may have been handed over.
    Departing {
        /// The migration that was handing it over.
        id: Id,
        /// The destination, which knows the outcome.
        to: RemoteAddress,
    },
    /// The disk has been handed over.
    Departed {
        /// The migration that handed it over.
        id: Id,
        /// Time of the handover in seconds since 1970.
        when: u64,
        /// The destination.
        to: RemoteAddress,
    },
    /// An operator declared this copy the canonical one; `listen` must not replace it.
    Adopted,
}

impl OwnershipRefusal {
    /// The message for the operator about `image`: names the record, the host and the command that
    /// resolves the refusal.
    #[must_use]
    pub fn explain(&self, image: &str) -> String {
        let force = format!("`flexnbd adopt --force -f {image}`");
        match self {
            Self::Incomplete => format!(
                "{image} is an incomplete copy (record: incoming): its migration has not finished. \
                 Receive it again with `flexnbd listen -f {image}`, or declare it complete with \
                 {force}"
            ),
            Self::Departing { id, to } => format!(
                "{image} was being handed over to {to} (record: departing, migration {id}) and only \
                 {to} knows whether it has arrived. A service asks {to} again by itself; otherwise \
                 start flexnbd again when {to} can be reached. If it is lost for good, run {force}"
            ),
            Self::Departed { id, when, to } => format!(
                "{image} has moved to {to} (record: departed, migration {id}, at {}). Use it \
                 there; if that copy is lost for good, run {force}",
                utc(*when)
            ),
            Self::Adopted => format!(
                "{image} was declared the canonical copy (record: ours, adopted). To receive another \
                 disk into it, run `flexnbd listen --overwrite -f {image}`"
            ),
        }
    }
}

#[cfg(test)]
mod tests;
