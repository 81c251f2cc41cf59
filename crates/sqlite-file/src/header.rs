//! The database header: the first 100 bytes of page 1 (fileformat2.html section 1.3).

use crate::be32;

/// First 16 bytes of every database that is not empty.
pub const HEADER_MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Length of the database header in bytes.
pub const HEADER_BYTES: usize = 100;

/// Smallest page in bytes.
pub const PAGE_SIZE_MIN: u32 = 512;

/// Largest page in bytes.
pub const PAGE_SIZE_MAX: u32 = 65536;

/// Whether `size` is a page size that SQLite accepts.
pub fn is_page_size(size: u32) -> bool {
    (PAGE_SIZE_MIN..=PAGE_SIZE_MAX).contains(&size) && size.is_power_of_two()
}

/// Number of the page that holds the lock bytes (offset 2^30). SQLite never reads or writes it.
///
/// `page_size` must be a valid page size.
pub fn lock_page(page_size: u32) -> u32 {
    crate::locks::PENDING.start as u32 / page_size + 1
}

/// The fields of the database header that replication looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatabaseHeader {
    /// Bytes in a page (offset 16; the stored value 1 means 65536).
    pub page_size: u32,
    /// Format version for writing (offset 18): 1 rollback journal, 2 WAL.
    pub write_version: u8,
    /// Format version for reading (offset 19): 1 rollback journal, 2 WAL.
    pub read_version: u8,
    /// Bytes at the end of each page that SQLite leaves alone (offset 20).
    pub reserved_bytes: u8,
    /// Changed by a transaction in rollback mode (offset 24).
    pub change_counter: u32,
    /// Size of the database in pages as the header has it (offset 28); see [`DatabaseHeader::page_count`].
    pub stored_page_count: u32,
    /// First trunk page of the free list, 0 if there is none (offset 32).
    pub freelist_trunk: u32,
    /// Number of free pages (offset 36).
    pub freelist_count: u32,
    /// Change counter at the time `stored_page_count` was written (offset 92).
    pub version_valid_for: u32,
}

/// Why bytes are not the header of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Fewer than 100 bytes.
    #[error("a database header has 100 bytes, this has {0}")]
    Short(usize),
    /// The first 16 bytes are something else.
    #[error("not an SQLite database: the first 16 bytes are not \"SQLite format 3\"")]
    Magic,
    /// Not a power of two from 512 to 65536.
    #[error("page size field {0:#06x} in the database header is not a page size")]
    PageSize(u16),
}

impl DatabaseHeader {
    /// Reads the header from the first bytes of page 1.
    pub fn parse(page1: &[u8]) -> Result<Self, HeaderError> {
        if page1.len() < HEADER_BYTES {
            return Err(HeaderError::Short(page1.len()));
        }
        if !page1.starts_with(HEADER_MAGIC) {
            return Err(HeaderError::Magic);
        }
        let field = u16::from_be_bytes([page1[16], page1[17]]);
        let page_size = if field == 1 { PAGE_SIZE_MAX } else { u32::from(field) };
        if !is_page_size(page_size) {
            return Err(HeaderError::PageSize(field));
        }
        Ok(DatabaseHeader {
            page_size,
            write_version: page1[18],
            read_version: page1[19],
            reserved_bytes: page1[20],
            change_counter: be32(page1, 24),
            stored_page_count: be32(page1, 28),
            freelist_trunk: be32(page1, 32),
            freelist_count: be32(page1, 36),
            version_valid_for: be32(page1, 92),
        })
    }

    /// Whether SQLite opens the database in WAL mode.
    pub fn is_wal(&self) -> bool {
        self.read_version == 2
    }

    /// Size in pages if the header can be trusted: a writer older than 3.7.0 changes the counter but not the size.
    pub fn trusted_page_count(&self) -> Option<u32> {
        (self.stored_page_count > 0 && self.change_counter == self.version_valid_for)
            .then_some(self.stored_page_count)
    }

    /// Size in pages as SQLite takes it: the header's if trusted, otherwise by the size of the file.
    pub fn page_count(&self, file_bytes: u64) -> u32 {
        self.trusted_page_count().unwrap_or_else(|| {
            u32::try_from(file_bytes.div_ceil(u64::from(self.page_size))).unwrap_or(u32::MAX)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    #[test]
    fn agrees_with_sqlite_for_every_page_size_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        for shift in 9..=16 {
            for mode in ["delete", "wal"] {
                let page_size = 1u32 << shift;
                let path = dir.path().join(format!("{page_size}-{mode}.db"));
                let db = Connection::open(&path).unwrap();
                db.pragma_update(None, "page_size", page_size).unwrap();
                db.pragma_update(None, "journal_mode", mode).unwrap();
                db.execute_batch(
                    "create table t(a);
                     with recursive n(i) as (select 1 union all select i+1 from n where i<30)
                     insert into t select randomblob(3000) from n;",
                )
                .unwrap();
                db.execute_batch("delete from t where rowid > 10; pragma wal_checkpoint(truncate);").unwrap();
                let bytes = std::fs::read(&path).unwrap();
                let header = DatabaseHeader::parse(&bytes).unwrap();
                let pragma = |name: &str| -> u32 {
                    db.query_row(&format!("pragma {name}"), [], |r| r.get(0)).unwrap()
                };
                assert_eq!(header.page_size, page_size);
                assert_eq!(header.is_wal(), mode == "wal");
                assert_eq!(header.trusted_page_count(), Some(pragma("page_count")));
                assert_eq!(header.page_count(0), bytes.len() as u32 / page_size);
                assert_eq!(header.freelist_count, pragma("freelist_count"));
                assert_eq!(header.freelist_trunk == 0, header.freelist_count == 0);
            }
        }
    }

    #[test]
    fn an_untrusted_size_gives_way_to_the_file_size() {
        let mut page = vec![0u8; 4096];
        page[..16].copy_from_slice(HEADER_MAGIC);
        page[16] = 0x10;
        page[27] = 7;
        page[31] = 99;
        page[95] = 6;
        let header = DatabaseHeader::parse(&page).unwrap();
        assert_eq!(header.trusted_page_count(), None);
        assert_eq!(header.page_count(3 * 4096), 3);
        page[95] = 7;
        assert_eq!(DatabaseHeader::parse(&page).unwrap().page_count(3 * 4096), 99);
    }

    #[test]
    fn what_is_no_header_is_refused() {
        assert_eq!(DatabaseHeader::parse(b"SQLite"), Err(HeaderError::Short(6)));
        assert_eq!(DatabaseHeader::parse(&[0; 100]), Err(HeaderError::Magic));
        let mut page = [0u8; 100];
        page[..16].copy_from_slice(HEADER_MAGIC);
        for field in [0u16, 2, 256, 511, 513, 3000, 65535] {
            page[16..18].copy_from_slice(&field.to_be_bytes());
            assert_eq!(DatabaseHeader::parse(&page), Err(HeaderError::PageSize(field)));
        }
    }

    #[test]
    fn lock_pages_are_where_the_format_says() {
        assert_eq!([512, 1024, 4096, 65536].map(lock_page), [2_097_153, 1_048_577, 262_145, 16_385]);
    }
}
