//! Transactions in rollback modes, and without a journal: what they write, and the ends at which the agent takes them over.

use crate::managed::{self, Managed};
use crate::table::{self, Database};
use crate::{agent, process, sys};
use core::sync::atomic::Ordering;
use shim_protocol::{FLAG_PLAYBACK, FLAG_SYNCED, FLAG_UNKNOWN, Op};

/// A write to the database file is about to be done.
pub fn database_write(database: &Database, data: &[u8], offset: u64) -> Result<(), i32> {
    let journaled = database.journals.load(Ordering::Relaxed) > 0;
    if database.wals.load(Ordering::Relaxed) > 0 && !journaled {
        // A checkpoint: the WAL, and so the log, has it.
        return Ok(());
    }
    if !journaled && !agent::may_write_to(database) {
        return Err(libc::EROFS);
    }
    let mut transaction = database.transaction.lock().ok_or(libc::EDEADLK)?;
    database.touched.store(1, Ordering::Relaxed);
    transaction.add(offset, data.len() as u64);
    transaction.journaled = journaled;
    Ok(())
}

/// A transaction ends by its journal, or without one: the agent takes it over first.
pub fn ends(database: &Database, flags: u32) -> Result<(), i32> {
    let mut transaction = database.transaction.lock().ok_or(libc::EDEADLK)?;
    if !transaction.is_dirty() {
        transaction.clear();
        database.touched.store(0, Ordering::Relaxed);
        return Ok(());
    }
    let flags = flags
        | if transaction.synced { FLAG_SYNCED } else { 0 }
        | if transaction.unknown { FLAG_UNKNOWN } else { 0 }
        | if transaction.playback { FLAG_PLAYBACK } else { 0 };
    agent::ask(database, Op::Commit, flags, transaction.writes(), process::wait_ms())?;
    transaction.clear();
    database.touched.store(0, Ordering::Relaxed);
    Ok(())
}

/// The same by its journal.
pub fn journal_ends(database: &Database) -> Result<(), i32> {
    ends(database, 0)
}

/// A commit over several databases is about to count: SQLite ignores what becomes of their journals afterwards, so the
/// agent takes all of it over now.
pub fn super_journal_ends(managed: &Managed) -> Result<(), i32> {
    for (fd, database) in table::journals(managed.cluster) {
        if names_super_journal(fd, managed.name.bytes()) {
            journal_ends(database)?;
        }
    }
    Ok(())
}

/// Whether a journal ends with the name of this super-journal (fileformat2.html, section 3; writeSuperJournal).
fn names_super_journal(journal: i32, name: &[u8]) -> bool {
    const MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
    // Length of the path, its checksum, magic; before them the path.
    let mut end = [0; 16];
    let Ok(size) = sys::fstat(journal).map(|stat| stat.st_size as u64) else { return false };
    let Some(at) = size.checked_sub(end.len() as u64) else { return false };
    if sys::pread(journal, &mut end, at) != Ok(end.len()) || end[8..] != MAGIC {
        return false;
    }
    let mut named = [0; managed::NAME_MAX];
    let Some(at) = at.checked_sub(name.len() as u64) else { return false };
    sys::pread(journal, &mut named[..name.len()], at) == Ok(name.len()) && named[..name.len()] == *name
}
