//! Readers of a database whose WAL is empty ask the kernel for the file's size, and passthrough makes the kernel forget
//! what a file is like at each read: every reading transaction costs a request. SQLite asks only while the wal-index does
//! not state the number of pages, so after some such requests the agent states it.

use super::inodes::{Inode, Node};
use super::names::Kind;
use crate::apply::is_page_count_missing;
use crate::database::Database;
use parking_lot::Mutex;
use sqlite_file::wal_index::IndexHeader;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Requests for the size of a database file, from one to the next look at its wal-index. A look costs less than a request.
const SIZES_ASKED_MAX: u32 = 64;

/// How often somebody has asked for the size of a file since the wal-index was looked at.
#[derive(Debug, Default)]
pub struct SizesAsked(AtomicU32);

impl SizesAsked {
    /// Counts one. `true`: it is time to look.
    fn count(&self) -> bool {
        let asked = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        if asked < SIZES_ASKED_MAX {
            return false;
        }
        self.0.store(0, Ordering::Relaxed);
        true
    }
}

/// The database whose readers ask for its size again and again.
pub fn asked_for_size(inode: &Inode) -> Option<Arc<Database>> {
    let Node::File(Kind::Main, Some(db)) = inode.node() else { return None };
    if inode.open.lock().backing.is_none() || !inode.sizes_asked.count() {
        return None;
    }
    let index = File::open(&db.paths().shm).and_then(|shm| IndexHeader::read(&shm));
    matches!(index, Ok(Some(header)) if is_page_count_missing(&header)).then_some(db)
}

/// States the number of pages at a moment at which nobody reads, and gives `answer` to the one who asked as soon as it may
/// close the database. Through the mount, so on a thread of its own: what others do there may wait for readers.
pub fn state_soon(db: Arc<Database>, answer: impl FnOnce() + Send + 'static) {
    let answer = Arc::new(Mutex::new(Some(answer)));
    let ours = answer.clone();
    let thread = std::thread::Builder::new().name("door-page-count".to_owned()).spawn(move || {
        match db.state_page_count(|| give(&ours)) {
            Ok(stated) => tracing::debug!(database = %db.name(), stated, "number of pages in the wal-index"),
            Err(error) => tracing::debug!(database = %db.name(), %error, "the wal-index stays as it is"),
        }
    });
    if let Err(error) = thread {
        tracing::debug!(%error, "cannot start a thread of the mount");
        give(&answer);
    }
}

fn give<F: FnOnce()>(answer: &Mutex<Option<F>>) {
    if let Some(answer) = answer.lock().take() {
        answer();
    }
}
