//! What shipping needs from the node. The node implements these traits; the tests of shipping fake them.

use crate::DatabaseName;
use bytes::Bytes;
use ltx::{Checksum, Pos, Txid};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use tokio::sync::broadcast;

/// Number of a primary's term; whatever carries an older one is refused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Epoch(pub u64);

/// One LTX file on its way between two logs.
#[derive(Clone, Debug)]
pub struct ShippedRecord {
    /// Epoch the record was committed in.
    pub epoch: Epoch,
    /// First transaction in it.
    pub min_txid: Txid,
    /// Last transaction in it.
    pub max_txid: Txid,
    /// Checksum of the database after it.
    pub post_apply: Checksum,
    /// The LTX file.
    pub payload: RecordPayload,
}

/// Where the bytes of a record are: large ones stay in files so that no side holds them in memory.
#[derive(Clone, Debug)]
pub enum RecordPayload {
    /// The whole LTX file.
    Bytes(Bytes),
    /// A complete, fsynced LTX file. The receiver of a record may rename it away.
    File {
        /// Its path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
}

/// What the source's history says of a follower's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The position is in the history and every record after it is still in the log.
    Continue,
    /// The position is before the first record that is kept (or the follower has nothing): send a snapshot.
    Gap,
    /// The history has another checksum at that TXID, or ends before it: the follower has something of its own.
    Diverged,
}

/// Committed pages of a database, each as of `position` or later, read without stopping writers.
#[derive(Clone, Debug)]
pub struct PageRange {
    /// Durable position when the read began.
    pub position: Pos,
    /// Bytes in a page.
    pub page_size: u32,
    /// Size of the database in pages at `position`.
    pub commit: u32,
    /// Page number and content, ascending; the lock page and pages past the end are left out.
    pub pages: Vec<(u32, Bytes)>,
}

/// A snapshot that has been received, checked and fsynced, ready to become the database.
#[derive(Clone, Debug)]
pub struct StagedSnapshot {
    /// The database as one plain file in the node's staging directory.
    pub path: PathBuf,
    /// Bytes in a page; 0 when the database was dropped at `position`.
    pub page_size: u32,
    /// Size in pages.
    pub commit: u32,
    /// The position it is exactly at.
    pub position: Pos,
    /// Epoch of the record that brought it to `position`, or of the stream.
    pub epoch: Epoch,
}

/// Errors of the engine behind the traits; already carry database and path.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The record does not follow the database's position: reconnect and resume.
    #[error("record {min_txid}-{max_txid} does not follow {name} at {position}")]
    OutOfSequence {
        /// Database.
        name: DatabaseName,
        /// First transaction of the record.
        min_txid: Txid,
        /// Last transaction of the record.
        max_txid: Txid,
        /// Where the database is.
        position: Pos,
    },
    /// What is on disk is not what was committed.
    #[error("{0}")]
    ChecksumMismatch(String),
    /// The record belongs to an older epoch than this node has seen.
    #[error("epoch {got} is older than epoch {seen} that this node has seen")]
    OldEpoch {
        /// Epoch on the record or stream.
        got: u64,
        /// Newest epoch this node knows.
        seen: u64,
    },
    /// The database cannot be trusted and stands aside.
    #[error("database {name} is quarantined: {reason}")]
    Quarantined {
        /// Database.
        name: DatabaseName,
        /// Why.
        reason: String,
    },
    /// No such database here.
    #[error("no database {0} on this node")]
    NoSuchDatabase(DatabaseName),
    /// Readers or writers held the database longer than the bound; nothing was changed.
    #[error("database {0} is busy: its locks were held longer than the bound")]
    Busy(DatabaseName),
    /// Anything else, with its context.
    #[error("{0}")]
    Other(String),
}

/// The side that is followed. `epoch`, `position`, `recent_record` and what tells of followers are called on the async
/// threads and must not wait for the disk; all others may.
pub trait Source: Send + Sync + 'static {
    /// This node's identity.
    fn node_id(&self) -> u64;
    /// Epoch of the term whose history is served.
    fn epoch(&self) -> Epoch;
    /// All databases with their durable positions (dropped ones too: their TXIDs go on).
    fn databases(&self) -> Vec<(DatabaseName, Pos)>;
    /// Durable position of one database.
    fn position(&self, name: &DatabaseName) -> Option<Pos>;
    /// Names of databases whose durable position moved. A receiver that lags re-reads [`Source::databases`].
    fn changes(&self) -> broadcast::Receiver<DatabaseName>;
    /// Compares a follower's position with the history.
    fn resume(&self, name: &DatabaseName, position: Pos) -> Result<Resume, EngineError>;
    /// The post-apply checksum of one transaction, while its record is kept.
    fn checksum_at(&self, name: &DatabaseName, txid: Txid) -> Result<Option<Checksum>, EngineError>;
    /// As [`Source::record`], of records whose bytes are in memory: `None` says nothing about the log.
    fn recent_record(&self, name: &DatabaseName, min_txid: Txid) -> Option<ShippedRecord>;
    /// The durable record that begins with `min_txid`; `None` when there is none yet or it is no longer kept.
    fn record(&self, name: &DatabaseName, min_txid: Txid) -> Result<Option<ShippedRecord>, EngineError>;
    /// Committed pages in `range`, which may reach past the end or lie beyond it. When the call returns, the commits
    /// that wrote what it gives are durable: no page is newer than [`Source::position`] is then. May block on the
    /// disk: call it off the async threads.
    fn pages(&self, name: &DatabaseName, range: RangeInclusive<u32>) -> Result<PageRange, EngineError>;
    /// Says how far a follower is, while it is connected, so that retention keeps what it needs. `None`: it left.
    fn follower_position(&self, follower: u64, name: &DatabaseName, needs_after: Option<Txid>);
    /// A follower of this identity and name is connected.
    fn follower_joined(&self, _follower: u64, _name: &str) {}
    /// A follower has this position, of whatever history, durably in its log.
    fn follower_acknowledged(&self, _follower: u64, _name: &DatabaseName, _position: Pos) {}
    /// A follower is not connected any more.
    fn follower_left(&self, _follower: u64) {}
}

/// The side that follows. All methods may block: call them off the async threads.
pub trait Sink: Send + Sync + 'static {
    /// This node's identity.
    fn node_id(&self) -> u64;
    /// Newest epoch this node knows.
    fn epoch(&self) -> Epoch;
    /// Adopts a newer epoch (durably) or refuses an older one.
    fn observe_epoch(&self, epoch: Epoch) -> Result<(), EngineError>;
    /// All databases with their positions.
    fn databases(&self) -> Vec<(DatabaseName, Pos)>;
    /// Position of one database (0/0 when unknown).
    fn position(&self, name: &DatabaseName) -> Pos;
    /// Appends consecutive records to the log, makes them durable, applies them. Returns the new position:
    /// everything up to it is durable in this node's log, and visible here. `durable` is told a position as soon as
    /// it is durable, before readers can see it.
    fn receive(
        &self,
        name: &DatabaseName,
        records: Vec<ShippedRecord>,
        durable: &mut dyn FnMut(Pos),
    ) -> Result<Pos, EngineError>;
    /// Where staged snapshots and large records may be kept; on the file system of the databases.
    fn staging_dir(&self) -> PathBuf;
    /// Makes a staged snapshot the database. `common`: last transaction shared with the upstream, when known;
    /// what this node had after it is kept as files and reported.
    fn install(
        &self,
        name: &DatabaseName,
        snapshot: StagedSnapshot,
        common: Option<Txid>,
    ) -> Result<(), EngineError>;
    /// Post-apply checksum of an own transaction, while its record is kept.
    fn checksum_at(&self, name: &DatabaseName, txid: Txid) -> Result<Option<Checksum>, EngineError>;
    /// TXIDs whose records this node still keeps, oldest and newest.
    fn kept(&self, name: &DatabaseName) -> Option<(Txid, Txid)>;
    /// Reports that an upstream is connected (its host name as it gives it) or was lost.
    fn upstream_changed(&self, upstream: Option<String>);
    /// Reports that the upstream has told all positions that differ from this node's, since it was connected.
    fn compared(&self) {}
    /// Reports the upstream's clock and position, for lag.
    fn upstream_position(&self, name: &DatabaseName, position: Pos, upstream_unix_ms: i64);
}
