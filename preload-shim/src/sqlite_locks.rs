//! What it means that SQLite takes or gives up a lock of its own (os_unix.c): a writer begins, a commit in WAL mode counts,
//! a WAL ends.

use crate::table::{File, Kind};
use crate::{agent, process, rollback, sys, wal};
use core::sync::atomic::Ordering;
use shim_protocol::FLAG_UNJOURNALED;

/// Database file: first of the bytes that readers lock; a writer has all of them (os_unix.c).
const SHARED_FIRST: i64 = 0x4000_0002;
const SHARED_SIZE: i64 = 510;
/// Database file: locked by the one who is about to write.
const RESERVED: i64 = 0x4000_0001;
/// Wal-index: locked by the writer.
const WAL_WRITE: i64 = 120;
/// Wal-index: locked, all four, to begin the WAL anew.
const WAL_READERS: (i64, i64) = (124, 4);

/// A POSIX lock on a tracked file.
#[inline]
pub fn lock(fd: i32, file: &File, lock: &libc::flock, real: &dyn Fn() -> i32) -> i32 {
    match file.kind() {
        Kind::Shm => lock_shm(fd, file, lock, real),
        Kind::Database => lock_database(fd, file, lock, real),
        _ => real(),
    }
}

fn lock_shm(fd: i32, file: &File, lock: &libc::flock, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    let kind = i32::from(lock.l_type);
    let of_writer = lock.l_start <= WAL_WRITE && WAL_WRITE < lock.l_start + lock.l_len;
    if kind == libc::F_WRLCK && of_writer {
        // Without a valid wal-index this is somebody who reads, and has to make it first.
        if !agent::is_ready(database) && has_valid_index(fd) {
            // Commits are announced to an agent, so there has to be one, or to have been one until a moment ago: its
            // successor finds them.
            if agent::attach(database, 0).is_err()
                && !agent::was_there(database.cluster())
                && agent::attach(database, process::wait_ms()).is_err()
            {
                return sys::fail(libc::EIO);
            }
            if agent::turn(database) != agent::Turn::Now {
                return sys::fail(libc::EAGAIN);
            }
            if let Err(error) = agent::wait_until_near(database) {
                return sys::fail(error);
            }
        }
        let locked = real();
        if locked == 0 {
            database.writing.store(1, Ordering::Relaxed);
            agent::end_commit(database);
            database.committed.store(0, Ordering::Relaxed);
            // Whether commits are held may have changed since the last transaction.
            wal::forget_held(database);
        }
        return locked;
    }
    if kind == libc::F_UNLCK && of_writer {
        database.writing.store(0, Ordering::Relaxed);
        let unlocked = real();
        if database.committed.load(Ordering::Relaxed) != 0 {
            database.committed.store(0, Ordering::Relaxed);
            agent::committed(database);
        }
        return unlocked;
    }
    if kind == libc::F_WRLCK && (lock.l_start, lock.l_len) == WAL_READERS {
        let locked = real();
        // The holder of the write lock is about to begin the WAL anew. Without this lock it just goes on.
        if locked == 0 && wal::ends(database).is_err() {
            relock(fd, libc::F_UNLCK, lock);
            return sys::fail(libc::EAGAIN);
        }
        return locked;
    }
    real()
}

fn lock_database(fd: i32, file: &File, lock: &libc::flock, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    let kind = i32::from(lock.l_type);
    if kind == libc::F_WRLCK {
        if (lock.l_start, lock.l_len) == (RESERVED, 1) && agent::turn(database) == agent::Turn::Later {
            return sys::fail(libc::EAGAIN);
        }
        let locked = real();
        let exclusive = (lock.l_start, lock.l_len) == (SHARED_FIRST, SHARED_SIZE);
        // The last one out of the WAL: it will be checkpointed and removed. Without EXCLUSIVE it stays.
        if locked == 0
            && exclusive
            && database.wals.load(Ordering::Relaxed) > 0
            && wal::ends(database).is_err()
        {
            relock(fd, libc::F_RDLCK, lock);
            return sys::fail(libc::EAGAIN);
        }
        return locked;
    }
    // Giving up EXCLUSIVE makes a transaction without a journal visible. Readers give up their locks here too.
    let covers = lock.l_len == 0 || lock.l_start + lock.l_len > SHARED_FIRST;
    let unjournaled = || database.transaction.lock().is_some_and(|t| t.is_dirty() && !t.journaled);
    if covers && database.touched.load(Ordering::Relaxed) != 0 && database.is_unjournaled() && unjournaled() {
        let error = sys::errno();
        let refused = rollback::ends(database, FLAG_UNJOURNALED).is_err();
        if refused {
            process::say(&[b"a transaction without a journal was refused and cannot be taken back"]);
        }
        sys::set_errno(error);
    }
    real()
}

fn relock(fd: i32, kind: i32, lock: &libc::flock) {
    let mut other = *lock;
    other.l_type = kind as i16;
    sys::set_lock(fd, &other);
}

/// Whether both copies of the wal-index header agree and are initialised (walformat.html, section 2.1).
fn has_valid_index(fd: i32) -> bool {
    let mut headers = [0; 96];
    sys::pread(fd, &mut headers, 0) == Ok(headers.len()) && headers[12] != 0 && headers[..48] == headers[48..]
}
