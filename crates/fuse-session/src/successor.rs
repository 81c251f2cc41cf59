//! How a mount goes from the guard of a dead server to the next server: over a Unix socket, as descriptors (SCM_RIGHTS).
//!
//! The next server asks by connecting, gets one byte with the descriptors, and answers with one byte once a guard of its
//! own watches: from then on the mount is its business.

use crate::connection::Connection;
use crate::mount::{self, MountError};
use crate::mounter::Mounter;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg};
use nix::unistd::geteuid;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const TAKEN: &[u8] = b"t";
/// A keeper that does not answer for so long is broken.
const KEEPER_PATIENCE: Duration = Duration::from_secs(5);

/// Where a guard can be asked. The file is removed with it.
#[derive(Debug)]
pub(crate) struct KeeperSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl KeeperSocket {
    pub fn bind(path: &Path) -> io::Result<KeeperSocket> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = in_directory(path, |short| UnixListener::bind(short))?;
        Ok(KeeperSocket { listener, path: path.to_owned() })
    }

    /// Gives descriptors to whoever asks and may have them, until somebody has taken them or the time is over.
    pub fn hand_over(&self, descriptors: &[BorrowedFd<'_>], deadline: Instant) -> bool {
        while readable(self.listener.as_fd(), deadline) {
            let Ok((stream, _)) = self.listener.accept() else { continue };
            let peer = getsockopt(&stream, PeerCredentials).map(|c| c.uid());
            if !peer.is_ok_and(|uid| uid == 0 || uid == geteuid().as_raw()) {
                continue;
            }
            let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&raw)];
            let sent = sendmsg::<()>(
                stream.as_raw_fd(),
                &[IoSlice::new(b"m")],
                &rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            let mut answer = [0; 1];
            // The end of the stream without an answer: it died, and the next one may come.
            if sent.is_ok()
                && readable(stream.as_fd(), deadline)
                && nix::unistd::read(&stream, &mut answer).is_ok_and(|n| answer[..n] == *TAKEN)
            {
                return true;
            }
        }
        false
    }
}

impl Drop for KeeperSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A mount that was left by another process.
#[derive(Debug)]
pub struct Inherited {
    device: OwnedFd,
    table: OwnedFd,
    keeper: Option<UnixStream>,
}

impl Inherited {
    /// A mount whose descriptors a service manager has kept.
    pub fn from_manager(device: OwnedFd, table: OwnedFd) -> Inherited {
        Inherited { device, table, keeper: None }
    }

    /// The connection that it is, if it is mounted at `dir`.
    pub fn connect(&self, dir: &Path, mounter: &Mounter) -> Result<Connection, MountError> {
        if !mount::is_ours(dir)? {
            let source = io::Error::other("it was taken away from outside");
            return Err(MountError::Serve { dir: dir.to_owned(), source });
        }
        let duplicate = |fd: &OwnedFd| fd.try_clone().map_err(MountError::Device);
        Connection::take_over(duplicate(&self.device)?, duplicate(&self.table)?, mounter)
    }

    /// From here on another guard watches: the one that kept the mount may go.
    pub fn taken(self) -> io::Result<()> {
        match self.keeper {
            Some(mut keeper) => keeper.write_all(TAKEN),
            None => Ok(()),
        }
    }
}

/// Asks for the mount that a guard keeps; `None`: nobody keeps one.
pub fn claim(socket: &Path) -> io::Result<Option<Inherited>> {
    let stream = match in_directory(socket, |short| UnixStream::connect(short)) {
        Ok(stream) => stream,
        Err(e) if matches!(e.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ECONNREFUSED)) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    stream.set_read_timeout(Some(KEEPER_PATIENCE))?;
    let mut byte = [0; 1];
    let mut space = cmsg_space!([RawFd; 2]);
    let mut io = [IoSliceMut::new(&mut byte)];
    let message = loop {
        match recvmsg::<()>(stream.as_raw_fd(), &mut io, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            other => break other,
        }
    }?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just put these descriptors into this process, and nobody else knows them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    match <[OwnedFd; 2]>::try_from(descriptors) {
        Ok([device, table]) => Ok(Some(Inherited { device, table, keeper: Some(stream) })),
        // It ended at this moment: its time was over.
        Err(_) => Ok(None),
    }
}

/// Calls `with` with a path of the socket that is short enough for an address, however long its directory's is.
fn in_directory<T>(path: &Path, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket needs a directory and a name"));
    };
    let dir = File::open(dir)?;
    with(&Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name))
}

fn readable(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            PollTimeout::try_from(left.as_millis().min(i32::MAX as u128) as i32).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            Ok(0) if left.is_zero() => return false,
            Ok(0) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}
