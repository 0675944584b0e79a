//! Connects to a target, and checks that it has the disk.
//! Tries once.

use super::connection::UpstreamConnection;
use super::options::{TargetError, UpstreamOptions, UpstreamTarget};
use super::terms::ServerTerms;
use crate::client::shake_hands;
use crate::nbd::handshake::client::ClientOffer;
use crate::nbd::introduction::Introduction;
use crate::nbd::wire::TransmissionFlags;
use crate::net::{Address, Stream, connect, connect_first, resolve_within};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Longest time for a connection or a handshake. A host that is down should not keep clients waiting for
/// long if the disk has moved to another one.
const ATTEMPT_TIMEOUT_MAX: Duration = Duration::from_secs(5);

/// Longest time for a further connection or its handshake. Some servers that limit their clients leave those
/// beyond the limit waiting, while all requests wait for us.
const FURTHER_TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// Connections to one server, ready for requests.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) terms: ServerTerms,
    pub(super) connections: Vec<Arc<UpstreamConnection>>,
}

/// Connects to a target: once, and more often if the server has `NBD_FLAG_CAN_MULTI_CONN` and accepts more
/// connections. `promised` are the terms that the server has to keep; `generation` grows with every loss
/// ([`Introduction`]).
///
/// # Errors
/// When the target does not give us the disk.
pub(super) fn connect_to(
    target: &UpstreamTarget,
    options: &UpstreamOptions,
    promises: (u64, Option<&ServerTerms>),
) -> Result<Connected, TargetError> {
    let timeout = options.timeout.min(ATTEMPT_TIMEOUT_MAX);
    let addresses = resolve_within(&target.remote, timeout).map_err(TargetError::Connect)?;
    connect_to_any(&addresses, target, options, promises)
}

/// Connects to the first of the target's addresses that has the disk. One that does not answer does not keep the
/// next ones waiting.
pub(super) fn connect_to_any(
    addresses: &[Address],
    target: &UpstreamTarget,
    options: &UpstreamOptions,
    (generation, promised): (u64, Option<&ServerTerms>),
) -> Result<Connected, TargetError> {
    let timeout = options.timeout.min(ATTEMPT_TIMEOUT_MAX);
    let (mut failure, mut untried) = (None, addresses.to_vec());
    loop {
        let mut failed = Vec::new();
        let connected = connect_first(&untried, options.bind, timeout, |number, error| {
            failed.push(number);
            failure.get_or_insert(TargetError::Connect(error));
        });
        let Some((number, stream)) = connected else { break };
        let address = untried[number].clone();
        let mut tried = failed.into_iter().chain([number]).collect::<BTreeSet<_>>();
        while let Some(number) = tried.pop_last() {
            untried.remove(number);
        }
        let opened = introduce(stream, target, options, (generation, timeout));
        let opened = opened.and_then(|(terms, stream)| {
            terms.check()?;
            promised.map_or(Ok(()), |promised| promised.check_replacement(&terms))?;
            Ok((terms, stream))
        });
        let (terms, stream) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                failure.get_or_insert(error);
                continue;
            }
        };
        let mut streams = vec![stream];
        let timeout = options.timeout.min(FURTHER_TIMEOUT_MAX);
        while terms.has(TransmissionFlags::CAN_MULTI_CONN) && streams.len() < options.connections {
            match open(&address, target, options, (generation, timeout)) {
                Ok((same, stream)) if terms.is_same(&same) => streams.push(stream),
                // One is enough; the server may limit its clients.
                _ => break,
            }
        }
        let connection = |(number, stream): (usize, Stream)| {
            UpstreamConnection::new(stream, number, &terms).map(Arc::new)
        };
        let connections = streams.into_iter().enumerate().map(connection);
        let connections = connections.collect::<Result<_, _>>().map_err(TargetError::Connect)?;
        return Ok(Connected { terms, connections });
    }
    let none = || TargetError::Connect(io::Error::other("its name has no address"));
    Err(failure.unwrap_or_else(none))
}

fn open(
    address: &Address,
    target: &UpstreamTarget,
    options: &UpstreamOptions,
    (generation, timeout): (u64, Duration),
) -> Result<(ServerTerms, Stream), TargetError> {
    let stream = connect(address, options.bind, timeout).map_err(TargetError::Connect)?;
    introduce(stream, target, options, (generation, timeout))
}

/// Does the handshake.
fn introduce(
    stream: Stream,
    target: &UpstreamTarget,
    options: &UpstreamOptions,
    (generation, timeout): (u64, Duration),
) -> Result<(ServerTerms, Stream), TargetError> {
    let tls = match &options.tls {
        Some(slot) => slot.get().for_remote(&target.tls, &target.remote)?,
        None => None,
    };
    // Setting an option fails only on a broken connection, which the handshake detects.
    let _ = stream.tune();
    let offer = ClientOffer {
        export: target.export.clone(),
        structured: true,
        extended: true,
        allocation: true,
        private: options.client.map(|client| Introduction { client, generation }.encode()),
        ..ClientOffer::default()
    };
    let outcome = shake_hands(stream, offer, tls.as_ref(), timeout);
    let disk_id = outcome.private_reply.as_deref().and_then(Introduction::disk_id_in);
    let (stream, agreement) = outcome.agreed?;
    Ok((ServerTerms::of(&agreement, disk_id), stream))
}
