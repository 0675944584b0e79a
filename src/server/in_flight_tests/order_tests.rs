//! Writes of several sessions to the same bytes: who waits for whom.

use super::*;
use crate::disk::{Extent, Zeroing};
use crate::range::Range;
use std::sync::{Condvar, Mutex};

#[test]
fn a_client_that_takes_no_replies_keeps_no_range_from_others() {
    let fixture = plain();
    fixture.slow.evict_all();
    let mut lazy = fixture.client();
    lazy.read(4 * MIB, MIB, 1);
    fixture.finish_one("Populate");
    assert_eq!(lazy.head(), (1, 0));
    lazy.data(MIB);
    for cookie in 0..60 {
        lazy.read(cookie * 8192, 4096, 100 + cookie);
    }
    fixture.slow.wait_for(60);
    for cookie in 0..12 {
        lazy.read(4 * MIB, MIB, 200 + cookie);
    }
    for cookie in 0..1000 {
        lazy.read(4 * MIB, 4096, 1000 + cookie);
    }
    // The second one is registered behind the first; then loads end, more than replies are taken.
    lazy.write(FUA, 8 * MIB, &[1; 4096], 2);
    lazy.write(PLAIN, 8 * MIB, &[2; 300 << 10], 3);
    fixture.slow.wait_for(61);
    for _ in 0..60 {
        fixture.finish_one("Populate");
    }
    fixture.finish_one("Write");
    let mut other = fixture.client();
    other.write(PLAIN, 8 * MIB, &[3; 4096], 1);
    assert_eq!(other.head(), (1, 0));
}

/// An image that does not order writes of the same bytes, as a block device does not. A write that
/// begins with [`STUCK`] sleeps until it may go on.
#[derive(Debug, Default)]
struct Unordered {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

const STUCK: u8 = 7;

#[derive(Debug)]
struct UnorderedImage(MemoryBackend, Arc<Unordered>);

impl Unordered {
    fn wait(&self, until: impl Fn(&(bool, bool)) -> bool) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| !until(state)).unwrap());
    }

    fn set(&self, change: impl Fn(&mut (bool, bool))) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }
}

impl Backend for UnorderedImage {
    fn size(&self) -> u64 {
        SIZE
    }
    fn orders_writes(&self) -> bool {
        false
    }
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.read(at, into)
    }
    fn write(&self, at: u64, data: &[u8], durable: bool) -> io::Result<()> {
        if data[0] == STUCK {
            self.1.set(|state| state.0 = true);
            self.1.wait(|state| state.1);
        }
        self.0.write(at, data, durable)
    }
    fn zero(&self, range: Range, how: Zeroing) -> io::Result<()> {
        self.0.zero(range, how)
    }
    fn trim(&self, range: Range) -> io::Result<()> {
        self.0.trim(range)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn prefetch(&self, _: Range) -> io::Result<()> {
        Ok(())
    }
    fn extent(&self, at: u64) -> io::Result<Extent> {
        self.0.extent(at)
    }
}

#[test]
fn a_plain_write_of_a_dead_session_comes_before_later_ones_on_a_device() {
    let mut fixture = plain();
    let unordered = Arc::new(Unordered::default());
    let image = UnorderedImage(fixture.memory.clone(), Arc::clone(&unordered));
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let recorder = Arc::clone(&fixture.recorder);
    let (server, address) =
        open(&disk, &recorder, SessionSettings::default(), StoredSessions::default());
    fixture.address = address;
    let mut old = fixture.client();
    old.write(PLAIN, 0, &[STUCK; 4096], 1);
    unordered.wait(|state| state.0);
    drop(old);
    let mut new = fixture.client();
    new.write(PLAIN, 0, &[8; 4096], 1);
    new.0.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(new.0.peek(&mut [0]).is_err(), "the write of the dead session is under way");
    new.0.set_read_timeout(Some(PATIENCE)).unwrap();
    unordered.set(|state| state.1 = true);
    assert_eq!(new.head(), (1, 0));
    assert_eq!(fixture.memory.contents()[..4096], [8; 4096]);
    drop(server);
}
