//! Loads the filters of system calls.

use super::filter;
use nix::errno::Errno;
use nix::libc;
use seccompiler::BpfProgram;

/// Restricts the calling thread and all others, for good.
///
/// # Errors
/// Why the calls are not restricted.
pub(super) fn restrict() -> Result<(), String> {
    let unknown = |error| format!("{error}");
    let admitted = filter::admitted(std::process::id()).map_err(unknown)?;
    let quietly_refused = filter::quietly_refused().map_err(unknown)?;
    let refused = |errno: Errno| format!("the kernel refuses a filter: {}", errno.desc());
    // First, since the other one does not admit seccomp(2).
    load(&quietly_refused, 0).map_err(refused)?;
    // Without the log for kernels before 4.14.
    load(&admitted, libc::SECCOMP_FILTER_FLAG_LOG).or_else(|_| load(&admitted, 0)).map_err(refused)
}

/// Loads one filter into all threads of the process (`SECCOMP_FILTER_FLAG_TSYNC` of seccomp(2)).
fn load(program: &BpfProgram, flags: libc::c_ulong) -> Result<(), Errno> {
    let len = libc::c_ushort::try_from(program.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let flags = flags | libc::SECCOMP_FILTER_FLAG_TSYNC;
    // SAFETY: the kernel copies `len` instructions from `filter`, which `program` borrows for the whole call;
    // it writes to neither. `seccompiler::sock_filter` has the layout of the kernel's (`repr(C)`).
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER),
            flags,
            &raw const program,
        )
    };
    match Errno::result(result)? {
        0 => Ok(()),
        // The id of a thread that has another filter.
        _ => Err(Errno::EBUSY),
    }
}
