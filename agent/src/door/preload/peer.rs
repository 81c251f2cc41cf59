//! Who is at the other end of a connection, and which databases it may speak for.

use crate::database::write_protection;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::fs::Metadata;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// To write a file.
pub const WRITE: u32 = 0o2;
/// To use what is in a directory.
pub const SEARCH: u32 = 0o1;

/// A process with its user and groups, as the kernel says.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Process.
    pub pid: i32,
    uid: u32,
    groups: Vec<u32>,
}

impl Peer {
    /// Asks the kernel.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Peer> {
        let credentials = getsockopt(&socket, PeerCredentials)?;
        let mut groups = vec![0u32; 64];
        loop {
            let mut bytes = (groups.len() * size_of::<u32>()) as libc::socklen_t;
            // SAFETY: the buffer is as long as `bytes` says.
            let result = unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_PEERGROUPS,
                    groups.as_mut_ptr().cast(),
                    &raw mut bytes,
                )
            };
            let count = bytes as usize / size_of::<u32>();
            let error = io::Error::last_os_error();
            match result {
                0 => {
                    groups.truncate(count);
                    break;
                }
                _ if error.raw_os_error() == Some(libc::ERANGE) => groups.resize(count, 0),
                _ => return Err(error),
            }
        }
        groups.push(credentials.gid());
        Ok(Peer { pid: credentials.pid(), uid: credentials.uid(), groups })
    }

    /// Whether it may write the file by rights, also where a replica keeps it out, or make it where it is missing.
    pub fn may_write(&self, path: &Path) -> bool {
        let place = if path.exists() { Some(path) } else { path.parent() };
        let Some(metadata) = place.and_then(|place| place.metadata().ok()) else { return false };
        self.has(&metadata, write_protection::mode_at(path, metadata.mode()), WRITE)
    }

    /// Whether it has a permission on a file with this owner and group, whose mode this is by rights.
    pub fn has(&self, file: &Metadata, mode: u32, permission: u32) -> bool {
        let bits = if self.uid == 0 {
            0o7
        } else if file.uid() == self.uid {
            mode >> 6
        } else if self.groups.contains(&file.gid()) {
            mode >> 3
        } else {
            mode
        };
        bits & permission != 0
    }
}
