//! The adversary as a client, of each kind of server. Afterwards the server has all that it had before, and
//! an honest client has noticed nothing.

use crate::honest::{LATENCY_MAX, Observed, serve_honestly};
use crate::requests::SIZE;
use crate::script::{Case, Link};
use crate::{control, handshakes, requests, tls};
use harness::pki::{Pki, Request};
use harness::{
    Builder, Endpoint, MIB, Program, Resources, Server, TIMEOUT, TempDir, noise, poll_until,
    sparse_image, temp_dir, write_at,
};
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Connections of the adversary at once.
const AT_ONCE: usize = 6;
/// Sessions of the adversary with one server.
const SESSIONS: usize = 10_000;
/// Those with a server that offers TLS.
const TLS_SESSIONS: usize = 2_000;
/// Growth of memory from the end of the first round of cases to the end of the last one.
const GROWTH_MAX: u64 = 8 * MIB;
/// Memory that the allocator may retain after the first round.
const RETAINED_MAX: u64 = 24 * MIB;

/// Runs cases at this endpoint: each once, then again those that are not heavy, until there were so many
/// sessions. Returns what the server did wrong.
fn attack(to: &Endpoint, cases: &[Case], sessions: usize) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let faults = Mutex::new(Vec::new());
    let light: Vec<&Case> = cases.iter().filter(|case| !case.is_heavy).collect();
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let case = match cases.get(index) {
                Some(case) => case,
                None if index < sessions => light[index % light.len()],
                None => return,
            };
            let fault = match case.run(to) {
                Some(outcome) => outcome.err(),
                None => Some(format!("{}: the server accepts no connection", case.name)),
            };
            faults.lock().unwrap().extend(fault);
        }
    };
    thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(work))));
    faults.into_inner().unwrap()
}

#[track_caller]
fn assert_faultless(faults: &[String]) {
    let shown: Vec<&String> = faults.iter().take(20).collect();
    assert!(faults.is_empty(), "{} faults: {shown:#?}", faults.len());
}

/// A server under attack, with all that an attack may not use up.
struct Target {
    server: Server,
    before: Resources,
    /// Its control socket.
    control: PathBuf,
    _dir: TempDir,
}

impl Target {
    /// A server of an empty disk, and a control socket beside it.
    fn new(builder: impl FnOnce(&TempDir) -> Builder) -> Target {
        let dir = temp_dir();
        let control = dir.path().join("control.sock");
        let server = builder(&dir).args(["--sock"]).args([&control]).start();
        server.wait_for_control(&control);
        let before = server.settled_resources();
        Target { server, before, control, _dir: dir }
    }

    fn serve(flags: &[&str]) -> Target {
        Target::new(|dir| Builder::serve(&sparse_image(dir.path(), "image", SIZE)).args(flags))
    }

    /// Attacks with all cases once, and then so often, while an honest client is served.
    fn withstand(self, cases: &[Case], sessions: usize, is_oldstyle: bool) {
        let is_over = AtomicBool::new(false);
        let to = self.server.endpoint().clone();
        let control = Endpoint::Unix(self.control.clone());
        let commands = control::cases();
        // They receive nothing for as long as the first round lasts.
        let stalled: Vec<Link> =
            cases.iter().filter(|case| case.is_heavy).filter_map(|case| case.begin(&to)).collect();
        let mut first = None;
        let observed = thread::scope(|scope| {
            let honest = scope.spawn(|| serve_honestly(&to, is_oldstyle, &is_over));
            // The honest client ends even if the attack fails.
            let (control, commands, to, target) = (&control, &commands, &to, &self);
            let attacks = scope.spawn(move || {
                let faults = thread::scope(|scope| {
                    let commands = scope.spawn(|| attack(control, commands, 0));
                    let mut faults = attack(to, cases, 0);
                    faults.extend(commands.join().unwrap());
                    faults
                });
                drop(stalled);
                let first = target.settled(3);
                let more = attack(to, cases, sessions.saturating_sub(cases.len()));
                (faults, first, more)
            });
            let outcome = attacks.join();
            is_over.store(true, Ordering::Relaxed);
            let observed = honest.join().unwrap();
            let (faults, resources, more) = outcome.unwrap();
            assert_faultless(&faults);
            assert_faultless(&more);
            first = Some(resources);
            observed
        });
        self.assert_unharmed(first.unwrap(), &observed);
    }

    /// Its resources once it has so many descriptors and threads more than before, at most.
    fn settled(&self, more: usize) -> Resources {
        let mut now = self.server.resources();
        poll_until(TIMEOUT, || {
            now = self.server.resources();
            now.descriptors <= self.before.descriptors + more
                && now.threads <= self.before.threads + more as u64
        });
        now
    }

    fn assert_unharmed(mut self, first: Resources, observed: &Observed) {
        println!("{observed:?}");
        assert!(observed.requests > 50 && observed.longest < LATENCY_MAX, "{observed:?}");
        let after = self.settled(0);
        let (before, shown) = (self.before, format!("{:?} {first:?} {after:?}", self.before));
        assert!(after.descriptors <= before.descriptors, "descriptors: {shown}");
        assert!(after.threads <= before.threads, "threads: {shown}");
        assert!(first.rss_bytes < before.rss_bytes + RETAINED_MAX, "memory: {shown}");
        assert!(after.rss_bytes < first.rss_bytes + GROWTH_MAX, "memory: {shown}");
        let status = Program::flexnbd("status").args(["--sock"]).args([&self.control]).ok();
        assert!(
            status.contains(" num_clients=0 ") && status.contains(" payload_bytes=0 "),
            "{status}"
        );
        assert!(self.server.stop().success());
        assert!(!self.server.stderr().contains("panicked"));
    }
}

fn newstyle_cases() -> Vec<Case> {
    let cases = [handshakes::cases(), requests::cases()].concat();
    assert!(cases.len() > 1000, "only {} cases", cases.len());
    cases
}

#[test]
fn an_honest_client_of_a_server_notices_no_attack() {
    Target::serve(&[]).withstand(&newstyle_cases(), SESSIONS, false);
}

#[test]
fn an_honest_client_of_an_oldstyle_server_notices_no_attack() {
    Target::serve(&["--oldstyle"]).withstand(&requests::oldstyle_cases(), 0, true);
}

#[test]
fn an_honest_client_of_a_server_with_tls_notices_no_attack() {
    let pki = Pki::new();
    let identity = pki.issue("server", &Request::server());
    let [cert, key] = [&identity.cert, &identity.key].map(|path| path.display().to_string());
    let cases = tls::cases(&pki);
    assert!(cases.len() > 400, "only {} cases", cases.len());
    let target = Target::serve(&["--tls", "on", "--tls-cert", &cert, "--tls-key", &key]);
    target.withstand(&cases, TLS_SESSIONS, false);
}

#[test]
fn an_honest_client_of_a_proxy_notices_no_attack() {
    let upstream = Target::serve(&[]);
    let uri = upstream.server.uri();
    let proxy = Target::new(|_| Builder::proxy().args(["--to", &uri]));
    proxy.withstand(&newstyle_cases(), 0, false);
}

#[test]
fn a_disk_arrives_at_a_destination_under_attack() {
    let dir = temp_dir();
    let (from, to) = ["from", "to"].map(|name| sparse_image(dir.path(), name, SIZE)).into();
    let content = noise(SIZE as usize, 5);
    write_at(&from, 0, &content);
    let control = dir.path().join("control.sock");
    let mut source = Builder::serve(&from).args(["--sock"]).args([&control]).start();
    source.wait_for_control(&control);
    let mut destination = Builder::mode("listen", &to).start();
    let cases = handshakes::cases();
    assert_faultless(&attack(destination.endpoint(), &cases, 0));
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let endpoint = destination.endpoint().clone();
        let (cases, is_over) = (&cases, &is_over);
        scope.spawn(move || {
            // Until the disk has arrived, which ends the destination.
            let mut light = cases.iter().filter(|case| !case.is_heavy).cycle();
            while !is_over.load(Ordering::Relaxed) {
                light.next().unwrap().run(&endpoint);
            }
        });
        let place = format!("--addr 127.0.0.1 --port {}", destination.port());
        let mirror = Program::flexnbd("mirror --wait").words(&place).args(["--sock"]);
        let outcome = mirror.args([&control]).run();
        is_over.store(true, Ordering::Relaxed);
        outcome.succeeded();
    });
    assert!(destination.wait_for_end().success() && source.wait_for_end().success());
    assert!(fs::read(&to).unwrap() == content);
    assert!(!destination.stderr().contains("panicked"));
}
