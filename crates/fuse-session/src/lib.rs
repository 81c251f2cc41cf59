//! The FUSE session: mounting, serving, and noticing a mount that its server has left behind.
//!
//! This is the only crate that names `fuser`; the door uses the re-exports in [`fuse`]. The mount is made with
//! mount(2) directly, because no helper program is needed by a privileged agent and the `/dev/fuse` descriptor
//! stays ours.

mod guard;
mod mount;

pub use guard::Guard;
pub use mount::{MountError, MountState, mount_state, open_device, unmount};

/// The names of the FUSE protocol that a file system needs.
pub mod fuse {
    pub use fuser::{
        AccessFlags, BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
        Generation, INodeNo, InitFlags, KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags,
        RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
        ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
    };
}

use fuser::{Config, Filesystem, Session as FuserSession, SessionACL};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// A mounted file system that is being served.
#[derive(Debug)]
pub struct Session {
    dir: PathBuf,
    notifier: fuser::Notifier,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl Session {
    /// Mounts `fs` at `dir` and serves it with `threads` threads, which all read the one descriptor: a request
    /// read through a cloned descriptor could not be served again by a successor.
    pub fn start<FS: Filesystem + 'static>(
        fs: FS,
        dir: &Path,
        source: &str,
        threads: usize,
    ) -> Result<Session, MountError> {
        let device = open_device()?;
        mount::mount(&device, dir, source)?;
        Self::serve(fs, device, dir, threads).inspect_err(|_| {
            let _ = unmount(dir);
        })
    }

    fn serve<FS: Filesystem + 'static>(
        fs: FS,
        device: OwnedFd,
        dir: &Path,
        threads: usize,
    ) -> Result<Session, MountError> {
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(threads.max(1));
        let handshake = |source| MountError::Handshake { dir: dir.to_owned(), source };
        let session = FuserSession::from_fd(fs, device, SessionACL::All, config).map_err(handshake)?;
        let notifier = session.notifier();
        let server = std::thread::Builder::new()
            .name("fuse".into())
            .spawn(move || session.run())
            .map_err(handshake)?;
        Ok(Session { dir: dir.to_owned(), notifier, server: Some(server) })
    }

    /// Sends invalidations to the kernel. Never call it from a handler, nor holding a lock a handler takes.
    pub fn notifier(&self) -> fuser::Notifier {
        self.notifier.clone()
    }

    /// Whether the serving threads have ended (the mount was taken away from outside, or they failed).
    pub fn ended(&self) -> bool {
        self.server.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Takes the mount away and waits until the server has ended. A mount in use is detached: open files go on
    /// being served until they are closed or this process exits, so the wait is for an idle mount only.
    pub fn stop(mut self) -> Result<(), MountError> {
        let busy = unmount(&self.dir)?;
        if let Some(server) = self.server.take() {
            if busy {
                return Ok(());
            }
            match server.join() {
                Ok(Ok(())) => {}
                Ok(Err(source)) => return Err(MountError::Serve { dir: self.dir, source }),
                Err(_) => {
                    let source = io::Error::other("a serving thread panicked");
                    return Err(MountError::Serve { dir: self.dir, source });
                }
            }
        }
        Ok(())
    }
}
