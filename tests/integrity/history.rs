//! The requests of all sessions of a run, with the times at which they were sent and answered, and the
//! check of each sector of the disk.
//!
//! A sector is checked on its own: NBD promises no atomicity for requests of several sectors. Nor is a
//! read of one sector atomic: the kernel copies it from the page cache while another thread copies a
//! write into the same page (ext4 and tmpfs lock the file for writes, but not for reads). So the
//! registers are the words of a sector. Only where a read was torn do they have different histories.
//! Writes of one sector, however, exclude each other: once they have ended, a sector is whole.
//!
//! A write without a reply has taken effect before the end of its server process, or never ("strict
//! linearizability"): a server has nothing that could write after its exit.

use crate::register::{Action, Operation, Value, check};
use crate::requests::{Effect, FIRST_SECTOR, INITIAL, SECTORS, writer};
use crate::stamp::{Content, SECTOR, WORDS, decode, value_of, word};
use std::ops::Range;

/// A request that was sent.
#[derive(Debug)]
pub(crate) struct Record {
    /// `None` for a direct read of the image.
    pub(crate) session: Option<usize>,
    pub(crate) sectors: Range<u64>,
    pub(crate) effect: Effect,
    /// The sectors that it returned, if it is a read with a reply.
    pub(crate) contents: Vec<Content>,
    /// Before its first byte was sent, in nanoseconds.
    pub(crate) invoked: u64,
    /// After the last byte of the reply was received; `None` if the connection was lost before.
    pub(crate) responded: Option<u64>,
}

/// The records of all sessions.
#[derive(Debug)]
pub(crate) struct History {
    pub(crate) seed: u64,
    pub(crate) records: Vec<Record>,
    /// When server processes had ended.
    pub(crate) ends: Vec<u64>,
}

/// What happened to one sector.
struct SectorHistory {
    seed: u64,
    sector: u64,
    writes: Vec<Operation>,
    /// Reads, without a value.
    reads: Vec<(Operation, Content)>,
}

impl History {
    /// Count of requests without a reply.
    pub(crate) fn lost_requests(&self) -> usize {
        self.records.iter().filter(|record| record.responded.is_none()).count()
    }

    /// Fails, and names the seed, unless the history of every sector is linearizable. Also fails if the
    /// sessions hardly saw each other's writes, since then nothing was checked.
    #[track_caller]
    pub(crate) fn assert_linearizable(&self) {
        let sectors = self.sectors();
        let wrong: Vec<String> = sectors.iter().filter_map(|sector| sector.check().err()).collect();
        let (seed, count, first) = (self.seed, wrong.len(), wrong.first());
        assert_eq!(first, None, "seed {seed}: {count} sectors are not linearizable");
        let foreign: usize = sectors.iter().map(SectorHistory::foreign_reads).sum();
        let requests = self.records.len();
        assert!(
            foreign > requests / 4,
            "{foreign} sectors of other sessions read by {requests} requests"
        );
    }

    fn sectors(&self) -> Vec<SectorHistory> {
        let action = Action::Write;
        let (value, session) = (INITIAL, None);
        let initial = Operation { action, value, invoked: 0, responded: 0, session };
        let new = |sector| {
            let (seed, writes, reads) = (self.seed, vec![initial], Vec::new());
            SectorHistory { seed, sector, writes, reads }
        };
        let mut sectors: Vec<_> = (FIRST_SECTOR..FIRST_SECTOR + SECTORS).map(new).collect();
        for record in &self.records {
            for (at, sector) in record.sectors.clone().enumerate() {
                self.add(&mut sectors[(sector - FIRST_SECTOR) as usize], record, at);
            }
        }
        sectors
    }

    /// Adds the effect of a record on one of its sectors. A read without a reply has none.
    fn add(&self, sector: &mut SectorHistory, record: &Record, at: usize) {
        let &Record { session, effect, invoked, .. } = record;
        let is_answered = record.responded.is_some();
        let responded = record.responded.unwrap_or_else(|| self.end_after(invoked));
        let operation = |action, value| Operation { action, value, invoked, responded, session };
        match effect {
            Effect::Write(value) if is_answered => {
                sector.writes.push(operation(Action::Write, value));
            }
            Effect::Write(value) | Effect::MayWrite(value) => {
                sector.writes.push(operation(Action::MayWrite, value));
            }
            Effect::Read if is_answered => {
                let content = record.contents[at].clone();
                sector.reads.push((operation(Action::Read, Value(0)), content));
            }
            Effect::Read | Effect::Flush => {}
        }
    }

    /// The end of the process to which a request was sent at this time. Sessions connect to the next
    /// process only after the end of the last.
    fn end_after(&self, invoked: u64) -> u64 {
        self.ends.iter().copied().find(|end| *end >= invoked).unwrap_or(u64::MAX)
    }
}

impl SectorHistory {
    fn check(&self) -> Result<(), String> {
        let torn = self.reads.iter().filter_map(|(read, content)| match content {
            Content::Whole(_) => None,
            Content::Torn(data) => Some((read, data)),
        });
        let mut words = 1;
        for (read, data) in torn {
            words = WORDS;
            self.check_torn(read, data)?;
        }
        for index in 0..words {
            let reads = self.reads.iter().filter_map(|(read, content)| {
                Some(Operation { value: self.value_at(content, index)?, ..*read })
            });
            let operations: Vec<Operation> = self.writes.iter().copied().chain(reads).collect();
            check(&operations).map_err(|violation| {
                format!("sector {}, word {index}: {violation}", self.sector)
            })?;
        }
        Ok(())
    }

    /// The value of one word. `None` if it was torn itself.
    fn value_at(&self, content: &Content, index: usize) -> Option<Value> {
        match content {
            Content::Whole(value) => Some(*value),
            Content::Torn(data) => value_of(self.seed, self.sector, index, &data[index * 8..][..8]),
        }
    }

    /// Checks a torn read: every byte was written, and at most one of its values by a write that had
    /// ended before. The other values are those of writes that were being executed.
    fn check_torn(&self, read: &Operation, data: &[u8]) -> Result<(), String> {
        let mut ended: Option<&Operation> = None;
        for (index, found) in data.chunks(8).enumerate() {
            let Some(value) = value_of(self.seed, self.sector, index, found) else {
                self.check_torn_word(read, index, found)?;
                continue;
            };
            let write = self.writes.iter().find(|write| write.value == value);
            let Some(write) = write.filter(|write| write.precedes(read)) else { continue };
            if let Some(other) = ended.replace(write).filter(|other| other.value != value) {
                let sector = self.sector;
                return Err(format!(
                    "sector {sector} is torn after {other} and {write}: read {}",
                    read.origin()
                ));
            }
        }
        Ok(())
    }

    /// Checks that a torn word begins as one value and ends as another.
    fn check_torn_word(&self, read: &Operation, index: usize, found: &[u8]) -> Result<(), String> {
        let written = self.writes.iter().map(|w| word(self.seed, w.value, self.sector, index));
        let written: Vec<[u8; 8]> = written.collect();
        let is_torn = (1..8).any(|at| {
            written.iter().any(|word| word[..at] == found[..at])
                && written.iter().any(|word| word[at..] == found[at..])
        });
        let sector = self.sector;
        is_torn.then_some(()).ok_or_else(|| {
            format!(
                "sector {sector}, word {index}: {found:02x?}, which nothing wrote: read {}",
                read.origin()
            )
        })
    }

    /// Count of reads of values that another session wrote.
    fn foreign_reads(&self) -> usize {
        let is_foreign = |(read, content): &&(Operation, Content)| {
            let is_other = |writer| read.session.is_some_and(|session| session != writer);
            self.value_at(content, 0).and_then(writer).is_some_and(is_other)
        };
        self.reads.iter().filter(is_foreign).count()
    }
}

/// The contents of sectors with this data.
pub(crate) fn contents(seed: u64, sectors: Range<u64>, data: &[u8]) -> Vec<Content> {
    sectors.zip(data.chunks(SECTOR as usize)).map(|(at, data)| decode(seed, at, data)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::encode;

    const SEED: u64 = 1;
    const NEW: Value = Value(1 << 24 | 1);
    const NEWER: Value = Value(2 << 24 | 1);

    /// The result for writes of the first sector, and reads that find this content. Each with the times
    /// of request and reply.
    fn checked(
        writes: &[(Value, u64, Option<u64>)],
        reads: &[(&[u8], u64, u64)],
        ends: &[u64],
    ) -> Result<(), String> {
        let sectors = FIRST_SECTOR..FIRST_SECTOR + 1;
        let new = |effect, contents, invoked, responded| Record {
            session: None,
            sectors: sectors.clone(),
            effect,
            contents,
            invoked,
            responded,
        };
        let writes = writes.iter().map(|&(value, invoked, responded)| {
            new(Effect::Write(value), Vec::new(), invoked, responded)
        });
        let reads = reads.iter().map(|&(data, invoked, responded)| {
            new(Effect::Read, contents(SEED, sectors.clone(), data), invoked, Some(responded))
        });
        let ends = ends.to_vec();
        let history = History { seed: SEED, records: writes.chain(reads).collect(), ends };
        history.sectors()[0].check()
    }

    fn content(value: Value) -> Vec<u8> {
        encode(SEED, value, FIRST_SECTOR, 1)
    }

    /// The first bytes of one value, the others of another one.
    fn torn(one: Value, at: usize, other: Value) -> Vec<u8> {
        [&content(one)[..at], &content(other)[at..]].concat()
    }

    #[track_caller]
    fn assert_refused(result: &Result<(), String>, part: &str) {
        assert!(result.as_ref().is_err_and(|why| why.contains(part)), "{result:?}");
    }

    #[test]
    fn read_may_be_torn_during_a_write() {
        for at in [8, 252, 509] {
            let torn = torn(NEW, at, INITIAL);
            let reads: [(&[u8], u64, u64); 2] = [(&torn, 2, 3), (&torn, 4, 5)];
            assert_eq!(checked(&[(NEW, 1, Some(9))], &reads, &[]), Ok(()), "{at}");
            assert_eq!(checked(&[(NEW, 1, None)], &reads, &[9]), Ok(()), "{at}");
        }
    }

    #[test]
    fn torn_sector_after_the_write_is_rejected() {
        let torn_read = torn(NEW, 256, INITIAL);
        let writes = [(NEW, 1, Some(2))];
        assert_refused(&checked(&writes, &[(&torn_read, 3, 4)], &[]), "is torn after");
        let writes = [(NEW, 1, None)];
        assert_refused(&checked(&writes, &[(&torn_read, 3, 4)], &[2]), "is torn after");
        let writes = [(NEW, 1, Some(5)), (NEWER, 1, Some(5))];
        let torn_read = torn(NEW, 256, NEWER);
        assert_eq!(checked(&writes, &[(&torn_read, 3, 4)], &[]), Ok(()));
        assert_refused(&checked(&writes, &[(&torn_read, 6, 7)], &[]), "is torn after");
    }

    #[test]
    fn each_word_of_torn_reads_is_checked() {
        let (newer_end, newer_begin) = (torn(INITIAL, 256, NEW), torn(NEW, 256, INITIAL));
        let reads: [(&[u8], u64, u64); 2] = [(&newer_end, 2, 3), (&newer_begin, 4, 5)];
        assert_refused(&checked(&[(NEW, 1, Some(9))], &reads, &[]), "word 32");
    }

    #[test]
    fn bytes_that_nothing_wrote_are_rejected() {
        let mut data = content(INITIAL);
        data[100] ^= 1;
        assert_refused(&checked(&[], &[(&data, 1, 2)], &[]), "word 12");
        let elsewhere = encode(SEED, INITIAL, FIRST_SECTOR + 1, 1);
        assert_refused(&checked(&[], &[(&elsewhere, 1, 2)], &[]), "word 0");
        assert_refused(&checked(&[], &[(&content(NEW), 1, 2)], &[]), "no request wrote");
    }

    #[test]
    fn write_without_reply_has_no_effect_after_its_server_ends() {
        let (writes, new) = ([(NEW, 1, None)], content(NEW));
        let (before, after) = (content(INITIAL), content(INITIAL));
        assert_eq!(checked(&writes, &[(&before, 2, 3), (&new, 6, 7)], &[5]), Ok(()));
        assert_eq!(checked(&writes, &[(&before, 2, 3), (&after, 6, 7)], &[5]), Ok(()));
        let reads: [(&[u8], u64, u64); 2] = [(&after, 6, 7), (&new, 8, 9)];
        assert_refused(&checked(&writes, &reads, &[5]), "no order");
    }

    #[test]
    fn acknowledged_write_survives_the_end_of_its_server() {
        let (writes, old) = ([(NEW, 1, Some(2))], content(INITIAL));
        assert_refused(&checked(&writes, &[(&old, 6, 7)], &[5]), "no order");
    }
}
