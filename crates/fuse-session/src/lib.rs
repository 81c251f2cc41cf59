//! The FUSE session: mounting, serving, going on with a mount whose server has died, and ending one that nobody goes on
//! with.
//!
//! This is the only crate that names `fuser`; the door uses the re-exports in [`fuse`]. The mount is made with
//! mount(2) directly, by this process or by [`helper`], a small one that has the privilege for it.

mod backing;
mod connection;
mod guard;
mod handles;
pub mod helper;
mod mount;
mod mounter;
mod successor;

pub use backing::{Backing, Backings};
pub use connection::{Connection, RESENT};
pub use guard::{AfterDeath, Guard, GuardOptions};
pub use handles::{HandleTable, OpenHandle};
pub use mount::{MountError, MountState, mount_state};
pub use mounter::Mounter;
pub use successor::{Inherited, claim};

/// The names of the FUSE protocol that a file system needs.
pub mod fuse {
    pub use fuser::{
        AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
        INodeNo, InitFlags, KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags, RenameFlags,
        ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
        ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
    };
}

use fuser::{Config, Filesystem, Session as FuserSession, SessionACL};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// A mounted file system that is being served.
#[derive(Debug)]
pub struct Session {
    dir: PathBuf,
    mounter: Mounter,
    notifier: fuser::Notifier,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl Session {
    /// Serves `fs` at `dir` with `threads` threads, which all read the one descriptor: a request read through a cloned
    /// descriptor could not be served again by a successor. A new connection is mounted; one that was taken over is gone
    /// on with, beginning with what its last server left unanswered.
    pub fn start<FS: Filesystem + 'static>(
        fs: FS,
        connection: &Connection,
        dir: &Path,
        source: &str,
        threads: usize,
    ) -> Result<Session, MountError> {
        if connection.is_taken_over() {
            return Self::serve(fs, connection, dir, threads);
        }
        connection.mounter.mount(&connection.device, dir, source)?;
        Self::serve(fs, connection, dir, threads).inspect_err(|_| {
            let _ = connection.mounter.unmount(dir);
        })
    }

    fn serve<FS: Filesystem + 'static>(
        fs: FS,
        connection: &Connection,
        dir: &Path,
        threads: usize,
    ) -> Result<Session, MountError> {
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(threads.max(1));
        let handshake = |source| MountError::Handshake { dir: dir.to_owned(), source };
        let (kernel, device) = connection::handshake_pair().map_err(handshake)?;
        let request = connection.init_request(dir)?;
        nix::unistd::write(&kernel, &request).map_err(|e| handshake(e.into()))?;
        let session = FuserSession::from_fd(fs, device, SessionACL::All, config).map_err(handshake)?;
        let mut reply = vec![0; request.len() + 4096];
        let len = nix::unistd::read(&kernel, &mut reply).map_err(|e| handshake(e.into()))?;
        if !connection.is_taken_over() {
            nix::unistd::write(&connection.device, &reply[..len]).map_err(|e| handshake(e.into()))?;
        }
        connection::replace(session.as_fd(), &connection.device).map_err(handshake)?;
        if connection.is_taken_over() {
            connection.resend().map_err(handshake)?;
        }
        let notifier = session.notifier();
        let server = std::thread::Builder::new()
            .name("fuse".into())
            .spawn(move || session.run())
            .map_err(handshake)?;
        let mounter = connection.mounter.clone();
        Ok(Session { dir: dir.to_owned(), mounter, notifier, server: Some(server) })
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
        let busy = self.mounter.unmount(&self.dir)?;
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

impl Connection {
    /// Registers backing files with this connection.
    pub fn backings(&self) -> Backings {
        Backings { device: Arc::clone(&self.device), mounter: self.mounter.clone() }
    }
}
