//! The FUSE door: the cluster's directory as a file system, served by this process.
//!
//! How a file is open decides what the agent sees of it:
//!
//! | file                          | reads and writes                                   | why                          |
//! |-------------------------------|----------------------------------------------------|------------------------------|
//! | database in WAL mode, `-shm`  | passed through to the backing file by the kernel   | native speed; nothing to see |
//! | database in a rollback mode   | cached by the kernel, every write comes here       | which pages changed          |
//! | `-wal`, `-journal`            | cached by the kernel, every write comes here       | where a commit is seen       |
//!
//! POSIX locks stay in the kernel, on the inodes of the mount. Whoever in this process must lock or write like an
//! SQLite connection opens the file through the mount and is told from an application by its thread.

mod answering;
mod attributes;
mod directories;
mod files;
mod filesystem;
mod handles;
mod inodes;
mod journal_sync;
mod kernel_cache;
mod lookup;
mod names;
mod opening;
mod page_count;
mod predecessor;
mod removing;
mod rename;
mod serving_threads;
mod special;
mod staged;
mod workers;

pub use inodes::Special;
pub(crate) use kernel_cache::CACHE_AHEAD_BYTES;
pub use special::RoleView;

use crate::database::{Database, Shared};
use crate::door::lock_file::HaltLocks;
use fuse_session::{Connection, MountError, MountState, Mounter, Session, mount_state};
use serving_threads::Threads;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the door is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where applications find their databases.
    pub mount: PathBuf,
    /// Shown as the source in the mount table: the cluster's name.
    pub source: String,
    /// Use FUSE passthrough where the kernel has it.
    pub passthrough: bool,
    /// Threads that serve requests; `None`: as many as suit the CPUs.
    pub threads: Option<usize>,
}

/// Why the door could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// From the FUSE session.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Another file system is mounted there.
    #[error("{dir} already has a {fs_type} file system mounted; unmount it or choose another [mount] dir")]
    InUse {
        /// The mount point.
        dir: PathBuf,
        /// What is there.
        fs_type: String,
    },
    /// The directory has files of its own, which the mount would hide.
    #[error(
        "{dir} is not empty; move its files away before mounting over them (they can be copied in afterwards)"
    )]
    NotEmpty {
        /// The mount point.
        dir: PathBuf,
    },
    /// A file is there.
    #[error("{dir} is no directory; move it away or choose another [mount] dir")]
    NotADirectory {
        /// The mount point.
        dir: PathBuf,
    },
    /// The directory cannot be made or read.
    #[error("{dir}: {source}")]
    Directory {
        /// The mount point.
        dir: PathBuf,
        /// Reason.
        source: std::io::Error,
    },
}

/// The open door.
#[derive(Debug)]
pub struct Door {
    session: Session,
    invalidator: Arc<kernel_cache::Invalidator>,
    passthrough: Arc<std::sync::atomic::AtomicBool>,
}

impl Door {
    /// Mounts the cluster's directory, or goes on with the mount of an agent that has died. One that it left behind and
    /// nobody can go on with is taken away first.
    pub fn open(
        shared: Arc<Shared>,
        view: Arc<dyn RoleView>,
        locks: Arc<dyn HaltLocks>,
        options: &Options,
        connection: &Connection,
    ) -> Result<Door, DoorError> {
        let dir = &options.mount;
        if !connection.is_taken_over() {
            Self::prepare(dir, connection.mounter())?;
        }
        let directory = |source| DoorError::Directory { dir: dir.clone(), source };
        let passthrough = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let threads = Threads::choose(options.threads);
        let count = threads.count;
        let fs = filesystem::LitefsFilesystem::new(
            shared,
            view,
            locks,
            options.passthrough,
            passthrough.clone(),
            threads,
            connection,
        )
        .map_err(directory)?;
        let invalidator = fs.invalidator();
        let session = Session::start(fs, connection, dir, &options.source, count)?;
        invalidator.set_notifier(session.notifier());
        Ok(Door { session, invalidator, passthrough })
    }

    /// Makes sure that the directory can be mounted over.
    fn prepare(dir: &Path, mounter: &Mounter) -> Result<(), DoorError> {
        match mount_state(dir)? {
            MountState::Free => {}
            MountState::Stale => {
                tracing::warn!(mount = %dir.display(), "taking away the mount that a dead agent left behind");
                mounter.unmount(dir)?;
            }
            MountState::Served => {
                return Err(DoorError::InUse {
                    dir: dir.to_owned(),
                    fs_type: "litefs (served by another agent)".into(),
                });
            }
            MountState::Other(fs_type) => return Err(DoorError::InUse { dir: dir.to_owned(), fs_type }),
        }
        let directory = |source| DoorError::Directory { dir: dir.to_owned(), source };
        if dir.exists() && !dir.is_dir() {
            return Err(DoorError::NotADirectory { dir: dir.to_owned() });
        }
        std::fs::create_dir_all(dir).map_err(directory)?;
        if std::fs::read_dir(dir).map_err(directory)?.next().is_some() {
            return Err(DoorError::NotEmpty { dir: dir.to_owned() });
        }
        Ok(())
    }

    /// Whether the kernel passes database files through.
    pub fn passes_through(&self) -> bool {
        self.passthrough.load(std::sync::atomic::Ordering::Acquire)
    }

    /// A database's file was put in place behind the kernel's back: forget what it knows of the name.
    pub fn forget_name(&self, db: &Database) {
        self.invalidator.forget_name(db.name().as_ref());
    }

    /// Something that opens the way for [`Door::forget_name`] to other threads.
    pub fn invalidator(&self) -> Arc<dyn NameInvalidator> {
        self.invalidator.clone()
    }

    /// Whether the mount is gone, taken away from outside.
    pub fn is_gone(&self) -> bool {
        self.session.ended()
    }

    /// Takes the mount away.
    pub fn close(self) -> Result<(), MountError> {
        self.session.stop()
    }
}

/// Makes the kernel forget what it knows of a name.
pub trait NameInvalidator: Send + Sync {
    /// Forgets the entries of a database and its companions.
    fn forget(&self, db: &Database);
}

impl NameInvalidator for kernel_cache::Invalidator {
    fn forget(&self, db: &Database) {
        for suffix in ["", "-journal", "-wal", "-shm"] {
            self.forget_name(Path::new(&format!("{}{suffix}", db.name())));
        }
    }
}
