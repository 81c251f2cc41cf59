//! SHARED and EXCLUSIVE on the database file, as SQLite's unix VFS takes them, but for an open file and not for the
//! process.

use super::files::Patience;
use sqlite_file::locks::{LockGuard, LockKind, PENDING, SHARED, conflicting_holder, try_lock, unlock};
use std::fs::File;
use std::io;
use std::sync::Arc;

/// A lock on the database file, given back when dropped.
#[derive(Debug)]
pub(super) struct DatabaseLock {
    file: Arc<File>,
}

impl DatabaseLock {
    /// SHARED: what a connection holds while it reads, and in WAL mode as long as it is open.
    pub fn shared(file: &Arc<File>, patience: &Patience) -> io::Result<Option<Self>> {
        let got = patience.poll(|| {
            // A writer that waits holds PENDING, and nobody may pass it.
            let Some(_pending) = LockGuard::try_acquire(file, LockKind::Read, PENDING)? else {
                return Ok(false);
            };
            try_lock(file, LockKind::Read, SHARED)
        })?;
        Ok(got.then(|| DatabaseLock { file: Arc::clone(file) }))
    }

    /// EXCLUSIVE: nobody else is connected (WAL mode) or reads (rollback mode), and nobody can begin to.
    /// Without `patience` one look is taken, which does not keep anybody out who is not kept out by success.
    pub fn exclusive(file: &Arc<File>, patience: Option<&Patience>) -> io::Result<Option<Self>> {
        let mut lock = DatabaseLock { file: Arc::clone(file) };
        // On failure the drop unlocks nothing: nothing is locked yet.
        Ok(lock.make_exclusive(patience)?.then_some(lock))
    }

    /// From SHARED to EXCLUSIVE. `false`: SHARED is still held.
    pub fn make_exclusive(&mut self, patience: Option<&Patience>) -> io::Result<bool> {
        if try_lock(&self.file, LockKind::Write, SHARED)? {
            return Ok(true);
        }
        let Some(patience) = patience else { return Ok(false) };
        // Asking first spares new readers from running into PENDING while a writer has the file.
        let mut pending = None;
        let got = patience.poll(|| {
            if pending.is_none() && conflicting_holder(&self.file, LockKind::Write, PENDING)?.is_none() {
                pending = LockGuard::try_acquire(&self.file, LockKind::Write, PENDING)?;
            }
            Ok(pending.is_some() && try_lock(&self.file, LockKind::Write, SHARED)?)
        });
        drop(pending);
        got
    }

    /// From EXCLUSIVE back to SHARED.
    pub fn make_shared(&mut self) -> io::Result<()> {
        let kept = try_lock(&self.file, LockKind::Read, SHARED)?;
        assert!(kept, "a write lock can always become a read lock");
        Ok(())
    }
}

impl Drop for DatabaseLock {
    fn drop(&mut self) {
        // Fails only for a bad descriptor, which has no locks.
        let _ = unlock(&self.file, SHARED);
    }
}
