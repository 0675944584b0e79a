//! Tests of the order of overlapping changes of several sessions.

use super::*;
use crate::disk::memory_backend::InMemory;
use std::sync::{Condvar, Mutex};

#[test]
fn cold_data_is_loaded_in_flight_before_it_is_sent_by_reference() {
    const LENGTH: u64 = 128 << 10;
    let fixture = fixture();
    let mut client = fixture.client();
    fixture.memory.write(MIB, &[2; LENGTH as usize], false).unwrap();
    fixture.slow.allow_pinning();
    fixture.slow.evict_all();
    client.read(MIB, LENGTH, 1);
    let loads = fixture.slow.wait_for(1);
    assert!(loads[0].starts_with("Load"), "{loads:?}");
    fixture.complete(0);
    assert_eq!(client.reply(), (1, 0));
    assert!(client.data(LENGTH) == [2; LENGTH as usize]);
    fixture.slow.evict_all();
    client.read(MIB, LENGTH, 2);
    fixture.slow.wait_for(1);
    fixture.slow.fail(0, nix::libc::EIO);
    assert_eq!(client.reply(), (2, 5));
}

#[test]
fn a_client_that_receives_no_replies_blocks_no_range() {
    let fixture = fixture();
    fixture.slow.evict_all();
    let mut stalled = fixture.client();
    stalled.read(4 * MIB, MIB, 1);
    fixture.complete_one("Read");
    assert_eq!(stalled.reply(), (1, 0));
    stalled.data(MIB);
    for cookie in 0..60 {
        stalled.read(cookie * 8192, 4096, 100 + cookie);
    }
    fixture.slow.wait_for(60);
    for cookie in 0..12 {
        stalled.read(4 * MIB, MIB, 200 + cookie);
    }
    for cookie in 0..1000 {
        stalled.read(4 * MIB, 4096, 1000 + cookie);
    }
    // The second write is registered behind the first. Then more loads complete than the client receives
    // replies for.
    stalled.write(FUA, 8 * MIB, &[1; 4096], 2);
    stalled.write(PLAIN, 8 * MIB, &[2; 300 << 10], 3);
    fixture.slow.wait_for(61);
    for _ in 0..60 {
        fixture.complete_one("Read");
    }
    fixture.complete_one("Write");
    let mut other = fixture.client();
    other.write(PLAIN, 8 * MIB, &[3; 4096], 1);
    assert_eq!(other.reply(), (1, 0));
}

/// State of a backend that does not order overlapping writes, as a block device does not: whether a
/// write that begins with [`STUCK`] has begun, and whether it may complete.
#[derive(Debug, Default)]
struct Unordered {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

const STUCK: u8 = 7;

#[derive(Debug)]
struct UnorderedBackend(MemoryBackend, Arc<Unordered>);

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

impl InMemory for UnorderedBackend {
    fn memory(&self) -> &MemoryBackend {
        &self.0
    }

    fn orders_writes(&self) -> bool {
        false
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        if data[0] == STUCK {
            self.1.set(|state| state.0 = true);
            self.1.wait(|state| state.1);
        }
        self.0.write(at, data, false)
    }
}

#[test]
fn a_dead_sessions_write_precedes_later_ones_on_devices() {
    let mut fixture = fixture();
    let unordered = Arc::new(Unordered::default());
    let backend = UnorderedBackend(fixture.memory.clone(), Arc::clone(&unordered));
    let disk = Arc::new(Disk::new(Box::new(backend), false));
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
    assert!(new.0.peek(&mut [0]).is_err(), "the write of the dead session is in flight");
    new.0.set_read_timeout(Some(TIMEOUT)).unwrap();
    unordered.set(|state| state.1 = true);
    assert_eq!(new.reply(), (1, 0));
    assert_eq!(fixture.memory.contents()[..4096], [8; 4096]);
    drop(server);
}
