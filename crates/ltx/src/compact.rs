//! Making one LTX file of several that follow each other.

use crate::Result;
use crate::checksum::lock_page;
use crate::decode::Decoder;
use crate::encode::Encoder;
use crate::error::Error;
use crate::header::{Header, Trailer};
use crate::position::Txid;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{Read, Write};

/// Merges LTX files into one, which takes a database from before the first to after the last of them.
///
/// The inputs are in order, unread, of one page size; each starts with the transaction and the checksum after the one
/// before it. The first may be a snapshot, then the result is one. Of a page that several of them hold the last is
/// taken; pages that a later one cut off are left out. The header takes the first transaction and checksum from the
/// first input, the WAL's fields are 0, and all else comes from the last input.
///
/// It streams: every input costs two pages of memory besides its reader, so merge thousands of files in rounds.
///
/// # Errors
/// [`Error::NothingToCompact`], [`Error::CompactGap`], [`Error::CompactPageSize`], [`Error::CompactChain`],
/// [`Error::CompactNoChecksums`], [`Error::CompactMissingPage`], or that input `index` cannot be read
/// ([`Error::CompactInput`]), or any error of writing. **What was written by then is to be discarded**: inputs are known
/// to be good only when all of them were read.
pub fn compact<R: Read, W: Write>(inputs: Vec<Decoder<R>>, writer: W) -> Result<(Header, Trailer, W)> {
    let header = merged_header(&inputs)?;
    let mut encoder = Encoder::new(writer, header.clone())?;
    let mut merge = Merge::new(inputs)?;
    let mut growth = Growth::new(&merge, &header);
    while let Some((pgno, input)) = merge.next_page() {
        if pgno <= merge.inputs[input].cut {
            growth.accept(pgno)?;
            encoder.encode_page(pgno, &merge.inputs[input].page)?;
        }
        merge.advance(pgno)?;
    }
    growth.accept_end()?;
    let post_apply = merge.finish()?.post_apply;
    let (trailer, writer) = encoder.finish(post_apply)?;
    Ok((header, trailer, writer))
}

/// Checks that the inputs follow each other, as far as their headers say, and makes the header of the result.
fn merged_header<R: Read>(inputs: &[Decoder<R>]) -> Result<Header> {
    let (Some(first), Some(last)) = (inputs.first(), inputs.last()) else {
        return Err(Error::NothingToCompact);
    };
    let page_size = first.header().page_size;
    let mut expected = first.header().min_txid.0;
    for (index, input) in inputs.iter().enumerate() {
        let header = input.header();
        if !header.has_checksums() {
            return Err(Error::CompactNoChecksums { index });
        }
        if header.page_size != page_size {
            return Err(Error::CompactPageSize { index, expected: page_size, found: header.page_size });
        }
        if header.min_txid.0 != expected {
            return Err(Error::CompactGap { index, expected: Txid(expected), found: header.min_txid });
        }
        // 0 after the last possible transaction: nothing can follow, and no file starts with 0.
        expected = header.max_txid.0.wrapping_add(1);
    }
    Ok(Header {
        flags: 0,
        min_txid: first.header().min_txid,
        pre_apply: first.header().pre_apply,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        ..last.header().clone()
    })
}

struct Input<R: Read> {
    decoder: Decoder<R>,
    /// The page that was read last.
    page: Vec<u8>,
    /// Pages above this do not reach the result: a later input cut them off.
    cut: u32,
}

/// Reads the inputs side by side.
struct Merge<R: Read> {
    inputs: Vec<Input<R>>,
    /// The page at hand of each input that has one: the lowest page number on top, of several the last input.
    heads: BinaryHeap<(Reverse<u32>, usize)>,
    /// The lowest size that the database had after any of the inputs, in pages.
    lowest: u32,
}

impl<R: Read> Merge<R> {
    fn new(decoders: Vec<Decoder<R>>) -> Result<Self> {
        let mut lowest = u32::MAX;
        let mut inputs: Vec<Input<R>> = decoders
            .into_iter()
            .rev()
            .map(|decoder| {
                let cut = lowest;
                lowest = lowest.min(decoder.header().commit);
                Input { decoder, page: Vec::new(), cut }
            })
            .collect();
        inputs.reverse();
        let mut merge = Merge { heads: BinaryHeap::with_capacity(inputs.len()), inputs, lowest };
        for input in 0..merge.inputs.len() {
            merge.read(input)?;
        }
        Ok(merge)
    }

    /// The lowest page number not yet passed and the last input that holds it.
    fn next_page(&self) -> Option<(u32, usize)> {
        self.heads.peek().map(|&(Reverse(pgno), input)| (pgno, input))
    }

    /// Passes page `pgno` in all inputs that hold it.
    fn advance(&mut self, pgno: u32) -> Result<()> {
        while let Some(&(Reverse(head), input)) = self.heads.peek()
            && head == pgno
        {
            self.heads.pop();
            self.read(input)?;
        }
        Ok(())
    }

    fn read(&mut self, index: usize) -> Result<()> {
        let Input { decoder, page, .. } = &mut self.inputs[index];
        if let Some(pgno) = decoder.next_page(page).map_err(|err| input_error(index, err))? {
            self.heads.push((Reverse(pgno), index));
        }
        Ok(())
    }

    /// Checks all inputs as whole files, and that each starts where the one before it ended. Gives the last trailer.
    fn finish(self) -> Result<Trailer> {
        let mut previous: Option<Trailer> = None;
        for (index, Input { decoder, .. }) in self.inputs.into_iter().enumerate() {
            let found = decoder.header().pre_apply;
            let trailer = decoder.finish().map_err(|err| input_error(index, err))?;
            if let Some(expected) = previous.map(|trailer| trailer.post_apply)
                && expected != found
            {
                return Err(Error::CompactChain { index, expected, found });
            }
            previous = Some(trailer);
        }
        previous.ok_or(Error::NothingToCompact)
    }
}

/// Checks that the result holds every page by which the inputs made the database grow. Without such a page, applying the
/// result to a database that was larger before would leave old content in its place.
struct Growth {
    next: u64,
    commit: u32,
    lock_page: u32,
}

impl Growth {
    fn new<R: Read>(merge: &Merge<R>, header: &Header) -> Self {
        let next = u64::from(merge.lowest) + 1;
        Growth { next, commit: header.commit, lock_page: lock_page(header.page_size) }
    }

    fn accept(&mut self, pgno: u32) -> Result<()> {
        self.skip_lock_page();
        if u64::from(pgno) > self.next {
            return Err(self.missing());
        }
        if u64::from(pgno) == self.next {
            self.next += 1;
        }
        Ok(())
    }

    fn accept_end(&mut self) -> Result<()> {
        self.skip_lock_page();
        if self.next <= u64::from(self.commit) { Err(self.missing()) } else { Ok(()) }
    }

    fn skip_lock_page(&mut self) {
        if self.next == u64::from(self.lock_page) {
            self.next += 1;
        }
    }

    fn missing(&self) -> Error {
        // It is at most the size of the database, or below a page number.
        Error::CompactMissingPage { pgno: self.next as u32 }
    }
}

fn input_error(index: usize, source: Error) -> Error {
    Error::CompactInput { index, source: Box::new(source) }
}
