//! Backing files registered with the kernel for passthrough.
//!
//! fuser ties a registration to the process that made it; here it is a number that another process may go on with, since the
//! kernel wants all open files of an inode to have the same one.

use crate::mounter::Mounter;
use fuser::{FileAttr, FileHandle, FopenFlags, Generation, ReplyCreate, ReplyOpen};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// A registered backing file; unregistered when dropped. Files that are open keep it until they are closed.
#[derive(Debug)]
pub struct Backing {
    device: Arc<OwnedFd>,
    mounter: Mounter,
    id: u32,
}

/// Registers backing files of a connection.
#[derive(Debug, Clone)]
pub struct Backings {
    pub(crate) device: Arc<OwnedFd>,
    pub(crate) mounter: Mounter,
}

impl Backings {
    /// Registers a file; needs CAP_SYS_ADMIN, or the helper that has it.
    pub fn register(&self, file: &File) -> io::Result<Backing> {
        let id = self.mounter.register(self.device.as_fd(), file.as_fd())?;
        Ok(self.adopt(id))
    }

    /// A registration that another process made and that nobody else will end.
    pub fn adopt(&self, id: u32) -> Backing {
        Backing { device: self.device.clone(), mounter: self.mounter.clone(), id }
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
        if let Err(error) = self.mounter.unregister(self.device.as_fd(), self.id) {
            tracing::debug!(id = self.id, %error, "cannot unregister a backing file");
        }
    }
}
