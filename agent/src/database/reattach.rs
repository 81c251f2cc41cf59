//! Taking up databases whose applications have outlived the agent: nothing in SQLite's files is changed, no inode is
//! new, and whatever an application was in the middle of goes on.
//!
//! The log is the truth here as in [`super::recovery`], but the files are believed to be what they are: the last agent
//! let a commit through only when the log had it, and what it had not answered is asked again. So the position is the
//! log's last one; the page checksums are brought there if they are not; what the doors knew of WAL and journal is
//! read from these. Transactions that came from a primary and may not be in the files yet are applied again, all at
//! once, so that no reader sees an older state.

use super::checksums::Mark;
use super::follow::Suspicion;
use super::receive::{PayloadReader, read_page_checksums};
use super::recovery::{RecoveryError, WAL_IS_FROM_THE_LOG, failed, mark_of};
use super::{Database, State};
use crate::apply::ApplyError;
use crate::capture::ChecksumOrEmpty;
use crate::capture::wal::{Known, Newest};
use crate::door::fuse::CACHE_AHEAD_BYTES;
use crate::log::{RecordInfo, RecordKind};
use ltx::{Checksum, Txid};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

impl Database {
    /// Sets the state of a database that may be in use. The caller has recovered the log, which made it durable.
    pub fn reattach(&self) -> Result<(), RecoveryError> {
        let mut side = self.apply.lock();
        let mut st = self.state();
        let last = self.shared.log.last(&self.name);
        // The last agent was there then: before this one has opened it.
        let last_written = modified(&self.paths.checksums);
        let (mark, intact) = self.open_or_reset_checksums(&mut st, last.as_ref())?;
        if !intact {
            return Err(RecoveryError(
                "its page checksums are lost, and applications may have it open; stop them and restart the agent".into(),
            ));
        }
        let target = match &last {
            Some(last) if last.max_txid >= mark.position.txid => mark_of(last),
            Some(last) => {
                self.continue_after_lost_records(last, mark)?;
                mark
            }
            None => mark,
        };
        st.position = target.position;
        st.page_size = target.page_size;
        st.page_count = target.page_count;
        st.applied = target;
        st.asked_again = true;
        st.last_change_ms = last.as_ref().map_or(0, |r| r.timestamp_ms);
        st.logged_end = last.as_ref().map_or_else(Default::default, RecordInfo::end);
        self.set_durable_position(target.position);
        if target.position.txid.0 == 0 {
            // A file that is being written, and becomes a database when it is complete.
            self.reattach_wal(&mut st, None)?;
            self.reattach_journal(&mut st, None)?;
            st.rollback.mark_unknown();
            return Ok(());
        }
        let unmarked = self.records_after(mark, &last)?;
        self.bring_checksums_to(&mut st, &unmarked, target)?;
        if let Some(reset) = unmarked.iter().rfind(|r| r.kind == RecordKind::Reset)
            && self.staged_path(reset.max_txid).exists()
        {
            return Err(RecoveryError("the last agent died while it installed a snapshot".into()));
        }
        if last.as_ref().is_some_and(|r| r.wal == Some(WAL_IS_FROM_THE_LOG)) {
            // What is not applied yet waits until the mount is served: see [`Database::apply_again_later`].
            st.applied = st.checksums().applied().unwrap_or(mark);
            let applied = st.applied.position;
            let waiting = match unmarked.iter().rposition(|r| mark_of(r).position == applied) {
                Some(newest) => &unmarked[newest + 1..],
                None if applied == mark.position => &unmarked[..],
                None => {
                    st.applied = mark;
                    &unmarked[..]
                }
            };
            side.pending = waiting.iter().map(|record| (record.clone(), None)).collect();
        }
        let from_primary =
            |last: &RecordInfo| last.wal == Some(WAL_IS_FROM_THE_LOG) || last.kind == RecordKind::Reset;
        if self.shared.wals_may_be_ahead() && last.as_ref().is_some_and(from_primary) {
            // Plain files can be written without this agent, and may have been while none ran. In WAL mode the file is
            // as old as the last checkpoint; of what is in the WAL, that itself tells.
            let suspect = !self.load_journal_mode(&mut st) || self.is_written_since(last_written);
            st.suspect = suspect.then_some(Suspicion::ForeignWrite);
        }
        self.reattach_wal(&mut st, last.as_ref())?;
        self.reattach_journal(&mut st, last.as_ref())?;
        if st.marked != st.position {
            self.shared.mark_later(&self.name);
        }
        tracing::debug!(database = %self.name, position = %st.position, waiting = side.pending.len(), "taken up");
        self.close_idle(&mut st);
        Ok(())
    }

    /// Whether the file was written at or after a moment; also where that cannot be told.
    fn is_written_since(&self, moment: Option<(i64, i64)>) -> bool {
        match (modified(&self.paths.database), moment) {
            (Some(written), Some(moment)) => written >= moment,
            _ => true,
        }
    }

    /// Transactions that came from a primary wait to be applied; to be asked once applications are served.
    pub fn apply_again_later(&self) {
        if !self.apply.lock().pending.is_empty() {
            self.shared.pending_again(&self.name);
        }
    }

    /// Whether there is the journal of a transaction that the last agent was applying, and of which readers must see
    /// nothing. On a replica nobody else writes journals.
    pub fn has_journal_of_dead_apply(&self) -> bool {
        !self.may_write() && self.state().rollback.journal_active
    }

    /// Takes back what the last agent has applied in part. Readers that are about to look whether the journal is hot may
    /// be connected; nobody can have read anything. Goes through the mount: never on a thread that serves it.
    pub fn roll_back_dead_apply(&self) -> Result<(), ApplyError> {
        let side = self.apply.lock();
        if self.has_journal_of_dead_apply() && side.applier.roll_back_under_readers()? {
            self.state().rollback.played_back();
        }
        Ok(())
    }

    /// Records of the log after the mark, oldest first.
    pub(super) fn records_after(
        &self,
        mark: Mark,
        last: &Option<RecordInfo>,
    ) -> Result<Vec<RecordInfo>, RecoveryError> {
        let Some(last) = last else { return Ok(Vec::new()) };
        let mut records = Vec::new();
        let mut next = match self.replay_from(Some(last), mark)? {
            Some(first) => first,
            None => return Ok(records),
        };
        while next <= last.max_txid {
            let found = self.shared.log.find(&self.name, next).map_err(failed)?;
            let record = found.ok_or_else(|| {
                RecoveryError(format!("the log lacks transaction {next}, which its page checksums need"))
            })?;
            next = Txid(record.max_txid.0 + 1);
            records.push(record);
        }
        Ok(records)
    }

    /// The last agent stored the page checksums of a record after it was logged.
    fn bring_checksums_to(
        &self,
        st: &mut State,
        unmarked: &[RecordInfo],
        target: Mark,
    ) -> Result<(), RecoveryError> {
        let expected = target.position.checksum_or_empty();
        let sums = st.open_checksums(self).map_err(failed)?;
        sums.reserve(target.page_count).map_err(failed)?;
        sums.truncate(target.page_count);
        if sums.fold(target.page_count) == expected {
            return Ok(());
        }
        let mut page_size = None;
        for record in unmarked.iter().filter(|r| r.kind == RecordKind::Transaction) {
            let resized = page_size.replace(record.page_size).is_some_and(|size| size != record.page_size);
            sums.reserve(record.commit).map_err(failed)?;
            sums.truncate(if resized { 0 } else { record.commit });
            if record.commit > 0 {
                let payload = PayloadReader::of(&self.shared.log, record);
                let (_, pages, _) = read_page_checksums(payload).map_err(failed)?;
                pages.iter().for_each(|(pgno, sum)| sums.set(*pgno, Some(*sum)));
            }
        }
        sums.truncate(target.page_count);
        match sums.fold(target.page_count) {
            folded if folded == expected => Ok(()),
            folded => Err(RecoveryError(format!(
                "its page checksums add up to {folded}, but the log says {expected} at transaction {}; stop the \
                 applications and restart the agent, which then rebuilds them",
                target.position.txid
            ))),
        }
    }

    fn reattach_wal(&self, st: &mut State, last: Option<&RecordInfo>) -> Result<(), RecoveryError> {
        st.wal.reset();
        st.wal_cached_end = 0;
        let file = match File::options().read(true).write(true).open(&self.paths.wal) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(RecoveryError(format!("cannot open {}: {e}", self.paths.wal.display()))),
        };
        // The kernel's cache may have pages ahead of the file. A file that were shorter now would have it cut them, and
        // zero what a write that waits to be asked again has in them.
        let len = file.metadata().map_err(failed)?.len();
        if len > 0 {
            st.wal_cached_end = len.next_multiple_of(4096) + CACHE_AHEAD_BYTES;
        }
        let (known, captured) = self.known_of_wal(last)?;
        let mut wal = std::mem::take(&mut st.wal);
        let reattached = match &known {
            Known::CapturedTo { .. } => {
                let sums = st.open_checksums(self).map_err(failed)?;
                wal.reattach(&file, known, &|pgno| sums.get(pgno))
            }
            Known::Nothing | Known::FromLog => wal.reattach(&file, known, &|_| None),
        };
        reattached.map_err(failed)?;
        if let Some(record) = captured {
            wal.put_back_later(self.pages_of(&record)?);
        }
        st.wal = wal;
        Ok(())
    }

    /// The newest record that says something of the WAL.
    fn known_of_wal(&self, last: Option<&RecordInfo>) -> Result<(Known, Option<RecordInfo>), RecoveryError> {
        let mut newest = true;
        let mut record = last.cloned();
        while let Some(info) = record {
            match info.wal {
                Some(WAL_IS_FROM_THE_LOG) => return Ok((Known::FromLog, None)),
                Some(end) => {
                    let before = self.record_before(&info)?;
                    let start = before.as_ref().and_then(|r| r.wal).filter(|w| *w != WAL_IS_FROM_THE_LOG);
                    let newest = newest.then(|| Newest {
                        start: start
                            .filter(|w| (w.salt1, w.salt2) == (end.salt1, end.salt2))
                            .map(|w| w.end_offset),
                        after: before.as_ref().map_or_else(Mark::default, mark_of),
                    });
                    return Ok((Known::CapturedTo { end, newest }, Some(info)));
                }
                None if info.kind == RecordKind::Reset => return Ok((Known::Nothing, None)),
                None => record = self.record_before(&info)?,
            }
            newest = false;
        }
        Ok((Known::Nothing, None))
    }

    fn record_before(&self, record: &RecordInfo) -> Result<Option<RecordInfo>, RecoveryError> {
        match record.min_txid.0 {
            0 | 1 => Ok(None),
            txid => self.shared.log.find(&self.name, Txid(txid - 1)).map_err(failed),
        }
    }

    pub(super) fn pages_of(&self, record: &RecordInfo) -> Result<BTreeSet<u32>, RecoveryError> {
        let payload = PayloadReader::of(&self.shared.log, record);
        let (_, pages, _): (_, Vec<(u32, Checksum)>, _) = read_page_checksums(payload).map_err(failed)?;
        Ok(pages.into_iter().map(|(pgno, _)| pgno).collect())
    }

    /// A transaction in a rollback mode may be running, or a file may have been written without a journal.
    fn reattach_journal(&self, st: &mut State, last: Option<&RecordInfo>) -> Result<(), RecoveryError> {
        st.rollback = Default::default();
        let active = match File::open(&self.paths.journal) {
            Ok(journal) => sqlite_file::journal::is_hot(&journal).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) => {
                return Err(RecoveryError(format!("cannot open {}: {e}", self.paths.journal.display())));
            }
        };
        if active {
            st.rollback.journal_active = true;
            // Whether the application synced it is not known: its commit waits for the log.
            st.rollback.synced = true;
            st.rollback.directory_owed = true;
        }
        let unlogged = last.is_some() && st.open_checksums(self).map_err(failed)?.may_have_unlogged_writes();
        if active || unlogged || last.is_some_and(|last| self.written_after(last)) {
            st.rollback.mark_unknown();
        }
        Ok(())
    }
}

/// When a file was last written.
fn modified(path: &Path) -> Option<(i64, i64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.mtime(), metadata.mtime_nsec()))
}
