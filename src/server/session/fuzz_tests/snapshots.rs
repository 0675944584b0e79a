//! Arbitrary snapshots of sessions. A decoded snapshot is encoded again to the same sessions; a session that
//! can be restored either fits the disk or is refused, and then does all its work without a fault of ours.

use super::disk::{DiskTraits, FuzzDisk, IdleNotifier, clocks};
use crate::disk::Disk;
use crate::nbd::handshake::server::Export;
use crate::nbd::handshake::{BlockSizes, TlsOffer};
use crate::nbd::wire::ErrorCode;
use crate::nbd::wire::TransmissionFlags;
use crate::server::export_policy::{ExportPolicy, SessionId, SessionsView};
use crate::server::export_policy::{GoReply, HandoverReply, ProbeReply};
use crate::server::payload_memory::PayloadMemory;
use crate::server::session::engine::{Blocked, Engine};
use crate::server::session::handshake::{Handshake, HandshakeBlocked, Negotiated};
use crate::server::session::phase::{SessionContext, SessionPhase};
use crate::server::settings::Style;
use crate::server::snapshot::{ExportFingerprint, SessionSnapshot, decode, encode};
use crate::server::stop_request::StopRequest;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: u64 = 20_000;
/// Most turns of a restored session: each consumes a request, sends replies, or completes an operation.
const TURNS_MAX: usize = 100_000;

#[derive(Debug)]
struct RefuseAll;

impl ExportPolicy for RefuseAll {
    fn probe(&self, _: SessionId, _: &[u8], _: &dyn SessionsView) -> ProbeReply {
        ProbeReply::Answer { data: Vec::new(), displaced: Vec::new(), is_source: false }
    }
}

fn export() -> Export {
    Export {
        name: "disk".to_owned(),
        description: String::new(),
        size: SIZE,
        flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 },
    }
}

/// A snapshot. An even first byte precedes a whole snapshot, an odd one the MessagePack of one session.
pub(crate) fn snapshot(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let fingerprint = ExportFingerprint::of(&export(), Style::Newstyle, None);
    let sessions = if choice & 1 == 0 {
        decode(bytes, &fingerprint)
    } else {
        let Ok(session) = rmp_serde::from_slice::<SessionSnapshot>(bytes) else { return };
        encode(fingerprint.clone(), vec![session]).and_then(|all| decode(&all, &fingerprint))
    };
    let Ok(sessions) = sessions else { return };
    let again = encode(fingerprint.clone(), sessions.clone());
    let again = again.and_then(|bytes| decode(&bytes, &fingerprint));
    assert_eq!(again.as_ref(), Ok(&sessions));
    for session in sessions {
        restore(session);
    }
}

fn restore(snapshot: SessionSnapshot) {
    let Ok(notifier) = IdleNotifier::new() else { return };
    let traits = DiskTraits {
        size: SIZE as usize,
        is_cached: snapshot.session & 1 == 0,
        is_cold: true,
        reverses: true,
        is_zeroing_slow: false,
        keeps_trimmed: false,
        extents_wait: true,
        fault_interval: 0,
    };
    let image = FuzzDisk::new(traits);
    let (disk, export) = (Disk::new(Box::new(image.clone()), false), export());
    disk.forbid_threads();
    let (id, policy) = (snapshot.session, RefuseAll);
    let context = SessionContext {
        disk: &disk,
        policy: &policy,
        export: &export,
        style: Style::Newstyle,
        tls: TlsOffer::Unsupported,
        notifier: Arc::new(notifier),
        payloads: &PayloadMemory::new(1 << 20),
        client: (String::new(), id),
        handshake_deadline: Instant::now() + Duration::from_secs(3600),
        clocks: clocks(Duration::ZERO),
    };
    let Some(phase) = SessionPhase::restore(&context, snapshot.clone()) else { return };
    assert!(fits(&serde_json::to_value(&snapshot).unwrap_or_default()), "{snapshot:?}");
    // A session that has done nothing is saved as it was restored.
    let Ok(saved) = phase.save(id) else { return };
    assert_eq!((saved.session, &saved.inbox), (id, &snapshot.inbox));
    let again =
        SessionPhase::restore(&context, saved.clone()).and_then(|again| again.save(id).ok());
    assert_eq!(again.as_ref(), Some(&saved));
    let Some(mut phase) = SessionPhase::restore(&context, saved) else { return };
    for _ in 0..TURNS_MAX {
        let is_over = match &mut phase {
            SessionPhase::Handshake(handshake) => negotiate(handshake),
            SessionPhase::Transmission(engine) => transmit(engine, &image),
        };
        match is_over {
            Ok(None) => {}
            Ok(Some(negotiated)) => phase = phase.into_transmission(&context, negotiated),
            Err(()) => return,
        }
    }
    let waits_for_client = false;
    assert!(waits_for_client, "it works for ever: {phase:?}");
}

/// Whether every range in a snapshot lies within the disk. Checked on another form of the snapshot, so that it
/// does not depend on the code that checks the ranges.
fn fits(value: &serde_json::Value) -> bool {
    let number = |key| value.get(key).and_then(serde_json::Value::as_u64);
    let is_outside = match (number("offset"), number("length")) {
        (Some(offset), Some(length)) => offset.checked_add(length).is_none_or(|end| end > SIZE),
        _ => false,
    };
    let members = value.as_object().into_iter().flat_map(|members| members.values());
    let elements = value.as_array().into_iter().flatten();
    !is_outside && members.chain(elements).all(fits)
}

/// One turn of a handshake; an error if it ends, or waits for its client.
fn negotiate(handshake: &mut Handshake) -> Result<Option<Negotiated>, ()> {
    match handshake.advance(StopRequest::Serve) {
        Ok(HandshakeBlocked::Output) => drop(handshake.tx.take(usize::MAX)),
        Ok(HandshakeBlocked::Probe(_)) => {
            let (data, displaced, is_source) = (Vec::new(), Vec::new(), false);
            handshake.on_probe_reply(ProbeReply::Answer { data, displaced, is_source });
        }
        Ok(HandshakeBlocked::Admission { .. }) => handshake.on_go_reply(GoReply::Allow(Vec::new())),
        Ok(HandshakeBlocked::Complete(negotiated)) => return Ok(Some(negotiated)),
        Ok(_) | Err(_) => return Err(()),
    }
    Ok(None)
}

/// One turn of the transmission phase; an error if it ends, or waits for its client.
fn transmit(engine: &mut Engine<'_>, image: &FuzzDisk) -> Result<Option<Negotiated>, ()> {
    let blocked = engine.advance(StopRequest::Serve).map_err(drop)?;
    let sent = engine.tx.take(usize::MAX);
    let has_stepped = image.step();
    match blocked {
        Blocked::Handover(to, _) => {
            let refusal = HandoverReply::Refuse(ErrorCode::Invalid);
            engine.on_handover_reply(to, refusal).map_err(drop)?;
        }
        Blocked::Input if engine.is_quiet() => return Err(()),
        Blocked::End => match engine.take_end() {
            Some(_) => return Err(()),
            None => assert!(has_stepped || !sent.is_empty() || engine.has_reads(), "it never ends"),
        },
        _ => {}
    }
    Ok(None)
}
