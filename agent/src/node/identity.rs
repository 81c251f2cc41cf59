//! What a data directory says of its node: who it is, the newest epoch it knows, and whether its last agent stopped
//! cleanly. Also the lock that keeps a second agent away.

use crate::ship::engine::Epoch;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Another agent has it.
    #[error("{0} is in use by another agent; stop it, or give this one a [data] dir of its own")]
    InUse(PathBuf),
    /// The file system refused.
    #[error("cannot use the data directory: {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// A file of the directory says something else than it should.
    #[error(
        "{path} says {found:?}, which is no {expected}; restore the file, or remove it and let the node start anew"
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Its content.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
}

/// How the last agent on a data directory ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastStop {
    /// With everything marked durable.
    Clean,
    /// It was killed; what was written to files is there.
    Killed,
    /// The host went down: what was not synced may be gone.
    PowerFailed,
}

/// A locked data directory.
#[derive(Debug)]
pub struct Identity {
    dir: PathBuf,
    /// Held as long as the agent runs.
    lock: Flock<File>,
    /// This node; made up once, at the first start.
    pub node_id: u64,
    /// Newest epoch this node has seen.
    pub epoch: Epoch,
    /// How the last agent ended.
    pub last_stop: LastStop,
}

impl Identity {
    /// Locks the directory and reads what it says.
    pub fn open(dir: &Path) -> Result<Identity, IdentityError> {
        let io_at = |path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Io { path, source }
        };
        std::fs::create_dir_all(dir).map_err(io_at(dir))?;
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io_at(&path))?;
        let lock = lock_within(file).map_err(|e| match e {
            Errno::EWOULDBLOCK => IdentityError::InUse(dir.to_owned()),
            e => IdentityError::Io { path: path.clone(), source: e.into() },
        })?;
        note_holder(&lock).map_err(io_at(&path))?;
        let parse = |name: &str, expected, radix| -> Result<Option<u64>, IdentityError> {
            let path = dir.join(name);
            let Some(text) = read_if_there(&path).map_err(io_at(&path))? else { return Ok(None) };
            let text = text.trim().to_owned();
            let number = u64::from_str_radix(&text, radix);
            number.map(Some).map_err(|_| IdentityError::Damaged { path, found: text, expected })
        };
        let node_id = match parse("node-id", "node id of 16 hex digits", 16)? {
            Some(id) => id,
            None => {
                let id = random_u64().map_err(io_at(Path::new("/dev/urandom")))?;
                replace_file(&dir.join("node-id"), &format!("{id:016x}\n"))?;
                id
            }
        };
        let epoch = Epoch(parse("epoch", "epoch", 10)?.unwrap_or(0));
        let running = dir.join("running");
        let boot = boot_id().map_err(io_at(Path::new("/proc/sys/kernel/random/boot_id")))?;
        let before = read_if_there(&running).map_err(io_at(&running))?;
        replace_file(&running, &boot)?;
        let last_stop = match before {
            None => LastStop::Clean,
            Some(before) if before == boot => LastStop::Killed,
            Some(_) => LastStop::PowerFailed,
        };
        Ok(Identity { dir: dir.to_owned(), lock, node_id, epoch, last_stop })
    }

    /// Whether a living agent has this directory. One that was killed may leave the lock to its guard for a while.
    pub fn is_in_use(dir: &Path) -> bool {
        let Ok(file) = File::open(dir.join("lock")) else { return false };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Err((file, Errno::EWOULDBLOCK)) => !holder_is_dead(&file),
            _ => false,
        }
    }

    /// The lock on the directory.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Remembers an epoch, durably, before anything is done in it.
    pub fn store_epoch(&self, epoch: Epoch) -> Result<(), IdentityError> {
        replace_file(&self.dir.join("epoch"), &format!("{}\n", epoch.0))
    }

    /// Whether the last agent let applications write to the plain files, so that they may have outlived it and been ahead
    /// of it.
    pub fn had_plain_files(&self) -> Result<bool, IdentityError> {
        let path = self.dir.join("door");
        let text = read_if_there(&path).map_err(|source| IdentityError::Io { path, source })?;
        Ok(text.is_some_and(|text| text.trim() == "preload"))
    }

    /// Remembers the door, before applications can come.
    pub fn store_door(&self, kind: &str) -> Result<(), IdentityError> {
        replace_file(&self.dir.join("door"), &format!("{kind}\n"))
    }

    /// The agent stops, with everything marked durable.
    pub fn stopped_cleanly(&self) -> Result<(), IdentityError> {
        let path = self.dir.join("running");
        std::fs::remove_file(&path).map_err(|source| IdentityError::Io { path, source })
    }
}

/// Another agent may be about to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// An agent that was killed is gone only when its guard has let it go, or has aborted its mount.
const GUARD_PATIENCE: Duration = Duration::from_secs(15);

fn lock_within(mut file: File) -> Result<Flock<File>, Errno> {
    let begun = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK)) => {
                let patience = if holder_is_dead(&back) { GUARD_PATIENCE } else { LOCK_PATIENCE };
                if begun.elapsed() > patience {
                    return Err(Errno::EWOULDBLOCK);
                }
                file = back;
            }
            Err((_, e)) => return Err(e),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Says in the lock file who has the lock.
fn note_holder(mut lock: &File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0)?;
    lock.flush()
}

/// Whether the process that noted itself has ended, or is ending: then its guard has the lock.
fn holder_is_dead(lock: &File) -> bool {
    let mut text = [0; 16];
    let len = lock.read_at(&mut text, 0).unwrap_or(0);
    let pid = std::str::from_utf8(&text[..len]).ok().and_then(|t| t.trim().parse::<u32>().ok());
    let Some(pid) = pid else { return false };
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The state follows the name, which is in parentheses and may have some itself.
        Ok(stat) => stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    }
}

fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn boot_id() -> io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
}

fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Replaces a small file so that after a crash it has the old content or the new one.
fn replace_file(path: &Path, content: &str) -> Result<(), IdentityError> {
    let failed = |source| IdentityError::Io { path: path.to_owned(), source };
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    file.write_all(content.as_bytes()).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_and_the_first_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::open(dir.path()).unwrap();
        assert!(matches!(Identity::open(dir.path()), Err(IdentityError::InUse(_))));
        assert_eq!(first.epoch, Epoch(0));
        first.store_epoch(Epoch(7)).unwrap();
        let id = first.node_id;
        drop(first);
        let again = Identity::open(dir.path()).unwrap();
        assert_eq!((again.node_id, again.epoch, again.last_stop), (id, Epoch(7), LastStop::Killed));
    }

    #[test]
    fn another_boot_without_a_clean_stop_is_a_power_failure() {
        let dir = tempfile::tempdir().unwrap();
        drop(Identity::open(dir.path()).unwrap());
        std::fs::write(dir.path().join("running"), "another boot\n").unwrap();
        let after = Identity::open(dir.path()).unwrap();
        assert_eq!(after.last_stop, LastStop::PowerFailed);
        after.stopped_cleanly().unwrap();
        drop(after);
        assert_eq!(Identity::open(dir.path()).unwrap().last_stop, LastStop::Clean);
    }

    #[test]
    fn a_damaged_epoch_is_not_taken_for_zero() {
        let dir = tempfile::tempdir().unwrap();
        drop(Identity::open(dir.path()).unwrap());
        std::fs::write(dir.path().join("epoch"), "seven").unwrap();
        assert!(matches!(Identity::open(dir.path()), Err(IdentityError::Damaged { .. })));
    }
}
