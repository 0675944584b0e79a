//! The largest numbers of clients, and which of them keeps a client out.
//! Pure.

use super::handshake_slots::SourceNetwork;
use thiserror::Error;

/// How many sessions of one network may begin in a minute before further ones are only counted, not logged. Far
/// more than begin when a host with many clients starts.
pub const SESSIONS_LOGGED_MAX: u64 = 300;

/// The largest numbers of clients beyond the handshake. Changing them disconnects no client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLimits {
    /// All clients (`--max-clients`).
    pub clients: usize,
    /// Those of one IPv4 address or one IPv6 /64 (`--max-clients-per-address`). Clients of unix sockets have
    /// no address.
    pub per_address: usize,
}

/// The limit that keeps a client out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum LimitReached {
    /// That of all clients.
    #[error("as many clients are connected as may be")]
    Clients,
    /// That of its address.
    #[error("as many clients of its address are connected as may be")]
    PerAddress,
}

impl ClientLimits {
    /// The same limit for all clients and for those of one address.
    #[must_use]
    pub fn of(clients: usize) -> Self {
        Self { clients, per_address: clients }
    }

    /// The limit that keeps out a client of `network` beside these established ones.
    pub(super) fn reached(
        &self,
        established: impl Iterator<Item = SourceNetwork>,
        network: SourceNetwork,
    ) -> Option<LimitReached> {
        let count =
            |(all, of_network), other| (all + 1, of_network + usize::from(other == network));
        let (all, of_network) = established.fold((0, 0), count);
        let is_local = matches!(network, SourceNetwork::User(_));
        if all >= self.clients {
            Some(LimitReached::Clients)
        } else if of_network >= self.per_address && !is_local {
            Some(LimitReached::PerAddress)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(last: u8) -> SourceNetwork {
        SourceNetwork::V4([192, 0, 2, last].into())
    }

    #[test]
    fn each_limit_keeps_out_the_next_client() {
        let limits = ClientLimits { clients: 4, per_address: 2 };
        let reached =
            |all: &[u8], next| limits.reached(all.iter().map(|of| network(*of)), network(next));
        assert_eq!(reached(&[1], 1), None);
        assert_eq!(reached(&[1, 1], 1), Some(LimitReached::PerAddress));
        assert_eq!(reached(&[1, 1], 2), None);
        assert_eq!(reached(&[1, 1, 2], 2), None);
        assert_eq!(reached(&[1, 1, 2, 2], 3), Some(LimitReached::Clients));
    }

    #[test]
    fn local_clients_have_no_address() {
        let (limits, user) =
            (ClientLimits { clients: 3, per_address: 1 }, SourceNetwork::User(Some(0)));
        assert_eq!(limits.reached([user; 2].into_iter(), user), None);
        assert_eq!(limits.reached([user; 3].into_iter(), user), Some(LimitReached::Clients));
    }
}
