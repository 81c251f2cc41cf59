//! Capture: from pages that SQLite has committed to one LTX record in the log.
//!
//! The doors say *when* (see [`wal`] and [`rollback`]); this module decides *what* changed, by comparing page
//! checksums with the sidecar, and makes it the next transaction. Nothing is visible in the database's state until
//! the log has the record, so a failure leaves everything as it was and the application's commit fails.

pub mod rollback;
pub mod wal;

use crate::database::checksums::ChecksumsError;
use crate::database::halt::Transaction;
use crate::database::recovery::WAL_IS_FROM_THE_LOG;
use crate::database::{Database, State, write_protection};
use crate::log::{LogError, Lsn, NewRecord, RecordKind, WalEnd};
use crate::ship::engine::{RecordPayload, ShippedRecord};
use bytes::Bytes;
use ltx::{Checksum, Encoder, Header, Owner, Pos, Txid, lock_page, page_checksum};
use sqlite_file::untimed::Untimed;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Transactions whose pages add up to more than this are encoded into a file instead of memory.
const IN_MEMORY_BYTES_MAX: u64 = 1024 * 1024;

/// Why a commit could not be captured. The application gets [`CaptureError::errno`].
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// This node does not take writes for the database.
    #[error("this node is not the primary")]
    NotPrimary,
    /// The database stands aside.
    #[error("the database is quarantined: {0}")]
    Quarantined(String),
    /// A file of the database failed.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// The log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The sidecar failed.
    #[error(transparent)]
    Checksums(#[from] ChecksumsError),
    /// The transaction cannot be written as LTX.
    #[error("cannot encode the transaction: {0}")]
    Ltx(#[from] ltx::Error),
    /// The rest of a write that was refused: SQLite tries it again before it gives up.
    #[error("the write was refused before")]
    RefusedBefore {
        /// Error number of the refusal.
        errno: i32,
    },
    /// Somebody began to write, or to move pages from the WAL to the file, while these were being read: tried again.
    #[error("the database is in use at this moment")]
    InUse,
    /// The WAL has what the database file lacks.
    #[error(
        "the WAL has transactions that are not in the database file yet, and the database is open: close all connections \
         (SQLite then checkpoints), do not remove the WAL by hand"
    )]
    WalIsNeeded,
    /// This node was promoted while readers held up what it had received.
    #[error(
        "the newest transactions received are not in the database file yet, because readers hold them up: commit again \
         when these have ended"
    )]
    NotAllApplied,
    /// Too few followers, and the configuration refuses commits then.
    #[error(transparent)]
    Unacknowledged(#[from] crate::sync::Refused),
    /// The primary has not taken it, or nobody knows whether it has.
    #[error("the halt lock is lost: {0}; the primary may have this transaction nevertheless")]
    HaltLock(String),
    /// What was committed is no SQLite database.
    #[error("not an SQLite database: {0}")]
    NotADatabase(&'static str),
}

impl CaptureError {
    /// The error number the application's system call returns; SQLite maps ENOSPC to SQLITE_FULL, EROFS and
    /// EACCES at open to SQLITE_READONLY, anything else to SQLITE_IOERR.
    pub fn errno(&self) -> i32 {
        let io = |e: &io::Error| e.raw_os_error().unwrap_or(libc::EIO);
        match self {
            CaptureError::NotPrimary => libc::EROFS,
            CaptureError::WalIsNeeded | CaptureError::NotAllApplied | CaptureError::InUse => libc::EBUSY,
            CaptureError::RefusedBefore { errno } => *errno,
            CaptureError::Io { source, .. } => io(source),
            CaptureError::Log(LogError::NoSpace { .. }) => libc::ENOSPC,
            CaptureError::Log(LogError::Io { source, .. }) => io(source),
            CaptureError::Checksums(ChecksumsError::Io { source, .. }) => io(source),
            _ => libc::EIO,
        }
    }
}

/// What a door knows of a commit.
#[derive(Debug)]
pub struct Commit<'a> {
    /// Bytes in a page after the commit.
    pub page_size: u32,
    /// Pages in the database after the commit.
    pub page_count: u32,
    /// Pages that may have changed, ascending, without duplicates.
    pub pages: &'a [u32],
    /// Where the commit ends in the WAL, in WAL mode.
    pub wal: Option<WalEnd>,
    /// The door can hold it until followers have it: SQLite has not published it.
    pub may_hold: bool,
}

/// Reads one committed page into the buffer (whole pages; zeros where SQLite never wrote).
pub type ReadPage<'a> = dyn FnMut(u32, &mut [u8]) -> Result<(), CaptureError> + 'a;

/// A transaction that has been captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// End of its record in the log.
    pub end: Lsn,
    /// Pages in it.
    pub pages: usize,
    /// It must not be published before followers have it: see [`Database::hold_of`]. Does not count as applied yet.
    pub held: bool,
}

/// Makes the pages of `commit` that really differ the database's next transaction. `None`: nothing differs, as
/// after a rollback, and no transaction number is used.
pub fn log_transaction(
    db: &Database,
    st: &mut State,
    commit: &Commit<'_>,
    read: &mut ReadPage<'_>,
) -> Result<Option<Logged>, CaptureError> {
    let term = db.shared.term();
    if !st.ahead {
        db.check_writable()?;
    }
    st.check_health()?;
    // What is in the files lacks these transactions: a commit on top of it would not be their successor.
    // A held commit is there, and so is what takes it back when its writer has died.
    if st.applied.position != st.position && st.held.is_none() {
        return Err(CaptureError::NotAllApplied);
    }
    let new_size = commit.page_size != st.page_size && st.page_count > 0;
    let kept = if new_size { 0 } else { st.page_count.min(commit.page_count) };
    let before = st.position;
    let mut rolling = if new_size { Checksum::EMPTY } else { before.checksum_or_empty() };
    let txid = Txid(before.txid.0 + 1);

    st.open_checksums(db)?.reserve(commit.page_count)?;
    if !new_size {
        for pgno in commit.page_count + 1..=st.page_count {
            if let Some(old) = st.checksums().get(pgno) {
                rolling = rolling.xor(old);
            }
        }
    }

    let lender = db.lender().filter(|_| !st.ahead);
    let header = Header {
        flags: 0,
        page_size: commit.page_size,
        commit: commit.page_count,
        min_txid: txid,
        max_txid: txid,
        timestamp_ms: unix_ms(),
        pre_apply: if txid.0 == 1 { Checksum(0) } else { before.checksum_or_empty() },
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: db.shared.node_id,
        epoch: term.epoch.0,
        owner: st.database_file(db).ok().and_then(|f| owner_of(&f)),
    };
    let timestamp_ms = header.timestamp_ms;
    let lock_page = lock_page(commit.page_size);
    let spool = Spool::for_bytes(db, commit.pages.len() as u64 * u64::from(commit.page_size))?;
    let mut encoder = Encoder::new(spool, header)?;
    let mut page = vec![0; commit.page_size as usize];
    let mut changed: Vec<(u32, Checksum)> = Vec::with_capacity(commit.pages.len().min(4096));
    let mut wal_mode = db.load_journal_mode(st);
    let mut change_counter = st.change_counter;
    for &pgno in commit.pages {
        if pgno == lock_page || pgno > commit.page_count {
            continue;
        }
        read(pgno, &mut page)?;
        let new = page_checksum(pgno, &page);
        let old = if pgno <= kept { st.checksums().get(pgno) } else { None };
        if old == Some(new) {
            continue;
        }
        if let Some(old) = old {
            rolling = rolling.xor(old);
        }
        rolling = rolling.xor(new);
        encoder.encode_page(pgno, &page)?;
        changed.push((pgno, new));
        if pgno == 1 {
            wal_mode = page[18] == 2 && page[19] == 2;
            change_counter = Some(u32::from_be_bytes([page[24], page[25], page[26], page[27]]));
        }
    }
    if changed.is_empty() && commit.page_count == st.page_count {
        return Ok(None);
    }
    // What the primary has taken is no commit of this node's term.
    let held = lender.is_none() && commit.may_hold && db.admit_held()?;
    if commit.page_count == 0 {
        rolling = Checksum::EMPTY;
    }
    let (_, mut spool) = encoder.finish(rolling)?;
    let record = NewRecord {
        database: &db.name,
        kind: RecordKind::Transaction,
        epoch: term.epoch,
        min_txid: txid,
        max_txid: txid,
        pre_apply: before.checksum_or_empty(),
        post_apply: rolling,
        page_size: commit.page_size,
        commit: commit.page_count,
        timestamp_ms,
        // For an agent that comes after this one it is a transaction of the primary.
        wal: if lender.is_some() { Some(WAL_IS_FROM_THE_LOG) } else { commit.wal },
        fence: if st.ahead || lender.is_some() { None } else { Some(&term) },
    };
    let is_lent = lender.is_some();
    if let Some(lender) = lender {
        // From here on the primary has it. Should this node not get it into its log, it comes like any other.
        let transaction = spool.as_transaction(db)?;
        db.wait_elsewhere(st, || lender.commit(transaction)).map_err(CaptureError::HaltLock)?;
    }
    let (end, payload) = spool.append(db, record).map_err(|error| match error {
        CaptureError::Log(LogError::Fenced { .. }) => CaptureError::NotPrimary,
        other => other,
    })?;

    // The flusher wakes up while the rest is done here.
    db.shared.log.request_flush();
    // The log has it: from here on nothing can fail.
    match payload {
        Some(bytes) => db.recent.lock().push(ShippedRecord {
            epoch: term.epoch,
            min_txid: txid,
            max_txid: txid,
            post_apply: rolling,
            payload: RecordPayload::Bytes(bytes),
        }),
        None => db.recent.lock().clear(),
    }
    let sums = st.checksums_mut();
    if new_size {
        sums.truncate(0);
    } else {
        sums.truncate(commit.page_count);
    }
    for (pgno, checksum) in &changed {
        sums.set(*pgno, Some(*checksum));
    }
    st.page_size = commit.page_size;
    st.page_count = commit.page_count;
    st.set_wal_mode(wal_mode);
    st.change_counter = change_counter;
    st.applied_frames = None;
    st.advance(Pos { txid, checksum: rolling }, end, timestamp_ms);
    st.lent_before = is_lent.then_some(st.applied);
    if let Some(before) = st.lent_before {
        st.checksums_mut().set_applied(before);
    }
    if held {
        st.held = Some(st.position);
    } else {
        (st.applied, st.held) = (st.logged_mark(), None);
    }
    db.shared.counters.commits.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    db.committed(st.position, end, held);
    Ok(Some(Logged { end, pages: changed.len(), held }))
}

/// Milliseconds since 1970, as LTX headers have them.
pub fn unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// Owner and mode of a database file, for the replicas' copies.
fn owner_of(file: &File) -> Option<Owner> {
    let now = Untimed::of(file).ok()?;
    let mode = write_protection::mode(file, now.mode);
    Some(Owner { uid: now.uid, gid: now.gid, mode: (mode & 0o7777) as u16 })
}

/// Where an LTX file is being written: memory for the usual transaction, a file for a large one.
enum Spool {
    Memory(Vec<u8>),
    File(BufWriter<tempfile::NamedTempFile>),
}

impl Spool {
    fn for_bytes(db: &Database, bytes: u64) -> Result<Spool, CaptureError> {
        if bytes <= IN_MEMORY_BYTES_MAX {
            return Ok(Spool::Memory(Vec::with_capacity(bytes as usize / 2 + 512)));
        }
        let dir = &db.shared.dirs.staging;
        let file = tempfile::Builder::new()
            .prefix("transaction-")
            .suffix(".ltx")
            .tempfile_in(dir)
            .map_err(|source| CaptureError::Io { path: dir.clone(), source })?;
        Ok(Spool::File(BufWriter::with_capacity(1 << 17, file)))
    }

    /// What has been written, for whoever gets it before the log.
    fn as_transaction(&mut self, db: &Database) -> Result<Transaction, CaptureError> {
        match self {
            Spool::Memory(bytes) => Ok(Transaction::Bytes(Bytes::copy_from_slice(bytes))),
            Spool::File(file) => {
                let failed = |source| CaptureError::Io { path: db.shared.dirs.staging.clone(), source };
                file.flush().map_err(failed)?;
                Ok(Transaction::File(file.get_ref().path().to_owned()))
            }
        }
    }

    /// Gives the payload too when it is in memory.
    fn append(self, db: &Database, record: NewRecord<'_>) -> Result<(Lsn, Option<Bytes>), CaptureError> {
        let log = &db.shared.log;
        match self {
            Spool::Memory(bytes) => Ok((log.append(&record, &bytes)?, Some(bytes.into()))),
            Spool::File(writer) => {
                let path = db.shared.dirs.staging.clone();
                let file = writer
                    .into_inner()
                    .map_err(|e| CaptureError::Io { path: path.clone(), source: e.into_error() })?;
                let kept = file.into_temp_path();
                let end = log.append_file(&record, &kept)?;
                // The log has renamed it away.
                let _ = kept.keep();
                Ok((end, None))
            }
        }
    }
}

impl Write for Spool {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Spool::Memory(bytes) => bytes.write(buf),
            Spool::File(file) => file.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Spool::Memory(_) => Ok(()),
            Spool::File(file) => file.flush(),
        }
    }
}

/// A position that stands for "nothing yet" (0/0) has the checksum of an empty database.
pub trait ChecksumOrEmpty {
    /// The checksum to go on from.
    fn checksum_or_empty(&self) -> Checksum;
}

impl ChecksumOrEmpty for Pos {
    fn checksum_or_empty(&self) -> Checksum {
        if self.checksum.0 == 0 { Checksum::EMPTY } else { self.checksum }
    }
}
