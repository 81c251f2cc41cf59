//! A process that aborts the mount when its server dies.
//!
//! A server that uses its own mount can die half-way: one of its threads waits, beyond the reach of SIGKILL, for an
//! answer that only the dead process could give, and as long as it waits the kernel keeps the connection open, with
//! every application in it. Somebody else must abort the connection.

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getppid};
use std::io;
use std::path::Path;

/// Sent by the kernel to the guard when its parent dies.
const PARENT_DIED: Signal = Signal::SIGUSR1;

/// The guard of a mount. Dropping it dismisses it: then the server takes the mount away itself.
#[derive(Debug)]
pub struct Guard {
    pid: Pid,
}

impl Guard {
    /// Starts the guard of whatever FUSE file system will be mounted at `dir`. Call it on the main thread, before
    /// there are others: the guard watches the thread that started it. It shares descriptors that are open now, so a
    /// file lock taken before is held until the mount has been aborted.
    pub fn start(dir: &Path) -> io::Result<Guard> {
        let parent = nix::unistd::getpid();
        // SAFETY: the process has one thread (asserted below by the caller's contract), so the child may use all of it.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Guard { pid: child }),
            ForkResult::Child => watch(dir, parent),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// The life of the guard.
fn watch(dir: &Path, parent: Pid) -> ! {
    // Signals of the terminal or of a service manager are for the server.
    let _ = SigSet::all().thread_block();
    let _ = nix::sys::prctl::set_name(c"litefs-guard");
    let watching = nix::sys::prctl::set_pdeathsig(PARENT_DIED);
    let mut expected = SigSet::empty();
    expected.add(PARENT_DIED);
    // The parent may have died before the kernel was asked to tell.
    if watching.is_ok() && getppid() == parent {
        let _ = expected.wait();
    }
    // MNT_FORCE aborts the connection. The mount must stay: applications get an error from it, while in a bare directory
    // they would find nothing and make their databases anew. So it is held, which asks its server nothing.
    let held = open(dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    let _ = umount2(dir, MntFlags::MNT_FORCE | MntFlags::UMOUNT_NOFOLLOW);
    drop(held);
    std::process::exit(0);
}
