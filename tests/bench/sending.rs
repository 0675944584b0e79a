//! Measures ways to send the data of long reads side by side on this machine; see README.md. No result
//! makes it fail.

mod machine;
mod nbd;
mod process;
mod report;
mod serving;

fn main() {
    if let Err(error) = serving::run_bench("sending", std::env::args_os().collect()) {
        eprintln!("sending: {error}");
        std::process::exit(1);
    }
}
