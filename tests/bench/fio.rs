//! The same loads made by fio's nbd engine, which is libnbd: a client that people really use.
//! Its figures are its own; only the server's processor time is counted here.

use super::Trouble;
use super::grid::{Cell, Temperature};
use super::image::Images;
use super::options::Options;
use super::running::Running;
use super::servers;
use super::session::{Address, Place};
use super::stats::Sample;
use super::usage;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Why there can be no cells with fio here, if there is a reason.
pub(super) fn why_not() -> Option<&'static str> {
    if servers::find(Path::new("fio")).is_none() {
        return Some("fio is not installed");
    }
    let engines = Command::new("fio").arg("--enghelp").output();
    let engines = engines.map(|output| output.stdout).unwrap_or_default();
    let has_nbd = String::from_utf8_lossy(&engines).lines().any(|line| line.trim() == "nbd");
    if has_nbd { None } else { Some("this fio has no nbd engine") }
}

/// Measures one load on one running server.
///
/// # Errors
/// When fio fails, or the page cache could not be emptied for a cold load.
pub(super) fn sample(
    cell: &Cell,
    options: &Options,
    server: &Running,
    images: &Images,
) -> Result<Sample, Trouble> {
    if cell.temperature == Temperature::Cold {
        images.cool()?;
    }
    let mut command = Command::new("fio");
    command.args(arguments(cell, options, &server.place));
    let before = usage::cpu_seconds(server.pid);
    let output = command.output()?;
    let cpu = usage::cpu_seconds(server.pid) - before;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("fio failed: {}", said.lines().next().unwrap_or_default()).into());
    }
    let figures = figures_in(&output.stdout).ok_or("fio printed no figures")?;
    Ok(Sample {
        requests_per_sec: figures.requests_per_sec,
        mb_per_sec: figures.requests_per_sec * f64::from(cell.block) / 1e6,
        server_cpu_us_per_request: cpu * 1e6 / figures.requests.max(1.0),
        // fio gives the mean of its jobs, which share one CPU.
        client_busy: figures.busy * cell.sessions as f64,
        rss_peak_mib: usage::rss_peak_kib(server.pid) as f64 / 1024.0,
    })
}

fn arguments(cell: &Cell, options: &Options, place: &Place) -> Vec<String> {
    let order = if cell.is_sequential() { "" } else { "rand" };
    let mut arguments = vec![
        "--name=peers".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri={}", uri(place)),
        format!("--rw={order}{}", cell.work.word()),
        format!("--bs={}", cell.block),
        format!("--iodepth={}", cell.depth),
        format!("--numjobs={}", cell.sessions),
        format!("--size={}M", options.size),
        format!("--runtime={}ms", options.seconds.as_millis()),
    ];
    let common = ["--thread", "--group_reporting", "--randrepeat=1", "--norandommap"];
    arguments.extend(common.map(str::to_owned));
    arguments.push("--output-format=json".to_owned());
    match cell.temperature {
        Temperature::Cached => arguments.push("--time_based".to_owned()),
        // Once over the image, shared by all jobs: what was read before is cold no more.
        Temperature::Cold => {
            arguments.push(format!("--io_size={}M", options.size / cell.sessions as u64));
        }
    }
    if cell.is_sequential() {
        arguments.push(format!("--offset_increment={}M", options.size / cell.sessions as u64));
    }
    arguments
}

fn uri(place: &Place) -> String {
    match &place.address {
        Address::Tcp(address) => format!("nbd://{address}/{}", place.export),
        Address::Unix(path) => {
            format!("nbd+unix:///{}?socket={}", place.export, path.display())
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    requests: f64,
    requests_per_sec: f64,
    busy: f64,
}

/// Pure: what fio's JSON says. Warnings may stand before it.
fn figures_in(output: &[u8]) -> Option<Figures> {
    let start = output.iter().position(|byte| *byte == b'{')?;
    let all: Value = serde_json::from_slice(&output[start..]).ok()?;
    let job = all.get("jobs")?.get(0)?;
    if job.get("error")?.as_i64()? != 0 {
        return None;
    }
    let sum = |figure: &str| -> Option<f64> {
        Some(job.get("read")?.get(figure)?.as_f64()? + job.get("write")?.get(figure)?.as_f64()?)
    };
    let busy = (job.get("usr_cpu")?.as_f64()? + job.get("sys_cpu")?.as_f64()?) / 100.0;
    Some(Figures { requests: sum("total_ios")?, requests_per_sec: sum("iops")?, busy })
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::grid::{Set, Work};
    use super::*;
    use std::net::SocketAddr;
    use std::path::PathBuf;

    #[test]
    fn warnings_before_the_figures_do_no_harm_and_errors_are_no_figures() {
        let text = |error| {
            format!(
                "fio: a warning\n{{\"jobs\": [{{\"error\": {error}, \"usr_cpu\": 20.0, \
                 \"sys_cpu\": 30.0, \"read\": {{\"iops\": 10.5, \"total_ios\": 20}}, \
                 \"write\": {{\"iops\": 1.5, \"total_ios\": 2}}}}]}}"
            )
        };
        let expected = Figures { requests: 22.0, requests_per_sec: 12.0, busy: 0.5 };
        assert_eq!(figures_in(text(0).as_bytes()), Some(expected));
        assert_eq!(figures_in(text(5).as_bytes()), None);
        assert_eq!(figures_in(b"nothing"), None);
    }

    #[test]
    fn a_mixed_load_of_small_blocks_is_what_fio_calls_randrw() {
        let small = Set::Default.cells()[0];
        let place =
            Place { address: Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 7))), export: "disk" };
        let options = clap::Parser::parse_from(["peers"]);
        let line = arguments(&Cell { work: Work::Mixed, ..small }, &options, &place);
        assert!(line.contains(&"--rw=randrw".to_owned()), "{line:?}");
        assert!(line.contains(&"--uri=nbd://127.0.0.1:7/disk".to_owned()), "{line:?}");
    }

    #[test]
    fn unix_sockets_have_a_uri_too() {
        let address = Address::Unix(PathBuf::from("/a/b"));
        assert_eq!(uri(&Place { address, export: "" }), "nbd+unix:///?socket=/a/b");
    }
}
