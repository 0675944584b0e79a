//! Other programs as servers: nbdkit and QEMU, for `read`, `write` and `proxy`.

use crate::{Certificates, SIZE, assert_same_files, libnbd_uri, read, tls_uri};
use harness::{
    Builder, Endpoint, Peer, Program, free_port, noise, read_at, require_tool, require_tools,
};
use std::fs;
use std::path::Path;

/// How another program serves an image with TLS, from a directory of certificates.
type Start = fn(&Path, &str, Endpoint) -> Program;

const SERVERS: [(&str, Start); 3] =
    [("nbdkit", nbdkit), ("qemu-nbd", qemu_nbd), ("qemu-storage-daemon", qemu_storage_daemon)];

fn port(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Tcp(address) => address.port().to_string(),
        Endpoint::Unix(path) => panic!("{path:?}"),
    }
}

fn nbdkit(image: &Path, directory: &str, at: Endpoint) -> Program {
    let options = format!("-f --tls=require --tls-verify-peer --tls-certificates={directory}");
    let program = Program::new("nbdkit").words(&options);
    program.args(["-i", "127.0.0.1", "-p", &port(&at), "file"]).args([image])
}

fn credentials(directory: &str) -> String {
    format!("tls-creds-x509,id=tls,endpoint=server,dir={directory},verify-peer=yes")
}

fn qemu_nbd(image: &Path, directory: &str, at: Endpoint) -> Program {
    let program = Program::new("qemu-nbd").args(["--object", &credentials(directory)]);
    let program = program.words("--tls-creds tls -f raw -t -e 8 -b 127.0.0.1 -p");
    program.args([port(&at)]).args([image])
}

fn qemu_storage_daemon(image: &Path, directory: &str, at: Endpoint) -> Program {
    let file = format!("file,node-name=disk,filename={}", image.display());
    let server =
        format!("addr.type=inet,addr.host=127.0.0.1,addr.port={},tls-creds=tls", port(&at));
    Program::new("qemu-storage-daemon")
        .args(["--object", &credentials(directory), "--blockdev", &file])
        .args(["--nbd-server", &server])
        .args(["--export", "nbd,id=export,node-name=disk,name=,writable=on"])
}

#[track_caller]
fn start(kind: Start, certificates: &Certificates) -> Peer {
    let endpoint = Endpoint::localhost(free_port());
    let directory = certificates.directory("theirs", false);
    kind(&certificates.image(), &directory, endpoint.clone()).serve_at(endpoint)
}

#[test]
fn written_data_is_read_back_from_each_server() {
    for (name, kind) in SERVERS {
        if !require_tool(name) {
            continue;
        }
        let certificates = Certificates::new();
        let peer = start(kind, &certificates);
        let (uri, options) = (tls_uri(&peer.endpoint), certificates.client_options(true));
        let data = noise(5 << 20, 3);
        let write = Program::flexnbd("write --from 4096 --size 5M --uri").args([&uri]);
        write.words(&options).input(&data).ok();
        let back = Program::flexnbd("read --from 4096 --size 5M --uri").args([&uri]);
        let outcome = back.words(&options).run();
        assert!(outcome.succeeded().stdout == data, "{name}: data read back");
        // `on` uses it where the server has it.
        let plain = peer.uri();
        read(&plain, &format!("{options} --tls on")).run().succeeded();
        peer.stop();
        assert!(
            read_at(&certificates.pki.path().join("image"), 4096, data.len()) == data,
            "{name}"
        );
    }
}

#[test]
fn each_server_is_refused_for_each_fault() {
    for (name, kind) in SERVERS {
        if !require_tool(name) {
            continue;
        }
        let (certificates, other) = (Certificates::new(), Certificates::new());
        let peer = start(kind, &certificates);
        let uri = tls_uri(&peer.endpoint);
        let options = certificates.client_options(true);
        let ca_of_other = format!("--tls-ca {}", other.pki.ca().display());
        read(&uri, &ca_of_other).run().refused(1, &["TLS", "certificate"]);
        let name_of_other = format!("{options} --tls-hostname other.example");
        read(&uri, &name_of_other).run().refused(1, &["is not for other.example; its names: "]);
        // Without a client certificate; with TLS 1.3 the server says so after the handshake.
        read(&uri, &certificates.client_options(false)).run().ended_with(1);
        // Without TLS.
        let plain = read(&peer.uri(), "").run();
        plain.refused(1, &["TLS"]);
    }
}

/// A file that makes GnuTLS programs speak only this version.
fn configuration(certificates: &Certificates, version: &str) -> String {
    let path = certificates.pki.path().join(format!("gnutls-{version}"));
    let others =
        ["tls1.0", "tls1.1", "tls1.2", "tls1.3"].into_iter().filter(|other| *other != version);
    let lines: String = others.map(|other| format!("disabled-version = {other}\n")).collect();
    fs::write(&path, format!("[overrides]\n{lines}")).unwrap();
    path.display().to_string()
}

#[test]
fn gnutls_of_either_version_works_in_both_roles() {
    if !require_tools(&["nbdkit", "nbdinfo"]) {
        return;
    }
    let certificates = Certificates::new();
    let ours = certificates.serve(&certificates.demanding()).start();
    let directory = certificates.directory("theirs", true);
    let uri = libnbd_uri(ours.endpoint(), &directory);
    let (image, options) = (certificates.image(), certificates.client_options(true));
    for (version, works) in [("tls1.1", false), ("tls1.2", true), ("tls1.3", true)] {
        let variable =
            format!("GNUTLS_SYSTEM_PRIORITY_FILE={}", configuration(&certificates, version));
        let nbdinfo = Program::new("env").args([&variable, "nbdinfo", "--size", &uri]).run();
        nbdinfo.ended_with(i32::from(!works));
        let endpoint = Endpoint::localhost(free_port());
        let nbdkit = Program::new("env").args([&variable, "nbdkit", "-f", "--tls=require"]);
        let nbdkit = nbdkit.args([format!("--tls-certificates={directory}")]);
        let nbdkit =
            nbdkit.args(["-i", "127.0.0.1", "-p", &port(&endpoint), "file"]).args([&image]);
        let peer = nbdkit.serve_at(endpoint);
        read(&tls_uri(&peer.endpoint), &options).run().ended_with(i32::from(!works));
    }
}

#[test]
fn proxy_of_each_server_passes_a_disk_on() {
    if !require_tool("nbdcopy") {
        return;
    }
    for (name, kind) in SERVERS {
        if !require_tool(name) {
            continue;
        }
        let certificates = Certificates::new();
        let peer = start(kind, &certificates);
        let options = certificates.client_options(true).replace("--tls", "--to-tls");
        let proxy = Builder::proxy().args(["--to", &tls_uri(&peer.endpoint)]);
        let proxy = proxy.args(options.split_whitespace()).start();
        let original = certificates.pki.path().join("original");
        harness::sparse_file(&original, SIZE);
        harness::write_at(&original, 1 << 20, &noise(8 << 20, 9));
        Program::new("nbdcopy").words("--flush").args([&original]).args([proxy.uri()]).ok();
        drop(proxy);
        peer.stop();
        assert_same_files(&original, &certificates.pki.path().join("image"));
    }
}
