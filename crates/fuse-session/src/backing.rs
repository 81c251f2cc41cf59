//! Backing files registered with the kernel for passthrough.
//!
//! fuser ties a registration to the process that made it; here it is a number that another process may go on with, since the
//! kernel wants all open files of an inode to have the same one.

use fuser::{FileAttr, FileHandle, FopenFlags, Generation, ReplyCreate, ReplyOpen};
use nix::libc;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// `FUSE_DEV_IOC_BACKING_CLOSE` (linux/fuse.h): `_IOW(229, 2, uint32_t)`.
const BACKING_CLOSE: libc::Ioctl = nix::request_code_write!(229, 2, size_of::<u32>()) as libc::Ioctl;

/// A registered backing file; unregistered when dropped. Files that are open keep it until they are closed.
#[derive(Debug)]
pub struct Backing {
    device: Arc<OwnedFd>,
    id: u32,
}

/// Registers backing files of a connection.
#[derive(Debug, Clone)]
pub struct Backings {
    pub(crate) device: Arc<OwnedFd>,
}

impl Backings {
    /// Registers a file; needs CAP_SYS_ADMIN.
    pub fn register(&self, file: &File) -> io::Result<Backing> {
        let id = fuser::BackingId::create_raw(&*self.device, file)?;
        Ok(Backing { device: self.device.clone(), id })
    }

    /// A registration that another process made and that nobody else will end.
    pub fn adopt(&self, id: u32) -> Backing {
        Backing { device: self.device.clone(), id }
    }
}

impl Backing {
    /// The kernel's number of it.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Answers an open with it.
    pub fn opened(&self, reply: ReplyOpen, handle: FileHandle, flags: FopenFlags) {
        // SAFETY: the id is registered with this session's connection as long as `self` lives, and `into_raw` keeps fuser
        // from ending the registration.
        let id = unsafe { reply.wrap_backing(self.id) };
        reply.opened_passthrough(handle, flags, &id);
        let _ = id.into_raw();
    }

    /// Answers a create with it.
    pub fn created(
        &self,
        reply: ReplyCreate,
        keep: &Duration,
        attr: &FileAttr,
        handle: FileHandle,
        flags: FopenFlags,
    ) {
        // SAFETY: as in `opened`.
        let id = unsafe { reply.wrap_backing(self.id) };
        reply.created_passthrough(keep, attr, Generation(0), handle, flags, &id);
        let _ = id.into_raw();
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the ioctl reads one u32 at the address given.
        let closed = unsafe { libc::ioctl(self.device.as_raw_fd(), BACKING_CLOSE, &raw const self.id) };
        if closed < 0 {
            tracing::debug!(id = self.id, error = %io::Error::last_os_error(), "cannot unregister a backing file");
        }
    }
}
