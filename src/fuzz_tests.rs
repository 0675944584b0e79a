//! The fuzz targets, which `tests/fuzz` builds and runs. Each takes arbitrary bytes, and panics if the code
//! under it does what it must never do.
//!
//! The bodies are beside the code in files of this name, not in `tests/fuzz`: most of what parses bytes of
//! others is private to its module, and no item becomes public for a test. They exist in unit tests, which
//! replay the seeds, and where the fuzzer sets `cfg(fuzzing)`; never in the program.

use crate::{cli, client, control, disk, migration, nbd, server, systemd, upstream};

/// A fuzz target: its name, which is also that of its directory of seeds, and its function.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [FuzzTarget; 9] = [
    ("handshake_server", handshake_server),
    ("handshake_client", handshake_client),
    ("requests", requests),
    ("replies", replies),
    ("control", control),
    ("snapshot", snapshot),
    ("ownership", ownership),
    ("configuration", configuration),
    ("words", words),
];

/// The bytes of a client during a handshake.
pub fn handshake_server(bytes: &[u8]) {
    nbd::handshake::fuzz_tests::server(bytes);
}

/// The bytes of a server during a handshake.
pub fn handshake_client(bytes: &[u8]) {
    nbd::handshake::fuzz_tests::client(bytes);
}

/// Requests of a client to the engine, on a disk in memory with a model beside it.
pub fn requests(bytes: &[u8]) {
    server::session::fuzz_tests::requests(bytes);
}

/// Replies of a server to `read` and `write`, to a proxy, and to the source of a migration.
pub fn replies(bytes: &[u8]) {
    let Some((choice, rest)) = bytes.split_first() else { return };
    match choice % 4 {
        0 => upstream::fuzz_tests::replies(rest),
        1 => client::fuzz_tests::connection(rest),
        2 => migration::fuzz_tests::messages(rest),
        _ => nbd::fuzz_tests::messages(rest),
    }
}

/// Lines of the control socket, of operators and of servers.
pub fn control(bytes: &[u8]) {
    control::fuzz_tests::lines(bytes);
}

/// The snapshot of sessions, and the names of their descriptors in the service manager's store.
pub fn snapshot(bytes: &[u8]) {
    server::session::fuzz_tests::snapshot(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        systemd::fd_store::fuzz_tests::name(text);
    }
}

/// An ownership record: in memory, as an attribute, and as an entry in the state directory.
pub fn ownership(bytes: &[u8]) {
    disk::fuzz_tests::record(bytes);
}

/// A configuration file. (The target also runs the generator, which is a program of its own.)
pub fn configuration(bytes: &[u8]) {
    cli::fuzz_tests::configuration(&String::from_utf8_lossy(bytes));
}

/// URIs, addresses, sizes, entries of access control lists, and names of instances.
pub fn words(bytes: &[u8]) {
    cli::fuzz_tests::word(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    /// Runs each target with each of its seeds, so that a change that breaks one is found without a fuzzer.
    #[test]
    fn seeds_pass() {
        for (name, run) in TARGETS {
            let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(name);
            let mut count = 0;
            for file in fs::read_dir(&seeds).unwrap() {
                let file = file.unwrap().path();
                println!("{}", file.display());
                run(&fs::read(file).unwrap());
                count += 1;
            }
            assert!(count > 0, "{} is empty", seeds.display());
        }
        fs::remove_dir_all(disk::fuzz_tests::directory()).unwrap();
    }
}
