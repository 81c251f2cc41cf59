//! The agent's two listening sockets. Connections that arrive while the agent is restarted wait in the kernel, because
//! somebody else holds the socket meanwhile: its socket unit, where there is one, or else systemd's store.

use super::fds;
use crate::ship::http::{BindError, Listener};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// `FileDescriptorName=` of `litefs@.socket`, and the name in the store.
const HTTP: (&str, &str) = ("http", "http-listener");
/// `FileDescriptorName=` of `litefs-control@.socket`, and the name in the store.
const CONTROL: (&str, &str) = ("control", "control-listener");

/// Who may connect to the control socket: the agent's user, and this group where there is one.
const CONTROL_MODE: u32 = 0o660;
const CONTROL_GROUP: &str = "litefs";

/// The port for followers, metrics and events.
///
/// # Errors
/// As [`Listener::bind_tcp`].
pub async fn http(address: SocketAddr) -> Result<Listener, BindError> {
    if let Some(fd) = fds::take(HTTP.0) {
        let listener = Listener::tcp_from(fd)?;
        tracing::info!(address = %listener.address(), "the HTTP port is that of the socket unit");
        return Ok(listener);
    }
    if let Some(fd) = fds::take(HTTP.1) {
        match Listener::tcp_from(fd) {
            Ok(kept) if kept.address() == address.to_string() => return Ok(kept),
            // The configuration has changed since.
            _ => fds::forget(HTTP.1),
        }
    }
    let listener = Listener::bind_tcp(address).await?;
    if let Listener::Tcp(socket) = &listener {
        fds::store(HTTP.1, socket.as_fd());
    }
    Ok(listener)
}

/// The socket for commands on this host.
///
/// # Errors
/// As [`Listener::bind_unix`].
pub async fn control(path: &Path) -> Result<Listener, BindError> {
    if let Some(fd) = fds::take(CONTROL.0) {
        let listener = Listener::unix_from(fd)?;
        tracing::info!(address = %listener.address(), "the control socket is that of the socket unit");
        return Ok(listener);
    }
    if let Some(fd) = fds::take(CONTROL.1) {
        // Somebody may have removed its file.
        let there = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
        match Listener::unix_from(fd) {
            Ok(kept) if there && kept.address() == path.display().to_string() => return Ok(kept),
            _ => fds::forget(CONTROL.1),
        }
    }
    let listener = Listener::bind_unix(path, CONTROL_MODE).await?;
    if fds::is_service() {
        let group = nix::unistd::Group::from_name(CONTROL_GROUP).ok().flatten();
        if let Some(group) = group
            && let Err(error) = nix::unistd::chown(path, None, Some(group.gid))
        {
            tracing::warn!(%error, "cannot give {} to the group {CONTROL_GROUP}", path.display());
        }
    }
    if let Listener::Unix(socket) = &listener {
        fds::store(CONTROL.1, socket.as_fd());
    }
    Ok(listener)
}

/// Removes the control socket's file when the agent stops, unless systemd keeps the socket for the next one.
pub fn remove_control(path: &Path) {
    if !fds::is_service() {
        let _ = std::fs::remove_file(path);
    }
}
