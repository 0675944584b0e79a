//! Certificates for servers and clients with TLS, and the number of their handshakes in a second.

use super::cells::{Temperature, Transport};
use super::{Setup, pin_to};
use crate::report::{Error, figure, in_turns, median, print_row};
use flexnbd::net::Remote;
use flexnbd::net::tls::{ClientTls, TlsClient, TlsFile, TlsFiles, TlsMode, TlsTarget};
use harness::pki::{Pki, Request};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// The certificates of a run. The servers demand none of clients: not all of them do that in the same way.
#[derive(Clone, Debug)]
pub(crate) struct Certificates {
    /// With the files that nbdkit and QEMU look for.
    pub(crate) directory: PathBuf,
    /// The home directory of a user of libnbd, with the authority where it looks for that.
    pub(crate) home: PathBuf,
    pub(crate) client: ClientTls,
    _pki: Arc<Pki>,
}

impl Certificates {
    pub(crate) fn new() -> Result<Self, Error> {
        let pki = Pki::new();
        let server = pki.issue("server", &Request::server());
        let directory = pki.directory("servers", &server, None);
        let home = pki.path().join("home");
        let authorities = home.join(".pki/libnbd");
        fs::create_dir_all(&authorities)?;
        fs::copy(pki.ca(), authorities.join("ca-cert.pem"))?;
        // fio runs as another user than root, whose home libnbd ignores.
        fs::set_permissions(pki.path(), fs::Permissions::from_mode(0o755))?;
        let files = TlsFiles { ca: Some(TlsFile::Path(pki.ca())), ..TlsFiles::default() };
        let target = TlsTarget { mode: TlsMode::Require, hostname: None };
        let remote = Remote::parse("127.0.0.1", Some(1))?;
        let client = TlsClient::load(&files)?.for_remote(&target, &remote)?;
        let client = client.ok_or("no TLS")?;
        Ok(Self { directory, home, client, _pki: Arc::new(pki) })
    }
}

/// The handshakes of one server.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HandshakeRow {
    #[serde(rename = "server")]
    name: String,
    /// From connect to the end of the NBD handshake, one after another; for each round.
    per_sec: Vec<f64>,
}

/// Measures every server with TLS.
pub(crate) fn measure(setup: &Setup) -> Result<Vec<HandshakeRow>, Error> {
    let image = setup.images.path(Temperature::Cached)?;
    let servers: Vec<_> = setup.servers.iter().filter(|server| server.has_tls()).collect();
    let rounds = in_turns(setup.options.rounds, servers.len(), |which| -> Result<f64, Error> {
        let running = setup.start(servers[which], image, Transport::Tcp)?;
        pin_to(setup.options.client_cpu);
        let (start, mut count) = (Instant::now(), 0u32);
        while start.elapsed() < setup.options.seconds {
            running.export.open()?.close();
            count += 1;
        }
        Ok(f64::from(count) / start.elapsed().as_secs_f64())
    });
    let row = |(server, rounds): (&&super::Server, Vec<Result<f64, Error>>)| {
        let per_sec = rounds.into_iter().collect::<Result<_, Error>>()?;
        Ok(HandshakeRow { name: server.name.clone(), per_sec })
    };
    servers.iter().zip(rounds).map(row).collect()
}

pub(crate) fn print(rows: &[HandshakeRow]) {
    if rows.is_empty() {
        return;
    }
    println!("\nTLS and NBD handshakes in a second, one after another");
    print_row("", [10; 3], ["median", "lowest", "highest"]);
    for HandshakeRow { name, per_sec } in rows {
        let reduce = |f: fn(f64, f64) -> f64| figure(per_sec.iter().copied().reduce(f), 0);
        let middle = figure(median(per_sec.iter().copied()), 0);
        print_row(name, [10; 3], [middle, reduce(f64::min), reduce(f64::max)]);
    }
}
