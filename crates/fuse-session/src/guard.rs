//! A process that does what a dead server can no longer do: it lets the server go away, and keeps the mount for the next
//! one, or aborts it.
//!
//! A server that uses its own mount can die half-way: one of its threads waits, beyond the reach of SIGKILL, for an answer
//! that only the dead process could give, and as long as it waits the process is not gone. The guard answers those
//! threads: it has the kernel queue what was not answered again, takes what comes, and gives an error to the requests of the
//! dead process. All others stay unanswered and are queued again for the next server.
//!
//! With one exception. A thread can also wait, as much beyond SIGKILL, for the lock of an inode whose holder is an application
//! that waits for an answer: that of an fsync, with which a checkpoint begins while the server appends to the WAL
//! (`fuse_fsync` holds the lock of its inode). A next server could give it; but a service manager starts none before the
//! dead one is gone. So there fsyncs fail, with EINTR, as long as such a thread waits.

use crate::connection::{self, Connection};
use crate::handles::HandleTable;
use crate::mounter::Mounter;
use crate::successor::KeeperSocket;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getppid};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Sent by the kernel to the guard when its parent dies.
const PARENT_DIED: Signal = Signal::SIGUSR1;
/// A dead process that waits for something else than its mount is not waited for any longer.
const REAP_PATIENCE: Duration = Duration::from_secs(10);
/// Between looks whether the dead process is gone.
const REAP_STEP_MS: u16 = 2;
/// A thread of the dead process that waits uninterruptibly for so long, with none of its own requests unanswered, waits for
/// a lock.
const LOCK_PATIENCE: Duration = Duration::from_millis(200);
/// `FUSE_FSYNC` (include/uapi/linux/fuse.h).
const FSYNC: u32 = 20;
/// Larger than any request: one that does not fit fails (fs/fuse/dev.c). Untouched memory costs nothing.
const REQUEST_BYTES_MAX: usize = (16 << 20) + 4096;

/// What becomes of the mount when its server dies.
#[derive(Debug, Clone)]
pub enum AfterDeath {
    /// It is aborted: applications get errors.
    Abort,
    /// The guard keeps it for so long, and gives it to a process that asks at this socket.
    Keep {
        /// Where [`crate::claim`] asks.
        socket: PathBuf,
        /// How long.
        wait: Duration,
    },
    /// A service manager keeps the descriptors.
    LeaveToManager,
}

/// What a guard guards.
#[derive(Debug)]
pub struct GuardOptions<'a> {
    /// The mount point.
    pub dir: &'a Path,
    /// The connection that is, or will be, mounted there.
    pub connection: &'a Connection,
    /// A file lock (flock(2)) that a successor waits for; the guard gives it back when the dead server is gone.
    pub lock: Option<BorrowedFd<'a>>,
    /// What becomes of the mount.
    pub after_death: AfterDeath,
}

/// The guard of a mount. Dropping it dismisses it: then the server takes the mount away itself.
#[derive(Debug)]
pub struct Guard {
    pid: Pid,
    _socket: Option<KeeperSocket>,
}

/// What the guard's process works with.
struct Watch<'a> {
    dir: &'a Path,
    device: Arc<OwnedFd>,
    mounter: Mounter,
    handles: Arc<HandleTable>,
    lock: Option<BorrowedFd<'a>>,
    after_death: AfterDeath,
    socket: Option<&'a KeeperSocket>,
    server: Pid,
}

impl Guard {
    /// Starts the guard. Call it on the main thread, before there are others: the guard watches the thread that started
    /// it.
    pub fn start(options: &GuardOptions<'_>) -> io::Result<Guard> {
        let socket = match &options.after_death {
            AfterDeath::Keep { socket, .. } => Some(KeeperSocket::bind(socket)?),
            AfterDeath::Abort | AfterDeath::LeaveToManager => None,
        };
        let watch = Watch {
            dir: options.dir,
            device: options.connection.device.clone(),
            mounter: options.connection.mounter.for_child(),
            handles: options.connection.handles.clone(),
            lock: options.lock,
            after_death: options.after_death.clone(),
            socket: socket.as_ref(),
            server: nix::unistd::getpid(),
        };
        // SAFETY: the process has one thread (by the caller's contract), so the child may use all of it.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Guard { pid: child, _socket: socket }),
            ForkResult::Child => watch.run(),
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }

    /// The server ends and leaves the mount to the guard, as if it had died.
    pub fn leave_mount(self) {
        std::mem::forget(self);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

impl Watch<'_> {
    /// The life of the guard.
    fn run(self) -> ! {
        // Signals of the terminal or of a service manager are for the server.
        let _ = SigSet::all().thread_block();
        let _ = nix::sys::prctl::set_name(c"litefs-guard");
        let watching = nix::sys::prctl::set_pdeathsig(PARENT_DIED);
        let server = pidfd(self.server);
        let mut expected = SigSet::empty();
        expected.add(PARENT_DIED);
        // The parent may have died before the kernel was asked to tell.
        if watching.is_ok() && getppid() == self.server {
            let _ = expected.wait();
        }
        if !matches!(self.after_death, AfterDeath::Abort) && self.handles.is_resumable() {
            let gone = self.let_server_go(server.as_ref());
            self.unlock();
            match (&self.after_death, self.socket) {
                (AfterDeath::LeaveToManager, _) if gone => std::process::exit(0),
                (AfterDeath::Keep { wait, .. }, Some(socket)) if self.keep(socket, *wait) => {
                    std::process::exit(0)
                }
                _ => {}
            }
        }
        self.abort()
    }

    /// Keeps the mount until somebody has taken it (`true`) or the time is over.
    fn keep(&self, socket: &KeeperSocket, wait: Duration) -> bool {
        use std::os::fd::AsFd;
        socket.hand_over(&[self.device.as_fd(), self.handles.as_fd()], Instant::now() + wait)
    }

    fn abort(&self) -> ! {
        self.mounter.abort(self.dir);
        std::process::exit(0)
    }

    fn unlock(&self) {
        if let Some(lock) = self.lock {
            // SAFETY: flock(2) on a descriptor that is open; it belongs to all who share the open file.
            unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_UN) };
        }
    }

    /// Answers the dead server's own requests until it is gone: whether it is.
    fn let_server_go(&self, server: Option<&OwnedFd>) -> bool {
        let Some(server) = server else { return true };
        let deadline = Instant::now() + REAP_PATIENCE;
        let fails_fsyncs = matches!(self.after_death, AfterDeath::LeaveToManager);
        let mut stuck_since: Option<Instant> = None;
        let mut gone = false;
        let mut request = vec![0; REQUEST_BYTES_MAX];
        // The open file is shared with the dead process alone.
        let _ = connection::set_blocking(&*self.device, false);
        while !gone && Instant::now() < deadline {
            stuck_since = stuck_since.or(Some(Instant::now())).filter(|_| self.is_server_stuck());
            let waits_for_lock = stuck_since.is_some_and(|since| since.elapsed() > LOCK_PATIENCE);
            // Each time: a thread of the dead process may have taken a request until a moment ago.
            let _ = connection::resend(&*self.device);
            loop {
                match nix::unistd::read(&*self.device, &mut request) {
                    Ok(len) => self.answer(&request[..len], waits_for_lock && fails_fsyncs),
                    // ENOENT: the request was taken back.
                    Err(Errno::EINTR | Errno::ENOENT) => {}
                    Err(_) => break,
                }
            }
            let mut waits = [PollFd::new(std::os::fd::AsFd::as_fd(server), PollFlags::POLLIN)];
            gone = poll(&mut waits, PollTimeout::from(REAP_STEP_MS)).is_ok_and(|n| n > 0);
        }
        let _ = connection::set_blocking(&*self.device, true);
        gone
    }

    /// Whether a thread of the dead server waits uninterruptibly.
    fn is_server_stuck(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.server)) else { return false };
        threads.flatten().any(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The state follows the name, which is in parentheses and may have some itself.
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
        })
    }

    /// An error for a request of a thread of the dead server, and for fsyncs where they are to fail.
    fn answer(&self, request: &[u8], fsyncs_fail: bool) {
        // struct fuse_in_header: opcode at 4, unique at 8, pid (of the thread) at 32.
        let number =
            |at| request.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
        let (Some(unique), thread) = (request.get(8..16), number(32)) else { return };
        let own = thread != 0 && Path::new("/proc").join(format!("{}/task/{thread}", self.server)).exists();
        let error = match number(4) {
            _ if own => libc::EIO,
            FSYNC if fsyncs_fail => libc::EINTR,
            _ => return,
        };
        // struct fuse_out_header: length, error, unique.
        let mut answer = [0u8; 16];
        answer[..4].copy_from_slice(&16u32.to_ne_bytes());
        answer[4..8].copy_from_slice(&(-error).to_ne_bytes());
        answer[8..].copy_from_slice(unique);
        let _ = nix::unistd::write(&*self.device, &answer);
    }
}

/// A descriptor that is readable when all threads of a process are gone.
fn pidfd(pid: Pid) -> Option<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and gives a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    // SAFETY: it was opened just now, and nobody else knows it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
