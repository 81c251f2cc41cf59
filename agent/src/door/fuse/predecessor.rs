//! Going on with a mount that another process has served: its inodes are found again by their numbers, which are those of
//! the backing files, and its open files by the table that it left.

use super::attributes::special_number;
use super::files::OpenFile;
use super::filesystem::LitefsFilesystem;
use super::handles::{Handle, flags};
use super::inodes::{Inode, Node, ROOT, SPECIAL_BIT, Special};
use super::names::{Kind, POSITION_SUFFIX};
use super::rename::Tree;
use super::staged::StagedWrite;
use crate::door::lock_file::LOCK_SUFFIX;
use fuse_session::OpenHandle;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Finds inodes that the kernel knows from another process.
#[derive(Debug, Default)]
pub struct Predecessor {
    /// Paths by inode number, as they were when the directories were last read.
    paths: Mutex<HashMap<u64, (PathBuf, bool)>>,
}

impl Predecessor {
    /// The inode with this number, if there is a file for it.
    pub fn find(&self, tree: &Tree, number: u64) -> Option<Arc<Inode>> {
        if number & SPECIAL_BIT != 0 {
            let (path, special) = special_file(tree, number)?;
            return Some(tree.inodes.known_before(number, &path, Node::Special(special)));
        }
        let mut paths = self.paths.lock();
        let is_there = |(path, _): &(PathBuf, bool)| {
            tree.backing(path).symlink_metadata().is_ok_and(|m| m.ino() == number)
        };
        if !paths.get(&number).is_some_and(is_there) {
            paths.clear();
            let mut dirs = vec![PathBuf::new()];
            while let Some(dir) = dirs.pop() {
                let Ok(entries) = std::fs::read_dir(tree.backing(&dir)) else { continue };
                for entry in entries.flatten() {
                    let Ok(meta) = entry.metadata() else { continue };
                    let path = dir.join(entry.file_name());
                    if meta.is_dir() {
                        dirs.push(path.clone());
                    }
                    paths.insert(meta.ino(), (path, meta.is_dir()));
                }
            }
        }
        let (path, is_dir) = paths.get(&number)?.clone();
        let node = tree.node_for(&path, is_dir);
        Some(tree.inodes.known_before(number, &path, node))
    }
}

fn special_file(tree: &Tree, number: u64) -> Option<(PathBuf, Special)> {
    let fixed = [(".primary", Special::Primary), (".lag", Special::Lag)];
    let fixed = fixed.into_iter().map(|(path, special)| (PathBuf::from(path), special));
    let of_databases = tree.shared.databases().into_iter().flat_map(|db| {
        let path = |suffix| PathBuf::from(format!("{}{suffix}", db.name()));
        [
            (path(POSITION_SUFFIX), Special::Position(db.clone())),
            (path(LOCK_SUFFIX), Special::Lock(db.clone())),
        ]
    });
    fixed.chain(of_databases).find(|(path, _)| special_number(path) == number)
}

impl LitefsFilesystem {
    /// Opens again what is open in the kernel.
    pub(super) fn go_on(&self) {
        let Some(predecessor) = &self.predecessor else { return };
        for (number, open) in self.handles.table.all() {
            match self.open_again(predecessor, number, &open) {
                Ok(handle) => {
                    self.count_opened(&handle);
                    self.handles.insert(number, handle);
                }
                // Whoever has it open gets an error for it, and nobody else does.
                Err(error) => tracing::warn!(inode = open.inode, %error, "an open file is lost"),
            }
        }
    }

    fn open_again(&self, predecessor: &Predecessor, number: u64, open: &OpenHandle) -> io::Result<Handle> {
        assert_ne!(open.inode, ROOT, "directories are not in the table");
        let orphan = self.shared.dirs.orphan(open.inode);
        let found = self.tree.inodes.get(open.inode).or_else(|| predecessor.find(&self.tree, open.inode));
        let (inode, path, removed) = match found {
            Some(inode) if !inode.open.lock().orphan => {
                let path = self.tree.backing(&inode.path());
                (inode, path, false)
            }
            _ => {
                // Nobody finds it by a name any more, so it is no database.
                let node = Node::File(Kind::Main, None);
                (self.tree.inodes.known_before(open.inode, Path::new(""), node), orphan, true)
            }
        };
        let Node::File(kind, db) = inode.node() else { return Err(io::ErrorKind::IsADirectory.into()) };
        let mut state = inode.open.lock();
        let file = match &state.file {
            Some(file) => file.clone(),
            None => Arc::new(OpenOptions::new().read(true).write(true).open(path)?),
        };
        state.handles += 1;
        state.orphan = removed;
        state.file = Some(file.clone());
        if open.backing != 0 && state.backing.is_none() {
            state.backing = Some(Arc::new(self.backings.adopt(open.backing)));
        }
        drop(state);
        if let (Kind::Main, Some(db)) = (kind, &db) {
            db.state().set_database_file(Some(file.clone()));
        }
        let has = |flag| open.flags & flag != 0;
        if has(flags::STAGED) {
            let db = db.ok_or(io::ErrorKind::NotFound)?;
            return Ok(Handle::Staged(Arc::new(StagedWrite::go_on(db, number, has(flags::WRITTEN))?)));
        }
        Ok(Handle::File(OpenFile {
            inode: inode.clone(),
            kind,
            db,
            file,
            internal: has(flags::INTERNAL),
            passthrough: open.backing != 0,
            adopt: has(flags::ADOPT),
            written: AtomicBool::new(has(flags::WRITTEN)),
            number,
            table: self.handles.table.clone(),
        }))
    }
}
