//! `flexnbd listen`: its flags, those of `serve` that apply while a disk is received, and its own.
//! [`super::start`] checks them, and merges the configuration file.

use super::sandbox::SandboxFlags;
use super::settings::{Settings, parse_acl_entry, parse_holes};
use super::size::parse_create;
use super::start::{ProcessRole, StartRequest};
use super::tls::ServerTlsSettings;
use super::uri::parse_export;
use crate::daemon::RecordPolicy;
use crate::disk::HolePolicy;
use crate::net::{Host, parse_port};
use std::path::PathBuf;

/// The flags of `listen`.
#[derive(clap::Args, Clone, Debug)]
pub struct ListenFlags {
    /// Address to listen on: IPv4, IPv6, or the path of a unix socket, which begins with / and
    /// has no port. Not needed when the service manager hands over a listening socket
    #[arg(short = 'l', long, value_name = "ADDR")]
    addr: Option<Host>,

    /// TCP port to listen on
    #[arg(short, long, value_name = "PORT", value_parser = parse_port)]
    port: Option<u16>,

    /// File or block device to receive the disk into
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Make FILE if it does not exist: sparse, of SIZE bytes (K, M, G, T: powers of 1024)
    #[arg(long, value_name = "SIZE", value_parser = parse_create)]
    create: Option<u64>,

    /// Receive even if FILE holds a disk that has arrived or was adopted, which is then lost
    #[arg(long)]
    overwrite: bool,

    /// Receive even if no ownership record can be kept: after a crash both copies may be served
    #[arg(long)]
    no_record: bool,

    /// Open a control socket at this path
    #[arg(short, long, value_name = "SOCK")]
    sock: Option<PathBuf>,

    /// Admit nobody when there are no ACL entries, rather than everybody
    #[arg(short, long)]
    default_deny: bool,

    /// Name of the export
    #[arg(long, value_name = "NAME", value_parser = parse_export)]
    export: Option<String>,

    /// Greet the old way, for a source that is the original flexnbd
    #[arg(long)]
    oldstyle: bool,

    /// Receive from one writer that is not flexnbd, too, until it leaves or falls silent; the disk
    /// then arrives only by `flexnbd adopt`
    #[arg(long, conflicts_with = "oldstyle")]
    plain: bool,

    /// Whether to believe the file system where it says that FILE has holes: auto (where that is
    /// known to be right), trust, or ignore [default: auto]
    #[arg(long, value_name = "POLICY", value_parser = parse_holes)]
    holes: Option<HolePolicy>,

    /// Read and write FILE past the page cache of this host (O_DIRECT)
    #[arg(long)]
    direct: bool,

    #[command(flatten)]
    sandbox: SandboxFlags,

    /// Read settings from this file, which may be that of `serve`.
    #[arg(
        long,
        value_name = "FILE",
        help = "Read settings from this file, which may be that of serve: KEY=VALUE lines; flags \
                win over it; IDLE_EXIT, KILLSWITCH, MAX_CLIENTS, MAX_CLIENTS_PER_ADDRESS, \
                PAYLOAD_MEMORY and READ_ONLY mean nothing here"
    )]
    config: Option<PathBuf>,

    /// TLS with the source.
    #[command(flatten)]
    tls: ServerTlsSettings,

    /// Addresses to admit a source from, IPv4 or IPv6, each with an optional /PREFIX
    #[arg(value_name = "ACL_ENTRY", value_parser = parse_acl_entry)]
    acl: Vec<String>,
}

impl ListenFlags {
    /// The request that the flags make.
    #[must_use]
    pub fn into_request(self) -> StartRequest {
        let settings = Settings {
            addr: self.addr,
            port: self.port,
            file: self.file,
            create: self.create,
            sock: self.sock,
            default_deny: self.default_deny,
            export: self.export,
            oldstyle: self.oldstyle,
            plain: self.plain,
            holes: self.holes,
            direct: self.direct,
            tls: self.tls,
            sandbox: self.sandbox,
            acl: self.acl,
            ..Settings::default()
        };
        let records = if self.no_record { RecordPolicy::Optional } else { RecordPolicy::Required };
        let role = ProcessRole::Listen { overwrite: self.overwrite, records };
        StartRequest { role, settings, config_file: self.config }
    }
}
