//! Tests that the benchmarks measure correctly. `cargo bench` runs the benchmarks themselves, from
//! the crate roots peers.rs, sending.rs and migrate.rs. These have no test harness, so all tests are
//! here.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod machine;
mod migration;
mod nbd;
mod process;
mod report;
mod serving;

use clap::{Parser, ValueEnum};
use flexnbd::net::{Address, Stream};
use migration::client::Completion;
use migration::disks::Kind;
use migration::pause::{REQUESTS_WARMING, divide, percentile};
use migration::rates::{KindResult, Run, SystemResult};
use report::median;
use serde_json::Value;
use serving::cells::{Cell, Generator, Set, Transport, Work};
use serving::minimal;
use serving::raw::{Picker, Session, Sessions, payload};
use serving::results::{
    CellResult, Round, Sample, ServerResult, geometric_mean, means, ratio, ratio_of_limit,
};
use serving::run_bench;
use serving::servers::{Running, servers};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

#[test]
fn statistics_of_few_and_of_many_values() {
    assert_eq!(median([3.0, 1000.0, 2.0]), Some(3.0));
    assert_eq!(median([4.0, 2.0]), Some(3.0));
    assert_eq!(median([]), None);
    let mean = geometric_mean(&[2.0, 0.5]).unwrap();
    assert!((mean - 1.0).abs() < 1e-12, "{mean}");
    assert_eq!((geometric_mean(&[]), geometric_mean(&[1.0, 0.0])), (None, None));
    let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
    assert_eq!(percentile(values.clone(), 99), Some(198.0));
    assert_eq!(percentile(values, 100), Some(200.0));
    assert_eq!(percentile(Vec::new(), 99), None);
}

/// A server with this processor time per request and these rates; 0 is a failed round.
fn result(name: &str, server_cpu_us_per_request: f64, rates: &[f64]) -> ServerResult {
    let round = |rate: &f64| match *rate {
        0.0 => Round::Failed("died".to_owned()),
        requests_per_sec => Round::Measured(Sample {
            requests_per_sec,
            server_cpu_us_per_request,
            ..Sample::default()
        }),
    };
    ServerResult::new(name, name.starts_with("flexnbd"), rates.iter().map(round).collect())
}

#[test]
fn each_figure_has_its_own_best_peer() {
    let ours = result("flexnbd", 2.0, &[300.0]);
    let (nbdkit, qemu) = (result("nbdkit", 8.0, &[200.0]), result("qemu-nbd", 4.0, &[100.0]));
    let found = ratio(&[ours.clone(), nbdkit, qemu]).unwrap();
    assert_eq!((found.peer.as_str(), found.rate, found.cpu), ("nbdkit", 1.5, 0.5));
    assert!(ratio(&[ours.clone(), result("flexnbd-old", 1.0, &[6.0])]).is_none());
    assert!(ratio(&[ours, result("nbdkit", 1.0, &[0.0])]).is_none());
}

#[test]
fn a_minimal_server_is_a_limit_and_no_peer() {
    let results = [result("flexnbd", 2.0, &[300.0]), result("null", 1.0, &[400.0])];
    assert!(ratio(&results).is_none());
    let found = ratio_of_limit(&results).unwrap();
    assert_eq!((found.peer.as_str(), found.rate, found.cpu), ("null", 0.75, 2.0));
    let results = [results.to_vec(), vec![result("nbdkit", 4.0, &[100.0])]].concat();
    assert_eq!(ratio(&results).unwrap().peer, "nbdkit");
}

#[test]
fn spread_compares_measured_rounds_with_one_peer() {
    let spread = |ours: &[f64]| {
        let nbdkit = result("nbdkit", 1.0, &[10.0, 20.0, 10.0]);
        let qemu = result("qemu-nbd", 1.0, &[1.0, 100.0, 1.0]);
        let ratio = ratio(&[result("flexnbd", 1.0, ours), nbdkit, qemu]).unwrap();
        (ratio.rate_lowest, ratio.rate, ratio.rate_highest)
    };
    assert_eq!(spread(&[30.0, 10.0, 20.0]), (0.5, 2.0, 3.0));
    assert_eq!(spread(&[30.0, 0.0, 20.0]), (2.0, 2.5, 3.0));
}

#[test]
fn each_generator_has_its_own_mean() {
    let small = Set::Small.cells()[0];
    let fio = Cell { generator: Generator::Fio, ..small };
    let cells = [(small, 4.0), (small, 1.0), (fio, 0.5)].map(|(cell, rate)| {
        let servers = vec![result("flexnbd", 2.0, &[rate]), result("nbdkit", 4.0, &[1.0])];
        CellResult::new(cell, servers)
    });
    let means: Vec<_> = means(&cells).iter().map(|mean| (mean.cells, mean.rate)).collect();
    assert_eq!(means, [(2, 2.0), (1, 0.5)]);
}

#[test]
fn failed_migrations_do_not_count_in_the_rate() {
    let system = |name: &str, seconds: &[f64]| {
        let runs = seconds.iter().map(|seconds| Ok(Run { seconds: *seconds, ..Run::default() }));
        let runs = runs.chain([Err("died".to_owned())]).collect();
        SystemResult::new(name, name == "flexnbd", runs)
    };
    let rates = |ours: &[f64]| {
        let systems = vec![system("flexnbd", ours), system("nbdcopy", &[4.0]), system("qemu", &[])];
        KindResult::new(Kind::Dense, 1 << 20, systems).rate_against
    };
    assert_eq!(rates(&[9.0, 2.0, 1.0]), BTreeMap::from([("nbdcopy".to_owned(), 2.0)]));
    assert_eq!(rates(&[]), BTreeMap::new());
}

#[test]
fn requests_in_flight_at_the_order_do_not_count() {
    let start = Instant::now();
    let millis = Duration::from_millis;
    let one = |due, latency| Completion { due: start + millis(due), latency: millis(latency) };
    let mut all = vec![one(0, 1); REQUESTS_WARMING];
    all.extend([one(5, 1), one(9, 2), one(10, 3)]);
    let (before, during) = divide(&all, start + millis(10));
    assert_eq!((before.all, during.all), (vec![1000.0], vec![3000.0]));
}

fn cell(work: Work, block: u32) -> Cell {
    Cell { block, work, depth: 8, sessions: 3, ..Set::Default.cells()[0] }
}

fn session(cell: &Cell) -> (Session, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Session::new(Stream::Unix(ours), cell, Picker::new(cell, 8, 0)), theirs)
}

fn reply(cookie: u8, error: u8, data: usize) -> Vec<u8> {
    let header = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, error, 0, 0, 0, 0, 0, 0, 0, cookie];
    [&header[..], &vec![7; data]].concat()
}

#[test]
fn replies_count_in_pieces_of_any_length() {
    let stream = [reply(3, 0, 4096), reply(7, 0, 4096), reply(0, 0, 4096)].concat();
    for length in [1, 7, 16, 4095, 4112, stream.len()] {
        let (mut session, server) = session(&cell(Work::Read, 4096));
        session.fill(&[]).unwrap();
        let mut buffer = vec![0; 64 << 10];
        let mut receive = |piece: &[u8]| {
            (&server).write_all(piece).unwrap();
            session.receive(&mut buffer).unwrap()
        };
        let count: u64 = stream.chunks(length).map(&mut receive).sum();
        assert_eq!((count, receive(&reply(1, 0, 4096)[..4111])), (3, 0), "in pieces of {length}");
        assert_eq!(session.free, [3, 7, 0]);
    }
}

#[test]
fn failed_and_unknown_replies_end_the_session() {
    for wrong in [reply(3, 5, 0), reply(8, 0, 0), vec![0; 16]] {
        let (mut session, mut server) = session(&cell(Work::Write, 16));
        session.fill(&[1; 16]).unwrap();
        server.write_all(&wrong).unwrap();
        assert!(session.receive(&mut [0; 64]).is_err());
        assert!(session.free.is_empty());
    }
}

#[test]
fn random_blocks_cover_the_disk_and_half_are_writes() {
    let mut picker = Picker::new(&cell(Work::Mixed, 4096), 16, 0);
    let (mut seen, mut writes) = ([0; 16], 0);
    for _ in 0..16_000 {
        let (block, is_write) = picker.next();
        seen[block as usize] += 1;
        writes += usize::from(is_write);
    }
    assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
    assert!((7000..9000).contains(&writes), "{writes}");
}

/// Runs a load on an image of zeros; returns the image.
fn run_load(transport: Transport, work: Work, block: u32) -> Vec<u8> {
    let image = tempfile::NamedTempFile::new().unwrap();
    fs::write(image.path(), vec![0; 8 << 20]).unwrap();
    let server = &servers(&["flexnbd".to_owned()], &[]).unwrap()[0];
    let server = Running::start(server, image.path(), transport).unwrap();
    let cell = cell(work, block);
    let mut sessions = Sessions::connect(&cell, &server.export).unwrap();
    sessions.run(Some((Duration::from_secs(600), 300))).unwrap();
    let complete = sessions.requests;
    assert!(complete >= 300 && sessions.cpu <= sessions.elapsed, "{complete}");
    sessions.run(None).unwrap();
    assert_eq!(sessions.requests - complete, (cell.depth * cell.sessions) as u64);
    drop(sessions);
    drop(server);
    fs::read(image.path()).unwrap()
}

#[test]
fn only_writes_reach_the_image() {
    for block in [4 << 10, 1 << 20] {
        assert!(run_load(Transport::Tcp, Work::Read, block).iter().all(|byte| *byte == 0));
    }
    let image = run_load(Transport::Unix, Work::Write, 1 << 20);
    assert!(image.chunks(1 << 20).all(|block| block == payload(1 << 20)), "the data differs");
    // Large reads and writes must not block each other.
    run_load(Transport::Tcp, Work::Mixed, 1 << 20);
}

#[test]
fn every_installed_server_serves_the_image_and_stops() {
    // Not in memory, which some kernels cannot access directly.
    let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let names = [
        "flexnbd",
        "flexnbd-direct",
        "flexnbd-tls",
        "nbdkit",
        "nbdkit-tls",
        "qemu-nbd",
        "qemu-nbd-direct",
        "qemu-nbd-tls",
        "nbd-server",
    ];
    let names = names.map(str::to_owned);
    for server in servers(&names, &[]).unwrap() {
        for transport in [Transport::Tcp, Transport::Unix] {
            let running = Running::start(&server, image.path(), transport).unwrap();
            let size = running.export.open().unwrap().agreement().size;
            assert_eq!(size, 1 << 20, "{}", server.name);
            let process = format!("/proc/{}", running.pid);
            drop(running);
            assert!(!fs::exists(process).unwrap(), "{} still runs", server.name);
        }
    }
}

#[test]
fn minimal_servers_send_the_image_and_discard_writes() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let data = payload(3 << 20);
    fs::write(image.path(), &data).unwrap();
    for method in minimal::Method::value_variants() {
        let socket = folder.path().join(format!("{method:?}"));
        let name = method.to_possible_value().unwrap();
        let words =
            ["peers", minimal::WORD, "--method", name.get_name(), "--socket"].map(OsStr::new);
        let words = words.into_iter().chain([socket.as_os_str(), OsStr::new("--file")]);
        let words = words.chain([image.path().as_os_str()]).map(OsStr::to_owned).collect();
        std::thread::spawn(move || run_bench("peers", words).unwrap());
        let export = nbd::Export { address: Address::Unix(socket), name: "", tls: None };
        assert!(harness::poll_until(process::PATIENCE, || export.connect().is_ok()));
        let mut connection = export.open().unwrap();
        connection.write(0, &[9; 300_000]).unwrap();
        for (offset, length) in [(0, 3 << 20), (5000, 70_000), (1, 4096)] {
            let mut seen = Vec::new();
            let mut sink = |part: &[u8]| {
                seen.extend_from_slice(part);
                Ok(())
            };
            connection.read(offset, length, &mut sink).unwrap();
            let same = seen == data[offset as usize..][..length as usize];
            let constant = seen == vec![7; length as usize];
            assert_eq!((same, constant), (name.get_name() != "null", name.get_name() == "null"));
        }
    }
    assert_eq!(fs::read(image.path()).unwrap(), data);
}

/// Runs a benchmark whose options are in `words`; returns its figures.
fn figures<O: Parser, T>(words: &str, run: impl Fn(O) -> Result<T, report::Error>) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("json");
    let json = json.to_str().unwrap();
    run(O::parse_from(words.split(' ').chain(["--json", json]))).unwrap();
    serde_json::from_slice(&fs::read(json).unwrap()).unwrap()
}

#[test]
fn both_generators_measure_the_server() {
    let words =
        "peers --servers flexnbd --only d1-s1-tcp-cached --rounds 1 --seconds 0.05 --size 8";
    for cell in figures(words, serving::run)["cells"].as_array().unwrap() {
        let figures = &cell["servers"][0]["rounds"][0]["measured"];
        assert!(figures["requests_per_sec"].as_f64() > Some(0.0), "{cell}");
        assert!(figures["client_busy"].as_f64() > Some(0.0), "{cell}");
    }
}

#[test]
fn the_sending_benchmark_measures_every_cell() {
    let folder = tempfile::tempdir().unwrap();
    let words = "sending --servers flexnbd --rounds 1 --seconds 0.05 --size 8 --dirs";
    let words = words.split(' ').chain([folder.path().to_str().unwrap()]);
    let results = serving::sending::run(serving::sending::Options::parse_from(words)).unwrap();
    assert_eq!(results.len(), 3, "lengths");
    for (server, figures) in results.iter().flat_map(CellResult::rates) {
        let [middle, lowest, highest, _] = figures.unwrap();
        assert!(0.0 < lowest && lowest <= middle && middle <= highest, "{server}: {middle}");
    }
}

#[test]
fn every_installed_system_moves_the_disk() {
    let words = "migrate --images sparse25 --size 8M --rounds 1 --pause-size 4M --migrations 1";
    let figures = figures(words, |options| migration::run(&options));
    for system in figures["images"][0]["systems"].as_array().unwrap() {
        let run = &system["runs"][0];
        assert_eq!(run["same"], true, "{system}");
        for bytes in ["wire_bytes", "bytes_sent"].map(|key| &run[key]) {
            assert!(bytes.is_null() || bytes.as_u64() >= Some(2 << 20), "{system}");
        }
    }
    let pauses = figures["pauses"].as_array().unwrap();
    assert_eq!(pauses.len(), 3, "loads");
    for load in pauses {
        let migration = &load["migrations"][0];
        assert!(migration["same"] == true && migration["acknowledged"] == true, "{load}");
        assert!(migration["before"]["requests"].as_u64() > Some(0), "{load}");
    }
}
