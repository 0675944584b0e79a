//! A target with a known mistake, which shows that the fuzzer is guided by coverage: it has to find two magic
//! numbers of 64 bits and a flag.
#![no_main]

use flexnbd::nbd::handshake::Greeting;

fn planted(bytes: &[u8]) {
    if let Ok(Some((Greeting::Newstyle { flags }, _))) = Greeting::decode(bytes) {
        assert!(flags.bits() & 1 == 0, "a known mistake");
    }
}

fuzz::target!(planted);
