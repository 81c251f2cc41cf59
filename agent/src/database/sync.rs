//! Marks: from time to time the files of a database are made durable together, so that recovery replays the log only
//! from there and retention may let older segments go.

use super::checksums::Mark;
use super::{Database, State};
use crate::capture::CaptureError;
use crate::ship::engine::Epoch;
use std::fs::File;
use std::io;
use std::path::Path;

impl Database {
    /// Makes the files durable up to the applied position and writes the mark.
    ///
    /// The WAL goes before the database: a frame that a checkpoint moves in between is then in at least one of them.
    pub fn mark_durable(&self) -> Result<(), CaptureError> {
        let (mark, end) = {
            let mut st = self.state();
            let mark = self.published_mark(&mut st);
            let marked = mark.position == st.marked;
            if st.check_health().is_err() || marked && !st.note_is_outdated(self)? {
                return Ok(());
            }
            (mark, st.logged_end)
        };
        self.shared.log.wait_durable(end)?;
        for path in [&self.paths.wal, &self.paths.journal, &self.paths.database] {
            sync_file(path).map_err(|source| CaptureError::Io { path: path.clone(), source })?;
        }
        if let Some(dir) = self.paths.database.parent() {
            sync_file(dir).map_err(|source| CaptureError::Io { path: dir.to_owned(), source })?;
        }
        self.write_mark(mark)
    }

    /// Epoch of the newest record, also when retention has removed it.
    pub(crate) fn newest_record_epoch(&self, st: &State) -> Epoch {
        self.shared.log.last(&self.name).map_or(st.record_epoch, |record| record.epoch)
    }

    /// Writes a mark; the files must be durable up to it.
    pub(crate) fn write_mark(&self, mark: Mark) -> Result<(), CaptureError> {
        let mut st = self.state();
        let all_logged = st.all_writes_are_logged(self);
        let epoch = self.newest_record_epoch(&st);
        st.open_checksums(self)?.persist(&self.name, mark, epoch, all_logged)?;
        st.record_epoch = epoch;
        st.marked = mark.position;
        Ok(())
    }
}

impl State {
    /// Whether nothing can be in the file that the log does not have.
    fn all_writes_are_logged(&mut self, db: &Database) -> bool {
        !self.rollback.is_dirty() && (self.passthrough_handles == 0 || db.load_journal_mode(self))
    }

    /// Whether the note of unlogged writes can go.
    fn note_is_outdated(&mut self, db: &Database) -> Result<bool, CaptureError> {
        Ok(self.page_count > 0
            && self.open_checksums(db)?.may_have_unlogged_writes()
            && self.all_writes_are_logged(db))
    }
}

fn sync_file(path: &Path) -> io::Result<()> {
    match File::open(path) {
        Ok(file) => crate::write_out::whole(&file).and_then(|()| file.sync_all()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}
