//! Reading committed pages without stopping writers, each checked against its checksum.
//!
//! A page's committed content is in the WAL, in the database file, or (while a rollback-mode transaction has already
//! written over it) in the journal; which of them is right is told by the checksum.

use super::receive::PayloadReader;
use super::{Database, State};
use crate::capture::CaptureError;
use crate::ship::engine::{EngineError, PageRange};
use bytes::Bytes;
use ltx::{Checksum, Decoder, lock_page, page_checksum};
use sqlite_file::journal::Journal;
use sqlite_file::wal::FRAME_HEADER_BYTES;
use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// A page that is being applied matches a moment later; longer than this it is damaged.
const SETTLE: Duration = Duration::from_secs(5);
/// How long a running rollback-mode transaction is waited for that wrote over pages from the free list, which are not
/// in its journal. SQLite's own readers wait for it as well.
const TRANSACTION_PATIENCE: Duration = Duration::from_secs(30);
const SETTLE_STEP: Duration = Duration::from_millis(2);

impl Database {
    /// Committed pages in `range`, as of the durable position at the call or later.
    pub fn committed_pages(&self, range: RangeInclusive<u32>) -> Result<PageRange, EngineError> {
        let began = Instant::now();
        loop {
            let position = self.durable_position();
            let mut st = self.state();
            if let Some(reason) = st.quarantine_reason() {
                let reason = reason.to_owned();
                return Err(EngineError::Quarantined { name: self.name.clone(), reason });
            }
            let mut pages = Vec::new();
            let lock_page = if st.page_size == 0 { 0 } else { lock_page(st.page_size) };
            let last = (*range.end()).min(st.page_count);
            let mut missing = None;
            let wal = File::open(&self.paths.wal).ok();
            for pgno in *range.start()..=last {
                if pgno == lock_page {
                    continue;
                }
                match self
                    .committed_page(&mut st, wal.as_ref(), pgno)
                    .map_err(|e| EngineError::Other(e.to_string()))?
                {
                    Some(page) => pages.push((pgno, Bytes::from(page))),
                    None => {
                        missing = Some(pgno);
                        break;
                    }
                }
            }
            match missing {
                None => {
                    let shape = (st.page_size, st.page_count, st.logged_end);
                    drop(st);
                    // Nothing may leave before it is durable here.
                    self.shared.log.wait_durable(shape.2).map_err(|e| EngineError::Other(e.to_string()))?;
                    return Ok(PageRange { position, page_size: shape.0, commit: shape.1, pages });
                }
                Some(_) if st.rollback.journal_active && began.elapsed() < TRANSACTION_PATIENCE => {
                    drop(st);
                    std::thread::sleep(10 * SETTLE_STEP);
                }
                Some(_) if st.rollback.journal_active => return Err(EngineError::Busy(self.name.clone())),
                Some(pgno) if began.elapsed() > SETTLE => {
                    return Err(EngineError::Other(format!(
                        "page {pgno} of {} does not have the checksum of transaction {}: the file was changed \
                         behind the agent's back or the disk is failing; restore it from a copy",
                        self.name, st.position.txid
                    )));
                }
                Some(_) => {
                    drop(st);
                    std::thread::sleep(SETTLE_STEP);
                }
            }
        }
    }

    /// One committed page; `None` when nothing on the disk has its checksum at this moment.
    pub(crate) fn committed_page(
        &self,
        st: &mut State,
        wal: Option<&File>,
        pgno: u32,
    ) -> Result<Option<Vec<u8>>, CaptureError> {
        let Some(expected) = st.open_checksums(self)?.get(pgno) else { return Ok(None) };
        let mut page = vec![0; st.page_size as usize];
        if let Some(wal) = wal {
            st.wal.refresh(wal).map_err(|e| self.wal_error(e))?;
            if let Some(offset) = st.wal.frame_of(pgno) {
                match wal.read_exact_at(&mut page, offset + FRAME_HEADER_BYTES as u64) {
                    Ok(()) if page_checksum(pgno, &page) == expected => return Ok(Some(page)),
                    // Cut by an application: the database file has it.
                    Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => return Err(self.wal_error(e)),
                    _ => {}
                }
            }
        }
        let file = st.database_file(self)?;
        self.read_database_page(&file, pgno, &mut page)?;
        if page_checksum(pgno, &page) == expected {
            return Ok(Some(page));
        }
        if st.rollback.journal_active
            && let Ok(file) = File::open(&self.paths.journal)
            && let Ok(Some(journal)) = Journal::open(&file, Some(st.page_size))
        {
            for record in journal.records().flatten() {
                if record.pgno == pgno && page_checksum(pgno, &record.page) == expected {
                    return Ok(Some(record.page));
                }
            }
        }
        if self.is_unconfirmed() {
            return self.page_of_unapplied(st, pgno, expected);
        }
        Ok(None)
    }

    /// A page of a commit that is in the log alone, because it may not count.
    fn page_of_unapplied(
        &self,
        st: &State,
        pgno: u32,
        expected: Checksum,
    ) -> Result<Option<Vec<u8>>, CaptureError> {
        let last = self.shared.log.last(&self.name);
        let records = self.records_after(st.applied, &last);
        for record in records.map_err(|e| self.database_error(std::io::Error::other(e)))? {
            let mut decoder = Decoder::new(PayloadReader::of(&self.shared.log, &record))?;
            let mut page = Vec::new();
            while let Some(found) = decoder.next_page(&mut page)? {
                if found == pgno && page_checksum(pgno, &page) == expected {
                    return Ok(Some(page));
                }
            }
        }
        Ok(None)
    }

    /// Before the WAL goes: each page it has must be in the database file.
    pub(crate) fn check_wal_is_checkpointed(&self, st: &mut State) -> Result<(), CaptureError> {
        let pages: Vec<u32> = st.wal.committed_pages().filter(|pgno| *pgno <= st.page_count).collect();
        if pages.is_empty() {
            return Ok(());
        }
        let file = st.database_file(self)?;
        let mut page = vec![0; st.page_size as usize];
        for pgno in pages {
            let expected = st.open_checksums(self)?.get(pgno);
            self.read_database_page(&file, pgno, &mut page)?;
            if expected.is_some_and(|sum| sum != page_checksum(pgno, &page)) {
                return Err(CaptureError::WalIsNeeded);
            }
        }
        Ok(())
    }

    /// Brings what the WAL has into the database file, for somebody who removes the WAL by hand. Nobody has the database
    /// open; what the kernel has of the file is to be forgotten afterwards.
    pub(crate) fn fold_wal(&self, st: &mut State) -> Result<(), CaptureError> {
        let wal = File::open(&self.paths.wal).map_err(|e| self.wal_error(e))?;
        let file = st.database_file(self)?;
        let mut page = vec![0; st.page_size as usize];
        let pages: Vec<u32> = st.wal.committed_pages().filter(|pgno| *pgno <= st.page_count).collect();
        for pgno in pages {
            let Some(offset) = st.wal.frame_of(pgno) else { continue };
            wal.read_exact_at(&mut page, offset + FRAME_HEADER_BYTES as u64)
                .map_err(|e| self.wal_error(e))?;
            let at = u64::from(pgno - 1) * u64::from(st.page_size);
            file.write_all_at(&page, at).map_err(|e| self.database_error(e))?;
        }
        file.set_len(u64::from(st.page_count) * u64::from(st.page_size))
            .and_then(|()| file.sync_data())
            .map_err(|e| self.database_error(e))
    }

    /// Compares the whole file with the checksums. Gives the pages that differ, at most `limit` of them.
    pub fn differing_pages(&self, st: &mut State, limit: usize) -> Result<Vec<u32>, CaptureError> {
        let mut differing = Vec::new();
        if st.page_count == 0 {
            return Ok(differing);
        }
        let file = st.database_file(self)?;
        let lock_page = lock_page(st.page_size);
        let mut page = vec![0; st.page_size as usize];
        st.open_checksums(self)?;
        for pgno in (1..=st.page_count).filter(|p| *p != lock_page) {
            self.read_database_page(&file, pgno, &mut page)?;
            if st.checksums().get(pgno) != Some(page_checksum(pgno, &page)) {
                differing.push(pgno);
                if differing.len() >= limit {
                    break;
                }
            }
        }
        Ok(differing)
    }
}
