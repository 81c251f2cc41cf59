//! What a request is about: inodes and handles by the kernel's numbers, files by their names.

use super::attributes::{attr_of, special_attr, special_number};
use super::filesystem::LitefsFilesystem;
use super::handles::{Handle, PLAIN_BIT};
use super::inodes::{Inode, Node, Special};
use super::names::{Kind, POSITION_SUFFIX};
use super::rename::errno;
use crate::DatabaseName;
use crate::door::lock_file::{self, LOCK_SUFFIX};
use fuse_session::fuse::*;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

impl LitefsFilesystem {
    /// An inode the kernel knows.
    pub(super) fn inode(&self, number: u64) -> Result<Arc<Inode>, Errno> {
        if let Some(inode) = self.tree.inodes.get(number) {
            return Ok(inode);
        }
        let known = self.predecessor.as_ref().and_then(|predecessor| predecessor.find(&self.tree, number));
        known.ok_or(Errno::ENOENT)
    }

    /// An open handle. Of directories and special files another server of the mount has left none, and needs to leave none.
    pub(super) fn plain_handle(&self, inode: INodeNo, handle: FileHandle) -> Option<Arc<Handle>> {
        let known = self.handles.get(handle.0);
        if known.is_some() || self.predecessor.is_none() || handle.0 & PLAIN_BIT == 0 {
            return known;
        }
        let made = match self.inode(inode.0).ok()?.node() {
            Node::Directory => Handle::Directory { inode: inode.0, entries: OnceLock::new() },
            Node::Special(special) => Handle::Special(special),
            Node::File(..) => return None,
        };
        self.handles.insert(handle.0, made);
        self.handles.get(handle.0)
    }

    /// The path of a name in a directory.
    pub(super) fn child(&self, parent: INodeNo, name: &OsStr) -> Result<PathBuf, Errno> {
        let dir = self.inode(parent.0)?;
        match dir.node() {
            Node::Directory => Ok(dir.path().join(name)),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// The special file at a path, where there is one now.
    pub(super) fn special_at(&self, path: &Path) -> Option<Special> {
        match path.to_str()? {
            ".primary" => Some(Special::Primary),
            ".lag" => Some(Special::Lag),
            text if text.ends_with(LOCK_SUFFIX) => {
                lock_file::database_of(&self.shared, text).map(Special::Lock)
            }
            text => {
                let name = DatabaseName::new(text.strip_suffix(POSITION_SUFFIX)?).ok()?;
                self.shared.database(&name).filter(|db| db.is_tracked()).map(Special::Position)
            }
        }
    }

    /// The inode at a path and what `stat` tells of it; counts as looked up by the kernel.
    pub(super) fn find(&self, path: &Path) -> Result<(Arc<Inode>, FileAttr), Errno> {
        if let Some(special) = self.special_at(path) {
            let content = special.content(&*self.view).ok_or(Errno::ENOENT)?;
            let number = special_number(path);
            let attr = special_attr(number, &special, content.len() as u64);
            return Ok((self.tree.inodes.looked_up(number, path, || Node::Special(special)), attr));
        }
        let meta = self.backing(path).symlink_metadata().map_err(errno)?;
        let inode = self.tree.inodes.looked_up(meta.ino(), path, || self.tree.node_for(path, meta.is_dir()));
        let attr = self.attr(&inode, &meta);
        Ok((inode, attr))
    }

    /// What `stat` tells of it.
    pub(super) fn attr(&self, inode: &Inode, meta: &Metadata) -> FileAttr {
        let mut attr = attr_of(inode.number, meta);
        if inode.open.lock().orphan {
            attr.nlink = attr.nlink.saturating_sub(1);
        }
        if let Node::File(Kind::Wal, Some(db)) = inode.node() {
            // Never less than the kernel has: it would drop pages that a writer has filled and is about to send.
            let st = db.state();
            attr.size = st.wal.visible_len(attr.size.max(st.wal_cached_end));
        }
        attr
    }
}
