//! The transaction that runs in a database: what it has written to the database file, in memory of its own, and the commit
//! frame that is held back.

use crate::sys;
use shim_protocol::write_word;

/// Bytes of the first memory for a transaction's writes.
const WRITES_BYTES: usize = 4096;
/// A transaction of more writes is compared page by page.
const WRITES_BYTES_MAX: usize = 64 << 20;

/// The running transaction, or what came of the last.
pub struct Transaction {
    writes: *mut u64,
    len: usize,
    bytes: usize,
    /// There may have been others.
    pub unknown: bool,
    /// It is the one of a process that died, and is taken back.
    pub playback: bool,
    /// The application synced a file of it.
    pub synced: bool,
    /// Its newest write was made with a journal: refused, that takes it back.
    pub journaled: bool,
    /// A commit frame's header that is not in the WAL yet.
    pub held: Option<HeldFrame>,
    /// End of the newest commit frame of this write lock.
    pub committed_end: u64,
}

/// A commit frame that arrives.
#[derive(Clone, Copy)]
pub struct HeldFrame {
    pub offset: u64,
    pub header: [u8; 24],
    pub page_size: u64,
    /// Bytes of its page that are written.
    pub written: u64,
}

// SAFETY: the memory behind `writes` belongs to the value.
unsafe impl Send for Transaction {}

impl Transaction {
    pub const fn new() -> Self {
        Transaction {
            writes: core::ptr::null_mut(),
            len: 0,
            bytes: 0,
            unknown: false,
            playback: false,
            synced: false,
            journaled: false,
            held: None,
            committed_end: 0,
        }
    }

    /// Whether the database file was written.
    pub fn is_dirty(&self) -> bool {
        self.len > 0 || self.unknown
    }

    /// Writes to the database file, as [`write_word`]s.
    pub fn writes(&self) -> &[u64] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: the first `len` words were written.
        unsafe { core::slice::from_raw_parts(self.writes, self.len) }
    }

    /// The database file was written.
    pub fn add(&mut self, offset: u64, len: u64) {
        if self.unknown {
            return;
        }
        let Some(word) = write_word(offset, len) else {
            self.unknown = true;
            return;
        };
        if self.len * 8 == self.bytes && !self.grow() {
            self.unknown = true;
            return;
        }
        // SAFETY: there is room for one more.
        unsafe { self.writes.add(self.len).write(word) };
        self.len += 1;
    }

    fn grow(&mut self) -> bool {
        let bytes = if self.bytes == 0 { WRITES_BYTES } else { self.bytes * 2 };
        if bytes > WRITES_BYTES_MAX {
            return false;
        }
        let mapped = if self.bytes == 0 {
            sys::map(-1, bytes)
        } else {
            // SAFETY: the mapping is this transaction's, and no slice of it is in use.
            unsafe { sys::grow(self.writes.cast(), self.bytes, bytes) }
        };
        let Ok(at) = mapped else { return false };
        self.writes = at.cast();
        self.bytes = bytes;
        true
    }

    /// The transaction is over.
    pub fn clear(&mut self) {
        self.len = 0;
        self.unknown = false;
        self.playback = false;
        self.synced = false;
        self.journaled = false;
    }
}
