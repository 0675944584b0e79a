//! 1 GiB through a pipe: neither the client nor the server may hold it.

use crate::flags_of;
use harness::{
    GIB, MIB, Program, Resources, Served, Style, Transport, allocated, noise, sparse_image,
    temp_dir, wait_for_exit, write_at,
};
use std::io::{Read as _, Write as _};
use std::process::Stdio;

/// The most memory that either side may ever have had, in bytes.
const MEMORY_MAX: u64 = 100 * MIB;
/// How much is left in the pipe, or not yet put into it, when the memory is looked at: more than
/// a pipe holds, so that the client is still there.
const KEPT_BACK: u64 = MIB;

fn served() -> Served {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", GIB + MIB);
    write_at(&image, GIB, &noise(512, 1));
    Served::existing(dir, image, Transport::Unix, Style::New, &[])
}

#[track_caller]
fn assert_modest(served: &Served, client: u32) {
    for (who, pid) in [("client", client), ("server", served.server.pid())] {
        let peak = Resources::of(pid).rss_bytes_peak;
        assert!(peak > 0, "the {who} is there");
        assert!(peak < MEMORY_MAX, "the {who} had {peak} bytes");
    }
}

#[test]
fn a_gibibyte_is_read_in_bounded_memory() {
    let served = served();
    let arguments = format!("read {} --from 1M --size 1G", flags_of(&served.server));
    let mut child = Program::flexnbd(&arguments).start(Stdio::null(), Stdio::piped());
    let mut stdout = child.stdout.take().unwrap();
    let mut piece = vec![0; MIB as usize];
    for _ in 0..(GIB - KEPT_BACK) / MIB {
        stdout.read_exact(&mut piece).unwrap();
    }
    assert_modest(&served, child.id());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len() as u64, KEPT_BACK);
    assert!(rest[..512] == noise(512, 1), "the right bytes come at the end");
    assert!(wait_for_exit(&mut child, &arguments).success());
}

#[test]
fn a_gibibyte_is_written_in_bounded_memory_and_zeros_stay_holes() {
    let served = served();
    let arguments = format!("write {} --from 1M --size 1G", flags_of(&served.server));
    let mut child = Program::flexnbd(&arguments).start(Stdio::piped(), Stdio::null());
    let mut stdin = child.stdin.take().unwrap();
    let mut piece = vec![0; MIB as usize];
    for _ in 0..(GIB - KEPT_BACK) / MIB {
        stdin.write_all(&piece).unwrap();
    }
    assert_modest(&served, child.id());
    piece[7] = 7;
    stdin.write_all(&piece).unwrap();
    drop(stdin);
    assert!(wait_for_exit(&mut child, &arguments).success());
    assert_eq!(harness::read_at(&served.image, GIB, 8), [0, 0, 0, 0, 0, 0, 0, 7]);
    assert!(allocated(&served.image) < MIB, "zeros allocate nothing");
}
