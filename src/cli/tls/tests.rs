//! Which modes and files follow from options, keys and URIs.

use super::*;
use crate::cli::config;
use crate::cli::operate::CommandKind;
use crate::cli::start::{StartRequest, StartRequestError};
use crate::cli::transfer::Transfer;
use crate::cli::{CliCommand, EarlyExit, Invocation, parse, uri};
use crate::daemon::{Config, DiskConfig};
use std::ffi::OsString;
use std::path::Path;

fn command(line: &str) -> Result<CliCommand, String> {
    match parse(line.split_whitespace().map(OsString::from)) {
        Ok(Invocation { command, .. }) => Ok(command),
        Err(EarlyExit::Misuse(error)) => Err(error.sentence),
        Err(EarlyExit::Output(text)) => panic!("{line}: {text}"),
    }
}

fn request(line: &str) -> StartRequest {
    match command(line) {
        Ok(CliCommand::Start(request)) => *request,
        other => panic!("{line}: {other:?}"),
    }
}

fn loaded(line: &str) -> Result<Config, String> {
    request(line).load().map_err(|error| error.to_string())
}

fn server(options: &str) -> Result<Option<ServerTlsConfig>, String> {
    loaded(&format!("flexnbd serve -f /a {options}")).map(|config| config.admission.tls)
}

fn proxy(options: &str) -> Result<(TlsFiles, Vec<TlsTarget>), String> {
    match loaded(&format!("flexnbd proxy {options}"))?.disk {
        DiskConfig::Upstream(upstream) => {
            Ok((upstream.tls, upstream.targets.into_iter().map(|target| target.tls).collect()))
        }
        DiskConfig::Image(image) => panic!("{image:?}"),
    }
}

fn read(options: &str) -> Result<Transfer, String> {
    match command(&format!("flexnbd read -F 0 -S 1 {options}"))? {
        CliCommand::Read(transfer) => Ok(transfer),
        other => panic!("{other:?}"),
    }
}

fn mirror(options: &str) -> Result<MirrorTls, String> {
    match command(&format!("flexnbd mirror -l ::1 -p 7 -s /x {options}"))? {
        CliCommand::Operate(operation) => match operation.kind {
            CommandKind::Mirror { mirror, .. } => Ok(*mirror.tls),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn file(path: &str) -> Option<TlsFile> {
    Some(path.parse().unwrap())
}

fn target(mode: TlsMode, hostname: Option<&str>) -> TlsTarget {
    TlsTarget { mode, hostname: hostname.map(str::to_owned) }
}

#[test]
fn every_option_of_a_server_is_parsed() {
    let options = "--tls require --tls-cert /c --tls-key credential:k --tls-ca /a \
        --tls-allow a.example --tls-allow 192.0.2.1";
    let expected = ServerTlsConfig {
        mode: TlsMode::Require,
        files: TlsFiles { cert: file("/c"), key: file("credential:k"), ca: file("/a") },
        allow: ["a.example", "192.0.2.1"].map(|name| name.parse().unwrap()).to_vec(),
    };
    assert_eq!(server(options), Ok(Some(expected.clone())));
    for mode in ["listen -f /a", "proxy --to nbd://h"] {
        let config = loaded(&format!("flexnbd {mode} {options}")).unwrap();
        assert_eq!(config.admission.tls, Some(expected.clone()), "{mode}");
    }
}

#[test]
fn certificate_of_a_server_implies_on() {
    let mode = |options: &str| server(options).unwrap().map(|tls| tls.mode);
    assert_eq!(mode(""), None);
    assert_eq!(mode("--tls-cert /c"), Some(TlsMode::On));
    assert_eq!(mode("--tls-cert /c --tls require"), Some(TlsMode::Require));
    assert_eq!(mode("--tls-cert /c --tls off"), None);
    assert_eq!(mode("--tls off --tls-key /k --oldstyle"), None);
}

#[test]
fn incomplete_options_of_a_server_are_refused() {
    let refused = |options: &str| server(options).unwrap_err();
    for (options, option) in [
        ("--tls on", "--tls on"),
        ("--tls require --tls-ca /a", "--tls require"),
        ("--tls-key /k", "--tls-key"),
        ("--tls-ca /a", "--tls-ca"),
        ("--tls-allow a", "--tls-allow"),
    ] {
        assert_eq!(refused(options), format!("{option} needs --tls-cert as well"));
    }
    assert!(refused("--tls-cert /c --tls-allow a").starts_with("--tls-allow needs --tls-ca"));
    for options in ["--tls-cert /c", "--tls on --tls-cert /c", "--tls require --tls-cert /c"] {
        assert!(refused(&format!("{options} --oldstyle")).starts_with("--oldstyle excludes"));
    }
}

#[test]
fn invalid_values_are_refused() {
    let sentence = |options: &str| command(&format!("flexnbd serve -f /a {options}")).unwrap_err();
    assert!(sentence("--tls yes").contains("`yes` is none of off, on and require"));
    assert!(sentence("--tls-cert=").contains("the path is empty"));
    assert!(sentence("--tls-allow a/b").contains("`a/b` is neither a host name"));
}

#[test]
fn file_and_options_are_merged() {
    let merged = |options: &str, text: &str| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.conf");
        std::fs::write(&path, format!("FILE=/a\n{text}")).unwrap();
        let line = format!("flexnbd serve --config {} {options}", path.display());
        let loaded = request(&line).load().map(|config| config.admission.tls);
        loaded.map_err(|error| match error {
            StartRequestError::Misuse(text) | StartRequestError::Config(text) => {
                text.replace(path.to_str().unwrap(), "disk.conf")
            }
        })
    };
    let text = "TLS=require\nTLS_CERT=/c\nTLS_KEY=/k\nTLS_CA=/a\nTLS_ALLOW=a b,c\nTLS_ALLOW=d\n";
    let tls = merged("", text).unwrap().unwrap();
    let files = TlsFiles { cert: file("/c"), key: file("/k"), ca: file("/a") };
    assert_eq!((tls.mode, tls.files), (TlsMode::Require, files));
    assert_eq!(tls.allow, ["a", "b", "c", "d"].map(|name| name.parse().unwrap()));
    let tls = merged("--tls on --tls-cert /C --tls-allow e", text).unwrap().unwrap();
    let files = TlsFiles { cert: file("/C"), key: None, ca: file("/a") };
    assert_eq!((tls.mode, tls.files), (TlsMode::On, files));
    assert_eq!(tls.allow, ["e".parse().unwrap()]);
    assert_eq!(merged("--tls off", text), Ok(None));
    let error = merged("", "TLS=on\n").unwrap_err();
    assert_eq!(error, "disk.conf: TLS on needs TLS_CERT as well");
    let error = merged("", "TLS_CERT=/c\nOLDSTYLE=yes\n").unwrap_err();
    assert_eq!(error, "disk.conf: OLDSTYLE excludes TLS_CERT: the old handshake has no TLS");
    assert_eq!(merged("--tls on", "").unwrap_err(), "--tls on needs --tls-cert as well");
}

#[test]
fn reload_reads_tls_again_even_without_a_file() {
    assert!(request("flexnbd serve -f /a").reread().is_none());
    for line in
        ["serve -f /a --tls-cert /c", "proxy --to nbds://h", "proxy --to nbd://h --to-tls on"]
    {
        let reread = request(&format!("flexnbd {line}")).reread().unwrap();
        assert!((reread.0)().is_ok(), "{line}");
    }
}

#[test]
fn files_of_a_client_imply_require() {
    let mode = |options: &str| read(&format!("-l h -p 7 {options}")).unwrap().tls.mode;
    assert_eq!(mode(""), TlsMode::Off);
    assert_eq!(mode("--tls on"), TlsMode::On);
    for options in ["--tls-ca /a", "--tls-cert /c", "--tls-hostname n", "--tls require"] {
        assert_eq!(mode(options), TlsMode::Require, "{options}");
    }
    assert_eq!(mode("--tls-ca /a --tls on"), TlsMode::On);
    assert_eq!(mode("--tls-ca /a --tls off"), TlsMode::Off);
}

#[test]
fn every_option_of_a_client_is_parsed() {
    let options = "--tls require --tls-ca /a --tls-cert /c --tls-key /k --tls-hostname n";
    let files = TlsFiles { cert: file("/c"), key: file("/k"), ca: file("/a") };
    let transfer = read(&format!("-l 192.0.2.1 -p 7 {options}")).unwrap();
    assert_eq!(
        (transfer.tls_files, transfer.tls),
        (files.clone(), target(TlsMode::Require, Some("n")))
    );
    let expected = MirrorTls {
        mode: Some(TlsMode::Require),
        files: files.clone(),
        hostname: Some("n".to_owned()),
    };
    assert_eq!(mirror(options), Ok(expected));
    let options = options.replace("--tls", "--to-tls");
    let proxied = proxy(&format!("--to nbd://h {options}"));
    assert_eq!(proxied, Ok((files, vec![target(TlsMode::Require, Some("n"))])));
}

#[test]
fn nbds_requires_tls() {
    assert_eq!(read("--uri nbds://h/x").unwrap().tls, target(TlsMode::Require, None));
    assert_eq!(read("--uri nbds://h --tls on").unwrap().tls.mode, TlsMode::Require);
    let contradiction = "--tls off contradicts nbds, which means TLS";
    assert_eq!(read("--uri nbds://h --tls off").unwrap_err(), contradiction);
    assert_eq!(read("--uri nbd://h").unwrap().tls.mode, TlsMode::Off);
    let (_, targets) = proxy("--to nbds://a --to nbd://b").unwrap();
    assert_eq!(targets, [target(TlsMode::Require, None), TlsTarget::default()]);
    let (_, targets) = proxy("--to nbds://a --to nbd://b --to-tls-ca /a").unwrap();
    assert_eq!(targets, [target(TlsMode::Require, None), target(TlsMode::Require, None)]);
    let error = proxy("--to nbds://a --to-tls off").unwrap_err();
    assert_eq!(error, format!("--to-{}", &contradiction[2..]));
}

#[test]
fn unix_sockets_need_a_host_name() {
    let uri = "nbds+unix:///?socket=/s";
    let error = read(&format!("--uri {uri}")).unwrap_err();
    let expected = "the server at a unix socket needs a name to verify its certificate with: ";
    assert_eq!(error, format!("{expected}--tls-hostname"));
    let error = proxy(&format!("--to {uri}")).unwrap_err();
    assert_eq!(error, format!("{expected}--to-tls-hostname"));
    let named = target(TlsMode::Require, Some("n"));
    assert_eq!(read(&format!("--uri {uri} --tls-hostname n")).unwrap().tls, named);
    assert_eq!(read(&format!("--uri {uri}&tls-hostname=n")).unwrap().tls, named);
    assert_eq!(read(&format!("--uri {uri}&tls-hostname=n --tls-hostname m")).unwrap().tls, named);
    assert!(read("-l h -p 7 --tls-hostname a+b").unwrap_err().contains("`a+b` is neither"));
}

#[test]
fn keys_without_certificates_are_refused() {
    let needs = "--tls-key needs --tls-cert as well";
    assert_eq!(read("-l h -p 7 --tls-key /k").unwrap_err(), needs);
    assert_eq!(mirror("--tls-key /k").unwrap_err(), needs);
    let error = proxy("--to nbd://h --to-tls-key /k").unwrap_err();
    assert_eq!(error, "--to-tls-key needs --to-tls-cert as well");
}

#[test]
fn mirror_makes_paths_absolute() {
    assert_eq!(mirror(""), Ok(MirrorTls::default()));
    let tls = mirror("--tls-ca a.pem --tls-cert credential:c").unwrap();
    assert_eq!(tls.mode, Some(TlsMode::Require));
    let here = std::env::current_dir().unwrap().join("a.pem");
    assert_eq!(tls.files.ca, Some(TlsFile::Path(here)));
    assert_eq!(tls.files.cert, file("credential:c"));
}

#[test]
fn keys_of_a_proxy_are_parsed() {
    let text = "TO_TLS=on\nTO_TLS_CA=/a\nTO_TLS_CERT=/c\nTO_TLS_KEY=/k\nTO_TLS_HOSTNAME=n\n";
    let settings = config::parse(Path::new("disk.conf"), text).unwrap();
    let files = TlsFiles { cert: file("/c"), key: file("/k"), ca: file("/a") };
    let hostname = Some("n".to_owned());
    let expected = ClientTlsSettings { mode: Some(TlsMode::On), files, hostname };
    assert_eq!(settings.upstream.tls, expected);
    for line in text.lines() {
        let settings = config::parse(Path::new("disk.conf"), line).unwrap();
        assert_eq!(settings.upstream.first_key(), line.split('=').next());
    }
}

#[test]
fn keys_replace_options_in_sentences() {
    let sentence = "--to-tls-key needs --to-tls-cert as well";
    assert_eq!(with_keys(sentence), "TO_TLS_KEY needs TO_TLS_CERT as well");
    assert_eq!(with_keys("-- --x --tls on"), "-- --x TLS on");
    assert!(uri::parse("nbds://h").is_ok());
}
