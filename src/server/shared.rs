//! What the acceptor and all sessions of one server share.

use super::export_policy::ExportPolicy;
use super::rejections::Rejections;
use super::sessions::Sessions;
use super::settings::SessionSettings;
use super::snapshot::ExportFingerprint;
use crate::disk::Disk;
use crate::nbd::handshake::BlockSizes;
use crate::nbd::handshake::server::Export;
use crate::nbd::wire::{PAYLOAD_LENGTH_DEFAULT, TransmissionFlags};
use std::sync::Arc;

/// The shared state of a server.
#[derive(Debug)]
pub(super) struct ServerShared {
    pub(super) disk: Arc<Disk>,
    pub(super) export: Export,
    pub(super) settings: SessionSettings,
    pub(super) policy: Arc<dyn ExportPolicy>,
    pub(super) sessions: Arc<Sessions>,
    pub(super) rejections: Rejections,
    /// How many threads can run at once.
    pub(super) cpus: usize,
}

impl ServerShared {
    /// The fingerprint that a snapshot of this server's sessions carries.
    pub(super) fn fingerprint(&self) -> ExportFingerprint {
        ExportFingerprint::of(&self.export, self.settings.style, self.disk.identity())
    }
}

/// The export of a disk. An `exclusive` one serves one client at a time, so that several connections
/// are not offered (`NBD_FLAG_CAN_MULTI_CONN`).
pub(super) fn export(disk: &Disk, name: &str, exclusive: bool) -> Export {
    let mut flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SERVED;
    flags.set(TransmissionFlags::CAN_MULTI_CONN, !exclusive);
    flags |= if disk.read_only() {
        TransmissionFlags::READ_ONLY
    } else {
        TransmissionFlags::SERVED_WRITABLE
    };
    Export {
        name: name.to_owned(),
        description: String::new(),
        size: disk.size(),
        flags,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: PAYLOAD_LENGTH_DEFAULT },
    }
}
