//! What the acceptor and all sessions of one server share.

use super::export_policy::ExportPolicy;
use super::payload_memory::PayloadMemory;
use super::rejections::Rejections;
use super::sessions::Sessions;
use super::settings::SessionSettings;
use super::snapshot::ExportFingerprint;
use crate::disk::{Disk, FeatureFlags};
use crate::nbd::handshake::BlockSizes;
use crate::nbd::handshake::server::Export;
use crate::nbd::wire::{PAYLOAD_LENGTH_DEFAULT, TransmissionFlags};
use crate::net::tls::ServerTls;
use crate::sync::read;
use std::sync::{Arc, RwLock};

/// The shared state of a server.
#[derive(Debug)]
pub(super) struct ServerShared {
    pub(super) disk: Arc<Disk>,
    pub(super) export: Export,
    pub(super) settings: SessionSettings,
    pub(super) policy: Arc<dyn ExportPolicy>,
    pub(super) sessions: Arc<Sessions>,
    pub(super) payloads: Arc<PayloadMemory>,
    pub(super) rejections: Rejections,
    /// For sessions that begin.
    pub(super) tls: RwLock<Option<Arc<ServerTls>>>,
    /// How many threads can run at once.
    pub(super) cpus: usize,
}

impl ServerShared {
    /// What a session that begins does about TLS.
    pub(super) fn tls(&self) -> Option<Arc<ServerTls>> {
        read(&self.tls).clone()
    }

    /// The fingerprint that a snapshot of this server's sessions carries.
    pub(super) fn fingerprint(&self) -> ExportFingerprint {
        ExportFingerprint::of(&self.export, self.settings.style, self.disk.identity())
    }
}

/// The features of a disk, and the transmission flags that offer them.
const OFFERS: &[(FeatureFlags, TransmissionFlags)] = &[
    (FeatureFlags::FLUSH, TransmissionFlags::SEND_FLUSH),
    (FeatureFlags::DURABLE, TransmissionFlags::SEND_FUA),
    (FeatureFlags::TRIM, TransmissionFlags::SEND_TRIM),
    (FeatureFlags::ZERO, TransmissionFlags::SEND_WRITE_ZEROES),
    (FeatureFlags::FAST_ZERO, TransmissionFlags::SEND_FAST_ZERO),
    (FeatureFlags::CACHE, TransmissionFlags::SEND_CACHE),
    (FeatureFlags::MULTI_CONN, TransmissionFlags::CAN_MULTI_CONN),
    (FeatureFlags::ROTATIONAL, TransmissionFlags::ROTATIONAL),
];

/// The export of a disk: what its backend can do. An `exclusive` one serves one client at a time, so that several connections
/// are not offered (`NBD_FLAG_CAN_MULTI_CONN`).
pub(super) fn export(disk: &Disk, name: &str, exclusive: bool) -> Export {
    let features = disk.features();
    let mut flags = TransmissionFlags::HAS_FLAGS;
    for (feature, flag) in OFFERS {
        flags.set(*flag, features.flags.contains(*feature));
    }
    if exclusive {
        flags -= TransmissionFlags::CAN_MULTI_CONN;
    }
    if disk.read_only() {
        flags -= TransmissionFlags::WRITABLE_ONLY;
        flags |= TransmissionFlags::READ_ONLY;
    }
    Export {
        name: name.to_owned(),
        description: String::new(),
        size: disk.size(),
        flags,
        block_sizes: BlockSizes {
            minimum: features.minimum_block,
            preferred: features.preferred_block.max(features.minimum_block),
            maximum: features.payload_max.min(PAYLOAD_LENGTH_DEFAULT),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Features;
    use crate::disk::memory_backend::{Featured, MemoryBackend};

    fn export_of(features: Features, read_only: bool, exclusive: bool) -> Export {
        let disk = Disk::new(Box::new(Featured(MemoryBackend::new(1 << 20), features)), read_only);
        export(&disk, "disk", exclusive)
    }

    #[test]
    fn a_file_is_offered_with_everything() {
        let Export { flags, block_sizes, .. } = export_of(Features::default(), false, false);
        assert_eq!(flags.bits(), 0b1101_0110_1101);
        assert_eq!(block_sizes, BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 });
        let read_only = export_of(Features::default(), true, false).flags;
        assert_eq!(read_only.bits(), 0b0101_0000_1111);
        let exclusive = export_of(Features::default(), false, true).flags;
        assert_eq!(exclusive, flags - TransmissionFlags::CAN_MULTI_CONN);
    }

    #[test]
    fn each_feature_is_offered_with_its_flag() {
        for (feature, flag) in OFFERS {
            let only = export_of(Features { flags: *feature, ..Features::default() }, false, false);
            assert_eq!(only.flags, TransmissionFlags::HAS_FLAGS | *flag);
        }
        let covered = OFFERS.iter().map(|(feature, _)| *feature).collect::<FeatureFlags>();
        assert_eq!(covered, FeatureFlags::all());
    }

    #[test]
    fn advertised_block_sizes_stay_within_those_of_the_backend() {
        let sizes = |minimum_block, payload_max| {
            let features = Features { minimum_block, payload_max, ..Features::default() };
            export_of(features, false, false).block_sizes
        };
        let limited = BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 };
        assert_eq!(sizes(512, 1 << 20), limited);
        let coarse = BlockSizes { minimum: 8192, preferred: 8192, maximum: 32 << 20 };
        assert_eq!(sizes(8192, 64 << 20), coarse);
    }
}
