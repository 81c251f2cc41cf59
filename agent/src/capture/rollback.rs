//! Where a commit is seen in the rollback modes: the journal's end (unlink, truncation to nothing, or 28 zero bytes
//! over its header).
//!
//! Which pages a transaction changed cannot be told from its journal alone: SQLite does not journal a page it takes
//! from the free list (its old content matters to nobody), yet writes it. So the database file of a rollback-mode
//! database is not passed through; the door reports every write, and where it could not (the file was opened while
//! the database was in WAL mode) all pages are compared with their checksums.

use super::{CaptureError, Commit, Logged, log_transaction};
use crate::database::{Database, State};
use sqlite_file::header::DatabaseHeader;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

/// Header, index and trailer of an LTX file, generously.
const LTX_FIXED_BYTES: u64 = 4096;
/// Pages read at once when a whole file is compared.
const SCAN_BYTES: usize = 1024 * 1024;

/// What is known of the running rollback-mode transaction.
#[derive(Debug, Default)]
pub struct RollbackCapture {
    dirty: Dirty,
    /// The journal has a header: a transaction runs, or is hot.
    pub journal_active: bool,
    /// The application synced a file of this transaction, so its commit must be durable when it ends.
    pub synced: bool,
    /// The journal's newest header does not count its records yet: nothing in the database depends on them.
    pub uncounted: bool,
    /// The journal's next sync is to make its entry in the directory durable as well.
    pub directory_owed: bool,
}

/// Pages written since the last capture.
#[derive(Debug, Default)]
enum Dirty {
    #[default]
    Nothing,
    Pages(BTreeSet<u32>),
    /// Compare them all.
    Unknown,
}

impl RollbackCapture {
    /// Whether the file was written since the last capture.
    pub fn is_dirty(&self) -> bool {
        !matches!(self.dirty, Dirty::Nothing)
    }

    /// The file was, or may have been, written somewhere.
    pub fn mark_unknown(&mut self) {
        self.dirty = Dirty::Unknown;
    }

    /// A journal of this transaction has been played back. SQLite does not restore pages that it took from the free list, so
    /// what was written is still to be looked at.
    pub fn played_back(&mut self) {
        *self = RollbackCapture { dirty: std::mem::take(&mut self.dirty), ..RollbackCapture::default() };
    }

    /// Pages written since the last capture, as far as they are known.
    pub fn pages_written(&self) -> usize {
        match &self.dirty {
            Dirty::Pages(pages) => pages.len(),
            Dirty::Nothing | Dirty::Unknown => 0,
        }
    }

    /// `len` bytes were written at `offset`; `page_size` is 0 while the database has none.
    pub fn mark_written(&mut self, offset: u64, len: u64, page_size: u32) {
        if page_size == 0 {
            self.dirty = Dirty::Unknown;
            return;
        }
        let size = u64::from(page_size);
        let (first, last) = (offset / size + 1, (offset + len.max(1) - 1) / size + 1);
        match (&mut self.dirty, u32::try_from(last)) {
            (Dirty::Unknown, _) => {}
            (_, Err(_)) => self.dirty = Dirty::Unknown,
            (Dirty::Pages(pages), Ok(last)) => pages.extend(first as u32..=last),
            (Dirty::Nothing, Ok(last)) => self.dirty = Dirty::Pages((first as u32..=last).collect()),
        }
    }
}

/// Refuses a write of a transaction that the log would have no room for: SQLite then says that the disk is full, and
/// rolls back. At the journal's end it is too late for that: SQLite calls every failure to remove it an I/O error.
/// What a rollback writes is never refused, since the log has it.
pub fn ensure_room(db: &Database, st: &mut State, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
    if st.page_size == 0 {
        return Ok(());
    }
    let page_size = u64::from(st.page_size);
    let pages = st.rollback.pages_written() as u64 + data.len() as u64 / page_size + 1;
    // LZ4 makes what it cannot compress a little longer.
    let bytes = pages * (page_size + page_size / 128 + 64) + LTX_FIXED_BYTES;
    let in_memory = bytes <= super::IN_MEMORY_BYTES_MAX;
    if in_memory && db.shared.log.has_room(bytes) || is_committed(db, st, offset, data)? {
        return Ok(());
    }
    if in_memory { Ok(db.shared.log.ensure_room(bytes)?) } else { staging_has_room(db, bytes) }
}

/// A large transaction becomes a file first.
fn staging_has_room(db: &Database, bytes: u64) -> Result<(), CaptureError> {
    let path = &db.shared.dirs.staging;
    let io = |source| CaptureError::Io { path: path.clone(), source };
    let stat = nix::sys::statvfs::statvfs(path).map_err(|e| io(e.into()))?;
    if stat.blocks_available() as u64 * stat.fragment_size() as u64 >= bytes {
        return Ok(());
    }
    Err(io(std::io::Error::from_raw_os_error(libc::ENOSPC)))
}

/// Whether a write of whole pages brings what the log has.
fn is_committed(db: &Database, st: &mut State, offset: u64, data: &[u8]) -> Result<bool, CaptureError> {
    let size = st.page_size as usize;
    if !offset.is_multiple_of(size as u64) || !data.len().is_multiple_of(size) {
        return Ok(false);
    }
    let first = (offset / size as u64) as u32 + 1;
    let sums = st.open_checksums(db)?;
    Ok((first..)
        .zip(data.chunks_exact(size))
        .all(|(pgno, page)| sums.get(pgno) == Some(ltx::page_checksum(pgno, page))))
}

/// The journal is about to end, or the file is known to be consistent: captures what was written. The caller holds
/// off writers (the application has its EXCLUSIVE lock, or the agent a SHARED one).
/// `may_hold`: see [`Commit`]. `still`: asked after each page of the transaction; an error ends it without a trace.
pub fn capture(
    db: &Database,
    st: &mut State,
    may_hold: bool,
    still: &dyn Fn() -> Result<(), CaptureError>,
) -> Result<Option<Logged>, CaptureError> {
    if st.passthrough_handles > 0 && !st.rollback.is_dirty() && st.stamp_changed(db)? {
        st.rollback.mark_unknown();
    }
    if !st.rollback.is_dirty() {
        return Ok(None);
    }
    let file = st.database_file(db)?;
    let io = |source| db.database_error(source);
    let len = file.metadata().map_err(io)?.len();
    if len == 0 && st.page_count == 0 {
        st.rollback.dirty = Dirty::Nothing;
        return Ok(None);
    }
    let mut first = [0; 100];
    if file.read_exact_at(&mut first, 0).is_err() {
        return Err(CaptureError::NotADatabase("shorter than its header"));
    }
    let header = DatabaseHeader::parse(&first).map_err(|_| CaptureError::NotADatabase("no SQLite header"))?;
    let page_size = header.page_size;
    // The file is cut only after the journal's end, so the header's count is the one that holds.
    let page_count = header.page_count(len);
    let all = page_size != st.page_size || matches!(st.rollback.dirty, Dirty::Unknown);
    let mut pages: BTreeSet<u32> = match &st.rollback.dirty {
        _ if all => changed_pages(db, st, &file, page_size, page_count)?,
        Dirty::Pages(pages) => pages.iter().copied().filter(|p| *p <= page_count).collect(),
        Dirty::Nothing | Dirty::Unknown => BTreeSet::new(),
    };
    // Pages the file grew over without a write are zero pages, and part of the transaction.
    if page_size == st.page_size {
        pages.extend(st.page_count + 1..=page_count);
    } else {
        pages.extend(1..=page_count);
    }
    let pages: Vec<u32> = pages.into_iter().collect();
    let commit = Commit { page_size, page_count, pages: &pages, wal: None, may_hold };
    let mut read = |pgno: u32, buf: &mut [u8]| {
        db.read_database_page(&file, pgno, buf)?;
        still()
    };
    let logged = log_transaction(db, st, &commit, &mut read)?;
    // The log makes durable what it has. Pages that were written and are as they were before (a rollback) have
    // only the file.
    let all_logged =
        matches!(st.rollback.dirty, Dirty::Pages(_)) && logged.is_some_and(|l| l.pages == pages.len());
    if st.rollback.synced && !all_logged {
        file.sync_data().map_err(io)?;
    }
    st.rollback.dirty = Dirty::Nothing;
    st.remember_stamp(db)?;
    Ok(logged)
}

impl Database {
    /// Whether what was written is what the log has, as after a rollback; then there is nothing to capture any more.
    pub fn is_as_logged(&self, st: &mut State) -> Result<bool, CaptureError> {
        let (page_size, page_count) = (st.page_size, st.page_count);
        let dirty = std::mem::take(&mut st.rollback.dirty);
        if page_count == 0 {
            return Ok(matches!(dirty, Dirty::Nothing));
        }
        let file = st.database_file(self)?;
        let differs = match &dirty {
            Dirty::Nothing => false,
            Dirty::Unknown => !changed_pages(self, st, &file, page_size, page_count)?.is_empty(),
            Dirty::Pages(pages) => {
                st.open_checksums(self)?;
                let mut page = vec![0; page_size as usize];
                let mut differs = false;
                for pgno in pages.iter().copied().filter(|p| *p <= page_count) {
                    self.read_database_page(&file, pgno, &mut page)?;
                    differs |= st.checksums().get(pgno) != Some(ltx::page_checksum(pgno, &page));
                }
                differs
            }
        };
        if differs {
            st.rollback.dirty = dirty;
        }
        Ok(!differs)
    }
}

/// Compares every page of the file with its checksum.
fn changed_pages(
    db: &Database,
    st: &mut State,
    file: &std::fs::File,
    page_size: u32,
    page_count: u32,
) -> Result<BTreeSet<u32>, CaptureError> {
    if page_size != st.page_size {
        return Ok((1..=page_count).collect());
    }
    st.open_checksums(db)?;
    let mut changed = BTreeSet::new();
    let per_read = (SCAN_BYTES / page_size as usize).max(1) as u32;
    let mut buf = vec![0; per_read as usize * page_size as usize];
    let lock_page = ltx::lock_page(page_size);
    let mut first = 1;
    while first <= page_count {
        let count = per_read.min(page_count - first + 1);
        let bytes = &mut buf[..count as usize * page_size as usize];
        db.read_at_or_zero(file, bytes, u64::from(first - 1) * u64::from(page_size))?;
        for (i, page) in bytes.chunks_exact(page_size as usize).enumerate() {
            let pgno = first + i as u32;
            if pgno != lock_page && st.checksums().get(pgno) != Some(ltx::page_checksum(pgno, page)) {
                changed.insert(pgno);
            }
        }
        first += count;
    }
    Ok(changed)
}
