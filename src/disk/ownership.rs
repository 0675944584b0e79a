//! Whose disk this is: the record kept beside an image, and what it permits.
//! Never touches a file: bytes in, values out; keeping them is for others.
//!
//! ```text
//!            first byte            handover acknowledged
//!   none ───────────────▶ incoming ─────────────────────▶ ours (id)
//!    │                        ▲                              │
//!    │ before the handover    │ coming home                  │ before the handover
//!    ▼        acknowledged    │                              ▼
//!   departing ────────────▶ departed                     departing …
//!    │
//!    └─ "not arrived and never will": back to what it was before
//! ```
//!
//! The record is one line of text, `flexnbd 1 STATE key=value …`, ended by a newline, so that an
//! operator can read it with `getfattr` or `cat`. What version 1 has no field for is version 2:
//! *departing* from a local address that the operator chose. A line that is not exactly one that we write is
//! an error, and an error means that nobody serves the disk: see [`BadRecord`].

use crate::words::utc;
use std::fmt;
use std::net::IpAddr;

/// Longest record in bytes. An extended attribute of this size fits every file system that has
/// them.
pub const RECORD_MAX: usize = 512;

/// Longest [`RemoteAddress`] in bytes.
pub const PLACE_MAX: usize = 255;

/// What every record starts with: whose it is, and the version of its form.
const FAMILY: &str = "flexnbd";
/// Version of every record that needs no [`VERSION_WITH_FROM`].
pub const VERSION: &str = "1";
/// The version of a record that [`VERSION`] has no field for: earlier programs say that they do not
/// know it, and refuse the disk.
pub const VERSION_WITH_FROM: &str = "2";

/// A migration's name: 128 random bits, chosen by its source.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// The id written as 32 hexadecimal digits, as [`Display`](fmt::Display) writes it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let strict = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        let fits = text.len() == 32 && text.bytes().all(strict);
        let number = fits.then(|| u128::from_str_radix(text, 16).ok())??;
        Some(Self(number.to_be_bytes()))
    }

    /// Another name, for the next copy of the same migration.
    #[must_use]
    pub fn next(self) -> Self {
        Self(u128::from_be_bytes(self.0).wrapping_add(1).to_be_bytes())
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({self})")
    }
}

/// Where a disk goes, as an operator would write it: an address and port, or a socket's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteAddress(String);

impl RemoteAddress {
    /// `text`, if it can stand in a record: not empty, at most [`PLACE_MAX`] bytes and without
    /// control characters.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let fits = !text.is_empty() && text.len() <= PLACE_MAX;
        (fits && !text.chars().any(char::is_control)).then(|| Self(text.to_owned()))
    }

    /// The text it was made of.
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

/// How a disk came to be ours; what a handover that did not happen is undone to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provenance {
    /// It never was anybody else's: no record.
    Native,
    /// It arrived with the migration of this id.
    Arrived(Id),
    /// It arrived from a source that could not introduce itself.
    Received,
    /// An operator said so.
    Adopted,
}

impl Provenance {
    /// The record that says so; none for a disk that never moved.
    #[must_use]
    pub fn record(self) -> Option<Record> {
        match self {
            Self::Native => None,
            title => Some(Record::Ours(title)),
        }
    }
}

/// What is kept beside an image. No record at all means that it never moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An incomplete copy; `id` is none when its sender could not introduce itself.
    Incoming {
        /// Whose bytes it holds.
        id: Option<Id>,
    },
    /// Complete, and to be served from here.
    Ours(Provenance),
    /// Handed over, perhaps; only the destination knows.
    Departing {
        /// The migration that asked for it.
        id: Id,
        /// What it is if the handover never happened.
        before: Provenance,
        /// Who knows.
        to: RemoteAddress,
        /// The local address to ask from, if the operator chose one (`mirror --bind`).
        from: Option<IpAddr>,
    },
    /// Handed over; not to be served from here.
    Departed {
        /// The migration it left with.
        id: Id,
        /// Seconds since 1970.
        when: u64,
        /// Where it went.
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
            Self::Ours(title) => format!("ours title={}", encode_title(*title)),
            Self::Departing { id, before, to, from } => {
                let from = from.map_or_else(String::new, |ip| format!(" from={ip}"));
                format!("departing id={id} before={}{from} to={to}", encode_title(*before))
            }
            Self::Departed { id, when, to } => format!("departed id={id} when={when} to={to}"),
        };
        format!("{FAMILY} {} {body}\n", self.version())
    }

    fn version(&self) -> &'static str {
        match self {
            Self::Departing { from: Some(_), .. } => VERSION_WITH_FROM,
            _ => VERSION,
        }
    }

    /// The record that `bytes` are.
    ///
    /// # Errors
    /// Anything but exactly what [`Record::encode`] writes; the disk must then not be served.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRecord> {
        let garbage = || BadRecord::Garbage(excerpt(bytes));
        let line = std::str::from_utf8(bytes).ok().and_then(|text| text.strip_suffix('\n'));
        let rest = line.and_then(|line| line.strip_prefix(FAMILY)?.strip_prefix(' '));
        let (version, body) = rest.and_then(|rest| rest.split_once(' ')).ok_or_else(garbage)?;
        if ![VERSION, VERSION_WITH_FROM].contains(&version) {
            let plain = version.len() <= 9 && version.bytes().all(|b| b.is_ascii_digit());
            return Err(if plain { BadRecord::Version(version.to_owned()) } else { garbage() });
        }
        // One way to write it, one way to read it: a leading zero is as foreign as a typing error.
        let record = decode_body(body).filter(|record| record.encode().as_bytes() == bytes);
        // A later program may use the second version for more than this one does.
        record.ok_or_else(|| match version {
            VERSION => garbage(),
            version => BadRecord::Version(version.to_owned()),
        })
    }

    /// Whether this record still tells the truth once `next` should have taken its place: a disk
    /// that has departed is not served by a record that it is departing, either.
    pub(super) fn still_holds_after(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Departing { id: old, .. }, Self::Departed { id, .. }) => old == id,
            _ => false,
        }
    }

    /// The record's name, as messages and `status` call it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Incoming { .. } => "incoming",
            Self::Ours(_) => "ours",
            Self::Departing { .. } => "departing",
            Self::Departed { .. } => "departed",
        }
    }
}

fn encode_title(title: Provenance) -> String {
    match title {
        Provenance::Native => "native".to_owned(),
        Provenance::Adopted => "adopted".to_owned(),
        Provenance::Received => "received".to_owned(),
        Provenance::Arrived(id) => id.to_string(),
    }
}

fn decode_title(text: &str) -> Option<Provenance> {
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
        "ours" => decode_title(rest.strip_prefix("title=")?)?.record(),
        "departing" => {
            let (id, before, rest) = decode_leaving(rest, "before=")?;
            let (from, to) = match rest.strip_prefix("from=") {
                None => (None, rest),
                Some(rest) => {
                    let (ip, to) = rest.split_once(' ')?;
                    (Some(ip.parse().ok()?), to)
                }
            };
            Some(Record::Departing { id, before: decode_title(before)?, to: decode_to(to)?, from })
        }
        "departed" => {
            let (id, when, to) = decode_leaving(rest, "when=")?;
            Some(Record::Departed { id, when: when.parse().ok()?, to: decode_to(to)? })
        }
        _ => None,
    }
}

/// `id=… KEY… REST`.
fn decode_leaving<'a>(rest: &'a str, key: &str) -> Option<(Id, &'a str, &'a str)> {
    let (id, rest) = rest.strip_prefix("id=")?.split_once(' ')?;
    let (value, rest) = rest.strip_prefix(key)?.split_once(' ')?;
    Some((Id::parse(id)?, value, rest))
}

/// `to=…`: the place comes last, since it may hold spaces.
fn decode_to(to: &str) -> Option<RemoteAddress> {
    RemoteAddress::new(to.strip_prefix("to=")?)
}

/// The start of what was found, fit for one line of a message.
fn excerpt(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(60)];
    start.escape_ascii().to_string()
}

/// Why what was found beside the image is not a record of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadRecord {
    /// Written by a flexnbd that knows more than this one.
    Version(String),
    /// Not a record: its beginning, escaped.
    Garbage(String),
}

impl fmt::Display for BadRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => write!(
                f,
                "its ownership record has version {version}, in a form that this flexnbd does not \
                 know; use the flexnbd that wrote it"
            ),
            Self::Garbage(start) => write!(
                f,
                "its ownership record is damaged (it starts with \"{start}\"), so nobody can tell \
                 whose disk this is; if you know that this copy is the right one, run \
                 `flexnbd adopt --force`"
            ),
        }
    }
}

impl std::error::Error for BadRecord {}

/// Whether a disk may be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForServe {
    /// Yes; the title says what to answer a source that asks whether its disk has arrived.
    Serve(Provenance),
    /// Ask the place whether it has the disk of that id. If it says that it has not and never
    /// will, put `before` back durably, then serve; otherwise refuse with `unless`.
    Ask {
        /// The migration it was leaving with.
        id: Id,
        /// Whom to ask.
        to: RemoteAddress,
        /// The local address to ask from, if there is one on record.
        from: Option<IpAddr>,
        /// What to record when the answer is no.
        before: Provenance,
        /// What to say when the answer is anything else.
        unless: OwnershipRefusal,
    },
    /// No.
    Refuse(OwnershipRefusal),
}

/// What `serve` does with an image that has this record.
#[must_use]
pub fn for_serve(record: Option<&Record>) -> ForServe {
    match record {
        None => ForServe::Serve(Provenance::Native),
        Some(Record::Ours(title)) => ForServe::Serve(*title),
        Some(Record::Incoming { .. }) => ForServe::Refuse(OwnershipRefusal::Incomplete),
        Some(Record::Departed { id, when, to }) => {
            ForServe::Refuse(OwnershipRefusal::Departed { id: *id, when: *when, to: to.clone() })
        }
        Some(Record::Departing { id, before, to, from }) => ForServe::Ask {
            id: *id,
            to: to.clone(),
            from: *from,
            before: *before,
            unless: OwnershipRefusal::Departing { id: *id, to: to.clone() },
        },
    }
}

/// Whether a disk may be received into an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForListen {
    /// Yes, from the start.
    Accept {
        /// The migration whose incomplete copy lies there, if one does; none of a copy whose sender
        /// could not introduce itself.
        holds: Option<Option<Id>>,
    },
    /// It is here already: say so, and exit with success. None when it came without an id.
    AlreadyArrived(Option<Id>),
    /// No.
    Refuse(OwnershipRefusal),
}

/// What `listen` does with an image that has this record; `overwrite` is its option.
#[must_use]
pub fn for_listen(record: Option<&Record>, overwrite: bool) -> ForListen {
    match record {
        None | Some(Record::Departed { .. } | Record::Ours(Provenance::Native)) => {
            ForListen::Accept { holds: None }
        }
        Some(Record::Incoming { id }) => ForListen::Accept { holds: Some(*id) },
        Some(Record::Ours(_)) if overwrite => ForListen::Accept { holds: None },
        Some(Record::Ours(Provenance::Arrived(id))) => ForListen::AlreadyArrived(Some(*id)),
        Some(Record::Ours(Provenance::Received)) => ForListen::AlreadyArrived(None),
        Some(Record::Ours(Provenance::Adopted)) => ForListen::Refuse(OwnershipRefusal::Adopted),
        Some(Record::Departing { id, to, .. }) => {
            ForListen::Refuse(OwnershipRefusal::Departing { id: *id, to: to.clone() })
        }
    }
}

/// What `adopt` does with an image that has this record: the record to write, or why not.
///
/// # Errors
/// Without `force`, when another host may hold the disk or this copy is incomplete.
pub fn for_adopt(record: Option<&Record>, force: bool) -> Result<Record, OwnershipRefusal> {
    let refusal = match (record, for_serve(record)) {
        (Some(ours @ Record::Ours(_)), _) => return Ok(ours.clone()),
        (_, ForServe::Refuse(refusal) | ForServe::Ask { unless: refusal, .. }) => refusal,
        (_, ForServe::Serve(_)) => return Ok(Record::Ours(Provenance::Adopted)),
    };
    if force { Ok(Record::Ours(Provenance::Adopted)) } else { Err(refusal) }
}

/// Why a disk is not served, or not received into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnershipRefusal {
    /// The copy has not arrived as a whole.
    Incomplete,
    /// It may have been handed over.
    Departing {
        /// The migration it was leaving with.
        id: Id,
        /// Who knows.
        to: RemoteAddress,
    },
    /// It has been handed over.
    Departed {
        /// The migration it left with.
        id: Id,
        /// Seconds since 1970.
        when: u64,
        /// Where it is now.
        to: RemoteAddress,
    },
    /// An operator declared it the canonical copy.
    Adopted,
}

impl OwnershipRefusal {
    /// What to tell the operator about `image`: the record, the host, the command that resolves it.
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
