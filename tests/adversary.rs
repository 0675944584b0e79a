//! A scripted adversary against a server, a proxy, a destination, a control socket and a client, beside
//! honest peers that verify every byte and measure every answer. Cases come from tables.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers fail by panicking")]

#[path = "adversary/clients.rs"]
mod clients;
#[path = "adversary/control.rs"]
mod control;
#[path = "adversary/handshakes.rs"]
mod handshakes;
#[path = "adversary/honest.rs"]
mod honest;
#[path = "adversary/requests.rs"]
mod requests;
#[path = "adversary/script.rs"]
mod script;
#[path = "adversary/servers.rs"]
mod servers;
#[path = "adversary/tls.rs"]
mod tls;
