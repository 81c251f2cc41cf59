//! Nodes, proxies and scripted peers on loopback, and how tests wait.

use super::memory_node::MemoryNode;
use crate::ship::body::{self, Body};
use crate::ship::engine::Sink;
use crate::ship::follow::{FollowOptions, Follower, FollowerHandle, Upstream};
use crate::ship::http::{Handler, HttpOptions, Listener, serve};
use crate::ship::server::{Server, ServerOptions};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything in a test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "never came: {what}");
}

/// Answers what is not for shipping.
pub struct Elsewhere;

impl Handler for Elsewhere {
    fn handle(&self, request: Request<Incoming>, privileged: bool) -> BoxFuture<'_, Response<Body>> {
        async move { Response::new(body::full(format!("{} privileged={privileged}", request.uri().path()))) }
            .boxed()
    }
}

/// A node that serves.
pub struct Site {
    pub server: Arc<Server>,
    pub address: SocketAddr,
    pub cancel: CancellationToken,
    serving: JoinHandle<()>,
}

impl Site {
    pub async fn start(node: &Arc<MemoryNode>) -> Site {
        Site::start_with(node, "127.0.0.1:0".parse().unwrap(), |_| {}).await
    }

    pub async fn start_with(
        node: &Arc<MemoryNode>,
        address: SocketAddr,
        change: impl FnOnce(&mut ServerOptions),
    ) -> Site {
        let mut options = ServerOptions::new(format!("host-{}", node.id), "test");
        change(&mut options);
        let cancel = CancellationToken::new();
        let source = Arc::clone(node) as Arc<dyn crate::ship::engine::Source>;
        let server = Server::new(source, options, cancel.clone());
        let listener = Listener::bind_tcp(address).await.unwrap();
        let address = listener.address().parse().unwrap();
        let http = HttpOptions { grace: Duration::from_secs(1), ..HttpOptions::default() };
        let serving = tokio::spawn(serve(
            vec![listener],
            Arc::clone(&server),
            Arc::new(Elsewhere),
            http,
            cancel.clone(),
        ));
        Site { server, address, cancel, serving }
    }

    pub async fn stop(self) {
        self.cancel.cancel();
        self.server.stopped().await;
        self.serving.await.unwrap();
    }
}

pub fn follow_options(node: &MemoryNode) -> FollowOptions {
    FollowOptions {
        retry: (Duration::from_millis(5), Duration::from_millis(50)),
        database_retry: (Duration::from_millis(5), Duration::from_millis(50)),
        busy_retry: (Duration::from_millis(1), Duration::from_millis(5)),
        behind_grace: Duration::ZERO,
        ..FollowOptions::new(format!("host-{}", node.id), "test")
    }
}

pub fn follow(node: &Arc<MemoryNode>, address: SocketAddr) -> FollowerHandle {
    follow_with(node, address, |_| {})
}

pub fn follow_with(
    node: &Arc<MemoryNode>,
    address: SocketAddr,
    change: impl FnOnce(&mut FollowOptions),
) -> FollowerHandle {
    let mut options = follow_options(node);
    change(&mut options);
    let upstream: Upstream = format!("http://{address}").parse().unwrap();
    Follower::spawn(upstream, Arc::clone(node) as Arc<dyn Sink>, options, CancellationToken::new())
}

/// Waits until the follower has learned where all databases are.
pub async fn compared(follower: &FollowerHandle) {
    until("the upstream's answer to the list", || follower.status().compared).await;
}

/// Waits until the error that keeps the follower from its upstream contains a text.
pub async fn refused(follower: &FollowerHandle, text: &str) {
    let mut last = String::new();
    let waiting = until(text, || {
        last = follower.status().last_error.unwrap_or_default();
        last.contains(text)
    });
    waiting.await;
}

/// What a proxy does to the bytes.
#[derive(Default)]
pub struct ProxyState {
    /// Connections, counted from 0, on which nothing is forwarded and nothing closed.
    pub frozen: watch::Sender<Range<usize>>,
    /// Bytes from the server that still pass before the connection that carries them is cut; negative: no limit.
    pub budget: AtomicI64,
    pub cuts: AtomicUsize,
    pub connections: AtomicUsize,
}

/// A TCP proxy in front of a server.
pub struct Proxy {
    pub address: SocketAddr,
    pub state: Arc<ProxyState>,
}

impl Proxy {
    pub async fn start(server: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(ProxyState { budget: AtomicI64::new(-1), ..ProxyState::default() });
        let for_connections = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = Arc::clone(&for_connections);
                let number = state.connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(server).await else { return };
                    let _ = (client.set_nodelay(true), server.set_nodelay(true));
                    let ((cr, cw), (sr, sw)) = (client.into_split(), server.into_split());
                    // When one direction ends, both are closed.
                    tokio::select! {
                        () = forward(cr, sw, &state, number, false) => {}
                        () = forward(sr, cw, &state, number, true) => {}
                    }
                });
            }
        });
        Proxy { address, state }
    }
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    state: &ProxyState,
    number: usize,
    down: bool,
) {
    let mut frozen = state.frozen.subscribe();
    let mut buffer = vec![0; 16 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        if frozen.wait_for(|frozen| !frozen.contains(&number)).await.is_err() {
            return;
        }
        let mut pass = len;
        if down && state.budget.load(Ordering::SeqCst) >= 0 {
            let left = state.budget.fetch_sub(len as i64, Ordering::SeqCst);
            pass = (left.max(0) as usize).min(len);
        }
        if to.write_all(&buffer[..pass]).await.is_err() {
            return;
        }
        if pass < len {
            state.budget.store(-1, Ordering::SeqCst);
            state.cuts.fetch_add(1, Ordering::SeqCst);
            return;
        }
    }
}

/// A server that answers as a test says.
pub async fn scripted<F>(answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> BoxFuture<'static, Response<Body>> + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = Arc::clone(&answer);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    address
}

pub fn status(code: StatusCode) -> Response<Body> {
    let mut response = Response::new(body::full("scripted"));
    *response.status_mut() = code;
    response
}
