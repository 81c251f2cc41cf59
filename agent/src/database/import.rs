//! Replacing a database, or making one, by a plain SQLite file: one transaction of the pages that differ, so that
//! connections that are open see it as they see any commit.

use super::receive::PayloadReader;
use super::{Database, State};
use crate::DatabaseName;
use crate::apply::{ApplyError, DatabaseShape, TransactionHeader, TransactionSource};
use crate::capture::{CaptureError, Commit, log_transaction};
use crate::ship::engine::EngineError;
use ltx::{Decoder, Pos};
use sqlite_file::header::DatabaseHeader;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an import waits for readers and writers of the database.
const IMPORT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a file did not become the database.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The staged file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// It is none.
    #[error("the file for {name} is no SQLite database: {reason}")]
    NotADatabase {
        /// The database it is for.
        name: DatabaseName,
        /// What is wrong.
        reason: &'static str,
    },
    /// Logging failed.
    #[error("database {name}: {source}")]
    Capture {
        /// The database.
        name: DatabaseName,
        /// Reason.
        source: CaptureError,
    },
    /// Applying failed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Reading the database that is moved failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl ImportError {
    /// The error number a program copying a file over the database gets.
    pub fn errno(&self) -> i32 {
        match self {
            ImportError::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            ImportError::NotADatabase { .. } => libc::EINVAL,
            ImportError::Capture { source, .. } => source.errno(),
            ImportError::Apply(ApplyError::Busy { .. }) | ImportError::Engine(EngineError::Busy(_)) => {
                libc::EBUSY
            }
            ImportError::Apply(ApplyError::Io { source, .. }) => source.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EIO,
        }
    }
}

impl Database {
    /// Makes a plain SQLite file the database. Goes through the mount: never on a thread that serves it. The file
    /// stays where it is, unless the database did not exist.
    pub fn import(&self, staged: &Path) -> Result<Pos, ImportError> {
        let io_error = |source| ImportError::Io { path: staged.to_owned(), source };
        let capture = |source| ImportError::Capture { name: self.name.clone(), source };
        self.check_writable().map_err(capture)?;
        let file = File::open(staged).map_err(io_error)?;
        let len = file.metadata().map_err(io_error)?.len();
        let mut first = [0; sqlite_file::header::HEADER_BYTES];
        let bad = |reason| ImportError::NotADatabase { name: self.name.clone(), reason };
        file.read_exact_at(&mut first, 0).map_err(|_| bad("shorter than a header"))?;
        let header = DatabaseHeader::parse(&first).map_err(|_| bad("its header is not SQLite's"))?;
        if !len.is_multiple_of(u64::from(header.page_size)) {
            return Err(bad("its size is not a whole number of pages"));
        }
        if header.trusted_page_count().is_some_and(|n| u64::from(n) * u64::from(header.page_size) != len) {
            return Err(bad("its header states another size; it is incomplete, or has pages in a WAL"));
        }
        let page_count =
            u32::try_from(len / u64::from(header.page_size)).map_err(|_| bad("too many pages"))?;

        let mut side = self.apply.lock();
        let mut st = self.state();
        st.check_health().map_err(capture)?;
        if !self.paths.database.exists() {
            return self.adopt_staged(&mut st, staged).map_err(capture);
        }
        let wal_mode = self.load_journal_mode(&mut st);
        let current = DatabaseShape { page_size: st.page_size, page_count: st.page_count, wal_mode };
        drop(st);
        let mut source =
            Import { db: self, file, header, page_count, logged: None, failed: None, announced: false };
        let applied = side.applier.apply(current, &mut source, IMPORT_PATIENCE);
        let logged = source.logged.is_some();
        if let Some(failed) = source.failed {
            return Err(capture(failed));
        }
        match applied {
            Ok(shape) => self.state().set_wal_mode(shape.wal_mode),
            Err(error) if logged => {
                // Log and file disagree until recovery; nobody may write in between.
                self.state().quarantine(self, format!("an import was logged but not written: {error}"));
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
        // Applications are the writers here: leave the database to them.
        if let Err(error) = side.applier.detach() {
            tracing::debug!(database = %self.name, %error, "the import stays attached");
        }
        Ok(self.state().position)
    }

    /// Whether the file is an SQLite database as long as its header says.
    pub(crate) fn is_complete_database(&self) -> bool {
        let mut first = [0; sqlite_file::header::HEADER_BYTES];
        let Ok(file) = File::open(&self.paths.database) else { return false };
        let len = file.metadata().map_or(0, |m| m.len());
        file.read_exact_at(&mut first, 0).is_ok()
            && DatabaseHeader::parse(&first)
                .is_ok_and(|h| u64::from(h.page_count(len)) * u64::from(h.page_size) == len)
    }

    /// There is no such file yet: the staged one becomes it.
    fn adopt_staged(&self, st: &mut State, staged: &Path) -> Result<Pos, CaptureError> {
        let failed = |source| CaptureError::Io { path: self.paths.database.clone(), source };
        if let Some(dir) = self.paths.database.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        std::fs::set_permissions(staged, std::fs::Permissions::from_mode(0o644)).map_err(failed)?;
        std::fs::rename(staged, &self.paths.database).map_err(failed)?;
        st.set_database_file(None);
        st.forget_journal_mode();
        st.rollback.mark_unknown();
        self.capture_rollback(st)?;
        self.shared.forget_name(self);
        Ok(st.position)
    }

    /// Whether somebody has the database open, or left something that is not in its file yet.
    pub fn is_in_use(&self) -> bool {
        let hot =
            |path: &Path| File::open(path).and_then(|f| sqlite_file::journal::is_hot(&f)).unwrap_or(false);
        self.state().handles > 0 || self.has_wal() || hot(&self.paths.journal)
    }

    /// What rename(2) of `source` to this database means: its content becomes this database's next transaction, and
    /// `from`, if it is a database, is dropped. Neither is in use. Nothing goes through the mount.
    pub fn replace_by_rename(&self, from: Option<&Database>, source: &Path) -> Result<(), CaptureError> {
        let file = File::open(source).map_err(|e| self.database_error(e))?;
        let mut first = [0; sqlite_file::header::HEADER_BYTES];
        if file.read_exact_at(&mut first, 0).is_err() || DatabaseHeader::parse(&first).is_err() {
            return Err(CaptureError::NotADatabase("what is renamed to it is no SQLite database"));
        }
        let io = |e| self.database_error(e);
        {
            let mut st = self.state();
            let kept = self.paths.database.with_extension("replaced-by-rename");
            let replaced = self.paths.database.exists();
            if replaced {
                std::fs::rename(&self.paths.database, &kept).map_err(io)?;
            }
            let captured = std::fs::rename(source, &self.paths.database).map_err(io).and_then(|()| {
                st.set_database_file(None);
                st.forget_journal_mode();
                st.rollback.mark_unknown();
                self.capture_rollback(&mut st)
            });
            if let Err(e) = captured {
                // As it was before: the log has nothing of it.
                std::fs::rename(&self.paths.database, source).map_err(io)?;
                if replaced {
                    std::fs::rename(&kept, &self.paths.database).map_err(io)?;
                }
                st.set_database_file(None);
                st.forget_journal_mode();
                st.rollback = Default::default();
                return Err(e);
            }
            if replaced {
                std::fs::remove_file(&kept).map_err(io)?;
            }
        }
        if let Some(from) = from {
            from.shared.forget_name(from);
            from.log_drop(&mut from.state())?;
            for left in [&from.paths.journal, &from.paths.wal, &from.paths.shm] {
                match std::fs::remove_file(left) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(from.database_error(e)),
                    _ => {}
                }
            }
        }
        self.shared.forget_name(self);
        Ok(())
    }

    /// The database is dropped: its last transaction says so, and its TXIDs go on if it is made again.
    pub fn log_drop(&self, st: &mut State) -> Result<(), CaptureError> {
        let commit =
            Commit { page_size: st.page_size, page_count: 0, pages: &[], wal: None, may_hold: false };
        log_transaction(self, st, &commit, &mut |_, _| Ok(()))?;
        st.set_database_file(None);
        st.forget_journal_mode();
        st.wal.reset();
        st.wal.forget_put_back();
        st.rollback = Default::default();
        Ok(())
    }
}

/// The transaction of an import. Its pages are asked for under the locks of an SQLite writer: only then is it compared
/// and logged, so that no commit can come in between.
struct Import<'a> {
    db: &'a Database,
    file: File,
    header: DatabaseHeader,
    page_count: u32,
    logged: Option<Decoder<PayloadReader>>,
    failed: Option<CaptureError>,
    announced: bool,
}

impl Import<'_> {
    fn log(&mut self) -> Result<Decoder<PayloadReader>, CaptureError> {
        let db = self.db;
        let mut st = db.state();
        // The import holds the locks of a writer: what others have published comes before it.
        db.follow_wal(&mut st)?;
        let stamp = self.change_stamp(&mut st)?;
        let pages: Vec<u32> = (1..=self.page_count).collect();
        let commit = Commit {
            page_size: self.header.page_size,
            page_count: self.page_count,
            pages: &pages,
            wal: None,
            may_hold: false,
        };
        let file = &self.file;
        log_transaction(db, &mut st, &commit, &mut |pgno, buf| {
            db.read_database_page(file, pgno, buf)?;
            if pgno == 1
                && let Some((counter, cookie)) = stamp
            {
                buf[24..28].copy_from_slice(&counter.to_be_bytes());
                buf[40..44].copy_from_slice(&cookie.to_be_bytes());
                buf[92..96].copy_from_slice(&counter.to_be_bytes());
            }
            Ok(())
        })?
        .ok_or(CaptureError::NotADatabase("the import changes nothing"))?;
        let record =
            db.shared.log.last(&db.name).ok_or(CaptureError::NotADatabase("the log has no record of it"))?;
        Ok(Decoder::new(PayloadReader::of(&db.shared.log, &record))?)
    }

    /// Open connections notice a new change counter and a new schema cookie (bytes 24 and 40 of page 1, and the
    /// counter again at 92, which says that the size at 28 is valid).
    fn change_stamp(&self, st: &mut State) -> Result<Option<(u32, u32)>, CaptureError> {
        if st.page_count == 0 {
            return Ok(None);
        }
        let word =
            |page: &[u8], at: usize| u32::from_be_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        let mut theirs = [0; sqlite_file::header::HEADER_BYTES];
        self.db.read_at_or_zero(&self.file, &mut theirs, 0)?;
        let wal = File::open(&self.db.paths.wal).ok();
        let ours = self.db.committed_page(st, wal.as_ref(), 1)?;
        let ours = ours.as_deref().unwrap_or(&theirs);
        let newer = |at| word(&theirs, at).max(word(ours, at)).wrapping_add(1);
        Ok(Some((newer(24), newer(40))))
    }
}

impl TransactionSource for Import<'_> {
    fn next_transaction(&mut self) -> Result<Option<TransactionHeader>, ltx::Error> {
        if std::mem::replace(&mut self.announced, true) {
            return Ok(None);
        }
        Ok(Some(TransactionHeader { page_size: self.header.page_size, commit: self.page_count, owner: None }))
    }

    fn next_page(&mut self, page: &mut Vec<u8>) -> Result<Option<u32>, ltx::Error> {
        if self.logged.is_none() {
            match self.log() {
                Ok(decoder) => self.logged = Some(decoder),
                Err(error) => {
                    let source = io::Error::other(error.to_string());
                    self.failed = Some(error);
                    return Err(ltx::Error::Io { offset: 0, source });
                }
            }
        }
        match &mut self.logged {
            Some(decoder) => decoder.next_page(page),
            None => Ok(None),
        }
    }
}
