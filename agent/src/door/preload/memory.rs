//! The memory that the agent and one process share, and waiting on it.

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use shim_protocol::{MAGIC, Page, VERSION};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A [`Page`] in memory of its own.
#[derive(Debug)]
pub struct SharedPage {
    file: File,
    map: MmapRaw,
}

impl SharedPage {
    /// New memory, all zeros but for magic and version.
    pub fn create() -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"litefs-preload", flags)?);
        file.set_len(size_of::<Page>() as u64)?;
        // A process that cut it would make the agent's next access a SIGBUS.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let map = MmapOptions::new().len(size_of::<Page>()).map_raw(&file)?;
        let shared = SharedPage { file, map };
        shared.page().magic.store(MAGIC, Ordering::Relaxed);
        shared.page().version.store(VERSION, Ordering::Relaxed);
        Ok(shared)
    }

    /// What is in it.
    pub fn page(&self) -> &Page {
        // SAFETY: the mapping is as large as a page, aligned to the system's pages, lives as long as `self` and cannot
        // shrink; all fields are atomic, and any bytes are valid for them.
        unsafe { &*self.map.as_ptr().cast::<Page>() }
    }

    /// The descriptor that the other side maps.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// Waits while the word is `expected`, at most so long.
pub fn wait(word: &AtomicU32, expected: u32, limit: Duration) {
    let time = libc::timespec {
        tv_sec: limit.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    };
    // SAFETY: the word and the time are valid for the call; not private, since another process wakes.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const time, 0usize, 0);
    }
}

/// Wakes who waits on the word.
pub fn wake(word: &AtomicU32) {
    // SAFETY: the word is valid for the call.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0usize, 0usize, 0);
    }
}
