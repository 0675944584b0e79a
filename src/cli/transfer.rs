//! `flexnbd read` and `flexnbd write`: copy a range of an export to standard output, or standard
//! input to it. Streams: never holds more than one request's data.

use super::output;
use super::settings::parse_ip;
use super::size::{parse_from, parse_length};
use super::tls::{ClientTlsFlags, ClientTlsSettings};
use super::uri::{self, Target, parse_export};
use crate::client::{ClientError, Connection};
use crate::human::counted;
use crate::nbd::wire::ErrorCode;
use crate::net::tls::{ClientTls, TlsClient, TlsError, TlsFiles, TlsMode, TlsTarget};
use crate::net::{Remote, Stream, connect, parse_port};
use crate::range::Range;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

/// Timeout of connecting, for each address of the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Timeout of a read from or write to the connection without progress.
const IO_TIMEOUT: Duration = Duration::from_secs(60);

/// The flags of `read` and `write`.
#[derive(clap::Args, Clone, Debug)]
pub struct TransferFlags {
    /// Server to connect to: IPv4, IPv6, a host name, or the path of a unix socket, which begins
    /// with / and has no port
    #[arg(short = 'l', long, value_name = "ADDR", conflicts_with = "uri")]
    addr: Option<String>,

    /// TCP port to connect to
    #[arg(short, long, value_name = "PORT", value_parser = parse_port, conflicts_with = "uri")]
    port: Option<u16>,

    /// Server and export as a URI, instead of `--addr` and `--port`.
    #[arg(
        long,
        value_name = "URI",
        value_parser = uri::parse,
        help = "Server and export as a URI: nbd://HOST[:PORT][/EXPORT] or \
                nbd+unix:///[EXPORT]?socket=PATH, with TLS nbds: or nbds+unix:, instead of --addr and --port"
    )]
    uri: Option<Target>,

    /// Name of the export [default: the server's default]
    #[arg(long, value_name = "NAME", value_parser = parse_export)]
    export: Option<String>,

    /// Byte offset to begin at, up to 2^62 (K, M, G, T: powers of 1024)
    #[arg(short = 'F', long, value_name = "OFFSET", value_parser = parse_from)]
    from: u64,

    /// How many bytes, 1 to 2^30 (K, M, G: powers of 1024)
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse_length)]
    size: u64,

    /// Local address to connect from, for servers that look at it
    #[arg(short, long, value_name = "BIND_ADDR", value_parser = parse_ip)]
    bind: Option<IpAddr>,

    #[command(flatten)]
    tls: ClientTlsFlags,
}

/// A range of an export to read or write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The server.
    pub remote: Remote,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// Offset of the first byte, at most 2^62.
    pub from: u64,
    /// Number of bytes, 1 to 2^30.
    pub size: u64,
    /// Local address to connect from.
    pub bind: Option<IpAddr>,
    /// Whether to use TLS, and the name of the server.
    pub tls: TlsTarget,
    /// The certificates.
    pub tls_files: TlsFiles,
}

impl TransferFlags {
    /// Checks the flags, and builds the transfer.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn validate(self) -> Result<Transfer, String> {
        let target = parse_target(self.uri, self.addr, self.port)?;
        let client = ClientTlsSettings::from(self.tls);
        let tls = client.target(&target, "")?;
        let export = match (self.export, target.export) {
            (None, in_uri) => in_uri,
            (Some(export), in_uri) if in_uri.is_empty() || in_uri == export => export,
            (Some(export), in_uri) => {
                return Err(format!("--export {export} contradicts {in_uri} in --uri"));
            }
        };
        if let (Remote::Unix(_), Some(_)) = (&target.remote, self.bind) {
            return Err("--bind has no meaning for a unix socket".to_owned());
        }
        let Self { from, size, bind, .. } = self;
        let tls_files = client.files;
        Ok(Transfer { remote: target.remote, export, from, size, bind, tls, tls_files })
    }
}

/// Copies bytes of the export to standard output.
#[must_use]
pub fn read(transfer: &Transfer) -> ExitCode {
    report("read", transfer, transfer.read(&mut io::stdout().lock()))
}

/// Copies standard input to the export.
#[must_use]
pub fn write(transfer: &Transfer) -> ExitCode {
    report("write", transfer, transfer.write(&mut io::stdin().lock()))
}

/// Why a transfer failed.
#[derive(Debug)]
enum TransferError {
    /// Connecting failed for every address of the server; holds the last error.
    Unreachable(io::Error),
    /// The certificates cannot be used.
    Tls(TlsError),
    /// The server reported an error, or the connection failed.
    Server(ClientError),
    /// The range does not lie within the export; holds the export's size in bytes.
    BeyondTheEnd(u64),
    /// Standard input ended or failed after `received` bytes; `written` of them were written.
    Input { received: u64, written: u64, error: Option<io::Error> },
    /// Writing to standard output failed.
    Output(io::Error),
}

impl From<ClientError> for TransferError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Sink(error) => Self::Output(error),
            error => Self::Server(error),
        }
    }
}

impl Transfer {
    /// Copies from the server to `out`.
    fn read(&self, out: &mut dyn Write) -> Result<(), TransferError> {
        let mut connection = self.connect()?;
        for (offset, length) in self.requests(connection.payload_length_max()) {
            connection.read(offset, length, &mut |data| out.write_all(data))?;
        }
        out.flush().map_err(TransferError::Output)?;
        connection.close();
        Ok(())
    }

    /// Copies from `input` to the server. Reads all data of a request before sending it, so that an
    /// input that ends early never leaves a request half sent.
    fn write(&self, input: &mut dyn Read) -> Result<(), TransferError> {
        let mut connection = self.connect()?;
        let mut data = Vec::new();
        for (offset, length) in self.requests(connection.payload_length_max()) {
            data.clear();
            let outcome = input.take(u64::from(length)).read_to_end(&mut data);
            if outcome.is_err() || data.len() < length as usize {
                let written = offset - self.from;
                let received = written + data.len() as u64;
                return Err(TransferError::Input { received, written, error: outcome.err() });
            }
            connection.write(offset, &data)?;
        }
        flush(&mut connection)?;
        connection.close();
        Ok(())
    }

    fn connect(&self) -> Result<Connection, TransferError> {
        let tls = self.load_tls().map_err(TransferError::Tls)?;
        let stream = self.connect_stream().map_err(TransferError::Unreachable)?;
        let connection = Connection::open(stream, &self.export, tls.as_ref(), IO_TIMEOUT)?;
        let size = connection.agreement().size;
        if Range::within(size, self.from, self.size).is_none() {
            connection.close();
            return Err(TransferError::BeyondTheEnd(size));
        }
        connection.check_alignment(self.from, self.size)?;
        Ok(connection)
    }

    fn load_tls(&self) -> Result<Option<ClientTls>, TlsError> {
        // Without TLS the host needs no authorities.
        if self.tls.mode == TlsMode::Off {
            return Ok(None);
        }
        TlsClient::load(&self.tls_files)?.for_remote(&self.tls, &self.remote)
    }

    /// Connects to the first address that accepts; returns the error of the last one if none does.
    fn connect_stream(&self) -> io::Result<Stream> {
        let mut outcome = Err(io::Error::other("the host has no address"));
        for address in self.remote.resolve()? {
            outcome = connect(&address, self.bind, CONNECT_TIMEOUT);
            if outcome.is_ok() {
                break;
            }
        }
        let stream = outcome?;
        stream.tune()?;
        Ok(stream)
    }

    /// Splits the range into requests (offset, length) of at most `length_max` bytes.
    fn requests(&self, length_max: u32) -> impl Iterator<Item = (u64, u32)> + use<> {
        let end = self.from + self.size;
        (self.from..end).step_by(length_max as usize).map(move |offset| {
            // The cast loses nothing: the minimum is at most `length_max`.
            (offset, (end - offset).min(u64::from(length_max)) as u32)
        })
    }
}

/// Flushes the written data if the server supports it. Ignores EINVAL in oldstyle: nbdkit (seen in
/// 1.32) announces NBD_FLAG_SEND_FLUSH there, but rejects the request.
fn flush(connection: &mut Connection) -> Result<(), ClientError> {
    match connection.flush() {
        Err(ClientError::Refused(ErrorCode::Invalid)) if connection.agreement().oldstyle => Ok(()),
        outcome => outcome,
    }
}

fn report(mode: &str, transfer: &Transfer, outcome: Result<(), TransferError>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has closed the pipe on purpose, so this is not an error to report.
        Err(TransferError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::from(output::EXIT_FAILURE)
        }
        Err(error) => {
            let text = format!("flexnbd {mode}: {}", describe(transfer, &error));
            output::print_error(&text, output::EXIT_FAILURE)
        }
    }
}

fn describe(transfer: &Transfer, error: &TransferError) -> String {
    let Transfer { remote, from, size, .. } = transfer;
    match error {
        // The error names the address, which `remote` need not: a host can have several.
        TransferError::Unreachable(error) => error.to_string(),
        TransferError::Tls(error) => error.to_string(),
        TransferError::Server(error) => format!("{remote}: {error}"),
        TransferError::BeyondTheEnd(end) => {
            let (bytes, end) = (counted(*size, "byte"), counted(*end, "byte"));
            let verb = if *size == 1 { "does" } else { "do" };
            format!("{remote}: {bytes} from {from} on {verb} not lie within its {end}")
        }
        TransferError::Input { received, written, error: None } => format!(
            "standard input ended after {received} of {}; the first {written} were written",
            counted(*size, "byte")
        ),
        TransferError::Input { received, written, error: Some(error) } => format!(
            "cannot read standard input after {received} of {}: {error}; the first {written} were \
             written",
            counted(*size, "byte")
        ),
        TransferError::Output(error) => format!("cannot write to standard output: {error}"),
    }
}

fn parse_target(
    uri: Option<Target>,
    addr: Option<String>,
    port: Option<u16>,
) -> Result<Target, String> {
    match (uri, addr, port) {
        (Some(target), _, _) => Ok(target),
        (None, Some(addr), port) => match Remote::parse(&addr, port) {
            Ok(remote) => Ok(Target::plain(remote)),
            Err(error) => Err(format!("--addr and --port: {error}")),
        },
        (None, None, Some(_)) => Err("--port needs --addr as well".to_owned()),
        (None, None, None) => {
            Err("the server is missing: give --addr and --port, or --uri".to_owned())
        }
    }
}

#[cfg(test)]
mod tests;
