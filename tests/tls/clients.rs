//! Other programs as clients: libnbd, fio and QEMU, with X.509 certificates as each of them wants them.

use crate::{Certificates, SIZE, assert_same_files, libnbd_uri, tls_uri};
use harness::{Endpoint, Program, Server, require_tool, require_tools, sparse_image};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

/// The options of QEMU's programs for a client with certificates in this directory.
fn qemu_credentials(directory: &str) -> String {
    format!("tls-creds-x509,id=tls,endpoint=client,dir={directory},verify-peer=yes")
}

fn qemu_image(server: &Server) -> String {
    let Endpoint::Tcp(address) = server.endpoint() else { panic!("not TCP") };
    format!("driver=nbd,host=localhost,port={},tls-creds=tls", address.port())
}

#[test]
fn nbdinfo_reports_tls() {
    if !require_tool("nbdinfo") {
        return;
    }
    let certificates = Certificates::new();
    let server = certificates.serve(&certificates.demanding()).start();
    let uri = libnbd_uri(server.endpoint(), &certificates.directory("libnbd", true));
    assert_eq!(Program::new("nbdinfo").args(["--size", &uri]).ok(), format!("{SIZE}\n"));
    Program::new("nbdinfo").words("--is tls").args([&uri]).run().succeeded();
    let list = Program::new("nbdinfo").words("--list --json").args([&uri]).ok();
    assert!(list.contains("\"protocol\": \"newstyle-fixed\"") && list.contains("\"TLS\": true"));
    // Without TLS it is told why it gets nothing.
    Program::new("nbdinfo").args([server.uri()]).run().ended_with(1);
    let without = libnbd_uri(server.endpoint(), &certificates.directory("anonymous", false));
    Program::new("nbdinfo").args([without]).run().ended_with(1);
}

#[test]
fn nbdcopy_copies_both_ways_over_four_connections() {
    if !require_tool("nbdcopy") {
        return;
    }
    for certificates in [Certificates::new(), Certificates::rsa()] {
        let directory = certificates.directory("libnbd", true);
        let original = sparse_image(certificates.pki.path(), "original", SIZE);
        harness::write_at(&original, 1 << 20, &harness::noise(20 << 20, 7));
        let server = certificates.serve(&certificates.demanding()).start();
        let uri = libnbd_uri(server.endpoint(), &directory);
        let copy = || Program::new("nbdcopy").words("--connections=4 --requests=64 --flush");
        copy().args([&original]).args([&uri]).ok();
        assert_same_files(&original, &certificates.pki.path().join("image"));
        let out = certificates.pki.path().join("out");
        copy().args([&uri]).args([&out]).ok();
        assert_same_files(&original, &out);
        assert_eq!(server.stderr(), "");
    }
}

/// Runs a program that uses libnbd without letting it name a directory of certificates: libnbd looks for one
/// in the home of its user, unless that is root.
fn with_home(certificates: &Certificates) -> Program {
    let home = certificates.pki.path().join("home");
    let directory = certificates.directory("libnbd", true);
    fs::create_dir_all(home.join(".pki")).unwrap();
    fs::rename(&directory, home.join(".pki/libnbd")).unwrap();
    for path in [certificates.pki.path(), &home.join(".pki/libnbd/client-key.pem")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let program = Program::new("env").args([format!("HOME={}", home.display())]);
    if nix::unistd::geteuid().is_root() {
        program.words("setpriv --reuid=65534 --regid=65534 --clear-groups")
    } else {
        program
    }
}

#[test]
fn fio_verifies_writes_of_four_connections() {
    if !require_tool("fio") {
        return;
    }
    let certificates = Certificates::new();
    let server = certificates.serve(&certificates.demanding()).start();
    let fio = with_home(&certificates).words(
        "fio --name=verify --ioengine=nbd --rw=randwrite --bsrange=512-256k --bs_unaligned=0 --size=12m \
         --offset_increment=16m --numjobs=4 --iodepth=16 --verify=crc32c --verify_fatal=1 \
         --verify_state_save=0 --randseed=7 --group_reporting --output-format=json",
    );
    let uri = tls_uri(server.endpoint());
    let text = fio.args([format!("--uri={uri}")]).ok();
    let report: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let job = &report["jobs"][0];
    let bytes = |direction: &str| job[direction]["io_bytes"].as_u64().unwrap();
    assert_eq!((&job["error"], bytes("write")), (&0.into(), 4 * (12 << 20)), "bytes written");
    assert_eq!(bytes("read"), bytes("write"), "bytes verified");
    assert_eq!(server.stderr(), "");
}

#[test]
fn qemu_io_and_qemu_img_use_tls() {
    if !require_tools(&["qemu-io", "qemu-img"]) {
        return;
    }
    let certificates = Certificates::new();
    let directory = certificates.directory("qemu", true);
    let server = certificates.serve(&certificates.demanding()).start();
    let image = qemu_image(&server);
    let qemu_io = Program::new("qemu-io").args(["--object", &qemu_credentials(&directory)]);
    let script =
        ["write -P 7 1M 3M", "flush", "read -P 7 1M 3M", "read -P 0 0 1M", "discard 1M 1M"];
    let script = script.iter().flat_map(|line| ["-c", line]);
    let printed = qemu_io.args(script).args(["--image-opts", &image]).ok();
    assert!(!printed.contains("failed"), "{printed}");
    let out = certificates.pki.path().join("out");
    let convert =
        Program::new("qemu-img").args(["convert", "--object", &qemu_credentials(&directory)]);
    convert.args(["--image-opts", &image, "-O", "raw"]).args([&out]).ok();
    assert_same_files(&out, &certificates.pki.path().join("image"));
    assert!(fs::read(&out).unwrap()[2 << 20..4 << 20].iter().all(|byte| *byte == 7));
}

#[test]
fn qemu_without_a_certificate_is_refused() {
    if !require_tool("qemu-io") {
        return;
    }
    let certificates = Certificates::new();
    let server = certificates.serve(&certificates.demanding()).start();
    let directory = certificates.directory("anonymous", false);
    let qemu_io = Program::new("qemu-io").args(["--object", &qemu_credentials(&directory)]);
    let outcome = qemu_io.args(["-c", "read 0 512", "--image-opts", &qemu_image(&server)]).run();
    assert!(!outcome.status.success() || outcome.stderr.contains("failed"), "{}", outcome.text());
    let plain = format!("driver=nbd,host=localhost,port={}", server.port());
    let outcome = Program::new("qemu-io").args(["-c", "read 0 512", "--image-opts", &plain]).run();
    outcome.ended_with(1);
}
