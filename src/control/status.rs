//! The state of a server: [`Status`] ⇄ the line of `key=value` pairs in the reply to `status`.
//! Pure.
//!
//! No key or value holds a space: white space, control characters and `%` (and `=` in a key) are
//! percent-encoded, as `%` and two hexadecimal digits for each byte. A reader without decoding can
//! still split at spaces and at the first `=`.

use std::fmt;

/// Key of [`Status::extra`]: the stage of the running migration, one word.
pub const MIGRATION_STAGE: &str = "migration_stage";
/// Key of [`Status::extra`]: the completed passes of the running migration.
pub const MIGRATION_PASSES: &str = "migration_passes";
/// Key of [`Status::extra`]: why the last migration failed, until another one starts.
pub const MIGRATION_FAILED: &str = "migration_failed";
/// Key of [`Status::extra`]: the obstacle of the running migration, one word; absent if it
/// progresses.
pub const MIGRATION_WAITING: &str = "migration_waiting";
/// Key of [`Status::extra`]: the obstacle as a sentence.
pub const MIGRATION_REASON: &str = "migration_reason";
/// Key of [`Status::extra`]: the name of the image's ownership record, or `none`.
pub const OWNERSHIP: &str = "ownership";
/// Key of [`Status::extra`]: the time of the first failed flush in seconds since 1970, if one has failed.
pub const FLUSH_FAILED: &str = "flush_failed";

/// Key of [`Status::extra`]: the id of the disk, 32 hexadecimal digits; absent if it has none, or it is not known.
pub const DISK_ID: &str = "disk_id";
/// Key of [`Status::extra`]: the address of the upstream that a proxy is or was last connected to.
pub const UPSTREAM: &str = "upstream";
/// Key of [`Status::extra`]: whether the proxy is connected to it.
pub const UPSTREAM_CONNECTED: &str = "upstream_connected";
/// Key of [`Status::extra`]: seconds since the connection to the upstream was made or lost.
pub const UPSTREAM_SECONDS: &str = "upstream_seconds";
/// Key of [`Status::extra`]: how often the proxy has connected again after a loss.
pub const UPSTREAM_RECONNECTS: &str = "upstream_reconnects";
/// Key of [`Status::extra`]: bytes that clients have written and the upstream has not flushed yet.
pub const UNFLUSHED_BYTES: &str = "unflushed_bytes";
/// Key of [`Status::extra`]: the server that has the disk now, to which the requests of clients are passed on.
pub const RELAYING_TO: &str = "relaying_to";
/// Key of [`Status::extra`]: seconds until the clients that are left are disconnected; absent without a limit.
pub const RELAY_SECONDS_LEFT: &str = "relay_seconds_left";
/// Key of [`Status::extra`]: bytes of memory that payloads of requests take, beyond those of each client.
pub const PAYLOAD_BYTES: &str = "payload_bytes";
/// Key of [`Status::extra`]: the limit of these.
pub const PAYLOAD_BYTES_MAX: &str = "payload_bytes_max";
/// Key of [`Status::extra`]: why the proxy is not connected; absent while it is.
pub const UPSTREAM_ERROR: &str = "upstream_error";

/// Key of [`Status::extra`]: what confines the process, as one word.
pub const SANDBOX: &str = "sandbox";

/// The reply to `status`, in the order of its keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The server's process id.
    pub pid: u32,
    /// Size of the disk, in bytes.
    pub size: u64,
    /// Whether new clients are accepted.
    pub clients_allowed: bool,
    /// How many clients are connected.
    pub num_clients: u64,
    /// Whether this server owns the disk: false for `listen` until the disk has arrived.
    pub has_control: bool,
    /// The running migration; encoded with `is_mirroring`, which says whether there is one.
    pub migration: Option<Migration>,
    /// Newer keys with their values, encoded in this order after all others.
    pub extra: Vec<(String, String)>,
}

/// The progress of a running migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Migration {
    /// Bytes per second.
    pub speed: u64,
    /// Seconds since it started.
    pub duration: u64,
    /// Estimated seconds until it ends; 0 if unknown.
    pub seconds_left: u64,
    /// Bytes still to send.
    pub bytes_left: u64,
    /// The speed limit in bytes per second, if there is one.
    pub speed_limit: Option<u64>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_mirroring = self.migration.is_some();
        write!(f, "pid={} size={} is_mirroring={is_mirroring}", self.pid, self.size)?;
        write!(f, " clients_allowed={}", self.clients_allowed)?;
        write!(f, " num_clients={} has_control={}", self.num_clients, self.has_control)?;
        if let Some(migration) = &self.migration {
            write!(f, " {migration}")?;
        }
        for (key, value) in &self.extra {
            write!(f, " {}", pair(key, value))?;
        }
        Ok(())
    }
}

impl fmt::Display for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "migration_speed={} migration_duration={}", self.speed, self.duration)?;
        write!(f, " migration_seconds_left={}", self.seconds_left)?;
        write!(f, " migration_bytes_left={}", self.bytes_left)?;
        self.speed_limit.map_or(Ok(()), |limit| write!(f, " migration_speed_limit={limit}"))
    }
}

impl Status {
    /// The value of a newer key, if the server sent it.
    #[must_use]
    pub fn extra(&self, key: &str) -> Option<&str> {
        self.extra.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Parses a server's line. Keys may come in any order; unknown ones go to [`Status::extra`].
    ///
    /// # Errors
    ///
    /// A word is not a pair, a known key is missing, or its value has the wrong type.
    pub fn from_line(line: &str) -> Result<Self, StatusError> {
        let mut pairs = Pairs(pairs(line)?);
        let is_mirroring: bool = pairs.take("is_mirroring")?;
        Ok(Self {
            pid: pairs.take("pid")?,
            size: pairs.take("size")?,
            clients_allowed: pairs.take("clients_allowed")?,
            num_clients: pairs.take("num_clients")?,
            has_control: pairs.take("has_control")?,
            migration: is_mirroring.then(|| Migration::take(&mut pairs)).transpose()?,
            extra: pairs.0,
        })
    }
}

impl Migration {
    fn take(pairs: &mut Pairs) -> Result<Self, StatusError> {
        Ok(Self {
            speed: pairs.take("migration_speed")?,
            duration: pairs.take("migration_duration")?,
            seconds_left: pairs.take("migration_seconds_left")?,
            bytes_left: pairs.take("migration_bytes_left")?,
            speed_limit: pairs.take_optional("migration_speed_limit")?,
        })
    }
}

/// Encodes pairs as a line, in this order.
#[must_use]
pub fn line(pairs: &[(&str, String)]) -> String {
    pairs.iter().map(|(key, value)| pair(key, value)).collect::<Vec<_>>().join(" ")
}

fn pair(key: &str, value: &str) -> String {
    format!("{}={}", escaped(key, true), escaped(value, false))
}

/// Parses a line into pairs, in its order.
///
/// # Errors
///
/// [`StatusError::NotAPair`] for a word without `=`.
pub fn pairs(line: &str) -> Result<Vec<(String, String)>, StatusError> {
    line.split_ascii_whitespace()
        .map(|word| match word.split_once('=') {
            Some((key, value)) => Ok((unescaped(key), unescaped(value))),
            None => Err(StatusError::NotAPair(word.to_owned())),
        })
        .collect()
}

/// Converts a server's line to a JSON object with the keys in the same order. Whole and decimal
/// numbers become numbers, `true` and `false` booleans, all other values strings. Of a repeated key
/// the first is kept.
///
/// # Errors
///
/// [`StatusError::NotAPair`] for a word without `=`.
pub fn to_json(line: &str) -> Result<String, StatusError> {
    let pairs = pairs(line)?;
    let mut members: Vec<String> = Vec::new();
    for (position, (key, value)) in pairs.iter().enumerate() {
        if !pairs[..position].iter().any(|(earlier, _)| earlier == key) {
            members.push(format!("{}:{}", json_string(key), json_value(value)));
        }
    }
    Ok(format!("{{{}}}", members.join(",")))
}

fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn json_value(text: &str) -> String {
    let is_bare = text == "true" || text == "false" || is_number(text);
    if is_bare { text.to_owned() } else { json_string(text) }
}

/// Whether the text is certainly a number: identifiers such as `007`, `1e5` or 32 digits are not.
fn is_number(text: &str) -> bool {
    let is_whole = |text: &str| text.parse().is_ok_and(|number: u64| number.to_string() == text);
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    match unsigned.split_once('.') {
        None => is_whole(unsigned),
        Some((whole, decimals)) => {
            is_whole(whole)
                && !decimals.is_empty()
                && decimals.bytes().all(|digit| digit.is_ascii_digit())
        }
    }
}

fn escaped(text: &str, is_key: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_whitespace() || c.is_control() || c == '%' || (is_key && c == '=') {
            let mut utf8 = [0; 4];
            out.extend(c.encode_utf8(&mut utf8).bytes().map(|byte| format!("%{byte:02X}")));
        } else {
            out.push(c);
        }
    }
    out
}

/// Decodes percent-encoding. A `%` without two hexadecimal digits after it stands for itself.
fn unescaped(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        match (first, escaped_byte(tail)) {
            (b'%', Some(byte)) => {
                out.push(byte);
                rest = &tail[2..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn escaped_byte(digits: &[u8]) -> Option<u8> {
    let digit = |n: usize| digits.get(n).and_then(|&digit| char::from(digit).to_digit(16));
    u8::try_from(digit(0)? * 16 + digit(1)?).ok()
}

/// The pairs of a line that have not been taken yet.
pub(super) struct Pairs(pub(super) Vec<(String, String)>);

impl Pairs {
    pub(super) fn take<T: std::str::FromStr>(
        &mut self,
        key: &'static str,
    ) -> Result<T, StatusError> {
        self.take_optional(key)?.ok_or(StatusError::Missing(key))
    }

    pub(super) fn take_optional<T: std::str::FromStr>(
        &mut self,
        key: &'static str,
    ) -> Result<Option<T>, StatusError> {
        let Some(position) = self.0.iter().position(|(name, _)| name == key) else {
            return Ok(None);
        };
        let (_, value) = self.0.remove(position);
        value.parse().map(Some).map_err(|_| StatusError::BadValue { key, value })
    }
}

/// Why a line is not a status or summary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatusError {
    /// This word has no `=`.
    #[error("invalid reply from the server: {0:?} is not key=value")]
    NotAPair(String),
    /// This key is missing.
    #[error("invalid reply from the server: {0} is missing")]
    Missing(&'static str),
    /// The value has the wrong type.
    #[error("invalid reply from the server: {key} cannot be {value:?}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn serving() -> Status {
        Status {
            pid: 9635,
            size: 4096,
            clients_allowed: true,
            num_clients: 2,
            has_control: true,
            ..Status::default()
        }
    }

    #[test]
    fn keys_have_a_fixed_order() {
        let line = "pid=9635 size=4096 is_mirroring=false clients_allowed=true num_clients=2 \
                    has_control=true";
        assert_eq!(serving().to_string(), line);
    }

    #[test]
    fn a_migration_adds_its_progress_and_its_limit() {
        let migration = Migration { speed: 5, duration: 6, seconds_left: 7, ..Default::default() };
        let mut status = Status { migration: Some(migration), ..serving() };
        let line = "pid=9635 size=4096 is_mirroring=true clients_allowed=true num_clients=2 \
                    has_control=true migration_speed=5 migration_duration=6 \
                    migration_seconds_left=7 migration_bytes_left=0";
        assert_eq!(status.to_string(), line);
        status.migration.as_mut().unwrap().speed_limit = Some(9);
        status.extra.push(("export".into(), "a b".into()));
        assert_eq!(status.to_string(), format!("{line} migration_speed_limit=9 export=a%20b"));
    }

    #[test]
    fn json_keeps_order_and_types() {
        assert_eq!(
            to_json("pid=9 is_mirroring=false rate=1.5 off=-3 name=a%20\"b\" id=007 pid=10")
                .unwrap(),
            r#"{"pid":9,"is_mirroring":false,"rate":1.5,"off":-3,"name":"a \"b\"","id":"007"}"#
        );
        for text in ["", "1e5", ".5", "5.", "-", "--1", "+1", "18446744073709551616", "0x1"] {
            assert_eq!(json_value(text), format!("{text:?}"), "{text}");
        }
    }

    #[test]
    fn parsing_reports_what_is_wrong() {
        assert_eq!(Status::from_line("pid"), Err(StatusError::NotAPair("pid".into())));
        assert_eq!(Status::from_line("pid=1"), Err(StatusError::Missing("is_mirroring")));
        let bad = StatusError::BadValue { key: "is_mirroring", value: "yes".into() };
        assert_eq!(Status::from_line("is_mirroring=yes"), Err(bad));
    }

    #[test]
    fn a_percent_sign_in_a_value_is_encoded() {
        let status = Status { extra: vec![("done".into(), "100%20".into())], ..serving() };
        assert!(status.to_string().ends_with(" done=100%2520"));
        assert_eq!(Status::from_line(&status.to_string()), Ok(status));
    }

    #[test]
    fn percent_sign_without_digits_is_kept() {
        assert_eq!(
            pairs("a=100% b=%zz c=%4").unwrap(),
            [
                ("a".to_owned(), "100%".to_owned()),
                ("b".to_owned(), "%zz".to_owned()),
                ("c".to_owned(), "%4".to_owned()),
            ]
        );
    }

    prop_compose! {
        fn any_migration()(
            speed: u64, duration: u64, seconds_left: u64, bytes_left: u64, limit: Option<u64>,
        ) -> Migration {
            Migration { speed, duration, seconds_left, bytes_left, speed_limit: limit }
        }
    }

    prop_compose! {
        fn any_status()(
            pid: u32, size: u64, clients_allowed: bool, num_clients: u64, has_control: bool,
            migration in proptest::option::of(any_migration()),
            extra in proptest::collection::vec(("(?s:.){0,8}", "(?s:.){0,8}"), 0..4),
        ) -> Status {
            // The prefix keeps random keys apart from known ones.
            let extra = extra.into_iter().map(|(key, value)| (format!("x{key}"), value)).collect();
            Status { pid, size, clients_allowed, num_clients, has_control, migration, extra }
        }
    }

    proptest! {
        #[test]
        fn every_status_round_trips(status in any_status()) {
            prop_assert_eq!(Status::from_line(&status.to_string()), Ok(status));
        }

        #[test]
        fn no_key_or_value_holds_white_space(status in any_status()) {
            let line = status.to_string();
            prop_assert!(line.split(' ').all(|word| word.contains('=')));
            prop_assert!(!line.chars().any(|c| c != ' ' && (c.is_whitespace() || c.is_control())));
        }

        #[test]
        fn json_has_the_same_values(status in any_status()) {
            let json = to_json(&status.to_string()).unwrap();
            let object: serde_json::Value = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(&object["size"], &serde_json::json!(status.size));
            prop_assert_eq!(&object["has_control"], &serde_json::json!(status.has_control));
        }

        #[test]
        fn parsing_never_panics(line in "(?s:.){0,32}|([a%= ]|%[0-9a-f]){0,16}") {
            let _ = (Status::from_line(&line), to_json(&line));
        }
    }
}
