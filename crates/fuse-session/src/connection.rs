//! A FUSE connection and what must outlive its server: the `/dev/fuse` descriptor and the table of open handles.
//!
//! fuser begins every session with the handshake, which the kernel does once for a connection. So fuser never reads it from
//! the kernel: it gets one end of a socket pair, the kernel's INIT request (or the one that was kept) is put into the other,
//! and the descriptor of the device then takes the socket's place.

use crate::handles::HandleTable;
use crate::mount::MountError;
use crate::mounter::Mounter;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// `FUSE_NOTIFY_RESEND` (linux/fuse.h, protocol 7.40): the kernel queues again what was read and not answered.
const NOTIFY_RESEND: i32 = 7;
/// Set in the number of a request that is sent again.
pub const RESENT: u64 = 1 << 63;
/// `FUSE_HAS_RESEND`, bit 39 of INIT's flags: bit 7 of `flags2` (offset 16 in the body, which follows 40 header bytes).
const HAS_RESEND: u32 = 1 << 7;
const INIT_FLAGS2_AT: usize = 40 + 16;
/// Room for an INIT request; the kernel wants at least 8 KiB.
const INIT_READ_BYTES: usize = 64 * 1024;

/// A connection to the kernel, mounted or not yet.
#[derive(Debug)]
pub struct Connection {
    pub(crate) device: Arc<OwnedFd>,
    pub(crate) mounter: Mounter,
    /// Open handles.
    pub handles: Arc<HandleTable>,
    taken_over: bool,
}

impl Connection {
    /// A new connection. It becomes one for the kernel when it is mounted.
    pub fn new(mounter: &Mounter) -> Result<Connection, MountError> {
        let handles = HandleTable::new().map_err(MountError::Table)?;
        let device = Arc::new(mounter.open_device()?);
        Ok(Connection { device, mounter: mounter.clone(), handles: Arc::new(handles), taken_over: false })
    }

    /// The connection of another process, which is mounted already.
    pub fn take_over(device: OwnedFd, table: OwnedFd, mounter: &Mounter) -> Result<Connection, MountError> {
        let handles = HandleTable::open(table).map_err(MountError::Table)?;
        if !handles.is_resumable() {
            return Err(MountError::Table(io::Error::other("the kernel does not send requests again")));
        }
        let mut state = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        poll(&mut state, PollTimeout::ZERO).map_err(|e| MountError::Device(e.into()))?;
        if state[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)) {
            return Err(MountError::Table(io::Error::other("its connection was aborted")));
        }
        // fuser takes "again" for a reason to try at once.
        set_blocking(&device, true).map_err(MountError::Device)?;
        let (device, mounter) = (Arc::new(device), mounter.clone());
        Ok(Connection { device, mounter, handles: Arc::new(handles), taken_over: true })
    }

    /// Who mounts it.
    pub fn mounter(&self) -> &Mounter {
        &self.mounter
    }

    /// Whether it came from another process.
    pub fn is_taken_over(&self) -> bool {
        self.taken_over
    }

    /// Whether another process can go on with it: the kernel sends again what was not answered. Known once it is mounted.
    pub fn is_resumable(&self) -> bool {
        self.handles.is_resumable()
    }

    /// The descriptors that another process needs to go on: the device and the table.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.device.as_fd(), self.handles.as_fd()]
    }

    /// The INIT request: from the kernel, or as it was kept.
    pub(crate) fn init_request(&self, dir: &Path) -> Result<Vec<u8>, MountError> {
        let handshake = |source| MountError::Handshake { dir: dir.to_owned(), source };
        if self.taken_over {
            return self.handles.init().map_err(handshake);
        }
        let mut request = vec![0; INIT_READ_BYTES];
        let len = loop {
            match nix::unistd::read(&self.device, &mut request) {
                Err(nix::errno::Errno::EINTR) => {}
                other => break other.map_err(|e| handshake(e.into()))?,
            }
        };
        request.truncate(len);
        let flags2 = request.get(INIT_FLAGS2_AT..INIT_FLAGS2_AT + 4);
        let flags2 = flags2.and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
        self.handles.keep_init(&request, flags2 & HAS_RESEND != 0).map_err(handshake)?;
        Ok(request)
    }

    /// Asks the kernel to queue again what another process had read and not answered.
    pub(crate) fn resend(&self) -> io::Result<()> {
        resend(&self.device)
    }
}

/// Both ends of the pair that stands for the device during fuser's handshake.
pub(crate) fn handshake_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(io::Error::from)
}

/// Puts the device in the place of another descriptor.
pub(crate) fn replace(place: BorrowedFd<'_>, device: &OwnedFd) -> io::Result<()> {
    // SAFETY: both are open descriptors, and whoever owns `place` goes on owning what is there now.
    match unsafe { libc::dup3(device.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub(crate) fn resend(device: &impl AsFd) -> io::Result<()> {
    // struct fuse_out_header: length, code of the notification, unique 0.
    let mut message = [0u8; 16];
    message[..4].copy_from_slice(&16u32.to_ne_bytes());
    message[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    nix::unistd::write(device, &message)?;
    Ok(())
}

pub(crate) fn set_blocking(device: &impl AsFd, blocking: bool) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let mut flags = OFlag::from_bits_retain(fcntl(device, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, !blocking);
    fcntl(device, FcntlArg::F_SETFL(flags))?;
    Ok(())
}
