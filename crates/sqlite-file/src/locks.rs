//! SQLite's lock bytes, and open-file-description locks on them.
//!
//! SQLite takes POSIX record locks (`F_SETLK`). `F_OFD_SETLK` conflicts with those in both directions, also within
//! one process, and is dropped only when the open file description goes: closing another descriptor of the same
//! file does not drop it. See fcntl(2) and os_unix.c for the bytes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// A range of bytes that locks apply to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
}

impl LockRange {
    const fn new(start: u64, len: u64) -> Self {
        LockRange { start, len }
    }
}

/// Database file: keeps new readers out while a writer waits for the old ones to finish.
pub const PENDING: LockRange = LockRange::new(0x4000_0000, 1);
/// Database file: one connection that intends to write.
pub const RESERVED: LockRange = LockRange::new(0x4000_0001, 1);
/// Database file: read-locked by every reader, write-locked by a writer that changes the file.
pub const SHARED: LockRange = LockRange::new(0x4000_0002, 510);

/// Wal-index: the writer.
pub const WAL_WRITE: LockRange = LockRange::new(120, 1);
/// Wal-index: the checkpointer.
pub const WAL_CHECKPOINT: LockRange = LockRange::new(121, 1);
/// Wal-index: whoever rebuilds the wal-index.
pub const WAL_RECOVER: LockRange = LockRange::new(122, 1);
/// Wal-index: what a rebuild locks besides [`WAL_WRITE`] (checkpoint and recover).
pub const WAL_REBUILD: LockRange = LockRange::new(121, 2);
/// Wal-index: the readers that use the WAL (read marks 1 to 4); write-locked to restart it.
pub const WAL_READERS: LockRange = LockRange::new(124, 4);
/// Wal-index: read-locked by everyone who has it open ("dead man's switch").
pub const WAL_DMS: LockRange = LockRange::new(128, 1);
/// Number of read marks.
pub const WAL_READ_MARKS: usize = 5;

/// Wal-index: readers at read mark `mark` (0 to 4). Mark 0 reads the database file only.
pub const fn wal_read(mark: usize) -> LockRange {
    assert!(mark < WAL_READ_MARKS);
    LockRange::new(123 + mark as u64, 1)
}

/// Kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Many may hold it.
    Read,
    /// One may hold it, and no reader.
    Write,
}

/// A lock in somebody else's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// What is held.
    pub kind: LockKind,
    /// Process that holds it; `None` for an open-file-description lock.
    pub pid: Option<i32>,
}

fn flock(kind: libc::c_int, range: LockRange) -> libc::flock {
    // SAFETY: flock is a plain C struct of integers; all zeroes is a valid value (l_pid must be 0 for OFD locks).
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = range.start as libc::off_t;
    lock.l_len = range.len as libc::off_t;
    lock
}

fn set_lock(file: &File, command: libc::c_int, kind: libc::c_int, range: LockRange) -> io::Result<()> {
    let lock = flock(kind, range);
    // SAFETY: the descriptor is open for the duration of the call, and `lock` outlives it.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

fn fcntl_kind(kind: LockKind) -> libc::c_int {
    match kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
    }
}

/// Takes a lock, or changes the kind of one that this open file already has. `false`: somebody else is in the way.
/// A write lock needs a file opened for writing.
pub fn try_lock(file: &File, kind: LockKind, range: LockRange) -> io::Result<bool> {
    match set_lock(file, libc::F_OFD_SETLK, fcntl_kind(kind), range) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Gives a range back; it need not be locked.
pub fn unlock(file: &File, range: LockRange) -> io::Result<()> {
    set_lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, range)
}

/// Who else would keep this open file from taking the lock, without taking it.
pub fn conflicting_holder(file: &File, kind: LockKind, range: LockRange) -> io::Result<Option<LockHolder>> {
    let mut lock = flock(fcntl_kind(kind), range);
    // SAFETY: the descriptor is open for the duration of the call, and `lock` is writable and outlives it.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let kind = match libc::c_int::from(lock.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_WRLCK => LockKind::Write,
        _ => LockKind::Read,
    };
    Ok(Some(LockHolder { kind, pid: (lock.l_pid > 0).then_some(lock.l_pid) }))
}

/// A lock that is given back when dropped.
#[derive(Debug)]
pub struct LockGuard {
    file: Arc<File>,
    range: LockRange,
}

impl LockGuard {
    /// Takes the lock; `None`: somebody else is in the way.
    pub fn try_acquire(file: &Arc<File>, kind: LockKind, range: LockRange) -> io::Result<Option<Self>> {
        Ok(try_lock(file, kind, range)?.then(|| LockGuard { file: Arc::clone(file), range }))
    }

    /// Takes the lock as soon as nobody is in the way.
    ///
    /// # Errors
    /// [`io::ErrorKind::Interrupted`]: a signal came first.
    pub fn wait(file: &Arc<File>, kind: LockKind, range: LockRange) -> io::Result<Self> {
        set_lock(file, libc::F_OFD_SETLKW, fcntl_kind(kind), range)?;
        Ok(LockGuard { file: Arc::clone(file), range })
    }

    /// Changes the kind of the lock; `false`: somebody else is in the way and the lock stays as it was.
    pub fn try_convert(&self, kind: LockKind) -> io::Result<bool> {
        try_lock(&self.file, kind, self.range)
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        // Unlocking fails only for a bad descriptor, and closing it drops the lock as well.
        let _ = unlock(&self.file, self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::{Connection, ErrorCode};
    use std::path::Path;

    fn open(path: &Path) -> Arc<File> {
        Arc::new(File::options().read(true).write(true).open(path).unwrap())
    }

    fn database(dir: &Path, mode: &str) -> (std::path::PathBuf, Connection) {
        let path = dir.join("a.db");
        let db = Connection::open(&path).unwrap();
        db.pragma_update(None, "journal_mode", mode).unwrap();
        db.execute_batch("create table t(a)").unwrap();
        db.busy_timeout(std::time::Duration::ZERO).unwrap();
        (path, db)
    }

    fn is_busy(result: rusqlite::Result<()>) -> bool {
        matches!(result, Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy))
    }

    #[test]
    fn exclusive_on_the_shared_range_excludes_sqlite_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let (path, db) = database(dir.path(), "delete");
        let file = open(&path);
        db.execute_batch("begin; select * from t;").unwrap();
        assert!(LockGuard::try_acquire(&file, LockKind::Write, SHARED).unwrap().is_none());
        let holder = conflicting_holder(&file, LockKind::Write, SHARED).unwrap().unwrap();
        assert_eq!(holder, LockHolder { kind: LockKind::Read, pid: Some(std::process::id() as i32) });
        db.execute_batch("commit").unwrap();
        let guard = LockGuard::try_acquire(&file, LockKind::Write, SHARED).unwrap().unwrap();
        assert!(is_busy(db.execute_batch("select * from t")));
        drop(guard);
        db.execute_batch("select * from t").unwrap();
    }

    #[test]
    fn pending_keeps_new_readers_out_and_reserved_keeps_writers_out() {
        let dir = tempfile::tempdir().unwrap();
        let (path, db) = database(dir.path(), "delete");
        let file = open(&path);
        let pending = LockGuard::try_acquire(&file, LockKind::Write, PENDING).unwrap().unwrap();
        assert!(is_busy(db.execute_batch("select * from t")));
        drop(pending);
        let reserved = LockGuard::try_acquire(&file, LockKind::Write, RESERVED).unwrap().unwrap();
        db.execute_batch("select * from t").unwrap();
        assert!(is_busy(db.execute_batch("insert into t values(1)")));
        drop(reserved);
        db.execute_batch("insert into t values(1)").unwrap();
    }

    #[test]
    fn wal_bytes_are_those_sqlite_uses() {
        let dir = tempfile::tempdir().unwrap();
        let (path, db) = database(dir.path(), "wal");
        let shm = open(&dir.path().join("a.db-shm"));
        assert!(conflicting_holder(&shm, LockKind::Write, WAL_DMS).unwrap().is_some());
        db.execute_batch("begin; select * from t;").unwrap();
        assert!(conflicting_holder(&shm, LockKind::Write, WAL_READERS).unwrap().is_some());
        assert!(conflicting_holder(&shm, LockKind::Write, WAL_WRITE).unwrap().is_none());
        db.execute_batch("insert into t values(1)").unwrap();
        assert!(conflicting_holder(&shm, LockKind::Write, WAL_WRITE).unwrap().is_some());
        db.execute_batch("commit").unwrap();
        let guard = LockGuard::try_acquire(&shm, LockKind::Write, WAL_WRITE).unwrap().unwrap();
        assert!(is_busy(db.execute_batch("insert into t values(1)")));
        drop(guard);
        let guard = LockGuard::try_acquire(&shm, LockKind::Write, WAL_CHECKPOINT).unwrap().unwrap();
        let busy: i32 = db.query_row("pragma wal_checkpoint", [], |r| r.get(0)).unwrap();
        assert_eq!(busy, 1);
        drop(guard);
        drop(open(&path));
        db.execute_batch("insert into t values(1)").unwrap();
    }

    #[test]
    fn a_guard_converts_and_survives_the_close_of_another_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"").unwrap();
        let (a, b) = (open(&path), open(&path));
        let read = LockGuard::try_acquire(&a, LockKind::Read, WAL_WRITE).unwrap().unwrap();
        let other = LockGuard::try_acquire(&b, LockKind::Read, WAL_WRITE).unwrap().unwrap();
        assert!(!read.try_convert(LockKind::Write).unwrap());
        drop(other);
        assert!(read.try_convert(LockKind::Write).unwrap());
        drop(open(&path));
        assert!(LockGuard::try_acquire(&b, LockKind::Read, WAL_WRITE).unwrap().is_none());
        assert!(read.try_convert(LockKind::Read).unwrap());
        assert!(LockGuard::try_acquire(&b, LockKind::Read, WAL_WRITE).unwrap().is_some());
    }
}
