//! Message ids of the journal (`MESSAGE_ID=` of systemd.journal-fields(7)), one for each kind of event
//! that operators act on.
//! The catalog explains them (`systemd/flexnbd.catalog`, `journalctl -x`); a test compares the two. A
//! published id never changes its meaning.

macro_rules! message_ids {
    ($($(#[$meta:meta])* $name:ident = $id:literal;)*) => {
        $($(#[$meta])* pub const $name: &str = $id;)*

        /// All ids, with their names.
        pub const ALL: &[(&str, &str)] = &[$((stringify!($name), $id)),*];
    };
}

message_ids! {
    /// Clients can connect: the disk is served or being received.
    READY = "b87a7ac4c69e4450925b796b875bfa6c";
    /// The process ends on request, when idle, or because its disk has moved.
    STOPPING = "d250676972b8462fa10f52c8a606a580";
    /// The process ends with an error.
    FAILED = "6c93cdb6b4224b22b7884d7a862f91ca";
    /// The ownership record forbids serving the disk here: clients are refused.
    REFUSING_OWNERSHIP = "f7e6bcb1e189459986f9a719407f5f06";
    /// The configuration, the image or a socket is unusable: no disk is served.
    REFUSING_CONFIGURATION = "a07c2e243ba74399a301899145086a2d";
    /// Clients were refused because the disk cannot be served from here.
    CLIENTS_REFUSED = "a22108e69faa4c5e82b5a927070eb145";
    /// A client was refused, or its session ended, by the access control list.
    CLIENT_NOT_ADMITTED = "82a70bf3762147298c815e81a194d5af";
    /// A client was refused because of the limit on clients.
    CLIENT_LIMIT = "da2c7361aae64ec1b450144eca0c9a94";
    /// The killswitch ended a session.
    CLIENT_STALLED = "2575d722f3e2463495d150f8da558e11";
    /// A client's request failed on the disk.
    REQUEST_FAILED = "b53bc75f7db34a8395d5a5c504ee016e";
    /// Written data may not be on stable storage.
    FLUSH_FAILED = "66a1bc324731415088d115033e1eaf00";
    /// In an earlier process a flush has failed: data may be lost.
    FLUSH_FAILED_EARLIER = "b1f7c6a40c7d4d0f8a5a3f2e9c61d7e4";
    /// The access control list was replaced.
    ACL_REPLACED = "bab13319c1c84adbb70f03412c6418d2";
    /// The configuration file was reloaded.
    RELOADED = "6cd86d07fdd545188118969d8fd7e958";
    /// The configuration file is invalid; nothing has changed.
    RELOAD_FAILED = "37f26308595240c28498711253ee56db";
    /// The destination has answered: the migration runs.
    MIGRATION_STARTED = "b4d99861873b42469021aceae347e13d";
    /// Progress of a migration.
    MIGRATION_PROGRESS = "dfb0f07f6c054ab684cddeb71be7e9ce";
    /// Clients write faster than the migration converges, and are throttled.
    MIGRATION_HELD_BACK = "d7205c7422f54bf09873b2ccd458cd9f";
    /// Clients wait while the rest of the disk is sent.
    MIGRATION_GATE_CLOSED = "07c3d6b1dffb41938b7ef430ab415e93";
    /// The gate could not be drained in time: clients go on, and the migration retries.
    MIGRATION_GATE_BUSY = "1e26c59936c84f37b2cc5a66f213016e";
    /// The copy was interrupted, and is retried every second.
    MIGRATION_RETRYING = "75385423ab924f12986fbb651c50fa5f";
    /// The copy goes on after an interruption.
    MIGRATION_RESUMED = "e526b9e733e945dabe1414135d25d7dc";
    /// The handover is in doubt: clients wait until the destination answers.
    MIGRATION_IN_DOUBT = "0072c9d11d744be0bd731799f1e4108a";
    /// The image's record could not be written, or the image not deleted.
    MIGRATION_RECORD_FAILED = "64f105dd2eb24c1ca09756fec2d8c06f";
    /// No record can be kept for the image.
    MIGRATION_UNRECORDED = "dc1d540024fb4dcd9fbb26626158217e";
    /// The disk has moved to the destination.
    MIGRATION_DEPARTED = "50e1225fe06f43c6936601aedbe17a4f";
    /// The operator stopped a migration; the disk stays here.
    MIGRATION_BROKEN_OFF = "7b3f7192a4184ec7b35d2ae8d84d7c57";
    /// A migration failed; the disk stays here.
    MIGRATION_FAILED = "f11ca4afb02f48fc86e85d9bc2f8b52f";
    /// The disk has arrived here.
    ARRIVED = "f8ac7e0a6d4f4c4faed46e91e4410ca7";
    /// The sessions of connected clients were saved for the next process.
    SESSIONS_STORED = "db805586f4b14d62a28500274ae673bd";
    /// The sessions of the last process were restored.
    SESSIONS_RESUMED = "dabd1ac81b7d42a8b10fbe793b678108";
    /// Connected to the server that has the disk of a proxy.
    UPSTREAM_CONNECTED = "456e7ce779d04658add6f56a060b1f31";
    /// The server that has the disk of a proxy is lost: clients wait until it, or another one, answers.
    UPSTREAM_LOST = "0a478c46e1734e49a4db7967321fa84b";
    /// The disk has moved, and the requests of clients that have stayed are passed on to it.
    RELAYING = "81bd611128f7428496b60505b3e7eecf";
    /// No requests are passed on any more: the clients have gone, or their time is over.
    RELAY_ENDED = "c89e02dd49424740a7dd619c04af1d5e";
    /// The disk has moved, and its clients could not be passed on: they are disconnected.
    RELAY_FAILED = "c811c0a678a8464fb47b118cbc9f9100";
    /// A TLS certificate expires within a day, or has expired.
    CERTIFICATE_EXPIRY = "6a132946281a4c28b11338cc3cbef1b7";
    /// A part of the process makes no progress; the service manager will kill it.
    WATCHDOG = "61f1b18dda014ce5b766e4075bb63956";
}
