//! The clock of the lease.

use super::Time;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use tokio::io::unix::AsyncFd;

/// Time since the host started, also while it slept (`CLOCK_BOOTTIME`): a lease ends meanwhile.
pub fn now() -> Time {
    // Fails only for a clock that the kernel does not have; this one is as old as Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Time::from).unwrap_or(Time::MAX)
}

/// Wakes at a moment of this clock: where the host slept over it, as soon as it is awake. The runtime's own timers stand
/// still while it sleeps.
#[derive(Debug)]
pub struct Alarm(AsyncFd<Timer>);

#[derive(Debug)]
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Alarm {
    /// Set by [`Alarm::until`].
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Alarm> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = Timer(TimerFd::new(timerfd::ClockId::CLOCK_BOOTTIME, flags)?);
        // SAFETY: the timer owns its descriptor, and always gives the same one, for as long as it lives.
        Ok(Alarm(unsafe { AsyncFd::register(timer)? }))
    }

    /// Waits until a moment. May be dropped and begun anew at any time.
    ///
    /// # Errors
    /// The kernel's timer fails.
    pub async fn until(&mut self, at: Time) -> io::Result<()> {
        loop {
            let left = at.saturating_sub(now());
            if left.is_zero() {
                return Ok(());
            }
            // Longer than a day is until somebody looks again.
            let left = left.min(Time::from_secs(86_400));
            let expiration = Expiration::OneShot(TimeSpec::nanoseconds(left.as_nanos() as i64));
            self.0.get_ref().0.set(expiration, TimerSetTimeFlags::empty())?;
            let mut ready = self.0.readable().await?;
            // Setting it has made a ring of before unread; what is read now may be none.
            match ready.get_inner().0.wait() {
                Ok(()) | Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_alarm_rings_at_its_moment_and_can_be_set_again() {
        let mut alarm = Alarm::new().expect("a descriptor is left");
        let at = now() + Time::from_millis(20);
        alarm.until(at).await.expect("it rings");
        assert!(now() >= at);
        alarm.until(at).await.expect("what is past needs no waiting");
        // Given up in the middle, as by what comes first.
        let far = tokio::time::timeout(Time::from_millis(5), alarm.until(now() + Time::from_secs(3600)));
        assert!(far.await.is_err());
        let at = now() + Time::from_millis(20);
        alarm.until(at).await.expect("it rings");
        assert!(now() >= at);
    }

    #[tokio::test]
    async fn an_alarm_counts_while_the_host_sleeps() {
        let alarm = Alarm::new().expect("a descriptor is left");
        let fd = alarm.0.get_ref().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).expect("it is open");
        let clock = info.lines().find_map(|line| line.strip_prefix("clockid:")).expect("it is a timer");
        assert_eq!(clock.trim().parse::<i32>().expect("a number"), libc::CLOCK_BOOTTIME);
    }
}
