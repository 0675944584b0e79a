//! `read` and `write` of 1 GiB through a pipe, in bounded memory of client and server.

use crate::flags_of;
use harness::{
    GIB, MIB, Program, Resources, Served, Style, Transport, allocated, noise, sparse_image,
    temp_dir, wait_for_exit, write_at,
};
use std::io::{Read as _, Write as _};
use std::process::Stdio;

/// Limit for the peak resident set of either process, in bytes.
const MEMORY_MAX: u64 = 100 * MIB;
/// Bytes not yet transferred when memory is measured: more than a pipe buffers, so that the client
/// still runs.
const REMAINDER: u64 = MIB;

fn served() -> Served {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", GIB + MIB);
    write_at(&image, GIB, &noise(512, 1));
    Served::existing(dir, image, Transport::Unix, Style::New, &[])
}

#[track_caller]
fn assert_bounded_memory(served: &Served, client: u32) {
    for (program, pid) in [("client", client), ("server", served.server.pid())] {
        let peak = Resources::of(pid).rss_bytes_peak;
        assert!(peak > 0, "the {program} runs");
        assert!(peak < MEMORY_MAX, "peak of the {program}: {peak} bytes");
    }
}

#[test]
fn a_gibibyte_is_read_in_bounded_memory() {
    let served = served();
    let arguments = format!("read {} --from 1M --size 1G", flags_of(&served.server));
    let mut child = Program::flexnbd(&arguments).start(Stdio::null(), Stdio::piped());
    let mut stdout = child.stdout.take().unwrap();
    let mut piece = vec![0; MIB as usize];
    for _ in 0..(GIB - REMAINDER) / MIB {
        stdout.read_exact(&mut piece).unwrap();
    }
    assert_bounded_memory(&served, child.id());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len() as u64, REMAINDER);
    assert!(rest[..512] == noise(512, 1), "wrong bytes at the end");
    assert!(wait_for_exit(&mut child, &arguments).success());
}

#[test]
fn writing_a_gibibyte_of_zeros_stays_sparse() {
    let served = served();
    let arguments = format!("write {} --from 1M --size 1G", flags_of(&served.server));
    let mut child = Program::flexnbd(&arguments).start(Stdio::piped(), Stdio::null());
    let mut stdin = child.stdin.take().unwrap();
    let mut piece = vec![0; MIB as usize];
    for _ in 0..(GIB - REMAINDER) / MIB {
        stdin.write_all(&piece).unwrap();
    }
    assert_bounded_memory(&served, child.id());
    piece[7] = 7;
    stdin.write_all(&piece).unwrap();
    drop(stdin);
    assert!(wait_for_exit(&mut child, &arguments).success());
    assert_eq!(harness::read_at(&served.image, GIB, 8), [0, 0, 0, 0, 0, 0, 0, 7]);
    assert!(allocated(&served.image) < MIB, "zeros allocate nothing");
}
