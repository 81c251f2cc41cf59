//! What can be wrong with an LTX file or with a request to write one.

use crate::position::{Checksum, Txid};
use std::io;

/// Why an LTX file could not be read or written. Offsets are bytes from the start of the file. The crate does not
/// know paths: callers name the file or the peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The reader or writer underneath failed.
    #[error("input or output failed at offset {offset} of the LTX file")]
    Io {
        /// Where in the file.
        offset: u64,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The file ends too early.
    #[error("LTX file is truncated: it ends at or after offset {offset}, inside its {what}")]
    Truncated {
        /// Start of the read that found the end.
        offset: u64,
        /// The part that is not whole.
        what: &'static str,
    },
    /// The first four bytes are not `LTX1`.
    #[error("not an LTX file: it starts with {found:02x?} instead of \"LTX1\"")]
    Magic {
        /// The bytes in their place.
        found: [u8; 4],
    },
    /// A header field has a value that no writer gives it.
    #[error("LTX header is invalid: {problem}")]
    Header {
        /// Field, value and rule.
        problem: String,
    },
    /// Page header flags that are not known.
    #[error("page {pgno} at offset {offset} has unknown flags {flags:#06x}")]
    PageFlags {
        /// Page number.
        pgno: u32,
        /// Offset of its page header.
        offset: u64,
        /// The flags.
        flags: u16,
    },
    /// Page numbers must grow.
    #[error("page {pgno} at offset {offset} does not come after page {previous}: pages must ascend")]
    PageOrder {
        /// Page number.
        pgno: u32,
        /// The page before it, 0 for none.
        previous: u32,
        /// Offset of its page header.
        offset: u64,
    },
    /// A page that is not part of the database any more.
    #[error("page {pgno} at offset {offset} is past the end of the database, which has {commit} pages")]
    PageBeyondCommit {
        /// Page number.
        pgno: u32,
        /// Size of the database in pages.
        commit: u32,
        /// Offset of its page header.
        offset: u64,
    },
    /// The page with SQLite's lock bytes is never stored.
    #[error("page {pgno} at offset {offset} is SQLite's lock page, which is never stored")]
    LockPage {
        /// Page number.
        pgno: u32,
        /// Offset of its page header.
        offset: u64,
    },
    /// A snapshot must hold every page.
    #[error("snapshot lacks page {missing} of {commit} (noticed at offset {offset})")]
    SnapshotGap {
        /// The first page that is not there.
        missing: u32,
        /// Size of the database in pages.
        commit: u32,
        /// Offset of what came instead.
        offset: u64,
    },
    /// A compressed page that is larger than any page can get.
    #[error("page {pgno} at offset {offset} claims {size} compressed bytes, at most {max} are possible")]
    BlockSize {
        /// Page number.
        pgno: u32,
        /// Offset of its page header.
        offset: u64,
        /// The claimed size.
        size: u32,
        /// The largest valid size.
        max: u32,
    },
    /// Compressed data that does not unpack to what was expected.
    #[error("compressed data of {part} at offset {offset} cannot be unpacked: {problem}")]
    Compressed {
        /// Which page, or the whole page block.
        part: String,
        /// Where the compressed data starts.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The page index says something else than the pages.
    #[error("page index at offset {offset} does not match the pages before it")]
    Index {
        /// Start of the index.
        offset: u64,
    },
    /// The file checksum is wrong: some bit of the file has changed.
    #[error("file checksum is {computed:016x} but the trailer says {stored:016x}: the LTX file is corrupt")]
    FileChecksum {
        /// Computed from what was read.
        computed: u64,
        /// Found in the trailer.
        stored: u64,
    },
    /// The rolling checksum is not one that can follow.
    #[error("rolling checksum after the transaction is {found}: {problem}")]
    PostApply {
        /// The checksum in question.
        found: Checksum,
        /// The rule it breaks.
        problem: &'static str,
    },
    /// A snapshot's pages do not add up to its rolling checksum.
    #[error("pages of the snapshot have the rolling checksum {computed}, but {stated} is stated")]
    SnapshotChecksum {
        /// Computed from the pages.
        computed: Checksum,
        /// Stated by the trailer, or given to the encoder.
        stated: Checksum,
    },
    /// The encoder was given a page that is not of the header's page size.
    #[error("page {pgno} has {len} bytes, but the page size of the LTX file is {page_size}")]
    PageLength {
        /// Page number.
        pgno: u32,
        /// Bytes given.
        len: usize,
        /// Bytes a page has.
        page_size: u32,
    },
    /// The encoder failed before, so its output is not whole.
    #[error("LTX encoder failed before at offset {offset}: discard its output and encode again")]
    EncoderFailed {
        /// Bytes known to be written.
        offset: u64,
    },
    /// The decoder failed before, so it does not know where it is.
    #[error("reading the LTX file failed before at or before offset {offset}: read it again from its start")]
    DecoderFailed {
        /// Bytes read.
        offset: u64,
    },
    /// Text that is not a transaction id, checksum or position.
    #[error(
        "{text:?} is not a {what}: expected 16 lower-case hex digits (position: two of them with / between)"
    )]
    Text {
        /// What it should have been.
        what: &'static str,
        /// The text, cut to 64 characters.
        text: String,
    },
    /// Compaction needs at least one file.
    #[error("no LTX files given to compact")]
    NothingToCompact,
    /// Files to compact must follow each other without a gap.
    #[error("LTX file {index} to compact starts with transaction {found}, expected {expected}")]
    CompactGap {
        /// Place in the list, from 0.
        index: usize,
        /// The transaction after the previous file.
        expected: Txid,
        /// First transaction of this file.
        found: Txid,
    },
    /// Files to compact must be of one page size.
    #[error("LTX file {index} to compact has page size {found}, the ones before it have {expected}")]
    CompactPageSize {
        /// Place in the list, from 0.
        index: usize,
        /// Page size of the first file, in bytes.
        expected: u32,
        /// Page size of this file, in bytes.
        found: u32,
    },
    /// Files to compact must start from the state in which the one before left the database.
    #[error(
        "LTX file {index} to compact starts from checksum {found}, but the one before it ends with {expected}"
    )]
    CompactChain {
        /// Place in the list, from 0.
        index: usize,
        /// Checksum after the file before.
        expected: Checksum,
        /// Checksum this file applies to.
        found: Checksum,
    },
    /// Files without rolling checksums cannot be shown to follow each other.
    #[error("LTX file {index} to compact carries no rolling checksums, so it cannot be compacted")]
    CompactNoChecksums {
        /// Place in the list, from 0.
        index: usize,
    },
    /// The files make the database grow, but none holds this page of the growth.
    #[error(
        "LTX files to compact make the database grow by page {pgno} without holding it: take a snapshot instead"
    )]
    CompactMissingPage {
        /// Page number.
        pgno: u32,
    },
    /// A file to compact cannot be read.
    #[error("LTX file {index} to compact cannot be read")]
    CompactInput {
        /// Place in the list, from 0.
        index: usize,
        /// Why.
        #[source]
        source: Box<Error>,
    },
}

impl Error {
    /// Where in the file the problem is, in bytes from its start; `None` if it is in no single place.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Error::Magic { .. } | Error::Header { .. } => Some(0),
            Error::Io { offset, .. }
            | Error::Truncated { offset, .. }
            | Error::PageFlags { offset, .. }
            | Error::PageOrder { offset, .. }
            | Error::PageBeyondCommit { offset, .. }
            | Error::LockPage { offset, .. }
            | Error::SnapshotGap { offset, .. }
            | Error::BlockSize { offset, .. }
            | Error::Compressed { offset, .. }
            | Error::Index { offset }
            | Error::EncoderFailed { offset }
            | Error::DecoderFailed { offset } => Some(*offset),
            Error::FileChecksum { .. }
            | Error::PostApply { .. }
            | Error::SnapshotChecksum { .. }
            | Error::PageLength { .. }
            | Error::Text { .. }
            | Error::NothingToCompact
            | Error::CompactGap { .. }
            | Error::CompactPageSize { .. }
            | Error::CompactChain { .. }
            | Error::CompactNoChecksums { .. }
            | Error::CompactMissingPage { .. }
            | Error::CompactInput { .. } => None,
        }
    }
}
