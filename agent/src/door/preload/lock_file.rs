//! Processes that open `NAME-lock`: each on a connection of its own, which ends with the answer.
//!
//! The process gets a file in memory. Its open file description, which forks and duplicates share, has been given an
//! `flock`; when that lock can be had here, the last of them has closed it, or died.

use super::listener::answer;
use super::peer::Peer;
use crate::database::Shared;
use crate::door::lock_file::{HaltLocks, Opener, database_of};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use shim_protocol::LOCK_FILE_MAGIC;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use tokio_util::sync::CancellationToken;

/// Answers one process; returns when it has its answer, or has gone.
pub fn serve(
    socket: &OwnedFd,
    gone: &CancellationToken,
    peer: &Peer,
    shared: &Shared,
    locks: &dyn HaltLocks,
    path: &[u8],
) -> io::Result<()> {
    let closed = CancellationToken::new();
    let release = closed.clone().drop_guard();
    let waiting = gone.clone();
    let opener = Opener {
        pid: peer.pid.unsigned_abs(),
        closed,
        has_given_up: Box::new(move || waiting.is_cancelled()),
    };
    let got = (|| {
        let path = std::str::from_utf8(path).map_err(|_| libc::ENOENT)?;
        let db = database_of(shared, path).ok_or(libc::ENOENT)?;
        if !peer.may_write(&shared.dirs.files.join(db.name())) {
            return Err(libc::EACCES);
        }
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        // Nobody waits for it only if this thread has ended.
        locks.acquire(db, opener, Box::new(move |got| _ = tell.send(got)));
        told.recv().unwrap_or(Err(libc::ENOLCK))
    })();
    if let Err(error) = got {
        return answer(socket, [LOCK_FILE_MAGIC, error.unsigned_abs()], None);
    }
    let (given, own) = file()?;
    answer(socket, [LOCK_FILE_MAGIC, 0], Some(given.as_fd()))?;
    drop(given);
    std::thread::Builder::new().name("lock-file".into()).spawn(move || {
        // Had when the last one has closed it.
        while let Err(error) = flock(&own, libc::LOCK_EX) {
            if error.kind() != io::ErrorKind::Interrupted {
                tracing::warn!(%error, "it cannot be told when a lock file is closed: its halt lock ends now");
                break;
            }
        }
        drop(release);
    })?;
    Ok(())
}

/// An empty file, opened twice; the first has the lock. It is not unlocked when this process closes it.
fn file() -> io::Result<(OwnedFd, File)> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let given = memfd_create(c"litefs-lock", flags)?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    fcntl(&given, FcntlArg::F_ADD_SEALS(seals))?;
    let own = File::open(format!("/proc/self/fd/{}", given.as_raw_fd()))?;
    flock(&given, libc::LOCK_EX | libc::LOCK_NB)?;
    Ok((given, own))
}

/// Not nix's, which unlocks when this process closes the file.
fn flock(file: &impl AsRawFd, operation: i32) -> io::Result<()> {
    // SAFETY: plain numbers; the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
