//! Half-open connections: the peer's host is gone and nobody says so.

use super::memory_node::{MemoryNode, name};
use super::site::{Proxy, Site, compared, follow_with, refused, until};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(1);
const HEARTBEAT: Duration = Duration::from_millis(100);

async fn site(node: &Arc<MemoryNode>) -> Site {
    Site::start_with(node, "127.0.0.1:0".parse().unwrap(), |options| {
        options.timeout = TIMEOUT;
        options.heartbeat = HEARTBEAT;
    })
    .await
}

#[tokio::test]
async fn both_ends_notice_a_half_open_connection_and_the_follower_comes_back() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    let site = site(&primary).await;
    let proxy = Proxy::start(site.address).await;
    let follower = follow_with(&replica, proxy.address, |options| {
        options.timeout = TIMEOUT;
        options.heartbeat = HEARTBEAT;
    });
    let needs = || primary.seen.lock().needs.get(&(2, db.clone())).copied().flatten();
    until("the acknowledgement", || needs() == Some(ltx::Txid(1))).await;
    let frozen_at = std::time::Instant::now();
    proxy.state.frozen.send_replace(0..usize::MAX);
    let missed = primary.commit(&db, 1, 2);
    until("the follower's notice", || follower.status().upstream.is_none()).await;
    until("the server's notice", || site.server.followers().is_empty()).await;
    assert!(frozen_at.elapsed() >= HEARTBEAT, "nobody gave up before it was due");
    assert_eq!(needs(), None, "the source was told that the follower left");
    until("the report to the node", || replica.seen.lock().upstreams.contains(&None)).await;
    proxy.state.frozen.send_replace(0..0);
    until("the missed record", || replica.pos(&db) == missed).await;
    follower.stop().await;
}

#[tokio::test]
async fn a_half_open_connection_for_records_is_replaced_alone() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    let site = site(&primary).await;
    let proxy = Proxy::start(site.address).await;
    let follower = follow_with(&replica, proxy.address, |options| {
        options.timeout = TIMEOUT;
        options.heartbeat = HEARTBEAT;
    });
    until("the record", || replica.pos(&db) == primary.pos(&db)).await;
    // The first connection carries control, the second records.
    proxy.state.frozen.send_replace(1..2);
    let missed = primary.commit(&db, 1, 2);
    until("the missed record", || replica.pos(&db) == missed).await;
    assert_eq!(proxy.state.connections.load(Ordering::SeqCst), 3);
    assert_eq!(replica.seen.lock().upstreams.len(), 1, "the control stream was never lost");
    follower.stop().await;
}

#[tokio::test]
async fn a_quiet_but_living_connection_is_kept() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let site = site(&primary).await;
    let follower = follow_with(&replica, site.address, |options| {
        options.timeout = Duration::from_secs(5);
        options.heartbeat = HEARTBEAT;
    });
    compared(&follower).await;
    let heard = follower.status().upstream.unwrap().heard_unix_ms;
    // Longer than the server's timeout, counted in heartbeats.
    let later = heard + 3 * TIMEOUT.as_millis() as i64;
    until("heartbeats", || follower.status().upstream.is_some_and(|u| u.heard_unix_ms > later)).await;
    assert_eq!(replica.seen.lock().upstreams.len(), 1, "the connection was never lost");
    follower.stop().await;
}

#[tokio::test]
async fn an_upstream_that_accepts_and_says_nothing_is_given_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let replica = MemoryNode::new(2);
    let address = silent.local_addr().unwrap();
    let follower = follow_with(&replica, address, |options| options.timeout = TIMEOUT);
    refused(&follower, &format!("http://{address}")).await;
    assert!(replica.seen.lock().upstreams.is_empty());
    follower.stop().await;
}
