//! The follower's side of a database: a record goes to the log first, is made durable, and is then applied the way
//! an SQLite writer would. What readers hold up waits in a queue; the log, and so the acknowledgement, does not.

use super::checksums::Mark;
use super::follow::ForeignUse;
use super::recovery::{RecoveryError, WAL_IS_FROM_THE_LOG, failed};
use super::{Database, State};
use crate::apply::{
    Applier, ApplyError, CheckpointOutcome, DatabaseShape, Durability, LtxTransactions, WriterHold,
};
use crate::capture::{CaptureError, ChecksumOrEmpty};
use crate::log::{CommitLog, Fence, LogError, NewRecord, Payload, RecordInfo, RecordKind};
use crate::ship::engine::{EngineError, RecordPayload, ShippedRecord};
use ltx::{Checksum, Decoder, Header, Pos, page_checksum};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Records that may wait for readers before a follower is told to wait.
const PENDING_MAX: usize = 10_000;

/// What applies transactions to a database. One thread at a time has it.
#[derive(Debug)]
pub struct ApplySide {
    /// Writes through the applications' path.
    pub applier: Applier,
    /// In the log, not yet in the files; oldest first.
    pub pending: VecDeque<(RecordInfo, Option<bytes::Bytes>)>,
    /// The last failure was told.
    told: bool,
}

impl ApplySide {
    pub(crate) fn new(applier: Applier) -> Self {
        ApplySide { applier, pending: VecDeque::new(), told: false }
    }
}

/// The bytes of a record, wherever they are.
#[derive(Debug)]
pub enum PayloadReader {
    /// In memory.
    Bytes(Cursor<bytes::Bytes>),
    /// In a file.
    File(BufReader<File>),
    /// They could not be had; reading says so.
    Failed(Option<io::Error>),
}

impl PayloadReader {
    /// Opens the payload of a record in the log.
    pub fn of(log: &CommitLog, record: &RecordInfo) -> Self {
        let opened = log.read(record).map_err(io::Error::other).and_then(|payload| match payload {
            Payload::Bytes(bytes) => Ok(PayloadReader::Bytes(Cursor::new(bytes))),
            Payload::File { path, .. } => Ok(PayloadReader::File(BufReader::new(File::open(path)?))),
        });
        opened.unwrap_or_else(|e| PayloadReader::Failed(Some(e)))
    }
}

impl Read for PayloadReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            PayloadReader::Bytes(bytes) => bytes.read(buf),
            PayloadReader::File(file) => file.read(buf),
            PayloadReader::Failed(e) => {
                Err(e.take().unwrap_or_else(|| io::Error::other("the record was not read")))
            }
        }
    }
}

impl Database {
    /// Logs consecutive records, makes them durable and applies them, waiting at most `bound` for readers.
    /// `durable` is told as soon as all of them are durable here.
    pub fn receive(
        &self,
        records: Vec<ShippedRecord>,
        bound: Duration,
        durable: &mut dyn FnMut(Pos),
    ) -> Result<Pos, EngineError> {
        let mut side = self.apply.lock();
        self.queue_unapplied(&mut side)?;
        if side.pending.len() > PENDING_MAX {
            self.apply_pending(&mut side, bound);
            if side.pending.len() > PENDING_MAX {
                return Err(EngineError::Busy(self.name.clone()));
            }
        }
        let mut logged = Ok(());
        for record in records {
            logged = self.log_received(&mut side, record, None);
            if logged.is_err() {
                break;
            }
        }
        let (position, end) = {
            let st = self.state();
            (st.position, st.logged_end)
        };
        self.shared.log.wait_durable(end).map_err(other)?;
        self.set_durable_position(position);
        durable(position);
        self.shared.changed(&self.name);
        self.apply_pending(&mut side, bound);
        logged?;
        // At once, not with the next record: a snapshot heals it.
        if let Some(reason) = self.state().quarantine_reason() {
            return Err(EngineError::Quarantined { name: self.name.clone(), reason: reason.to_owned() });
        }
        Ok(position)
    }

    /// Checks a record against the database and appends it to the log.
    /// `fence`: the term in which alone the log takes it.
    pub(super) fn log_received(
        &self,
        side: &mut ApplySide,
        record: ShippedRecord,
        fence: Option<&dyn Fence>,
    ) -> Result<(), EngineError> {
        // Large records are read and synced before the state is held: others look at it.
        let reader: Box<dyn Read> = match &record.payload {
            RecordPayload::Bytes(bytes) => Box::new(Cursor::new(bytes.clone())),
            RecordPayload::File { path, .. } => {
                let file = File::open(path).map_err(other)?;
                file.sync_data().map_err(other)?;
                Box::new(BufReader::new(file))
            }
        };
        let (header, pages, post) = read_page_checksums(reader).map_err(|e| {
            EngineError::Other(format!("a record for {} is damaged on its way: {e}", self.name))
        })?;
        let mut st = self.state();
        if let Some(reason) = st.quarantine_reason() {
            let reason = reason.to_owned();
            return Err(EngineError::Quarantined { name: self.name.clone(), reason });
        }
        let seen = self.shared.epoch();
        if record.epoch > seen {
            return Err(EngineError::OldEpoch { got: seen.0, seen: record.epoch.0 });
        }
        let out_of_sequence = |position| EngineError::OutOfSequence {
            name: self.name.clone(),
            min_txid: record.min_txid,
            max_txid: record.max_txid,
            position,
        };
        if record.max_txid <= st.position.txid && fence.is_none() && self.is_logged(&record)? {
            // This node committed it itself, under a halt lock; the stream brings it like all others.
            return Ok(());
        }
        if record.min_txid.0 != st.position.txid.0 + 1 {
            return Err(out_of_sequence(st.position));
        }
        let first = header.min_txid.0 == 1;
        if header.min_txid != record.min_txid
            || header.max_txid != record.max_txid
            || !first && header.pre_apply != st.position.checksum_or_empty()
        {
            return Err(out_of_sequence(st.position));
        }
        let rolling = self.rolling_after(&mut st, &header, &pages).map_err(other)?;
        if rolling != post {
            let reason = format!(
                "transaction {} gives checksum {rolling} here and {post} on the primary",
                record.max_txid
            );
            st.quarantine(self, reason.clone());
            return Err(EngineError::Quarantined { name: self.name.clone(), reason });
        }
        let new = NewRecord {
            database: &self.name,
            kind: RecordKind::Transaction,
            epoch: record.epoch,
            min_txid: header.min_txid,
            max_txid: header.max_txid,
            pre_apply: st.position.checksum_or_empty(),
            post_apply: post,
            page_size: header.page_size,
            commit: header.commit,
            timestamp_ms: header.timestamp_ms,
            wal: Some(WAL_IS_FROM_THE_LOG),
            fence,
        };
        // It follows what this node had alone, so that counts, and has to be applied before it.
        if self.is_unconfirmed() {
            drop(st);
            self.confirm();
            self.queue_unapplied(side)?;
            st = self.state();
        }
        let end = match &record.payload {
            RecordPayload::Bytes(bytes) => self.shared.log.append(&new, bytes),
            RecordPayload::File { path, .. } => self.shared.log.append_file(&new, path),
        }
        .map_err(other)?;
        let payload = match &record.payload {
            RecordPayload::Bytes(bytes) => Some(bytes.clone()),
            RecordPayload::File { .. } => None,
        };
        self.recent.lock().push(record);
        let resized = header.page_size != st.page_size;
        let sums = st.checksums_mut();
        sums.truncate(if resized { 0 } else { header.commit });
        for (pgno, checksum) in pages {
            sums.set(pgno, Some(checksum));
        }
        st.page_size = header.page_size;
        st.page_count = header.commit;
        st.advance(Pos { txid: header.max_txid, checksum: post }, end, header.timestamp_ms);
        drop(st);
        let info =
            self.shared.log.last(&self.name).ok_or_else(|| other("the log lost a record just appended"))?;
        side.pending.push_back((info, payload));
        Ok(())
    }

    /// Whether the log has just this record.
    fn is_logged(&self, record: &ShippedRecord) -> Result<bool, EngineError> {
        let known = self.shared.log.find(&self.name, record.max_txid).map_err(other)?;
        Ok(known.is_some_and(|known| {
            (known.min_txid, known.max_txid) == (record.min_txid, record.max_txid)
                && (known.post_apply, known.epoch) == (record.post_apply, record.epoch)
        }))
    }

    /// The database's checksum after a transaction, from the pages' old and new checksums.
    fn rolling_after(
        &self,
        st: &mut State,
        header: &Header,
        pages: &[(u32, Checksum)],
    ) -> Result<Checksum, CaptureError> {
        let resized = header.page_size != st.page_size && st.page_count > 0;
        let kept = if resized { 0 } else { st.page_count };
        let mut rolling = if kept == 0 { Checksum::EMPTY } else { st.position.checksum_or_empty() };
        st.open_checksums(self)?.reserve(header.commit)?;
        let sums = st.checksums();
        let gone = (header.commit + 1..=kept).filter_map(|pgno| sums.get(pgno));
        let replaced = pages.iter().filter(|(p, _)| *p <= kept).filter_map(|(p, _)| sums.get(*p));
        for checksum in gone.chain(replaced).chain(pages.iter().map(|(_, new)| *new)) {
            rolling = rolling.xor(checksum);
        }
        Ok(rolling)
    }

    /// Applies what waits, as far as readers let it within `bound`.
    pub(crate) fn apply_pending(&self, side: &mut ApplySide, bound: Duration) {
        if self.is_unconfirmed() {
            return self.take_back_unconfirmed(side);
        }
        self.settle_before_apply(side);
        if let Err(error) = self.queue_unapplied(side) {
            tracing::error!(database = %self.name, %error, "cannot apply what the log has");
        }
        if side.pending.is_empty() {
            return;
        }
        let (current, known) = {
            let mut st = self.state();
            let foreign = self.foreign_use_of_wal(&mut st).unwrap_or_else(|error| {
                tracing::warn!(database = %self.name, %error, "cannot look whether others have written to its WAL");
                ForeignUse::None
            });
            if foreign == ForeignUse::Committed {
                drop(st);
                return self.set_aside_with_foreign_commit(side);
            }
            let wal_mode = self.load_journal_mode(&mut st);
            self.look_for_foreign_writes(&mut st);
            let Mark { page_size, page_count, .. } = st.applied;
            (DatabaseShape { page_size, page_count, wal_mode }, self.known_frames(&st))
        };
        if let Err(error) = self.make_directory() {
            tracing::warn!(database = %self.name, %error, "cannot make the database's directory");
        }
        let count = side.pending.len();
        let log = &self.shared.log;
        let readers = side.pending.iter().map(|(record, payload)| match payload {
            Some(bytes) => PayloadReader::Bytes(Cursor::new(bytes.clone())),
            None => PayloadReader::of(log, record),
        });
        let readers = readers.collect::<Vec<_>>();
        let mut transactions = LtxTransactions::new(readers);
        let applied = side.applier.apply_after(known, current, &mut transactions, bound);
        {
            // Also after an error, when some of them may be there.
            let mut st = self.state();
            self.remember_applied_frames(&mut st, side.applier.wal_left());
            if side.pending.iter().any(|(record, _)| record.commit == 0) {
                // The next database of this name is another file.
                st.set_database_file(None);
            }
        }
        match applied {
            Ok(shape) => {
                side.told = false;
                if let Some((last, _)) = side.pending.drain(..count).next_back() {
                    let mut st = self.state();
                    st.applied = Mark {
                        position: Pos { txid: last.max_txid, checksum: last.post_apply },
                        page_size: last.page_size,
                        page_count: last.commit,
                    };
                    st.set_wal_mode(shape.wal_mode);
                    if current.page_count == 0 && shape.page_count > 0 {
                        self.shared().write_protection.cover(self);
                    }
                    if !shape.wal_mode {
                        // Whatever journal there was has been played back.
                        st.rollback.journal_active = false;
                    }
                    self.note_all_applied(&mut st);
                    self.check_applied(&mut st);
                    let applied = st.applied;
                    if let Ok(sums) = st.open_checksums(self) {
                        sums.set_applied(applied);
                    }
                }
                self.shared.counters.applies.fetch_add(count as u64, Ordering::Relaxed);
                self.shared.pending_done(&self.name);
                if self.shared.follows_wals() && side.applier.keeps_writers_out() {
                    // A database that was lent is this node's again.
                    self.let_writers_in_again(side);
                }
                self.shared.visible(self, count as u64);
            }
            // While the lock was waited for.
            Err(ApplyError::ForeignCommit { .. }) => self.set_aside_with_foreign_commit(side),
            Err(error @ (ApplyError::Record { .. } | ApplyError::InvalidTransaction { .. })) => {
                self.state().quarantine(self, error.to_string());
                side.pending.clear();
                self.shared.pending_done(&self.name);
            }
            Err(error) => {
                if !std::mem::replace(&mut side.told, true) {
                    tracing::warn!(database = %self.name, %error, waiting = count, "applying waits and tries again");
                }
                self.shared.pending_again(&self.name);
            }
        }
    }

    /// What somebody has committed on this replica must not be mixed with what the primary has.
    fn set_aside_with_foreign_commit(&self, side: &mut ApplySide) {
        let wal = self.paths.wal.display();
        let reason = format!(
            "{wal}: somebody committed on this replica, without the preload library or in a commit that lasted longer than \
             this node's term; it is kept as it is, and a snapshot follows"
        );
        self.state().quarantine(self, reason);
        side.pending.clear();
        self.shared.pending_done(&self.name);
    }

    /// Makes the directory of a database in a sub-directory, through the mount, so that the kernel knows of it.
    pub(crate) fn make_directory(&self) -> io::Result<()> {
        match self.shared.dirs.mount.join(&self.name).parent() {
            Some(dir) if self.paths.database.parent().is_some_and(|d| !d.exists()) => {
                std::fs::create_dir_all(dir)
            }
            _ => Ok(()),
        }
    }

    /// Applies what waits, after whoever applies now.
    pub fn apply_received(&self, bound: Duration) {
        self.apply_pending(&mut self.apply.lock(), bound);
    }

    /// Tries again to apply what waited.
    pub fn retry_pending(&self, bound: Duration) {
        if let Some(mut side) = self.apply.try_lock() {
            self.apply_pending(&mut side, bound);
        } else {
            self.shared.pending_again(&self.name);
        }
    }

    /// Moves what applying put into the WAL to the database file, and lets go of the database when nobody else has
    /// it open.
    pub fn settle_applied(&self) -> Result<(), EngineError> {
        let Some(mut side) = self.apply.try_lock() else { return Ok(()) };
        if !side.pending.is_empty() || side.applier.wal_frames() == 0 {
            return Ok(());
        }
        let durability = match self.may_write() {
            // Through the preload door, frames may be there that were not captured yet.
            true => Durability::Wal,
            false => {
                let logged = self.state().logged_end;
                self.shared.log.wait_durable(logged).map_err(other)?;
                Durability::Log
            }
        };
        side.applier.checkpoint(durability).map_err(other)?;
        Ok(())
    }

    /// Moves what is in the WAL to the database file as far as readers allow; on a primary, what applications wrote.
    ///
    /// # Errors
    /// Others hold the database's locks for longer than `bound`, or the disk fails.
    pub fn checkpoint(&self, bound: Duration) -> Result<CheckpointOutcome, EngineError> {
        let busy = || EngineError::Busy(self.name.clone());
        let mut side = self.apply.try_lock_for(bound).ok_or_else(busy)?;
        self.follow_wal(&mut self.state()).map_err(other)?;
        side.applier.checkpoint_now(bound).map_err(|error| match error {
            ApplyError::Busy { .. } => busy(),
            error => other(error),
        })
    }

    /// Makes writers of the database wait, once the running transaction has ended, for as long as the result lives.
    /// `None`: there is no database.
    ///
    /// # Errors
    /// Others hold the database's locks for longer than `bound`.
    pub fn hold_writers(&self, bound: Duration) -> Result<Option<WriterHold>, EngineError> {
        let busy = || EngineError::Busy(self.name.clone());
        let side = self.apply.try_lock_for(bound).ok_or_else(busy)?;
        side.applier.hold_writers(bound).map_err(|error| match error {
            ApplyError::Busy { .. } => busy(),
            error => other(error),
        })
    }

    /// Makes applications' writers wait from now on, also after this node is no primary any more (see
    /// [`Applier::keep_writers_out`]).
    pub fn keep_writers_out(&self, hold: WriterHold) {
        self.apply.lock().applier.keep_writers_out(hold);
        if self.may_write() {
            // It became primary meanwhile.
            self.let_writers_in();
        }
    }

    /// Whether writers are made to wait.
    pub fn keeps_writers_out(&self) -> bool {
        self.apply.lock().applier.keeps_writers_out()
    }

    /// Applications' writers may go on.
    pub fn let_writers_in(&self) {
        self.apply.lock().applier.let_writers_in();
    }

    /// States the number of pages in a wal-index that does not have it (see [`crate::apply::Applier::state_page_count`]),
    /// unless somebody else is at work there. Goes through the mount: never on a thread that serves it.
    pub(crate) fn state_page_count(&self, connected: impl FnOnce()) -> Result<bool, ApplyError> {
        match self.apply.try_lock() {
            Some(mut side) => side.applier.state_page_count(connected),
            None => {
                connected();
                Ok(false)
            }
        }
    }

    /// Lets go of everything applying holds, if nobody else has the database open.
    pub fn detach(&self) -> Result<bool, ApplyError> {
        let mut side = self.apply.lock();
        let detached = side.applier.detach()?;
        if detached {
            self.remember_detached(&mut self.state(), side.applier.wal_left());
        }
        Ok(detached)
    }
}

/// Header, checksum of each page, checksum of the database after it.
type RecordChecksums = (Header, Vec<(u32, Checksum)>, Checksum);

/// Reads a whole LTX file: header, checksum of each page, and the database's checksum after it.
pub(crate) fn read_page_checksums(reader: impl Read) -> Result<RecordChecksums, ltx::Error> {
    let mut decoder = Decoder::new(reader)?;
    let header = decoder.header().clone();
    let (mut page, mut pages) = (Vec::new(), Vec::new());
    while let Some(pgno) = decoder.next_page(&mut page)? {
        pages.push((pgno, page_checksum(pgno, &page)));
    }
    let trailer = decoder.finish()?;
    Ok((header, pages, trailer.post_apply))
}

pub(crate) fn other(error: impl std::fmt::Display) -> EngineError {
    EngineError::Other(error.to_string())
}

impl From<RecoveryError> for EngineError {
    fn from(e: RecoveryError) -> Self {
        EngineError::Other(e.0)
    }
}

impl From<LogError> for RecoveryError {
    fn from(e: LogError) -> Self {
        failed(e)
    }
}

/// Makes a rename durable.
pub(crate) fn sync_dir_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
