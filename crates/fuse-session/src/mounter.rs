//! What needs CAP_SYS_ADMIN and the host's mount namespace: to open the device, to mount, to take a mount away, and to
//! register files for passthrough. A server that may not do it asks `litefs-mount` for it.

use crate::helper::{Answer, Call, Helper};
use crate::mount::{self, MountError};
use nix::libc;
use nix::mount::{MntFlags, umount2};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `FUSE_DEV_IOC_BACKING_OPEN` (linux/fuse.h): `_IOW(229, 1, struct fuse_backing_map)`.
const BACKING_OPEN: libc::Ioctl = nix::request_code_write!(229, 1, size_of::<BackingMap>()) as libc::Ioctl;
/// `FUSE_DEV_IOC_BACKING_CLOSE`: `_IOW(229, 2, uint32_t)`.
const BACKING_CLOSE: libc::Ioctl = nix::request_code_write!(229, 2, size_of::<u32>()) as libc::Ioctl;

/// `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// Who mounts.
#[derive(Debug, Clone)]
pub struct Mounter(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Own,
    Helper(Arc<Helper>),
}

impl Mounter {
    /// This process does it itself.
    pub fn own() -> Mounter {
        Mounter(Kind::Own)
    }

    /// The helper that listens at this socket does it.
    pub fn helper(socket: PathBuf) -> Mounter {
        Mounter(Kind::Helper(Arc::new(Helper::at(socket))))
    }

    /// For a process that was forked: it shares no connection to the helper.
    pub(crate) fn for_child(&self) -> Mounter {
        match &self.0 {
            Kind::Own => Mounter::own(),
            Kind::Helper(helper) => Mounter::helper(helper.socket().to_owned()),
        }
    }

    /// Opens the FUSE device.
    ///
    /// # Errors
    /// There is none here ([`MountError::Device`]), or the helper does not answer.
    pub fn open_device(&self) -> Result<OwnedFd, MountError> {
        let Kind::Helper(helper) = &self.0 else {
            return open_device().map_err(MountError::Device);
        };
        match self.ask(helper, &Call::OpenDevice, &[])? {
            Answer { result: Ok(_), fd: Some(device) } => Ok(device),
            Answer { result: Ok(_), fd: None } => {
                Err(MountError::Device(io::Error::other("the helper gave no descriptor")))
            }
            Answer { result: Err(error), .. } => Err(MountError::Device(error)),
        }
    }

    /// Mounts the connection behind `device` at `dir`; the kernel checks permissions, for all users.
    pub(crate) fn mount(&self, device: &OwnedFd, dir: &Path, source: &str) -> Result<(), MountError> {
        let failed = |source| MountError::Mount { dir: dir.to_owned(), source };
        let Kind::Helper(helper) = &self.0 else {
            return mount::mount(device.as_fd(), dir, source).map_err(failed);
        };
        let call = Call::Mount { dir: dir.to_owned(), source: source.to_owned() };
        self.ask(helper, &call, &[device.as_fd()])?.result.map_err(failed)?;
        // It mounts in the host's namespace, which has to pass mounts on to this process.
        if mount::is_ours(dir)? {
            return Ok(());
        }
        let _ = self.unmount(dir);
        Err(MountError::Invisible { dir: dir.to_owned() })
    }

    /// Unmounts `dir`. A busy mount is detached lazily and `true` is returned.
    ///
    /// # Errors
    /// umount(2) fails, or the helper does not answer.
    pub fn unmount(&self, dir: &Path) -> Result<bool, MountError> {
        let failed = |source| MountError::Unmount { dir: dir.to_owned(), source };
        let Kind::Helper(helper) = &self.0 else {
            return mount::unmount(dir).map_err(failed);
        };
        let busy = self.ask(helper, &Call::Unmount { dir: dir.to_owned() }, &[])?.result;
        busy.map(|busy| busy != 0).map_err(failed)
    }

    /// Ends the connection that is mounted at `dir`: whoever waits for an answer gets an error. The mount stays.
    pub(crate) fn abort(&self, dir: &Path) {
        match &self.0 {
            Kind::Own => abort(dir),
            // Nobody is left to be told; without the helper the connection ends when its last descriptor is closed.
            Kind::Helper(helper) => drop(helper.ask(&Call::Abort { dir: dir.to_owned() }, &[])),
        }
    }

    /// Registers a file with the connection; the kernel's number of it.
    pub(crate) fn register(&self, device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<u32> {
        match &self.0 {
            Kind::Own => register(device, file),
            Kind::Helper(helper) => match helper.with_own_capability(|| register(device, file)) {
                Some(done) => done,
                None => helper.ask(&Call::Register, &[device, file])?.result,
            },
        }
    }

    /// Ends a registration.
    pub(crate) fn unregister(&self, device: BorrowedFd<'_>, id: u32) -> io::Result<()> {
        match &self.0 {
            Kind::Own => unregister(device, id),
            Kind::Helper(helper) => match helper.with_own_capability(|| unregister(device, id)) {
                Some(done) => done,
                None => helper.ask(&Call::Unregister { id }, &[device])?.result.map(drop),
            },
        }
    }

    /// Whether a process has loaded the preload library. Of other users' processes CAP_SYS_PTRACE may know.
    ///
    /// # Errors
    /// It is gone, or that may not be known here.
    pub fn has_library(&self, pid: u32) -> io::Result<bool> {
        match &self.0 {
            Kind::Own => has_library(pid),
            Kind::Helper(helper) => helper.ask(&Call::HasLibrary { pid }, &[])?.result.map(|has| has != 0),
        }
    }

    fn ask(&self, helper: &Helper, call: &Call, fds: &[BorrowedFd<'_>]) -> Result<Answer, MountError> {
        helper
            .ask(call, fds)
            .map_err(|source| MountError::Helper { socket: helper.socket().to_owned(), source })
    }
}

/// Opens the FUSE device.
pub(crate) fn open_device() -> io::Result<OwnedFd> {
    std::fs::File::options().read(true).write(true).open("/dev/fuse").map(OwnedFd::from)
}

/// MNT_FORCE ends the connection. The mount must stay: applications get an error from it, while in a bare directory they
/// would find nothing and make their databases anew. So it is held, which asks its server nothing.
pub(crate) fn abort(dir: &Path) {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let held = open(dir, flags, nix::sys::stat::Mode::empty());
    let _ = umount2(dir, MntFlags::MNT_FORCE | MntFlags::UMOUNT_NOFOLLOW);
    drop(held);
}

pub(crate) fn has_library(pid: u32) -> io::Result<bool> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/maps"))?.contains("liblitefs"))
}

pub(crate) fn register(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<u32> {
    let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the ioctl reads one fuse_backing_map at the address given.
    let id = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_OPEN, &raw const map) };
    u32::try_from(id).map_err(|_| io::Error::last_os_error())
}

pub(crate) fn unregister(device: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    // SAFETY: the ioctl reads one u32 at the address given.
    match unsafe { libc::ioctl(device.as_raw_fd(), BACKING_CLOSE, &raw const id) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
