//! Peers that are not what they should be: other clusters, other versions, garbage, liars.

use super::memory_node::{MemoryNode, content, name};
use super::site::{Site, compared, follow, follow_with, refused, scripted, status, until};
use crate::ship::body;
use crate::ship::engine::{Epoch, RecordPayload, Source};
use crate::ship::frame::{EndReason, Frame, RecordHead};
use crate::ship::peer::{Identity, Protocol};
use bytes::BytesMut;
use futures_util::FutureExt;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn identity(node_id: u64) -> Identity {
    Identity { node_id, node_name: format!("host-{node_id}"), cluster: "test".into(), epoch: Epoch(1) }
}

/// Sends a GET with the headers of a node; gives status and text.
pub async fn ask(address: SocketAddr, path: &str, identity: &Identity) -> (u16, String) {
    ask_with(address, path, |headers| identity.write(headers)).await
}

async fn ask_with(
    address: SocketAddr,
    path: &str,
    change: impl FnOnce(&mut http::HeaderMap),
) -> (u16, String) {
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<body::Body>();
    let mut request = Request::get(format!("http://{address}{path}")).body(body::full("")).unwrap();
    change(request.headers_mut());
    let response = client.request(request).await.unwrap();
    let code = response.status().as_u16();
    let text = response.into_body().collect().await.unwrap().to_bytes();
    (code, String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test]
async fn another_cluster_is_refused_by_name() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let site = Site::start(&primary).await;
    let follower = follow_with(&replica, site.address, |options| options.cluster = "other".into());
    refused(&follower, r#"it belongs to cluster "test", this node to "other""#).await;
    let (code, text) =
        ask(site.address, "/v1/databases/log", &Identity { cluster: "x".into(), ..identity(2) }).await;
    assert_eq!(code, 403);
    assert!(text.contains(r#"cluster "x""#) && text.contains(r#"cluster "test""#), "{text}");
    follower.stop().await;
}

#[tokio::test]
async fn a_node_does_not_follow_itself() {
    let node = MemoryNode::new(1);
    let site = Site::start(&node).await;
    let follower = follow(&node, site.address);
    refused(&follower, "it is this node itself").await;
    follower.stop().await;
}

#[tokio::test]
async fn another_protocol_version_is_refused_by_both_sides_with_both_versions() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let site = Site::start(&primary).await;
    let (code, text) = ask_with(site.address, "/v1/databases/log?name=a", |headers| {
        identity(2).write(headers);
        headers.insert("litefs-protocol", HeaderValue::from_static("2.0"));
    })
    .await;
    assert_eq!(code, 426);
    assert!(
        text.contains("protocol 2.0") && text.contains("speaks 1.0") && text.contains("127.0.0.1"),
        "{text}"
    );

    let newer = scripted(|_| {
        async {
            let mut response = status(StatusCode::OK);
            identity(1).write(response.headers_mut());
            let version = Protocol { major: 2, minor: 3 }.to_string();
            response.headers_mut().insert("litefs-protocol", version.parse().unwrap());
            response
        }
        .boxed()
    })
    .await;
    let follower = follow(&replica, newer);
    refused(&follower, "protocol 2.3, this node speaks 1.0").await;
    assert!(follower.status().last_error.unwrap().contains(&newer.to_string()));
    follower.stop().await;
}

#[tokio::test]
async fn a_server_of_another_kind_is_named() {
    let replica = MemoryNode::new(2);
    let other = scripted(|_| async { status(StatusCode::NOT_FOUND) }.boxed()).await;
    let follower = follow(&replica, other);
    refused(&follower, "does not speak LiteFS replication").await;
    follower.stop().await;
    // And one that is no HTTP server at all.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream
                .write_all(b"220 mail.example.org ESMTP ready, and much more than nine bytes\r\n")
                .await;
        }
    });
    let follower = follow(&replica, address);
    refused(&follower, &format!("http://{address}")).await;
    follower.stop().await;
}

#[tokio::test]
async fn garbage_on_the_port_harms_nobody() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let noise = content(99, 4096);
    let pieces = [
        noise.clone(),
        [&preface[..], &noise].concat(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        vec![0; 4096],
        vec![0x16, 3, 1],
    ];
    for (n, garbage) in pieces.iter().enumerate() {
        let mut stream = TcpStream::connect(site.address).await.unwrap();
        // The server may close while this is written.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let target = primary.commit(&db, 1, n as u64);
        until("the record", || replica.pos(&db) == target).await;
    }
    assert_eq!(replica.seen.lock().upstreams.len(), 1, "the follower's connection never broke");
    follower.stop().await;
}

#[tokio::test]
async fn requests_that_make_no_sense_are_answered_with_what_is_wrong() {
    let primary = MemoryNode::new(1);
    let db = name("a b/ä.db");
    let pos = primary.commit(&db, 1, 1);
    let site = Site::start(&primary).await;
    let me = identity(2);
    for (path, code, part) in [
        ("/v1/databases/nothing", 400, "/v1/databases/nothing"),
        ("/v1/follow", 400, "wants POST"),
        ("/v1/databases/log", 400, "name="),
        ("/v1/databases/log?name=..%2Fx&txid=0&checksum=0", 400, "../x"),
        ("/v1/databases/log?name=a&txid=zz", 400, "txid="),
        ("/v1/databases/log?name=no.db&txid=0000000000000000&checksum=0000000000000000", 404, "no.db"),
        ("/v1/databases/snapshot?name=no.db", 404, "no.db"),
        ("/v1/databases/checksum?name=a%20b/%C3%A4.db&txid=0000000000000009", 404, "0000000000000009"),
        ("/v1/databases/checksum?name=a%20b/%C3%A4.db&txid=0000000000000001", 200, &pos.checksum.to_string()),
    ] {
        let (status, text) = ask(site.address, path, &me).await;
        assert_eq!(status, code, "{path}: {text}");
        assert!(text.contains(part), "{path}: {text}");
    }
    let (status, text) = ask_with(site.address, "/v1/databases/log?name=a", |_| {}).await;
    assert_eq!(status, 400);
    assert!(text.contains("does not speak LiteFS replication"), "{text}");
}

/// An upstream that sends what a test wants on its log stream, `attempts` times; then what it should.
async fn liar(
    node: &Arc<MemoryNode>,
    attempts: usize,
    lie: fn(BytesMut) -> BytesMut,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let lies = Arc::new(AtomicUsize::new(0));
    let (node, count) = (Arc::clone(node), Arc::clone(&lies));
    let address = scripted(move |request| {
        let (node, count) = (Arc::clone(&node), Arc::clone(&count));
        async move {
            let db = name("a.db");
            let (sender, body) = body::channel(8);
            let mut response = Response::new(body);
            identity(1).write(response.headers_mut());
            let mut out = BytesMut::new();
            if request.uri().path() == "/v1/follow" {
                Frame::Position { name: db.clone(), pos: node.pos(&db), unix_ms: 0 }.encode(&mut out);
                sender.send(out.freeze()).await.unwrap();
                // The stream stays open until the follower goes.
                tokio::spawn(async move { sender.closed().await });
                return response;
            }
            let record = Source::record(&*node, &db, ltx::Txid(1)).unwrap().unwrap();
            let RecordPayload::Bytes(bytes) = record.payload else { panic!("a small record") };
            let head = RecordHead {
                epoch: record.epoch,
                min_txid: record.min_txid,
                max_txid: record.max_txid,
                post_apply: record.post_apply,
                size: bytes.len() as u64,
            };
            Frame::Record(head, bytes).encode(&mut out);
            if count.fetch_add(1, Ordering::SeqCst) < attempts {
                out = lie(out);
            } else {
                Frame::End(EndReason::Idle).encode(&mut out);
            }
            sender.send(out.freeze()).await.unwrap();
            response
        }
        .boxed()
    })
    .await;
    (address, lies)
}

#[tokio::test]
async fn streams_that_are_corrupt_or_cut_are_asked_for_again_and_never_applied() {
    let flips: [fn(BytesMut) -> BytesMut; 5] = [
        |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            bytes
        },
        |mut bytes| {
            bytes.truncate(bytes.len() - 3);
            bytes
        },
        |mut bytes| {
            bytes.truncate(5);
            bytes
        },
        |_| BytesMut::new(),
        |mut bytes| {
            bytes.clear();
            Frame::RecordChunk(vec![1; 10].into()).encode(&mut bytes);
            bytes
        },
    ];
    for lie in flips {
        let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
        let db = name("a.db");
        let target = primary.commit(&db, 1, 1);
        let (address, lies) = liar(&primary, 3, lie).await;
        let follower = follow(&replica, address);
        until("the right record", || replica.pos(&db) == target).await;
        assert_eq!(lies.load(Ordering::SeqCst), 4);
        assert_eq!(replica.seen.lock().batches.len(), 1, "only the right one was given to the database");
        follower.stop().await;
    }
}

#[tokio::test]
async fn a_large_record_that_is_cut_leaves_nothing_behind() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    let target = primary.commit(&db, 1, 1);
    let (address, _) = liar(&primary, 2, |_| {
        let mut out = BytesMut::new();
        let (min_txid, max_txid) = (ltx::Txid(1), ltx::Txid(1));
        let head = RecordHead {
            epoch: Epoch(1),
            min_txid,
            max_txid,
            post_apply: ltx::Checksum(1 << 63),
            size: 5 << 20,
        };
        Frame::RecordStart(head).encode(&mut out);
        Frame::RecordChunk(vec![7; 256 << 10].into()).encode(&mut out);
        out
    })
    .await;
    let follower = follow(&replica, address);
    until("the right record", || replica.pos(&db) == target).await;
    follower.stop().await;
    assert_eq!(replica.staged_files(), [""; 0]);
}
