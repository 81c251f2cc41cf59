//! Inodes the kernel knows, and how their files are open.
//!
//! An inode's number is the backing file's, so that a successor of this process can find it again; special files have
//! bit 62 set. The kernel wants all open files of an inode to agree: either all are passed through to one backing
//! id, or none is.

use super::names::Kind;
use super::page_count::SizesAsked;
use crate::database::Database;
use fuse_session::Backing;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Number of the mount's root directory (FUSE protocol).
pub const ROOT: u64 = 1;
/// Set in the numbers of special files.
pub const SPECIAL_BIT: u64 = 1 << 62;

/// What an inode is.
#[derive(Debug, Clone)]
pub enum Node {
    /// A directory.
    Directory,
    /// A regular file; with the database it belongs to, if its name can be one.
    File(Kind, Option<Arc<Database>>),
    /// A file made up by the agent.
    Special(Special),
}

/// Files made up by the agent (their formats are LiteFS's).
#[derive(Debug, Clone)]
pub enum Special {
    /// `.primary`: the primary's host name.
    Primary,
    /// `.lag`: milliseconds behind the primary.
    Lag,
    /// `NAME-pos`: a database's position.
    Position(Arc<Database>),
    /// `NAME-lock`: see [`crate::door::lock_file`].
    Lock(Arc<Database>),
}

/// One inode.
#[derive(Debug)]
pub struct Inode {
    /// Its number.
    pub number: u64,
    /// Its path below the backing directory, and what it is; both change with a rename.
    place: RwLock<(PathBuf, Node)>,
    /// References of the kernel.
    lookups: AtomicU64,
    /// How it is open.
    pub open: Mutex<OpenState>,
    /// Of a database: requests for its size.
    pub sizes_asked: SizesAsked,
}

/// How an inode is open.
#[derive(Debug, Default)]
pub struct OpenState {
    /// Open handles.
    pub handles: u32,
    /// The backing file, while any handle is open.
    pub file: Option<Arc<File>>,
    /// The backing id, while the handles are passed through.
    pub backing: Option<Arc<Backing>>,
    /// The file was removed while it was open; it has a name of its own until it is closed.
    pub orphan: bool,
}

impl Inode {
    /// Its path below the backing directory.
    pub fn path(&self) -> PathBuf {
        self.place.read().0.clone()
    }

    /// What it is.
    pub fn node(&self) -> Node {
        self.place.read().1.clone()
    }

    fn new(number: u64, path: &Path, node: Node, lookups: u64) -> Arc<Inode> {
        Arc::new(Inode {
            number,
            place: RwLock::new((path.to_owned(), node)),
            lookups: AtomicU64::new(lookups),
            open: Mutex::default(),
            sizes_asked: SizesAsked::default(),
        })
    }
}

/// All inodes the kernel knows.
#[derive(Debug)]
pub struct Inodes {
    by_number: RwLock<HashMap<u64, Arc<Inode>>>,
}

impl Default for Inodes {
    fn default() -> Self {
        let root = Inode::new(ROOT, Path::new(""), Node::Directory, 1);
        Inodes { by_number: RwLock::new(HashMap::from([(ROOT, root)])) }
    }
}

impl Inodes {
    /// An inode by its number.
    pub fn get(&self, number: u64) -> Option<Arc<Inode>> {
        self.by_number.read().get(&number).cloned()
    }

    /// The inode of a file that was looked up; counts the lookup. A number that is known under another path is
    /// taken for that path now, unless it is open: then the path it was opened by stays.
    pub fn looked_up(&self, number: u64, path: &Path, node: impl FnOnce() -> Node) -> Arc<Inode> {
        let mut all = self.by_number.write();
        if let Some(inode) = all.get(&number) {
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            let mut place = inode.place.write();
            if place.0 != path && inode.open.lock().handles == 0 {
                // The file system has given the number of a removed file to another one.
                *place = (path.to_owned(), node());
            }
            drop(place);
            return inode.clone();
        }
        let inode = Inode::new(number, path, node(), 1);
        all.insert(number, inode.clone());
        inode
    }

    /// An inode that the kernel knows from another server of this mount.
    pub fn known_before(&self, number: u64, path: &Path, node: Node) -> Arc<Inode> {
        let mut all = self.by_number.write();
        all.entry(number).or_insert_with(|| Inode::new(number, path, node, 1)).clone()
    }

    /// The kernel dropped `count` references.
    pub fn forget(&self, number: u64, count: u64) {
        if number == ROOT {
            return;
        }
        let mut all = self.by_number.write();
        let Some(inode) = all.get(&number) else { return };
        let before = inode
            .lookups
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n.saturating_sub(count)));
        if before.unwrap_or(0) <= count && inode.open.lock().handles == 0 {
            all.remove(&number);
        }
    }

    /// A file or a directory was renamed: everything at or below `from` is at or below `to` now.
    pub fn renamed(&self, from: &Path, to: &Path, classify: impl Fn(&Path) -> Node) {
        for inode in self.by_number.read().values() {
            let mut place = inode.place.write();
            let Ok(rest) = place.0.strip_prefix(from) else { continue };
            let path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            let node = if matches!(place.1, Node::Directory) { Node::Directory } else { classify(&path) };
            *place = (path, node);
        }
    }
}
