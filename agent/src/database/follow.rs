//! Following what applications commit without the agent seeing their writes: the preload door's side of a database.

use super::recovery::WAL_IS_FROM_THE_LOG;
use super::{Database, State};
use crate::apply::{WalFrames, WalLeft, has_frames_beyond};
use crate::capture::wal::published::{self, HeldCommit};
use crate::capture::{CaptureError, Logged};
use sqlite_file::header::{DatabaseHeader, HEADER_BYTES};
use sqlite_file::locks::{LockGuard, LockKind, WAL_CHECKPOINT};
use sqlite_file::untimed::Untimed;
use sqlite_file::wal::{FRAME_HEADER_BYTES, Salts, Scanner, WalEnd, WalError, WalHeader};
use sqlite_file::wal_index::IndexHeader;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a checkpoint that is running is waited for.
const CHECKPOINT_PATIENCE: Duration = Duration::from_millis(200);

/// What SQLite makes of a WAL that is empty or not there.
const NO_WAL: WalFrames = (Salts([0; 8]), 0);

/// Open files of a WAL that is followed.
#[derive(Debug, Default)]
pub struct Followed {
    wal: Option<Arc<File>>,
    index: Option<Arc<File>>,
    /// How far a WAL without a wal-index was read.
    scanned: Option<(WalHeader, WalEnd)>,
}

/// Why the file of a replica may not be what the log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspicion {
    /// It was written to, and not through the library.
    ForeignWrite,
    /// A transaction was taken back: SQLite does not restore pages that it took from the free list.
    TakenBack,
}

impl std::fmt::Display for Suspicion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Suspicion::ForeignWrite => "somebody wrote to it on this replica without the preload library",
            Suspicion::TakenBack => {
                "a transaction that was taken back has left its content in pages from the free list"
            }
        })
    }
}

/// What others have done to the WAL of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ForeignUse {
    None,
    /// There are frames of theirs, in the generation that the agent has left or in a new one.
    Committed,
    /// They have begun it anew (`wal_checkpoint(RESTART)` or `TRUNCATE`): what was in it before is not known. Its salts now.
    Restarted(Salts),
}

impl Database {
    /// Captures what is published in the WAL and not in the log. Does nothing where a door sees the writes itself.
    pub fn follow_wal(&self, st: &mut State) -> Result<Option<Logged>, CaptureError> {
        if !self.shared.follows_wals() || !self.shared.is_writable() || self.is_lent() {
            return Ok(None);
        }
        st.check_health()?;
        let mut followed = std::mem::take(&mut st.followed);
        let result = self.follow(st, &mut followed);
        st.followed = followed;
        result
    }

    /// As [`Database::follow_wal`], by the WAL itself: for a database that a process has for itself, which may publish
    /// what it has committed a moment later.
    pub fn follow_file(&self, st: &mut State) -> Result<Option<Logged>, CaptureError> {
        if !self.shared.follows_wals() || !self.shared.is_writable() || self.is_lent() {
            return Ok(None);
        }
        st.check_health()?;
        let mut followed = std::mem::take(&mut st.followed);
        let result = (|| {
            let there = followed.open(self)?;
            match (followed.scan(self)?, &followed.wal) {
                (Some(index), Some(wal)) if there => published::capture_published(self, st, wal, &index),
                _ => Ok(None),
            }
        })();
        st.followed = followed;
        result
    }

    fn follow(&self, st: &mut State, followed: &mut Followed) -> Result<Option<Logged>, CaptureError> {
        let put_back = st.wal.puts_pages_back();
        match self.follow_once(st, followed)? {
            // A WAL that nobody has announced.
            None if !put_back && st.wal.puts_pages_back() => self.follow_once(st, followed),
            logged => Ok(logged),
        }
    }

    fn follow_once(&self, st: &mut State, followed: &mut Followed) -> Result<Option<Logged>, CaptureError> {
        if !followed.open(self)? {
            if st.wal.has_ended() {
                st.wal.reset();
            }
            return Ok(None);
        }
        let _checkpoints = match &followed.index {
            Some(index) if st.wal.puts_pages_back() => Some(self.hold_off_checkpoints(index)?),
            _ => None,
        };
        let published = match &followed.index {
            Some(index) => IndexHeader::read(index).map_err(|e| self.shm_error(e))?,
            None => None,
        };
        let index = match published {
            Some(index) => index,
            // `locking_mode=EXCLUSIVE` keeps the wal-index in the application's memory: the file itself has to tell.
            None if followed.index.is_none() => match followed.scan(self)? {
                Some(index) => index,
                None => return Ok(None),
            },
            // Somebody writes it: who does rings again.
            None => return Ok(None),
        };
        let Some(wal) = &followed.wal else { return Ok(None) };
        published::capture_published(self, st, wal, &index)
    }

    /// Keeps pages from being moved from the WAL to the file.
    fn hold_off_checkpoints(&self, index: &Arc<File>) -> Result<LockGuard, CaptureError> {
        let deadline = Instant::now() + CHECKPOINT_PATIENCE;
        loop {
            let lock = LockGuard::try_acquire(index, LockKind::Read, WAL_CHECKPOINT);
            if let Some(lock) = lock.map_err(|e| self.shm_error(e))? {
                return Ok(lock);
            }
            if Instant::now() > deadline {
                return Err(CaptureError::InUse);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Somebody has written to the file of a database in WAL mode without being seen, and others use it already: what WAL
    /// and file are together becomes a transaction. Where the WAL has nothing yet, it is part of the next one.
    pub(crate) fn capture_file_under_wal(&self, st: &mut State) -> Result<(), CaptureError> {
        st.wal.put_back((1..=st.page_count).collect());
        st.remember_stamp(self)?;
        let mut followed = std::mem::take(&mut st.followed);
        let result = (|| {
            if self.follow(st, &mut followed)?.is_some() {
                return Ok(());
            }
            let (Some(wal), Some(index)) = (&followed.wal, &followed.index) else { return Ok(()) };
            let _checkpoints = self.hold_off_checkpoints(index)?;
            let published = IndexHeader::read(index).map_err(|e| self.shm_error(e))?;
            let frames = published.map(|index| (index.salts, index.max_frame));
            if frames.is_some() && frames == st.wal.captured_frames() {
                published::capture_put_back(self, st, wal, st.page_count)?;
            }
            Ok(())
        })();
        st.followed = followed;
        result
    }

    /// What the last agent knew of the WAL says nothing of commits after it: all that is published is looked at again. What
    /// the log has makes no transaction.
    pub fn follow_from_the_start(&self) {
        let applied = self.shared.log.last(&self.name).is_some_and(|r| r.wal == Some(WAL_IS_FROM_THE_LOG));
        let mut st = self.state();
        st.wal.reset();
        st.followed = Followed::default();
        if applied {
            st.wal.mark_written_from_log();
        }
    }

    /// Captures what applications committed in a WAL after the last agent had died, whatever this node becomes: as a
    /// primary it goes on from there, as a replica it has transactions of its own, which are kept as files and reported.
    pub fn capture_left_in_wal(&self) -> Result<(), CaptureError> {
        let applied = self.shared.log.last(&self.name).is_some_and(|r| r.wal == Some(WAL_IS_FROM_THE_LOG));
        self.follow_from_the_start();
        if applied {
            // It was a replica, and what is in the WAL came from its primary, or from somebody who had no agent.
            return self.look_at_wal_left_on_replica();
        }
        let mut st = self.state();
        st.ahead = true;
        // The newest transaction of the log may have been held, and its writer have died before it was published: what
        // of it is not in the WAL is put back by the next transaction.
        st.wal.reset();
        let unpublished = std::mem::take(&mut st.wal);
        let mut followed = Followed::default();
        let result = self.follow(&mut st, &mut followed);
        st.followed = followed;
        st.ahead = false;
        st.wal.put_back_of(unpublished);
        result.map(|_| ())
    }

    /// Whether the WAL has pages that the log does not.
    fn look_at_wal_left_on_replica(&self) -> Result<(), CaptureError> {
        let side = self.apply.lock();
        let mut st = self.state();
        let mut unapplied = BTreeSet::new();
        for (record, _) in &side.pending {
            unapplied.extend(self.pages_of(record).map_err(|e| self.wal_error(io::Error::other(e)))?);
        }
        let wal = self.refreshed_wal(&mut st)?;
        if side.pending.is_empty() {
            // Else the newest of them may be in the WAL already, or be published just now: see [`super::halt`].
            let index = self.published_index(&mut st)?;
            if wal.is_some() {
                st.applied_frames = index.map(|index| (index.salts, index.max_frame));
            } else {
                self.remember_detached(&mut st, WalLeft::Gone { had: None });
            }
        }
        let Some(wal) = wal else { return Ok(()) };
        let mut page = vec![0; st.page_size as usize];
        st.open_checksums(self)?;
        let pages: Vec<u32> = st.wal.committed_pages().filter(|pgno| !unapplied.contains(pgno)).collect();
        for pgno in pages {
            let Some(offset) = st.wal.frame_of(pgno) else { continue };
            wal.read_exact_at(&mut page, offset + FRAME_HEADER_BYTES as u64)
                .map_err(|e| self.wal_error(e))?;
            if st.checksums().get(pgno) != Some(ltx::page_checksum(pgno, &page)) {
                st.suspect = Some(Suspicion::ForeignWrite);
                break;
            }
        }
        Ok(())
    }

    /// The WAL, where there is one, and in the state what it has by now.
    fn refreshed_wal(&self, st: &mut State) -> Result<Option<File>, CaptureError> {
        let wal = match File::open(&self.paths.wal) {
            Ok(wal) => wal,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                st.wal.reset();
                return Ok(None);
            }
            Err(error) => return Err(self.wal_error(error)),
        };
        st.wal.mark_written_from_log();
        st.wal.refresh(&wal).map_err(|e| self.wal_error(e))?;
        st.wal.mark_written_from_log();
        Ok(Some(wal))
    }

    /// Whether WAL and file together are what the log has. Nothing is being applied.
    pub(super) fn is_wal_as_logged(&self, st: &mut State) -> Result<bool, CaptureError> {
        let wal = self.refreshed_wal(st)?;
        let file = st.database_file(self)?;
        st.open_checksums(self)?;
        let lock_page = ltx::lock_page(st.page_size);
        let mut page = vec![0; st.page_size as usize];
        for pgno in (1..=st.page_count).filter(|pgno| *pgno != lock_page) {
            match (&wal, st.wal.frame_of(pgno)) {
                (Some(wal), Some(offset)) => wal
                    .read_exact_at(&mut page, offset + FRAME_HEADER_BYTES as u64)
                    .map_err(|e| self.wal_error(e))?,
                _ => self.read_database_page(&file, pgno, &mut page)?,
            }
            if st.checksums().get(pgno) != Some(ltx::page_checksum(pgno, &page)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What others than the log, and applications under this agent's eyes, have done to the WAL. To be asked before
    /// transactions of a primary are added. After a restart the database is suspect: [`Self::check_applied`] compares it.
    pub(crate) fn foreign_use_of_wal(&self, st: &mut State) -> Result<ForeignUse, CaptureError> {
        if !self.shared.follows_wals() {
            return Ok(ForeignUse::None);
        }
        let Some(index) = self.published_index(st)? else { return Ok(ForeignUse::None) };
        let Some(known) = self.known_frames(st) else { return Ok(ForeignUse::None) };
        let there = (index.salts, index.max_frame);
        if has_frames_beyond(known, there) {
            return Ok(ForeignUse::Committed);
        }
        // Where there was no WAL, the file's stamp tells whether frames of one were moved there.
        if known.0 == there.0 || known == NO_WAL {
            return Ok(ForeignUse::None);
        }
        st.suspect.get_or_insert(Suspicion::ForeignWrite);
        Ok(ForeignUse::Restarted(index.salts))
    }

    /// On a node that has become primary: applications may have committed since this agent has looked at what its WAL has
    /// from another host, which nothing but that look tells from it.
    pub(crate) fn suspect_commits_since_applied(&self) -> Result<(), CaptureError> {
        let mut st = self.state();
        let Some((_, frames)) = st.applied_frames else { return Ok(()) };
        // Where there was no WAL: one that has come and gone again.
        self.look_for_foreign_writes(&mut st);
        let gone = frames > 0 && self.published_index(&mut st)?.is_none();
        if gone || self.foreign_use_of_wal(&mut st)? == ForeignUse::Committed {
            st.suspect.get_or_insert(Suspicion::ForeignWrite);
        }
        st.applied_frames = None;
        Ok(())
    }

    /// What a followed WAL has, if nobody but the log and applications under this agent's eyes has committed there.
    pub(crate) fn known_frames(&self, st: &State) -> Option<WalFrames> {
        let known = st.applied_frames.or_else(|| st.wal.captured_frames());
        known.filter(|_| self.shared.follows_wals())
    }

    /// The agent itself has written to the database's files what came from a primary, or has tried to.
    pub(crate) fn remember_applied_frames(&self, st: &mut State, left: WalLeft) {
        self.note_wal_left(st, left);
        st.change_counter = None;
        st.wal.mark_written_from_log();
    }

    fn note_wal_left(&self, st: &mut State, left: WalLeft) {
        // While an agent starts its door is not open yet.
        if !self.shared.follows_wals() && !self.shared.wals_may_be_ahead() {
            return;
        }
        match left {
            // Whoever had the write lock may publish by it what the log has already, as when its agent died meanwhile.
            WalLeft::Untouched => {}
            WalLeft::Published(frames) => st.applied_frames = Some(frames),
            WalLeft::Gone { had } => {
                let of_others = match (self.known_frames(st), had) {
                    (None, _) => false,
                    (Some(known), Some(had)) => {
                        has_frames_beyond(known, had) || known.0 != had.0 && known != NO_WAL
                    }
                    // Who removed it has moved to the file what it had.
                    (Some(_), None) => st.applied_frames.is_some_and(|(_, frames)| frames > 0),
                };
                if of_others {
                    st.suspect.get_or_insert(Suspicion::ForeignWrite);
                }
                st.applied_frames = Some(NO_WAL);
            }
        }
    }

    /// Nobody is connected, and there is no WAL any more: on a replica what others write from now on is told from the
    /// file's stamp.
    pub(crate) fn remember_detached(&self, st: &mut State, left: WalLeft) {
        let had_one = st.applied_frames != Some(NO_WAL);
        if self.may_write() || !had_one || st.page_count == 0 || !self.load_journal_mode(st) {
            return;
        }
        self.note_wal_left(st, left);
        if st.applied_frames == Some(NO_WAL) && st.remember_stamp(self).is_err() {
            st.applied_frames = None;
        }
    }

    /// On the primary: reads the change counter if it is not known. A first page that is not what the log has was written by
    /// somebody without the library.
    pub(crate) fn learn_change_counter(&self, st: &mut State) -> Result<(), CaptureError> {
        if st.change_counter.is_some() || st.page_count == 0 || !self.shared.is_writable() {
            return Ok(());
        }
        if self.load_journal_mode(st) || st.applied.position != st.position || st.check_health().is_err() {
            return Ok(());
        }
        let mut page = vec![0; st.page_size as usize];
        let file = match st.database_file(self) {
            Err(CaptureError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        self.read_database_page(&file, 1, &mut page)?;
        st.open_checksums(self)?;
        if st.checksums().get(1) == Some(ltx::page_checksum(1, &page)) {
            st.change_counter = DatabaseHeader::parse(&page).ok().map(|header| header.change_counter);
        } else {
            st.rollback.mark_unknown();
        }
        Ok(())
    }

    /// Whether the file's change counter says that there were transactions of others between the newest of the log and
    /// `own` ones. In rollback modes each one adds 1 to it, or nothing with `locking_mode=EXCLUSIVE`.
    pub(crate) fn has_unseen_transactions(&self, st: &mut State, own: u32) -> Result<bool, CaptureError> {
        if st.page_count == 0 {
            return Ok(false);
        }
        let mut first = [0; HEADER_BYTES];
        let file = st.database_file(self)?;
        self.read_at_or_zero(&file, &mut first, 0)?;
        let counter = DatabaseHeader::parse(&first).ok().map(|header| header.change_counter);
        let seen = st.change_counter.zip(counter).is_some_and(|(log, file)| file.wrapping_sub(log) <= own);
        Ok(!seen)
    }

    /// Before transactions of a primary are applied: whether a file whose WAL does not tell is as this agent has left it.
    pub(crate) fn look_for_foreign_writes(&self, st: &mut State) {
        let all_is_in_file = !st.wal_mode || st.applied_frames == Some(NO_WAL);
        let known = self.shared.follows_wals() && all_is_in_file && st.has_stamp() && st.page_count > 0;
        if known && st.suspect.is_none() && st.stamp_changed(self).unwrap_or(true) {
            let taken_back = self.has_hot_journal();
            st.suspect = Some(if taken_back { Suspicion::TakenBack } else { Suspicion::ForeignWrite });
        }
    }

    /// After that: a file that somebody else may have written to is compared with what the log has, and set aside where
    /// it is something else.
    pub(crate) fn check_applied(&self, st: &mut State) {
        if st.page_count == 0 {
            (st.suspect, st.stamp) = (None, None);
            return;
        }
        let followed = self.shared.follows_wals();
        if followed {
            // A journal that was left has been played back.
            st.rollback = Default::default();
        } else if !st.wal_mode && st.rollback.pages_written() > 0 {
            // The door has seen them written, by a transaction that was refused with the role.
            st.rollback.played_back();
            st.suspect = Some(Suspicion::TakenBack);
        } else {
            // What a starting agent suspects is for the door, which is not open yet.
            if !self.shared.wals_may_be_ahead() {
                st.suspect = None;
            }
            return;
        }
        if let Some(suspicion) = st.suspect.filter(|_| st.applied.position == st.position) {
            // Readers from before a change of the mode have the WAL still, and get what comes through it.
            let as_logged = if st.wal_mode || followed && self.has_wal() {
                self.is_wal_as_logged(st)
            } else {
                if followed {
                    st.rollback.mark_unknown();
                }
                self.is_as_logged(st)
            };
            match as_logged {
                Ok(true) => st.suspect = None,
                Ok(false) => {
                    st.rollback = Default::default();
                    st.suspect = None;
                    let file = self.paths.database.display();
                    st.foreign_content = suspicion == Suspicion::ForeignWrite;
                    let kept =
                        if st.foreign_content { "it is kept (see `litefs diverged`), and " } else { "" };
                    st.quarantine(self, format!("{file}: {suspicion}; {kept}a snapshot takes its place"));
                }
                Err(error) => tracing::warn!(database = %self.name, %error, "cannot compare it with the log"),
            }
        }
        let _ = st.remember_stamp(self);
    }

    /// Whether somebody may have written to the file of a database in WAL mode.
    pub fn is_suspect_in_wal_mode(&self) -> bool {
        let st = self.state();
        st.wal_mode && st.suspect.is_some()
    }

    /// Somebody may have written to it.
    pub(crate) fn suspect_foreign_write(&self) {
        self.state().suspect.get_or_insert(Suspicion::ForeignWrite);
    }

    /// Whether there is a WAL that may have something.
    pub(crate) fn has_wal(&self) -> bool {
        std::fs::metadata(&self.paths.wal).is_ok_and(|wal| wal.len() > 0)
    }

    /// Whether there is the journal of a rollback-mode transaction that has not ended.
    pub(crate) fn has_hot_journal(&self) -> bool {
        File::open(&self.paths.journal)
            .is_ok_and(|journal| sqlite_file::journal::is_hot(&journal).unwrap_or(false))
    }

    fn published_index(&self, st: &mut State) -> Result<Option<IndexHeader>, CaptureError> {
        let mut followed = std::mem::take(&mut st.followed);
        let index = followed.open(self).and_then(|_| match &followed.index {
            Some(index) => IndexHeader::read(index).map_err(|e| self.shm_error(e)),
            None => Ok(None),
        });
        st.followed = followed;
        index
    }

    /// A commit is held: captures it.
    pub fn capture_held_commit(
        &self,
        st: &mut State,
        held: &HeldCommit,
    ) -> Result<Option<Logged>, CaptureError> {
        st.check_health()?;
        let mut followed = std::mem::take(&mut st.followed);
        let result = (|| {
            followed.open(self)?;
            let missing = || self.wal_error(io::Error::from(io::ErrorKind::NotFound));
            let wal = followed.wal.as_ref().ok_or_else(missing)?;
            let index = match &followed.index {
                Some(index) => IndexHeader::read(index).map_err(|e| self.shm_error(e))?,
                None => None,
            };
            published::capture_held(self, st, wal, index.as_ref(), held)
        })();
        st.followed = followed;
        result
    }

    /// The WAL is about to begin anew or to go: afterwards the log has all of it.
    pub fn end_wal(&self, st: &mut State) -> Result<(), CaptureError> {
        self.follow_wal(st)?;
        let mut followed = std::mem::take(&mut st.followed);
        let settled = followed.open(self).and_then(|_| {
            let Some(wal) = &followed.wal else { return Ok(()) };
            // The WAL of a primary has been followed; of one that this host has borrowed each commit was held, and it is
            // looked now whether the last was published.
            if self.lender().is_some()
                && let Some(index) = &followed.index
                && let Some(index) = IndexHeader::read(index).map_err(|e| self.shm_error(e))?
            {
                published::capture_published(self, st, wal, &index)?;
            }
            published::take_back_unpublished(self, st, wal)
        });
        st.followed = followed;
        settled?;
        st.wal.may_end();
        Ok(())
    }

    /// Reads the WAL that transactions of a primary were written to, so that what applications add is told from it.
    pub fn read_applied_wal(&self) -> Result<(), CaptureError> {
        let mut st = self.state();
        st.applied_frames = None;
        let mut followed = std::mem::take(&mut st.followed);
        let read = match followed.open(self) {
            Ok(true) => match &followed.wal {
                Some(wal) => st.wal.refresh(wal).map(|_| ()).map_err(|e| self.wal_error(e)),
                None => Ok(()),
            },
            Ok(false) => {
                st.wal.reset();
                Ok(())
            }
            Err(error) => Err(error),
        };
        st.followed = followed;
        read?;
        self.learn_change_counter(&mut st)?;
        // What somebody else has written becomes a transaction; in WAL mode the door captures it.
        if st.suspect.is_some() && !self.load_journal_mode(&mut st) {
            st.suspect = None;
            st.rollback.mark_unknown();
        }
        Ok(())
    }

    fn shm_error(&self, source: io::Error) -> CaptureError {
        CaptureError::Io { path: self.paths.shm.clone(), source }
    }
}

impl Followed {
    /// Opens what is there; forgets what has been removed. `false`: there is no WAL.
    fn open(&mut self, db: &Database) -> Result<bool, CaptureError> {
        for (file, path) in [(&mut self.wal, &db.paths.wal), (&mut self.index, &db.paths.shm)] {
            if file.as_ref().is_some_and(|f| Untimed::of(f).is_ok_and(|f| f.links == 0)) {
                *file = None;
            }
            if file.is_none() {
                *file = match File::open(path) {
                    Ok(file) => Some(Arc::new(file)),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => None,
                    Err(source) => return Err(CaptureError::Io { path: path.clone(), source }),
                };
            }
        }
        Ok(self.wal.is_some())
    }

    /// What a wal-index of this WAL would say.
    fn scan(&mut self, db: &Database) -> Result<Option<IndexHeader>, CaptureError> {
        let Some(wal) = &self.wal else { return Ok(None) };
        let io = |source| db.wal_error(source);
        let mut scanner = match Scanner::open(wal) {
            Ok(Some(scanner)) => scanner,
            Ok(None) | Err(WalError::Invalid(_) | WalError::Version(_)) => return Ok(None),
            Err(WalError::Io(e)) => return Err(io(e)),
        };
        if let Some((header, end)) = &self.scanned
            && header == scanner.header()
        {
            scanner = Scanner::resume(wal, *header, *end);
        }
        while scanner.next_frame().map_err(io)?.is_some() {}
        let (header, end) = (*scanner.header(), scanner.committed());
        self.scanned = Some((header, end));
        Ok((end.frames > 0).then(|| IndexHeader {
            page_size: header.page_size,
            max_frame: end.frames,
            page_count: end.commit,
            salts: header.salts,
            big_endian: header.big_endian,
            ..IndexHeader::default()
        }))
    }
}

#[cfg(test)]
#[path = "follow_tests.rs"]
pub(crate) mod tests;
