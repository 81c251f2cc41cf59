//! The files of one database, and errors that name them.

use super::{ApplyError, TransactionHeader, TransactionSource};
use crate::DatabaseName;
use crate::database::write_protection;
use sqlite_file::{journal::JournalError, wal::WalError, wal_index::WalIndexError};
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long an operation may wait for the locks of others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    begun: Instant,
    bound: Duration,
}

impl Patience {
    pub fn new(bound: Duration) -> Self {
        Patience { begun: Instant::now(), bound }
    }

    /// How long is left.
    pub fn left(&self) -> Duration {
        self.bound.saturating_sub(self.begun.elapsed())
    }

    /// As [`Patience::poll`], without longer pauses: among others who want the same all the time.
    pub fn insist(&self, mut attempt: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
        loop {
            if attempt()? {
                return Ok(true);
            }
            if self.left().is_zero() {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Tries until it works or the bound is over, at least once; pauses in between are short and grow.
    pub fn poll(&self, mut attempt: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
        let mut pause = Duration::from_micros(50);
        loop {
            if attempt()? {
                return Ok(true);
            }
            let left = self.left();
            if left.is_zero() {
                return Ok(false);
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }
}

/// Name and paths of a database.
#[derive(Debug)]
pub(super) struct Files {
    pub name: DatabaseName,
    pub database: PathBuf,
    pub wal: PathBuf,
    pub shm: PathBuf,
    pub journal: PathBuf,
}

impl Files {
    pub fn new(name: DatabaseName, database: PathBuf) -> Self {
        let beside = |suffix: &str| {
            let mut path = database.clone().into_os_string();
            path.push(suffix);
            PathBuf::from(path)
        };
        Files { name, wal: beside("-wal"), shm: beside("-shm"), journal: beside("-journal"), database }
    }

    pub fn io(&self, action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ApplyError {
        let (database, path) = (self.name.clone(), path.to_owned());
        move |source| ApplyError::Io { database, path, action, source }
    }

    pub fn busy(&self, lock: &'static str, patience: &Patience) -> ApplyError {
        ApplyError::Busy { database: self.name.clone(), lock, waited: patience.begun.elapsed() }
    }

    pub fn wal_error(&self, source: WalError) -> ApplyError {
        ApplyError::Wal { database: self.name.clone(), path: self.wal.clone(), source }
    }

    pub fn index_error(&self, source: WalIndexError) -> ApplyError {
        ApplyError::WalIndex { database: self.name.clone(), path: self.shm.clone(), source }
    }

    pub fn journal_error(&self, source: JournalError) -> ApplyError {
        ApplyError::Journal { database: self.name.clone(), path: self.journal.clone(), source }
    }

    pub fn invalid(&self, reason: impl Into<String>) -> ApplyError {
        ApplyError::InvalidTransaction { database: self.name.clone(), reason: reason.into() }
    }

    /// The database file, if there is one.
    pub fn open_database(&self) -> Result<Option<File>, ApplyError> {
        match open_existing(&self.database) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.io("open", &self.database)(e)),
        }
    }

    /// Opens a file beside the database, creating it with the database's mode and owner as SQLite does.
    pub fn open_beside(&self, path: &Path, database: &File) -> Result<File, ApplyError> {
        let like = database.metadata().map_err(self.io("inspect", &self.database))?;
        let mode = write_protection::mode(database, like.mode()) & 0o777;
        let open = || match open_existing(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                match create(path, mode, Some((like.uid(), like.gid()))) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => open_existing(path),
                    other => other,
                }
            }
            other => other,
        };
        open().map_err(self.io("open", path))
    }

    /// Removes a file; it is all right if there is none.
    pub fn remove(&self, path: &Path) -> Result<(), ApplyError> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.io("remove", path)(e)),
            _ => Ok(()),
        }
    }

    pub fn next_transaction(
        &self,
        source: &mut dyn TransactionSource,
    ) -> Result<Option<TransactionHeader>, ApplyError> {
        let next = source.next_transaction().map_err(|source| self.record_error(source))?;
        if let Some(header) = &next
            && header.commit > 0
            && !ltx::is_page_size(header.page_size)
        {
            return Err(self.invalid(format!("its page size is {}", header.page_size)));
        }
        Ok(next)
    }

    /// The next page of a transaction, checked to be one that a database of this size can have after `last`.
    pub fn next_page(
        &self,
        source: &mut dyn TransactionSource,
        header: &TransactionHeader,
        last: u32,
        page: &mut Vec<u8>,
    ) -> Result<Option<u32>, ApplyError> {
        let Some(pgno) = source.next_page(page).map_err(|source| self.record_error(source))? else {
            return Ok(None);
        };
        if pgno <= last || pgno > header.commit || pgno == ltx::lock_page(header.page_size) {
            let commit = header.commit;
            return Err(
                self.invalid(format!("page {pgno} follows page {last} in a database of {commit} pages"))
            );
        }
        if page.len() != header.page_size as usize {
            return Err(self.invalid(format!(
                "page {pgno} has {} bytes instead of {}",
                page.len(),
                header.page_size
            )));
        }
        Ok(Some(pgno))
    }

    /// Errors when a transaction of `count` pages is not a whole database.
    pub fn check_whole(&self, transaction: &TransactionHeader, count: u32) -> Result<(), ApplyError> {
        let whole =
            transaction.commit - u32::from(transaction.commit >= ltx::lock_page(transaction.page_size));
        if count == whole {
            return Ok(());
        }
        Err(self.invalid(format!("it has {count} of the {whole} pages of a new database")))
    }

    fn record_error(&self, source: ltx::Error) -> ApplyError {
        ApplyError::Record { database: self.name.clone(), source }
    }
}

fn open_existing(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Creates a file that must not exist, with exactly this mode, and this owner as far as this process may set it.
pub(super) fn create(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).custom_flags(libc::O_NOFOLLOW);
    let file = options.mode(mode).open(path)?;
    let now = file.metadata()?;
    if now.mode() & 0o777 != mode {
        // The umask took something away.
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    if let Some((uid, gid)) = owner
        && (now.uid(), now.gid()) != (uid, gid)
    {
        match std::os::unix::fs::fchown(&file, Some(uid), Some(gid)) {
            // Not root: the file belongs to the agent's user, as it would to an application's.
            Err(e) if e.kind() != io::ErrorKind::PermissionDenied => return Err(e),
            _ => {}
        }
    }
    Ok(file)
}
