//! Migrations over a link that fails and recovers: the source resumes without sending data twice,
//! and sessions of clients stay open.

use crate::veth::VethPair;
use harness::host::{Host, MIRROR_STARTED};
use harness::image::{assert_same, stamped_image, used_image};
use harness::proxy::{CutAt, FLUSH_HEADER, HANDOVER_HEADER, Proxy};
use harness::writers::Writers;
use harness::{
    Endpoint, FILE_SYSTEMS, KIB, MIB, env_number, poll_until, raw, require_root, require_tool,
    sparse_file, temp_dir_in,
};
use std::time::{Duration, Instant};

/// Size of the disk, and of the data in it.
const SIZE: u64 = 128 * MIB;
const DATA: u64 = SIZE / 4;
/// The part of the disk that writers use.
const WRITTEN_SIZE: u64 = MIB;
/// Rate limit of the copy, in bytes per second, so that little is in flight at a time.
const BYTES_PER_SEC_MAX: &str = "32000000";
/// Pause between two batches of a writer.
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes beyond `DATA` that the source may send if it sends nothing twice: requests in flight
/// during the cut, blocks that writers dirtied, and headers.
const SLACK: u64 = 12 * MIB;
/// Seconds without progress after which the source gives up a connection: variable and value.
const REQUEST_LIMIT: (&str, &str) = ("FLEXNBD_MS_REQUEST_LIMIT_SECS", "1");
/// Limit of all waits for the copy.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);
const RESUMED: &str = "resumed where it was";

/// How long the link stays cut.
fn outage() -> Duration {
    Duration::from_secs(env_number("FLEXNBD_CUT_SECONDS").unwrap_or(3))
}

/// Migrates through a proxy that cuts the link at `cut_at` and is repaired after the outage. The
/// migration must resume, and the source must log one of `messages`.
fn assert_resumed_after(cut_at: CutAt, messages: &[&str]) {
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let source = Host::new(dir.path(), "source").env(REQUEST_LIMIT.0, REQUEST_LIMIT.1);
    let destination = Host::new(dir.path(), "dest");
    stamped_image(&source.image, SIZE);
    used_image(&destination.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let mut proxy = Proxy::to(destination.address, cut_at);
    let writers = Writers::start(Endpoint::Tcp(source.address), WRITTEN_SIZE, (2, 1, PAUSE));
    let options = ["exit", "0.0.0.0", BYTES_PER_SEC_MAX];
    assert_eq!(source.mirror_to(proxy.address, &options), MIRROR_STARTED);
    assert!(poll_until(COPY_TIMEOUT, || proxy.is_cut()), "{cut_at:?} is never reached");
    let before = proxy.bytes_sent();
    std::thread::sleep(outage());
    assert!(serving.is_running() && listening.is_running());
    proxy.repair();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 2, "client sessions stay open");
    let log = serving.stderr();
    assert!(messages.iter().any(|message| log.contains(message)), "{log}");
    let sent = proxy.bytes_sent();
    // If the destination had not received the handover, the source serves clients again, and their
    // writes add to the copy.
    let sent_once = sent < DATA + SLACK || log.contains("had not got the handover");
    assert!(sent_once, "{DATA} bytes of data, {before} sent before the cut, {sent} in all");
    assert_same(&source.image, &destination.image);
    written.assert_all_present(&destination.image, &format!("{cut_at:?}"));
}

#[test]
fn copy_resumes_after_a_cut() {
    assert_resumed_after(CutAt::Bytes(DATA * 3 / 4), &[RESUMED]);
}

#[test]
fn copy_resumes_after_a_cut_before_the_flush() {
    assert_resumed_after(CutAt::Before(FLUSH_HEADER, 1), &[RESUMED]);
}

#[test]
fn copy_resumes_after_a_cut_with_closed_gate() {
    assert_resumed_after(CutAt::Hold(FLUSH_HEADER), &[RESUMED]);
}

#[test]
fn lost_handover_request_is_sent_again() {
    // If the gate has been closed for too long, the source opens it, and resumes the copy instead.
    assert_resumed_after(CutAt::Before(HANDOVER_HEADER, 1), &["handing over again", RESUMED]);
}

/// The longest time without an acknowledged write until `is_over` is true.
#[track_caller]
fn longest_stall(writers: &Writers, mut is_over: impl FnMut() -> bool) -> Duration {
    let (mut last, mut since, mut longest) = (0, Instant::now(), Duration::ZERO);
    let ended = poll_until(COPY_TIMEOUT, || {
        let acknowledged = writers.acknowledged();
        if acknowledged != last {
            (last, since) = (acknowledged, Instant::now());
        }
        longest = longest.max(since.elapsed());
        is_over()
    });
    assert!(ended, "not over after {COPY_TIMEOUT:?}, longest stall {longest:?}");
    longest
}

#[test]
fn silent_link_with_closed_gate_blocks_clients_briefly() {
    // If no client writes between the last pass and the closing of the gate, there is no final
    // copy: the proxy holds the handover, which is then in doubt.
    assert!((0..10).any(|_| check_silent_link()), "no final copy in ten attempts");
}

/// Migrates over a link that falls silent before the final copy. False if there was no final copy.
fn check_silent_link() -> bool {
    let dir = temp_dir_in(FILE_SYSTEMS[1]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, 8 * MIB);
    sparse_file(&destination.image, 8 * MIB);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let proxy = Proxy::to(destination.address, CutAt::Hold(FLUSH_HEADER));
    // Writers dirty so little that the source always expects the final copy to be short enough.
    let writers = Writers::start(Endpoint::Tcp(source.address), 64 * KIB, (2, 1, PAUSE));
    writers.wait_for_writes(10);
    assert_eq!(source.mirror_to(proxy.address, &[]), MIRROR_STARTED);
    assert!(poll_until(COPY_TIMEOUT, || proxy.is_held()));
    let held = Instant::now();
    let has_reacted = || {
        let reopened = source.status_of("migration_waiting") == "last-copy";
        let in_doubt = source.status_of("migration_stage") == "in-doubt";
        // On a slow machine the link may fall silent before the gate closes, which then stays open.
        reopened || in_doubt || held.elapsed() > Duration::from_secs(8)
    };
    let stall = longest_stall(&writers, has_reacted);
    if source.status_of("migration_stage") == "in-doubt" {
        proxy.release();
        assert!(serving.wait_for_end().success(), "{}", serving.stderr());
        writers.stop();
        return false;
    }
    assert!(stall < Duration::from_secs(5), "clients were blocked for {stall:?}");
    writers.wait_for_writes(10);
    assert_eq!(source.status_of("migration_stage"), "copying");
    assert_eq!(source.record(), "");
    assert!(proxy.is_held());
    proxy.release();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 2, "client sessions stay open");
    let log = serving.stderr();
    // The last of these lines belongs to the successful handover.
    let was_closed = log.matches("clients wait while the rest is sent").count() > 1;
    assert_eq!(was_closed, log.contains("could not be sent while clients waited"), "{log}");
    assert!(!log.contains("resumed"), "a silent link is not reconnected: {log}");
    written.assert_all_present(&destination.image, "after a silent link");
    true
}

#[test]
fn source_in_doubt_probes_until_the_destination_answers() {
    let dir = temp_dir_in(FILE_SYSTEMS[1]);
    let source = Host::new(dir.path(), "source").env(REQUEST_LIMIT.0, REQUEST_LIMIT.1);
    let destination = Host::new(dir.path(), "dest");
    stamped_image(&source.image, MIB);
    sparse_file(&destination.image, MIB);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let mut proxy = Proxy::to(destination.address, CutAt::After(HANDOVER_HEADER));
    let writers = Writers::start(Endpoint::Tcp(source.address), MIB, (2, 1, PAUSE));
    writers.wait_for_writes(10);
    assert_eq!(source.mirror_to(proxy.address, &[]), MIRROR_STARTED);
    source.wait_for_status("migration_stage", "in-doubt");
    assert_eq!(source.record(), "departing");
    let flags = raw::FIXED_NEWSTYLE | raw::NO_ZEROES;
    let mut client = raw::Wire::haggle(&Endpoint::Tcp(source.address), flags);
    let reply = client.ask_final(raw::OPT_GO, &raw::encode_go(b"", &[]));
    assert_eq!(reply, raw::REP_ERR_POLICY, "the destination may serve the disk already");
    let reply = source.command(&["break"]);
    assert_eq!(reply, "1: mirror completed", "in doubt, the source cannot keep the disk");
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_eq!(destination.record(), "ours");
    let mut serving_destination = destination.serve();
    writers.add_destination(Endpoint::Tcp(destination.address));
    std::thread::sleep(outage());
    assert!(serving.is_running(), "the source stays in doubt while the link is cut");
    proxy.repair();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    writers.wait_for_destination();
    let written = writers.stop();
    assert!(serving_destination.stop().success());
    written.assert_all_present(&destination.image, "after a lost acknowledgement");
    assert_eq!(source.record(), "departed");
}

#[test]
fn copy_resumes_after_an_interface_went_down() {
    if !require_root("network namespaces") || !require_tool("ip") {
        return;
    }
    let veth = VethPair::new();
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let socket = dir.path().join("nbd.sock");
    let source = Host::new(dir.path(), "source").env(REQUEST_LIMIT.0, REQUEST_LIMIT.1);
    let source = source.through(&["ip", "netns", "exec", &veth.source]);
    let address = format!("{}:10809", VethPair::DESTINATION_IP);
    let destination = Host::new(dir.path(), "dest").at(address.parse().unwrap());
    let destination = destination.through(&["ip", "netns", "exec", &veth.destination]);
    stamped_image(&source.image, SIZE);
    sparse_file(&destination.image, SIZE);
    let mut serving = source.mode("serve").unix(&socket).start();
    let mut listening = destination.listen();
    let writers = Writers::start(Endpoint::Unix(socket), WRITTEN_SIZE, (2, 1, PAUSE));
    let options = ["exit", "0.0.0.0", BYTES_PER_SEC_MAX];
    assert_eq!(source.mirror_to(destination.address, &options), MIRROR_STARTED);
    let half_sent = poll_until(COPY_TIMEOUT, || veth.bytes_sent() > DATA / 2);
    assert!(half_sent, "the copy makes no progress: {:?}", source.status());
    veth.set_state("down");
    std::thread::sleep(outage());
    assert!(serving.is_running() && listening.is_running());
    veth.set_state("up");
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let (written, sent) = (writers.stop(), veth.bytes_sent());
    assert_eq!(written.connections, 2, "client sessions stay open");
    assert!(serving.stderr().contains(RESUMED), "{}", serving.stderr());
    assert!(sent < DATA + SLACK, "{DATA} bytes of data, {sent} bytes sent");
    assert_same(&source.image, &destination.image);
    written.assert_all_present(&destination.image, "after the interface went down");
}
