//! Open files of the mount, and what each kind does with a read, a write, a sync and a close.

use super::answering::Answer;
use super::handles::flags;
use super::inodes::Inode;
use super::journal_sync::{self, SparedSyncs};
use super::kernel_cache::Invalidator;
use super::names::Kind;
use super::rename;
use crate::capture::{CaptureError, Logged, rollback, wal};
use crate::database::{Database, State};
use crate::status::messages;
use crate::sync::Hold;
use crate::write_out;
use fuse_session::HandleTable;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Length of the zeros that end a journal in PERSIST mode: its header's fields (file format, section 3).
const JOURNAL_HEADER_BYTES: usize = 28;

/// A file of a database, or a plain file, open on its backing file.
#[derive(Debug)]
pub struct OpenFile {
    /// Its inode.
    pub inode: Arc<Inode>,
    /// What its name says it is.
    pub kind: Kind,
    /// The database it belongs to; `None` for a name no database can have.
    pub db: Option<Arc<Database>>,
    /// The backing file.
    pub file: Arc<File>,
    /// Opened by this process, which writes only what the log already has.
    pub internal: bool,
    /// Reads and writes do not come here.
    pub passthrough: bool,
    /// Written by a program that is not SQLite: looked at when it is closed.
    pub adopt: bool,
    /// Something was written through this handle.
    pub written: AtomicBool,
    /// Its number, and the table that tells the next server of the mount about it.
    pub number: u64,
    /// See `number`.
    pub table: Arc<HandleTable>,
}

/// Turns a failure into the error number the application gets, and says it once in the log where it is not an
/// everyday refusal.
pub fn errno_of(db: &Database, doing: &str, error: &CaptureError) -> i32 {
    let errno = error.errno();
    match error {
        CaptureError::RefusedBefore { .. } => {}
        CaptureError::WalIsNeeded => tracing::warn!(database = %db.name(), doing, %error, "refused"),
        CaptureError::HaltLock(_) => tracing::warn!(database = %db.name(), doing, %error, "a commit failed"),
        CaptureError::NotPrimary => tracing::debug!(database = %db.name(), doing, "refused: not the primary"),
        _ => {
            let full = errno == libc::ENOSPC;
            tracing::error!(
                MESSAGE_ID = full.then_some(messages::DISK_FULL),
                database = %db.name(),
                doing,
                %error,
                errno,
                "an application's operation failed"
            );
        }
    }
    errno
}

impl OpenFile {
    /// Reads at most `size` bytes.
    pub fn read(&self, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        let mut data = vec![0; size as usize];
        let mut filled = 0;
        while filled < data.len() {
            match self.file.read_at(&mut data[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if let (Kind::Wal, Some(db)) = (self.kind, &self.db) {
            let st = db.state();
            let visible = st
                .wal
                .visible_len(st.wal_cached_end.max(offset + filled as u64))
                .min(offset + u64::from(size));
            filled = filled.max((visible.saturating_sub(offset)) as usize);
            st.wal.overlay(offset, &mut data[..filled]);
        }
        data.truncate(filled);
        Ok(data)
    }

    /// Writes; where this ends a transaction, says when it may be answered. `again`: the request was read by another
    /// server, which may have done it.
    pub fn write(&self, offset: u64, data: &[u8], again: bool) -> Result<Answer, i32> {
        let plain =
            |file: &File| file.write_all_at(data, offset).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
        if !self.written.swap(true, Ordering::Relaxed) {
            self.table.set_flags(self.number, flags::WRITTEN);
        }
        let Some(db) = &self.db else { return plain(&self.file).map(|()| Answer::Now) };
        if self.internal {
            plain(&self.file)?;
            if self.kind == Kind::Wal {
                db.state().wal.mark_written_from_log();
                // A sync when the WAL begins anew then has little to do.
                write_out::begin_full_pieces(&self.file, offset, data.len() as u64)
                    .map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
            }
            return Ok(Answer::Now);
        }
        let mut st = db.state();
        if matches!(self.kind, Kind::Wal | Kind::Journal)
            && st.page_count == 0
            && !db.paths().database.exists()
        {
            // Part of a copy whose database has not come yet.
            db.check_writable().map_err(|e| errno_of(db, "write", &e))?;
            st.wal.mark_written_by_others();
            return plain(&self.file).map(|()| Answer::Now);
        }
        if again
            && self.kind == Kind::Wal
            && wal::already_written(&st, &self.file, offset, data).is_ok_and(|done| done)
        {
            let hold = wal::ends_commit(&st, offset, data).then(|| db.hold_of(&st, None, false)).flatten();
            return Ok(hold.map_or(Answer::Now, Answer::WhenAcknowledged));
        }
        let result = match self.kind {
            Kind::Wal => wal::written(db, &mut st, &self.file, offset, data).map(|logged| {
                if let Some(logged) = logged {
                    db.expect_sync(&mut st, logged);
                }
                let (position, end) = (st.position, st.logged_end);
                match st.wal.withholds_commit() {
                    true => Answer::WhenAcknowledged(Hold { position, end, durable: false }),
                    false => Answer::Now,
                }
            }),
            Kind::Journal => journal_written(db, &mut st, &self.file, offset, data),
            Kind::Main => main_written(db, &mut st, &self.file, offset, data),
            Kind::Shm | Kind::SuperJournal => return plain(&self.file).map(|()| Answer::Now),
        };
        result.map_err(|e| errno_of(db, "write", &e))
    }

    /// Does what a write to this file was held for: see [`Answer`].
    pub fn finish_held_write(&self, db: &Database, offset: u64, data: &[u8]) -> Result<(), i32> {
        if self.kind == Kind::Wal {
            let published = wal::publish_held(db, &mut db.state(), &self.file);
            return published.map_err(|e| errno_of(db, "commit", &e));
        }
        self.file.write_all_at(data, offset).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
    }

    /// Makes the file durable, as far as the log does not do it already. `thread` asks for it.
    pub fn sync(&self, thread: u32, spared: &SparedSyncs) -> Result<Answer, i32> {
        let Some(db) = self.db.as_ref().filter(|_| !self.internal) else { return Ok(Answer::WhenSynced) };
        let mut st = db.state();
        match self.kind {
            Kind::Wal => {
                wal::capture_foreign(db, &mut st, &self.file).map_err(|e| errno_of(db, "sync", &e))?;
                st.wal_synced = true;
                // The log is the truth: recovery puts back what the WAL lost.
                Ok(Answer::WhenDurable(st.logged_end))
            }
            Kind::Journal if st.rollback.journal_active => {
                st.rollback.synced = true;
                if spared.spare(db, &mut st, thread) {
                    return Ok(Answer::Now);
                }
                let directory_owed = std::mem::take(&mut st.rollback.directory_owed);
                Ok(if directory_owed { Answer::WhenEntrySynced } else { Answer::WhenSynced })
            }
            // The sync after the journal's end (TRUNCATE, PERSIST): should the end be lost, the journal is rolled
            // back and the log rolled forward.
            Kind::Journal => Ok(Answer::WhenDurable(st.logged_end)),
            Kind::Main if st.rollback.journal_active => {
                // What the transaction wrote reaches the log with its commit, which waits for the log instead.
                st.rollback.synced = true;
                Ok(Answer::Now)
            }
            Kind::Main if st.copiers == 0 && st.rollback.is_dirty() && !db.load_journal_mode(&mut st) => {
                // journal_mode=MEMORY or OFF: SQLite syncs the file once all of a transaction is in it.
                let logged = capture_unjournaled(db, &mut st, true).map_err(|e| errno_of(db, "sync", &e))?;
                let hold = db.hold_of(&st, logged, true);
                Ok(hold.map_or(Answer::WhenDurable(st.logged_end), Answer::WhenAcknowledged))
            }
            Kind::Main | Kind::SuperJournal => Ok(Answer::WhenSynced),
            Kind::Shm => Ok(Answer::Now),
        }
    }

    /// Sets the file's length.
    pub fn set_len(&self, len: u64) -> Result<Answer, i32> {
        let cut = |file: &File| file.set_len(len).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
        let Some(db) = &self.db else { return cut(&self.file).map(|()| Answer::Now) };
        if self.internal {
            cut(&self.file)?;
            if self.kind == Kind::Wal {
                db.state().wal.mark_written_from_log();
            }
            return Ok(Answer::Now);
        }
        let mut st = db.state();
        let answer = match self.kind {
            Kind::Journal if len == 0 => journal_ends(db, &mut st).map_err(|e| errno_of(db, "commit", &e))?,
            Kind::Wal if len == 0 => {
                wal_ends(db, &mut st).map_err(|e| errno_of(db, "truncate the WAL", &e))?;
                Answer::Now
            }
            Kind::Main if !self.inode_is_followed(&st) => {
                st.rollback.mark_unknown();
                Answer::Now
            }
            _ => Answer::Now,
        };
        if self.kind == Kind::Wal {
            st.wal_cached_end = st.wal_cached_end.min(len);
        }
        drop(st);
        // A journal is cut when the log is durable.
        if answer == Answer::Now {
            cut(&self.file)?;
        }
        Ok(answer)
    }

    /// A tracked database is cut by SQLite only as its header already says.
    fn inode_is_followed(&self, st: &State) -> bool {
        st.page_count > 0
    }

    /// The last write of this handle is done: a copy that is now a database becomes one.
    pub fn closed(&self) -> Result<Answer, i32> {
        let Some(db) = &self.db else { return Ok(Answer::Now) };
        if self.internal || !self.written.load(Ordering::Relaxed) {
            return Ok(Answer::Now);
        }
        let mut st = db.state();
        let captured = match self.kind {
            Kind::Main if self.adopt => adopt(db, &mut st),
            Kind::Wal if st.page_count > 0 => wal::capture_foreign(db, &mut st, &self.file).map(|_| ()),
            _ => return Ok(Answer::Now),
        };
        captured.map(|()| Answer::Now).map_err(|e| errno_of(db, "take in", &e))
    }
}

/// A file that was copied in is complete: if it is a database it becomes one, else it stays a plain file.
pub fn adopt(db: &Database, st: &mut State) -> Result<(), CaptureError> {
    if st.rollback.journal_active {
        return Ok(());
    }
    if st.page_count == 0 && !db.is_complete_database() {
        return Ok(());
    }
    st.rollback.mark_unknown();
    capture_unjournaled(db, st, false)?;
    if st.page_count > 0
        && let Ok(file) = File::open(&db.paths().wal)
    {
        // Its WAL was copied first.
        wal::capture_foreign(db, st, &file)?;
    }
    Ok(())
}

/// Captures a file that was written without a journal; a plain file is left alone.
fn capture_unjournaled(
    db: &Database,
    st: &mut State,
    may_hold: bool,
) -> Result<Option<Logged>, CaptureError> {
    let captured = if may_hold { db.capture_rollback_to_hold(st) } else { db.capture_rollback(st) };
    match captured {
        Err(CaptureError::NotADatabase(_)) if st.page_count == 0 => Ok(None),
        captured => captured,
    }
}

fn main_written(
    db: &Database,
    st: &mut State,
    file: &File,
    offset: u64,
    data: &[u8],
) -> Result<Answer, CaptureError> {
    db.check_writable()?;
    st.check_health()?;
    // In WAL mode SQLite writes here what the WAL, and so the log, already has.
    let checkpoint = db.load_journal_mode(st) && !st.rollback.journal_active;
    if !checkpoint && !st.rollback.journal_active && st.page_count > 0 {
        // Nothing will say when this is a transaction, and an agent that dies before it is captured must know.
        st.open_checksums(db)?.note_unlogged_writes(true)?;
    }
    if st.rollback.journal_active {
        rollback::ensure_room(db, st, offset, data)?;
    }
    file.write_all_at(data, offset).map_err(|e| db.database_error(e))?;
    if !checkpoint {
        st.rollback.mark_written(offset, data.len() as u64, st.page_size);
    }
    Ok(Answer::Now)
}

fn journal_written(
    db: &Database,
    st: &mut State,
    file: &File,
    offset: u64,
    data: &[u8],
) -> Result<Answer, CaptureError> {
    db.check_writable()?;
    st.check_health()?;
    let ends = offset == 0 && data.len() == JOURNAL_HEADER_BYTES && data.iter().all(|b| *b == 0);
    let answer = if ends { journal_ends(db, st)? } else { Answer::Now };
    // The end of a journal is written when the log is durable.
    if answer == Answer::Now {
        file.write_all_at(data, offset)
            .map_err(|source| CaptureError::Io { path: db.paths().journal.clone(), source })?;
        journal_sync::note_written(st, offset, data);
    }
    st.rollback.journal_active = !ends;
    Ok(answer)
}

/// The journal is about to be ended by the application: captures the transaction. The journal must stay until
/// the answer's point is reached.
pub fn journal_ends(db: &Database, st: &mut State) -> Result<Answer, CaptureError> {
    let logged = match db.capture_rollback_to_hold(st) {
        // Not the journal of a database.
        Err(CaptureError::NotADatabase(_)) if st.page_count == 0 => None,
        logged => logged?,
    };
    let synced = std::mem::take(&mut st.rollback.synced);
    Ok(match (db.hold_of(st, logged, synced), logged) {
        (Some(hold), _) => Answer::WhenAcknowledged(hold),
        (None, Some(logged)) if synced => Answer::WhenDurable(logged.end),
        _ => Answer::Now,
    })
}

/// The WAL is about to be emptied or removed: everything in it must be in the database file.
pub fn wal_ends(db: &Database, st: &mut State) -> Result<(), CaptureError> {
    if st.page_count > 0 {
        if let Ok(file) = File::open(&db.paths().wal) {
            wal::capture_foreign(db, st, &file)?;
        }
        wal::settle_unpublished(db, st)?;
        db.check_wal_is_checkpointed(st)?;
    }
    st.wal.reset();
    st.wal_cached_end = 0;
    // SQLite removes the WAL when it leaves WAL mode, too.
    st.forget_journal_mode();
    if st.page_count > 0 && st.passthrough_handles > 0 {
        // Then the door does not see what such handles write.
        st.open_checksums(db)?.note_unlogged_writes(false)?;
    }
    Ok(())
}

/// The WAL is removed by hand, though the database file lacks what it has. If nobody has the database open that is
/// brought into the file first, so that nothing is lost.
pub fn wal_is_removed(db: &Database, invalidator: &Invalidator) -> Result<(), CaptureError> {
    rename::wait_until_closed(|| db.state().handles > 0);
    let mut st = db.state();
    if st.handles > 0 {
        return Err(CaptureError::WalIsNeeded);
    }
    db.fold_wal(&mut st)?;
    if let Ok(meta) = std::fs::metadata(&db.paths().database) {
        invalidator.forget_content(meta.ino());
    }
    wal_ends(db, &mut st)
}

/// Device and inode of a file, to tell whether two paths are one file.
pub fn same_file(a: &std::fs::Metadata, b: &std::fs::Metadata) -> bool {
    a.dev() == b.dev() && a.ino() == b.ino()
}
