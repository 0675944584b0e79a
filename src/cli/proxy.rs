//! `flexnbd proxy`: its flags, those of `serve` that apply without an image, and its own.
//! [`super::start`] checks them, and merges the configuration file.
//!
//! Called as `flexnbd-proxy` the program is `flexnbd proxy` for one client at a time, as the original
//! flexnbd-proxy was.

use super::sandbox::SandboxFlags;
use super::settings::{
    Settings, UpstreamSettings, parse_acl_entry, parse_connections, parse_idle_exit, parse_ip,
    parse_max_clients, parse_timeout,
};
use super::size::{parse_cache, parse_payload_memory, parse_unflushed};
use super::start::{ProcessRole, StartRequest};
use super::tls::{ServerTlsSettings, UpstreamTlsFlags};
use super::uri::{self, Target, parse_export};
use crate::net::{Host, Remote, parse_port};
use std::ffi::{OsStr, OsString};
use std::net::IpAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The mode.
const MODE: &str = "proxy";
/// The name of the program that is this mode.
const PROGRAM: &str = "flexnbd-proxy";
/// The value of `--cache` without one, in bytes.
pub const CACHE_DEFAULT: &str = "4096";

/// The flags of `proxy`.
#[derive(clap::Args, Clone, Debug)]
pub struct ProxyFlags {
    /// Address to listen on: IPv4, IPv6, or the path of a unix socket, which begins with / and
    /// has no port. Not needed when the service manager hands over a listening socket
    #[arg(short = 'l', long, value_name = "ADDR")]
    addr: Option<Host>,

    /// TCP port to listen on
    #[arg(short, long, value_name = "PORT", value_parser = parse_port)]
    port: Option<u16>,

    /// Server to connect to: IPv4, IPv6, a host name, or the path of a unix socket, which begins
    /// with / and has no port
    #[arg(short = 'C', long, value_name = "CONN_ADDR")]
    conn_addr: Option<String>,

    /// TCP port to connect to
    #[arg(short = 'P', long, value_name = "CONN_PORT", value_parser = parse_port)]
    conn_port: Option<u16>,

    /// The servers that may have the disk.
    #[arg(
        long,
        value_name = "URI",
        value_parser = uri::parse,
        help = "Server and export to connect to, as a URI: nbd://HOST[:PORT][/EXPORT] or \
                nbd+unix:///[EXPORT]?socket=PATH; may be repeated, for a disk that can move"
    )]
    to: Vec<Target>,

    /// Local address to connect from, for servers that look at it
    #[arg(short, long, value_name = "BIND_ADDR", value_parser = parse_ip)]
    bind: Option<IpAddr>,

    /// Read ahead of sequential reads by so many bytes; 4096 without a value, 0 for none
    #[arg(
        short,
        long,
        value_name = "BYTES",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = CACHE_DEFAULT,
        value_parser = parse_cache
    )]
    cache: Option<u64>,

    /// Keep at most so many bytes that clients have written and not flushed (K, M, G: powers of
    /// 1024) [default: 64M]
    #[arg(long, value_name = "BYTES", value_parser = parse_unflushed)]
    unflushed: Option<u64>,

    /// Open at most N connections to a server that offers several [default: 4]
    #[arg(long, value_name = "N", value_parser = parse_connections)]
    connections: Option<usize>,

    /// Seconds until a server that does not answer counts as lost [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = parse_timeout)]
    timeout: Option<u64>,

    /// TLS with the server.
    #[command(flatten)]
    to_tls: UpstreamTlsFlags,

    /// Open a control socket at this path
    #[arg(short, long, value_name = "SOCK")]
    sock: Option<PathBuf>,

    /// Admit nobody when there are no ACL entries, rather than everybody
    #[arg(short, long)]
    default_deny: bool,

    /// Disconnect a client whose request or reply makes no progress for two minutes
    #[arg(short, long)]
    killswitch: bool,

    /// Refuse to change the disk
    #[arg(short, long)]
    read_only: bool,

    /// Name of the export that clients get; those that name no export get it, too
    #[arg(long, value_name = "NAME", value_parser = parse_export)]
    export: Option<String>,

    /// Greet clients the old way, for those that know no other
    #[arg(long)]
    oldstyle: bool,

    /// Admit at most N clients at once [default: 128; called as flexnbd-proxy: 1, others wait]
    #[arg(long, value_name = "N", value_parser = parse_max_clients)]
    max_clients: Option<usize>,

    /// Admit at most N clients of one address at once [default: as --max-clients]
    #[arg(long, value_name = "N", value_parser = parse_max_clients)]
    max_clients_per_address: Option<usize>,

    /// Use at most so much memory for the payloads of requests, besides 4 MiB for each client (K, M, G, T:
    /// powers of 1024) [default: a quarter of the memory, at most 1G]
    #[arg(long, value_name = "BYTES", value_parser = parse_payload_memory)]
    payload_memory: Option<u64>,

    /// End when there has been no client for so long
    #[arg(long, value_name = "SECONDS", value_parser = parse_idle_exit)]
    idle_exit: Option<u64>,

    /// TLS with clients.
    #[command(flatten)]
    tls: ServerTlsSettings,
    #[command(flatten)]
    sandbox: SandboxFlags,

    /// Read settings from this file: KEY=VALUE lines, keys named like the long options (TO,
    /// MAX_CLIENTS); flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Addresses of clients to admit, IPv4 or IPv6, each with an optional /PREFIX
    #[arg(value_name = "ACL_ENTRY", value_parser = parse_acl_entry)]
    acl: Vec<String>,

    /// Called as `flexnbd-proxy`.
    #[arg(skip)]
    single_client: bool,
}

impl ProxyFlags {
    /// The flags of the program of this name.
    #[must_use]
    pub(super) fn of_program(self, program: Option<&OsStr>) -> Self {
        Self { single_client: is_proxy_program(program), ..self }
    }

    /// Checks the flags, and makes the request.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn into_request(self) -> Result<StartRequest, String> {
        let mut to = self.to;
        match (self.conn_addr, self.conn_port) {
            (None, None) => {}
            (None, Some(_)) => return Err("--conn-port needs --conn-addr as well".to_owned()),
            (Some(host), port) => {
                let remote = Remote::parse(&host, port);
                let remote =
                    remote.map_err(|error| format!("--conn-addr and --conn-port: {error}"))?;
                to.insert(0, Target::plain(remote));
            }
        }
        let settings = Settings {
            addr: self.addr,
            port: self.port,
            sock: self.sock,
            default_deny: self.default_deny,
            killswitch: self.killswitch,
            read_only: self.read_only,
            export: self.export,
            oldstyle: self.oldstyle,
            max_clients: self.max_clients,
            max_clients_per_address: self.max_clients_per_address,
            payload_memory: self.payload_memory,
            idle_exit: self.idle_exit,
            tls: self.tls,
            sandbox: self.sandbox,
            acl: self.acl,
            upstream: UpstreamSettings {
                to,
                bind: self.bind,
                cache: self.cache,
                unflushed: self.unflushed,
                connections: self.connections,
                timeout: self.timeout,
                tls: self.to_tls.into(),
            },
            ..Settings::default()
        };
        let role = ProcessRole::Proxy { single_client: self.single_client };
        Ok(StartRequest { role, settings, config_file: self.config })
    }
}

/// Whether the program of this path is `flexnbd-proxy`.
fn is_proxy_program(program: Option<&OsStr>) -> bool {
    program.and_then(|program| Path::new(program).file_name()) == Some(OsStr::new(PROGRAM))
}

/// Rewrites the arguments of `flexnbd-proxy` as those of `flexnbd proxy`, and in both cases `-cBYTES`, the
/// original's short form, as `--cache=BYTES`. Other arguments stay as they are.
pub(super) fn rewrite(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let is_version = |argument: &OsString| argument == "--version" || argument == "-V";
    let program = arguments.first().map(OsString::as_os_str);
    if is_proxy_program(program) && !arguments.get(1).is_some_and(is_version) {
        arguments.insert(1, MODE.into());
    }
    if arguments.get(1).is_none_or(|mode| mode != MODE) {
        return arguments;
    }
    for argument in arguments.iter_mut().take_while(|argument| *argument != "--") {
        let bytes = argument.as_bytes();
        if let Some(value) = bytes.strip_prefix(b"-c")
            && value.first().is_some_and(u8::is_ascii_digit)
        {
            *argument = OsString::from_vec([b"--cache=", value].concat());
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{CliCommand, EarlyExit, Invocation, parse};

    fn parsed(line: &str) -> Result<StartRequest, String> {
        match parse(line.split_whitespace().map(OsString::from)) {
            Ok(Invocation { command: CliCommand::Start(request), .. }) => Ok(*request),
            Err(EarlyExit::Misuse(error)) => Err(error.sentence),
            other => panic!("{line}: {other:?}"),
        }
    }

    fn upstream(line: &str) -> UpstreamSettings {
        parsed(line).unwrap().settings.upstream
    }

    fn targets(uris: &[&str]) -> Vec<Target> {
        uris.iter().map(|uri| uri::parse(uri).unwrap()).collect()
    }

    #[test]
    fn every_option_is_parsed() {
        let long = "flexnbd proxy --addr 127.0.0.1 --port 7 --conn-addr ::1 --conn-port 8 \
            --to nbd://h/disk --bind ::2 --cache=8192 --unflushed 8M --connections 2 --timeout 9 \
            --sock /b --default-deny --killswitch --read-only --export disk --oldstyle \
            --max-clients 5 --max-clients-per-address 4 --payload-memory 8M --idle-exit 60 --config /c ::3";
        let short = "flexnbd proxy -l 127.0.0.1 -p 7 -C ::1 -P 8 --to nbd://h/disk -b ::2 -c8192 \
            --unflushed 8M --connections 2 --timeout 9 -s /b -dkr --export disk --oldstyle \
            --max-clients 5 --max-clients-per-address 4 --payload-memory 8M --idle-exit 60 --config /c ::3";
        let settings = Settings {
            addr: Some("127.0.0.1".parse().unwrap()),
            port: Some(7),
            sock: Some("/b".into()),
            default_deny: true,
            killswitch: true,
            read_only: true,
            export: Some("disk".to_owned()),
            oldstyle: true,
            max_clients: Some(5),
            max_clients_per_address: Some(4),
            payload_memory: Some(8 << 20),
            idle_exit: Some(60),
            acl: vec!["::3".to_owned()],
            upstream: UpstreamSettings {
                to: targets(&["nbd://[::1]:8", "nbd://h/disk"]),
                bind: Some("::2".parse().unwrap()),
                cache: Some(8192),
                unflushed: Some(8 << 20),
                connections: Some(2),
                timeout: Some(9),
                ..UpstreamSettings::default()
            },
            ..Settings::default()
        };
        let role = ProcessRole::Proxy { single_client: false };
        let expected = StartRequest { role, settings, config_file: Some("/c".into()) };
        assert_eq!(parsed(long), Ok(expected.clone()));
        assert_eq!(parsed(short), Ok(expected));
    }

    #[test]
    fn the_cache_has_an_optional_value() {
        let cache = |options: &str| upstream(&format!("flexnbd-proxy -C h -P 7 {options}")).cache;
        assert_eq!(cache(""), None);
        for options in ["-c", "--cache", "-cq", "-qc ::1", "--cache -v"] {
            assert_eq!(cache(options), Some(4096), "{options}");
        }
        for options in ["-c512", "-c=512", "--cache=512", "--cache 512.0.0.0/8 -c512"] {
            if let Ok(request) = parsed(&format!("flexnbd-proxy -C h -P 7 {options}")) {
                assert_eq!(request.settings.upstream.cache, Some(512), "{options}");
            }
        }
        assert_eq!(cache("--cache=0"), Some(0));
        let error = parsed("flexnbd proxy --cache=x").unwrap_err();
        assert!(error.contains("`x` is not a number of bytes"), "{error}");
    }

    #[test]
    fn flexnbd_proxy_is_the_mode_for_one_client() {
        let role = |line: &str| parsed(line).unwrap().role;
        for line in ["flexnbd-proxy -C h -P 7", "/usr/bin/flexnbd-proxy -q -C h -P 7"] {
            assert_eq!(role(line), ProcessRole::Proxy { single_client: true }, "{line}");
        }
        let many = ProcessRole::Proxy { single_client: false };
        assert_eq!(role("/usr/bin/flexnbd proxy -C h -P 7"), many);
        assert_eq!(role("flexnbd -q proxy -C h -P 7"), many);
        for option in ["--version", "-V", "--help", "-h"] {
            let line = ["flexnbd-proxy", option].map(OsString::from);
            assert!(matches!(parse(line.into_iter()), Err(EarlyExit::Output(_))), "{option}");
        }
    }

    #[test]
    fn an_upstream_address_is_complete() {
        let error = |options: &str| parsed(&format!("flexnbd proxy {options}")).unwrap_err();
        assert_eq!(error("-P 7"), "--conn-port needs --conn-addr as well");
        let incomplete = "--conn-addr and --conn-port: address h needs a port";
        assert_eq!(error("-C h"), incomplete);
        assert!(error("-C /run/x -P 7").contains("which has no port"));
        assert!(error("--to h").contains("begins neither with nbd://"));
        let unix = upstream("flexnbd proxy -C /run/x").to;
        assert_eq!(unix, targets(&["nbd+unix:///?socket=/run/x"]));
    }

    #[test]
    fn options_of_an_image_are_unknown() {
        for option in ["--file", "--create", "--direct", "--holes", "--plain"] {
            let error = parsed(&format!("flexnbd proxy {option}")).unwrap_err();
            assert!(error.starts_with(&format!("unknown option `{option}`")), "{error}");
        }
    }
}
