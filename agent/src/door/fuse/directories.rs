//! Making, removing and listing directories.

use super::filesystem::{LitefsFilesystem, again, is_internal};
use super::inodes::{Node, ROOT, SPECIAL_BIT};
use super::names::{Kind, POSITION_SUFFIX};
use super::rename::errno;
use fuse_session::fuse::*;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};

impl LitefsFilesystem {
    pub(super) fn make_directory(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
    ) -> Result<FileAttr, Errno> {
        let path = self.child(parent, name)?;
        if !self.may_write(is_internal(req)) {
            return Err(Errno::EROFS);
        }
        if self.special_at(&path).is_some() {
            return Err(Errno::EEXIST);
        }
        let backing = self.backing(&path);
        match std::fs::DirBuilder::new().mode(mode).create(&backing) {
            Err(e) if again(req) && e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(errno)?,
        }
        std::os::unix::fs::chown(&backing, Some(req.uid()), Some(req.gid())).map_err(errno)?;
        // The agent's own umask is not the application's, which the kernel has applied.
        let mode = std::fs::Permissions::from_mode(mode & 0o7777);
        std::fs::set_permissions(&backing, mode).map_err(errno)?;
        self.find(&path).map(|(_, attr)| attr)
    }

    pub(super) fn remove_directory(&self, req: &Request, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let path = self.child(parent, name)?;
        if !self.may_write(is_internal(req)) {
            return Err(Errno::EROFS);
        }
        match std::fs::remove_dir(self.backing(&path)) {
            Err(e) if again(req) && e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(errno),
        }
    }

    /// A directory's entries: inode, is a directory, name.
    pub(super) fn list(&self, number: u64) -> Result<Vec<(u64, bool, OsString)>, Errno> {
        let inode = self.inode(number)?;
        let dir = inode.path();
        let mut entries = vec![(number, true, OsString::from(".")), (ROOT, true, OsString::from(".."))];
        for entry in std::fs::read_dir(self.backing(&dir)).map_err(errno)? {
            let entry = entry.map_err(errno)?;
            let meta = entry.metadata().map_err(errno)?;
            let name = entry.file_name();
            if let Node::File(Kind::Main, Some(db)) = self.tree.node_for(&dir.join(&name), meta.is_dir())
                && db.state().page_count > 0
            {
                let mut position = name.clone();
                position.push(POSITION_SUFFIX);
                entries.push((SPECIAL_BIT | meta.ino(), false, position));
            }
            entries.push((meta.ino(), meta.is_dir(), name));
        }
        if number == ROOT {
            entries.push((SPECIAL_BIT, false, OsString::from(".lag")));
            if self.view.primary_hostname().is_some() {
                entries.push((SPECIAL_BIT | 1, false, OsString::from(".primary")));
            }
        }
        Ok(entries)
    }
}
