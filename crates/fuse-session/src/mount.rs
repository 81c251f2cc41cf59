//! mount(2) and umount(2) for FUSE, and what is mounted at a directory now.

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// Type shown in the mount table; unmounting by this crate touches only mounts of this type.
pub const FS_TYPE: &str = "fuse.litefs";

/// Why the file system could not be mounted or served.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No FUSE on this host.
    #[error("cannot open /dev/fuse: {0}; load the fuse module, or give this host FUSE")]
    Device(#[source] io::Error),
    /// mount(2) failed.
    #[error("cannot mount at {dir}: {source}; mounting needs root (CAP_SYS_ADMIN) and an existing directory")]
    Mount {
        /// Mount point.
        dir: PathBuf,
        /// From mount(2).
        source: io::Error,
    },
    /// The helper that mounts cannot be asked.
    #[error("cannot ask litefs-mount at {socket}: {source}; is litefs-mount.socket active?")]
    Helper {
        /// Its socket.
        socket: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// The mount of the helper does not reach this process.
    #[error(
        "the mount at {dir} does not reach this service: the root of this host does not pass mounts on; run `mount \
         --make-rshared /` before the service starts, as systemd does outside of containers"
    )]
    Invisible {
        /// Mount point.
        dir: PathBuf,
    },
    /// umount(2) failed.
    #[error("cannot unmount {dir}: {source}")]
    Unmount {
        /// Mount point.
        dir: PathBuf,
        /// From umount2(2).
        source: io::Error,
    },
    /// The kernel and this process could not agree on the protocol.
    #[error("FUSE handshake for {dir} failed: {source}")]
    Handshake {
        /// Mount point.
        dir: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// Serving ended with an error.
    #[error("serving {dir} failed: {source}")]
    Serve {
        /// Mount point.
        dir: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// The table of open files cannot be made, or is not one of this version.
    #[error("the table of open files: {0}")]
    Table(#[source] io::Error),
    /// The mount table could not be read.
    #[error("cannot read /proc/self/mountinfo: {0}")]
    MountTable(#[source] io::Error),
}

/// What is mounted at a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountState {
    /// Nothing.
    Free,
    /// Our file system, served by a living process.
    Served,
    /// Our file system, left behind by a server that died: every access gives ENOTCONN.
    Stale,
    /// Something else; its type.
    Other(String),
}

/// Mounts the connection behind `device` at `dir`; the kernel checks permissions, for all users.
pub(crate) fn mount(device: BorrowedFd<'_>, dir: &Path, source: &str) -> io::Result<()> {
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    Ok(nix::mount::mount(Some(source), dir, Some(FS_TYPE), flags, Some(options.as_str()))?)
}

/// Unmounts `dir`. A busy mount is detached lazily and `true` is returned.
pub(crate) fn unmount(dir: &Path) -> io::Result<bool> {
    match nix::mount::umount2(dir, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(false),
        // Not mounted any more: somebody else took it away.
        Err(Errno::EINVAL) => Ok(false),
        Err(Errno::EBUSY) => {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            nix::mount::umount2(dir, flags)?;
            Ok(true)
        }
        Err(e) => Err(e.into()),
    }
}

/// Looks up what is mounted at `dir` (an absolute path, as the kernel spells it).
pub fn mount_state(dir: &Path) -> Result<MountState, MountError> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(MountError::MountTable)?;
    let Some(fs_type) = top_mount_type(&table, dir) else { return Ok(MountState::Free) };
    if fs_type != FS_TYPE {
        return Ok(MountState::Other(fs_type));
    }
    // Attributes may come from the kernel's cache; statfs asks the server.
    match nix::sys::statvfs::statvfs(dir) {
        Err(Errno::ENOTCONN | Errno::ECONNABORTED) => Ok(MountState::Stale),
        _ => Ok(MountState::Served),
    }
}

/// Whether our file system is mounted at `dir`. Does not ask its server.
pub(crate) fn is_ours(dir: &Path) -> Result<bool, MountError> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(MountError::MountTable)?;
    Ok(top_mount_type(&table, dir).as_deref() == Some(FS_TYPE))
}

/// Type of the last mount at `dir` in a mountinfo table (proc(5)): later lines lie over earlier ones.
fn top_mount_type(table: &str, dir: &Path) -> Option<String> {
    table
        .lines()
        .filter_map(|line| {
            let (mount, rest) = line.split_once(" - ")?;
            let point = unescape_octal(mount.split(' ').nth(4)?);
            (Path::new(&point) == dir).then(|| rest.split(' ').next().unwrap_or_default().to_owned())
        })
        .next_back()
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape_octal(text: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"].iter().fold(text.to_owned(), |t, pair| {
        let (code, plain) = pair.split_at(4);
        t.replace(code, plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_mount_counts_and_escapes_are_undone() {
        let table = "22 1 0:20 / /srv/a\\040b rw - ext4 /dev/vda rw\n\
                     23 1 0:21 / /srv/a\\040b rw - fuse.litefs db rw,user_id=0\n\
                     24 1 0:22 / /srv rw shared:1 - tmpfs tmpfs rw\n";
        assert_eq!(top_mount_type(table, Path::new("/srv/a b")).as_deref(), Some(FS_TYPE));
        assert_eq!(top_mount_type(table, Path::new("/srv")).as_deref(), Some("tmpfs"));
        assert_eq!(top_mount_type(table, Path::new("/srv/c")), None);
    }

    #[test]
    fn an_ordinary_directory_is_free() {
        let dir = std::env::temp_dir().join("litefs-nothing-is-mounted-here");
        assert_eq!(mount_state(&dir).unwrap(), MountState::Free);
    }
}
