//! Commits that the log has and SQLite does not: their application died before it published them in the wal-index, or it is
//! about to. The next transaction of this node puts their pages back (see [`crate::capture::wal`]). Before another node
//! writes the database that is done at once, and on a node that is no primary any more they are applied again.

use super::checksums::Mark;
use super::follow::Suspicion;
use super::{Database, State};
use crate::apply::WalFrames;
use crate::capture::CaptureError;
use crate::capture::wal::{self, published};
use sqlite_file::wal_index::IndexHeader;
use std::fs::File;
use std::io;

impl Database {
    /// No writer is in a transaction, and the wal-index publishes this, if there is one: afterwards the log has what WAL and
    /// file have.
    ///
    /// # Errors
    /// Something is suspected or not published, and cannot be captured now.
    pub(crate) fn settle_unpublished(
        &self,
        st: &mut State,
        published: Option<WalFrames>,
    ) -> Result<(), CaptureError> {
        self.follow_wal(st)?;
        self.put_back_suspect(st);
        if !self.load_journal_mode(st) {
            // Written without a journal, or by somebody unseen: nobody has said yet that it is committed.
            if st.rollback.is_dirty() {
                self.capture_rollback(st)?;
            }
            return Ok(());
        }
        if published.is_some() && st.wal.captured_frames() == published {
            st.wal.note_published();
        }
        if !st.wal.may_be_unpublished() {
            return Ok(());
        }
        match published {
            // All that counts is in the file.
            Some((_, 0)) => wal::settle_unpublished(self, st),
            Some((salts, _)) => {
                let wal = File::open(&self.paths.wal).map_err(|e| self.wal_error(e))?;
                wal::capture_foreign(self, st, &wal)?;
                st.wal.refresh(&wal).map_err(|e| self.wal_error(e))?;
                match st.wal.captured_frames() {
                    Some(captured) if captured.0 == salts => published::take_back_unpublished(self, st, &wal),
                    _ => Err(CaptureError::InUse),
                }
            }
            None => Err(CaptureError::InUse),
        }
    }

    /// Whether the log may have something that WAL and file do not, or the other way round.
    pub(crate) fn may_be_unpublished(&self) -> bool {
        let mut st = self.state();
        self.note_if_published(&mut st);
        st.wal.may_be_unpublished() || self.shared.follows_wals() && st.suspect.is_some()
    }

    /// What somebody may have written becomes part of this node's next transaction.
    pub(crate) fn put_back_suspect(&self, st: &mut State) {
        if !self.shared.follows_wals() || st.suspect.take().is_none() {
            return;
        }
        if self.load_journal_mode(st) {
            st.wal.put_back((1..=st.page_count).collect());
        } else {
            st.rollback.mark_unknown();
        }
    }

    /// This node is not the primary: what its applications may not have published is applied again from the log.
    pub(crate) fn apply_unpublished_again(&self) {
        let mut st = self.state();
        self.note_if_published(&mut st);
        if self.may_write() || !st.wal.may_be_unpublished() {
            return;
        }
        if st.wal.puts_untold_pages_back() {
            st.suspect.get_or_insert(Suspicion::ForeignWrite);
        } else if st.applied.position != st.position {
            // It is applied with what follows it.
            return;
        } else {
            let last = self.shared.log.last(&self.name);
            match st.wal.published_to().filter(|mark| self.records_after(*mark, &last).is_ok()) {
                Some(before) => {
                    st.applied = before;
                    self.shared.pending_again(&self.name);
                }
                None => drop(st.suspect.get_or_insert(Suspicion::TakenBack)),
            }
        }
        st.wal.forget_put_back();
        st.wal.mark_written_from_log();
    }

    /// All that the log has was applied from it.
    pub(super) fn note_all_applied(&self, st: &mut State) {
        if !self.may_write() && st.applied.position == st.position && !st.wal.puts_untold_pages_back() {
            st.wal.forget_put_back();
        }
    }

    /// How far the files have what is applied, for a mark. Behind the preload door a held commit that is not published may not
    /// be in the WAL; behind the FUSE door it is, and counts for whoever reads the WAL anew.
    pub(super) fn published_mark(&self, st: &mut State) -> Mark {
        if !self.shared.follows_wals() {
            return st.applied;
        }
        self.note_if_published(st);
        st.wal
            .published_to()
            .filter(|mark| mark.position.txid < st.applied.position.txid)
            .unwrap_or(st.applied)
    }

    /// Looks whether the newest captured commit is published.
    fn note_if_published(&self, st: &mut State) {
        let Some((salts, frames)) = st.wal.captured_frames().filter(|_| st.wal.may_be_unpublished()) else {
            return;
        };
        let index = File::open(&self.paths.shm).and_then(|index| IndexHeader::read(&index));
        match index {
            Ok(Some(index)) if index.salts == salts && index.max_frame >= frames => st.wal.note_published(),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(database = %self.name, %error, "its wal-index cannot be read");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "unpublished_tests.rs"]
mod tests;
