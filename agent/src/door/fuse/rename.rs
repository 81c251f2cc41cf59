//! rename(2) in the mount. The kernel holds the directories' locks until it is answered, so nothing here may go through
//! the mount, and what waits runs beside the serving threads.

use super::files;
use super::inodes::{Inodes, Node};
use super::names::{Kind, classify};
use crate::DatabaseName;
use crate::capture::CaptureError;
use crate::database::{Database, Shared};
use fuse_session::fuse::Errno;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The kernel tells of a close after close(2) has returned, so a database may still look open for a moment.
const CLOSING: Duration = Duration::from_millis(500);
const CLOSING_STEP: Duration = Duration::from_millis(5);

/// The backing files and what the kernel knows of them.
#[derive(Debug, Clone)]
pub struct Tree {
    /// The node's databases.
    pub shared: Arc<Shared>,
    /// Inodes the kernel knows.
    pub inodes: Arc<Inodes>,
    /// Where the backing files are.
    pub root: PathBuf,
}

impl Tree {
    /// The backing file of a path below the mount.
    pub fn backing(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    /// What a path is.
    pub fn node_for(&self, path: &Path, is_dir: bool) -> Node {
        if is_dir {
            return Node::Directory;
        }
        let (kind, base) = classify(path);
        let db = match kind {
            Kind::SuperJournal => None,
            _ => DatabaseName::new(&base).ok().map(|name| self.shared.database_or_new(&name)),
        };
        Node::File(kind, db)
    }

    /// Renames. A database that nobody uses moves as a transaction of its new name and a drop of the old one. One that
    /// is in use gives EBUSY: part of it may be in its WAL only.
    pub fn rename(&self, from: &Path, to: &Path, no_replace: bool) -> Result<(), Errno> {
        let meta = self.backing(from).symlink_metadata().map_err(errno)?;
        let target = self.backing(to).symlink_metadata();
        if no_replace && target.is_ok() {
            return Err(Errno::EEXIST);
        }
        if target.is_ok_and(|t| files::same_file(&t, &meta)) {
            return Ok(());
        }
        if meta.is_dir() {
            let below = DatabaseName::new(from).map(|dir| self.shared.below(&dir)).unwrap_or_default();
            if below.iter().any(|db| in_use_for_long(db)) {
                return Err(Errno::EBUSY);
            }
            self.rename_backing(from, to)?;
            for db in below {
                self.moved_with_directory(&db, from, to);
            }
            return Ok(());
        }
        let place = |path: &Path| {
            let (kind, base) = classify(path);
            let db = DatabaseName::new(base).ok().map(|name| self.shared.database_or_new(&name));
            let live = db.as_ref().is_some_and(|db| db.state().page_count > 0);
            (kind, db, live)
        };
        let ((from_kind, from_db, from_live), (to_kind, to_db, to_live)) = (place(from), place(to));
        let companion = |kind, live| live && matches!(kind, Kind::Journal | Kind::Wal | Kind::Shm);
        if companion(from_kind, from_live) || companion(to_kind, to_live) {
            return Err(Errno::EPERM);
        }
        let from_live = from_live && from_kind == Kind::Main;
        let to_live = to_live && to_kind == Kind::Main;
        if !from_live && !to_live {
            self.rename_backing(from, to)?;
            if let (Kind::Main, Some(db)) = (to_kind, to_db) {
                let mut st = db.state();
                st.set_database_file(None);
                if let Err(e) = files::adopt(&db, &mut st) {
                    files::errno_of(&db, "take in", &e);
                }
            }
            return Ok(());
        }
        let (Kind::Main, Some(to_db)) = (to_kind, to_db) else { return Err(Errno::EPERM) };
        let from_db = from_db.filter(|_| from_live);
        if from_db.as_deref().is_some_and(in_use_for_long) || to_live && in_use_for_long(&to_db) {
            return Err(Errno::EBUSY);
        }
        to_db
            .replace_by_rename(from_db.as_deref(), &self.backing(from))
            .map_err(|e| Errno::from_i32(files::errno_of(&to_db, "rename", &e)))?;
        self.inodes.renamed(from, to, |path| self.node_for(path, false));
        Ok(())
    }

    /// A database below a directory that was renamed goes on under its new name.
    fn moved_with_directory(&self, db: &Database, from: &Path, to: &Path) {
        let path = Path::new(db.name().as_str());
        let moved = path.strip_prefix(from).ok().and_then(|rest| DatabaseName::new(to.join(rest)).ok());
        let logged = match moved {
            Some(name) => {
                let new = self.shared.database_or_new(&name);
                let mut st = new.state();
                st.set_database_file(None);
                files::adopt(&new, &mut st)
            }
            None => Err(CaptureError::NotADatabase("its new path cannot name a database")),
        };
        if let Err(e) = logged.and_then(|()| db.log_drop(&mut db.state())) {
            files::errno_of(db, "rename", &e);
        }
        self.shared.forget_name(db);
    }

    /// A file that is about to lose its name gets another one while it is open, so that the next server of the mount finds
    /// it too.
    pub fn keep_if_open(&self, path: &Path) {
        let backing = self.backing(path);
        let Some(inode) = backing.symlink_metadata().ok().and_then(|m| self.inodes.get(m.ino())) else {
            return;
        };
        let mut open = inode.open.lock();
        if open.handles > 0 && !open.orphan {
            match std::fs::hard_link(&backing, self.shared.dirs.orphan(inode.number)) {
                Ok(()) => open.orphan = true,
                Err(error) => {
                    tracing::warn!(path = %backing.display(), %error, "a removed file would not survive the agent");
                }
            }
        }
    }

    fn rename_backing(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.keep_if_open(to);
        std::fs::rename(self.backing(from), self.backing(to)).map_err(errno)?;
        self.inodes.renamed(from, to, |path| self.node_for(path, false));
        Ok(())
    }
}

/// Whether a database is in use, and not only being closed.
fn in_use_for_long(db: &Database) -> bool {
    let in_use = wait_until_closed(|| db.is_in_use());
    if in_use {
        tracing::info!(database = %db.name(), "refused to rename a database that is in use");
    }
    in_use
}

/// Waits for closes that the kernel has not told yet; says whether it is still `open`.
pub(super) fn wait_until_closed(open: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + CLOSING;
    while open() {
        if Instant::now() > deadline {
            return true;
        }
        std::thread::sleep(CLOSING_STEP);
    }
    false
}

pub(super) fn errno(e: io::Error) -> Errno {
    Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))
}
