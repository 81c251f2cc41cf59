//! Writing LTX files, in the current format.

use crate::Result;
use crate::checksum::FileDigest;
use crate::error::Error;
use crate::header::{HEADER_SIZE, Header, Trailer};
use crate::index::{Entry, MAX_UVARINT};
use crate::pages::PageSequence;
use crate::position::Checksum;
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use std::io::{self, Write};

/// Bytes before the LZ4 block of a page: u32 page number, u16 flags, u32 size of the block.
pub(crate) const PAGE_PREFIX: usize = 10;

/// Page flag: the page is one LZ4 block with its size before it (and not an LZ4 frame).
pub(crate) const PAGE_FLAG_SIZE: u16 = 1;

/// What ends the pages: a page header of zeros.
const END_OF_PAGES: [u8; 6] = [0; 6];

/// Memory that encoding needs, about 20 KiB for small pages: reuse it where files are made often.
#[derive(Default)]
pub struct EncoderBuffers {
    table: CompressTable,
    record: Vec<u8>,
    index: Vec<u8>,
}

/// Writes one LTX file: [`Encoder::new`], [`Encoder::encode_page`] for each page in ascending order, [`Encoder::finish`].
///
/// It writes in small pieces (header, one piece per page, end): give it a buffer if a write is expensive.
pub struct Encoder<W> {
    writer: W,
    header: Header,
    pages: PageSequence,
    digest: FileDigest,
    buffers: EncoderBuffers,
    /// Bytes written.
    offset: u64,
    failed: bool,
}

impl<W: Write> Encoder<W> {
    /// Starts a file by writing its header.
    ///
    /// # Errors
    /// [`Error::Header`] if the header is invalid or has flags (none are written), [`Error::Io`].
    pub fn new(writer: W, header: Header) -> Result<Self> {
        Self::with_buffers(writer, header, EncoderBuffers::default())
    }

    /// As [`Encoder::new`], with buffers that [`Encoder::finish_with_buffers`] gave back.
    ///
    /// # Errors
    /// As [`Encoder::new`].
    pub fn with_buffers(writer: W, header: Header, mut buffers: EncoderBuffers) -> Result<Self> {
        header.validate()?;
        if header.flags != 0 {
            return Err(Error::Header { problem: format!("flags {:#x} are never written", header.flags) });
        }
        let page_size = header.page_size as usize;
        buffers.record.resize(PAGE_PREFIX + get_maximum_output_size(page_size), 0);
        buffers.index.clear();
        let mut encoder = Encoder {
            writer,
            pages: PageSequence::new(&header),
            digest: FileDigest::new(),
            buffers,
            offset: 0,
            failed: false,
            header,
        };
        let bytes = encoder.header.encode();
        encoder.digest.update(&bytes);
        let written = encoder.writer.write_all(&bytes);
        encoder.wrote(written, HEADER_SIZE)?;
        Ok(encoder)
    }

    /// The header that was written.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Adds a page. `data` is exactly one page; page numbers grow, and in a snapshot none is left out but the lock page.
    ///
    /// # Errors
    /// [`Error::PageOrder`], [`Error::PageBeyondCommit`], [`Error::LockPage`], [`Error::SnapshotGap`] and
    /// [`Error::PageLength`] leave the file as it was; after [`Error::Io`] it cannot be finished.
    pub fn encode_page(&mut self, pgno: u32, data: &[u8]) -> Result<()> {
        self.check_usable()?;
        if data.len() != self.header.page_size as usize {
            return Err(Error::PageLength { pgno, len: data.len(), page_size: self.header.page_size });
        }
        self.pages.accept(pgno, self.offset)?;
        self.pages.add_content(data);

        let (prefix, block) = self.buffers.record.split_at_mut(PAGE_PREFIX);
        let size = match compress_into_with_table(data, block, &mut self.buffers.table) {
            Ok(size) => size,
            Err(err) => unreachable!("the block buffer has the size that lz4_flex asks for: {err}"),
        };
        prefix[..4].copy_from_slice(&pgno.to_be_bytes());
        prefix[4..6].copy_from_slice(&PAGE_FLAG_SIZE.to_be_bytes());
        prefix[6..].copy_from_slice(&(size as u32).to_be_bytes());
        self.digest.update(prefix);
        self.digest.update(data);

        let len = PAGE_PREFIX + size;
        let mut entry = [0; 3 * MAX_UVARINT];
        let entry_len = Entry { pgno, offset: self.offset, len: len as u64 }.encode(&mut entry);
        self.buffers.index.extend_from_slice(&entry[..entry_len]);

        let written = self.writer.write_all(&self.buffers.record[..len]);
        self.wrote(written, len)
    }

    /// Ends the file with its index and trailer; `post_apply` is the rolling checksum of the database after the
    /// transaction. Does not flush the writer.
    ///
    /// # Errors
    /// [`Error::PostApply`] and [`Error::SnapshotChecksum`] if `post_apply` cannot be right, [`Error::SnapshotGap`] if
    /// pages of a snapshot are missing, [`Error::Io`], [`Error::EncoderFailed`].
    pub fn finish(self, post_apply: Checksum) -> Result<(Trailer, W)> {
        self.finish_with_buffers(post_apply).map(|(trailer, writer, _)| (trailer, writer))
    }

    /// As [`Encoder::finish`], and gives the buffers back for the next file.
    ///
    /// # Errors
    /// As [`Encoder::finish`].
    pub fn finish_with_buffers(mut self, post_apply: Checksum) -> Result<(Trailer, W, EncoderBuffers)> {
        self.check_usable()?;
        self.pages.end(self.offset)?;
        self.header.check_post_apply(post_apply)?;
        self.pages.check_rolling(post_apply)?;

        // The index is the last thing that can be long, so the end is written in one piece from its buffer.
        let EncoderBuffers { index, record, .. } = &mut self.buffers;
        index.push(0);
        let index_len = index.len() as u64;
        index.extend_from_slice(&index_len.to_be_bytes());
        index.extend_from_slice(&post_apply.0.to_be_bytes());
        self.digest.update(&END_OF_PAGES);
        self.digest.update(index);
        let trailer = Trailer { post_apply, file_checksum: self.digest.value() };
        index.extend_from_slice(&trailer.file_checksum.to_be_bytes());

        // Small indexes (nearly all) go out with the end of the pages in one write.
        let len = END_OF_PAGES.len() + index.len();
        let written = if len <= record.len() {
            record[..END_OF_PAGES.len()].copy_from_slice(&END_OF_PAGES);
            record[END_OF_PAGES.len()..len].copy_from_slice(index);
            self.writer.write_all(&record[..len])
        } else {
            self.writer.write_all(&END_OF_PAGES).and_then(|()| self.writer.write_all(index))
        };
        self.wrote(written, len)?;
        Ok((trailer, self.writer, self.buffers))
    }

    fn check_usable(&self) -> Result<()> {
        if self.failed { Err(Error::EncoderFailed { offset: self.offset }) } else { Ok(()) }
    }

    fn wrote(&mut self, result: io::Result<()>, len: usize) -> Result<()> {
        if let Err(source) = result {
            self.failed = true;
            return Err(Error::Io { offset: self.offset, source });
        }
        self.offset += len as u64;
        Ok(())
    }
}
