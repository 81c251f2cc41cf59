//! The first of a journal's two syncs is left to the second.
//!
//! At `synchronous=FULL` and above SQLite syncs a journal twice before it touches the database: the records, with the
//! directory if the journal is new, then the header that counts them. The order keeps records that never reached the disk
//! from being played back. Recovery does not need it: after a power failure it plays back only pages that
//! have the checksum that the log knows (decision 0016). So the sync of a journal whose newest header counts no record
//! is answered at once, with the sync of the directory that the same thread asks for next, and
//! the next sync, after which SQLite writes to the database, makes all of it durable.

use crate::database::{Database, State};
use parking_lot::Mutex;
use sqlite_file::header::is_page_size;
use sqlite_file::journal::JOURNAL_MAGIC;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Bytes of a segment header that say whether it counts: magic and number of records, zeros before the first sync.
const COUNT_BYTES: usize = 12;
/// Headers are at multiples of this, records never are (SQLite's file format, section 3).
const SECTOR_BYTES_MIN: u64 = 512;

/// Notes a write to a running journal: whether its newest header counts its records.
pub fn note_written(st: &mut State, offset: u64, data: &[u8]) {
    if !offset.is_multiple_of(SECTOR_BYTES_MIN) || data.len() < COUNT_BYTES {
        return;
    }
    // The kernel may cut a record at any page: what has zeros in front is a header if it goes on like one.
    let begun = data[..COUNT_BYTES] == [0; COUNT_BYTES]
        && data
            .get(24..28)
            .is_some_and(|size| is_page_size(u32::from_be_bytes([size[0], size[1], size[2], size[3]])));
    if begun || data[..8] == JOURNAL_MAGIC {
        st.rollback.uncounted = begun;
    }
}

/// Threads that have just been spared a journal's sync, and the database it belongs to.
#[derive(Debug, Default)]
pub struct SparedSyncs(Mutex<HashMap<u32, Arc<Database>>>);

impl SparedSyncs {
    /// Whether the sync of the journal of `db`, whose state is `st`, is left to the next one. `thread` asks for it.
    pub fn spare(&self, db: &Arc<Database>, st: &mut State, thread: u32) -> bool {
        if st.rollback.uncounted {
            self.0.lock().insert(thread, db.clone());
        } else {
            self.0.lock().remove(&thread);
        }
        st.rollback.uncounted
    }

    /// Whether the sync of a directory is that of the journal whose sync the thread was just spared.
    pub fn spare_directory(&self, directory: &Path, thread: u32) -> bool {
        let Some(db) = self.0.lock().remove(&thread) else { return false };
        let mut st = db.state();
        let spared = st.rollback.uncounted && db.paths().journal.parent() == Some(directory);
        st.rollback.directory_owed |= spared;
        spared
    }
}
