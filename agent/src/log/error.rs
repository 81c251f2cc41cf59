//! What can go wrong with the log.

use super::record::Lsn;
use crate::DatabaseName;
use ltx::{Checksum, Txid};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A part of the log that was durable once and cannot be read any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// File it is in.
    pub segment: PathBuf,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// Where in the log it begins.
    pub lsn: Lsn,
    /// Where the next readable record begins, or the segment ends.
    pub end: Lsn,
    /// Database of the record, when that can still be told.
    pub database: Option<DatabaseName>,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is damaged at offset {}", self.segment.display(), self.offset)?;
        match &self.database {
            Some(name) => write!(f, " (database {name})")?,
            None => write!(f, " (database unknown)")?,
        }
        write!(f, ": {}", self.reason)
    }
}

/// Errors of the log. Cheap to clone: one failed fsync answers every waiter.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LogError {
    /// The system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The file system is full. Nothing was appended, and appending works again once there is space.
    #[error("no space for the commit log in {}: {source}; free some space, then commits work again", path.display())]
    NoSpace {
        /// Directory of the log, or the file that could not grow.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A write to the disk was lost. What the log holds can be known again only by opening it anew.
    #[error(
        "the commit log in {} failed and takes nothing more: {source}; check the disk, then restart the agent",
        path.display()
    )]
    Failed {
        /// Directory of the log.
        path: PathBuf,
        /// What the system said to the first failed fsync.
        source: Arc<io::Error>,
    },
    /// The term in which the transaction was committed has ended. Nothing was appended.
    #[error(
        "{database}: transaction {min_txid} was not committed: this node's term as the primary has ended"
    )]
    Fenced {
        /// Database of the record.
        database: DatabaseName,
        /// Its first transaction.
        min_txid: Txid,
    },
    /// The log is being closed.
    #[error("the commit log in {} is closed", .0.display())]
    Closed(PathBuf),
    /// A file with the name of a segment is something else.
    #[error("{} is not a segment of a LiteFS commit log: {reason}; move it out of the directory", path.display())]
    NotASegment {
        /// The file.
        path: PathBuf,
        /// How that was noticed.
        reason: String,
    },
    /// A segment was written by another version of this program.
    #[error("{} has format version {found}, this program knows {known}: use the version that wrote it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Version in the file.
        found: u32,
        /// Version this program writes.
        known: u32,
    },
    /// A segment belongs to another log.
    #[error("{} belongs to another log (id {found:016x}, this one is {expected:016x}): move it away", path.display())]
    ForeignSegment {
        /// The file.
        path: PathBuf,
        /// Log id in the file.
        found: u64,
        /// Log id of the other segments.
        expected: u64,
    },
    /// The record that was asked for, or one on the way to it, is damaged.
    #[error("{0}")]
    Damaged(Damage),
    /// Retention has removed the record.
    #[error("the record at {lsn} is no longer in the log, which begins at {oldest}")]
    Gone {
        /// What was asked for.
        lsn: Lsn,
        /// Where the log begins now.
        oldest: Lsn,
    },
    /// The record does not follow the last one of its database. Nothing was appended.
    #[error(
        "record {min_txid}-{max_txid} on {pre_apply} does not follow {database}, \
         which the log has at {last_txid}/{last_checksum}"
    )]
    OutOfSequence {
        /// Database.
        database: DatabaseName,
        /// First transaction of the record.
        min_txid: Txid,
        /// Last transaction of the record.
        max_txid: Txid,
        /// Checksum the record builds on.
        pre_apply: Checksum,
        /// Last transaction in the log.
        last_txid: Txid,
        /// Checksum after it.
        last_checksum: Checksum,
    },
    /// The record is from an older term than the last one of its database. Nothing was appended.
    #[error("record {min_txid} of {database} has epoch {epoch}, older than epoch {last} in the log")]
    OldEpoch {
        /// Database.
        database: DatabaseName,
        /// First transaction of the record.
        min_txid: Txid,
        /// Its epoch.
        epoch: u64,
        /// Epoch of the last record of the database.
        last: u64,
    },
    /// The record cannot be. Nothing was appended.
    #[error("record {min_txid}-{max_txid} of {database}: {reason}")]
    BadRecord {
        /// Database.
        database: DatabaseName,
        /// First transaction of the record.
        min_txid: Txid,
        /// Last transaction of the record.
        max_txid: Txid,
        /// What is wrong.
        reason: &'static str,
    },
    /// An option has a value that cannot work.
    #[error("commit log option {option}: {reason}")]
    BadOption {
        /// Name of the option.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl LogError {
    /// Wraps what the system said about `path`; a full file system gets its own variant.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let (path, full) = (path.to_owned(), is_full(&source));
        let source = Arc::new(source);
        if full { LogError::NoSpace { path, source } } else { LogError::Io { action, path, source } }
    }
}

/// Whether the error says that the file system or a quota is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
