//! Measures NBD servers side by side on this machine; see README.md. Prints figures and ratios, and
//! writes JSON; no result makes it fail.

mod machine;
mod nbd;
mod process;
mod report;
mod serving;

fn main() {
    if let Err(error) = serving::run_bench("peers", std::env::args_os().collect()) {
        eprintln!("peers: {error}");
        std::process::exit(1);
    }
}
