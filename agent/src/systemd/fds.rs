//! Descriptors that systemd passes at the start (sd_listen_fds(3)): those of socket units, and those that an earlier
//! process of this service put into its store (sd_notify(3), `FDSTORE=1`). All are told apart by their names.

use parking_lot::Mutex;
use sd_notify::NotifyState;
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

/// What was passed and nobody has taken yet.
static PASSED: LazyLock<Mutex<HashMap<String, Vec<OwnedFd>>>> = LazyLock::new(|| {
    let mut passed = HashMap::<String, Vec<OwnedFd>>::new();
    match sd_notify::listen_fds_with_names() {
        Ok(fds) => {
            for (fd, name) in fds {
                // SAFETY: systemd opened it for this process (LISTEN_PID says so), and this runs once.
                passed.entry(name).or_default().push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        Err(error) => {
            tracing::warn!(%error, "cannot read which descriptors systemd passed; none are used");
        }
    }
    Mutex::new(passed)
});

/// Whether systemd started this process as a service that notifies.
pub fn is_service() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Takes all descriptors of this name, in the order in which they were passed.
pub fn take_all(name: &str) -> Vec<OwnedFd> {
    PASSED.lock().remove(name).unwrap_or_default()
}

/// Takes the descriptor of this name; others of the same name are closed.
pub fn take(name: &str) -> Option<OwnedFd> {
    take_all(name).into_iter().next()
}

/// Closes what nobody has taken, and removes it from the store: to be called when everything is up.
pub fn close_unclaimed() {
    let unclaimed = std::mem::take(&mut *PASSED.lock());
    for name in unclaimed.keys() {
        tracing::warn!(name, "systemd passed a descriptor that this version does not know; it is closed");
        forget(name);
    }
}

/// Has systemd keep a descriptor for the next process of this service, until the service is stopped.
pub fn store(name: &str, fd: BorrowedFd<'_>) {
    let state = [NotifyState::FdStore, NotifyState::FdName(name)];
    if is_service()
        && let Err(error) = sd_notify::notify_with_fds(&state, &[fd])
    {
        tracing::warn!(name, %error, "systemd cannot keep this descriptor over a restart");
    }
}

/// Removes the descriptors of this name from systemd's store.
pub fn forget(name: &str) {
    // Fails only where there is no service manager, and so no store.
    let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}
