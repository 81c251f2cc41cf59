//! A plain copy over a live database (`cp backup.db config.db`): written aside, and made the database in one
//! transaction when it is complete, so that open connections see it as they see any commit.

use crate::DatabaseName;
use crate::database::Database;
use crate::database::import::ImportError;
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
    /// Taken when the copy has been made the database.
    path: Mutex<Option<TempPath>>,
}

impl StagedWrite {
    /// Starts an empty copy beside the database.
    pub fn new(db: Arc<Database>) -> io::Result<Self> {
        let staged =
            tempfile::Builder::new().prefix("copy-").suffix(".db").tempfile_in(&db.shared().dirs.staging)?;
        let (file, path) = staged.into_parts();
        Ok(StagedWrite { db, file, path: Mutex::new(Some(path)) })
    }

    /// The database it is for.
    pub fn name(&self) -> &DatabaseName {
        self.db.name()
    }

    /// Writes to the copy.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Sets the copy's length.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// The copy is complete: makes it the database. Goes through the mount, so never on a thread that serves it.
    /// An empty copy is left alone: a truncation that was never followed by a write.
    pub fn install(&self) -> Result<(), ImportError> {
        let Some(path) = self.path.lock().take() else { return Ok(()) };
        let len = self
            .file
            .metadata()
            .map_err(|source| ImportError::Io { path: path.to_path_buf(), source })?
            .len();
        if len == 0 {
            return Err(ImportError::NotADatabase {
                name: self.db.name().clone(),
                reason: "the copy is empty",
            });
        }
        self.db.import(&path).map(|_| ())
    }
}
