//! Written data on its way to the disk in small pieces. A sync of megabytes at once would hold up, for as long as the
//! disk takes for them, the syncs of the log that commits wait for.

use sqlite_file::untimed::Untimed;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Bytes of a piece: a millisecond or two of a middling disk.
pub const PIECE_BYTES: u64 = 256 << 10;
/// A large file goes in this many larger pieces, so that asking for those that are clean stays cheap.
const PIECES_MAX: u64 = 4096;

/// After an append of `len` bytes at `offset`: starts writing the pieces that have become full to the disk, and does
/// not wait for them.
///
/// # Errors
/// The disk failed, now or before.
pub fn begin_full_pieces(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let begin = |at: u64| at / PIECE_BYTES * PIECE_BYTES;
    let full = begin(offset)..begin(offset + len);
    if full.is_empty() { Ok(()) } else { sync_file_range(file, full, libc::SYNC_FILE_RANGE_WRITE) }
}

/// Writes what `file` has in `range` to the disk. Durable it is only after a sync, which then finds little to do.
///
/// # Errors
/// The disk failed, now or before: the next sync may then not tell it again.
pub fn finish(file: &File, range: Range<u64>) -> io::Result<()> {
    let all =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_file_range(file, range, all)
}

/// Writes the whole of `file` to the disk, one piece after the other.
///
/// # Errors
/// As [`finish`].
pub fn whole(file: &File) -> io::Result<()> {
    let len = Untimed::of(file)?.size;
    let piece = PIECE_BYTES.max(len.div_ceil(PIECES_MAX).next_multiple_of(4096));
    let mut at = 0;
    while at < len {
        finish(file, at..at + piece)?;
        at += piece;
    }
    Ok(())
}

fn sync_file_range(file: &File, range: Range<u64>, flags: libc::c_uint) -> io::Result<()> {
    let (offset, bytes) = (range.start as libc::off64_t, (range.end - range.start) as libc::off64_t);
    // SAFETY: the call has no pointers, and the descriptor is open as long as `file` is borrowed.
    if unsafe { libc::sync_file_range(file.as_raw_fd(), offset, bytes, flags) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        // Neither every file system nor every sandbox has it; the sync that follows does all of the work then.
        e if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::ESPIPE | libc::EPERM)) => {
            Ok(())
        }
        e => Err(e),
    }
}
