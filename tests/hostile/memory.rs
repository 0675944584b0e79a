//! Memory for payloads: one limit over all clients, and each of them goes on under it.

use harness::raw::READ;
use harness::session::{MODES, Mode, Request, Session};
use harness::{Builder, KIB, MIB, Program, noise, sparse_image, temp_dir_in, wait_until, write_at};
use std::collections::HashMap;

const IMAGE_SIZE: u64 = 4 * MIB;
const CLIENTS: usize = 12;
/// Requests of each client: more than the session reads ahead of it.
const READS: u64 = 16;
const LIMIT: u64 = 4 * MIB;
/// Memory that each client has of its own (flexnbd(1), "LIMITS AND TIMEOUTS").
const OWN: u64 = 4 * MIB;

/// Clients ask for far more than the limit and receive nothing, then everything. The disk is read past
/// the page cache, so that every read takes memory of the session.
#[test]
fn payloads_of_all_clients_stay_within_one_limit() {
    let dir = temp_dir_in("/var/tmp");
    let image = sparse_image(dir.path(), "image", IMAGE_SIZE);
    let data = noise(IMAGE_SIZE as usize, 1);
    write_at(&image, 0, &data);
    let control = dir.path().join("control.sock");
    let flags = ["--direct", "--payload-memory", "4M", "--sock"];
    let server = Builder::serve(&image).args(flags).args([&control]).start();
    server.wait_for_control(&control);
    let status = |key: &str| -> u64 {
        let line = Program::flexnbd("status").args(["--sock"]).args([&control]).ok();
        let mut pairs = line.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == key).unwrap().1.parse().unwrap()
    };
    assert_eq!((status("payload_bytes"), status("payload_bytes_max")), (0, LIMIT));
    let before = server.settled_resources().rss_bytes;
    let mut clients: Vec<(Session, HashMap<u64, Request>)> = Vec::new();
    for index in 0..CLIENTS {
        let mut session = Session::open(server.endpoint(), MODES[index % MODES.len()]).unwrap();
        let requests = (0..READS).map(|at| Request::new(READ, at * KIB, MIB));
        let pending = requests.map(|request| (session.send(&request), request)).collect();
        clients.push((session, pending));
    }
    wait_until("the sessions to share memory", || status("payload_bytes") > 0);
    let mut honest = Session::open(server.endpoint(), Mode::Structured).unwrap();
    for at in 0..20 {
        let offset = 3 * MIB + at * 4 * KIB;
        honest.ok(Request::write(offset, &data[offset as usize..][..4096]));
        assert!(honest.read(offset, 4096) == data[offset as usize..][..4096]);
        let used = status("payload_bytes");
        assert!(used <= LIMIT, "{used} bytes, more than {LIMIT}");
    }
    for (session, pending) in &mut clients {
        while !pending.is_empty() {
            let (cookie, reply) = session.recv_reply(pending);
            let at = pending.remove(&cookie).unwrap().offset as usize;
            assert!(reply.error == 0 && reply.data == data[at..at + MIB as usize]);
        }
    }
    let growth = server.resources().rss_bytes_peak.saturating_sub(before);
    let most = LIMIT + OWN * CLIENTS as u64;
    assert!(growth < most, "growth of {growth} bytes, more than {most}");
    wait_until("the sessions to be idle", || status("payload_bytes") == 0);
}
