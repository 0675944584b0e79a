//! Finds the ends of TLS records in a stream (RFC 8446, section 5.1).

/// Length of the header of a record in bytes: type, version, and length of the rest.
const HEADER: usize = 5;

/// Where the reader is within a record.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RecordReader {
    header: [u8; HEADER],
    /// Bytes of the record that have been read, header included.
    have: usize,
}

impl RecordReader {
    /// How many bytes to read next: never more than the rest of the header or of the record.
    pub(super) fn wanted(&self) -> usize {
        if self.have < HEADER { HEADER - self.have } else { length(self.header) - self.have }
    }

    /// These bytes were read, at most as many as were wanted.
    pub(super) fn advance(&mut self, bytes: &[u8]) {
        if self.have < HEADER {
            self.header[self.have..self.have + bytes.len()].copy_from_slice(bytes);
        }
        self.have += bytes.len();
    }

    /// Whether a record is complete; if so, begins with the next one.
    pub(super) fn is_complete(&mut self) -> bool {
        let complete = self.have >= HEADER && self.have >= length(self.header);
        if complete {
            self.have = 0;
        }
        complete
    }
}

/// Length of a record with this header, header included.
fn length(header: [u8; HEADER]) -> usize {
    HEADER + usize::from(u16::from_be_bytes([header[3], header[4]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_stops_at_each_end_of_a_record() {
        let stream = [22, 3, 3, 0, 2, 7, 7, 23, 3, 3, 0, 0, 23, 3, 3, 1, 0];
        for most in 1..6 {
            let mut reader = RecordReader::default();
            let (mut at, mut ends) = (0, Vec::new());
            while at < stream.len() {
                let step = reader.wanted().min(most).min(stream.len() - at);
                assert!(step > 0);
                reader.advance(&stream[at..at + step]);
                at += step;
                if reader.is_complete() {
                    ends.push(at);
                }
            }
            assert_eq!(ends, [7, 12], "{most} bytes at a time");
            assert_eq!(reader.wanted(), 256);
        }
    }
}
