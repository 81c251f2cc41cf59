//! A snapshot becomes the database; what this node had alone is kept as files.

use super::checksums::Mark;
use super::receive::{PayloadReader, other, sync_dir_of};
use super::recovery::remove_if_there;
use super::{Database, Notice};
use crate::apply::{ApplyError, DatabaseShape, TransactionHeader, TransactionSource, WalLeft};
use crate::capture::{ChecksumOrEmpty, unix_ms};
use crate::log::{NewRecord, RecordKind};
use crate::ship::engine::{EngineError, StagedSnapshot};
use crate::status::messages;
use ltx::{Pos, Txid, page_checksum};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long readers may hold up an installation before the follower is told to try again.
const INSTALL_PATIENCE: Duration = Duration::from_secs(30);

/// How long a copy waits for commits that wait for followers.
const COMMITS_WAIT: Duration = Duration::from_secs(10);

impl Database {
    /// Makes a staged snapshot the database. A crash at any point is finished by recovery, which finds the Reset
    /// record and the staged file.
    pub fn install(
        &self,
        snapshot: &StagedSnapshot,
        common: Option<Txid>,
        bound: Duration,
    ) -> Result<(), EngineError> {
        let mut side = self.apply.lock();
        let (before, foreign) = {
            let st = self.state();
            (st.logged_mark(), st.foreign_content)
        };
        if before.position.txid.0 > 0 && (foreign || Some(before.position.txid) != common) {
            match self.keep_diverged(common, snapshot) {
                Ok(Some(kept)) => {
                    let had = match foreign {
                        true => "somebody had written to the database on this node; it is kept as it was",
                        false => "this node had transactions of its own; they are kept as files",
                    };
                    tracing::warn!(
                        MESSAGE_ID = messages::DIVERGED,
                        database = %self.name,
                        kept = %kept.display(),
                        own = %before.position,
                        primary = %snapshot.position,
                        common = ?common.map(|t| t.to_string()),
                        "{had}, and the node follows the primary"
                    );
                    self.shared.notify(Notice::Diverged(self.name.clone(), kept));
                }
                Ok(None) => {}
                Err(error) => {
                    return Err(other(format!("cannot keep what {} had alone: {error}", self.name)));
                }
            }
        }
        let staged = self.staged_path(snapshot.position.txid);
        std::fs::rename(&snapshot.path, &staged).and_then(|()| sync_dir_of(&staged)).map_err(other)?;
        let record = NewRecord {
            database: &self.name,
            kind: RecordKind::Reset,
            epoch: snapshot.epoch,
            min_txid: snapshot.position.txid,
            max_txid: snapshot.position.txid,
            pre_apply: before.position.checksum_or_empty(),
            post_apply: snapshot.position.checksum,
            page_size: snapshot.page_size,
            commit: snapshot.commit,
            timestamp_ms: unix_ms(),
            wal: None,
            fence: None,
        };
        let end = self.shared.log.append(&record, &[]).map_err(other)?;
        self.shared.log.wait_durable(end).map_err(other)?;
        side.pending.clear();
        self.confirm();

        let mark =
            Mark { position: snapshot.position, page_size: snapshot.page_size, page_count: snapshot.commit };
        let exists = self.paths.database.exists();
        if !exists && snapshot.commit > 0 {
            self.make_directory().map_err(other)?;
            // Beside the database until the checksums are there, which are read from the installed file.
            std::fs::rename(&staged, &self.paths.database)
                .and_then(|()| sync_dir_of(&self.paths.database))
                .map_err(other)?;
        } else if exists {
            let mut st = self.state();
            let wal_mode = self.load_journal_mode(&mut st);
            let current = DatabaseShape {
                page_size: st.applied.page_size,
                page_count: st.applied.page_count,
                wal_mode,
            };
            drop(st);
            let deadline = Instant::now() + INSTALL_PATIENCE;
            loop {
                let mut whole = WholeFile::open(&staged, &mark).map_err(other)?;
                match side.applier.apply(current, &mut whole, bound) {
                    Ok(_) => break,
                    Err(ApplyError::Busy { .. }) if Instant::now() < deadline => {}
                    Err(ApplyError::Busy { .. }) => return Err(EngineError::Busy(self.name.clone())),
                    Err(error) => return Err(other(error)),
                }
            }
        }
        let mut st = self.state();
        let left = if exists { side.applier.wal_left() } else { WalLeft::Gone { had: None } };
        self.remember_applied_frames(&mut st, left);
        st.set_database_file(None);
        self.rebuild_checksums_from(&mut st, mark, if exists { &staged } else { &self.paths.database })?;
        self.recent.lock().clear();
        st.position = mark.position;
        st.page_size = mark.page_size;
        st.page_count = mark.page_count;
        st.applied = mark;
        st.logged_end = end;
        st.last_change_ms = unix_ms();
        st.forget_journal_mode();
        st.clear_quarantine();
        self.load_journal_mode(&mut st);
        st.rollback = Default::default();
        st.suspect = None;
        st.wal.forget_put_back();
        if mark.page_count > 0 {
            // What somebody writes after this is told from it.
            st.remember_stamp(self).map_err(other)?;
        }
        drop(st);
        self.set_durable_position(mark.position);
        self.shared.forget_name(self);
        self.mark_durable().map_err(other)?;
        remove_if_there(&staged)?;
        self.shared.changed(&self.name);
        self.shared.visible(self, 1);
        Ok(())
    }

    /// The position, once no commit waits for followers: one that does may come to nothing.
    fn position_that_counts(&self) -> Result<Pos, EngineError> {
        let deadline = Instant::now() + COMMITS_WAIT;
        loop {
            {
                let st = self.state();
                if st.held.is_none() {
                    return Ok(st.position);
                }
            }
            if Instant::now() > deadline {
                return Err(other(format_args!(
                    "a commit of {} has waited for its followers for {COMMITS_WAIT:?}, and a copy would have it: see \
                     [sync] and `litefs status`",
                    self.name
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A copy of the database at one exact position, made without stopping writers: pages as they are found, then
    /// the records since the first of them was read.
    pub fn copy_consistently(&self, path: &Path) -> Result<Pos, EngineError> {
        const PAGES_AT_ONCE: u32 = 64;
        'again: loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)
                .map_err(other)?;
            let base = self.durable_position();
            // Pages beyond these are in the records after `base`: a writer that adds pages faster than they are copied
            // is not run after.
            let last = self.state().page_count;
            let mut shape: Option<(u32, u32)> = None;
            let mut next = 1;
            loop {
                let range = self.committed_pages(next..=next + PAGES_AT_ONCE - 1)?;
                if shape.is_some_and(|(size, _)| size != range.page_size) {
                    continue 'again;
                }
                for (pgno, page) in &range.pages {
                    let at = u64::from(pgno - 1) * u64::from(range.page_size);
                    file.write_all_at(page, at).map_err(other)?;
                }
                shape = Some((range.page_size, range.commit));
                next += PAGES_AT_ONCE;
                if next > last.min(range.commit) {
                    break;
                }
            }
            let (page_size, mut page_count) = shape.unwrap_or_default();
            // Everything a page could have come from is in the log by now.
            let target = self.position_that_counts()?;
            let mut txid = base.txid.0 + 1;
            while txid <= target.txid.0 {
                let found = self.shared.log.find(&self.name, Txid(txid)).map_err(other)?;
                let Some(record) = found.filter(|r| r.kind == RecordKind::Transaction) else {
                    continue 'again;
                };
                if record.page_size != page_size {
                    continue 'again;
                }
                let mut decoder =
                    ltx::Decoder::new(PayloadReader::of(&self.shared.log, &record)).map_err(other)?;
                let mut page = Vec::new();
                while let Some(pgno) = decoder.next_page(&mut page).map_err(other)? {
                    let at = u64::from(pgno - 1) * u64::from(page_size);
                    file.write_all_at(&page, at).map_err(other)?;
                }
                page_count = record.commit;
                txid = record.max_txid.0 + 1;
            }
            file.set_len(u64::from(page_count) * u64::from(page_size)).map_err(other)?;
            let folded = fold_file(&file, page_size, page_count).map_err(other)?;
            if folded != target.checksum_or_empty() {
                return Err(EngineError::ChecksumMismatch(format!(
                    "a copy of {} at {} has checksum {folded}: the file was changed behind the agent's back or the \
                     disk is failing",
                    self.name, target
                )));
            }
            file.sync_all().map_err(other)?;
            return Ok(target);
        }
    }
}

/// The checksum of a whole database file.
pub(super) fn fold_file(file: &File, page_size: u32, page_count: u32) -> std::io::Result<ltx::Checksum> {
    let mut sum = ltx::Checksum::EMPTY;
    let mut page = vec![0; page_size as usize];
    let lock_page = if page_count == 0 { 0 } else { ltx::lock_page(page_size) };
    for pgno in (1..=page_count).filter(|p| *p != lock_page) {
        file.read_exact_at(&mut page, u64::from(pgno - 1) * u64::from(page_size))?;
        sum = sum.xor(page_checksum(pgno, &page));
    }
    Ok(sum)
}

/// All pages of a file as one transaction.
struct WholeFile {
    file: File,
    header: Option<TransactionHeader>,
    next: u32,
    page_size: u32,
    page_count: u32,
}

impl WholeFile {
    fn open(path: &Path, mark: &Mark) -> std::io::Result<Self> {
        Ok(WholeFile {
            file: File::open(path)?,
            header: Some(TransactionHeader {
                page_size: mark.page_size,
                commit: mark.page_count,
                owner: None,
            }),
            next: 1,
            page_size: mark.page_size,
            page_count: mark.page_count,
        })
    }
}

impl TransactionSource for WholeFile {
    fn next_transaction(&mut self) -> Result<Option<TransactionHeader>, ltx::Error> {
        Ok(self.header.take())
    }

    fn next_page(&mut self, page: &mut Vec<u8>) -> Result<Option<u32>, ltx::Error> {
        if self.next <= self.page_count && self.next == ltx::lock_page(self.page_size) {
            self.next += 1;
        }
        if self.next > self.page_count {
            return Ok(None);
        }
        let pgno = self.next;
        page.resize(self.page_size as usize, 0);
        let offset = u64::from(pgno - 1) * u64::from(self.page_size);
        self.file.read_exact_at(page, offset).map_err(|source| ltx::Error::Io { offset, source })?;
        self.next += 1;
        Ok(Some(pgno))
    }
}
