//! What the kernel keeps of names and contents: it is made to forget what has changed beside the mount, and is given the pages
//! after a WAL's end.

use super::files::OpenFile;
use super::names::Kind;
use fuse_session::fuse::{INodeNo, Notifier};
use parking_lot::Mutex;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::{Arc, mpsc};

/// The kernel's page size at most platforms; a larger one only makes the cache less effective.
const CACHE_PAGE_BYTES: u64 = 4096;
/// A WAL that was never longer than this has its exact length for whoever looks: what is cached ahead of the end
/// counts as length for the kernel.
const CACHE_AHEAD_FROM_BYTES: u64 = 256 * 1024;
/// The cache ahead of the WAL's end is filled up when less than this is left (a 64 KiB page and its header)...
const CACHE_AHEAD_MIN_BYTES: u64 = 128 * 1024;
/// ... to this much.
pub(crate) const CACHE_AHEAD_BYTES: u64 = 512 * 1024;

/// Tells the kernel to forget; from a thread of its own, since the kernel may wait for a request that is being served.
#[derive(Debug)]
pub struct Invalidator {
    notifier: Mutex<Option<Notifier>>,
    resolve: mpsc::Sender<OsString>,
    queue: Mutex<Option<mpsc::Receiver<OsString>>>,
}

impl Default for Invalidator {
    fn default() -> Self {
        let (resolve, queue) = mpsc::channel();
        Invalidator { notifier: Mutex::default(), resolve, queue: Mutex::new(Some(queue)) }
    }
}

impl Invalidator {
    /// The session is running.
    pub fn set_notifier(&self, notifier: Notifier) {
        *self.notifier.lock() = Some(notifier);
    }

    /// Forgets the entry of a path below the mount, wherever its directory is known.
    pub fn forget_name(&self, path: &Path) {
        let _ = self.resolve.send(path.as_os_str().to_owned());
    }

    /// Gives the kernel's cache `data` of a file. Not for pages of a write that is being served.
    fn store(&self, inode: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        match &*self.notifier.lock() {
            Some(notifier) => notifier.store(INodeNo(inode), offset, data),
            None => Ok(()),
        }
    }

    /// Forgets the content of a file that nobody has open.
    pub fn forget_content(&self, inode: u64) {
        if let Some(notifier) = &*self.notifier.lock() {
            // ENOENT: the kernel did not know it.
            let _ = notifier.inval_inode(INodeNo(inode), 0, 0);
        }
    }

    /// Runs the queue on a thread; `directory` finds the inode of a directory the kernel knows.
    pub fn run(
        self: &Arc<Self>,
        directory: impl Fn(&Path) -> Option<u64> + Send + 'static,
    ) -> io::Result<()> {
        let Some(queue) = self.queue.lock().take() else { return Ok(()) };
        let this = Arc::downgrade(self);
        std::thread::Builder::new().name("fuse-invalidate".into()).spawn(move || {
            while let Ok(path) = queue.recv() {
                let Some(this) = this.upgrade() else { return };
                let path = Path::new(&path);
                let Some(name) = path.file_name() else { continue };
                let parent = directory(path.parent().unwrap_or(Path::new("")));
                if let (Some(notifier), Some(parent)) = (&*this.notifier.lock(), parent) {
                    // ENOENT: the kernel did not know the entry.
                    let _ = notifier.inval_entry(INodeNo(parent), name);
                }
            }
        })?;
        Ok(())
    }

    /// Keeps the pages after `end` of a WAL in the kernel's cache, in advance. The kernel ends a write at a page that it only
    /// knows in part, so a frame would take one request more; a page that was given to it whole is known.
    pub fn keep_ahead(&self, file: &OpenFile, end: u64) {
        let Some(db) = file.db.as_ref().filter(|_| file.kind == Kind::Wal && !file.passthrough) else {
            return;
        };
        let mut st = db.state();
        let too_small = st.wal_cached_end == 0 && end < CACHE_AHEAD_FROM_BYTES;
        if too_small || end + CACHE_AHEAD_MIN_BYTES <= st.wal_cached_end {
            return;
        }
        let next_page = end.next_multiple_of(CACHE_PAGE_BYTES);
        let from = st.wal_cached_end.max(next_page);
        let mut data = vec![0; (next_page + CACHE_AHEAD_BYTES - from) as usize];
        if db.read_at_or_zero(&file.file, &mut data, from).is_ok()
            && self.store(file.inode.number, from, &data).is_ok()
        {
            st.wal_cached_end = next_page + CACHE_AHEAD_BYTES;
        }
    }
}
