//! Ctrl-C ends the demo in order.

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Set by Ctrl-C and SIGTERM.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Ctrl-C and SIGTERM are noticed between steps. (Handled, not blocked: programs inherit a block, but no handler.)
pub struct Interrupt;

impl Interrupt {
    pub fn new() -> Result<Interrupt> {
        extern "C" fn note(_: i32) {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
        // Without SA_RESTART, so that waiting ends at once.
        let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
            unsafe { sigaction(signal, &action) }.context("cannot handle signals")?;
        }
        Ok(Interrupt)
    }

    /// Waits; fails when interrupted.
    pub fn pause(&self, time: Duration) -> Result<()> {
        std::thread::sleep(time);
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Waits for Enter, the end of the input, or an interruption, which here is a good way to end.
    pub fn wait_for_enter(&self) -> Result<()> {
        let stdin = std::io::stdin();
        while !INTERRUPTED.load(Ordering::Relaxed) {
            let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, 200u16) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(error) => return Err(error).context("cannot wait for the terminal"),
            }
        }
        Ok(())
    }
}
