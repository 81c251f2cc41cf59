//! What a record of the log says, as the rest of the agent sees it.

use crate::DatabaseName;
use crate::ship::engine::Epoch;
use bytes::Bytes;
use ltx::{Checksum, Txid};
use std::fmt;
use std::path::PathBuf;

/// A position in the log, in bytes. It only grows and is never given out twice: after an unclean stop the log goes
/// on 4 GiB further up, so a difference of two LSNs is an amount of bytes only
/// between records of one run. 0 comes before every record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What a record stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// One or more transactions as an LTX file.
    Transaction,
    /// The database jumped to `max_txid`/`post_apply` by an installed snapshot. What was before it is no longer
    /// part of the history. The payload is up to the writer.
    Reset,
}

/// Where in the database's WAL a transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WalEnd {
    /// First salt of the WAL header.
    pub salt1: u32,
    /// Second salt of the WAL header.
    pub salt2: u32,
    /// Offset in the WAL file just after the transaction's commit frame, in bytes.
    pub end_offset: u64,
}

/// A record to append, without its payload.
#[derive(Clone, Debug)]
pub struct NewRecord<'a> {
    /// Database it belongs to.
    pub database: &'a DatabaseName,
    /// What it stands for.
    pub kind: RecordKind,
    /// Term it was committed in.
    pub epoch: Epoch,
    /// First transaction in it.
    pub min_txid: Txid,
    /// Last transaction in it.
    pub max_txid: Txid,
    /// Checksum of the database before it.
    pub pre_apply: Checksum,
    /// Checksum of the database after it.
    pub post_apply: Checksum,
    /// Bytes in a page; 0 when the database was dropped.
    pub page_size: u32,
    /// Size of the database after it, in pages.
    pub commit: u32,
    /// When it was committed, in milliseconds since 1970 by the primary's clock.
    pub timestamp_ms: i64,
    /// Where it ends in the WAL, for transactions that were captured from one.
    pub wal: Option<WalEnd>,
    /// Looked at again when nothing but the write is left to do.
    pub fence: Option<&'a dyn Fence>,
}

/// What a record must not be appended beyond: the end of this node's term.
pub trait Fence: fmt::Debug + Sync {
    /// Whether the record may still be appended.
    fn is_open(&self) -> bool;
}

/// Where the payload of a record is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PayloadPlace {
    /// In the log, right after the record's header.
    Inline {
        /// Its size in bytes.
        len: u64,
    },
    /// In a file of its own below the `ltx` directory.
    External {
        /// Name in the database's directory below `ltx`.
        file_name: String,
        /// Its size in bytes.
        size: u64,
    },
}

/// A record of the log, without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    /// Where it starts.
    pub lsn: Lsn,
    /// Bytes it takes in the log.
    pub len: u64,
    /// Database it belongs to.
    pub database: DatabaseName,
    /// What it stands for.
    pub kind: RecordKind,
    /// Term it was committed in.
    pub epoch: Epoch,
    /// First transaction in it.
    pub min_txid: Txid,
    /// Last transaction in it.
    pub max_txid: Txid,
    /// Checksum of the database before it.
    pub pre_apply: Checksum,
    /// Checksum of the database after it.
    pub post_apply: Checksum,
    /// Bytes in a page; 0 when the database was dropped.
    pub page_size: u32,
    /// Size of the database after it, in pages.
    pub commit: u32,
    /// When it was committed, in milliseconds since 1970 by the primary's clock.
    pub timestamp_ms: i64,
    /// Where it ends in the WAL, for transactions that were captured from one.
    pub wal: Option<WalEnd>,
    /// The previous record of the same database. It may no longer be kept.
    pub prev: Option<Lsn>,
    /// Where its payload is.
    pub payload: PayloadPlace,
    /// CRC-64 of an inline payload, or of the last [`super::format::EXTERNAL_TAIL_BYTES`] of an external one.
    pub(super) payload_crc: u64,
}

impl RecordInfo {
    /// Where the next record starts.
    pub fn end(&self) -> Lsn {
        Lsn(self.lsn.0 + self.len)
    }

    /// Size of the payload in bytes, wherever it is.
    pub fn payload_bytes(&self) -> u64 {
        match self.payload {
            PayloadPlace::Inline { len } => len,
            PayloadPlace::External { size, .. } => size,
        }
    }

    /// Whether the record tells about transaction `txid`. A reset only tells about the one it jumped to.
    pub fn covers(&self, txid: Txid) -> bool {
        self.first_txid() <= txid && txid <= self.max_txid
    }

    /// First transaction the record tells about.
    pub(super) fn first_txid(&self) -> Txid {
        match self.kind {
            RecordKind::Transaction => self.min_txid,
            RecordKind::Reset => self.max_txid,
        }
    }
}

/// The payload of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// All of it, checked against the record's checksum.
    Bytes(Bytes),
    /// A file. Its size and its last bytes (where LTX keeps the checksum of the whole) have been checked.
    /// Retention may remove it at any time: open it before relying on it.
    File {
        /// Its path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
}
