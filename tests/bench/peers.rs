//! Measures NBD servers side by side on this machine; see README.md. Prints figures and ratios, and
//! writes JSON; no result makes it fail.

mod machine;
mod nbd;
mod process;
mod report;
mod serving;

use clap::Parser;

fn main() {
    if let Err(error) = serving::run(serving::Options::parse()) {
        eprintln!("peers: {error}");
        std::process::exit(1);
    }
}
