//! `NAME-lock`, LiteFS's file for its halt lock. Programs open it for writing, lock a byte of it, write the database, unlock
//! and close. Locks are kept by the kernel; the doors see when the file is opened, and when it is closed for the last
//! time, in whatever process: from the one to the other the program has the halt lock.

use crate::DatabaseName;
use crate::database::{Database, Shared};
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Suffix of the file's name.
pub const LOCK_SUFFIX: &str = "-lock";

/// Where the doors get halt locks from.
pub trait HaltLocks: Send + Sync + Debug + 'static {
    /// Gets the lock of a database for a program, and tells how that went: an error number. Nothing waits here. Where
    /// this host is the primary there is nothing to get.
    fn acquire(&self, db: Arc<Database>, opener: Opener, told: Told);
}

/// Is told once whether the lock is had.
pub type Told = Box<dyn FnOnce(Result<(), i32>) + Send>;

/// Who has opened the file.
pub struct Opener {
    /// Process or thread, for the log.
    pub pid: u32,
    /// Ends the lock, or the wait for it.
    pub closed: CancellationToken,
    /// Whether it waits no more: asked from time to time until the lock is had.
    pub has_given_up: Box<dyn Fn() -> bool + Send + Sync>,
}

/// The database whose lock file this path below the managed directory is. A real file of that name is only that.
pub fn database_of(shared: &Shared, path: &str) -> Option<Arc<Database>> {
    let name = DatabaseName::new(path.strip_suffix(LOCK_SUFFIX)?).ok()?;
    let db = shared.database(&name).filter(|db| db.is_tracked())?;
    let is_real = shared.dirs.files.join(path).symlink_metadata().is_ok();
    (!is_real).then_some(db)
}

/// Whether a thread that waits for a request has been sent a signal that means "stop waiting". Others, such as those of
/// profilers, come all the time.
pub fn is_interrupted(thread: u32) -> bool {
    const ENDING: [i32; 7] = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGKILL,
        libc::SIGTERM,
        libc::SIGALRM,
        libc::SIGUSR1,
    ];
    let status = Path::new("/proc").join(thread.to_string()).join("status");
    let Ok(text) = std::fs::read_to_string(status) else { return false };
    let mask = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0)
    };
    let ending = ENDING.iter().fold(0, |mask, signal| mask | 1u64 << (signal - 1));
    (mask("SigPnd") | mask("ShdPnd")) & !mask("SigBlk") & ending != 0
}
