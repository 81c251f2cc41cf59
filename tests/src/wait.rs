//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// How long something that should happen may take. A working system needs milliseconds; a loaded machine more.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` gives something; panics with `what` at the deadline.
#[track_caller]
pub fn wait_for<T>(what: &str, patience: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "did not happen within {patience:?}: {what}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
