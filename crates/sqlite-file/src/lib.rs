//! SQLite's files as SQLite leaves them on disk: database header, rollback journal, WAL, wal-index and lock bytes.
//!
//! Formats are those of <https://www.sqlite.org/fileformat2.html> and <https://www.sqlite.org/walformat.html>.
//! Nothing here decides policy: whoever uses a module holds the locks that its functions name.

pub mod header;
pub mod journal;
pub mod locks;
pub mod untimed;
pub mod wal;
pub mod wal_index;

/// Big-endian `u32` at `offset`; `bytes` is known to be long enough.
fn be32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes([bytes[offset], bytes[offset + 1], bytes[offset + 2], bytes[offset + 3]])
}

/// Fills as much of `buf` as the file has at `offset`; returns how many bytes that were.
fn read_up_to(file: &std::fs::File, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
    use std::os::unix::fs::FileExt;
    let mut filled = 0;
    while filled < buf.len() {
        match file.read_at(&mut buf[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
