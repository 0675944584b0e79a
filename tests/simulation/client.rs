//! Two clients that write until the schedule's writes are used up, and the content that they expect.

use super::Mutation;
use super::image::Stamp;
use super::world::{Host, World};
use flexnbd::disk::dirty::BLOCK;
use flexnbd::range::Range;

/// The content of a block that clients accept.
#[derive(Clone, Debug)]
pub(crate) struct ExpectedBlock {
    /// The last acknowledged write.
    pub(crate) acknowledged: Stamp,
    /// Later writes, without a reply.
    pub(crate) unacknowledged: Vec<Stamp>,
}

impl ExpectedBlock {
    pub(crate) fn allows(&self, stamp: Stamp) -> bool {
        stamp == self.acknowledged || self.unacknowledged.contains(&stamp)
    }
}

/// A client with at most one write in flight. It alone writes to its blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Writer {
    Idle,
    /// The write has entered the gate.
    Entered(Write),
    /// The bytes are written, but not marked dirty.
    Halfway(Write),
    /// The bytes are written and marked dirty; the reply is not sent yet.
    Replying(Write),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Write {
    host: Host,
    block: usize,
    stamp: Stamp,
}

impl World {
    pub(crate) fn client_turn(&mut self, client: usize) -> bool {
        match self.writers[client] {
            Writer::Idle => self.begin_write(client),
            Writer::Entered(write) => {
                if self.mutation == Mutation::MarkBeforeWrite {
                    self.mark_dirty(write);
                } else {
                    self.write_bytes(write);
                }
                self.writers[client] = Writer::Halfway(write);
                true
            }
            Writer::Halfway(write) => {
                if self.mutation == Mutation::MarkBeforeWrite {
                    self.write_bytes(write);
                } else {
                    self.mark_dirty(write);
                }
                self.writers[client] = Writer::Replying(write);
                true
            }
            Writer::Replying(write) => {
                let expected = &mut self.expected[write.block];
                expected.acknowledged = write.stamp;
                expected.unacknowledged.clear();
                self.leave_gate(client);
                true
            }
        }
    }

    fn begin_write(&mut self, client: usize) -> bool {
        let host = match (self.source_serves(), self.destination_serves()) {
            (true, _) => Host::Source,
            (_, true) => {
                self.coverage.relayed_writes += u64::from(self.source_relays());
                Host::Destination
            }
            _ => return false,
        };
        if self.writes_left == 0 {
            return false;
        }
        self.writes_left -= 1;
        if self.rng.one_in(8) {
            self.image(host).flush();
            return true;
        }
        // Client 0 writes to even blocks, client 1 to odd ones.
        let count = self.expected.len() as u64;
        let block = (self.rng.below(count) / 2 * 2 + client as u64) % count;
        let block = if block as usize % 2 == client { block as usize } else { client };
        self.next_stamp += 1;
        let stamp = if self.rng.one_in(5) { 0 } else { self.next_stamp };
        self.expected[block].unacknowledged.push(stamp);
        if host == Host::Source {
            self.source.visits += 1;
        }
        self.writers[client] = Writer::Entered(Write { host, block, stamp });
        true
    }

    fn write_bytes(&mut self, write: Write) {
        self.image(write.host).write(write.block, write.stamp, write.stamp != 0);
    }

    fn mark_dirty(&mut self, write: Write) {
        if let (Host::Source, Some(dirty)) = (write.host, &self.source.dirty) {
            let disk = Range::whole(self.expected.len() as u64 * BLOCK);
            dirty.mark(disk.from(write.block as u64 * BLOCK).split(BLOCK).0);
        }
    }

    fn leave_gate(&mut self, client: usize) {
        if let Writer::Entered(write) | Writer::Halfway(write) | Writer::Replying(write) =
            self.writers[client]
            && write.host == Host::Source
        {
            self.source.visits -= 1;
        }
        self.writers[client] = Writer::Idle;
    }

    /// Ends the writes in flight at a host whose process was killed.
    pub(crate) fn abandon_writes(&mut self, host: Host) {
        for client in 0..self.writers.len() {
            if let Writer::Entered(write) | Writer::Halfway(write) | Writer::Replying(write) =
                self.writers[client]
                && write.host == host
            {
                self.leave_gate(client);
            }
        }
    }
}
