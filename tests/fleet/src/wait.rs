//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// How long something that should happen may take. A working system needs milliseconds; a loaded machine more.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something; panics with `what` at the deadline.
#[track_caller]
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until(PATIENCE, condition).unwrap_or_else(|| panic!("did not happen within {PATIENCE:?}: {what}"))
}

/// Asks `condition` again and again until it gives something, or the time is over.
pub(crate) fn until<T>(patience: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(found) = condition() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
