//! Makes the writers of a database wait: takes the lock that a writer takes first, and writes nothing.

use super::connection::{WalConnection, uses_wal};
use super::files::{Files, Patience};
use super::{ApplyError, WalFrames, rollback_journal};
use sqlite_file::locks::{LockGuard, LockKind, RESERVED, conflicting_holder};
use std::sync::Arc;

/// No writer of the database begins a transaction while this lives; readers go on.
#[derive(Debug)]
pub struct WriterHold {
    // Dropped in this order.
    pub(super) lock: LockGuard,
    pub(super) connection: Option<WalConnection>,
}

impl WriterHold {
    /// Whether it is the write lock of a WAL.
    pub fn is_of_wal(&self) -> bool {
        self.connection.is_some()
    }

    /// What the wal-index publishes: salts, and the number of frames that count. `None`: there is none, or its writer died
    /// while it wrote it.
    pub fn published(&self) -> Option<WalFrames> {
        let header = self.connection.as_ref()?.index.read_header()?;
        Some((header.salts, header.max_frame))
    }

    /// Waits for the transaction that is running. `None`: there is no database.
    pub(super) fn acquire(files: &Arc<Files>, patience: &Patience) -> Result<Option<Self>, ApplyError> {
        let Some(database) = files.open_database()? else { return Ok(None) };
        // Connecting to one in a rollback mode would be in the way of its running writer.
        if uses_wal(files, &database)?
            && let Some(connection) = WalConnection::open(files, patience)?
        {
            let lock = connection.insist_on_write_lock(patience)?;
            return Ok(Some(WriterHold { lock, connection: Some(connection) }));
        }
        let database = Arc::new(database);
        let mut lock = None;
        // Of a journal that was hot while nobody had RESERVED, at the last look.
        let mut abandoned = None;
        // Without SHARED, which would keep the running writer from ending. Readers take a journal for hot only while nobody has
        // RESERVED: beside a dead writer's it is not even tried, or they would read what that writer had not committed.
        let got = patience.insist(|| {
            if let Some(hot) = rollback_journal::hot_header(files)? {
                let alive = conflicting_holder(&database, LockKind::Write, RESERVED)?.is_some();
                let dead = !alive && abandoned == Some(hot);
                abandoned = (!alive).then_some(hot);
                return Ok(dead);
            }
            abandoned = None;
            lock = LockGuard::try_acquire(&database, LockKind::Write, RESERVED)?;
            Ok(lock.is_some())
        });
        got.map_err(files.io("lock", &files.database))?;
        // Its writer may have died just before the lock was free.
        if abandoned.is_some() || rollback_journal::is_hot(files)? {
            drop(lock);
            return Err(files.busy("a hot journal, which the next reader plays back", patience));
        }
        let lock = lock.ok_or_else(|| files.busy("RESERVED on the database", patience))?;
        Ok(Some(WriterHold { lock, connection: None }))
    }
}
