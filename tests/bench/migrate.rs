//! Measures migrations of a disk between two processes on this machine, by flexnbd and by other
//! programs; see README.md. No result makes it fail.

mod machine;
mod migration;
mod nbd;
mod process;
mod report;

use clap::Parser;

fn main() {
    if let Err(error) = migration::run(&migration::Options::parse()) {
        eprintln!("migrate: {error}");
        std::process::exit(1);
    }
}
