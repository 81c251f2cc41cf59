//! Commits in WAL mode: they are announced to the agent, and nobody waits for it until it has fallen too far behind.

use super::attach::number_on_page;
use super::connection::{self, ring};
use super::permission::{access, holds_all, may_write};
use super::slots::LOOK_MS;
use crate::table::Database;
use crate::{process, sys};
use core::sync::atomic::Ordering;
use shim_protocol as protocol;

/// A commit in WAL mode is about to be written; says whether it has to be held. From now on the agent waits for it before it
/// ends a term. `None`: the term, or the halt lock, has ended.
pub fn begin_commit(database: &Database) -> Option<bool> {
    let cluster = database.cluster();
    if access(database) & protocol::ACCESS_BORROWED != 0 {
        // Should the lock end now, the agent refuses what it is asked.
        return Some(true);
    }
    if !database.committing.load(Ordering::Relaxed).is_null() {
        // The header of the same commit again, with another checksum.
        return Some(holds_all(cluster));
    }
    loop {
        let page = connection::of(cluster).page();
        if let Some(page) = page {
            // Before the look at the mode: the agent clears that first and looks at this afterwards.
            page.committing.fetch_add(1, Ordering::SeqCst);
            database.committing.store(core::ptr::from_ref(page).cast_mut(), Ordering::Relaxed);
        }
        let may = may_write(cluster);
        // It may have found another agent, which has to wait too.
        let same = connection::of(cluster).page().map(core::ptr::from_ref) == page.map(core::ptr::from_ref);
        if may && same {
            return Some(holds_all(cluster));
        }
        end_commit(database);
        if !may {
            return None;
        }
    }
}

/// The commit is published, or will not be.
pub fn end_commit(database: &Database) {
    let page = database.committing.swap(core::ptr::null_mut(), Ordering::Relaxed);
    // SAFETY: a page stays mapped as long as the process lives.
    if let Some(page) = unsafe { page.as_ref() } {
        page.committing.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A commit is visible in the WAL: nobody waits for anything. An agent that is not there now finds it later.
pub fn committed(database: &Database) {
    if database.captured.swap(0, Ordering::Relaxed) != 0 {
        // It was held: the agent has it, and sees in the wal-index that it counts.
        database.wal_bytes.store(0, Ordering::Relaxed);
    } else if let Some((page, number)) = number_on_page(database) {
        let bytes = database.wal_bytes.swap(0, Ordering::Relaxed);
        page.written[number as usize].fetch_add(bytes, Ordering::SeqCst);
        page.changed[number as usize].fetch_or(protocol::CHANGED, Ordering::SeqCst);
        ring(page, protocol::ASLEEP);
    }
    end_commit(database);
}

/// The application syncs its WAL.
pub fn synced(database: &Database) {
    if let Some((page, number)) = number_on_page(database) {
        page.changed[number as usize].fetch_or(protocol::SYNCED, Ordering::SeqCst);
    }
}

/// Waits until the agent is near enough for another transaction. Where no agent is it does not wait: how long commits go
/// on without one is limited elsewhere.
pub fn wait_until_near(database: &Database) -> Result<(), i32> {
    let connection = connection::of(database.cluster());
    let mut deadline = 0;
    loop {
        let Some((page, number)) = number_on_page(database) else { return Ok(()) };
        let seen = page.caught_up.load(Ordering::SeqCst);
        let captured = page.captured[number as usize].load(Ordering::SeqCst);
        let written = page.written[number as usize].load(Ordering::Relaxed);
        if written.saturating_sub(captured) <= protocol::AHEAD_BYTES {
            return Ok(());
        }
        let now = sys::now_ns();
        if deadline == 0 {
            deadline = now + process::wait_ms() * 1_000_000;
            // A wake-up may have been missed.
            page.changed[number as usize].fetch_or(protocol::CHANGED, Ordering::SeqCst);
            ring(page, protocol::NAPPING);
        }
        if connection.has_hung_up() {
            return Ok(());
        }
        if now >= deadline {
            process::say(&[b"the agent does not keep up with this database: a transaction has to wait"]);
            return Err(libc::EAGAIN);
        }
        sys::futex_wait(&page.caught_up, seen, LOOK_MS);
    }
}
