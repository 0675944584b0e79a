//! Two writers that never stop, and what they know to be written.

use super::Mutation;
use super::medium::Stamp;
use super::world::{Host, World};
use flexnbd::disk::dirty::BLOCK;
use flexnbd::range::Range;

/// What clients know of a block.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    /// The last write that was answered.
    pub(crate) acknowledged: Stamp,
    /// Later writes that were not.
    pub(crate) perhaps: Vec<Stamp>,
}

impl Known {
    pub(crate) fn allows(&self, stamp: Stamp) -> bool {
        stamp == self.acknowledged || self.perhaps.contains(&stamp)
    }
}

/// One writer, which has one write under way at most, to blocks that nobody else writes to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Writer {
    Idle,
    /// Inside the gate.
    Entered(Write),
    /// One of the two halves of a write is done: bytes, then mark.
    Halfway(Write),
    /// Both are; the answer is not sent yet.
    Answering(Write),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Write {
    host: Host,
    block: usize,
    stamp: Stamp,
}

impl World {
    pub(crate) fn client_turn(&mut self, which: usize) -> bool {
        match self.writers[which] {
            Writer::Idle => self.begin_write(which),
            Writer::Entered(write) => {
                if self.mutation == Mutation::MarkBeforeWrite {
                    self.mark(write);
                } else {
                    self.put(write);
                }
                self.writers[which] = Writer::Halfway(write);
                true
            }
            Writer::Halfway(write) => {
                if self.mutation == Mutation::MarkBeforeWrite {
                    self.put(write);
                } else {
                    self.mark(write);
                }
                self.writers[which] = Writer::Answering(write);
                true
            }
            Writer::Answering(write) => {
                let known = &mut self.known[write.block];
                known.acknowledged = write.stamp;
                known.perhaps.clear();
                self.leave(which);
                true
            }
        }
    }

    fn begin_write(&mut self, which: usize) -> bool {
        let host = match (self.source_serves(), self.destination_serves()) {
            (true, _) => Host::Source,
            (_, true) => Host::Destination,
            _ => return false,
        };
        if self.writes_left == 0 {
            return false;
        }
        self.writes_left -= 1;
        if self.dice.once_in(8) {
            self.medium(host).flush();
            return true;
        }
        let count = self.known.len() as u64;
        let block = (self.dice.below(count) / 2 * 2 + which as u64) % count;
        let block = if block as usize % 2 == which { block as usize } else { which };
        self.next_stamp += 1;
        let stamp = if self.dice.once_in(5) { 0 } else { self.next_stamp };
        self.known[block].perhaps.push(stamp);
        if host == Host::Source {
            self.source.visits += 1;
        }
        self.writers[which] = Writer::Entered(Write { host, block, stamp });
        true
    }

    fn put(&mut self, write: Write) {
        self.medium(write.host).write(write.block, write.stamp, write.stamp != 0);
    }

    fn mark(&mut self, write: Write) {
        if let (Host::Source, Some(dirty)) = (write.host, &self.source.dirty) {
            let disk = Range::whole(self.known.len() as u64 * BLOCK);
            dirty.mark(disk.from(write.block as u64 * BLOCK).split(BLOCK).0);
        }
    }

    fn leave(&mut self, which: usize) {
        if let Writer::Entered(write) | Writer::Halfway(write) | Writer::Answering(write) =
            self.writers[which]
            && write.host == Host::Source
        {
            self.source.visits -= 1;
        }
        self.writers[which] = Writer::Idle;
    }

    /// A host's process is gone, and with it the writes that were inside.
    pub(crate) fn abandon_writes(&mut self, host: Host) {
        for which in 0..self.writers.len() {
            if let Writer::Entered(write) | Writer::Halfway(write) | Writer::Answering(write) =
                self.writers[which]
                && write.host == host
            {
                self.leave(which);
            }
        }
    }
}
