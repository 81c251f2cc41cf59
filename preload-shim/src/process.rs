//! What is known of the process itself: which one it is, how patient its environment makes it, and whether its standard
//! error is still there to be told something.

use crate::managed::PathBuffer;
use crate::{sys, table};
use core::ffi::CStr;
use core::sync::atomic::{AtomicI32, AtomicU64, Ordering};

static PROCESS: AtomicI32 = AtomicI32::new(0);
/// Standard error when the process began: device and inode. Another file may get its number later.
static STDERR: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
static WAIT_MS: AtomicU64 = AtomicU64::new(shim_protocol::WAIT_MS);

/// Remembers what cannot be asked later.
pub fn remember() {
    PROCESS.store(sys::getpid(), Ordering::Relaxed);
    if let Ok(stat) = sys::fstat(2) {
        STDERR[0].store(stat.st_dev, Ordering::Relaxed);
        STDERR[1].store(stat.st_ino, Ordering::Relaxed);
    }
    // SAFETY: the name ends with a zero; the value is read at once.
    let wait = unsafe { libc::getenv(c"LITEFS_WAIT_MS".as_ptr()) };
    if !wait.is_null() {
        // SAFETY: a string of the environment.
        let digits = unsafe { CStr::from_ptr(wait) }.to_bytes();
        if let Some(ms) = core::str::from_utf8(digits).ok().and_then(|d| d.parse().ok()) {
            WAIT_MS.store(ms, Ordering::Relaxed);
        }
    }
}

/// In the child of a fork.
pub fn forked() {
    PROCESS.store(sys::getpid(), Ordering::Relaxed);
}

/// Whether this is not the child of a vfork, which has its parent's memory.
pub fn is_own() -> bool {
    sys::getpid() == PROCESS.load(Ordering::Relaxed)
}

/// How long an application waits for an agent.
pub fn wait_ms() -> u64 {
    WAIT_MS.load(Ordering::Relaxed)
}

/// Says something on standard error, if that is still what it was.
pub fn say(parts: &[&[u8]]) {
    let same = sys::fstat(2).is_ok_and(|stat| {
        stat.st_dev == STDERR[0].load(Ordering::Relaxed) && stat.st_ino == STDERR[1].load(Ordering::Relaxed)
    });
    if !same || table::file(2).is_some() {
        return;
    }
    let mut line = PathBuffer::<512>::new();
    line.push(b"litefs: ");
    for part in parts {
        line.push(part);
    }
    line.push(b"\n");
    let _ = sys::write(2, line.bytes());
}
