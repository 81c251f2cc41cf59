//! Waits for a lock in the kernel. Among writers who take it again and again, whoever looks from time to time finds it
//! free only by chance: between two commits there are microseconds. Whoever waits is woken at each of them.

use super::files::Patience;
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use sqlite_file::locks::{LockGuard, LockKind, LockRange};
use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Ends a wait when its time is over. Nothing else in the agent uses it.
const WAKE: Signal = Signal::SIGALRM;
/// Once might be just before the wait begins.
const AGAIN: Duration = Duration::from_millis(10);

extern "C" fn only_wake(_signal: libc::c_int) {}

/// [`WAKE`] interrupts a system call and does nothing else.
fn install_handler() -> Result<(), Errno> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // Without SA_RESTART.
        let action = SigAction::new(SigHandler::Handler(only_wake), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, which any thread can bear at any time.
        unsafe { sigaction(WAKE, &action) }.map(|_| ())
    })
}

/// Takes the lock when it is free; `None`: it was not within `patience`.
pub(super) fn acquire(
    file: &Arc<File>,
    kind: LockKind,
    range: LockRange,
    patience: &Patience,
) -> io::Result<Option<LockGuard>> {
    if let Some(guard) = LockGuard::try_acquire(file, kind, range)? {
        return Ok(Some(guard));
    }
    let left = patience.left();
    if left.is_zero() {
        return Ok(None);
    }
    install_handler()?;
    let to_this_thread =
        SigevNotify::SigevThreadId { signal: WAKE, thread_id: nix::unistd::gettid().as_raw(), si_value: 0 };
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(to_this_thread))?;
    timer.set(Expiration::IntervalDelayed(left.into(), AGAIN.into()), TimerSetTimeFlags::empty())?;
    loop {
        match LockGuard::wait(file, kind, range) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                if patience.left().is_zero() {
                    return Ok(None);
                }
            }
            got => return got.map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sqlite_file::locks::WAL_WRITE;
    use std::os::unix::fs::MetadataExt;

    fn two_files() -> (Arc<File>, Arc<File>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || Arc::new(File::options().read(true).write(true).open(file.path()).unwrap());
        (open(), open())
    }

    #[test]
    fn a_lock_that_stays_taken_is_waited_for_so_long_and_no_longer() {
        let (one, other) = two_files();
        let acquire = |bound| acquire(&other, LockKind::Write, WAL_WRITE, &Patience::new(bound)).unwrap();
        let held = LockGuard::try_acquire(&one, LockKind::Write, WAL_WRITE).unwrap();
        let bound = Duration::from_millis(50);
        let begun = std::time::Instant::now();
        assert!(acquire(bound).is_none());
        assert!(begun.elapsed() >= bound);
        assert!(acquire(Duration::ZERO).is_none());
        drop(held);
        assert!(acquire(bound).is_some());
    }

    /// Whoever only looks from time to time finds a lock that others take again and again by chance.
    #[test]
    fn the_kernel_knows_who_waits() {
        let (one, other) = two_files();
        let held = LockGuard::try_acquire(&one, LockKind::Write, WAL_WRITE).unwrap();
        let inode = format!(":{} ", one.metadata().unwrap().ino());
        std::thread::scope(|scope| {
            let patience = Patience::new(Duration::from_secs(60));
            let waiting =
                scope.spawn(move || acquire(&other, LockKind::Write, WAL_WRITE, &patience).unwrap());
            let waits =
                |locks: String| locks.lines().any(|lock| lock.contains("->") && lock.contains(&inode));
            while !waits(std::fs::read_to_string("/proc/locks").unwrap()) {
                assert!(!waiting.is_finished(), "it waited for nothing, or not in the kernel");
                std::thread::yield_now();
            }
            drop(held);
            assert!(waiting.join().unwrap().is_some());
        });
    }
}
