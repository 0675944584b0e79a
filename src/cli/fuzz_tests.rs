//! Fuzz targets of what operators write (`tests/fuzz`): configuration files, and words such as URIs,
//! addresses, sizes and entries of access control lists. An accepted word is written and read again with the
//! same meaning.

use super::config::{parse, salvage};
use super::instance::{self, Instance};
use super::settings::Settings;
use super::size::parse_size;
use super::uri::{self, Target};
use crate::net::tls::TlsMode;
use crate::net::{Address, Host, Remote, parse_port};
use crate::server::acl::Acl;
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A configuration file.
pub(crate) fn configuration(text: &str) {
    let file = Path::new("disk.conf");
    let (settings, error) = salvage(file, text);
    match parse(file, text) {
        Ok(parsed) => assert_eq!((parsed, None), (settings.clone(), error)),
        Err(why) => {
            assert!((1..=text.lines().count()).contains(&why.line), "{why}");
            assert_eq!(Some(why), error);
        }
    }
    let _ = settings.address();
    if instance::check(&settings).is_ok() {
        check_units(&settings);
    }
    let merged = settings.clone().or(Settings::default());
    assert_eq!(merged, settings);
}

/// No path or address of a checked configuration ends a line of a unit.
fn check_units(settings: &Settings) {
    let image = instance::image(settings).ok();
    let address = instance::listen_address(settings).ok().flatten();
    let sockets = instance::upstream_sockets(settings).unwrap_or_default();
    for text in image.iter().chain(&address).chain(&sockets) {
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}

/// A word of the command line. The first byte chooses its kind.
pub(crate) fn word(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    match kind % 5 {
        0 => uri(text),
        1 => address(text),
        2 => size(text),
        3 => acl(text),
        _ => drop(text.parse::<Instance>().map(|instance| instance.socket())),
    }
}

fn uri(text: &str) {
    let Ok(target) = uri::parse(text) else { return };
    let encode = |bytes: &[u8]| percent_encode(bytes, NON_ALPHANUMERIC).to_string();
    let export = encode(target.export.as_bytes());
    let scheme = if target.tls.mode == TlsMode::Off { "nbd" } else { "nbds" };
    let hostname = target.tls.hostname.as_ref().map(|name| encode(name.as_bytes()));
    let hostname = hostname.map(|name| format!("tls-hostname={name}"));
    let written = match &target.remote {
        Remote::Host { port, .. } => {
            assert_ne!(*port, 0);
            let query = hostname.map(|name| format!("?{name}")).unwrap_or_default();
            format!("{scheme}://{}/{export}{query}", target.remote)
        }
        Remote::Unix(path) => {
            let path = encode(path.as_os_str().as_bytes());
            let more = hostname.map(|name| format!("&{name}")).unwrap_or_default();
            format!("{scheme}+unix:///{export}?socket={path}{more}")
        }
    };
    assert_eq!(uri::parse(&written), Ok(target), "{written}");
    check_target(&written);
}

fn check_target(written: &str) {
    // The scheme is case-insensitive, and nothing else has to be.
    let upper = written.replacen("nbd", "NBD", 1);
    let parsed: Result<Target, _> = uri::parse(&upper);
    assert!(parsed.is_ok(), "{upper}");
}

fn address(text: &str) {
    let (host, port) = text.rsplit_once(' ').unwrap_or((text, ""));
    let port = parse_port(port).ok();
    if let Ok(address) = Address::parse(host, port) {
        let written = match &address {
            Address::Tcp(socket) => Address::parse(&socket.ip().to_string(), Some(socket.port())),
            Address::Unix(path) => Address::parse(&path.to_string_lossy(), None),
        };
        assert_eq!(written, Ok(address));
    }
    if let Ok(remote) = Remote::parse(host, port) {
        let written = match &remote {
            Remote::Host { host, port } => Remote::parse(host, Some(*port)),
            Remote::Unix(path) => Remote::parse(&path.to_string_lossy(), None),
        };
        assert_eq!(written, Ok(remote));
    }
    let _ = host.parse::<Host>().map(|host| host.with_port(port));
}

fn size(text: &str) {
    let Ok(size) = parse_size(text) else { return };
    assert_eq!(parse_size(&size.to_string()), Ok(size));
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    let number: u64 = digits.parse().unwrap_or(u64::MAX);
    let factors = [0, 10, 20, 30, 40].map(|shift| number.checked_shl(shift));
    assert!(factors.contains(&Some(size)), "{text} is {size}");
}

fn acl(text: &str) {
    let entries: Vec<&str> = text.split(',').collect();
    let Ok(acl) = Acl::parse(&entries, true) else { return };
    let written = acl.entries();
    let again = Acl::parse(&written, true);
    assert_eq!(again.as_ref().map(Acl::entries), Ok(written.clone()));
    for entry in &written {
        let address = entry.split('/').next().and_then(|address| address.parse().ok());
        assert!(address.is_some_and(|address| acl.admits(address)), "{entry}");
    }
}
