//! What one session has done aside on the disk, so that the requests behind it need not wait.
//!
//! An errand is one piece of [`Work`] and the calls that it takes. Until it is over it holds the
//! visit that it was begun with: whoever closes the gate waits for it. What it changes is marked
//! when the bytes are there, before anybody is told.
//!
//! What is to be durable is gathered until [`Errands::submit`]: one write is then made durable by
//! itself, which leaves alone what others wrote; several things are written, and made durable by one
//! flush.
//!
//! Where the image has no lane, or none can be had, the same errands are run at once, while the
//! session waits. Never begins anything by itself, and holds a bounded number of bytes.

use super::hearing::{Listening, Others};
use super::lane::{Bell, Call, Lane, Made};
use super::{Disk, Visit, Zeroing, errno_of, zeros};
use crate::range::Range;
use nix::errno::Errno;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

/// How many errands of one session may be under way.
pub const UNDER_WAY_MAX: usize = 128;
/// How many bytes they may hold, unless it is one alone.
pub const BYTES_MAX: usize = 2 << 20;

/// What can be done aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Brings the range into memory, so that [`Visit::read_now`] is likely to find it. Never fails.
    Load(Range),
    /// Asks the kernel to bring the range into memory (`NBD_CMD_CACHE`).
    Prefetch(Range),
    /// Makes everything durable that any visit wrote before.
    Flush,
    /// Writes all of `data`; zeros that would go into a hole leave it one.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// Over only once it is on stable storage (`NBD_CMD_FLAG_FUA`).
        durable: bool,
    },
    /// Makes the range read as zeros, to the byte.
    Zero {
        /// Where.
        range: Range,
        /// With or without a hole.
        how: Zeroing,
        /// As for a write.
        durable: bool,
    },
    /// Gives back what can be given back of the range, of which the bytes may then read as
    /// anything. That the image cannot is no error.
    Trim {
        /// Where.
        range: Range,
        /// As for a write.
        durable: bool,
    },
}

/// The errands of one session. `T` is what it wants back with the outcome of each.
///
/// Dropping them waits until all are over; what became of them is then not told.
#[derive(Debug)]
pub struct Errands<'a, T> {
    disk: &'a Disk,
    bell: Arc<dyn Bell>,
    lane: Way<'a>,
    next_key: u64,
    under_way: BTreeMap<u64, Errand<'a, T>>,
    /// What is to be made durable next.
    gathered: Vec<Gathered<'a, T>>,
    /// Flushed, while others may still be hearing that it was in vain.
    unsettled: Vec<(Others, Errand<'a, T>)>,
    over: VecDeque<(T, io::Result<()>)>,
    /// Those that are not over, and the bytes that they hold.
    count: usize,
    bytes: usize,
    /// Nothing more is begun: whoever wanted it has gone.
    closing: bool,
}

/// How calls are made.
#[derive(Debug)]
enum Way<'a> {
    /// Not known until the first call.
    Unknown,
    /// Aside.
    Lane(Box<dyn Lane + 'a>),
    /// At once, by the session itself.
    Serial,
}

#[derive(Debug)]
struct Errand<'a, T> {
    token: T,
    visit: Visit<'a>,
    changes: Option<Range>,
    /// What is to follow the call that is under way.
    then: Then,
    listening: Option<Listening<'a>>,
    /// Those whom the flush that is under way is for, too.
    joined: Vec<Errand<'a, T>>,
    /// Bytes that it holds.
    weight: usize,
}

/// An errand that is to be made durable, and what it has not written yet.
#[derive(Debug)]
struct Gathered<'a, T> {
    errand: Errand<'a, T>,
    write: Option<(u64, Vec<u8>)>,
}

#[derive(Debug)]
enum Then {
    Nothing,
    Flush,
    Write { offset: u64, data: Vec<u8>, durable: bool },
}

impl<'a, T> Errands<'a, T> {
    /// None yet. `bell` rings when something may be over.
    pub fn new(disk: &'a Disk, bell: Arc<dyn Bell>) -> Self {
        Self {
            disk,
            bell,
            lane: Way::Unknown,
            next_key: 0,
            under_way: BTreeMap::new(),
            gathered: Vec::new(),
            unsettled: Vec::new(),
            over: VecDeque::new(),
            count: 0,
            bytes: 0,
            closing: false,
        }
    }

    /// Whether none is under way, and the outcome of each has been taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0 && self.over.is_empty()
    }

    /// Whether one may be begun that holds so many bytes.
    #[must_use]
    pub fn has_room(&self, bytes: usize) -> bool {
        let is_free = self.count + self.over.len() < UNDER_WAY_MAX;
        is_free && (self.bytes == 0 || self.bytes + bytes <= BYTES_MAX)
    }

    /// Whether something is being changed in `range`: who changes it, too, has to wait, or the
    /// earlier change might come out on top.
    #[must_use]
    pub fn is_changing(&self, range: Range) -> bool {
        if self.count == 0 {
            return false;
        }
        let shared = |changed: Range| changed.from(range.offset()).until(range.end());
        let gathered = self.gathered.iter().map(|gathered| &gathered.errand);
        self.under_way
            .values()
            .chain(gathered)
            .any(|errand| errand.changes.is_some_and(|changed| !shared(changed).is_empty()))
    }

    /// Begins an errand, as soon as [`Errands::submit`] is called, if not before. It is the
    /// caller's business to ask [`Errands::has_room`] and [`Errands::is_changing`] first.
    ///
    /// It ends with `EPERM` if it would change a read-only disk, with `EINVAL` beyond its end, as
    /// the first flush that failed if it is to be durable and one has, and as the image says; then
    /// any part of a change may have been made.
    pub fn begin(&mut self, visit: Visit<'a>, work: Work, token: T) {
        let weight = if let Work::Write { data, .. } = &work { data.len() } else { 0 };
        let (changes, then, listening, joined) = (None, Then::Nothing, None, Vec::new());
        let errand = Errand { token, visit, changes, then, listening, joined, weight };
        self.count += 1;
        self.bytes += weight;
        match self.check(&work) {
            Ok(true) => self.start(errand, work),
            Ok(false) => self.end(errand, Ok(())),
            Err(error) => self.end(errand, Err(error)),
        }
    }

    /// Begins all that has been taken on.
    pub fn submit(&mut self) {
        self.make_durable();
        if let Way::Lane(lane) = &mut self.lane
            && !lane.submit()
        {
            self.bell.ring();
        }
    }

    /// The next that is over: what was given to [`Errands::begin`], and its outcome.
    pub fn next_over(&mut self) -> Option<(T, io::Result<()>)> {
        if self.is_empty() {
            return None;
        }
        while !self.under_way.is_empty()
            && let Way::Lane(lane) = &mut self.lane
            && let Some(made) = lane.finished()
        {
            self.made(made);
        }
        self.settle();
        self.over.pop_front()
    }

    /// Whether an outcome waits to be taken, whatever the bell said.
    #[must_use]
    pub fn has_news(&self) -> bool {
        !self.over.is_empty()
    }

    /// Gives back the lane if nothing is under way; it is made anew when needed.
    pub fn relax(&mut self) {
        if self.is_empty() {
            self.lane = Way::Unknown;
        }
    }

    /// Whether there is no lane to give back.
    #[must_use]
    pub fn is_relaxed(&self) -> bool {
        !matches!(self.lane, Way::Lane(_))
    }

    /// Whether there is anything to do; an error if it must not be done.
    fn check(&self, work: &Work) -> io::Result<bool> {
        let disk = self.disk;
        let within = |range: &Range| disk.range(range.offset(), range.length());
        let (range, changes, durable) = match work {
            Work::Flush => return disk.hearing.check().map(|()| true),
            Work::Load(range) | Work::Prefetch(range) => (within(range)?, false, false),
            Work::Write { offset, data, durable } => {
                (disk.range(*offset, data.len() as u64)?, true, *durable)
            }
            Work::Zero { range, durable, .. } | Work::Trim { range, durable } => {
                (within(range)?, true, *durable)
            }
        };
        if changes && disk.read_only {
            return Err(Errno::EPERM.into());
        }
        if durable {
            disk.hearing.check()?;
        }
        Ok(!range.is_empty())
    }

    fn start(&mut self, mut errand: Errand<'a, T>, work: Work) {
        let flush_if = |durable| if durable { Then::Flush } else { Then::Nothing };
        match work {
            Work::Load(range) => self.call(errand, Call::Load(range)),
            Work::Prefetch(range) => self.call(errand, Call::Prefetch(range)),
            Work::Flush => self.gathered.push(Gathered { errand, write: None }),
            Work::Zero { range, how, durable } => {
                (errand.changes, errand.then) = (Some(range), flush_if(durable));
                self.call(errand, Call::Zero(range, how));
            }
            Work::Trim { range, durable } => {
                (errand.changes, errand.then) = (Some(range), flush_if(durable));
                self.call(errand, Call::Trim(range));
            }
            Work::Write { offset, data, durable } => {
                self.start_write(errand, offset, data, durable);
            }
        }
    }

    fn start_write(
        &mut self,
        mut errand: Errand<'a, T>,
        offset: u64,
        data: Vec<u8>,
        durable: bool,
    ) {
        let range = Range::whole(self.disk.size()).from(offset).split(data.len() as u64).0;
        errand.changes = Some(range);
        let image = &*self.disk.image;
        let gaps = match durable.then(|| zeros::leaves_gaps(image, offset, &data)).transpose() {
            Ok(gaps) => gaps,
            Err(error) => return self.end(errand, Err(error)),
        };
        if let Some(edges) = errand.visit.cold_edges(range) {
            errand.then = Then::Write { offset, data, durable };
            self.call(errand, Call::Load(edges));
        } else if gaps == Some(false) {
            self.gathered.push(Gathered { errand, write: Some((offset, data)) });
        } else {
            self.write(errand, offset, &data, durable);
        }
    }

    /// Writes without waiting for a disk.
    fn write(&mut self, mut errand: Errand<'a, T>, offset: u64, data: &[u8], durable: bool) {
        let written = zeros::write_around_holes(&*self.disk.image, offset, data);
        self.mark(&mut errand);
        match written {
            Ok(()) if durable => self.gathered.push(Gathered { errand, write: None }),
            outcome => self.end(errand, outcome),
        }
    }

    /// Makes durable what has been gathered.
    fn make_durable(&mut self) {
        let mut gathered = std::mem::take(&mut self.gathered);
        if let [Gathered { write: Some(_), .. }] = gathered[..]
            && let Some(Gathered { errand, write: Some((offset, data)) }) = gathered.pop()
        {
            return self.call(errand, Call::Write { offset, data });
        }
        let mut written = Vec::new();
        for Gathered { mut errand, write } in gathered {
            let outcome = write.map_or(Ok(()), |(offset, data)| {
                let outcome = self.disk.image.write(offset, &data, false);
                self.mark(&mut errand);
                outcome
            });
            match outcome {
                Ok(()) => written.push(errand),
                Err(error) => self.end(errand, Err(error)),
            }
        }
        if let Some(mut errand) = written.pop() {
            errand.joined = written;
            self.call(errand, Call::Flush);
        }
    }

    /// Makes a call, aside if that is possible.
    fn call(&mut self, mut errand: Errand<'a, T>, call: Call) {
        if matches!(call, Call::Flush | Call::Write { .. }) {
            errand.listening = Some(self.disk.hearing.listen());
        }
        if matches!(self.lane, Way::Unknown) {
            self.lane = match self.disk.image.lane(self.bell.as_eventfd()) {
                Some(lane) => Way::Lane(lane),
                None => Way::Serial,
            };
        }
        let key = self.next_key;
        self.next_key += 1;
        self.under_way.insert(key, errand);
        let declined = match &mut self.lane {
            Way::Lane(lane) => lane.begin(key, call).err(),
            _ => Some(call),
        };
        if let Some(call) = declined {
            self.made(Made { key, call, outcome: None });
        }
    }

    /// Goes on with an errand after one of its calls.
    fn made(&mut self, made: Made) {
        let Made { key, call, outcome } = made;
        let Some(mut errand) = self.under_way.remove(&key) else { return };
        let outcome = outcome.unwrap_or_else(|| call.make(&*self.disk.image));
        match (call, outcome) {
            (Call::Load(_) | Call::Prefetch(_), outcome) => self.loaded(errand, outcome),
            (Call::Flush, Ok(())) => self.heard(errand),
            (Call::Flush, Err(error)) => self.fail(errand, &error),
            (Call::Write { .. }, Ok(())) => {
                self.mark(&mut errand);
                self.heard(errand);
            }
            // Was it to write, or to make durable? Written once more without, it shows.
            (Call::Write { offset, data }, Err(error)) => {
                let written = self.disk.image.write(offset, &data, false);
                self.mark(&mut errand);
                match written {
                    Ok(()) => self.fail(errand, &error),
                    Err(error) => self.end(errand, Err(error)),
                }
            }
            (Call::Zero(..) | Call::Trim(_), outcome) => {
                self.mark(&mut errand);
                match (outcome, &errand.then) {
                    (Ok(()), Then::Flush) => self.gathered.push(Gathered { errand, write: None }),
                    (outcome, _) => self.end(errand, outcome),
                }
            }
        }
    }

    /// Goes on with what was to be loaded first.
    fn loaded(&mut self, mut errand: Errand<'a, T>, outcome: io::Result<()>) {
        match std::mem::replace(&mut errand.then, Then::Nothing) {
            Then::Write { offset, data, durable } if !self.closing => {
                self.write(errand, offset, &data, durable);
            }
            _ => self.end(errand, outcome),
        }
    }

    /// The kernel has said that something is durable: ends, unless somebody else may know better.
    fn heard(&mut self, mut errand: Errand<'a, T>) {
        errand.listening = None;
        match self.disk.hearing.ring_after_others(&self.bell) {
            None => self.end(errand, self.disk.hearing.check()),
            Some(others) => self.unsettled.push((others, errand)),
        }
    }

    /// Ends those of whom everybody has said what was heard.
    fn settle(&mut self) {
        let hearing = &self.disk.hearing;
        let mut at = 0;
        while at < self.unsettled.len() {
            if hearing.have_ended(self.unsettled[at].0) {
                let (_, errand) = self.unsettled.swap_remove(at);
                self.end(errand, hearing.check());
            } else {
                at += 1;
            }
        }
    }

    /// What was to be durable is not, and never will be known to be.
    fn fail(&mut self, errand: Errand<'a, T>, error: &io::Error) {
        let told = self.disk.hearing.failed(error);
        self.end(errand, Err(told));
    }

    fn end(&mut self, errand: Errand<'a, T>, outcome: io::Result<()>) {
        let errno = outcome.as_ref().err().map(errno_of);
        for joined in errand.joined {
            let outcome = errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
            self.end(joined, outcome);
        }
        self.count -= 1;
        self.bytes -= errand.weight;
        self.over.push_back((errand.token, outcome));
    }

    /// Lets those go of which nobody tells the end. They may still be made: rather is the gate never
    /// closed again than behind them. And a flush may have failed: better call one so that has not.
    fn abandon(&mut self) {
        let mut abandoned = std::mem::take(&mut self.under_way);
        for errand in abandoned.values_mut().filter(|errand| errand.listening.is_some()) {
            let _ = self.disk.hearing.failed(&Errno::EIO.into());
            errand.listening = None;
        }
        std::mem::forget(abandoned);
    }

    /// Marks what an errand has changed, be it only in part: after the bytes are there. The copier
    /// takes the mark first and reads second, so that a change may be sent twice but never missed.
    fn mark(&self, errand: &mut Errand<'a, T>) {
        if let Some(range) = errand.changes.take() {
            self.disk.mark(range);
        }
    }
}

impl<T> Drop for Errands<'_, T> {
    fn drop(&mut self) {
        self.closing = true;
        while !self.under_way.is_empty()
            && let Way::Lane(lane) = &mut self.lane
        {
            lane.submit();
            lane.wait();
            match lane.finished() {
                Some(made) => self.made(made),
                None => return self.abandon(),
            }
        }
    }
}

#[cfg(test)]
mod tests;
