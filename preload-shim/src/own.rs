//! This library's own descriptors among those of the application, which does not close them by mistake.

use crate::{agent, directories, process};
use core::sync::atomic::{AtomicI32, Ordering};

/// Lowest number that one of them ever had: asked at every close.
static LOWEST: AtomicI32 = AtomicI32::new(i32::MAX);

/// This library has got a descriptor. Whatever had its number was closed in a way that was not seen.
pub fn add(fd: i32) {
    LOWEST.fetch_min(fd, Ordering::Relaxed);
    agent::give_up(fd);
}

/// The application has got a descriptor: if its number was one of these, that was closed in a way that was not seen.
#[inline]
pub fn check(fd: i32) {
    if owns(fd) {
        give_up(fd);
    }
}

/// Whether a descriptor is this library's.
#[inline]
pub fn owns(fd: i32) -> bool {
    fd >= LOWEST.load(Ordering::Relaxed) && is_one(fd)
}

#[cold]
#[inline(never)]
fn is_one(fd: i32) -> bool {
    fd > 2 && (agent::owns(fd) || directories::owns(fd))
}

/// This library's descriptors from `first` on, the lowest.
pub fn next(first: u32) -> Option<u32> {
    agent::next_own(first).into_iter().chain(directories::next_own(first)).min()
}

/// The application takes a descriptor of this library for itself.
pub fn give_up(fd: i32) {
    // A child of `vfork` has descriptors of its own, and its parent keeps these.
    if process::is_own() {
        agent::give_up(fd);
        directories::give_up(fd);
    }
}
