//! What can be told of an SQLite database file from the outside (<https://www.sqlite.org/fileformat2.html>, 1.3).

use ltx::Checksum;
use sqlite_file::header::{DatabaseHeader, HEADER_BYTES, HeaderError};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Pages of a database file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes in a page.
    pub page_size: u32,
    /// Pages in the file.
    pub pages: u32,
}

/// Why a file is not a whole database.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Nothing in it.
    #[error("it is empty")]
    Empty,
    /// Another kind of file, an encrypted one, or a damaged one.
    #[error("{0}")]
    Header(#[from] HeaderError),
    /// Not whole pages.
    #[error(
        "its size of {size} bytes is not a multiple of its page size of {page_size}: it is cut off or damaged"
    )]
    PartialPage {
        /// Bytes in the file.
        size: u64,
        /// Bytes in a page.
        page_size: u32,
    },
    /// Shorter than its header says.
    #[error("it has {pages} pages, but its header says {expected}: it is cut off")]
    CutOff {
        /// Pages in the file.
        pages: u64,
        /// Pages by the header.
        expected: u32,
    },
    /// More pages than SQLite can number.
    #[error("it has {0} pages: more than SQLite can have")]
    TooLarge(u64),
    /// Cannot be read.
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
}

/// Checks the header and the size of a database file.
///
/// # Errors
/// It is not a whole database.
pub fn shape(file: &File) -> Result<Shape, FileError> {
    let size = file.metadata()?.len();
    if size == 0 {
        return Err(FileError::Empty);
    }
    let mut header = [0; HEADER_BYTES];
    let len = HEADER_BYTES.min(usize::try_from(size).unwrap_or(HEADER_BYTES));
    file.read_exact_at(&mut header[..len], 0)?;
    let header = DatabaseHeader::parse(&header[..len])?;
    let page_size = header.page_size;
    if !size.is_multiple_of(u64::from(page_size)) {
        return Err(FileError::PartialPage { size, page_size });
    }
    let pages = size / u64::from(page_size);
    match header.trusted_page_count() {
        Some(expected) if pages < u64::from(expected) => return Err(FileError::CutOff { pages, expected }),
        _ => {}
    }
    // 4294967294 is SQLITE_MAX_PAGE_COUNT at its largest.
    match u32::try_from(pages) {
        Ok(pages) if pages < u32::MAX => Ok(Shape { page_size, pages }),
        _ => Err(FileError::TooLarge(pages)),
    }
}

/// Checksum of all pages, as in a position.
///
/// # Errors
/// The file cannot be read, or is shorter than `shape` says.
pub fn checksum(file: &File, shape: Shape) -> io::Result<Checksum> {
    // Many pages per read; page sizes are powers of two up to 64 KiB.
    let mut buffer = vec![0; 1 << 20];
    let per_read = buffer.len() / shape.page_size as usize;
    let lock_page = ltx::lock_page(shape.page_size);
    let mut sum = Checksum::EMPTY;
    let mut next = 0;
    while next < shape.pages {
        let pages = per_read.min((shape.pages - next) as usize);
        let bytes = &mut buffer[..pages * shape.page_size as usize];
        file.read_exact_at(bytes, u64::from(next) * u64::from(shape.page_size))?;
        for (page, pgno) in bytes.chunks_exact(shape.page_size as usize).zip(next + 1..) {
            if pgno != lock_page {
                sum = sum.xor(ltx::page_checksum(pgno, page));
            }
        }
        next += pages as u32;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn whole_databases_of_every_page_size_are_accepted_and_summed() {
        for page_size in [512, 1024, 4096, 65536] {
            let bytes = fake::database(page_size, 40);
            let shape = shape(&file(&bytes)).unwrap();
            assert_eq!(shape, Shape { page_size, pages: 40 });
            assert_eq!(checksum(&file(&bytes), shape).unwrap(), fake::checksum(&bytes, page_size));
        }
    }

    #[test]
    fn a_database_that_sqlite_wrote_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let connection = rusqlite::Connection::open(&path).unwrap();
        connection
            .execute_batch("PRAGMA page_size=1024; CREATE TABLE t(x); INSERT INTO t VALUES (1);")
            .unwrap();
        assert_eq!(shape(&File::open(&path).unwrap()).unwrap(), Shape { page_size: 1024, pages: 2 });
    }

    #[test]
    fn everything_else_is_named() {
        let good = fake::database(512, 4);
        let error = |bytes: &[u8]| shape(&file(bytes)).unwrap_err().to_string();
        assert!(error(b"").contains("empty"));
        assert!(error(b"hello").contains("this has 5"));
        assert!(error(&vec![0; 4096]).contains("not an SQLite database"));
        assert!(error(&good[..99]).contains("this has 99"));
        assert!(error(&good[..1000]).contains("not a multiple"));
        assert!(error(&good[..1536]).contains("it has 3 pages, but its header says 4"));
        let mut bad = good.clone();
        bad[16..18].copy_from_slice(&[2, 1]);
        assert!(error(&bad).contains("0x0201 in the database header is not a page size"));
    }

    #[test]
    fn a_size_in_the_header_that_an_old_writer_left_is_not_believed() {
        let mut bytes = fake::database(512, 4);
        bytes[28..32].copy_from_slice(&9u32.to_be_bytes());
        bytes[24..28].copy_from_slice(&8u32.to_be_bytes());
        assert_eq!(shape(&file(&bytes)).unwrap().pages, 4);
    }
}
