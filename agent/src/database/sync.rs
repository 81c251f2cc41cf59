//! Marks: from time to time the files of a database are made durable together, so that recovery replays the log only
//! from there and retention may let older segments go.

use super::Database;
use super::checksums::Mark;
use crate::capture::CaptureError;
use std::fs::File;
use std::io;
use std::path::Path;

impl Database {
    /// Makes the files durable up to the applied position and writes the mark.
    ///
    /// The WAL goes before the database: a frame that a checkpoint moves in between is then in at least one of them.
    pub fn mark_durable(&self) -> Result<(), CaptureError> {
        let (mark, end) = {
            let st = self.state();
            if st.applied.position == st.marked || st.check_health().is_err() {
                return Ok(());
            }
            (st.applied, st.logged_end)
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

    /// Writes a mark; the files must be durable up to it.
    pub(crate) fn write_mark(&self, mark: Mark) -> Result<(), CaptureError> {
        let mut st = self.state();
        st.open_checksums(self)?.persist(&self.name, mark)?;
        st.marked = mark.position;
        Ok(())
    }
}

fn sync_file(path: &Path) -> io::Result<()> {
    match File::open(path) {
        Ok(file) => file.sync_all(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}
