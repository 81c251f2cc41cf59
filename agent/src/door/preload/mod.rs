//! The preload door: the cluster's directory is a plain one, and `liblitefs.so` in the applications tells the agent what
//! SQLite does. See `docs/preload-door.md`.
//!
//! | module         | what it does                                                     |
//! |----------------|------------------------------------------------------------------|
//! | [`listener`]   | accepts processes; looks for what is done without the library     |
//! | [`connection`] | serves one process                                                |
//! | [`requests`]   | what a process asks                                               |
//! | [`opening`]    | opens files for processes that permissions keep out on a replica |
//! | [`bystanders`] | programs that use the directory without the library               |
//! | [`memory`]     | the memory shared with a process                                  |
//! | [`peer`]       | who a process is and what it may write                            |
//! | [`special`]    | `.primary`, `.lag` and `NAME-pos`                                 |
//! | [`lock_file`]  | `NAME-lock`                                                       |

mod bystanders;
mod connection;
mod listener;
mod lock_file;
mod memory;
mod opening;
mod peer;
pub(crate) mod requests;
mod special;

use crate::database::{RoleStep, Shared};
use crate::door::fuse::RoleView;
use crate::door::lock_file::HaltLocks;
use connection::Connection;
use fuse_session::{MountError, MountState, Mounter, mount_state};
use listener::Listener;
use parking_lot::Mutex;
use shim_protocol::{self as protocol, REGISTRATION, Registration, SOCKET, VERSION};
use special::SpecialFiles;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long the end of a term waits for commits that are being written and published: a process may be stopped meanwhile,
/// and an fsync may be among it.
const COMMIT_PATIENCE: Duration = Duration::from_secs(5);

/// How the door is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where applications find their databases: becomes a link to the files.
    pub dir: PathBuf,
    /// Where the library finds the agent.
    pub runtime_dir: PathBuf,
    /// Takes away what a dead agent left mounted.
    pub mounter: Mounter,
    /// Commits in WAL mode are held until the log has them.
    pub hold: bool,
}

/// Why the door could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// From looking at what is mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Something is mounted there.
    #[error("{dir} has a {fs_type} file system mounted; unmount it, or use door = \"fuse\"")]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// What is there.
        fs_type: String,
    },
    /// Something else is there.
    #[error("{dir} is in the way; move its files away (they can be copied in afterwards)")]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
    },
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
}

/// What the door's threads and the role's changes share.
#[derive(Debug)]
struct Connections {
    shared: Arc<Shared>,
    special: Arc<SpecialFiles>,
    locks: Arc<dyn HaltLocks>,
    all: Mutex<Vec<Arc<Connection>>>,
    hold: bool,
    /// What applications were told last.
    writable: AtomicBool,
    /// The term ends: processes that connect now are not told that they may write.
    ending: AtomicBool,
}

/// The open door.
#[derive(Debug)]
pub struct Door {
    listener: Listener,
    connections: Arc<Connections>,
}

impl Door {
    /// Makes the directory, and listens.
    pub fn open(
        shared: Arc<Shared>,
        view: Arc<dyn RoleView>,
        locks: Arc<dyn HaltLocks>,
        options: &Options,
    ) -> Result<Door, DoorError> {
        link(&options.dir, &shared.dirs.files, &options.mounter)?;
        let connections = Arc::new(Connections {
            shared: shared.clone(),
            special: Arc::new(SpecialFiles::new(shared.clone(), view.clone())),
            locks,
            all: Mutex::default(),
            hold: options.hold,
            writable: AtomicBool::new(shared.is_writable()),
            ending: AtomicBool::new(false),
        });
        let told = connections.clone();
        shared.follow_wals(move |step| told.role_step(step));
        if shared.is_writable() {
            shared.write_protection.end(&shared);
            connections.read_applied_wals();
        }
        // What was committed while no agent ran.
        for db in shared.known() {
            requests::follow(&db);
        }
        let socket = options.runtime_dir.join(SOCKET);
        let listener = Listener::start(&socket, connections.clone(), view, options.mounter.clone())
            .map_err(|source| DoorError::Io { path: socket, source })?;
        let registration = options.runtime_dir.join(REGISTRATION);
        let io = |source| DoorError::Io { path: registration.clone(), source };
        let files = std::fs::metadata(&shared.dirs.files).map_err(io)?;
        let text = Registration { version: VERSION, device: files.dev(), inode: files.ino() }.to_string();
        replace(&registration, &text).map_err(io)?;
        Ok(Door { listener, connections })
    }

    /// Ends it. The directory stays: readers go on, and writers wait for the next agent.
    pub fn close(self) {
        self.connections.end_writes();
        self.listener.stop();
    }

    /// Nothing keeps databases from applications any more: another door is opened.
    pub fn leave(dir: &Path, runtime_dir: &Path, files: &Path) -> io::Result<()> {
        match std::fs::remove_file(runtime_dir.join(REGISTRATION)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        if std::fs::read_link(dir).is_ok_and(|to| to == files) {
            std::fs::remove_file(dir)?;
        }
        Ok(())
    }
}

/// A database that some process has open on the plain files.
pub fn in_use(shared: &Shared) -> Option<crate::DatabaseName> {
    use sqlite_file::locks::{LockKind, PENDING, SHARED, WAL_DMS, conflicting_holder};
    let held = |path: &Path, range| {
        std::fs::File::open(path)
            .and_then(|file| conflicting_holder(&file, LockKind::Write, range))
            .is_ok_and(|holder| holder.is_some())
    };
    let in_use = shared.known().into_iter().find(|db| {
        let paths = db.paths();
        held(&paths.database, SHARED) || held(&paths.database, PENDING) || held(&paths.shm, WAL_DMS)
    });
    in_use.map(|db| db.name().clone())
}

/// Makes `dir` a link to the files.
fn link(dir: &Path, files: &Path, mounter: &Mounter) -> Result<(), DoorError> {
    let io = |source| DoorError::Io { path: dir.to_owned(), source };
    if std::fs::read_link(dir).is_ok_and(|to| to == files) {
        return Ok(());
    }
    match mount_state(dir)? {
        MountState::Free => {}
        MountState::Stale => {
            mounter.unmount(dir)?;
        }
        MountState::Served => {
            return Err(DoorError::InUse { dir: dir.to_owned(), fs_type: "litefs".into() });
        }
        MountState::Other(fs_type) => return Err(DoorError::InUse { dir: dir.to_owned(), fs_type }),
    }
    match std::fs::symlink_metadata(dir) {
        Ok(there) if there.is_dir() => {
            if let Err(error) = std::fs::remove_dir(dir) {
                return Err(match error.kind() {
                    io::ErrorKind::DirectoryNotEmpty => DoorError::NotEmpty { dir: dir.to_owned() },
                    _ => io(error),
                });
            }
        }
        Ok(_) => return Err(DoorError::NotEmpty { dir: dir.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(io(e)),
    }
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
        // The way to the files must be open to those who may use them.
        let ancestors = files.ancestors().take(2).collect::<Vec<_>>();
        for directory in ancestors {
            let metadata = std::fs::metadata(directory).map_err(io)?;
            let open = metadata.mode() | 0o111;
            if open != metadata.mode() {
                std::fs::set_permissions(directory, std::fs::Permissions::from_mode(open)).map_err(io)?;
            }
        }
    }
    symlink(files, dir).map_err(io)
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)
}

impl Connections {
    /// Tells a process what it may do now.
    fn tell(&self, connection: &Connection) {
        let page = connection.memory().page();
        // The library reads the same clock.
        let until = self
            .shared
            .write_limit()
            .map_or(u64::MAX, |until| u64::try_from(until.as_nanos()).unwrap_or(u64::MAX - 1));
        page.write_until_ns.store(until, Ordering::Release);
        let mut mode = 0;
        if self.shared.is_writable() && !self.ending.load(Ordering::SeqCst) {
            mode |= protocol::MODE_WRITABLE;
        }
        if self.holds() {
            mode |= protocol::MODE_HELD;
        }
        page.mode.store(mode, Ordering::Release);
        connection.tell_access();
    }

    fn role_step(&self, step: RoleStep) {
        match step {
            RoleStep::Changed => {
                let writable = self.shared.is_writable();
                if !writable {
                    self.ending.store(false, Ordering::SeqCst);
                }
                if !self.writable.swap(writable, Ordering::AcqRel) && writable {
                    self.shared.write_protection.end(&self.shared);
                    self.read_applied_wals();
                }
                self.all.lock().iter().for_each(|connection| self.tell(connection));
            }
            RoleStep::WritesEnd => self.end_writes(),
            // On a replica what is committed under a halt lock is known before.
            RoleStep::Asked if !self.shared.is_writable() => {}
            RoleStep::Asked => {
                let all = self.all.lock().clone();
                for db in all.iter().flat_map(|connection| connection.databases()) {
                    requests::follow(&db);
                }
            }
        }
    }

    /// What was applied to WALs is known before applications add to them.
    fn read_applied_wals(&self) {
        for db in self.shared.known() {
            let read = db.suspect_commits_since_applied().and_then(|()| db.read_applied_wal());
            if let Err(error) = read {
                tracing::warn!(database = %db.name(), %error, "its WAL cannot be read yet: the next transaction compares all");
                db.suspect_foreign_write();
                db.put_back_suspect(&mut db.state());
            }
            if db.is_suspect_in_wal_mode() {
                requests::capture_suspect(&db);
            }
        }
    }

    /// No process begins a commit any more; what has been committed is captured while this node may still do so.
    fn end_writes(&self) {
        let all = {
            let all = self.all.lock();
            self.ending.store(true, Ordering::SeqCst);
            all.clone()
        };
        for connection in &all {
            let mode = &connection.memory().page().mode;
            mode.fetch_and(!protocol::MODE_WRITABLE, Ordering::SeqCst);
        }
        // Held commits are in the log before they are written.
        let deadline = Instant::now() + if self.holds() { Duration::ZERO } else { COMMIT_PATIENCE };
        while self.is_any_committing() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        for db in all.iter().flat_map(|connection| connection.databases()) {
            requests::follow_to_the_end(&db);
        }
    }

    /// Whether a process that is still there has looked whether it may commit, and has not published its commit.
    fn is_any_committing(&self) -> bool {
        self.all.lock().iter().any(|c| c.memory().page().committing.load(Ordering::SeqCst) > 0)
    }

    /// Whether commits in WAL mode are held until the log has them.
    fn holds(&self) -> bool {
        self.hold || self.shared.gate.is_used()
    }
}
