//! Transactions written straight into the database file, while nobody else has it.
//!
//! Pages are not synced. The agent's log is durable before a transaction gets here, and after a power failure the
//! agent replays it from the last [`super::Applier::sync`]; a killed agent is covered by the rollback journal.

use super::database_lock::DatabaseLock;
use super::files::{self, Files};
use super::rollback_journal::{self, RollbackJournal};
use super::{ApplyError, DatabaseShape, TransactionHeader, TransactionSource};
use sqlite_file::header::{DatabaseHeader, HEADER_BYTES};
use sqlite_file::untimed::Untimed;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Pages are written in batches of about this many bytes.
const BATCH_BYTES: usize = 1 << 20;
/// Mode of a database file when the transaction does not give one (SQLite's default).
const DEFAULT_MODE: u32 = 0o644;

/// A database file under EXCLUSIVE whose WAL has been emptied.
pub(super) struct InPlace<'a> {
    files: &'a Files,
    database: Arc<File>,
    /// Keeps others out until the end.
    _lock: DatabaseLock,
    created: bool,
    journal: Option<RollbackJournal>,
    batch: Batch,
}

/// Pages that wait to be written together, ascending.
#[derive(Default)]
struct Batch {
    numbers: Vec<u32>,
    bytes: Vec<u8>,
}

/// Creates the file of a database that does not exist.
pub(super) fn create_database(files: &Files, transaction: &TransactionHeader) -> Result<File, ApplyError> {
    let mode = transaction.owner.map_or(DEFAULT_MODE, |owner| u32::from(owner.mode) & 0o777);
    let owner = transaction.owner.map(|owner| (owner.uid, owner.gid));
    files::create(&files.database, mode, owner).map_err(files.io("create", &files.database))
}

impl<'a> InPlace<'a> {
    /// `lock` is EXCLUSIVE. A hot journal must have been played back, and the WAL be gone.
    pub fn new(files: &'a Files, database: Arc<File>, lock: DatabaseLock, created: bool) -> Self {
        InPlace { files, database, _lock: lock, created, journal: None, batch: Batch::default() }
    }

    /// Applies transactions up to one that needs another way, which is returned. After an error the file is as it
    /// was before.
    pub fn run(
        mut self,
        first: TransactionHeader,
        source: &mut dyn TransactionSource,
        mut shape: DatabaseShape,
    ) -> Result<(DatabaseShape, Option<TransactionHeader>), ApplyError> {
        match self.write_all(first, source, &mut shape).and_then(|next| self.commit(shape).map(|()| next)) {
            Ok(next) => Ok((shape, next)),
            Err(error) => {
                tracing::warn!(%error, "taking back transactions that were written in place");
                self.abort()?;
                Err(error)
            }
        }
    }

    fn write_all(
        &mut self,
        first: TransactionHeader,
        source: &mut dyn TransactionSource,
        shape: &mut DatabaseShape,
    ) -> Result<Option<TransactionHeader>, ApplyError> {
        self.begin(&first)?;
        let mut next = Some(first);
        let mut page = Vec::new();
        // Nothing of what was there before goes into a database that is new or has another page size.
        let mut must_be_whole = shape.page_count == 0 || shape.page_size != first.page_size;
        while let Some(transaction) = next {
            // The pages of one session have one size; a drop is for others.
            if transaction.commit == 0 || transaction.page_size != first.page_size {
                break;
            }
            let (mut last, mut count) = (0, 0);
            while let Some(pgno) = self.files.next_page(source, &transaction, last, &mut page)? {
                last = pgno;
                count += 1;
                if pgno == 1 {
                    shape.wal_mode = super::is_wal(&page);
                }
                self.put(pgno, &page, transaction.page_size)?;
            }
            if std::mem::take(&mut must_be_whole) {
                self.files.check_whole(&transaction, count)?;
            }
            shape.page_size = transaction.page_size;
            shape.page_count = transaction.commit;
            next = self.files.next_transaction(source)?;
        }
        self.flush(first.page_size)?;
        Ok(next)
    }

    /// Starts the journal.
    fn begin(&mut self, transaction: &TransactionHeader) -> Result<(), ApplyError> {
        let bytes = Untimed::of(&self.database).map_err(self.files.io("inspect", &self.files.database))?.size;
        let page_size = if bytes == 0 {
            transaction.page_size
        } else {
            let mut start = [0u8; HEADER_BYTES];
            // A file that is no database (any more) is replaced as a whole; its old content is kept as if it were.
            let header = self.database.read_exact_at(&mut start, 0).ok();
            let header = header.and_then(|()| DatabaseHeader::parse(&start).ok());
            header.map_or(transaction.page_size, |header| header.page_size)
        };
        let pages = u32::try_from(bytes / u64::from(page_size)).map_err(|_| {
            self.files.invalid(format!("the file has {bytes} bytes, too many for pages of {page_size}"))
        })?;
        let journal =
            self.journal.insert(RollbackJournal::begin(self.files, &self.database, page_size, pages)?);
        if page_size != transaction.page_size {
            // Page numbers of the transaction say nothing about which old pages it overwrites.
            journal.save_all(self.files, &self.database)?;
        }
        Ok(())
    }

    fn put(&mut self, pgno: u32, page: &[u8], page_size: u32) -> Result<(), ApplyError> {
        let ascending = self.batch.numbers.last().is_none_or(|last| *last < pgno);
        if !ascending || self.batch.bytes.len() + page.len() > BATCH_BYTES {
            self.flush(page_size)?;
        }
        self.batch.numbers.push(pgno);
        self.batch.bytes.extend_from_slice(page);
        Ok(())
    }

    /// Writes the batch: old pages to the journal first, then new ones to the file, neighbours in one write.
    fn flush(&mut self, page_size: u32) -> Result<(), ApplyError> {
        let Batch { numbers, bytes } = &mut self.batch;
        if let Some(journal) = &mut self.journal
            && journal.page_size() == page_size
        {
            journal.save(self.files, &self.database, numbers.iter().copied())?;
        }
        let size = page_size as usize;
        let mut from = 0;
        for run in numbers.chunk_by(|a, b| *b == *a + 1) {
            let to = from + run.len() * size;
            self.database
                .write_all_at(&bytes[from..to], u64::from(run[0] - 1) * u64::from(page_size))
                .map_err(self.files.io("write", &self.files.database))?;
            from = to;
        }
        numbers.clear();
        bytes.clear();
        Ok(())
    }

    fn commit(&mut self, shape: DatabaseShape) -> Result<(), ApplyError> {
        let (files, database) = (self.files, &self.database);
        let wanted = u64::from(shape.page_count) * u64::from(shape.page_size);
        let now = Untimed::of(database).map_err(files.io("inspect", &files.database))?.size;
        if now < wanted {
            database.set_len(wanted).map_err(files.io("extend", &files.database))?;
        }
        if let Some(journal) = self.journal.take() {
            journal.commit(files)?;
        }
        // Pages cut off are not in the journal, so they go last, as in SQLite; nobody can look before the unlock.
        if now > wanted {
            database.set_len(wanted).map_err(files.io("truncate", &files.database))?;
        }
        Ok(())
    }

    fn abort(&mut self) -> Result<(), ApplyError> {
        match self.journal.take() {
            Some(journal) => journal.roll_back(self.files, &self.database)?,
            // The journal could not be begun or was committed already; a torn one must not stay.
            None => rollback_journal::recover(self.files, &self.database)?,
        }
        if self.created {
            self.files.remove(&self.files.database)?;
        }
        Ok(())
    }
}
