//! Whether applications may write, and whether their commits are held: what the agent says on the page, which is read there
//! without asking.

use super::attach::number_on_page;
use super::connection::{self, is_up, ring};
use crate::table::Database;
use crate::{process, sys};
use core::sync::atomic::Ordering;
use shim_protocol as protocol;

/// Whether applications may write now. Looks from time to time whether the agent is still there; without one, what it
/// said last counts for as long as an application would wait for it.
pub fn may_write(cluster: usize) -> bool {
    let connection = connection::of(cluster);
    let now = sys::coarse_now_ns();
    connection.check(cluster, now);
    let Some(page) = connection.page() else {
        return connection.connect(cluster, now).is_ok() && may_write(cluster);
    };
    if connection.lost_for_ns(now).is_some_and(|lost| lost > process::wait_ms() * 1_000_000) {
        return false;
    }
    if page.mode.load(Ordering::SeqCst) & protocol::MODE_WRITABLE == 0 {
        return false;
    }
    let until = page.write_until_ns.load(Ordering::Relaxed);
    until == u64::MAX || sys::lease_now_ns() < until
}

/// `ACCESS_*` bits of a database.
pub(super) fn access(database: &Database) -> u32 {
    number_on_page(database).map_or(0, |(page, number)| page.access[number as usize].load(Ordering::SeqCst))
}

/// Whether applications may write this database now: the host's, or another one's under a halt lock.
pub fn may_write_to(database: &Database) -> bool {
    may_write(database.cluster()) || access(database) & protocol::ACCESS_BORROWED != 0
}

/// What a writer that wants to begin is told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It may.
    Now,
    /// To wait, until the halt lock of another host has ended or this one has got it.
    Later,
    /// This host is no primary.
    Never,
}

/// Whether a writer may begin. That one waits is told to the agent, which may get it the database; nothing waits here.
pub fn turn(database: &Database) -> Turn {
    // Looks whether the agent is still there: what a dead one has said would count for ever.
    let may_write = may_write_to(database);
    let access = access(database);
    if access & protocol::ACCESS_LENT != 0 {
        Turn::Later
    } else if may_write {
        Turn::Now
    } else if access & protocol::ACCESS_ON_DEMAND != 0 && want(database) {
        Turn::Later
    } else {
        Turn::Never
    }
}

/// Tells the agent that a writer waits for this database.
fn want(database: &Database) -> bool {
    let Some((page, number)) = number_on_page(database) else { return false };
    page.changed[number as usize].fetch_or(protocol::WANTED, Ordering::SeqCst);
    ring(page, protocol::NAPPING);
    true
}

/// Whether commits in WAL mode are held.
pub fn holds(database: &Database) -> bool {
    access(database) & protocol::ACCESS_BORROWED != 0 || holds_all(database.cluster())
}

pub(super) fn holds_all(cluster: usize) -> bool {
    connection::of(cluster)
        .page()
        .is_some_and(|page| page.mode.load(Ordering::Acquire) & protocol::MODE_HELD != 0)
}

/// Whether a write may begin without waiting for anything.
pub fn is_ready(database: &Database) -> bool {
    let Some((page, number)) = number_on_page(database) else { return false };
    let number = number as usize;
    let ahead = page.written[number]
        .load(Ordering::Relaxed)
        .saturating_sub(page.captured[number].load(Ordering::SeqCst));
    is_up(database.cluster())
        && ahead <= protocol::AHEAD_BYTES
        && may_write_to(database)
        && access(database) & protocol::ACCESS_LENT == 0
}

/// Whether the agent cannot take commits of this database now.
pub fn is_refused(database: &Database) -> bool {
    number_on_page(database)
        .is_some_and(|(page, number)| page.refused[number as usize].load(Ordering::Relaxed) != 0)
}
