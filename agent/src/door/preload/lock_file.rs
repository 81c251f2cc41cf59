//! Processes that open `NAME-lock`: each on a connection of its own, which ends with the answer.
//!
//! The process gets a file in memory. Its open file description, which forks and duplicates share, has been given an
//! `flock`; when that lock can be had here, the last of them has closed it, or died.

use super::connection::Connection;
use super::peer::Peer;
use crate::database::Shared;
use crate::door::lock_file::{HaltLocks, Opener, database_of};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use shim_protocol::{LOCK_FILE_MAGIC, LockFile};
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Answers one process; returns when it has its answer, or has gone.
pub fn serve(
    socket: &OwnedFd,
    connection: &Arc<Connection>,
    peer: &Peer,
    shared: &Shared,
    locks: &dyn HaltLocks,
    path: &[u8],
) -> io::Result<()> {
    let closed = CancellationToken::new();
    let release = closed.clone().drop_guard();
    let opener = |waiting: Arc<Connection>| Opener {
        pid: peer.pid.unsigned_abs(),
        closed,
        has_given_up: Box::new(move || waiting.has_ended()),
    };
    let got = (|| {
        let path = std::str::from_utf8(path).map_err(|_| libc::ENOENT)?;
        let db = database_of(shared, path).ok_or(libc::ENOENT)?;
        if !peer.may_write(&shared.dirs.files.join(db.name())) {
            return Err(libc::EACCES);
        }
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        // Nobody waits for it only if this thread has ended.
        locks.acquire(db, opener(connection.clone()), Box::new(move |got| _ = tell.send(got)));
        told.recv().unwrap_or(Err(libc::ENOLCK))
    })();
    if let Err(error) = got {
        return send(socket, error, None);
    }
    let (given, own) = file()?;
    send(socket, 0, Some(&given))?;
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

fn send(socket: &OwnedFd, error: i32, file: Option<&OwnedFd>) -> io::Result<()> {
    let answer = LockFile { magic: LOCK_FILE_MAGIC, error: error.unsigned_abs() };
    let mut bytes = [0; size_of::<LockFile>()];
    bytes[..4].copy_from_slice(&answer.magic.to_ne_bytes());
    bytes[4..].copy_from_slice(&answer.error.to_ne_bytes());
    let descriptors: Vec<_> = file.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let controls: &[ControlMessage<'_>] = if file.is_some() { &rights } else { &[] };
    let parts = [IoSlice::new(&bytes)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, controls, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}
