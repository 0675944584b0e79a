//! Places in the handshake: which connection gives way when all are taken.
//! Pure: time is an argument, and it neither tells nor closes anybody.
//!
//! Anybody can open connections and say nothing. So a place is never kept by waiting: while others
//! wait at the door, connections that have said nothing give way first, those of the address that
//! holds the most places before others, the oldest of them first. One that has sent an option has
//! longer; and one that has introduced itself as the source of a migration keeps its place.

use crate::net::Peer;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// How long a new connection has its place to itself, to send its first option.
pub(super) const FIRST_OPTION: Duration = Duration::from_millis(20);
/// How long a connection may be quiet between two options.
pub(super) const QUIET: Duration = Duration::from_millis(250);
/// How many introduced connections keep their places.
pub(super) const INTRODUCED_MAX: usize = 4;

/// Where connections come from, as far as places are shared out: an IPv4 address, an IPv6 network of
/// 64 bits, which is what one host gets, or a local user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SourceNetwork {
    V4(Ipv4Addr),
    V6(u64),
    User(Option<u32>),
}

impl From<&Peer> for SourceNetwork {
    fn from(peer: &Peer) -> Self {
        match (peer.ip(), peer) {
            (Some(IpAddr::V4(address)), _) => Self::V4(address),
            (Some(IpAddr::V6(address)), _) => Self::V6((address.to_bits() >> 64) as u64),
            (None, Peer::Unix { uid, .. }) => Self::User(*uid),
            (None, Peer::Tcp(_)) => Self::User(None),
        }
    }
}

/// `192.0.2.1`, `2001:db8::/64` or `unix:uid=7`.
impl std::fmt::Display for SourceNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::V4(address) => address.fmt(f),
            Self::V6(network) => {
                let address = std::net::Ipv6Addr::from_bits(u128::from(*network) << 64);
                write!(f, "{address}/64")
            }
            Self::User(Some(uid)) => write!(f, "unix:uid={uid}"),
            Self::User(None) => f.write_str("unix"),
        }
    }
}

/// One connection in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SilentConnection {
    pub(super) quarter: SourceNetwork,
    /// When it came.
    pub(super) since: Instant,
    /// When it sent its last whole option.
    pub(super) spoke: Option<Instant>,
    /// It is the source of a migration, or asks about one.
    pub(super) introduced: bool,
}

impl SilentConnection {
    pub(super) fn new(peer: &Peer, since: Instant) -> Self {
        Self { quarter: peer.into(), since, spoke: None, introduced: false }
    }

    /// From when on it gives way; `patience` is the longest that it keeps its place from others.
    fn gives_way_at(&self, patience: Duration) -> Instant {
        let quiet = self.spoke.map_or(self.since + FIRST_OPTION, |spoke| spoke + QUIET);
        quiet.min(self.since + patience)
    }
}

/// Whether another connection can have a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotAvailability {
    /// There is one.
    Free,
    /// If this one gives way.
    Instead(u64),
    /// Not before this time, unless a place becomes free earlier.
    From(Instant),
    /// Not before a place becomes free.
    None,
}

/// Whether there is a place among `limit`, for the connections in `greeting`, by number.
pub(super) fn room<'a>(
    greeting: impl Iterator<Item = (u64, &'a SilentConnection)>,
    limit: usize,
    patience: Duration,
    now: Instant,
) -> SlotAvailability {
    let all: Vec<(u64, &SilentConnection)> = greeting.collect();
    let mut introduced: Vec<u64> =
        all.iter().filter(|(_, greeting)| greeting.introduced).map(|(id, _)| *id).collect();
    introduced.sort_unstable();
    introduced.truncate(INTRODUCED_MAX);
    // These have places of their own.
    let others: Vec<(u64, &SilentConnection)> =
        all.into_iter().filter(|(id, _)| !introduced.contains(id)).collect();
    if others.len() < limit {
        return SlotAvailability::Free;
    }
    let mut held: BTreeMap<SourceNetwork, usize> = BTreeMap::new();
    for (_, greeting) in &others {
        *held.entry(greeting.quarter).or_default() += 1;
    }
    let due = others.iter().filter(|(_, greeting)| greeting.gives_way_at(patience) <= now);
    let first = due.min_by_key(|(id, greeting)| {
        let held = held.get(&greeting.quarter).copied().unwrap_or_default();
        let last = greeting.spoke.unwrap_or(greeting.since);
        (greeting.introduced, greeting.spoke.is_some(), Reverse(held), last, *id)
    });
    let next = || others.iter().map(|(_, greeting)| greeting.gives_way_at(patience)).min();
    match first {
        Some((id, _)) => SlotAvailability::Instead(*id),
        None => next().map_or(SlotAvailability::None, SlotAvailability::From),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 4;
    const PATIENCE: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    fn peer(address: &str) -> Peer {
        Peer::Tcp((address.parse::<IpAddr>().unwrap(), 4711).into())
    }

    /// Connections of these addresses that came one millisecond after another.
    fn came(start: Instant, addresses: &[&str]) -> Vec<SilentConnection> {
        let at = |index: usize| start + MS * index as u32;
        addresses.iter().enumerate().map(|(i, a)| SilentConnection::new(&peer(a), at(i))).collect()
    }

    fn room_among(greeting: &[SilentConnection], now: Instant) -> SlotAvailability {
        room((0..).zip(greeting), LIMIT, PATIENCE, now)
    }

    #[test]
    fn a_full_queue_has_no_room_until_somebody_was_quiet_for_long_enough() {
        let start = Instant::now();
        let mut all = came(start, &["192.0.2.1", "192.0.2.1", "192.0.2.1"]);
        assert_eq!(room_among(&all, start), SlotAvailability::Free);
        all.push(SilentConnection::new(&peer("192.0.2.1"), start));
        assert_eq!(room_among(&all, start), SlotAvailability::From(start + FIRST_OPTION));
        assert_eq!(room_among(&all, start + FIRST_OPTION), SlotAvailability::Instead(0));
    }

    #[test]
    fn the_address_with_the_most_places_gives_way_first() {
        let start = Instant::now();
        let all = came(start, &["192.0.2.1", "192.0.2.2", "192.0.2.2", "2001:db8::1"]);
        assert_eq!(room_among(&all, start + PATIENCE), SlotAvailability::Instead(1));
        let all = came(start, &["192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::ffff:2"]);
        assert_eq!(
            room_among(&all, start + PATIENCE),
            SlotAvailability::Instead(1),
            "one /64 is one host"
        );
        let all = came(start, &["192.0.2.1", "2001:db8::1", "192.0.2.1", "2001:db8:0:1::1"]);
        assert_eq!(room_among(&all, start + PATIENCE), SlotAvailability::Instead(0));
    }

    #[test]
    fn the_silent_give_way_before_those_that_spoke() {
        let start = Instant::now();
        let mut all = came(start, &["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"]);
        for spoken in &mut all[..3] {
            spoken.spoke = Some(start + 10 * MS);
        }
        assert_eq!(room_among(&all, start + 30 * MS), SlotAvailability::Instead(3));
        all[3].spoke = Some(start + 10 * MS);
        assert_eq!(
            room_among(&all, start + 30 * MS),
            SlotAvailability::From(start + 10 * MS + QUIET)
        );
        for spoken in &mut all {
            spoken.spoke = Some(start + PATIENCE - MS);
        }
        assert_eq!(
            room_among(&all, start + PATIENCE),
            SlotAvailability::Instead(0),
            "nobody talks for ever"
        );
    }

    #[test]
    fn introduced_sources_keep_their_places_and_take_none_from_others() {
        let start = Instant::now();
        let mut all = came(start, &["192.0.2.1"; LIMIT + INTRODUCED_MAX]);
        let late = start + 60 * PATIENCE;
        for source in &mut all[..INTRODUCED_MAX] {
            source.introduced = true;
        }
        assert_eq!(room_among(&all[..all.len() - 1], late), SlotAvailability::Free);
        assert_eq!(room_among(&all, late), SlotAvailability::Instead(INTRODUCED_MAX as u64));
        for source in &mut all {
            source.introduced = true;
        }
        assert_eq!(
            room_among(&all, late),
            SlotAvailability::Instead(INTRODUCED_MAX as u64),
            "not everybody"
        );
    }

    #[test]
    fn local_users_are_told_apart() {
        let user = |uid| SourceNetwork::from(&Peer::Unix { pid: Some(1), uid });
        assert_ne!(user(Some(1)), user(Some(2)));
        assert_eq!(user(None).to_string(), "unix");
        assert_eq!(user(Some(7)).to_string(), "unix:uid=7");
        assert_eq!(SourceNetwork::from(&peer("2001:db8::7")).to_string(), "2001:db8::/64");
        assert_eq!(SourceNetwork::from(&peer("::ffff:192.0.2.1")).to_string(), "192.0.2.1");
    }

    proptest! {
        /// A simulated door: silent connections wait in a row of any length, from few or many
        /// addresses; the honest one behind them is accepted in time and then left alone until it
        /// has spoken.
        #[test]
        fn an_honest_client_behind_silent_ones_is_let_in_soon(
            silent in 0usize..1000,
            addresses in 1u8..20,
            limit in 1usize..64,
            latency in 0u64..15,
        ) {
            let start = Instant::now();
            let (mut now, mut inside, mut next) = (start, Vec::<(u64, SilentConnection)>::new(), 0);
            while next <= silent as u64 {
                let from = if next == silent as u64 { 0 } else { 1 + (next % u64::from(addresses)) };
                match room(inside.iter().map(|(id, g)| (*id, g)), limit, PATIENCE, now) {
                    SlotAvailability::Free => {}
                    SlotAvailability::Instead(id) => inside.retain(|(other, _)| *other != id),
                    SlotAvailability::From(later) => { prop_assert!(later > now); now = later; continue }
                    SlotAvailability::None => prop_assert!(false, "nobody is introduced"),
                }
                let greeting = SilentConnection::new(&peer(&format!("192.0.2.{from}")), now);
                inside.push((next, greeting));
                next += 1;
            }
            let rounds = silent.div_ceil(limit) as u32;
            prop_assert!(now <= start + FIRST_OPTION * rounds);
            // More silent ones come while the honest one thinks.
            let spoken = now + MS * latency as u32;
            for more in next..next + 1000 {
                match room(inside.iter().map(|(id, g)| (*id, g)), limit, PATIENCE, spoken) {
                    SlotAvailability::Instead(id) => inside.retain(|(other, _)| *other != id),
                    SlotAvailability::Free => {}
                    _ => break,
                }
                inside.push((more, SilentConnection::new(&peer("192.0.2.1"), spoken)));
            }
            prop_assert!(inside.iter().any(|(id, _)| *id == silent as u64));
        }
    }
}
