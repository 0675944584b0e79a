//! Slots for connections in the handshake: which connection is evicted when all slots are used.
//! Pure: time is an argument, and the caller evicts.
//!
//! Any host can open connections and send nothing, so a silent connection must not keep its slot while
//! others wait to be accepted. Silent connections are evicted first: of the network with the most
//! slots, the oldest one. A connection that has sent an option has more time, and one that has
//! identified itself as the source of a migration keeps its slot.

use crate::net::Peer;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// How long a new connection has to send its first option before it can be evicted.
pub(super) const FIRST_OPTION_TIMEOUT: Duration = Duration::from_millis(20);
/// How long a connection has to send each further option before it can be evicted.
pub(super) const NEXT_OPTION_TIMEOUT: Duration = Duration::from_millis(250);
/// How many sources keep their slots.
pub(super) const SOURCES_MAX: usize = 4;

/// The origin of a connection, by which slots are shared out: an IPv4 address, an IPv6 /64, which is
/// what one host gets, or a local user.
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

/// The slot of one connection in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HandshakeSlot {
    pub(super) network: SourceNetwork,
    /// When the handshake began.
    pub(super) since: Instant,
    /// When the last whole option arrived.
    pub(super) last_option: Option<Instant>,
    /// The client is the source of a migration.
    pub(super) is_source: bool,
}

impl HandshakeSlot {
    pub(super) fn new(peer: &Peer, since: Instant) -> Self {
        Self { network: peer.into(), since, last_option: None, is_source: false }
    }

    /// When the connection can be evicted; `timeout` is the longest that it keeps its slot.
    fn evictable_at(&self, timeout: Duration) -> Instant {
        let next_option = self
            .last_option
            .map_or(self.since + FIRST_OPTION_TIMEOUT, |last| last + NEXT_OPTION_TIMEOUT);
        next_option.min(self.since + timeout)
    }
}

/// Whether another connection can have a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotAvailability {
    /// One is free.
    Free,
    /// One becomes free by evicting this connection.
    AfterEvicting(u64),
    /// At this time, unless a connection ends earlier.
    At(Instant),
    /// Not before a connection ends.
    None,
}

/// Whether one of `limit` slots is available beside the connections in `handshakes`, which are given
/// with their ids.
pub(super) fn availability<'a>(
    handshakes: impl Iterator<Item = (u64, &'a HandshakeSlot)>,
    limit: usize,
    timeout: Duration,
    now: Instant,
) -> SlotAvailability {
    let all: Vec<(u64, &HandshakeSlot)> = handshakes.collect();
    let mut sources: Vec<u64> =
        all.iter().filter(|(_, slot)| slot.is_source).map(|(id, _)| *id).collect();
    sources.sort_unstable();
    sources.truncate(SOURCES_MAX);
    // These do not count against the limit.
    let others: Vec<(u64, &HandshakeSlot)> =
        all.into_iter().filter(|(id, _)| !sources.contains(id)).collect();
    if others.len() < limit {
        return SlotAvailability::Free;
    }
    let mut by_network: BTreeMap<SourceNetwork, usize> = BTreeMap::new();
    for (_, slot) in &others {
        *by_network.entry(slot.network).or_default() += 1;
    }
    let evictable = others.iter().filter(|(_, slot)| slot.evictable_at(timeout) <= now);
    let first = evictable.min_by_key(|(id, slot)| {
        let of_network = by_network.get(&slot.network).copied().unwrap_or_default();
        let last = slot.last_option.unwrap_or(slot.since);
        (slot.is_source, slot.last_option.is_some(), Reverse(of_network), last, *id)
    });
    let next = || others.iter().map(|(_, slot)| slot.evictable_at(timeout)).min();
    match first {
        Some((id, _)) => SlotAvailability::AfterEvicting(*id),
        None => next().map_or(SlotAvailability::None, SlotAvailability::At),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 4;
    const TIMEOUT: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    fn peer(address: &str) -> Peer {
        Peer::Tcp((address.parse::<IpAddr>().unwrap(), 4711).into())
    }

    /// Connections of these addresses, one millisecond apart.
    fn connections(start: Instant, addresses: &[&str]) -> Vec<HandshakeSlot> {
        let at = |index: usize| start + MS * index as u32;
        addresses.iter().enumerate().map(|(i, a)| HandshakeSlot::new(&peer(a), at(i))).collect()
    }

    fn availability_among(slots: &[HandshakeSlot], now: Instant) -> SlotAvailability {
        availability((0..).zip(slots), LIMIT, TIMEOUT, now)
    }

    #[test]
    fn full_slots_open_after_the_first_option_timeout() {
        let start = Instant::now();
        let mut all = connections(start, &["192.0.2.1", "192.0.2.1", "192.0.2.1"]);
        assert_eq!(availability_among(&all, start), SlotAvailability::Free);
        all.push(HandshakeSlot::new(&peer("192.0.2.1"), start));
        assert_eq!(
            availability_among(&all, start),
            SlotAvailability::At(start + FIRST_OPTION_TIMEOUT)
        );
        assert_eq!(
            availability_among(&all, start + FIRST_OPTION_TIMEOUT),
            SlotAvailability::AfterEvicting(0)
        );
    }

    #[test]
    fn the_network_with_most_slots_is_evicted_first() {
        let start = Instant::now();
        let all = connections(start, &["192.0.2.1", "192.0.2.2", "192.0.2.2", "2001:db8::1"]);
        assert_eq!(availability_among(&all, start + TIMEOUT), SlotAvailability::AfterEvicting(1));
        let all =
            connections(start, &["192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::ffff:2"]);
        assert_eq!(
            availability_among(&all, start + TIMEOUT),
            SlotAvailability::AfterEvicting(1),
            "one /64 is one host"
        );
        let all = connections(start, &["192.0.2.1", "2001:db8::1", "192.0.2.1", "2001:db8:0:1::1"]);
        assert_eq!(availability_among(&all, start + TIMEOUT), SlotAvailability::AfterEvicting(0));
    }

    #[test]
    fn silent_connections_are_evicted_before_active_ones() {
        let start = Instant::now();
        let mut all = connections(start, &["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"]);
        for slot in &mut all[..3] {
            slot.last_option = Some(start + 10 * MS);
        }
        assert_eq!(availability_among(&all, start + 30 * MS), SlotAvailability::AfterEvicting(3));
        all[3].last_option = Some(start + 10 * MS);
        assert_eq!(
            availability_among(&all, start + 30 * MS),
            SlotAvailability::At(start + 10 * MS + NEXT_OPTION_TIMEOUT)
        );
        for slot in &mut all {
            slot.last_option = Some(start + TIMEOUT - MS);
        }
        assert_eq!(
            availability_among(&all, start + TIMEOUT),
            SlotAvailability::AfterEvicting(0),
            "options extend the handshake without limit"
        );
    }

    #[test]
    fn a_few_sources_keep_slots_of_their_own() {
        let start = Instant::now();
        let mut all = connections(start, &["192.0.2.1"; LIMIT + SOURCES_MAX]);
        let late = start + 60 * TIMEOUT;
        for source in &mut all[..SOURCES_MAX] {
            source.is_source = true;
        }
        assert_eq!(availability_among(&all[..all.len() - 1], late), SlotAvailability::Free);
        assert_eq!(
            availability_among(&all, late),
            SlotAvailability::AfterEvicting(SOURCES_MAX as u64)
        );
        for source in &mut all {
            source.is_source = true;
        }
        assert_eq!(
            availability_among(&all, late),
            SlotAvailability::AfterEvicting(SOURCES_MAX as u64),
            "too many sources keep their slots"
        );
    }

    #[test]
    fn local_users_are_distinguished() {
        let user = |uid| SourceNetwork::from(&Peer::Unix { pid: Some(1), uid });
        assert_ne!(user(Some(1)), user(Some(2)));
        assert_eq!(user(None).to_string(), "unix");
        assert_eq!(user(Some(7)).to_string(), "unix:uid=7");
        assert_eq!(SourceNetwork::from(&peer("2001:db8::7")).to_string(), "2001:db8::/64");
        assert_eq!(SourceNetwork::from(&peer("::ffff:192.0.2.1")).to_string(), "192.0.2.1");
    }

    proptest! {
        /// An honest client waits behind a backlog of silent connections, from few or many addresses.
        /// The acceptor accepts it in time, and does not evict it before its first option.
        #[test]
        fn silent_connections_delay_an_honest_client_only_briefly(
            silent in 0usize..1000,
            addresses in 1u8..20,
            limit in 1usize..64,
            latency in 0u64..15,
        ) {
            let start = Instant::now();
            let (mut now, mut accepted, mut next) = (start, Vec::<(u64, HandshakeSlot)>::new(), 0);
            while next <= silent as u64 {
                let from = if next == silent as u64 { 0 } else { 1 + (next % u64::from(addresses)) };
                match availability(accepted.iter().map(|(id, slot)| (*id, slot)), limit, TIMEOUT, now) {
                    SlotAvailability::Free => {}
                    SlotAvailability::AfterEvicting(id) => accepted.retain(|(other, _)| *other != id),
                    SlotAvailability::At(later) => { prop_assert!(later > now); now = later; continue }
                    SlotAvailability::None => prop_assert!(false, "no connection is a source"),
                }
                let slot = HandshakeSlot::new(&peer(&format!("192.0.2.{from}")), now);
                accepted.push((next, slot));
                next += 1;
            }
            let rounds = silent.div_ceil(limit) as u32;
            prop_assert!(now <= start + FIRST_OPTION_TIMEOUT * rounds);
            // More silent connections arrive before the client sends its option.
            let sent_at = now + MS * latency as u32;
            for more in next..next + 1000 {
                match availability(accepted.iter().map(|(id, slot)| (*id, slot)), limit, TIMEOUT, sent_at) {
                    SlotAvailability::AfterEvicting(id) => accepted.retain(|(other, _)| *other != id),
                    SlotAvailability::Free => {}
                    _ => break,
                }
                accepted.push((more, HandshakeSlot::new(&peer("192.0.2.1"), sent_at)));
            }
            prop_assert!(accepted.iter().any(|(id, _)| *id == silent as u64));
        }
    }
}
