//! Open handles by the kernel's numbers, in this process and in the table that outlives it.

use super::files::OpenFile;
use super::inodes::Special;
use super::staged::StagedWrite;
use fuse_session::HandleTable;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Arc, OnceLock};
use tokio_util::sync::DropGuard;

/// An open handle.
#[derive(Debug)]
pub enum Handle {
    /// A backing file.
    File(OpenFile),
    /// A plain copy on its way over a database.
    Staged(Arc<StagedWrite>),
    /// A made-up file.
    Special(Special),
    /// `NAME-lock`, opened for writing: the halt lock ends with this.
    Lock {
        /// Ends the lock.
        _release: DropGuard,
    },
    /// A directory.
    Directory {
        /// Its inode.
        inode: u64,
        /// Inode, is a directory, name; listed at the first read.
        entries: OnceLock<Vec<(u64, bool, OsString)>>,
    },
}

/// Set in the numbers of handles of which the next server of the mount needs to know nothing.
pub const PLAIN_BIT: u64 = 1 << 62;

/// How a file is open, for the next server of the mount.
pub mod flags {
    /// Always set.
    pub const OPEN: u32 = 1;
    /// Opened by the agent.
    pub const INTERNAL: u32 = 1 << 1;
    /// Looked at when it is closed.
    pub const ADOPT: u32 = 1 << 2;
    /// Something was written.
    pub const WRITTEN: u32 = 1 << 3;
    /// A copy on its way over a database.
    pub const STAGED: u32 = 1 << 4;
}

/// Open handles by number.
#[derive(Debug)]
pub struct Handles {
    /// What outlives this process.
    pub table: Arc<HandleTable>,
    open: RwLock<HashMap<u64, Arc<Handle>>>,
}

impl Handles {
    /// No open handles in this process yet.
    pub fn new(table: Arc<HandleTable>) -> Self {
        Handles { table, open: RwLock::default() }
    }

    /// Keeps a handle under the number that the table gave.
    pub fn insert(&self, number: u64, handle: Handle) {
        self.open.write().insert(number, Arc::new(handle));
    }

    /// Keeps a handle that has no place in the table; returns its number.
    pub fn add_plain(&self, handle: Handle) -> u64 {
        let number = PLAIN_BIT | self.table.next_number();
        self.insert(number, handle);
        number
    }

    /// A handle by number.
    pub fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.open.read().get(&number).cloned()
    }

    /// Forgets a handle.
    pub fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        if number & PLAIN_BIT == 0 {
            self.table.remove(number);
        }
        self.open.write().remove(&number)
    }
}
