//! Migrations over TLS: both ends prove who they are, or the disk stays.

use crate::{Certificates, identity_options};
use harness::host::Host;
use harness::image::{assert_same, stamped_image, used_image};
use harness::pki::{Identity, Pki, Request};
use harness::writers::Writers;
use harness::{Endpoint, MIB, Program, Server, temp_dir_in};
use std::time::Duration;

const SIZE: u64 = 32 * MIB;
const PAUSE: Duration = Duration::from_millis(20);

/// A source and a destination, and the identities of both, whose names are their addresses.
struct Pair {
    certificates: Certificates,
    source: Host,
    destination: Host,
    /// For both roles.
    identity: Identity,
    _directory: harness::TempDir,
}

impl Pair {
    fn new() -> Pair {
        let directory = temp_dir_in("/var/tmp");
        let certificates = Certificates::new();
        let source = Host::new(directory.path(), "source");
        let destination = Host::new(directory.path(), "dest");
        stamped_image(&source.image, SIZE);
        used_image(&destination.image, SIZE);
        let names = [destination.address.ip().to_string(), "dest.example".to_owned()];
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let identity = certificates.pki.issue("dest", &Request::server().named(&names));
        Pair { certificates, source, destination, identity, _directory: directory }
    }

    fn listen(&self, options: &str) -> Server {
        let options = format!("{} {options}", identity_options(&self.identity));
        self.destination.mode("listen").args(options.split_whitespace()).start()
    }

    /// Starts the source. The directory of its configuration is one that its sandbox admits, so that `mirror`
    /// can name certificates there.
    fn serve(&self) -> Server {
        let file = self.certificates.pki.path().join("source.conf");
        std::fs::write(&file, "").unwrap();
        self.source.mode("serve").args(["--config"]).args([&file]).start()
    }

    /// `flexnbd mirror --wait` with these options.
    fn mirror(&self, options: &str) -> harness::Outcome {
        let to = Endpoint::Tcp(self.destination.address).flags();
        let line = format!("mirror {to} --wait {options} --sock");
        Program::flexnbd(&line).args([&self.source.control]).run()
    }

    #[track_caller]
    fn assert_moved(&self, mut serving: Server, mut listening: Server) {
        assert!(serving.wait_for_end().success(), "{}", serving.stderr());
        assert!(listening.wait_for_end().success(), "{}", listening.stderr());
        assert_same(&self.source.image, &self.destination.image);
        let records = (self.source.record(), self.destination.record());
        assert_eq!(records, ("departed".into(), "ours".into()));
    }
}

#[test]
fn a_disk_moves_under_writers_between_hosts_that_verify_each_other() {
    let pair = Pair::new();
    let listening =
        pair.listen(&format!("{} --tls-allow client.example", pair.certificates.demanding()));
    let serving = pair.serve();
    let writers = Writers::start(Endpoint::Tcp(pair.source.address), SIZE, (2, 1, PAUSE));
    writers.wait_for_writes(100);
    pair.mirror(&pair.certificates.client_options(true)).succeeded();
    let written = writers.stop();
    pair.assert_moved(serving, listening);
    written.assert_all_present(&pair.destination.image, "over TLS");
}

#[test]
fn server_uses_its_own_certificates_and_its_own_demand() {
    let pair = Pair::new();
    let listening = pair.listen("--tls require");
    // For both purposes, as is usual for hosts that move disks to each other.
    let options = format!(
        "{} {}",
        identity_options(&pair.certificates.server),
        pair.certificates.demanding()
    );
    let serving = pair.source.mode("serve").args(options.split_whitespace()).start();
    pair.mirror("").succeeded();
    pair.assert_moved(serving, listening);
}

#[test]
fn plain_source_is_refused_by_require() {
    let pair = Pair::new();
    let mut listening = pair.listen(&pair.certificates.demanding());
    let mut serving = pair.serve();
    pair.mirror("").refused(1, &["TLS"]);
    pair.mirror("--tls off").refused(1, &["TLS"]);
    assert!(serving.is_running() && listening.is_running());
    assert_eq!(pair.source.record(), "");
}

#[test]
fn each_end_refuses_an_unproven_other() {
    let pair = Pair::new();
    let mut listening =
        pair.listen(&format!("{} --tls-allow client.example", pair.certificates.demanding()));
    let mut serving = pair.serve();
    let ca = pair.certificates.client_options(false);
    pair.mirror(&ca).refused(1, &["it demands a certificate"]);
    let other = pair.certificates.pki.issue("other", &Request::client(&["other.example"]));
    let with_other = format!("{ca} {}", identity_options(&other));
    pair.mirror(&with_other).refused(1, &["none of the names that it allows"]);
    let whole = pair.certificates.client_options(true);
    pair.mirror(&format!("{whole} --tls-hostname wrong.example"))
        .refused(1, &["is not for wrong.example"]);
    // In the directory that the sandbox admits.
    let foreign = pair.certificates.pki.path().join("foreign.pem");
    std::fs::copy(Pki::new().ca(), &foreign).unwrap();
    let distrusting = whole.replacen("ca.pem", "foreign.pem", 1);
    pair.mirror(&distrusting).refused(1, &["not from an authority that is trusted here"]);
    assert!(serving.is_running() && listening.is_running());
    assert_eq!((pair.source.record(), pair.destination.record()), Default::default());
    pair.mirror(&format!("{whole} --tls-hostname dest.example")).succeeded();
    pair.assert_moved(serving, listening);
}

#[test]
fn plain_destination_is_refused_by_require_and_taken_by_on() {
    let pair = Pair::new();
    let mut listening = pair.destination.listen();
    let mut serving = pair.serve();
    pair.mirror(&pair.certificates.client_options(true)).refused(1, &["TLS"]);
    assert!(serving.is_running() && listening.is_running());
    pair.mirror(&format!("--tls on {}", pair.certificates.client_options(true))).succeeded();
    pair.assert_moved(serving, listening);
}

#[test]
fn unusable_files_of_a_mirror_are_reported() {
    let pair = Pair::new();
    let _listening = pair.listen("--tls require");
    let mut serving = pair.serve();
    let elsewhere = temp_dir_in("/var/tmp");
    let foreign = elsewhere.path().join("ca.pem");
    std::fs::copy(pair.certificates.pki.ca(), &foreign).unwrap();
    // Where the kernel has Landlock; elsewhere the file is read.
    if pair.source.status_of("sandbox").contains("landlock") {
        let outcome = pair.mirror(&format!("--tls-ca {}", foreign.display()));
        outcome.refused(1, &["the sandbox does not admit its directory"]);
    }
    pair.mirror("--tls-ca /missing.pem")
        .refused(1, &["cannot read /missing.pem: it does not exist"]);
    assert!(serving.is_running());
}

#[test]
fn clients_are_relayed_over_tls() {
    let pair = Pair::new();
    let mut listening = pair.listen(&pair.certificates.demanding());
    let mut serving = pair.serve();
    let writers = Writers::start(Endpoint::Tcp(pair.source.address), SIZE, (2, 1, PAUSE));
    writers.wait_for_writes(50);
    let options = pair.certificates.client_options(true);
    let source = pair.source.clone();
    let destination = pair.destination.clone();
    let to = Endpoint::Tcp(destination.address).flags();
    let line = format!("mirror {to} --relay {options} --sock");
    Program::flexnbd(&line).args([&source.control]).ok();
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let demanding = pair.certificates.demanding();
    let served = format!("{} {demanding}", identity_options(&pair.identity));
    let _served = destination.mode("serve").args(served.split_whitespace()).start();
    source.wait_for_status("relaying_to", &destination.address.to_string());
    writers.wait_for_writes(100);
    let written = writers.stop();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    written.assert_all_present(&destination.image, "relayed over TLS");
}
