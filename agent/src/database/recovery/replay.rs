//! Step 3: records of the log are written to file and sidecar.

use super::super::checksums::{Checksums, Mark};
use super::super::{Database, State};
use super::{Recovered, RecoveryError, failed, mark_of, remove_if_there};
use crate::log::{Payload, RecordInfo, RecordKind};
use ltx::{Decoder, Txid, page_checksum};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

impl Database {
    /// Step 3.
    pub(super) fn replay(
        &self,
        st: &mut State,
        first: Txid,
        mark: Mark,
        target: Mark,
        done: &mut Recovered,
    ) -> Result<(), RecoveryError> {
        let mut next = first.0;
        let mut shape = mark;
        while next <= target.position.txid.0 {
            let found = self.shared.log.find(&self.name, Txid(next)).map_err(failed)?;
            let record = found.ok_or_else(|| {
                RecoveryError(format!(
                    "the log lacks transaction {} that the files need (they are at {}); restore the database or \
                     let it follow a primary",
                    Txid(next),
                    mark.position
                ))
            })?;
            self.replay_record(st, &record, &mut shape, done.kept_file)?;
            done.replayed += 1;
            next = record.max_txid.0 + 1;
        }
        Ok(())
    }

    fn replay_record(
        &self,
        st: &mut State,
        record: &RecordInfo,
        shape: &mut Mark,
        kept_file: bool,
    ) -> Result<(), RecoveryError> {
        if record.kind == RecordKind::Reset {
            if kept_file {
                return Err(RecoveryError("it was written without a journal after a snapshot".into()));
            }
            self.install_staged_file(st, record)?;
            *shape = mark_of(record);
            return Ok(());
        }
        if record.commit == 0 {
            if !kept_file {
                remove_if_there(&self.paths.database)?;
                st.set_database_file(None);
            }
            st.open_checksums(self).map_err(failed)?.truncate(0);
            *shape = mark_of(record);
            return Ok(());
        }
        let database = self.open_or_create_database()?;
        let resized = record.page_size != shape.page_size;
        let sums = st.open_checksums(self).map_err(failed)?;
        sums.reserve(record.commit).map_err(failed)?;
        sums.truncate(if resized { 0 } else { record.commit });
        let mut place = format!("the log at {}", record.lsn);
        let reader: Box<dyn Read> = match self.shared.log.read(record).map_err(failed)? {
            Payload::Bytes(bytes) => Box::new(io::Cursor::new(bytes)),
            Payload::File { path, .. } => {
                place = path.display().to_string();
                Box::new(BufReader::new(File::open(&path).map_err(failed)?))
            }
        };
        let failed_there = |error: ltx::Error| {
            RecoveryError(format!(
                "transaction {}, which the files need, cannot be read in {place}: {error}; restore the database from \
                 a copy, or let it follow a primary",
                record.max_txid
            ))
        };
        let mut decoder = Decoder::new(reader).map_err(failed_there)?;
        let mut page = Vec::new();
        while let Some(pgno) = decoder.next_page(&mut page).map_err(failed_there)? {
            if !kept_file {
                let at = u64::from(pgno - 1) * u64::from(record.page_size);
                database.write_all_at(&page, at).map_err(failed)?;
            }
            st.checksums_mut().set(pgno, Some(page_checksum(pgno, &page)));
        }
        decoder.finish().map_err(failed_there)?;
        if !kept_file {
            database.set_len(u64::from(record.commit) * u64::from(record.page_size)).map_err(failed)?;
        }
        *shape = mark_of(record);
        Ok(())
    }

    fn open_or_create_database(&self) -> Result<File, RecoveryError> {
        let path = &self.paths.database;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)
    }

    /// The staged file of a Reset record becomes the database file, if it is still there; otherwise it already has.
    fn install_staged_file(&self, st: &mut State, record: &RecordInfo) -> Result<(), RecoveryError> {
        let staged = self.staged_path(record.max_txid);
        if staged.exists() {
            if let Some(dir) = self.paths.database.parent() {
                std::fs::create_dir_all(dir).map_err(failed)?;
            }
            std::fs::rename(&staged, &self.paths.database).map_err(failed)?;
        }
        if record.commit == 0 {
            remove_if_there(&self.paths.database)?;
        }
        st.set_database_file(None);
        self.rebuild_checksums(st, mark_of(record))
    }

    /// Fills the sidecar from the database file.
    pub(super) fn rebuild_checksums(&self, st: &mut State, mark: Mark) -> Result<(), RecoveryError> {
        self.rebuild_checksums_from(st, mark, &self.paths.database)
    }

    /// Fills the sidecar from a file that is exactly at `mark`.
    pub(crate) fn rebuild_checksums_from(
        &self,
        st: &mut State,
        mark: Mark,
        path: &Path,
    ) -> Result<(), RecoveryError> {
        let mut sums = Checksums::create(&self.paths.checksums, &self.name).map_err(failed)?;
        if mark.page_count > 0 {
            sums.reserve(mark.page_count).map_err(failed)?;
            let file = File::open(path).map_err(failed)?;
            let lock_page = ltx::lock_page(mark.page_size);
            let mut page = vec![0; mark.page_size as usize];
            for pgno in (1..=mark.page_count).filter(|p| *p != lock_page) {
                self.read_database_page(&file, pgno, &mut page).map_err(failed)?;
                sums.set(pgno, Some(page_checksum(pgno, &page)));
            }
        }
        st.set_checksums(sums);
        Ok(())
    }

    /// Where the staged file of a Reset record is.
    pub(crate) fn staged_path(&self, txid: Txid) -> std::path::PathBuf {
        self.shared.dirs.staging.join(format!("{}@{txid}.snapshot", self.name.escaped()))
    }
}
