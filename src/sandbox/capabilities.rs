//! The capabilities (capabilities(7)) of a server that root has started: those that concern files, memory
//! and ports. Never adds one.

use nix::errno::Errno;
use nix::libc;
use std::io;

/// The version of the structures below (`_LINUX_CAPABILITY_VERSION_3`), which has two words for each set.
const VERSION: u32 = 0x2008_0522;

/// The numbers of the capabilities that stay (linux/capability.h).
const KEPT: [u32; 7] = [
    1,  // CAP_DAC_OVERRIDE: images of other users
    2,  // CAP_DAC_READ_SEARCH
    3,  // CAP_FOWNER: the records of such images
    4,  // CAP_FSETID
    10, // CAP_NET_BIND_SERVICE: ports below 1024
    14, // CAP_IPC_LOCK: rings of io_uring on kernels before 5.12
    24, // CAP_SYS_RESOURCE: space that file systems reserve for root
];

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    /// The calling thread.
    pid: libc::c_int,
}

/// `struct __user_cap_data_struct`: 32 capabilities of each set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Drops all capabilities of the calling thread, and of threads that it starts later, but those that a
/// server may need. A process of another user than root has none.
///
/// # Errors
/// The kernel refuses to change them.
pub fn drop_capabilities() -> io::Result<()> {
    let before = get()?;
    let after = reduced(before);
    if before == after { Ok(()) } else { set(after) }
}

/// The sets without the capabilities that do not stay.
fn reduced(sets: [Sets; 2]) -> [Sets; 2] {
    let kept = KEPT.iter().fold([0_u32; 2], |mut words, number| {
        words[(number / 32) as usize] |= 1 << (number % 32);
        words
    });
    let reduce = |sets: Sets, kept| Sets {
        effective: sets.effective & kept,
        permitted: sets.permitted & kept,
        inheritable: 0,
    };
    [reduce(sets[0], kept[0]), reduce(sets[1], kept[1])]
}

fn get() -> io::Result<[Sets; 2]> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads and writes one header, and writes two `Sets`, as this version has them.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    Errno::result(result)?;
    Ok(sets)
}

fn set(sets: [Sets; 2]) -> io::Result<()> {
    let mut header = Header { version: VERSION, pid: 0 };
    // SAFETY: the kernel reads one header and two `Sets`.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_listed_capabilities_stay() {
        let all = Sets { effective: u32::MAX, permitted: u32::MAX, inheritable: u32::MAX };
        let low = (1 << 1) | (1 << 2) | (1 << 3) | (1 << 4) | (1 << 10) | (1 << 14) | (1 << 24);
        let kept = Sets { effective: low, permitted: low, inheritable: 0 };
        assert_eq!(reduced([all; 2]), [kept, Sets::default()]);
    }

    #[test]
    fn none_is_added() {
        assert_eq!(reduced([Sets::default(); 2]), [Sets::default(); 2]);
    }
}
