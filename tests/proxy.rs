//! `flexnbd proxy` and `flexnbd-proxy` with real upstreams: options, the start, service, lost
//! upstreams, restarts that keep clients, and what users of the original flexnbd-proxy rely on.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "proxy/disk_id.rs"]
mod disk_id;
#[path = "proxy/fake_upstream.rs"]
mod fake_upstream;
#[path = "proxy/lost.rs"]
mod lost;
#[path = "proxy/original.rs"]
mod original;
#[path = "proxy/peers.rs"]
mod peers;
#[path = "proxy/restart.rs"]
mod restart;
#[path = "proxy/serving.rs"]
mod serving;
#[path = "proxy/start.rs"]
mod start;

use harness::{Builder, Endpoint, Program, Server, wait_until};
use std::collections::BTreeMap;
use std::path::Path;

/// A proxy of the default export at these endpoints, at a free port.
#[track_caller]
fn proxy_of(upstreams: &[&Endpoint], options: &str) -> Server {
    builder_of(upstreams, options).start()
}

/// A proxy of the default export at these endpoints, to be started by the caller.
fn builder_of(upstreams: &[&Endpoint], options: &str) -> Builder {
    let to = upstreams.iter().flat_map(|upstream| ["--to".to_owned(), upstream.uri()]);
    Builder::proxy().args(to).args(options.split_whitespace())
}

/// The keys and values of `status` at a control socket.
#[track_caller]
fn status(sock: &Path) -> BTreeMap<String, String> {
    let text = Program::flexnbd("status --sock").args([sock]).ok();
    let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Waits until `status` has this value of this key.
#[track_caller]
fn wait_for_status(sock: &Path, key: &str, value: &str) {
    wait_until(&format!("{key}={value}"), || status(sock)[key] == value);
}
