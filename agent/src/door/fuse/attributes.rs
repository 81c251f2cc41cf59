//! What `stat` tells of a file, and what may be set of it beside its size.

use super::inodes::{SPECIAL_BIT, Special};
use fuse_session::fuse::*;
use std::fs::Metadata;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) fn attr_of(number: u64, m: &Metadata) -> FileAttr {
    let kind = FileType::from_std(m.file_type()).unwrap_or(FileType::RegularFile);
    FileAttr {
        ino: INodeNo(number),
        size: m.size(),
        blocks: m.blocks(),
        atime: time(m.atime(), m.atime_nsec()),
        mtime: time(m.mtime(), m.mtime_nsec()),
        ctime: time(m.ctime(), m.ctime_nsec()),
        crtime: UNIX_EPOCH,
        kind,
        perm: (m.mode() & 0o7777) as u16,
        nlink: m.nlink() as u32,
        uid: m.uid(),
        gid: m.gid(),
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

pub(super) fn special_attr(number: u64, special: &Special, size: u64) -> FileAttr {
    let changed = match special {
        Special::Position(db) | Special::Lock(db) => time(db.state().last_change_ms / 1000, 0),
        Special::Primary | Special::Lag => SystemTime::now(),
    };
    // Who may write a database may have its lock.
    let like = match special {
        Special::Lock(db) => db.paths().database.metadata().ok(),
        _ => None,
    };
    let (perm, uid, gid) =
        like.map_or((0o444, 0, 0), |like| ((like.mode() & 0o666) as u16, like.uid(), like.gid()));
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: 1,
        atime: changed,
        mtime: changed,
        ctime: changed,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm,
        nlink: 1,
        uid,
        gid,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

/// Inode number of a special file.
pub(super) fn special_number(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    SPECIAL_BIT | (hasher.finish() & (SPECIAL_BIT - 1))
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanos = Duration::from_nanos(nanoseconds.unsigned_abs());
    match u64::try_from(seconds) {
        Ok(s) => UNIX_EPOCH + Duration::from_secs(s) + nanos,
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + nanos,
    }
}

pub(super) fn set_ownership(
    path: &Path,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
) -> io::Result<()> {
    if let Some(mode) = mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o7777))?;
    }
    if uid.is_some() || gid.is_some() {
        std::os::unix::fs::chown(path, uid, gid)?;
    }
    Ok(())
}

pub(super) fn set_times(path: &Path, atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>) -> io::Result<()> {
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;
    if atime.is_none() && mtime.is_none() {
        return Ok(());
    }
    let spec = |t: Option<TimeOrNow>| match t {
        None => TimeSpec::UTIME_OMIT,
        Some(TimeOrNow::Now) => TimeSpec::UTIME_NOW,
        Some(TimeOrNow::SpecificTime(t)) => {
            TimeSpec::from_duration(t.duration_since(UNIX_EPOCH).unwrap_or_default())
        }
    };
    let (atime, mtime) = (spec(atime), spec(mtime));
    utimensat(nix::fcntl::AT_FDCWD, path, &atime, &mtime, UtimensatFlags::NoFollowSymlink)
        .map_err(io::Error::from)
}
