//! Why a transaction could not be applied.

use crate::DatabaseName;
use sqlite_file::{journal::JournalError, wal::WalError, wal_index::WalIndexError};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Errors of [`super::Applier`]. Unless a variant says otherwise, what applications read is the state before the
/// call or after one of its transactions, and the same transactions may be given again.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Somebody else held a lock for the whole bound. Try again later; after `bound` an operator may look for the
    /// process in `/proc/locks`.
    #[error(
        "database {database} is busy: could not get {lock} within {waited:?}; close long transactions on it"
    )]
    Busy {
        /// Database.
        database: DatabaseName,
        /// Lock that was not free.
        lock: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// A file operation failed.
    #[error("database {database}: cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// Database.
        database: DatabaseName,
        /// File.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Answer of the operating system.
        source: io::Error,
    },
    /// The WAL could not be read.
    #[error("database {database}: {path}: {source}", path = .path.display())]
    Wal {
        /// Database.
        database: DatabaseName,
        /// File.
        path: PathBuf,
        /// What is wrong.
        source: WalError,
    },
    /// The wal-index could not be used.
    #[error("database {database}: {path}: {source}; close all applications on it to have it rebuilt", path = .path.display())]
    WalIndex {
        /// Database.
        database: DatabaseName,
        /// File.
        path: PathBuf,
        /// What is wrong.
        source: WalIndexError,
    },
    /// A hot journal could not be played back.
    #[error("database {database}: {path}: {source}", path = .path.display())]
    Journal {
        /// Database.
        database: DatabaseName,
        /// File.
        path: PathBuf,
        /// What is wrong.
        source: JournalError,
    },
    /// Somebody else has committed in the WAL. Nothing was changed.
    #[error("database {database}: {path}: somebody committed there, and not through this agent", path = .path.display())]
    ForeignCommit {
        /// Database.
        database: DatabaseName,
        /// File.
        path: PathBuf,
    },
    /// The record that holds the transaction could not be read.
    #[error("database {database}: cannot read the record of a transaction: {source}")]
    Record {
        /// Database.
        database: DatabaseName,
        /// What is wrong.
        source: ltx::Error,
    },
    /// A transaction cannot be one of this database: the record is wrong though its checksum is right.
    #[error("database {database}: a transaction is not valid: {reason}; fetch a snapshot")]
    InvalidTransaction {
        /// Database.
        database: DatabaseName,
        /// What is wrong with it.
        reason: String,
    },
}
