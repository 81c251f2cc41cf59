//! The WAL: commits in it, which are held back until the agent has them where that is asked for, and its end.

use crate::table::Database;
use crate::transaction::HeldFrame;
use crate::{agent, process, sys};
use core::sync::atomic::Ordering;
use shim_protocol::{FLAG_SYNCED, Op};

const WAL_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
/// How long the end of a WAL may wait for an agent that is there: SQLite can do without it.
const WAL_END_MS: u64 = 1000;

/// A write to the WAL; `real` does it.
pub fn write(
    fd: i32,
    database: &'static Database,
    data: &[u8],
    offset: u64,
    real: &dyn Fn() -> isize,
) -> isize {
    database.wal_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
    if data.len() == FRAME_HEADER && offset >= WAL_HEADER as u64 {
        if data[4..8] != [0; 4] {
            let exclusive = database.is_exclusive();
            if agent::is_refused(database) || exclusive && agent::wait_until_near(database).is_err() {
                return sys::fail(libc::EIO) as isize;
            }
            // The header of a commit that is written already gets another checksum: its transaction had spilled.
            let again = offset < database.wal_end.load(Ordering::Relaxed);
            let Some(held) = agent::begin_commit(database) else {
                return sys::fail(libc::EROFS) as isize;
            };
            database.wal_end.store(offset + 1, Ordering::Relaxed);
            database.committed.store(1, Ordering::Relaxed);
            database.captured.store(0, Ordering::Relaxed);
            if held {
                match hold(fd, database, data, offset) {
                    Ok(true) => return FRAME_HEADER as isize,
                    Ok(false) => {}
                    Err(error) => return sys::fail(error) as isize,
                }
            }
            if again && exclusive {
                let count = real();
                announce_exclusive(database);
                return count;
            }
        }
        return real();
    }
    if data.len() == WAL_HEADER && offset == 0 {
        // By now SQLite cannot do without, and an agent may be just starting.
        if ends_within(database, process::wait_ms()).is_err() {
            return sys::fail(libc::EIO) as isize;
        }
        forget_held(database);
        database.wal_end.store(0, Ordering::Relaxed);
        return real();
    }
    // Also when commits need not be held any more since its header was kept back.
    let is_held = database.holding.load(Ordering::Relaxed) != 0;
    let held = if is_held { database.transaction.lock() } else { None };
    if let Some(mut transaction) = held
        && let Some(frame) = transaction.held
        && offset == frame.offset + FRAME_HEADER as u64 + frame.written
    {
        let count = real();
        if count <= 0 {
            return count;
        }
        let frame = HeldFrame { written: frame.written + count as u64, ..frame };
        transaction.held = Some(frame);
        if frame.written >= frame.page_size {
            transaction.held = None;
            database.holding.store(0, Ordering::Relaxed);
            if let Err(error) = commit_frame(fd, database, &frame) {
                return sys::fail(error) as isize;
            }
            database.captured.store(1, Ordering::Relaxed);
            transaction.committed_end = frame.offset + FRAME_HEADER as u64 + frame.page_size;
        }
        drop(transaction);
        announce_exclusive(database);
        return count;
    }
    let count = real();
    announce_exclusive(database);
    count
}

/// The WAL is about to begin anew, to be emptied or removed: the agent reads first what is in it.
pub fn ends(database: &Database) -> Result<(), i32> {
    ends_within(database, if agent::is_up(database.cluster()) { WAL_END_MS } else { 0 })
}

fn ends_within(database: &Database, wait_ms: u64) -> Result<(), i32> {
    let flags = if database.synced.load(Ordering::Relaxed) != 0 { FLAG_SYNCED } else { 0 };
    agent::ask(database, Op::WalEnd, flags, &[], wait_ms)
}

/// With `locking_mode=EXCLUSIVE` there is no unlock that says that a commit is over. Nobody else may look at the
/// database: what the WAL has, counts.
fn announce_exclusive(database: &Database) {
    if database.is_exclusive()
        && database.committed.load(Ordering::Relaxed) != 0
        && database.transaction.lock().is_some_and(|t| t.held.is_none())
    {
        database.committed.store(0, Ordering::Relaxed);
        // Also one that was held: no wal-index says to the agent that it counts.
        database.captured.store(0, Ordering::Relaxed);
        agent::committed(database);
    }
}

/// Keeps a commit frame's header back. `false`: it is a header of before that gets another checksum.
fn hold(fd: i32, database: &Database, header: &[u8], offset: u64) -> Result<bool, i32> {
    let mut transaction = database.transaction.lock().ok_or(libc::EDEADLK)?;
    if offset < transaction.committed_end {
        return Ok(false);
    }
    let mut wal = [0; 12];
    if sys::pread(fd, &mut wal, 0)? != wal.len() {
        return Err(libc::EIO);
    }
    let page_size = u64::from(u32::from_be_bytes([wal[8], wal[9], wal[10], wal[11]]));
    let mut kept = [0; FRAME_HEADER];
    kept.copy_from_slice(header);
    transaction.held = Some(HeldFrame { offset, header: kept, page_size, written: 0 });
    database.holding.store(1, Ordering::Relaxed);
    Ok(true)
}

/// Another transaction begins, or another WAL.
pub fn forget_held(database: &Database) {
    if let Some(mut transaction) = database.transaction.lock() {
        transaction.committed_end = 0;
        transaction.held = None;
        database.holding.store(0, Ordering::Relaxed);
    }
}

/// The page of a held frame is written: the agent takes the transaction over, then the header makes it valid.
fn commit_frame(fd: i32, database: &Database, frame: &HeldFrame) -> Result<(), i32> {
    let mut data = [frame.offset, 0, 0, 0];
    for (word, bytes) in data[1..].iter_mut().zip(frame.header.chunks_exact(8)) {
        *word = u64::from_ne_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]);
    }
    agent::ask(database, Op::WalCommit, 0, &data, process::wait_ms())?;
    let mut written = 0;
    while written < FRAME_HEADER {
        match sys::pwrite(fd, &frame.header[written..], frame.offset + written as u64) {
            Ok(count) => written += count,
            Err(libc::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
