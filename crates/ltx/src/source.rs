//! A reader that knows its offset and can look a few bytes ahead.

use crate::error::Error;
use std::io::{self, Read};

/// How far [`Source::peek`] can look: what follows the header in the shortest LTX file there is.
pub(crate) const MAX_PEEK: usize = 20;

pub(crate) struct Source<R> {
    reader: R,
    /// Bytes handed out so far.
    offset: u64,
    peeked: [u8; MAX_PEEK],
    start: usize,
    end: usize,
}

impl<R: Read> Source<R> {
    pub(crate) fn new(reader: R) -> Self {
        Source { reader, offset: 0, peeked: [0; MAX_PEEK], start: 0, end: 0 }
    }

    /// The reader; bytes that were peeked and not read are lost.
    pub(crate) fn into_reader(self) -> R {
        debug_assert_eq!(self.start, self.end, "all that was peeked has been read");
        self.reader
    }

    /// Offset of the next byte from the start of the file.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next [`MAX_PEEK`] bytes, which stay unread; fewer only where the file ends.
    pub(crate) fn peek(&mut self) -> Result<&[u8], Error> {
        self.peeked.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < MAX_PEEK {
            match self.reader.read(&mut self.peeked[self.end..]) {
                Ok(0) => break,
                Ok(n) => self.end += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Io { offset: self.offset + self.end as u64, source }),
            }
        }
        Ok(&self.peeked[..self.end])
    }

    /// Fills `buf`, which is part of `what`.
    pub(crate) fn fill(&mut self, buf: &mut [u8], what: &'static str) -> Result<(), Error> {
        let offset = self.offset;
        self.read_exact(buf).map_err(|err| read_error(err, offset, what))
    }
}

/// An error of `read_exact` at `offset` inside `what`.
pub(crate) fn read_error(err: io::Error, offset: u64, what: &'static str) -> Error {
    if err.kind() == io::ErrorKind::UnexpectedEof {
        Error::Truncated { offset, what }
    } else {
        Error::Io { offset, source: err }
    }
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let ahead = &self.peeked[self.start..self.end];
        let n = if ahead.is_empty() {
            self.reader.read(buf)?
        } else {
            let n = ahead.len().min(buf.len());
            buf[..n].copy_from_slice(&ahead[..n]);
            self.start += n;
            n
        };
        self.offset += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one byte a time.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = buf.len().min(1);
            self.0.read(&mut buf[..n])
        }
    }

    #[test]
    fn peeking_consumes_nothing() {
        let bytes: Vec<u8> = (0..50).collect();
        let mut source = Source::new(Trickle(&bytes));
        let mut head = [0; 5];
        source.fill(&mut head, "head").unwrap();
        assert_eq!(source.peek().unwrap(), &bytes[5..25]);
        source.fill(&mut head, "head").unwrap();
        assert_eq!(source.peek().unwrap(), &bytes[10..30]);
        assert_eq!(source.offset(), 10);
        let mut rest = Vec::new();
        source.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, bytes[10..]);
        assert_eq!(source.offset(), 50);
    }

    #[test]
    fn end_of_file_is_truncation_and_names_the_part() {
        let mut source = Source::new(&[1u8, 2, 3][..]);
        assert_eq!(source.peek().unwrap(), [1, 2, 3]);
        let found = source.fill(&mut [0; 4], "trailer");
        assert!(matches!(found, Err(Error::Truncated { offset: 0, what: "trailer" })), "{found:?}");
    }
}
