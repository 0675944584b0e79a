//! Resource limits of the process: one request or one session fails, and the server continues.

use harness::raw::{DF, ENOSPC, READ, Wire};
use harness::session::{MODES, Mode, Request, Session};
use harness::{Builder, KIB, MIB, Program, Server, noise, sparse_image, temp_dir, write_at};
use nix::libc;
use std::path::Path;

/// A shell command that sets a limit and then executes the server.
fn limited(limit: &str) -> [String; 4] {
    ["sh", "-c", &format!("ulimit {limit} && exec \"$@\""), "sh"].map(str::to_owned)
}

#[test]
fn a_write_beyond_the_file_size_limit_is_enospc() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 64 * KIB);
    // In blocks of 512 bytes: writes to the second half of the image fail.
    let server = Builder::serve(Path::new(&image)).through(limited("-f 64")).start();
    let half = 32 * KIB;
    for mode in MODES {
        let mut session = Session::open(server.endpoint(), mode).unwrap();
        for offset in [half, half + 512, 63 * KIB] {
            assert_eq!(session.ask(Request::write(offset, &[7; 512])).error, ENOSPC, "{mode:?}");
        }
        session.ok(Request::write(half - 512, &[7; 512]));
        assert_eq!(session.read(half, 512), [0; 512]);
    }
}

/// Limits the server's address space to its current size and `headroom_bytes`.
fn limit_memory(server: &Server, headroom_bytes: u64) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let kib: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
    let limit_bytes = kib * KIB + headroom_bytes;
    let limit = libc::rlimit { rlim_cur: limit_bytes, rlim_max: libc::RLIM_INFINITY };
    let pid = server.pid().cast_signed();
    // SAFETY: prlimit reads `limit`, which outlives the call, and writes no old limit through null.
    let set =
        unsafe { libc::prlimit(pid, libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0);
}

#[test]
fn failed_allocations_end_one_session_at_most() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4 * MIB);
    write_at(&image, 0, &noise(4 * MIB as usize, 1));
    let control = dir.path().join("control.sock");
    let socket = ["--sock".as_ref(), control.as_os_str()];
    let mut server = Builder::serve(Path::new(&image)).args(socket).start();
    server.wait_for_control(&control);
    let mut first = Session::open(server.endpoint(), Mode::Structured).unwrap();
    first.ok(Request::write(0, &[7; 512]));
    // Threads, buffers and small allocations fail at different limits.
    for headroom_bytes in [3 * MIB, 2 * MIB, MIB, 512 * KIB, 256 * KIB, 64 * KIB, 0] {
        limit_memory(&server, headroom_bytes);
        // Each needs a thread, buffers, and a reply of 1 MiB in one piece.
        for _ in 0..16 {
            let Ok(mut wire) = Wire::try_connect(server.endpoint()) else { continue };
            let mut greeting = [0; 18];
            if !matches!(wire.try_recv(&mut greeting), Ok(18)) {
                continue;
            }
            let _ = wire.try_send(&harness::raw::typical_handshake());
            let mut read = vec![0x25, 0x60, 0x95, 0x13];
            read.extend(DF.to_be_bytes());
            read.extend(READ.to_be_bytes());
            read.extend([0; 16]);
            read.extend((MIB as u32).to_be_bytes());
            let _ = wire.try_send(&read);
            while matches!(wire.try_recv(&mut [0; 4096]), Ok(4096)) {}
        }
        assert!(server.is_running(), "{headroom_bytes} bytes above the current size");
        Program::flexnbd("status").args(socket).ok();
        first.ok(Request::write(0, &[7; 512]));
    }
}
