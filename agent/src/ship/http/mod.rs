//! The node's HTTP server: accepts on TCP and Unix sockets, speaks HTTP/1 and HTTP/2 (h2c with prior knowledge),
//! and gives the paths of the replication protocol to shipping and everything else to the node's own [`Handler`].

pub mod access;
mod first_bytes;

use crate::lease::peers::PREFIX as LEASE_PREFIX;
use crate::ship::body::Body;
use crate::ship::frame::full_text;
use crate::ship::halt::PREFIX as HALT_PREFIX;
use crate::ship::server::{DATABASES_PREFIX, FOLLOW_PATH, Server};
use access::Access;
use first_bytes::FirstBytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Answers every request that is not for shipping.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request. `privileged`: it came over a Unix socket, whose file permissions decide who may.
    fn handle(&self, request: Request<Incoming>, privileged: bool) -> BoxFuture<'_, Response<Body>>;
}

/// Where a request came from; every request carries it as an extension.
#[derive(Clone, Debug)]
pub struct PeerAddr(pub Arc<str>);

/// Bounds of the server.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Who may connect.
    pub access: Arc<Access>,
    /// Connections that are open at once, per listener; more wait in the kernel's backlog.
    pub connections_max: usize,
    /// Time in which a new connection must say what it speaks, and an HTTP/1 peer must send its request head.
    pub head_timeout: Duration,
    /// Time that open connections get to finish when the server stops.
    pub grace: Duration,
    /// An HTTP/2 connection that is quiet for this long is probed.
    pub keepalive_interval: Duration,
    /// A probe that is not answered for this long means that the peer is gone. Generous: probes queue behind data.
    pub keepalive_timeout: Duration,
}

impl Default for HttpOptions {
    fn default() -> Self {
        HttpOptions {
            access: Arc::default(),
            connections_max: 1024,
            head_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(5),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// Streams of one HTTP/2 connection. A follower keeps its own, lower bound.
const STREAMS_PER_CONNECTION: u32 = 8192;

/// Request bodies are small (acknowledgements), so windows are.
const REQUEST_STREAM_WINDOW_BYTES: u32 = 256 << 10;
const REQUEST_CONNECTION_WINDOW_BYTES: u32 = 1 << 20;

/// Response bytes that one stream may hold in memory while its peer does not read.
const SEND_BUFFER_BYTES: usize = 256 << 10;

/// Why a socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A process already listens there.
    #[error("{0} is in use by another running process: stop it or choose another address")]
    InUse(String),
    /// The system refused.
    #[error("cannot listen on {address}: {source}")]
    Io {
        /// The address or path.
        address: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The service manager passed something that cannot be used.
    #[error("cannot use the listening socket that systemd passed: {source}; look at the socket unit")]
    Passed {
        /// The system's reason.
        source: io::Error,
    },
}

/// A socket that accepts connections.
#[derive(Debug)]
pub enum Listener {
    /// From other hosts; not privileged.
    Tcp(TcpListener),
    /// From this host; privileged.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a TCP address.
    pub async fn bind_tcp(address: SocketAddr) -> Result<Self, BindError> {
        match TcpListener::bind(address).await {
            Ok(listener) => Ok(Listener::Tcp(listener)),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(BindError::InUse(address.to_string())),
            Err(source) => Err(BindError::Io { address: address.to_string(), source }),
        }
    }

    /// Listens on a Unix socket that only this user (and its group, by `mode`) may connect to. Replaces the socket
    /// of a dead process, never anything else.
    pub async fn bind_unix(path: &Path, mode: u32) -> Result<Self, BindError> {
        let failed = |source| BindError::Io { address: path.display().to_string(), source };
        let listener = match UnixListener::bind(path) {
            // Connecting to what is no socket is refused just like connecting to the socket of a dead process.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_socket(path).map_err(failed)? => {
                match UnixStream::connect(path).await {
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                    Ok(_) => return Err(BindError::InUse(path.display().to_string())),
                    Err(e) => return Err(failed(e)),
                }
                std::fs::remove_file(path).and_then(|()| UnixListener::bind(path)).map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
        Ok(Listener::Unix(listener))
    }

    /// A TCP socket that already listens.
    pub fn tcp_from(socket: OwnedFd) -> Result<Self, BindError> {
        let socket = std::net::TcpListener::from(socket);
        let listener = socket.set_nonblocking(true).and_then(|()| TcpListener::from_std(socket));
        listener.map(Listener::Tcp).map_err(|source| BindError::Passed { source })
    }

    /// A Unix socket that already listens.
    pub fn unix_from(socket: OwnedFd) -> Result<Self, BindError> {
        let socket = std::os::unix::net::UnixListener::from(socket);
        let listener = socket.set_nonblocking(true).and_then(|()| UnixListener::from_std(socket));
        listener.map(Listener::Unix).map_err(|source| BindError::Passed { source })
    }

    /// The TCP address, or the path of the Unix socket.
    pub fn address(&self) -> String {
        match self {
            Listener::Tcp(listener) => {
                listener.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string())
            }
            Listener::Unix(listener) => {
                let path = listener.local_addr().ok().and_then(|a| a.as_pathname().map(PathBuf::from));
                path.unwrap_or_default().display().to_string()
            }
        }
    }
}

fn is_socket(path: &Path) -> io::Result<bool> {
    Ok(std::fs::symlink_metadata(path)?.file_type().is_socket())
}

/// What all connections share.
struct Site {
    ship: Arc<Server>,
    handler: Arc<dyn Handler>,
    options: HttpOptions,
    cancel: CancellationToken,
    tracker: TaskTracker,
}

/// Serves until `cancel`; then lets open requests finish within [`HttpOptions::grace`] and returns.
pub async fn serve(
    listeners: Vec<Listener>,
    ship: Arc<Server>,
    handler: Arc<dyn Handler>,
    options: HttpOptions,
    cancel: CancellationToken,
) {
    let site = Arc::new(Site { ship, handler, options, cancel, tracker: TaskTracker::new() });
    for listener in listeners {
        site.tracker.spawn(accept(Arc::clone(&site), listener));
    }
    site.tracker.close();
    site.tracker.wait().await;
}

async fn accept(site: Arc<Site>, listener: Listener) {
    let address = listener.address();
    let room = Arc::new(Semaphore::new(site.options.connections_max));
    loop {
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await.expect("never closed");
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = site.cancel.cancelled() => return,
        };
        let for_connection = Arc::clone(&site);
        match accepted {
            Ok(Accepted::Tcp(stream, peer)) => {
                // Frames are flushed as they are made; Nagle would hold each back for a round trip.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(peer, %error, "cannot set TCP_NODELAY");
                }
                site.tracker.spawn(async move {
                    from_other_host(for_connection, stream, peer).await;
                    drop(permit);
                });
            }
            Ok(Accepted::Unix(stream)) => {
                site.tracker.spawn(async move {
                    connection(for_connection, stream, "local".into(), Caller::ThisHost).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, mostly: connections that are open may end and free some.
                tracing::warn!(address, %error, "cannot accept a connection; trying again");
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(100)) => {}
                    () = site.cancel.cancelled() => return,
                }
            }
        }
    }
}

enum Accepted {
    Tcp(tokio::net::TcpStream, String),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Accepted::Tcp(stream, peer.to_string())
            }
            Listener::Unix(listener) => Accepted::Unix(listener.accept().await?.0),
        })
    }
}

/// Who sends the requests of a connection.
#[derive(Clone, Copy)]
enum Caller {
    /// A program on this host, which the permissions of the control socket let in.
    ThisHost,
    /// Another host.
    OtherHost {
        /// It has shown the certificate of a node.
        certified: bool,
    },
}

/// Serves one TCP connection, with TLS where it is configured.
async fn from_other_host(site: Arc<Site>, stream: tokio::net::TcpStream, peer: String) {
    let Some(tls) = site.options.access.tls() else {
        return connection(site, stream, peer, Caller::OtherHost { certified: false }).await;
    };
    match tokio::time::timeout(site.options.head_timeout, tls.accept(stream)).await {
        Ok(Ok((stream, certified))) => connection(site, stream, peer, Caller::OtherHost { certified }).await,
        Ok(Err(error)) => tracing::info!(peer, "no TLS connection: {}", full_text(&error)),
        Err(_) => tracing::debug!(peer, "no TLS handshake in time"),
    }
}

/// Serves one connection.
async fn connection<S>(site: Arc<Site>, stream: S, peer: String, caller: Caller)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let options = &site.options;
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(options.head_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .initial_stream_window_size(REQUEST_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(REQUEST_CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_header_list_size(16 << 10);
    let peer = PeerAddr(peer.into());
    let service = service_fn(|mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(route(&site, request, caller).await) }
    });
    let io = TokioIo::new(FirstBytes::new(stream, options.head_timeout));
    let mut serving = pin!(builder.serve_connection(io, service));
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = site.cancel.cancelled() => {
            serving.as_mut().graceful_shutdown();
            match tokio::time::timeout(options.grace, serving).await {
                Ok(result) => result,
                Err(_) => return tracing::debug!(peer = &*peer.0, "connection did not finish in time, cut"),
            }
        }
    };
    if let Err(error) = result {
        tracing::debug!(peer = &*peer.0, "connection closed: {}", full_text(&*error));
    }
}

async fn route(site: &Site, request: Request<Incoming>, caller: Caller) -> Response<Body> {
    let path = request.uri().path();
    if let Caller::OtherHost { certified } = caller
        && let Err(refusal) = site.options.access.check(path, request.headers(), certified)
    {
        return site.ship.refuse(&request, &refusal);
    }
    if path == FOLLOW_PATH
        || path.starts_with(DATABASES_PREFIX)
        || path.starts_with(LEASE_PREFIX)
        || path.starts_with(HALT_PREFIX)
    {
        return site.ship.handle(request).await;
    }
    site.handler.handle(request, matches!(caller, Caller::ThisHost)).await
}
