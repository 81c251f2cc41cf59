//! The control socket: the same requests as on the HTTP port, from users of this host who may open the socket.

use super::{NodeView, handle};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Owner and group may send commands.
const SOCKET_MODE: u32 = 0o660;

/// Connections that send no request are closed after this long.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another agent serves it.
    #[error("another agent already answers at {}: stop it, or give this one another socket.path", .0.display())]
    InUse(PathBuf),
    /// There is a file of another kind.
    #[error("{} exists and is not a socket: remove it, or set another socket.path", .0.display())]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("cannot open the control socket {}: {error}", .path.display())]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Opens the socket; a stale one from an agent that died is replaced. Call it on a tokio runtime.
///
/// # Errors
/// Another agent has it, or the path cannot be used.
pub fn bind(path: &Path) -> Result<UnixListener, ControlError> {
    let failed = |error| ControlError::Io { path: path.to_path_buf(), error };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ControlError::NotASocket(path.to_path_buf()));
        }
        // A dead agent's socket refuses connections.
        Ok(_) => match BlockingStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
            Ok(_) => return Err(ControlError::InUse(path.to_path_buf())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).map_err(failed)?;
            }
        }
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
    Ok(listener)
}

/// Answers commands until `stop`; then lets running ones finish their response, except endless event streams.
pub async fn serve(listener: UnixListener, view: Arc<dyn NodeView>, stop: CancellationToken) {
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: give others time to close some.
                tracing::warn!(%error, "the control socket cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let view = view.clone();
        let stop = stop.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let view = view.clone();
                async move { Ok::<_, Infallible>(handle(request, true, view).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => return,
                () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
            }
            let _ = tokio::time::timeout(Duration::from_secs(5), connection).await;
        });
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake::FakeNode;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/control.sock");
        let first = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(bind(&path), Err(ControlError::InUse(_))));
        drop(first);
        assert!(path.exists());
        bind(&path).unwrap();
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(ControlError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn serving_ends_when_told_even_with_an_idle_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = bind(&path).unwrap();
        let stop = CancellationToken::new();
        let served = tokio::spawn(serve(listener, Arc::new(FakeNode::new()), stop.clone()));
        let _idle = tokio::net::UnixStream::connect(&path).await.unwrap();
        stop.cancel();
        served.await.unwrap();
    }
}
