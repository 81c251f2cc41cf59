//! A plain copy over a live database (`cp backup.db config.db`): written aside, and made the database in one
//! transaction when it is complete, so that open connections see it as they see any commit.

use crate::database::Database;
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use tempfile::TempPath;

/// A copy being written.
#[derive(Debug)]
pub struct StagedWrite {
    db: Arc<Database>,
    file: File,
    path: TempPath,
    progress: Mutex<Progress>,
}

/// A copy is closed more than once when its descriptor was duplicated or inherited: each time it is tried if something
/// was written since the last time.
#[derive(Debug, Default)]
struct Progress {
    written: bool,
    /// Error number of the last try; 0 when the copy became the database.
    outcome: Option<i32>,
}

impl StagedWrite {
    /// Starts an empty copy beside the database.
    pub fn new(db: Arc<Database>) -> io::Result<Self> {
        let staged =
            tempfile::Builder::new().prefix("copy-").suffix(".db").tempfile_in(&db.shared().dirs.staging)?;
        let (file, path) = staged.into_parts();
        Ok(StagedWrite { db, file, path, progress: Mutex::default() })
    }

    /// Writes to the copy.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.progress.lock().written = true;
        self.file.write_all_at(data, offset)
    }

    /// Sets the copy's length.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// The copy was closed: makes it the database, if it is one. Goes through the mount, so never on a thread that
    /// serves it. Gives the error number for close(2).
    pub fn install(&self) -> Result<(), i32> {
        let before = {
            let mut progress = self.progress.lock();
            if std::mem::take(&mut progress.written) {
                None
            } else {
                Some(progress.outcome.unwrap_or(libc::EINVAL))
            }
        };
        let outcome = before.unwrap_or_else(|| match self.db.import(&self.path) {
            Ok(_) => 0,
            Err(error) => {
                tracing::warn!(database = %self.db.name(), %error, "a copy over the database was refused");
                error.errno()
            }
        });
        self.progress.lock().outcome = Some(outcome);
        if outcome == 0 { Ok(()) } else { Err(outcome) }
    }
}
