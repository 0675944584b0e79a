//! Migrations over a link that is cut and mended: what the source and its clients make of it.

use harness::host::{Host, MIRROR_STARTED};
use harness::image::{assert_same, stamped_image, used_image};
use harness::proxy::{CutAt, FLUSH_HEADER, HANDOVER_HEADER, Proxy};
use harness::writers::Writers;
use harness::{
    Endpoint, FILE_SYSTEMS, MIB, env_number, poll_until, raw, require_root, require_tool,
    sparse_file, temp_dir_in,
};
use std::process::Command;
use std::time::{Duration, Instant};

/// A quarter of it is data.
const SIZE: u64 = 128 * MIB;
const DATA: u64 = SIZE / 4;
/// The part of it that is written to.
const BUSY: u64 = MIB;
/// Bytes per second of the copy, so that little is in flight at a time.
const SPEED: &str = "32000000";
/// Between two batches of a writer.
const PAUSE: Duration = Duration::from_millis(20);
/// How much more than the data may go over the proxy if nothing is sent twice: what was in flight,
/// what the writers changed meanwhile, and the headers.
const SLACK: u64 = 12 * MIB;
/// After how many seconds without progress the source gives a connection up.
const PATIENCE: (&str, &str) = ("FLEXNBD_MS_REQUEST_LIMIT_SECS", "1");

/// How long the link stays cut.
fn outage() -> Duration {
    Duration::from_secs(env_number("FLEXNBD_CUT_SECONDS").unwrap_or(3))
}

/// A migration over a proxy that is cut at some moment, and mended after a while.
/// The source says one of these things about it.
fn is_resumed_after_a_cut(trap: CutAt, said: &[&str]) {
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let source = Host::new(dir.path(), "source").env(PATIENCE.0, PATIENCE.1);
    let destination = Host::new(dir.path(), "dest");
    stamped_image(&source.image, SIZE);
    used_image(&destination.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let mut proxy = Proxy::to(destination.address, trap);
    let writers = Writers::start(Endpoint::Tcp(source.address), BUSY, (2, 1, PAUSE));
    assert_eq!(source.mirror_to(proxy.address, &["exit", "0.0.0.0", SPEED]), MIRROR_STARTED);
    assert!(poll_until(Duration::from_secs(60), || proxy.is_cut()), "{trap:?} never happened");
    let before = proxy.bytes_sent();
    std::thread::sleep(outage());
    assert!(serving.is_running() && listening.is_running());
    proxy.repair();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 2, "no client noticed more than a pause");
    let log = serving.stderr();
    assert!(said.iter().any(|said| log.contains(said)), "{log}");
    let sent = proxy.bytes_sent();
    // After a handover that came to nothing clients are served for a while, and write.
    let once = sent < DATA + SLACK || log.contains("had not got the handover");
    assert!(once, "{DATA} bytes of data, {before} sent before the cut, {sent} in all");
    assert_same(&source.image, &destination.image);
    written.assert_all_present(&destination.image, &format!("{trap:?}"));
}

#[test]
fn a_copy_that_is_cut_off_is_resumed_where_it_was() {
    is_resumed_after_a_cut(CutAt::Bytes(DATA * 3 / 4), &["resumed where it was"]);
}

#[test]
fn a_cut_before_the_gate_closes_is_made_good() {
    is_resumed_after_a_cut(CutAt::Before(FLUSH_HEADER, 1), &["resumed where it was"]);
}

#[test]
fn a_cut_behind_the_closed_gate_opens_it_again() {
    is_resumed_after_a_cut(CutAt::Hold(FLUSH_HEADER), &["resumed where it was"]);
}

/// The longest time in which no write was acknowledged, until `end`.
fn longest_wait(writers: &Writers, mut end: impl FnMut() -> bool) -> Duration {
    let (mut last, mut since, mut longest) = (0, Instant::now(), Duration::ZERO);
    let ended = poll_until(Duration::from_secs(60), || {
        let acknowledged = writers.acknowledged();
        if acknowledged != last {
            (last, since) = (acknowledged, Instant::now());
        }
        longest = longest.max(since.elapsed());
        end()
    });
    assert!(ended, "after {longest:?}");
    longest
}

#[test]
fn a_silent_link_behind_the_closed_gate_does_not_stop_clients() {
    // Where no client has written between the last pass and the closing of the gate, the handover
    // itself is what the silent link swallows, and there is a doubt.
    assert!((0..10).any(|_| last_copy_meets_a_silent_link()), "the handover was always in doubt");
}

/// False if there was nothing to be copied behind the closed gate.
fn last_copy_meets_a_silent_link() -> bool {
    let dir = temp_dir_in(FILE_SYSTEMS[1]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, 8 * MIB);
    sparse_file(&destination.image, 8 * MIB);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let proxy = Proxy::to(destination.address, CutAt::Hold(FLUSH_HEADER));
    // So little that it always can be sent in time, as far as the source knows.
    let writers = Writers::start(Endpoint::Tcp(source.address), 64 << 10, (2, 1, PAUSE));
    writers.wait_for_writes(10);
    assert_eq!(source.mirror_to(proxy.address, &[]), MIRROR_STARTED);
    assert!(poll_until(Duration::from_secs(60), || proxy.is_held()));
    // On a slow machine the gate may not be closed at all behind a link that has fallen silent.
    let held = Instant::now();
    let is_over = || {
        let thawed = source.status_of("migration_waiting") == "last-copy";
        let in_doubt = source.status_of("migration_stage") == "in-doubt";
        thawed || in_doubt || held.elapsed() > Duration::from_secs(8)
    };
    let waited = longest_wait(&writers, is_over);
    if source.status_of("migration_stage") == "in-doubt" {
        proxy.release();
        assert!(serving.wait_for_end().success(), "{}", serving.stderr());
        writers.stop();
        return false;
    }
    assert!(waited < Duration::from_secs(5), "clients waited for {waited:?}");
    writers.wait_for_writes(10);
    assert_eq!(source.status_of("migration_stage"), "copying");
    assert_eq!(source.record(), "");
    assert!(proxy.is_held());
    proxy.release();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 2, "no client noticed more than a pause");
    let log = serving.stderr();
    let was_closed = log.matches("clients wait while the rest is sent").count() > 1;
    assert_eq!(was_closed, log.contains("could not be sent while clients waited"), "{log}");
    assert!(!log.contains("resumed"), "the link was only silent: {log}");
    written.assert_all_present(&destination.image, "after a silent link");
    true
}

#[test]
fn a_handover_that_does_not_get_through_is_made_again() {
    // Clients that have waited for long are let go before that.
    let said = ["handing over again", "resumed where it was"];
    is_resumed_after_a_cut(CutAt::Before(HANDOVER_HEADER, 1), &said);
}

#[test]
fn a_source_that_hears_no_acknowledgement_asks_until_somebody_knows() {
    let dir = temp_dir_in(FILE_SYSTEMS[1]);
    let source = Host::new(dir.path(), "source").env(PATIENCE.0, PATIENCE.1);
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
    let mut newcomer = raw::Wire::haggle(&Endpoint::Tcp(source.address), flags);
    let answer = newcomer.ask_final(raw::OPT_GO, &raw::encode_go(b"", &[]));
    assert_eq!(answer, raw::REP_ERR_POLICY, "the disk may be served elsewhere already");
    assert_eq!(
        source.command(&["break"]),
        "1: mirror completed",
        "it is too late to keep the disk"
    );
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_eq!(destination.record(), "ours");
    let mut arrived = destination.serve();
    writers.add_destination(Endpoint::Tcp(destination.address));
    std::thread::sleep(outage());
    assert!(serving.is_running(), "it waits for somebody who knows");
    proxy.repair();
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    writers.wait_for_destination();
    let written = writers.stop();
    assert!(arrived.stop().success());
    written.assert_all_present(&destination.image, "after an acknowledgement that was lost");
    assert_eq!(source.record(), "departed");
}

/// Two network namespaces with a cable between them. Dropping it removes all of it.
struct Cable {
    near: String,
    far: String,
}

impl Cable {
    const NEAR_ADDRESS: &str = "10.209.0.1/24";
    const FAR_ADDRESS: &str = "10.209.0.2/24";

    fn new() -> Cable {
        let name = |end| format!("flexnbd-{}-{end}", std::process::id());
        let cable = Cable { near: name("near"), far: name("far") };
        let ends = [(&cable.near, Self::NEAR_ADDRESS), (&cable.far, Self::FAR_ADDRESS)];
        for (namespace, _) in ends {
            ip(&["netns", "add", namespace]);
        }
        let pair = ["type", "veth", "peer", "name", "cable", "netns", &cable.far];
        ip(&[&["-n", &cable.near, "link", "add", "cable"], &pair[..]].concat());
        for (namespace, address) in ends {
            ip(&["-n", namespace, "address", "add", address, "dev", "cable"]);
            ip(&["-n", namespace, "link", "set", "cable", "up"]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        cable
    }

    /// Pulls it out at the far end, or puts it in again.
    fn set(&self, state: &str) {
        ip(&["-n", &self.far, "link", "set", "cable", state]);
    }

    /// Bytes that have left the near end.
    fn bytes_sent(&self) -> u64 {
        let file = "/sys/class/net/cable/statistics/tx_bytes";
        let output =
            Command::new("ip").args(["netns", "exec", &self.near, "cat", file]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for namespace in [&self.near, &self.far] {
            let _ = Command::new("ip").args(["netns", "delete", namespace]).status();
        }
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    harness::run("ip", arguments);
}

#[test]
fn a_cable_that_is_pulled_and_put_in_again_costs_only_the_time() {
    if !require_root("pulling a cable") || !require_tool("ip") {
        return;
    }
    let cable = Cable::new();
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let door = dir.path().join("door");
    let source = Host::new(dir.path(), "source").env(PATIENCE.0, PATIENCE.1);
    let source = source.through(&["ip", "netns", "exec", &cable.near]);
    let destination = Host::new(dir.path(), "dest").at("10.209.0.2:10809".parse().unwrap());
    let destination = destination.through(&["ip", "netns", "exec", &cable.far]);
    stamped_image(&source.image, SIZE);
    sparse_file(&destination.image, SIZE);
    let mut serving = source.mode("serve").unix(&door).start();
    let mut listening = destination.listen();
    let writers = Writers::start(Endpoint::Unix(door), BUSY, (2, 1, PAUSE));
    let order = ["exit", "0.0.0.0", SPEED];
    assert_eq!(source.mirror_to(destination.address, &order), MIRROR_STARTED);
    let half = poll_until(Duration::from_secs(60), || cable.bytes_sent() > DATA / 2);
    assert!(half, "the copy does not get anywhere: {:?}", source.status());
    cable.set("down");
    std::thread::sleep(outage());
    assert!(serving.is_running() && listening.is_running());
    cable.set("up");
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let (written, sent) = (writers.stop(), cable.bytes_sent());
    assert_eq!(written.connections, 2);
    assert!(serving.stderr().contains("resumed where it was"), "{}", serving.stderr());
    assert!(sent < DATA + SLACK, "{DATA} bytes of data, {sent} bytes sent");
    assert_same(&source.image, &destination.image);
    written.assert_all_present(&destination.image, "after the cable was pulled");
}
