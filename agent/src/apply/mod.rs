//! Writes transactions to a database as an SQLite writer would, on the path that applications open.
//!
//! There are two ways, and which one is taken depends on what SQLite in other processes is doing:
//!
//! - **Through the WAL** (`append.rs`), for databases in WAL mode. The [`Applier`] connects like any application:
//!   SHARED on the database, the dead man's switch on the wal-index. It appends frames under the write lock and
//!   publishes them; readers keep their snapshots and are never in the way. It stays connected until
//!   [`Applier::detach`], so that applications that come and go do not checkpoint or delete the WAL.
//! - **In place** (`in_place.rs`), under EXCLUSIVE: in rollback mode, for a database that is new, changes its page
//!   size or is dropped. A rollback journal protects readers from an agent that is killed half-way.
//!
//! Nothing is synced for a transaction: it is in the agent's log already. After a power failure the agent replays
//! its log from the last [`Applier::sync`] before applications may read. Checkpoints sync like SQLite's.
//!
//! Page 1 is written as it comes. A reader in rollback mode notices a change by bytes 24 to 39 of page 1; a primary
//! in `locking_mode=EXCLUSIVE` changes them only once, and SQLite knows no other way to be told.

mod append;
mod backfill;
mod connection;
mod database_lock;
mod error;
mod files;
mod hold;
mod in_place;
mod lock_wait;
mod page_count;
mod rollback_journal;
mod source;
#[cfg(test)]
mod tests;

pub use backfill::Durability;
pub use error::ApplyError;
pub use hold::WriterHold;
pub use page_count::is_page_count_missing;
pub use source::{LtxTransactions, TransactionHeader, TransactionSource};

use crate::DatabaseName;
use connection::WalConnection;
use database_lock::DatabaseLock;
use files::{Files, Patience};
use sqlite_file::header::DatabaseHeader;
use sqlite_file::locks::{LockKind, RESERVED, conflicting_holder};
use sqlite_file::wal::Salts;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What a database is like between two transactions. All zero: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatabaseShape {
    /// Bytes in a page.
    pub page_size: u32,
    /// Size in pages.
    pub page_count: u32,
    /// Whether page 1 says WAL (bytes 18 and 19 are 2).
    pub wal_mode: bool,
}

/// What a checkpoint achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointOutcome {
    /// Frames in the WAL.
    pub frames: u32,
    /// How many of them, from the first, are in the database. The rest waits for readers to finish.
    pub backfilled: u32,
}

/// Salts of a WAL, and how many frames in it count.
pub type WalFrames = (Salts, u32);

/// What an applier has made of the WAL, as it was when it let go of the lock: later it may have commits of others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WalLeft {
    /// The applier has done nothing there, as without the lock.
    #[default]
    Untouched,
    /// It has these frames.
    Published(WalFrames),
    /// There is none any more.
    Gone {
        /// What it had. `None`: there was none.
        had: Option<WalFrames>,
    },
}

/// Whether a WAL has commits that one with `known` frames has not.
pub fn has_frames_beyond(known: WalFrames, there: WalFrames) -> bool {
    there.1 > if known.0 == there.0 { known.1 } else { 0 }
}

/// Applies transactions to one database. Owned by one thread at a time; its only locks are file locks.
#[derive(Debug)]
pub struct Applier {
    files: Arc<Files>,
    connection: Option<WalConnection>,
    in_place_when_unused: bool,
    /// What the WAL has to have before the next transaction is appended.
    known: Option<WalFrames>,
    wal_left: WalLeft,
}

/// The database file under EXCLUSIVE, without WAL and hot journal.
struct Exclusive {
    database: Arc<File>,
    lock: DatabaseLock,
    created: bool,
}

/// A transaction whose writer died, taken back as SQLite would, while its journal is still there and nobody else has
/// the database.
#[derive(Debug)]
pub struct DeadTransaction {
    files: Arc<Files>,
    _lock: DatabaseLock,
}

impl DeadTransaction {
    /// Removes the journal.
    pub fn end(self) -> Result<(), ApplyError> {
        self.files.remove(&self.files.journal)
    }
}

impl Applier {
    /// `path` is the main database file as applications open it. Opens nothing yet.
    pub fn new(path: PathBuf, name: DatabaseName) -> Self {
        Applier {
            files: Arc::new(Files::new(name, path)),
            connection: None,
            in_place_when_unused: false,
            known: None,
            wal_left: WalLeft::Untouched,
        }
    }

    /// Whether a database in WAL mode that nobody has open is written in place instead of connecting to it: no
    /// `-wal` and `-shm`, each page written once, but an application that opens it at that moment is told BUSY, as
    /// it would be in rollback mode. Off by default; meant for bulk catch-up.
    pub fn set_in_place_when_unused(&mut self, yes: bool) {
        self.in_place_when_unused = yes;
    }

    /// Applies consecutive transactions and returns what the database is like then.
    ///
    /// `current` is what it is like before. `bound` is how long may be waited for the locks of others, in all. On
    /// [`ApplyError::Busy`], and other errors, either nothing has changed or, if the transactions needed different
    /// ways (page size change, drop), some of them are there: give all of them again.
    pub fn apply(
        &mut self,
        current: DatabaseShape,
        txns: &mut dyn TransactionSource,
        bound: Duration,
    ) -> Result<DatabaseShape, ApplyError> {
        self.apply_after(None, current, txns, bound)
    }

    /// As [`Applier::apply`], where the WAL is known to have these frames: with [`ApplyError::ForeignCommit`] it has others
    /// too, and nothing is appended to them.
    pub fn apply_after(
        &mut self,
        known: Option<WalFrames>,
        current: DatabaseShape,
        txns: &mut dyn TransactionSource,
        bound: Duration,
    ) -> Result<DatabaseShape, ApplyError> {
        let patience = Patience::new(bound);
        let files = Arc::clone(&self.files);
        (self.known, self.wal_left) = (known, WalLeft::Untouched);
        if let Some(connection) = &self.connection
            && !connection.is_current()?
        {
            // Another file has taken the path, or somebody cut the wal-index: begin anew.
            self.connection = None;
        }
        let mut shape = current;
        let mut next = files.next_transaction(txns)?;
        while let Some(transaction) = next {
            (shape, next) = if transaction.commit == 0 {
                self.drop_database(&patience)?;
                (DatabaseShape::default(), files.next_transaction(txns)?)
            } else {
                self.apply_some(transaction, txns, shape, &patience)?
            };
        }
        Ok(shape)
    }

    /// What the last [`Applier::apply`] or [`Applier::detach`] has made of the WAL, also when it failed.
    pub fn wal_left(&self) -> WalLeft {
        self.wal_left
    }

    /// Applies as many transactions as go the same way.
    fn apply_some(
        &mut self,
        first: TransactionHeader,
        txns: &mut dyn TransactionSource,
        shape: DatabaseShape,
        patience: &Patience,
    ) -> Result<(DatabaseShape, Option<TransactionHeader>), ApplyError> {
        let files = Arc::clone(&self.files);
        if shape.page_count > 0 && (shape.wal_mode || connection::exists(&files, &files.wal)?) {
            // In rollback mode a WAL is there only because readers of before the switch still use it, and only for
            // them does another page size go through it.
            let resizes = shape.page_size != first.page_size;
            let in_place =
                resizes || !shape.wal_mode || (self.in_place_when_unused && self.connection.is_none());
            if in_place && let Some(exclusive) = self.try_exclusive(None, None)? {
                return exclusive.run(&files, first, txns, shape);
            }
            if self.connection.is_none() {
                self.connection = WalConnection::open(&files, patience)?;
            }
            if let Some(connection) = &mut self.connection
                && let Some(done) = {
                    // What this call has appended itself comes before what follows.
                    let known = self.known.take();
                    connection.append(known, first, txns, shape, patience, &mut self.wal_left)?
                }
            {
                return Ok(done);
            }
        }
        let exclusive = self.try_exclusive(Some(patience), Some(&first))?;
        let exclusive = exclusive.ok_or_else(|| files.busy("EXCLUSIVE on the database", patience))?;
        exclusive.run(&files, first, txns, shape)
    }

    /// EXCLUSIVE on the database, with everything that is in its WAL or hot journal brought into the file, and
    /// those gone. `None`: others are connected, or there is no file and no transaction to `create` it for.
    fn try_exclusive(
        &mut self,
        patience: Option<&Patience>,
        create: Option<&TransactionHeader>,
    ) -> Result<Option<Exclusive>, ApplyError> {
        let files = Arc::clone(&self.files);
        if let Some(mut connection) = self.connection.take() {
            let mut exclusive =
                connection.lock.make_exclusive(patience).map_err(files.io("lock", &files.database));
            let had = connection.index.read_header().map(|header| (header.salts, header.max_frame));
            if matches!(exclusive, Ok(true)) {
                // Nobody else can read or write now, so a checkpoint can only be complete, unless the wal-index is
                // broken; then the WAL itself says what counts.
                if let Err(error) = connection.checkpoint(Durability::Wal) {
                    connection.lock.make_shared().map_err(files.io("lock", &files.database))?;
                    exclusive = Err(error);
                }
            }
            if !matches!(exclusive, Ok(true)) {
                self.connection = Some(connection);
                return exclusive.map(|_| None);
            }
            let complete = connection.outcome().is_some_and(|o| o.frames == o.backfilled);
            let (database, lock) = connection.into_database();
            if complete {
                backfill::remove_wal(&files)?
            } else {
                backfill::fold_wal(&files, &database).map(drop)?
            }
            self.wal_left = WalLeft::Gone { had };
            return Ok(Some(Exclusive { database, lock, created: false }));
        }
        let (database, created) = match (files.open_database()?, create) {
            (Some(file), _) => (file, false),
            (None, Some(transaction)) => (in_place::create_database(&files, transaction)?, true),
            (None, None) => return Ok(None),
        };
        let database = Arc::new(database);
        let lock = DatabaseLock::exclusive(&database, patience).map_err(files.io("lock", &files.database))?;
        let Some(lock) = lock else { return Ok(None) };
        rollback_journal::recover(&files, &database)?;
        let had = backfill::fold_wal(&files, &database)?;
        self.wal_left = WalLeft::Gone { had };
        Ok(Some(Exclusive { database, lock, created }))
    }

    /// Plays back a hot journal if nobody has the database: its writer is dead then.
    pub fn roll_back_dead(&self) -> Result<Option<DeadTransaction>, ApplyError> {
        let files = &self.files;
        let Some(database) = files.open_database()?.map(Arc::new) else { return Ok(None) };
        let lock = DatabaseLock::exclusive(&database, None).map_err(files.io("lock", &files.database))?;
        let Some(lock) = lock else { return Ok(None) };
        let played = rollback_journal::play_back(files, &database)?;
        Ok(played.then(|| DeadTransaction { files: Arc::clone(files), _lock: lock }))
    }

    /// Makes SQLite's writers wait for as long as the result lives. `None`: there is no database.
    pub fn hold_writers(&self, bound: Duration) -> Result<Option<WriterHold>, ApplyError> {
        WriterHold::acquire(&self.files, &Patience::new(bound))
    }

    /// Goes on making SQLite's writers wait, until [`Applier::let_writers_in`]: whoever tries is told BUSY, which is the
    /// best answer in WAL mode, where a write that is refused is an I/O error. Transactions are applied nevertheless. In
    /// rollback modes the hold just ends: refusing the journal says READONLY there.
    pub fn keep_writers_out(&mut self, hold: WriterHold) {
        if let WriterHold { lock, connection: Some(mut connection) } = hold {
            connection.writers_out = Some(lock);
            self.connection = Some(connection);
        }
    }

    /// Whether SQLite's writers are kept waiting.
    pub fn keeps_writers_out(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.writers_out.is_some())
    }

    /// Writers may write.
    pub fn let_writers_in(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.writers_out = None;
        }
    }

    /// Takes back what an applier that died has written in place, and leaves an empty journal: a reader that is about to
    /// look whether it is hot must find one. `false`: somebody is writing, so it is a journal in use.
    pub fn roll_back_under_readers(&self) -> Result<bool, ApplyError> {
        let files = &self.files;
        let Some(database) = files.open_database()? else { return Ok(true) };
        let writer = conflicting_holder(&database, LockKind::Write, RESERVED);
        if writer.map_err(files.io("look at the locks of", &files.database))?.is_some() {
            return Ok(false);
        }
        rollback_journal::play_back_and_empty(files, &database)?;
        Ok(true)
    }

    /// Removes the database. Those who still read it after the bound keep the file that they have open, as on the
    /// primary when it was removed there.
    fn drop_database(&mut self, patience: &Patience) -> Result<(), ApplyError> {
        let files = &self.files;
        // Held until the files are gone. What is in the WAL does not matter any more.
        let mut connected = self.connection.take();
        let mut unconnected = None;
        let locked = match (&mut connected, files.open_database()?) {
            (Some(connection), _) => connection.lock.make_exclusive(Some(patience)),
            (None, Some(file)) => DatabaseLock::exclusive(&Arc::new(file), Some(patience)).map(|lock| {
                unconnected = lock;
                unconnected.is_some()
            }),
            (None, None) => Ok(true),
        };
        if !locked.map_err(files.io("lock", &files.database))? {
            tracing::warn!(database = %files.name, "removing a database that applications still have open");
        }
        // The database first: what is left beside it by a crash is then ignored by SQLite and by us.
        for path in [&files.database, &files.wal, &files.shm, &files.journal] {
            files.remove(path)?;
        }
        self.wal_left = WalLeft::Gone { had: None };
        Ok(())
    }

    /// Copies frames of the WAL into the database as far as readers allow, so that the WAL can begin anew.
    pub fn checkpoint(&mut self, durability: Durability) -> Result<CheckpointOutcome, ApplyError> {
        match &mut self.connection {
            Some(connection) => connection.checkpoint(durability),
            None => Ok(CheckpointOutcome { frames: 0, backfilled: 0 }),
        }
    }

    /// As [`Applier::checkpoint`], also where it is not connected: it connects for the time of the checkpoint if there
    /// is a WAL.
    pub fn checkpoint_now(&mut self, bound: Duration) -> Result<CheckpointOutcome, ApplyError> {
        if self.connection.is_some() {
            return self.checkpoint(Durability::Wal);
        }
        let files = Arc::clone(&self.files);
        let nothing = CheckpointOutcome { frames: 0, backfilled: 0 };
        if !connection::exists(&files, &files.wal)? {
            return Ok(nothing);
        }
        match WalConnection::open(&files, &Patience::new(bound))? {
            Some(mut connection) => connection.checkpoint(Durability::Wal),
            None => Ok(nothing),
        }
    }

    /// Lets go of the database if nobody else is connected: everything is in the database file then, there is no
    /// WAL, and nothing is open. `false`: others are connected and everything stays as it is.
    pub fn detach(&mut self) -> Result<bool, ApplyError> {
        self.wal_left = WalLeft::Untouched;
        match &self.connection {
            Some(connection) if !connection.is_current()? => self.connection = None,
            Some(_) => return Ok(self.try_exclusive(None, None)?.is_some()),
            None => {}
        }
        let files = &self.files;
        if !connection::exists(files, &files.database)? || !connection::exists(files, &files.wal)? {
            self.wal_left = WalLeft::Gone { had: None };
            return Ok(true);
        }
        Ok(self.try_exclusive(None, None)?.is_some())
    }

    /// Frames in the WAL that are not in the database yet; 0 when not connected.
    pub fn wal_frames(&self) -> usize {
        let outcome = self.connection.as_ref().and_then(WalConnection::outcome);
        outcome.map_or(0, |o| (o.frames - o.backfilled) as usize)
    }

    /// Whether the WAL of the database is open here.
    pub fn is_attached(&self) -> bool {
        self.connection.is_some()
    }

    /// Makes all that was applied so far durable: after a power failure the log has to be replayed from here.
    pub fn sync(&mut self) -> Result<(), ApplyError> {
        let files = &self.files;
        // The WAL first: if it is removed in between, its content was synced with the database.
        for path in [&files.wal, &files.database] {
            match File::open(path) {
                Ok(file) => file.sync_all().map_err(files.io("sync", path))?,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(files.io("open", path)(e)),
            }
        }
        Ok(())
    }
}

impl Exclusive {
    fn run(
        self,
        files: &Files,
        first: TransactionHeader,
        txns: &mut dyn TransactionSource,
        shape: DatabaseShape,
    ) -> Result<(DatabaseShape, Option<TransactionHeader>), ApplyError> {
        in_place::InPlace::new(files, self.database, self.lock, self.created).run(first, txns, shape)
    }
}

/// Whether a page 1 says WAL mode.
fn is_wal(page1: &[u8]) -> bool {
    DatabaseHeader::parse(page1).is_ok_and(|header| header.is_wal())
}
