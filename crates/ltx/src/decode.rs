//! Reading LTX files, in the current format and the older ones.

use crate::Result;
use crate::checksum::FileDigest;
use crate::encode::{PAGE_FLAG_SIZE, PAGE_PREFIX};
use crate::error::Error;
use crate::header::{FLAG_LZ4_FRAME, HEADER_SIZE, Header, TRAILER_SIZE, Trailer};
use crate::index::{Entry, MAX_UVARINT};
use crate::pages::PageSequence;
use crate::source::{Source, read_error};
use lz4_flex::block::get_maximum_output_size;
use lz4_flex::frame::FrameDecoder;
use std::fmt;
use std::io::Read;

/// Magic of an LZ4 frame (LZ4 frame format 1.6.4), as its bytes are in the file.
const LZ4_FRAME_MAGIC: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];

/// The variants of the format. None of them says which one it is (the magic is `LTX1` in all), so [`Decoder::new`]
/// tells them apart by what follows the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// LiteFS 0.4 to 0.5.14, uncompressed: 4-byte page headers, raw pages, no index.
    V1,
    /// LiteFS 0.4 to 0.5.14, compressed: as [`Format::V1`], all pages in one LZ4 frame.
    V1Lz4,
    /// Go library v0.4.0: 4-byte page headers, an LZ4 frame per page, index.
    V2,
    /// Go library v0.5.0 and later, and all we write: 6-byte page headers, an LZ4 block (or frame) per page, index.
    V3,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::V1 => "v1",
            Format::V1Lz4 => "v1-lz4",
            Format::V2 => "v2",
            Format::V3 => "v3",
        })
    }
}

/// Reads one LTX file and checks all of it: [`Decoder::new`], [`Decoder::next_page`] until it gives `None`,
/// [`Decoder::finish`]. **Nothing that was read is to be trusted before `finish` succeeded.**
///
/// It reads in small pieces (give it a buffered reader) and stops exactly after the trailer, so that more can follow.
/// It needs about three pages of memory, whatever the file claims (formats with LZ4 frames: up to 8 MiB).
pub struct Decoder<R: Read> {
    body: Body<R>,
    format: Format,
    header: Header,
    pages: PageSequence,
    digest: FileDigest,
    index: ExpectedIndex,
    block: Vec<u8>,
    state: State,
}

enum Body<R: Read> {
    Plain(Source<R>),
    /// The pages of [`Format::V1Lz4`].
    Framed(Box<FrameDecoder<Source<R>>>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Pages,
    PagesEnded,
    Failed,
}

/// What the page index has to be, without keeping it: its length and checksum.
struct ExpectedIndex {
    len: u64,
    digest: FileDigest,
}

impl<R: Read> Decoder<R> {
    /// Reads and checks the header, and finds out the format.
    ///
    /// # Errors
    /// [`Error::Magic`], [`Error::Header`], [`Error::Truncated`], [`Error::Io`], and [`Error::Compressed`] if an LZ4 frame
    /// is announced and none follows.
    pub fn new(reader: R) -> Result<Self> {
        Self::open(reader, None)
    }

    /// As [`Decoder::new`] for a file whose format is known, so nothing is guessed.
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub fn with_format(reader: R, format: Format) -> Result<Self> {
        Self::open(reader, Some(format))
    }

    fn open(reader: R, format: Option<Format>) -> Result<Self> {
        let mut source = Source::new(reader);
        let mut bytes = [0; HEADER_SIZE];
        source.fill(&mut bytes, "header")?;
        let header = Header::decode(&bytes)?;
        let format = match format {
            Some(format) => format,
            None if header.flags & FLAG_LZ4_FRAME != 0 => Format::V1Lz4,
            None => detect(source.peek()?, header.page_size),
        };
        if (format == Format::V1Lz4) != (header.flags & FLAG_LZ4_FRAME != 0) {
            let problem = format!("flags {:#x} do not go with format {format}", header.flags);
            return Err(Error::Header { problem });
        }
        let mut digest = FileDigest::new();
        digest.update(&bytes);
        let body = if format == Format::V1Lz4 {
            check_frame_start(&mut source, || "the pages".to_owned())?;
            Body::Framed(Box::new(FrameDecoder::new(source)))
        } else {
            Body::Plain(source)
        };
        Ok(Decoder {
            body,
            format,
            pages: PageSequence::new(&header),
            header,
            digest,
            index: ExpectedIndex { len: 0, digest: FileDigest::new() },
            block: Vec::new(),
            state: State::Pages,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The format of the file.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of the file read so far.
    pub fn offset(&self) -> u64 {
        match &self.body {
            Body::Plain(source) => source.offset(),
            Body::Framed(frame) => frame.get_ref().offset(),
        }
    }

    /// Reads the next page into `buf`, which becomes one page long, and returns its number; `None` after the last.
    ///
    /// # Errors
    /// Any [`Error`] of reading. The decoder is of no use afterwards: every further call fails too.
    pub fn next_page(&mut self, buf: &mut Vec<u8>) -> Result<Option<u32>> {
        match self.state {
            State::Pages => {}
            State::PagesEnded => return Ok(None),
            State::Failed => return Err(Error::DecoderFailed { offset: self.offset() }),
        }
        // Stays in place if anything below fails.
        self.state = State::Failed;
        buf.resize(self.header.page_size as usize, 0);
        let page = self.read_page(buf)?;
        self.state = if page.is_some() { State::Pages } else { State::PagesEnded };
        Ok(page)
    }

    /// Reads the rest of the file and checks it as a whole.
    ///
    /// # Errors
    /// Any [`Error`] of reading; [`Error::Index`], [`Error::PostApply`], [`Error::FileChecksum`] and
    /// [`Error::SnapshotChecksum`] come only from here.
    pub fn finish(self) -> Result<Trailer> {
        self.finish_with_reader().map(|(trailer, _)| trailer)
    }

    /// As [`Decoder::finish`], and gives the reader back, which is at the first byte after the file.
    ///
    /// # Errors
    /// As [`Decoder::finish`].
    pub fn finish_with_reader(mut self) -> Result<(Trailer, R)> {
        let mut buf = Vec::new();
        while self.next_page(&mut buf)?.is_some() {}
        let Decoder { body, format, header, pages, mut digest, index, .. } = self;
        let mut source = match body {
            Body::Plain(source) => source,
            Body::Framed(frame) => frame.into_inner(),
        };
        if matches!(format, Format::V2 | Format::V3) {
            index.check(&mut source, &mut digest)?;
        }
        let mut bytes = [0; TRAILER_SIZE];
        source.fill(&mut bytes, "trailer")?;
        let trailer = Trailer::decode(&bytes);
        digest.update(&bytes[..8]);
        if digest.value() != trailer.file_checksum {
            return Err(Error::FileChecksum { computed: digest.value(), stored: trailer.file_checksum });
        }
        header.check_post_apply(trailer.post_apply)?;
        pages.check_rolling(trailer.post_apply)?;
        Ok((trailer, source.into_reader()))
    }

    fn read_page(&mut self, buf: &mut [u8]) -> Result<Option<u32>> {
        let offset = self.offset();
        let mut prefix = [0; PAGE_PREFIX];
        let mut prefix_len = if self.format == Format::V3 { 6 } else { 4 };
        self.fill(&mut prefix[..prefix_len], "page header")?;
        let pgno = u32::from_be_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]);
        let flags = u16::from_be_bytes([prefix[4], prefix[5]]);
        if flags & !PAGE_FLAG_SIZE != 0 || (pgno == 0 && flags != 0) {
            return Err(Error::PageFlags { pgno, offset, flags });
        }
        if pgno == 0 {
            self.digest.update(&prefix[..prefix_len]);
            self.pages.end(offset)?;
            self.end_frame()?;
            return Ok(None);
        }
        self.pages.accept(pgno, offset)?;
        match (&mut self.body, self.format) {
            (Body::Plain(source), Format::V3) if flags == PAGE_FLAG_SIZE => {
                source.fill(&mut prefix[6..], "page header")?;
                prefix_len = PAGE_PREFIX;
                let size = u32::from_be_bytes([prefix[6], prefix[7], prefix[8], prefix[9]]);
                let max = max_block(self.header.page_size);
                if size == 0 || size > max {
                    return Err(Error::BlockSize { pgno, offset, size, max });
                }
                self.block.resize(size as usize, 0);
                source.fill(&mut self.block, "page")?;
                unpack_block(&self.block, buf).map_err(|problem| Error::Compressed {
                    part: format!("page {pgno}"),
                    offset: offset + PAGE_PREFIX as u64,
                    problem,
                })?;
            }
            (Body::Plain(source), Format::V2 | Format::V3) => read_page_frame(source, pgno, buf)?,
            _ => self.fill(buf, "page")?,
        }
        self.digest.update(&prefix[..prefix_len]);
        self.digest.update(buf);
        self.pages.add_content(buf);
        self.index.add(&Entry { pgno, offset, len: self.offset() - offset });
        Ok(Some(pgno))
    }

    /// Reads from the pages, through the LZ4 frame if there is one around them.
    fn fill(&mut self, buf: &mut [u8], what: &'static str) -> Result<()> {
        let offset = self.offset();
        match &mut self.body {
            Body::Plain(source) => source.fill(buf, what),
            Body::Framed(frame) => {
                frame.read_exact(buf).map_err(|err| frame_error(err, offset, what, "the pages"))
            }
        }
    }

    /// Reads the end mark and checksum of the LZ4 frame around the pages, if there is one.
    fn end_frame(&mut self) -> Result<()> {
        let offset = self.offset();
        match &mut self.body {
            Body::Plain(_) => Ok(()),
            Body::Framed(frame) => read_frame_end(frame, offset, "the pages"),
        }
    }
}

impl ExpectedIndex {
    fn add(&mut self, entry: &Entry) {
        let mut bytes = [0; 3 * MAX_UVARINT];
        let len = entry.encode(&mut bytes);
        self.digest.update(&bytes[..len]);
        self.len += len as u64;
    }

    /// Reads the index and compares it with the pages, and adds it to the file's digest.
    fn check<R: Read>(mut self, source: &mut Source<R>, digest: &mut FileDigest) -> Result<()> {
        let offset = source.offset();
        self.digest.update(&[0]);
        self.len += 1;
        self.digest.update(&self.len.to_be_bytes());

        let mut found = FileDigest::new();
        let mut left = self.len + 8;
        let mut piece = [0; 512];
        while left > 0 {
            let len = left.min(piece.len() as u64) as usize;
            source.fill(&mut piece[..len], "page index")?;
            found.update(&piece[..len]);
            digest.update(&piece[..len]);
            left -= len as u64;
        }
        if found.value() == self.digest.value() { Ok(()) } else { Err(Error::Index { offset }) }
    }
}

/// Finds out the format from the bytes after a header without [`FLAG_LZ4_FRAME`].
///
/// Every whole file has 20 bytes there. A page 1 of version 1 starts with "SQLite format 3", any other page almost never
/// looks like one of the later versions; if one does, reading fails, it does not go wrong.
fn detect(ahead: &[u8], page_size: u32) -> Format {
    let Some(ahead) = ahead.first_chunk::<20>() else { return Format::V3 };
    if ahead[..4] == [0; 4] {
        // No pages. What follows is the trailer (one of its two checksums has bit 63 set), or the index
        // {0, u64 1}, from offset 4 or 6 on.
        return match (ahead[4], ahead[12]) {
            (0x80.., _) | (_, 0x80..) => Format::V1,
            (_, 1) => Format::V2,
            _ => Format::V3,
        };
    }
    let size = u32::from_be_bytes([ahead[6], ahead[7], ahead[8], ahead[9]]);
    let sized_block =
        ahead[4..6] == PAGE_FLAG_SIZE.to_be_bytes() && (1..=max_block(page_size)).contains(&size);
    let frame = ahead[4..6] == [0, 0] && ahead[6..10] == LZ4_FRAME_MAGIC;
    if ahead[4..8] == LZ4_FRAME_MAGIC {
        Format::V2
    } else if sized_block || frame {
        Format::V3
    } else {
        Format::V1
    }
}

/// The most bytes that an LZ4 block of one page can have, by the rule of any of the LZ4 libraries.
fn max_block(page_size: u32) -> u32 {
    get_maximum_output_size(page_size as usize) as u32
}

fn unpack_block(block: &[u8], page: &mut [u8]) -> Result<(), String> {
    match lz4_flex::block::decompress_into(block, page) {
        Ok(len) if len == page.len() => Ok(()),
        Ok(len) => Err(format!("it holds {len} bytes instead of a page of {}", page.len())),
        Err(err) => Err(err.to_string()),
    }
}

/// Reads a page that is an LZ4 frame of its own.
fn read_page_frame<R: Read>(source: &mut Source<R>, pgno: u32, page: &mut [u8]) -> Result<()> {
    let offset = source.offset();
    check_frame_start(source, || format!("page {pgno}"))?;
    let part = format!("page {pgno}");
    let mut frame = FrameDecoder::new(source);
    frame.read_exact(page).map_err(|err| frame_error(err, offset, "page", &part))?;
    read_frame_end(&mut frame, offset, &part)
}

/// Checks that an LZ4 frame follows, of the kind that the Go libraries write: version 1, independent blocks, no
/// dictionary. That also bounds what unpacking may allocate.
fn check_frame_start<R: Read>(source: &mut Source<R>, part: impl FnOnce() -> String) -> Result<()> {
    let offset = source.offset();
    let ahead = source.peek()?;
    let Some((&magic, rest)) = ahead.split_first_chunk::<4>() else {
        return Err(Error::Truncated { offset, what: "LZ4 frame" });
    };
    let problem = match rest.first() {
        _ if magic != LZ4_FRAME_MAGIC => {
            format!("it starts with {magic:02x?} instead of an LZ4 frame's magic")
        }
        Some(flags) if flags & 0b1110_0001 != 0b0110_0000 => {
            format!("LZ4 frame flags {flags:#04x} are not supported")
        }
        Some(_) => return Ok(()),
        None => return Err(Error::Truncated { offset, what: "LZ4 frame" }),
    };
    Err(Error::Compressed { part: part(), offset, problem })
}

/// Reads on to the end of an LZ4 frame, which must hold nothing more.
fn read_frame_end<R: Read>(frame: &mut FrameDecoder<R>, offset: u64, part: &str) -> Result<()> {
    match frame.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Error::Compressed {
            part: part.to_owned(),
            offset,
            problem: "the LZ4 frame goes on after its last byte".to_owned(),
        }),
        Err(err) => Err(frame_error(err, offset, "LZ4 frame", part)),
    }
}

/// An error of reading through an LZ4 frame: of the file, or of the frame itself.
fn frame_error(err: std::io::Error, offset: u64, what: &'static str, part: &str) -> Error {
    if err.get_ref().is_some_and(|inner| inner.is::<lz4_flex::frame::Error>()) {
        Error::Compressed { part: part.to_owned(), offset, problem: err.to_string() }
    } else {
        read_error(err, offset, what)
    }
}
