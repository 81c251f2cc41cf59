//! The journal that the agent keeps while it changes a database file in place.
//!
//! It is an ordinary rollback journal, so an agent that is killed half-way leaves what a killed SQLite writer
//! leaves: the next to read the database, be it an application or the agent, plays the old pages back first. It is
//! never synced: after a power failure the agent replays its log over the file.

use super::ApplyError;
use super::files::{self, Files};
use crate::database::write_protection;
use sqlite_file::journal::{self, JOURNAL_HEADER_BYTES, JournalHeader, RECORDS_BY_SIZE, record_checksum};
use sqlite_file::{header::lock_page, wal::random_bytes};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

/// Bytes that the header takes: SQLite reads the sector size from it, so any will do.
const SECTOR_BYTES: u32 = 512;
/// Records are written in batches of about this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// A journal that is being written.
#[derive(Debug)]
pub(super) struct RollbackJournal {
    file: File,
    nonce: u32,
    page_size: u32,
    pages: u32,
    /// One bit for each original page: whether it is in the journal.
    saved: Vec<u64>,
    end: u64,
    batch: Vec<u8>,
}

impl RollbackJournal {
    /// Begins a journal for a database of `pages` pages. The caller holds EXCLUSIVE and has made sure that there
    /// is no journal ([`recover`]).
    pub fn begin(files: &Files, database: &File, page_size: u32, pages: u32) -> Result<Self, ApplyError> {
        let like = database.metadata().map_err(files.io("inspect", &files.database))?;
        let mode = write_protection::mode(database, like.mode()) & 0o777;
        let file = files::create(&files.journal, mode, Some((like.uid(), like.gid())))
            .map_err(files.io("create", &files.journal))?;
        let mut nonce = [0u8; 4];
        random_bytes(&mut nonce).map_err(files.io("make a nonce for", &files.journal))?;
        let nonce = u32::from_ne_bytes(nonce);
        let header = JournalHeader {
            records: RECORDS_BY_SIZE,
            nonce,
            initial_pages: pages,
            sector_size: SECTOR_BYTES,
            page_size,
        };
        let mut sector = vec![0u8; SECTOR_BYTES as usize];
        sector[..journal::JOURNAL_HEADER_BYTES].copy_from_slice(&header.encode());
        let saved = vec![0; pages.div_ceil(64) as usize];
        let end = u64::from(SECTOR_BYTES);
        file.write_all_at(&sector, 0).map_err(files.io("write", &files.journal))?;
        Ok(RollbackJournal { file, nonce, page_size, pages, saved, end, batch: Vec::new() })
    }

    /// Size of a page of the original database.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Puts the original content of pages into the journal, unless it is there already or they are new. They may
    /// be overwritten afterwards.
    pub fn save(
        &mut self,
        files: &Files,
        database: &File,
        pages: impl Iterator<Item = u32>,
    ) -> Result<(), ApplyError> {
        for pgno in pages {
            if pgno > self.pages || pgno == lock_page(self.page_size) {
                continue;
            }
            let (word, bit) = (((pgno - 1) / 64) as usize, 1u64 << ((pgno - 1) % 64));
            if self.saved[word] & bit != 0 {
                continue;
            }
            self.saved[word] |= bit;
            self.batch.extend_from_slice(&pgno.to_be_bytes());
            let at = self.batch.len();
            self.batch.resize(at + self.page_size as usize, 0);
            database
                .read_exact_at(&mut self.batch[at..], u64::from(pgno - 1) * u64::from(self.page_size))
                .map_err(files.io("read", &files.database))?;
            let checksum = record_checksum(self.nonce, &self.batch[at..]);
            self.batch.extend_from_slice(&checksum.to_be_bytes());
            if self.batch.len() >= BATCH_BYTES {
                self.write_batch(files)?;
            }
        }
        self.write_batch(files)
    }

    fn write_batch(&mut self, files: &Files) -> Result<(), ApplyError> {
        self.file.write_all_at(&self.batch, self.end).map_err(files.io("write", &files.journal))?;
        self.end += self.batch.len() as u64;
        self.batch.clear();
        Ok(())
    }

    /// Puts all original pages into the journal.
    pub fn save_all(&mut self, files: &Files, database: &File) -> Result<(), ApplyError> {
        self.save(files, database, 1..=self.pages)
    }

    /// The transaction counts from here on.
    pub fn commit(self, files: &Files) -> Result<(), ApplyError> {
        files.remove(&files.journal)
    }

    /// Takes the transaction back.
    pub fn roll_back(self, files: &Files, database: &File) -> Result<(), ApplyError> {
        journal::rollback(&self.file, database).map_err(|source| files.journal_error(source))?;
        files.remove(&files.journal)
    }
}

/// Whether a writer left a journal that must be played back before the database is used. The caller holds at least
/// SHARED; a writer at work is somebody else's business only if it holds RESERVED, so the answer counts under
/// EXCLUSIVE.
pub(super) fn is_hot(files: &Files) -> Result<bool, ApplyError> {
    hot_header(files).map(|header| header.is_some()).map_err(files.io("read", &files.journal))
}

/// The header of the journal, which differs from transaction to transaction (by its nonce), if it is hot.
pub(super) fn hot_header(files: &Files) -> io::Result<Option<[u8; JOURNAL_HEADER_BYTES]>> {
    let file = match File::open(&files.journal) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut header = [0; JOURNAL_HEADER_BYTES];
    // One that is being written may be shorter.
    file.read_at(&mut header, 0)?;
    Ok((header[0] != 0).then_some(header))
}

/// Does with a left-over journal what SQLite does before it reads: plays it back if it is hot, and removes it. The
/// caller holds EXCLUSIVE.
pub(super) fn recover(files: &Files, database: &File) -> Result<(), ApplyError> {
    if play_back(files, database)? { files.remove(&files.journal) } else { Ok(()) }
}

/// Plays a left-over journal back if it is hot, and empties it.
pub(super) fn play_back_and_empty(files: &Files, database: &File) -> Result<(), ApplyError> {
    if play_back(files, database)? {
        let journal = File::options().write(true).open(&files.journal);
        journal.and_then(|file| file.set_len(0)).map_err(files.io("empty", &files.journal))?;
    }
    Ok(())
}

/// Plays a left-over journal back if it is hot. The caller holds EXCLUSIVE. `false`: there is none.
pub(super) fn play_back(files: &Files, database: &File) -> Result<bool, ApplyError> {
    let file = match File::open(&files.journal) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(files.io("open", &files.journal)(e)),
    };
    let empty = database.metadata().map_err(files.io("inspect", &files.database))?.len() == 0;
    if !empty && journal::is_hot(&file).map_err(files.io("read", &files.journal))? {
        let super_journal = journal::super_journal(&file).map_err(|source| files.journal_error(source))?;
        // A super-journal that is gone means that the transaction was committed in all its databases.
        if super_journal.is_none_or(|path| path.exists()) {
            journal::rollback(&file, database).map_err(|source| files.journal_error(source))?;
        }
    }
    Ok(true)
}
