//! Recovery of a database whose newest records are lost with a damaged part of the log.
//!
//! Where only processes died the files have everything that was acknowledged, so the history goes on from them. Where
//! the host went down they may have half a transaction that only the log could complete.

use super::checksums::Mark;
use super::recovery::{
    Recovered, RecoveryError, failed, known_wal_end, mark_of, open_if_there, remove_if_there,
};
use super::{Database, State};
use crate::capture::ChecksumOrEmpty;
use crate::log::{Damage, RecordInfo};
use ltx::{Pos, Txid};
use sqlite_file::header::DatabaseHeader;
use sqlite_file::wal::{Scanner, frame_offset};
use std::os::unix::fs::FileExt;

impl Database {
    /// Damage in the log that may hide records after the last one that was found.
    pub(super) fn may_be_lost(&self, last: Option<&RecordInfo>) -> Option<Damage> {
        let hides = |damage: &Damage| {
            damage.database.as_ref().is_none_or(|name| *name == self.name)
                && last.is_none_or(|last| damage.end > last.end())
        };
        self.shared.log.damaged().into_iter().find(hides)
    }

    /// Brings the files to where SQLite would, and lets the history go on from there, after the log's last record
    /// when they are there, else with a beginning of its own.
    pub(super) fn recover_from_files(
        &self,
        st: &mut State,
        last: Option<&RecordInfo>,
        mark: Mark,
        damage: &Damage,
    ) -> Result<Recovered, RecoveryError> {
        let mut done = Recovered::default();
        self.recover_journal(None, &mut done)?;
        self.recover_wal(&|_| u64::MAX, true, &mut done)?;
        remove_if_there(&self.paths.shm)?;
        // The file is looked at as a whole here.
        done.compare = false;
        if last.is_none() && mark.position.txid.0 == 0 {
            return Ok(done);
        }
        let logged = last.map(mark_of).unwrap_or(mark);
        let found = self.shape_of_file(logged)?;
        self.rebuild_checksums_from(st, found, &self.paths.database)?;
        let checksum = st.checksums().fold(found.page_count);
        let same = checksum == logged.position.checksum_or_empty()
            && (found.page_size, found.page_count) == (logged.page_size, logged.page_count);
        let target = if same {
            logged
        } else {
            let txid = Txid(logged.position.txid.0.max(mark.position.txid.0) + 1);
            let target = Mark { position: Pos { txid, checksum }, ..found };
            tracing::error!(
                database = %self.name,
                log = %logged.position,
                files = %target.position,
                %damage,
                "the log has lost transactions that the files have; the history goes on from the files"
            );
            self.begin_history_at(last, target)?;
            target
        };
        st.position = target.position;
        st.page_size = target.page_size;
        st.page_count = target.page_count;
        st.applied = target;
        self.set_durable_position(target.position);
        if let Some(last) = self.shared.log.last(&self.name) {
            st.logged_end = last.end();
            st.last_change_ms = last.timestamp_ms;
        }
        self.finish(st, target, true, &done)?;
        self.close_idle(st);
        Ok(done)
    }

    /// Size of a database file that SQLite would accept as it is. One that is gone was dropped, if the log says so.
    fn shape_of_file(&self, logged: Mark) -> Result<Mark, RecoveryError> {
        let path = &self.paths.database;
        let Some(file) = open_if_there(path)? else {
            if logged.page_count == 0 {
                return Ok(Mark::default());
            }
            return Err(RecoveryError(format!(
                "{} is gone; restore it or let it follow a primary",
                path.display()
            )));
        };
        let len = file.metadata().map_err(failed)?.len();
        if len == 0 && logged.page_count == 0 {
            return Ok(Mark::default());
        }
        let mut first = [0; sqlite_file::header::HEADER_BYTES];
        let header = file.read_exact_at(&mut first, 0).map_err(failed).and_then(|()| {
            DatabaseHeader::parse(&first).map_err(|e| RecoveryError(format!("{}: {e}", path.display())))
        })?;
        let page_count = header.page_count(len);
        file.set_len(u64::from(page_count) * u64::from(header.page_size)).map_err(failed)?;
        Ok(Mark { page_size: header.page_size, page_count, ..Mark::default() })
    }

    /// After a power failure: commits in the WAL that the log does not know are transactions it has lost.
    pub(super) fn check_wal_is_logged(
        &self,
        last: Option<&RecordInfo>,
        damage: &Damage,
    ) -> Result<(), RecoveryError> {
        let Some(wal) = open_if_there(&self.paths.wal)? else { return Ok(()) };
        let Ok(Some(mut scan)) = Scanner::open(&wal) else { return Ok(()) };
        let page_size = scan.header().page_size;
        let salts = (scan.header().salts.first(), scan.header().salts.second());
        let end = known_wal_end(last)(salts);
        while let Some(frame) = scan.next_frame().map_err(failed)? {
            if frame.commit != 0 && frame_offset(frame.number + 1, page_size) > end {
                return Err(RecoveryError(format!(
                    "{} has transactions that the log has lost: {damage}; restore the database from a copy, or let it \
                     follow a primary",
                    self.paths.wal.display()
                )));
            }
        }
        Ok(())
    }
}
