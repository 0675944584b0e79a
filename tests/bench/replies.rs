//! Recognises simple replies in a stream of bytes and says which requests are answered.
//! Pure: bytes in, cookies out. The data of reads is passed over, not kept.

use flexnbd::nbd::wire::{ErrorCode, SIMPLE_REPLY_MAGIC};

/// Length of a simple reply without data, in bytes.
const HEAD_LENGTH: usize = 16;

/// How far into the replies of one session we are.
#[derive(Debug, Default)]
pub(super) struct Replies {
    /// The first bytes of a reply whose head is incomplete.
    head: [u8; HEAD_LENGTH],
    have: usize,
    /// The reply whose data is passing by, and how much of that is still to come.
    data: Option<(usize, usize)>,
}

impl Replies {
    /// Takes the next bytes. `data_length` says how much data belongs to a cookie's reply (none
    /// if there is no such request); `answered` hears of every cookie whose reply is complete.
    ///
    /// # Errors
    /// A sentence for people when the server did not do what it was asked.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        data_length: impl Fn(usize) -> Option<usize>,
        mut answered: impl FnMut(usize),
    ) -> Result<(), String> {
        let mut rest = bytes;
        loop {
            if let Some((cookie, left)) = self.data {
                let step = left.min(rest.len());
                rest = &rest[step..];
                if step < left {
                    self.data = Some((cookie, left - step));
                    return Ok(());
                }
                self.data = None;
                answered(cookie);
            }
            if !self.complete_head(&mut rest) {
                return Ok(());
            }
            let cookie = cookie_of(&self.head)?;
            let length = data_length(cookie)
                .ok_or_else(|| format!("the server answered request {cookie}, which is unknown"))?;
            self.data = Some((cookie, length));
        }
    }

    /// Whether the head is complete with what could be taken from `rest`; then the next one
    /// begins.
    fn complete_head(&mut self, rest: &mut &[u8]) -> bool {
        let step = (HEAD_LENGTH - self.have).min(rest.len());
        let (now, later) = rest.split_at(step);
        self.head[self.have..self.have + step].copy_from_slice(now);
        self.have += step;
        *rest = later;
        let complete = self.have == HEAD_LENGTH;
        if complete {
            self.have = 0;
        }
        complete
    }
}

/// Which request a head answers, if it says that all went well.
fn cookie_of(head: &[u8; HEAD_LENGTH]) -> Result<usize, String> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = *head;
    let (magic, error) =
        (u32::from_be_bytes([m0, m1, m2, m3]), u32::from_be_bytes([e0, e1, e2, e3]));
    if magic != SIMPLE_REPLY_MAGIC {
        return Err(format!("the server sent {magic:#x} where a simple reply should begin"));
    }
    if error != 0 {
        return Err(format!("a request failed: {}", ErrorCode::from_wire(error)));
    }
    usize::try_from(u64::from_be_bytes(cookie)).map_err(|_| "a cookie is too large".to_owned())
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    fn reply(cookie: u64, error: u32, data: usize) -> Vec<u8> {
        let head = [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes()].concat();
        [head, cookie.to_be_bytes().to_vec(), vec![7; data]].concat()
    }

    /// Requests below 10 are writes, those below 20 reads of 5 bytes.
    fn length(cookie: usize) -> Option<usize> {
        match cookie {
            0..10 => Some(0),
            10..20 => Some(5),
            _ => None,
        }
    }

    #[test]
    fn replies_are_recognised_however_the_stream_is_cut() {
        let stream = [reply(3, 0, 0), reply(12, 0, 5), reply(11, 0, 5), reply(4, 0, 0)].concat();
        for portion in 1..=stream.len() {
            let (mut replies, mut seen) = (Replies::default(), Vec::new());
            for bytes in stream.chunks(portion) {
                replies.feed(bytes, length, |cookie| seen.push(cookie)).unwrap();
            }
            assert_eq!(seen, [3, 12, 11, 4], "in portions of {portion}");
        }
    }

    #[test]
    fn an_incomplete_reply_is_no_answer() {
        let stream = reply(12, 0, 5);
        let mut seen = 0;
        Replies::default().feed(&stream[..20], length, |_| seen += 1).unwrap();
        assert_eq!(seen, 0);
    }

    #[test]
    fn errors_strangers_and_nonsense_are_not_counted_as_work() {
        for wrong in [reply(3, 5, 0), reply(20, 0, 0), vec![0; 16]] {
            let mut seen = 0;
            assert!(Replies::default().feed(&wrong, length, |_| seen += 1).is_err());
            assert_eq!(seen, 0);
        }
    }
}
