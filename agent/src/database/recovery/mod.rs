//! Recovery at start, before anything is mounted: afterwards each database file is exactly at the log's newest
//! transaction, without journal, WAL or wal-index beside it.
//!
//! The log is the truth. A file may be behind it (the log is made durable first) or ahead of it (what SQLite wrote
//! without a sync, when power failed). In this order:
//!
//! 1. A hot journal is played back as SQLite would, unless its super-journal is gone: then its transaction counts. After a
//!    power failure only pages are that the log knows: the journal may be torn, or one that was removed.
//! 2. Frames of the WAL that the log knows are moved into the file; the others are dropped.
//! 3. The records after the sidecar's mark are written to file and sidecar.
//! 4. Only where something may have been written that the log does not know, all pages are compared: after a hot
//!    journal (SQLite does not restore pages it took from the free list), where a rollback-mode file is newer than its
//!    last record (written without a journal), and after a power failure the databases that were being written. What differs becomes a transaction on the primary.

mod journal;
mod replay;
mod wal;

use super::checksums::{Checksums, ChecksumsError, Mark};
use super::receive::PayloadReader;
use super::{Database, State};
use crate::capture::{CaptureError, ChecksumOrEmpty, unix_ms};
use crate::log::{NewRecord, RecordInfo, RecordKind, WalEnd};
use crate::node::LastStop;
use ltx::{Checksum, Decoder, Pos, Txid};
use sqlite_file::header::DatabaseHeader;
use sqlite_file::journal::is_hot;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

/// Why one database could not be recovered: it is set aside, the others run.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RecoveryError(pub String);

/// Records written by applying have this WAL end: all of the WAL came from the log.
pub const WAL_IS_FROM_THE_LOG: WalEnd = WalEnd { salt1: 0, salt2: 0, end_offset: u64::MAX };

pub(super) use self::wal::known_wal_end;

/// What a recovery found and did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Records written to the files.
    pub replayed: u64,
    /// A hot journal was played back or discarded.
    pub journal: bool,
    /// Committed WAL frames that the log did not know.
    pub dropped_frames: u64,
    /// All pages must be compared before the file is used.
    pub compare: bool,
    /// The file has all that the log has, and maybe more: nothing was written to it.
    pub kept_file: bool,
}

impl Database {
    /// Recovers the files and sets the state.
    pub fn recover(&self, last_stop: LastStop) -> Result<Recovered, RecoveryError> {
        let mut st = self.state();
        let mut done = Recovered::default();
        let last = self.shared.log.last(&self.name);
        let (mark, intact) = self.open_or_reset_checksums(&mut st, last.as_ref())?;
        if !intact {
            done.compare = true;
        }
        let replay_from = self.replay_from(last.as_ref(), mark)?;
        let target = match &last {
            Some(last) if replay_from.is_some() => mark_of(last),
            _ => mark,
        };
        st.position = target.position;
        st.page_size = target.page_size;
        st.page_count = target.page_count;
        st.applied = target;
        st.last_change_ms = last.as_ref().map_or(0, |r| r.timestamp_ms);
        st.logged_end = last.as_ref().map_or_else(Default::default, RecordInfo::end);
        self.set_durable_position(target.position);

        if last_stop != LastStop::PowerFailed {
            self.give_new_inode()?;
        }
        let lost = if last_stop == LastStop::Clean { None } else { self.may_be_lost(last.as_ref()) };
        match &lost {
            Some(damage) if last_stop == LastStop::Killed => {
                return self.recover_from_files(&mut st, last.as_ref(), mark, damage);
            }
            Some(damage) => self.check_wal_is_logged(last.as_ref(), damage)?,
            None => {}
        }
        let behind = replay_from.is_some();
        if let Some(last) = last.as_ref().filter(|r| !behind && r.max_txid < mark.position.txid) {
            self.continue_after_lost_records(last, mark)?;
        }
        let noted = st.page_count > 0
            && intact
            && st.open_checksums(self).map_err(failed)?.may_have_unlogged_writes();
        let written_later = noted || last.as_ref().is_some_and(|last| self.written_after(last));
        done.kept_file = noted && last_stop == LastStop::Killed && self.file_has_all(last.as_ref())?;
        let verified = last_stop == LastStop::PowerFailed
            && intact
            && !noted
            && mark.page_count > 0
            && !self.is_reset_after(mark, target)?;
        let known = match verified {
            true => Some((&*st.open_checksums(self).map_err(failed)?, mark)),
            false => None,
        };
        let journal = self.recover_journal(known, &mut done)?;
        let known_end = known_wal_end(last.as_ref());
        let ahead = self.frames_ahead(last.as_ref(), &known_end)?;
        let wal = self.recover_wal(&known_end, ahead.is_none(), &mut done)?;
        if let Some(first) = replay_from {
            self.replay(&mut st, first, mark, target, &mut done)?;
        }
        done.compare |= last_stop == LastStop::PowerFailed && (behind || wal || journal);
        done.compare |= last_stop != LastStop::Clean && written_later;
        if behind || journal || wal || !intact {
            remove_if_there(&self.paths.shm)?;
            done.compare |= ahead.is_some();
            self.finish(&mut st, target, intact, &done)?;
            tracing::info!(database = %self.name, position = %st.position, ?done, "database recovered");
        }
        if let Some(ahead) = &ahead {
            self.add_frames_ahead(ahead)?;
        }
        if !(behind || journal || wal) && intact && mark.page_count > 0 {
            self.check_file_size(mark)?;
            let expected = mark.position.checksum_or_empty();
            if st.open_checksums(self).map_err(failed)?.fold(mark.page_count) != expected {
                tracing::warn!(database = %self.name, "page checksums are damaged and are rebuilt from the file");
                self.finish(&mut st, target, false, &Recovered::default())?;
            }
        }
        if let Some(damage) = lost.filter(|_| st.page_count > 0)
            && !self.differing_pages(&mut st, 1).map_err(failed)?.is_empty()
        {
            return Err(RecoveryError(format!(
                "the host went down, and what the log had of the last transactions is lost, so the file may have half \
                 of one: {damage}; restore the database from a copy, or let it follow a primary"
            )));
        }
        self.close_idle(&mut st);
        Ok(done)
    }

    /// Whether a file that was written without a journal has every logged transaction, and whatever the log does not
    /// know: then nothing of the log may be written over it. Where a commit was logged and its journal is still there,
    /// the journal goes first. The host did not go down.
    fn file_has_all(&self, last: Option<&RecordInfo>) -> Result<bool, RecoveryError> {
        let Some(file) = open_if_there(&self.paths.database)? else { return Ok(false) };
        let mut first = [0; sqlite_file::header::HEADER_BYTES];
        let rollback = file.read_exact_at(&mut first, 0).is_ok()
            && DatabaseHeader::parse(&first).is_ok_and(|header| !header.is_wal());
        if !rollback || self.has_wal() {
            return Ok(false);
        }
        let Some(journal) = open_if_there(&self.paths.journal)? else { return Ok(true) };
        let transaction = last.filter(|last| last.kind == RecordKind::Transaction && last.commit > 0);
        if let Some(record) = transaction
            && is_hot(&journal).map_err(failed)?
        {
            let mut decoder = Decoder::new(PayloadReader::of(&self.shared.log, record)).map_err(failed)?;
            let (mut page, mut there) = (Vec::new(), Vec::new());
            while let Some(pgno) = decoder.next_page(&mut page).map_err(failed)? {
                there.resize(page.len(), 0);
                self.read_database_page(&file, pgno, &mut there).map_err(failed)?;
                if page != there {
                    return Ok(true);
                }
            }
            remove_if_there(&self.paths.journal)?;
        }
        Ok(true)
    }

    /// Whether a rollback-mode file was written after its last capture, as without a journal.
    pub(super) fn written_after(&self, last: &RecordInfo) -> bool {
        let Ok(file) = File::open(&self.paths.database) else { return false };
        let mut first = [0; sqlite_file::header::HEADER_BYTES];
        let rollback = file.read_exact_at(&mut first, 0).is_ok()
            && DatabaseHeader::parse(&first).is_ok_and(|header| !header.is_wal());
        let modified_ms = file.metadata().map_or(0, |m| m.mtime() * 1000 + m.mtime_nsec() / 1_000_000);
        rollback && modified_ms > last.timestamp_ms
    }

    /// First transaction of the log that the files may lack. A snapshot may have led to a history of its own, with
    /// lower numbers than the mark has: then the mark says nothing, and the files begin anew with it.
    pub(super) fn replay_from(
        &self,
        last: Option<&RecordInfo>,
        mark: Mark,
    ) -> Result<Option<Txid>, RecoveryError> {
        let Some(last) = last else { return Ok(None) };
        if mark_of(last).position == mark.position {
            return Ok(None);
        }
        let log = &self.shared.log;
        let Some((oldest, _)) = log.kept(&self.name).map_err(failed)? else { return Ok(None) };
        let begins = log.find(&self.name, oldest).map_err(failed)?;
        let after_snapshot = begins.is_some_and(|r| r.kind == RecordKind::Reset);
        let known = log.find(&self.name, mark.position.txid).map_err(failed)?;
        let in_history = known.is_some_and(|r| {
            r.max_txid == mark.position.txid && r.post_apply == mark.position.checksum_or_empty()
        });
        if after_snapshot && !in_history {
            return Ok(Some(oldest));
        }
        // What retention removed the files have, unless the mark was lost: the comparison in step 4 tells.
        let next = Txid(mark.position.txid.0 + 1).max(oldest);
        Ok((next <= last.max_txid).then_some(next))
    }

    /// The files are newer than the log, which has lost records (it says where). They are whole at the mark: the
    /// history begins anew there, and followers that are elsewhere get a snapshot.
    pub(super) fn continue_after_lost_records(
        &self,
        last: &RecordInfo,
        mark: Mark,
    ) -> Result<(), RecoveryError> {
        tracing::error!(
            database = %self.name,
            files = %mark.position,
            log = %last.max_txid,
            "the log has lost transactions that the files have; the history goes on from the files"
        );
        self.begin_history_at(Some(last), mark)
    }

    /// Files that are elsewhere than the log are where the history begins anew.
    pub(super) fn begin_history_at(
        &self,
        last: Option<&RecordInfo>,
        mark: Mark,
    ) -> Result<(), RecoveryError> {
        let epoch = self.shared.epoch();
        let record = NewRecord {
            database: &self.name,
            kind: RecordKind::Reset,
            epoch: last.map_or(epoch, |last| last.epoch.max(epoch)),
            min_txid: mark.position.txid,
            max_txid: mark.position.txid,
            pre_apply: last.map_or(Checksum::EMPTY, |last| last.post_apply),
            post_apply: mark.position.checksum_or_empty(),
            page_size: mark.page_size,
            commit: mark.page_count,
            timestamp_ms: unix_ms(),
            wal: None,
            fence: None,
        };
        self.shared.log.append(&record, &[]).map_err(failed)?;
        self.shared.log.request_flush();
        Ok(())
    }

    /// Nothing was to be done: then the file must be as the agent left it.
    fn check_file_size(&self, mark: Mark) -> Result<(), RecoveryError> {
        let expected = u64::from(mark.page_count) * u64::from(mark.page_size);
        let path = &self.paths.database;
        match std::fs::metadata(path) {
            Ok(m) if m.len() == expected => Ok(()),
            Ok(m) => Err(RecoveryError(format!(
                "{} has {} bytes instead of {expected}: it was changed while the agent was stopped; restore it, or let \
                 it follow a primary",
                path.display(),
                m.len()
            ))),
            Err(e) => Err(RecoveryError(format!(
                "{}: {e}; it was removed while the agent was stopped; restore it, or let it follow a primary",
                path.display()
            ))),
        }
    }

    /// Opens the sidecar; one that is missing or damaged is rebuilt from the file once the log has been replayed.
    pub(super) fn open_or_reset_checksums(
        &self,
        st: &mut State,
        last: Option<&RecordInfo>,
    ) -> Result<(Mark, bool), RecoveryError> {
        match Checksums::open(&self.paths.checksums) {
            Ok(sums) => {
                let mark = sums.mark();
                st.set_checksums(sums);
                Ok((mark, true))
            }
            Err(ChecksumsError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && last.is_none() =>
            {
                Ok((Mark::default(), true))
            }
            Err(e) => {
                if last.is_some_and(|r| r.min_txid.0 > 1) {
                    tracing::warn!(database = %self.name, error = %e, "page checksums are rebuilt from the file");
                }
                let sums = Checksums::create(&self.paths.checksums, &self.name).map_err(failed)?;
                st.set_checksums(sums);
                // Everything the log still has is replayed.
                let first = last.is_none_or(|r| r.min_txid.0 == 1);
                Ok((Mark::default(), first))
            }
        }
    }

    /// A connection may have survived the last agent: its passed-through descriptor still reads the database file,
    /// while its locks, WAL and wal-index are those of a dead mount. It keeps the old file, as it is; everybody else
    /// gets a copy. A wal-index or WAL that was left behind says that there may be such a connection.
    fn give_new_inode(&self) -> Result<(), RecoveryError> {
        if !self.paths.database.exists() || !self.paths.shm.exists() && !self.paths.wal.exists() {
            return Ok(());
        }
        let staging = &self.shared.dirs.staging;
        let copy =
            tempfile::Builder::new().prefix("copy-").tempfile_in(staging).map_err(failed)?.into_temp_path();
        // copy(2) by extents where the file system can share them.
        std::fs::copy(&self.paths.database, &copy).map_err(failed)?;
        let from = std::fs::metadata(&self.paths.database).map_err(failed)?;
        std::os::unix::fs::chown(&copy, Some(from.uid()), Some(from.gid())).map_err(failed)?;
        File::open(&copy).and_then(|f| f.sync_all()).map_err(failed)?;
        copy.persist(&self.paths.database).map_err(failed)?;
        Ok(())
    }

    /// Checks the sum of all page checksums, makes the files durable, writes the mark. Where a comparison comes first the
    /// mark stays where it was.
    pub(super) fn finish(
        &self,
        st: &mut State,
        target: Mark,
        intact: bool,
        done: &Recovered,
    ) -> Result<(), RecoveryError> {
        if !intact && st.page_count > 0 {
            self.rebuild_checksums(st, target)?;
        }
        if st.page_count > 0 {
            let file = open_if_there(&self.paths.database)?.ok_or_else(|| {
                RecoveryError(format!(
                    "{} is gone; restore it or let it follow a primary",
                    self.paths.database.display()
                ))
            })?;
            if !done.kept_file {
                file.set_len(u64::from(st.page_count) * u64::from(st.page_size)).map_err(failed)?;
            }
            file.sync_all().map_err(failed)?;
            let mut first = [0; sqlite_file::header::HEADER_BYTES];
            file.read_exact_at(&mut first, 0).map_err(failed)?;
            let header = DatabaseHeader::parse(&first).map_err(failed)?;
            st.set_wal_mode(header.is_wal());
            st.set_database_file(Some(Arc::new(file)));
        }
        if let Some(dir) = self.paths.database.parent().filter(|d| d.exists()) {
            File::open(dir).and_then(|d| d.sync_all()).map_err(failed)?;
        }
        if target.position.txid.0 == 0 {
            return Ok(());
        }
        let epoch = self.newest_record_epoch(st);
        let sums = st.open_checksums(self).map_err(failed)?;
        let folded = sums.fold(target.page_count);
        if folded != target.position.checksum_or_empty() {
            return Err(RecoveryError(format!(
                "its page checksums add up to {folded}, but the log says {} at transaction {}; restore the database \
                 from a copy, or let it follow a primary",
                target.position.checksum, target.position.txid
            )));
        }
        if !done.compare {
            sums.persist(&self.name, target, epoch, true).map_err(failed)?;
            st.marked = target.position;
        }
        Ok(())
    }

    /// Step 4, on the primary once it may write: what differs becomes a transaction. Elsewhere it is damage.
    pub fn compare_after_crash(&self) -> Result<(), CaptureError> {
        let mut st = self.state();
        let differing = self.differing_pages(&mut st, usize::MAX)?;
        if differing.is_empty() {
            drop(st);
            return self.mark_durable();
        }
        if !self.may_write() {
            let reason = format!("{} pages differ from the log after a crash", differing.len());
            st.quarantine(self, reason);
            return Ok(());
        }
        tracing::warn!(
            database = %self.name,
            pages = differing.len(),
            "the file has pages that never reached the log; they become a transaction of their own"
        );
        st.rollback.mark_unknown();
        self.capture_rollback(&mut st)?;
        Ok(())
    }
}

pub(super) fn mark_of(record: &RecordInfo) -> Mark {
    Mark {
        position: Pos { txid: record.max_txid, checksum: record.post_apply },
        page_size: record.page_size,
        page_count: record.commit,
    }
}

pub(crate) fn failed(error: impl std::fmt::Display) -> RecoveryError {
    RecoveryError(error.to_string())
}

pub(super) fn open_if_there(path: &Path) -> Result<Option<File>, RecoveryError> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(RecoveryError(format!("cannot open {}: {e}", path.display()))),
    }
}

pub(crate) fn remove_if_there(path: &Path) -> Result<(), RecoveryError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(RecoveryError(format!("cannot remove {}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}
