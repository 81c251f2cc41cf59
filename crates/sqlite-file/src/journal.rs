//! The rollback journal (fileformat2.html section 3): the pages of a database as they were before a transaction.

use crate::header::{DatabaseHeader, HEADER_BYTES, PAGE_SIZE_MAX, is_page_size, lock_page};
use crate::{be32, read_up_to};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// First 8 bytes of every segment, and last 8 bytes of a journal that names a super-journal.
pub const JOURNAL_MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
/// Bytes of a segment header that mean something; the rest of the sector is padding.
pub const JOURNAL_HEADER_BYTES: usize = 28;
/// Record count of a journal that is never synced: the records go on to the end of the file.
pub const RECORDS_BY_SIZE: u32 = u32::MAX;

/// Largest sector size SQLite accepts.
const SECTOR_SIZE_MAX: u32 = 65536;
/// Longest super-journal name that is read (SQLite's limit for path names is 512 by default).
const SUPER_JOURNAL_BYTES_MAX: u32 = 4096;

/// Header of a segment. SQLite reads page and sector size from the first one only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalHeader {
    /// Number of records, [`RECORDS_BY_SIZE`] if given by the file's size, 0 if the segment was not synced.
    pub records: u32,
    /// Random number that starts each record's checksum.
    pub nonce: u32,
    /// Size of the database in pages before the transaction.
    pub initial_pages: u32,
    /// A header takes this many bytes and begins at a multiple of it.
    pub sector_size: u32,
    /// Bytes in a page; 0 in journals of SQLite before 3.5.8.
    pub page_size: u32,
}

impl JournalHeader {
    /// The 28 bytes.
    pub fn encode(&self) -> [u8; JOURNAL_HEADER_BYTES] {
        let mut bytes = [0u8; JOURNAL_HEADER_BYTES];
        bytes[..8].copy_from_slice(&JOURNAL_MAGIC);
        let fields = [self.records, self.nonce, self.initial_pages, self.sector_size, self.page_size];
        for (at, field) in bytes[8..].chunks_exact_mut(4).zip(fields) {
            at.copy_from_slice(&field.to_be_bytes());
        }
        bytes
    }

    /// Reads a header; `None` if it does not begin with the magic.
    pub fn decode(bytes: &[u8; JOURNAL_HEADER_BYTES]) -> Option<Self> {
        (bytes[..8] == JOURNAL_MAGIC).then(|| JournalHeader {
            records: be32(bytes, 8),
            nonce: be32(bytes, 12),
            initial_pages: be32(bytes, 16),
            sector_size: be32(bytes, 20),
            page_size: be32(bytes, 24),
        })
    }
}

/// Checksum of a record: the nonce plus every 200th byte of the page, counted from its end.
pub fn record_checksum(nonce: u32, page: &[u8]) -> u32 {
    let mut sum = nonce;
    let mut at = page.len().saturating_sub(200);
    while at > 0 {
        sum = sum.wrapping_add(u32::from(page[at]));
        at = at.saturating_sub(200);
    }
    sum
}

/// Whether SQLite would take the journal as hot, given that nobody holds RESERVED on the database and the database
/// is not empty: its first byte exists and is not zero. Playback then finds out whether anything valid is in it.
pub fn is_hot(journal: &File) -> io::Result<bool> {
    let mut first = [0u8];
    Ok(read_up_to(journal, &mut first, 0)? == 1 && first[0] != 0)
}

/// Why a journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Reading or writing failed.
    #[error("journal: {0}")]
    Io(#[from] io::Error),
    /// A journal without page size (SQLite before 3.5.8) beside a database that has none either.
    #[error("the journal does not give a page size and the database header has none")]
    PageSizeUnknown,
}

/// One original page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalRecord {
    /// Its number.
    pub pgno: u32,
    /// Its content before the transaction.
    pub page: Vec<u8>,
    /// Whether the checksum is right. Playback stops at the first record where it is not.
    pub checksum_ok: bool,
}

/// A journal with a valid first header.
#[derive(Debug)]
pub struct Journal<'f> {
    file: &'f File,
    size: u64,
    header: JournalHeader,
}

impl<'f> Journal<'f> {
    /// Reads the first header. `None`: it is missing, zeroed or torn, so there is nothing to play back.
    ///
    /// `database_page_size` is used for journals that do not give one.
    pub fn open(file: &'f File, database_page_size: Option<u32>) -> Result<Option<Self>, JournalError> {
        let size = file.metadata()?.len();
        let mut bytes = [0u8; JOURNAL_HEADER_BYTES];
        if read_up_to(file, &mut bytes, 0)? < bytes.len() {
            return Ok(None);
        }
        let Some(mut header) = JournalHeader::decode(&bytes) else { return Ok(None) };
        if header.page_size == 0 {
            header.page_size = database_page_size.ok_or(JournalError::PageSizeUnknown)?;
        }
        let sector_ok =
            header.sector_size.is_power_of_two() && (32..=SECTOR_SIZE_MAX).contains(&header.sector_size);
        if !is_page_size(header.page_size) || !sector_ok || size < u64::from(header.sector_size) {
            return Ok(None);
        }
        Ok(Some(Journal { file, size, header }))
    }

    /// The first header.
    pub fn header(&self) -> &JournalHeader {
        &self.header
    }

    /// The records of all segments in file order, also those whose checksum is wrong; the iteration ends where
    /// SQLite's playback would for any other reason.
    pub fn records(&self) -> Records<'_> {
        Records { journal: self, offset: 0, nonce: 0, left: 0, done: false }
    }

    /// Numbers of the pages that playback would restore, in file order; a page may come twice.
    pub fn page_numbers(&self) -> Result<Vec<u32>, JournalError> {
        let mut numbers = Vec::new();
        for record in self.records() {
            let record = record?;
            if record.pgno > self.header.initial_pages {
                continue;
            }
            if !record.checksum_ok {
                break;
            }
            numbers.push(record.pgno);
        }
        Ok(numbers)
    }

    /// The super-journal that the end of the journal names. Where that file does not exist, the transaction was
    /// committed and the journal is not hot.
    pub fn super_journal(&self) -> Result<Option<PathBuf>, JournalError> {
        super_journal(self.file)
    }
}

/// The super-journal that the end of a journal names, if a valid name is there.
pub fn super_journal(file: &File) -> Result<Option<PathBuf>, JournalError> {
    let size = file.metadata()?.len();
    let mut tail = [0u8; 16];
    if size < 16 || read_up_to(file, &mut tail, size - 16)? < 16 || tail[8..] != JOURNAL_MAGIC {
        return Ok(None);
    }
    let (length, checksum) = (be32(&tail, 0), be32(&tail, 4));
    if length == 0 || length >= SUPER_JOURNAL_BYTES_MAX || u64::from(length) > size - 16 {
        return Ok(None);
    }
    let mut name = vec![0u8; length as usize];
    if read_up_to(file, &mut name, size - 16 - u64::from(length))? < name.len() {
        return Ok(None);
    }
    // SQLite adds the bytes as plain `char`, whose sign is the platform's; accept both for names beyond ASCII.
    let signed = name.iter().fold(0u32, |sum, b| sum.wrapping_add(*b as i8 as u32));
    let unsigned = name.iter().fold(0u32, |sum, b| sum.wrapping_add(u32::from(*b)));
    let valid = (checksum == signed || checksum == unsigned) && !name.contains(&0);
    Ok(valid.then(|| PathBuf::from(OsString::from_vec(name))))
}

/// Iterator over the records of a [`Journal`].
pub struct Records<'j> {
    journal: &'j Journal<'j>,
    offset: u64,
    nonce: u32,
    left: u64,
    done: bool,
}

impl Records<'_> {
    fn record_bytes(&self) -> u64 {
        u64::from(self.journal.header.page_size) + 8
    }

    /// Moves to the segment that begins at the next sector. `false`: there is none.
    fn next_segment(&mut self) -> io::Result<bool> {
        let sector = u64::from(self.journal.header.sector_size);
        self.offset = self.offset.div_ceil(sector) * sector;
        if self.offset + sector > self.journal.size {
            return Ok(false);
        }
        let mut bytes = [0u8; JOURNAL_HEADER_BYTES];
        if read_up_to(self.journal.file, &mut bytes, self.offset)? < bytes.len() {
            return Ok(false);
        }
        let Some(header) = JournalHeader::decode(&bytes) else { return Ok(false) };
        self.offset += sector;
        self.nonce = header.nonce;
        self.left = if header.records == RECORDS_BY_SIZE {
            (self.journal.size - self.offset) / self.record_bytes()
        } else {
            u64::from(header.records)
        };
        Ok(true)
    }

    fn next_record(&mut self) -> io::Result<Option<JournalRecord>> {
        while self.left == 0 {
            if !self.next_segment()? {
                return Ok(None);
            }
        }
        // At most 64 KiB and 8 bytes, whatever the file says.
        debug_assert!(self.journal.header.page_size <= PAGE_SIZE_MAX);
        let mut bytes = vec![0u8; self.record_bytes() as usize];
        if read_up_to(self.journal.file, &mut bytes, self.offset)? < bytes.len() {
            return Ok(None);
        }
        let pgno = be32(&bytes, 0);
        if pgno == 0 || pgno == lock_page(self.journal.header.page_size) {
            return Ok(None);
        }
        let checksum = be32(&bytes, bytes.len() - 4);
        self.left -= 1;
        self.offset += bytes.len() as u64;
        bytes.drain(..4);
        bytes.truncate(self.journal.header.page_size as usize);
        let checksum_ok = record_checksum(self.nonce, &bytes) == checksum;
        Ok(Some(JournalRecord { pgno, page: bytes, checksum_ok }))
    }
}

impl Iterator for Records<'_> {
    type Item = Result<JournalRecord, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.next_record();
        self.done = !matches!(next, Ok(Some(_)));
        next.map_err(JournalError::from).transpose()
    }
}

/// What [`rollback`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollback {
    /// Number of pages written back.
    pub pages: u64,
    /// Size of the database in pages, as it was before the transaction.
    pub initial_pages: u32,
    /// Bytes in a page.
    pub page_size: u32,
}

/// Plays the original pages back into the database, as SQLite does with a hot journal, and syncs the database.
/// `None`: the journal has no valid header, nothing was done.
///
/// The caller holds EXCLUSIVE on the database, has looked at [`super_journal`], and deletes the journal afterwards.
pub fn rollback(journal: &File, database: &File) -> Result<Option<Rollback>, JournalError> {
    // Whoever left the journal may not have synced it, and the database is about to depend on it.
    journal.sync_data()?;
    let mut first = [0u8; HEADER_BYTES];
    read_up_to(database, &mut first, 0)?;
    let page_size = DatabaseHeader::parse(&first).ok().map(|h| h.page_size);
    let Some(journal) = Journal::open(journal, page_size)? else { return Ok(None) };
    let JournalHeader { initial_pages, page_size, .. } = *journal.header();
    let page_bytes = u64::from(page_size);

    let (now, before) = (database.metadata()?.len(), u64::from(initial_pages) * page_bytes);
    // A file that is short by less than a page is left alone, as SQLite does.
    if now > before || now + page_bytes <= before {
        database.set_len(before)?;
    }
    let mut pages = 0;
    for record in journal.records() {
        let record = record?;
        if record.pgno > initial_pages {
            continue;
        }
        if !record.checksum_ok {
            break;
        }
        database.write_all_at(&record.page, u64::from(record.pgno - 1) * page_bytes)?;
        pages += 1;
    }
    database.sync_all()?;
    Ok(Some(Rollback { pages, initial_pages, page_size }))
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
