//! The HTTP server: sockets, routing, privilege, shutdown.

use super::memory_node::MemoryNode;
use super::site::{Elsewhere, Site, compared, follow};
use crate::ship::engine::Source;
use crate::ship::http::{BindError, HttpOptions, Listener, serve};
use crate::ship::server::{Server, ServerOptions};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn unix_connections_are_privileged_and_tcp_ones_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let cancel = CancellationToken::new();
    let node = MemoryNode::new(1) as Arc<dyn Source>;
    let ship = Server::new(node, ServerOptions::new("host-1", "test"), cancel.clone());
    let tcp = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = tcp.address();
    let unix = Listener::bind_unix(&path, 0o660).await.unwrap();
    assert_eq!(unix.address(), path.display().to_string());
    let serving = serve(vec![tcp, unix], ship, Arc::new(Elsewhere), HttpOptions::default(), cancel.clone());
    let serving = tokio::spawn(serving);
    let answer = get(UnixStream::connect(&path).await.unwrap(), "/info").await;
    assert!(answer.contains("200 OK") && answer.contains("/info privileged=true"), "{answer}");
    let answer = get(TcpStream::connect(&address).await.unwrap(), "/info").await;
    assert!(answer.contains("/info privileged=false"), "{answer}");
    // The paths of shipping answer HTTP/1 too, where it can be.
    let answer = get(TcpStream::connect(&address).await.unwrap(), "/v1/databases/x").await;
    assert!(answer.contains("400 Bad Request") && answer.contains("litefs-protocol: 1.0"), "{answer}");
    cancel.cancel();
    serving.await.unwrap();
}

#[tokio::test]
async fn a_socket_of_a_living_process_is_kept_and_one_of_a_dead_process_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let first = Listener::bind_unix(&path, 0o600).await.unwrap();
    assert!(matches!(Listener::bind_unix(&path, 0o600).await, Err(BindError::InUse(_))));
    drop(first);
    assert!(path.exists(), "the file stays behind");
    Listener::bind_unix(&path, 0o600).await.unwrap();
    // What is no socket is never removed.
    let file = dir.path().join("precious");
    std::fs::write(&file, "data").unwrap();
    assert!(Listener::bind_unix(&file, 0o600).await.is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
    let taken = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let again = Listener::bind_tcp(taken.address().parse().unwrap()).await;
    assert!(matches!(again, Err(BindError::InUse(_))));
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let cancel = CancellationToken::new();
    let node = MemoryNode::new(1) as Arc<dyn Source>;
    let ship = Server::new(node, ServerOptions::new("host-1", "test"), cancel.clone());
    let tcp = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = tcp.address();
    let options = HttpOptions { head_timeout: Duration::from_millis(50), ..HttpOptions::default() };
    tokio::spawn(serve(vec![tcp], ship, Arc::new(Elsewhere), options, cancel));
    for beginning in [&b""[..], b"PRI * HT", b"GET /in"] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(beginning).await.unwrap();
        let mut answer = Vec::new();
        // Ends only when the server closes.
        let read = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "{beginning:?} was left open");
    }
}

#[tokio::test]
async fn too_many_connections_wait_without_harm() {
    let cancel = CancellationToken::new();
    let node = MemoryNode::new(1) as Arc<dyn Source>;
    let ship = Server::new(node, ServerOptions::new("host-1", "test"), cancel.clone());
    let tcp = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = tcp.address();
    let options = HttpOptions { connections_max: 2, ..HttpOptions::default() };
    tokio::spawn(serve(vec![tcp], ship, Arc::new(Elsewhere), options, cancel));
    let idle = [TcpStream::connect(&address).await.unwrap(), TcpStream::connect(&address).await.unwrap()];
    let third = tokio::spawn({
        let address = address.clone();
        async move { get(TcpStream::connect(&address).await.unwrap(), "/info").await }
    });
    drop(idle);
    assert!(third.await.unwrap().contains("200 OK"));
}

#[tokio::test]
async fn shutdown_ends_streams_that_would_never_end() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = super::memory_node::name("a.db");
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    let target = primary.commit(&db, 1, 1);
    super::site::until("an open log stream", || replica.pos(&db) == target).await;
    let stopping = tokio::time::timeout(Duration::from_secs(30), site.stop()).await;
    assert!(stopping.is_ok());
    follower.stop().await;
}
