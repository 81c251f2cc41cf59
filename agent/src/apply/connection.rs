//! The agent as one of the connections of a database in WAL mode.

use super::database_lock::DatabaseLock;
use super::files::{Files, Patience};
use super::{ApplyError, lock_wait, rollback_journal};
use sqlite_file::header::{DatabaseHeader, HEADER_BYTES};
use sqlite_file::locks::{
    LockGuard, LockKind, WAL_CHECKPOINT, WAL_DMS, WAL_READ_MARKS, WAL_READERS, WAL_REBUILD, WAL_WRITE,
    conflicting_holder, wal_read,
};
use sqlite_file::untimed::Untimed;
use sqlite_file::wal::{Scanner, WAL_VERSION, WalError, WalHeader};
use sqlite_file::wal_index::{IndexHeader, READ_MARK_UNUSED, WalIndex};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Size that the first connection cuts the wal-index to; any below a header says "not initialised".
const UNINITIALISED_SHM_BYTES: u64 = 3;

/// Open files of a database in WAL mode, with SHARED on the database and the dead man's switch on the wal-index:
/// as long as it lives, nobody deletes the WAL or leaves WAL mode.
#[derive(Debug)]
pub(super) struct WalConnection {
    pub files: Arc<Files>,
    pub database: Arc<File>,
    pub wal: File,
    pub index: WalIndex,
    /// Whether frames that a dead writer may have left after the published ones have been cut off.
    pub tail_is_clean: bool,
    shm: Arc<File>,
    /// The write lock, for as long as SQLite's writers are to wait.
    pub writers_out: Option<LockGuard>,
    // Dropped in this order: first the wal-index, then the database, as SQLite does.
    _dms: LockGuard,
    pub lock: DatabaseLock,
}

/// The right to write to the WAL, while it lives: the lock, unless the connection has it anyway.
#[derive(Debug)]
pub(super) struct WriteRight(#[expect(dead_code, reason = "only its end matters")] Option<LockGuard>);

impl WalConnection {
    /// Connects. `None`: the database does not exist, is empty, or is not in WAL mode.
    pub fn open(files: &Arc<Files>, patience: &Patience) -> Result<Option<Self>, ApplyError> {
        let Some(database) = files.open_database()? else { return Ok(None) };
        let database = Arc::new(database);
        let lock = DatabaseLock::shared(&database, patience).map_err(files.io("lock", &files.database))?;
        let mut lock = lock.ok_or_else(|| files.busy("SHARED on the database", patience))?;
        if rollback_journal::is_hot(files)? {
            let exclusive = lock.make_exclusive(Some(patience)).map_err(files.io("lock", &files.database))?;
            if !exclusive {
                return Err(files.busy("EXCLUSIVE on the database, to play back a hot journal", patience));
            }
            rollback_journal::recover(files, &database)?;
            lock.make_shared().map_err(files.io("lock", &files.database))?;
        }
        if !uses_wal(files, &database)? {
            return Ok(None);
        }
        let wal = files.open_beside(&files.wal, &database)?;
        let shm = Arc::new(files.open_beside(&files.shm, &database)?);
        let dms = hold_dead_mans_switch(files, &shm, patience)?;
        let allocated = WalIndex::is_allocated(&shm).map_err(files.io("inspect", &files.shm))?;
        // Extending the wal-index is the right of whoever holds the write lock.
        let writer = if allocated { None } else { Some(write_lock(files, &shm, patience)?) };
        let index = WalIndex::map(Arc::clone(&shm)).map_err(|e| files.index_error(e))?;
        drop(writer);
        let mut connection = WalConnection {
            files: Arc::clone(files),
            database,
            wal,
            index,
            tail_is_clean: false,
            shm,
            writers_out: None,
            _dms: dms,
            lock,
        };
        if connection.index.read_header().is_none() {
            let _writer = connection.write_lock(patience)?;
            connection.header_for_writing(patience)?;
        }
        Ok(Some(connection))
    }

    /// Whether the database at the path is still the one that is open, and the wal-index as long as it is mapped
    /// (touching what somebody has cut off would be a SIGBUS).
    pub fn is_current(&self) -> Result<bool, ApplyError> {
        if !self.index.is_whole().map_err(self.files.io("inspect", &self.files.shm))? {
            return Ok(false);
        }
        let open = Untimed::of(&self.database).map_err(self.files.io("inspect", &self.files.database))?;
        match Untimed::at(&self.files.database) {
            Ok(there) => Ok(there.inode == open.inode),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(self.files.io("inspect", &self.files.database)(e)),
        }
    }

    /// The right to write to the WAL.
    pub fn write_lock(&self, patience: &Patience) -> Result<WriteRight, ApplyError> {
        match self.writers_out {
            Some(_) => Ok(WriteRight(None)),
            None => write_lock(&self.files, &self.shm, patience).map(|lock| WriteRight(Some(lock))),
        }
    }

    /// As [`WalConnection::write_lock`], without waiting.
    pub fn try_write_lock(&self) -> Result<Option<WriteRight>, ApplyError> {
        match self.writers_out {
            Some(_) => Ok(Some(WriteRight(None))),
            None => Ok(self.try_lock(LockKind::Write, WAL_WRITE)?.map(|lock| WriteRight(Some(lock)))),
        }
    }

    /// As [`WalConnection::write_lock`], among writers who take it again and again.
    pub fn insist_on_write_lock(&self, patience: &Patience) -> Result<LockGuard, ApplyError> {
        let guard = lock_wait::acquire(&self.shm, LockKind::Write, WAL_WRITE, patience);
        let guard = guard.map_err(self.files.io("lock", &self.files.shm))?;
        guard.ok_or_else(|| self.files.busy("the write lock of the WAL", patience))
    }

    /// One try for a lock on the wal-index.
    pub fn try_lock(
        &self,
        kind: LockKind,
        range: sqlite_file::locks::LockRange,
    ) -> Result<Option<LockGuard>, ApplyError> {
        LockGuard::try_acquire(&self.shm, kind, range).map_err(self.files.io("lock", &self.files.shm))
    }

    /// The published header; under the write lock a broken one means that its writer died, and it is rebuilt.
    pub fn header_for_writing(&mut self, patience: &Patience) -> Result<IndexHeader, ApplyError> {
        let header = match self.index.read_header() {
            Some(header) => header,
            None => self.rebuild_index(patience)?,
        };
        if header.version != WAL_VERSION {
            return Err(self.files.wal_error(WalError::Version(header.version)));
        }
        Ok(header)
    }

    /// Makes the wal-index anew from the WAL. The caller holds the write lock.
    fn rebuild_index(&mut self, patience: &Patience) -> Result<IndexHeader, ApplyError> {
        let mut rebuild = None;
        let got = patience.poll(|| {
            rebuild = LockGuard::try_acquire(&self.shm, LockKind::Write, WAL_REBUILD)?;
            Ok(rebuild.is_some())
        });
        if !got.map_err(self.files.io("lock", &self.files.shm))? {
            return Err(self.files.busy("the recovery lock of the WAL", patience));
        }
        let mut header = IndexHeader { version: WAL_VERSION, ..IndexHeader::default() };
        let mut pages = Vec::new();
        if let Some(mut scanner) = Scanner::open(&self.wal).map_err(|e| self.files.wal_error(e))? {
            while let Some(frame) = scanner.next_frame().map_err(self.files.io("read", &self.files.wal))? {
                pages.push(frame.pgno);
            }
            let end = scanner.committed();
            pages.truncate(end.frames as usize);
            let WalHeader { big_endian, page_size, salts, .. } = *scanner.header();
            header = IndexHeader { big_endian, salts, ..header };
            if end.frames > 0 {
                header.page_size = page_size;
                header.max_frame = end.frames;
                header.page_count = end.commit;
                header.frame_checksum = end.checksum;
            }
        }
        self.index.rebuild(&pages).map_err(|e| self.files.index_error(e))?;
        self.index.write_header(&header);
        self.index.set_backfill(0);
        self.index.set_backfill_attempted(header.max_frame);
        self.index.set_read_mark(0, 0);
        for mark in 1..WAL_READ_MARKS {
            // A mark in use belongs to a reader who knows better.
            if let Some(_mine) = self.try_lock(LockKind::Write, wal_read(mark))? {
                let first = mark == 1 && header.max_frame > 0;
                self.index.set_read_mark(mark, if first { header.max_frame } else { READ_MARK_UNUSED });
            }
        }
        Ok(header)
    }

    /// If all frames are in the database and nobody reads from the WAL, the next ones may overwrite them: publishes
    /// an empty WAL with new salts. The caller holds the write lock.
    pub fn restart_if_possible(&mut self, header: IndexHeader) -> Result<IndexHeader, ApplyError> {
        if header.max_frame == 0 || self.index.backfill() != header.max_frame {
            return Ok(header);
        }
        // SQLite does without the checkpoint lock, and a checkpointer of before 3.51.3 that has just read the old
        // header could then take the restarted WAL for a complete one (https://sqlite.org/wal.html#walresetbug).
        let Some(_checkpointer) = self.try_lock(LockKind::Write, WAL_CHECKPOINT)? else { return Ok(header) };
        let Some(_readers) = self.try_lock(LockKind::Write, WAL_READERS)? else { return Ok(header) };
        let salts = header.salts.next().map_err(self.files.io("make salts for", &self.files.wal))?;
        let restarted = IndexHeader { max_frame: 0, salts, ..header };
        self.index.write_header(&restarted);
        self.index.reset_checkpoint_info(0, 0);
        Ok(restarted)
    }

    /// Closes all files without touching what is in them, but keeps the database and its lock.
    pub fn into_database(self) -> (Arc<File>, DatabaseLock) {
        let WalConnection { database, lock, .. } = self;
        (database, lock)
    }
}

fn write_lock(files: &Files, shm: &Arc<File>, patience: &Patience) -> Result<LockGuard, ApplyError> {
    let mut guard = None;
    let got = patience.poll(|| {
        guard = LockGuard::try_acquire(shm, LockKind::Write, WAL_WRITE)?;
        Ok(guard.is_some())
    });
    got.map_err(files.io("lock", &files.shm))?;
    guard.ok_or_else(|| files.busy("the write lock of the WAL", patience))
}

/// Takes the dead man's switch. Whoever finds nobody else on it knows that the wal-index is stale, and clears it.
fn hold_dead_mans_switch(
    files: &Files,
    shm: &Arc<File>,
    patience: &Patience,
) -> Result<LockGuard, ApplyError> {
    let mut guard = None;
    let got = patience.poll(|| {
        match conflicting_holder(shm, LockKind::Write, WAL_DMS)? {
            None => {
                let Some(first) = LockGuard::try_acquire(shm, LockKind::Write, WAL_DMS)? else {
                    return Ok(false);
                };
                shm.set_len(UNINITIALISED_SHM_BYTES)?;
                let kept = first.try_convert(LockKind::Read)?;
                assert!(kept, "a write lock can always become a read lock");
                guard = Some(first);
            }
            Some(holder) if holder.kind == LockKind::Write => {}
            Some(_) => guard = LockGuard::try_acquire(shm, LockKind::Read, WAL_DMS)?,
        }
        Ok(guard.is_some())
    });
    got.map_err(files.io("lock", &files.shm))?;
    guard.ok_or_else(|| files.busy("the wal-index, which somebody is creating", patience))
}

/// Whether SQLite reads the database through a WAL: the header says so, or a WAL is there. An empty database never.
pub(super) fn uses_wal(files: &Files, database: &File) -> Result<bool, ApplyError> {
    let bytes = Untimed::of(database).map_err(files.io("inspect", &files.database))?.size;
    if bytes == 0 {
        return Ok(false);
    }
    let mut start = [0u8; HEADER_BYTES];
    let read = database.read_exact_at(&mut start, 0).is_ok();
    let by_header = read && DatabaseHeader::parse(&start).is_ok_and(|header| header.is_wal());
    Ok(by_header || exists(files, &files.wal)?)
}

pub(super) fn exists(files: &Files, path: &Path) -> Result<bool, ApplyError> {
    path.try_exists().map_err(files.io("inspect", path))
}
