//! `litefs-mount`: mounts for agents that may not (litefs-mount.service). It serves the socket that systemd passes, or
//! the one that its argument names.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

/// The first descriptor that systemd passes (sd_listen_fds(3)).
const PASSED: i32 = 3;

fn main() -> ExitCode {
    match listener().and_then(|listener| fuse_session::helper::serve(&listener)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("litefs-mount: {error}");
            ExitCode::FAILURE
        }
    }
}

fn listener() -> std::io::Result<OwnedFd> {
    if let Some(path) = std::env::args_os().nth(1) {
        return fuse_session::helper::listen_at(path.as_ref());
    }
    let is = |name: &str, value: u32| std::env::var(name).is_ok_and(|text| text == value.to_string());
    if !is("LISTEN_PID", std::process::id()) || !is("LISTEN_FDS", 1) {
        return Err(std::io::Error::other("systemd starts this, by litefs-mount.socket; else name a socket"));
    }
    // SAFETY: systemd opened it for this process (LISTEN_PID says so), and this runs once.
    Ok(unsafe { OwnedFd::from_raw_fd(PASSED) })
}
