//! A plain copy over a live database (`cp backup.db config.db`): written aside, and made the database in one
//! transaction when it is complete, so that open connections see it as they see any commit.

use crate::database::Database;
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A copy being written.
#[derive(Debug)]
pub struct StagedWrite {
    db: Arc<Database>,
    file: File,
    path: PathBuf,
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
    /// Starts an empty copy beside the database, for the handle with this number.
    pub fn new(db: Arc<Database>, number: u64) -> io::Result<Self> {
        let path = Self::path_of(&db.shared().dirs.staging, number);
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        Ok(StagedWrite { db, file, path, progress: Mutex::default() })
    }

    /// The copy that another server of the mount began.
    pub fn go_on(db: Arc<Database>, number: u64, written: bool) -> io::Result<Self> {
        let path = Self::path_of(&db.shared().dirs.staging, number);
        let file = File::options().read(true).write(true).open(&path)?;
        Ok(StagedWrite { db, file, path, progress: Mutex::new(Progress { written, outcome: None }) })
    }

    /// Where the copy of a handle is.
    pub fn path_of(staging: &Path, number: u64) -> PathBuf {
        staging.join(format!("copy-{number:016x}.db"))
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

impl Drop for StagedWrite {
    fn drop(&mut self) {
        // An import may have made it the database's file.
        let _ = std::fs::remove_file(&self.path);
    }
}
