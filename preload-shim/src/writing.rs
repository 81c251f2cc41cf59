//! What writing, syncing, cutting and closing a file of a database means. See `docs/preload-door.md` for the rules; the bytes
//! and the order of calls are SQLite's (os_unix.c, pager.c, wal.c).

use crate::table::{File, Kind};
use crate::{agent, process, rollback, sys, wal};
use core::sync::atomic::Ordering;
use shim_protocol::{FLAG_SYNCED, FLAG_UNJOURNALED, Op};

/// Zeros over a journal's header end it in PERSIST mode.
const JOURNAL_END: usize = 28;

/// A write to a tracked file; `real` does it.
#[inline]
pub fn write(fd: i32, file: &File, data: &[u8], offset: u64, real: &dyn Fn() -> isize) -> isize {
    let database = file.database();
    let allowed = match file.kind() {
        Kind::Wal => return wal::write(fd, database, data, offset, real),
        Kind::Database => rollback::database_write(database, data, offset),
        Kind::Journal if offset == 0 && data.len() == JOURNAL_END && data.iter().all(|b| *b == 0) => {
            rollback::journal_ends(database)
        }
        Kind::Journal | Kind::Shm => Ok(()),
    };
    match allowed {
        Ok(()) => real(),
        Err(error) => sys::fail(error) as isize,
    }
}

/// `fsync` and `fdatasync`.
pub fn sync(file: &File, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    if matches!(file.kind(), Kind::Database | Kind::Wal) {
        database.synced.store(1, Ordering::Relaxed);
    }
    match file.kind() {
        Kind::Journal => {
            if let Some(mut transaction) = database.transaction.lock() {
                transaction.synced = true;
            }
            real()
        }
        Kind::Database if database.is_unjournaled() => {
            let synced = real();
            if synced == 0
                && let Err(error) = rollback::ends(database, FLAG_UNJOURNALED | FLAG_SYNCED)
            {
                return sys::fail(error);
            }
            synced
        }
        Kind::Wal if agent::holds(database) => {
            match agent::ask(database, Op::WalSync, 0, &[], process::wait_ms()) {
                Ok(()) => 0,
                Err(error) => sys::fail(error),
            }
        }
        Kind::Wal => {
            agent::synced(database);
            real()
        }
        _ => real(),
    }
}

/// `ftruncate`.
pub fn truncate(file: &File, len: i64, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    let allowed = match file.kind() {
        Kind::Journal if len == 0 => rollback::journal_ends(database),
        Kind::Wal if len == 0 => wal::ends(database),
        _ => Ok(()),
    };
    match allowed {
        Ok(()) => real(),
        Err(error) => sys::fail(error),
    }
}

/// A descriptor of a tracked file is about to be closed.
pub fn closing(file: &File) {
    let database = file.database();
    if file.kind() == Kind::Database && database.is_unjournaled() && process::is_own() {
        let error = sys::errno();
        // The agent looks at the file by itself later, should this fail.
        let _ = rollback::ends(database, FLAG_UNJOURNALED);
        sys::set_errno(error);
    }
}
