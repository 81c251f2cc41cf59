//! What a process asks through the preload library, and what becomes of it.

use crate::capture::wal::published::HeldCommit;
use crate::capture::{CaptureError, Logged, unix_ms};
use crate::database::follow::Suspicion;
use crate::database::{Database, State};
use crate::log::Lsn;
use crate::sync::Hold;
use parking_lot::MutexGuard;
use shim_protocol::{FLAG_PLAYBACK, FLAG_SYNCED, FLAG_UNJOURNALED, FLAG_UNKNOWN, write_of};
use sqlite_file::locks::{self, LockGuard, LockKind};
use sqlite_file::untimed::Untimed;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long somebody who renames a database waits for others to have closed it.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// How long the capture of a database waits, of which something may not be in the log, for others at work there.
const SUSPECT_PATIENCE: Duration = Duration::from_secs(2);

/// When a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Now.
    Now(u32),
    /// When the log is durable up to here.
    WhenDurable(Lsn),
    /// When followers have the commit.
    WhenAcknowledged(Hold),
}

/// Writes to a database file, as the library saw them.
#[derive(Debug, Default)]
pub struct Writes {
    words: Vec<u64>,
    too_many: bool,
}

impl Writes {
    /// Adds some; beyond `max` they are not kept.
    pub fn add(&mut self, words: impl Iterator<Item = u64>, max: usize) {
        self.words.extend(words);
        if self.words.len() > max {
            self.words = Vec::new();
            self.too_many = true;
        }
    }
}

fn errno_of(db: &Database, doing: &str, error: &CaptureError) -> i32 {
    match error {
        CaptureError::NotPrimary => tracing::debug!(database = %db.name(), doing, "refused: not the primary"),
        CaptureError::HaltLock(_) => tracing::warn!(database = %db.name(), doing, %error, "a commit failed"),
        _ => tracing::error!(database = %db.name(), doing, %error, "an application's operation failed"),
    }
    error.errno()
}

/// A process opens the database. Answers whether its commits are refused.
pub fn take_up(db: &Arc<Database>) -> bool {
    let mut st = db.state();
    st.handles += 1;
    note_replaced(db, &mut st);
    if let Err(error) = db.learn_change_counter(&mut st) {
        tracing::error!(database = %db.name(), %error, "it cannot be compared with the log yet");
    }
    st.quarantine_reason().is_some()
}

/// A process has closed the database, or died.
pub fn let_go(db: &Arc<Database>) {
    follow(db);
    let mut st = db.state();
    st.handles = st.handles.saturating_sub(1);
    st.released = Some(Instant::now());
    if db.may_write() && has_dead_transaction(db) {
        // The sweep takes it back; whoever copies the database waits for that.
        st.rollback.journal_active = true;
        st.rollback.mark_unknown();
    }
    if db.may_write()
        && st.handles == 0
        && st.page_count > 0
        && db.load_journal_mode(&mut st)
        && !db.paths().wal.exists()
    {
        // What the last one moved from the WAL to the file is in the log.
        let _ = st.remember_stamp(db);
    }
}

/// Whether there is the journal of a transaction that nobody is in any more.
fn has_dead_transaction(db: &Database) -> bool {
    let held = |file: File| locks::conflicting_holder(&file, LockKind::Write, locks::RESERVED);
    db.has_hot_journal()
        && File::open(&db.paths().database).and_then(held).is_ok_and(|holder| holder.is_none())
}

/// The file may be another one by now: a copy was moved over it.
fn note_replaced(db: &Database, st: &mut State) {
    let path = &db.paths().database;
    let Some(kept) = st.kept_database_file() else { return };
    let same = match (Untimed::of(&kept), Untimed::at(path)) {
        (Ok(kept), Ok(there)) => kept.inode == there.inode,
        _ => false,
    };
    if !same {
        st.set_database_file(None);
        st.forget_journal_mode();
        if path.exists() {
            st.rollback.mark_unknown();
        }
    }
}

/// Captures what is published. What fails is tried again; `false`: the log lacks something, and writers that are far
/// ahead have to wait.
pub fn follow(db: &Arc<Database>) -> bool {
    follow_for(db, &mut false)
}

/// As [`follow`]; says whether something was captured.
pub fn follow_for(db: &Arc<Database>, captured: &mut bool) -> bool {
    follow_with(db, captured, |st| db.follow_wal(st))
}

/// As [`follow`], also what a process with `locking_mode=EXCLUSIVE` has written and may not have put into the wal-index.
pub fn follow_to_the_end(db: &Arc<Database>) {
    follow(db);
    let held = |file: File| locks::conflicting_holder(&file, LockKind::Read, locks::SHARED);
    if File::open(&db.paths().database).and_then(held).is_ok_and(|holder| holder.is_some()) {
        follow_with(db, &mut false, |st| db.follow_file(st));
    }
}

fn follow_with(
    db: &Arc<Database>,
    captured: &mut bool,
    look: impl FnOnce(&mut State) -> Result<Option<Logged>, CaptureError>,
) -> bool {
    if !db.shared().is_writable() {
        // What is committed under a halt lock is known before; who does so may wait with the state in hand.
        return true;
    }
    let mut st = db.state();
    let followed = match look(&mut st) {
        Ok(logged) => {
            *captured = logged.is_some();
            true
        }
        Err(CaptureError::NotPrimary) => true,
        Err(CaptureError::NotADatabase(reason)) => {
            let path = db.paths().wal.display();
            st.quarantine(db, format!("{path}: {reason}"));
            false
        }
        Err(CaptureError::Quarantined(_)) => false,
        Err(CaptureError::InUse) => {
            tracing::debug!(database = %db.name(), "commits in the WAL are captured when a checkpoint has ended");
            false
        }
        Err(error) => {
            tracing::error!(database = %db.name(), %error, "commits in the WAL cannot be captured yet; trying again");
            false
        }
    };
    // A fast writer has the next commit ready; streams, exports and other processes have their turn first.
    MutexGuard::unlock_fair(st);
    followed
}

/// Whether a process still is where it asked: it may have been killed since, and another one be in its place.
fn holds(pid: i32, path: &Path, range: locks::LockRange) -> Option<bool> {
    let holder = File::open(path).and_then(|file| locks::conflicting_holder(&file, LockKind::Read, range));
    let holder = holder.ok().flatten()?;
    Some(holder.pid == Some(pid))
}

/// Whether a process runs: one that was killed may not have been waited for.
fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    state.is_some_and(|state| !"ZXx".contains(state))
}

/// What a process asked that has died since: nobody waits for the answer, and its transaction is taken back.
fn has_died(db: &Database, pid: i32) -> Result<Answer, i32> {
    tracing::debug!(database = %db.name(), pid, "the process that asked for a commit has died");
    Err(libc::ESTALE)
}

/// A transaction without WAL is about to end.
pub fn commit(db: &Arc<Database>, flags: u32, writes: &Writes, pid: i32) -> Result<Answer, i32> {
    let mut st = db.state();
    if flags & FLAG_UNJOURNALED == 0
        && !holds(pid, &db.paths().database, locks::SHARED).unwrap_or_else(|| is_alive(pid))
    {
        return has_died(db, pid);
    }
    note_replaced(db, &mut st);
    if flags & FLAG_UNKNOWN != 0 || writes.too_many {
        st.rollback.mark_unknown();
    }
    for word in &writes.words {
        let (offset, len) = write_of(*word);
        let page_size = st.page_size;
        st.rollback.mark_written(offset, len, page_size);
    }
    st.rollback.synced |= flags & FLAG_SYNCED != 0;
    if !db.may_write() {
        // A rollback must be able to end: what is in the file then is what the log has.
        let as_logged = db.is_as_logged(&mut st).map_err(|e| errno_of(db, "commit", &e))?;
        if !as_logged && flags & FLAG_PLAYBACK == 0 {
            return Err(libc::EROFS);
        }
        if !as_logged && st.applied.position == st.position {
            // The log has what was taken back: looked at when the next transactions are applied.
            st.suspect = Some(Suspicion::TakenBack);
        }
        // Else the last agent died while it applied what the log has: it is applied again.
        st.rollback = Default::default();
        return Ok(Answer::Now(0));
    }
    let unjournaled = flags & FLAG_UNJOURNALED != 0;
    if unjournaled && st.page_count == 0 && !db.is_complete_database() {
        // Something that is being copied, or no database at all.
        st.rollback = Default::default();
        return Ok(Answer::Now(0));
    }
    // What was committed without the library since the last transaction goes with this one.
    if db.has_unseen_transactions(&mut st, 1).map_err(|e| errno_of(db, "commit", &e))? {
        st.rollback.mark_unknown();
    }
    let logged = db.capture_rollback_to_hold(&mut st).map_err(|e| errno_of(db, "commit", &e))?;
    let synced = std::mem::take(&mut st.rollback.synced);
    Ok(match (db.hold_of(&st, logged, synced), logged) {
        (Some(hold), _) => Answer::WhenAcknowledged(hold),
        (None, Some(logged)) if synced => Answer::WhenDurable(logged.end),
        _ => Answer::Now(0),
    })
}

/// The WAL is about to begin anew or go.
pub fn wal_end(db: &Arc<Database>, flags: u32) -> Result<Answer, i32> {
    let mut st = db.state();
    if !db.may_write() {
        st.wal.mark_written_from_log();
        return Ok(Answer::Now(0));
    }
    db.end_wal(&mut st).map_err(|e| match e {
        // A checkpoint that takes long: SQLite goes on with the WAL that it has.
        CaptureError::InUse => e.errno(),
        e => errno_of(db, "begin the WAL anew", &e),
    })?;
    // With `synchronous=OFF` the WAL is no more durable than the log.
    Ok(if flags & FLAG_SYNCED == 0 { Answer::Now(0) } else { Answer::WhenDurable(st.logged_end) })
}

/// A commit frame is held.
pub fn wal_commit(db: &Arc<Database>, data: &[u64], pid: i32) -> Result<Answer, i32> {
    let &[offset, a, b, c] = data else { return Err(libc::EINVAL) };
    let mut header = [0; 24];
    for (bytes, word) in header.chunks_exact_mut(8).zip([a, b, c]) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    let mut st = db.state();
    // With `locking_mode=EXCLUSIVE` there is no wal-index, or nobody has locks there.
    let writes = holds(pid, &db.paths().shm, locks::WAL_WRITE)
        .or_else(|| holds(pid, &db.paths().database, locks::SHARED))
        .unwrap_or_else(|| is_alive(pid) && !db.paths().shm.exists());
    if !writes {
        return has_died(db, pid);
    }
    let logged = db
        .capture_held_commit(&mut st, &HeldCommit { offset, header })
        .map_err(|e| errno_of(db, "commit", &e))?;
    if let Some(logged) = logged {
        db.expect_sync(&mut st, logged);
    }
    Ok(db.hold_of(&st, logged, false).map_or(Answer::Now(0), Answer::WhenAcknowledged))
}

/// The database is about to be removed. That it is gone is noticed afterwards: the removal may fail.
pub fn will_drop(db: &Arc<Database>) -> Result<Answer, i32> {
    if !db.shared().is_writable() {
        return Err(libc::EROFS);
    }
    let mut st = db.state();
    db.follow_wal(&mut st).map_err(|e| errno_of(db, "remove", &e))?;
    Ok(Answer::Now(0))
}

/// The database is about to be moved away, or another file to be moved over it. Its asker has it attached for this alone.
pub fn will_move(db: &Arc<Database>) -> Result<Answer, i32> {
    // Whoever has just closed it may not have been heard of yet.
    let deadline = Instant::now() + CLOSE_PATIENCE;
    while db.state().handles > 1 {
        if Instant::now() > deadline {
            return Err(libc::EBUSY);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    will_drop(db)
}

/// Another file has taken the place of the database.
pub fn was_replaced(db: &Arc<Database>) -> Result<Answer, i32> {
    let mut st = db.state();
    if db.paths().database.is_dir() {
        // A directory of databases, which are found there.
        return Ok(Answer::Now(0));
    }
    note_replaced(db, &mut st);
    st.forget_journal_mode();
    st.rollback.mark_unknown();
    if !db.is_complete_database() || db.paths().wal.exists() {
        // Taken in when nobody writes to it any more.
        return Ok(Answer::Now(0));
    }
    db.capture_rollback(&mut st).map_err(|e| errno_of(db, "rename", &e))?;
    Ok(Answer::Now(0))
}

/// Logs a drop if the file of a database is gone.
pub fn note_removed(db: &Arc<Database>) {
    let mut st = db.state();
    if st.page_count == 0 || st.check_health().is_err() || db.paths().database.exists() {
        return;
    }
    match db.log_drop(&mut st) {
        Ok(()) => tracing::info!(database = %db.name(), "the database was removed"),
        Err(CaptureError::NotPrimary) => {}
        Err(error) => tracing::error!(database = %db.name(), %error, "its removal cannot be logged yet"),
    }
}

/// What became of a file that may have been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// It is as this agent knows it.
    Known,
    /// Somebody is at work there.
    Later,
    /// Somebody without the library has written to it.
    Foreign,
}

/// Whether somebody is in a transaction without WAL.
fn is_being_written(db: &Database) -> bool {
    let held = |file: File| locks::conflicting_holder(&file, LockKind::Write, locks::RESERVED);
    File::open(&db.paths().database).and_then(held).is_ok_and(|holder| holder.is_some())
}

/// On a replica: whether a file whose WAL does not tell is as this agent has left it.
pub fn look_at_replica(db: &Arc<Database>) -> Look {
    let Some(_side) = db.apply.try_lock() else { return Look::Later };
    let mut st = db.state();
    if st.check_health().is_err() {
        return Look::Known;
    }
    db.load_journal_mode(&mut st);
    let known = st.suspect;
    db.look_for_foreign_writes(&mut st);
    if st.suspect.is_some() && is_being_written(db) {
        // Whose journal is there, and what is left behind, is known when they are done.
        st.suspect = known;
        return Look::Later;
    }
    // Pages of a transaction that was refused with the end of the term are there until somebody plays its journal back,
    // as SQLite leaves that to whoever comes next.
    if st.suspect.is_some() && (st.applied.position != st.position || db.has_hot_journal()) {
        return Look::Later;
    }
    db.check_applied(&mut st);
    if st.quarantine_reason().is_some() { Look::Foreign } else { Look::Known }
}

/// A file was written by somebody without the library, or seems to be: it is looked at when nobody writes it.
pub fn note_foreign_write(db: &Arc<Database>) -> Look {
    let mut st = db.state();
    if db.is_lent() {
        // The agent writes it, for the host that has it.
        return Look::Later;
    }
    // A transaction that the library reports is on its way, or has just been.
    let recent = st.handles > 0 && unix_ms() - st.last_change_ms < 1000;
    if st.check_health().is_err() || st.rollback.is_dirty() {
        return Look::Known;
    }
    if recent {
        let unseen = !db.load_journal_mode(&mut st) && db.has_unseen_transactions(&mut st, 0).unwrap_or(true);
        return if unseen { Look::Later } else { Look::Known };
    }
    note_replaced(db, &mut st);
    if !st.rollback.is_dirty() && st.page_count > 0 {
        if !st.stamp_changed(db).unwrap_or(false) {
            return Look::Known;
        }
        if is_being_written(db) {
            return Look::Later;
        }
    }
    st.forget_journal_mode();
    if !db.load_journal_mode(&mut st) {
        // Captured when nobody is in a transaction: see the sweep.
        st.rollback.mark_unknown();
        return Look::Foreign;
    }
    let before = st.position;
    match capture_checkpointed(db, &mut st) {
        Ok(()) => st.suspect = None,
        // The term has just ended: it is looked at as on a replica.
        Err(CaptureError::NotPrimary) => {}
        Err(CaptureError::InUse) => return Look::Later,
        // A file that is being written: looked at again when it changes.
        Err(CaptureError::NotADatabase(_)) if st.page_count == 0 => st.rollback = Default::default(),
        Err(error) => tracing::error!(
            database = %db.name(),
            %error,
            "what was written without the preload library cannot be captured"
        ),
    }
    if st.position == before { Look::Known } else { Look::Foreign }
}

/// On a primary: what is in WAL and file and not in the log becomes a transaction, as what its applications have committed
/// while no agent ran, after a commit of another host. Until then the database is not lent: that host would not have it.
pub fn capture_suspect(db: &Arc<Database>) {
    let deadline = Instant::now() + SUSPECT_PATIENCE;
    loop {
        let mut st = db.state();
        match capture_checkpointed(db, &mut st) {
            Ok(()) => return st.suspect = None,
            // Somebody connects, or moves frames to the file: that takes moments.
            Err(CaptureError::InUse) if Instant::now() < deadline => {}
            // The term has ended: it is looked at as on a replica.
            Err(CaptureError::NotPrimary) => return,
            Err(error) => {
                tracing::warn!(
                    database = %db.name(),
                    %error,
                    "what applications committed while no agent ran is captured with the next commit only"
                );
                return db.put_back_suspect(&mut st);
            }
        }
        drop(st);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A database in WAL mode has no WAL any more: all that was committed is in its file.
fn capture_checkpointed(db: &Arc<Database>, st: &mut State) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Io { path: db.paths().database.clone(), source };
    let file = Arc::new(File::open(&db.paths().database).map_err(failed)?);
    // As a connection: with another one nobody can leave WAL mode, or move frames to the file as the last one.
    let Some(_shared) = LockGuard::try_acquire(&file, LockKind::Read, locks::SHARED).map_err(failed)? else {
        return Err(CaptureError::InUse);
    };
    let stamp = || file.metadata().map(|m| (m.mtime(), m.mtime_nsec(), m.len())).map_err(failed);
    let begun = stamp()?;
    // Somebody may come, commit, and checkpoint into the file that is being read.
    let is_checkpointed = || {
        if db.has_wal() || stamp()? != begun { Err(CaptureError::InUse) } else { Ok(()) }
    };
    if is_checkpointed().is_err() {
        st.rollback = Default::default();
        return db.capture_file_under_wal(st);
    }
    st.wal.reset();
    st.rollback.mark_unknown();
    let captured = db.capture_rollback_while(st, &is_checkpointed);
    match captured {
        Ok(_) => st.wal.forget_put_back(),
        Err(_) => st.rollback = Default::default(),
    }
    captured.map(|_| ())
}
