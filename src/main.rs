//! Runs the command line; its outcome becomes the exit code.

use flexnbd::memory_reserve::{RESERVE_SIZE, ReservingAllocator};

#[global_allocator]
static ALLOCATOR: ReservingAllocator<RESERVE_SIZE> = ReservingAllocator::new();

fn main() -> std::process::ExitCode {
    flexnbd::cli::run(std::env::args_os())
}
