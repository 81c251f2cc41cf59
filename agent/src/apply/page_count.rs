//! The number of pages, stated in a wal-index that does not have it.

use super::connection::{self, WalConnection};
use super::files::Patience;
use super::{Applier, ApplyError};
use sqlite_file::header::{DatabaseHeader, HEADER_BYTES};
use sqlite_file::locks::{LockKind, WAL_READERS, wal_read};
use sqlite_file::untimed::Untimed;
use sqlite_file::wal_index::IndexHeader;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// A reading transaction is short; between two there is a moment for this.
const TRIES: u32 = 8;
const BETWEEN_TRIES: Duration = Duration::from_micros(50);

/// Whether SQLite asks for the file's size at each read: after a recovery that found no frames the wal-index does not say
/// how many pages there are. From the first commit on it does, also when the WAL begins anew.
pub fn is_page_count_missing(header: &IndexHeader) -> bool {
    header.max_frame == 0 && header.page_count == 0
}

impl Applier {
    /// Where the wal-index does not state the number of pages, states the one that SQLite takes from the file's size.
    /// Changes nothing for a reader but that it need not ask. Waits for nobody; says whether it did.
    ///
    /// `connected` is called once this is a connection like others, or gives up: whoever causes this should have the
    /// database open until then. The first connection to a wal-index begins it anew, and others cannot open it meanwhile.
    pub fn state_page_count(&mut self, connected: impl FnOnce()) -> Result<bool, ApplyError> {
        let mut opened = None;
        let found = self.connect_to_state(&mut opened);
        connected();
        let Some(connection) = found? else { return Ok(false) };
        for _ in 0..TRIES {
            if connection.try_to_state_page_count()? {
                return Ok(true);
            }
            std::thread::sleep(BETWEEN_TRIES);
        }
        Ok(false)
    }

    /// The applier's own connection, or one that is put into `opened`.
    fn connect_to_state<'a>(
        &'a mut self,
        opened: &'a mut Option<WalConnection>,
    ) -> Result<Option<&'a mut WalConnection>, ApplyError> {
        let files = Arc::clone(&self.files);
        let is_current = self.connection.as_ref().map_or(Ok(false), WalConnection::is_current)?;
        if is_current {
            return Ok(self.connection.as_mut());
        }
        if connection::exists(&files, &files.shm)? {
            *opened = WalConnection::open(&files, &Patience::new(Duration::ZERO))?;
        }
        Ok(opened.as_mut())
    }
}

impl WalConnection {
    fn try_to_state_page_count(&mut self) -> Result<bool, ApplyError> {
        // First the marks of all readers: who reads keeps what it compares with when it begins to write, and who begins to
        // read tries again. A writer reads first, so nobody meets the second lock.
        let Some(_database_readers) = self.try_lock(LockKind::Write, wal_read(0))? else { return Ok(false) };
        let Some(_readers) = self.try_lock(LockKind::Write, WAL_READERS)? else { return Ok(false) };
        let Some(_writer) = self.try_write_lock()? else { return Ok(false) };
        // A broken one is for those who recover.
        let Some(header) = self.index.read_header() else { return Ok(false) };
        if !is_page_count_missing(&header) {
            return Ok(false);
        }
        let files = &*self.files;
        let mut start = [0; HEADER_BYTES];
        self.database.read_exact_at(&mut start, 0).map_err(files.io("read", &files.database))?;
        let Ok(database) = DatabaseHeader::parse(&start) else { return Ok(false) };
        let bytes = Untimed::of(&self.database).map_err(files.io("inspect", &files.database))?.size;
        // Rounded up, as SQLite's pager does; what page 1 says of the size is compared with it by the reader.
        let Ok(page_count) = u32::try_from(bytes.div_ceil(u64::from(database.page_size))) else {
            return Ok(false);
        };
        self.index.write_header(&IndexHeader { page_count, ..header });
        Ok(true)
    }
}
