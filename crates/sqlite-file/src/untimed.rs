//! What `stat` says of a file, without its times.
//!
//! To ask for a file's times is not free: since Linux 6.13 (multigrain timestamps, Documentation/filesystems/multigrain-ts.rst)
//! the next write to that file gets a time of its own instead of that of the last tick, and since times never go
//! back from one file to another, so does the next write to every other file. Each of them dirties its inode, which a
//! file system without a journal writes with the next `fdatasync` of the file, even where only blocks were overwritten:
//! measured on ext4, 100 us more for each sync of a commit log beside which somebody asked for a file's times.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Attributes of a file that it costs nothing to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Untimed {
    /// Device and inode number.
    pub inode: (u64, u64),
    /// Names it has; 0: it was removed.
    pub links: u32,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
}

impl Untimed {
    /// Attributes of an open file.
    pub fn of(file: &File) -> io::Result<Self> {
        statx(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
    }

    /// Attributes of the file at this path; links are followed.
    pub fn at(path: &Path) -> io::Result<Self> {
        statx(libc::AT_FDCWD, &CString::new(path.as_os_str().as_bytes())?, 0)
    }
}

fn statx(directory: RawFd, path: &std::ffi::CStr, flags: i32) -> io::Result<Untimed> {
    let wanted = libc::STATX_BASIC_STATS & !(libc::STATX_ATIME | libc::STATX_MTIME | libc::STATX_CTIME);
    // SAFETY: all zeros is a valid `statx`, which is plain integers.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero byte, and `found` is writable for a `statx`, both until the call returns.
    let result = unsafe { libc::statx(directory, path.as_ptr(), flags, wanted, &mut found) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Untimed {
        inode: (libc::makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino),
        links: found.stx_nlink,
        mode: u32::from(found.stx_mode),
        uid: found.stx_uid,
        gid: found.stx_gid,
        size: found.stx_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn it_is_what_stat_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1; 5000]).unwrap();
        let stat = file.path().metadata().unwrap();
        let expected = Untimed {
            inode: (stat.dev(), stat.ino()),
            links: 1,
            mode: stat.mode(),
            uid: stat.uid(),
            gid: stat.gid(),
            size: 5000,
        };
        assert_eq!(Untimed::of(file.as_file()).unwrap(), expected);
        assert_eq!(Untimed::at(file.path()).unwrap(), expected);

        let (file, path) = file.into_parts();
        path.close().unwrap();
        assert_eq!(Untimed::of(&file).unwrap().links, 0);
        let gone = Untimed::at(Path::new("/nothing/here")).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }
}
