//! Runs the command line; its outcome becomes the exit code.

fn main() -> std::process::ExitCode {
    flexnbd::cli::run(std::env::args_os())
}
