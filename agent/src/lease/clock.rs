//! The clock of the lease.

use super::Time;
use nix::time::{ClockId, clock_gettime};

/// Time since the host started, also while it slept (`CLOCK_BOOTTIME`): a lease ends meanwhile.
pub fn now() -> Time {
    // Fails only for a clock that the kernel does not have; this one is as old as Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Time::from).unwrap_or(Time::MAX)
}
