//! Histories that part, and epochs.

use super::memory_node::{Database, MemoryNode, name};
use super::site::{Site, compared, follow, follow_with, refused, until};
use ltx::Txid;
use std::time::Duration;

#[tokio::test]
async fn a_diverged_follower_takes_a_snapshot_and_knows_the_last_common_transaction() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commits(&db, 1..=40);
    replica.copy(&primary, &db);
    primary.commits(&db, (0..10).map(|n| 1000 + n));
    replica.commits(&db, (0..10).map(|n| 2000 + n));
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the new history", || replica.pos(&db) == primary.pos(&db)).await;
    assert_eq!(replica.seen.lock().installs, [(db.clone(), primary.pos(&db), Some(Txid(40)))]);
    let target = primary.commit(&db, 1, 1);
    until("the tail", || replica.pos(&db) == target).await;
    follower.stop().await;
}

#[tokio::test]
async fn a_follower_that_is_ahead_is_cut_back_to_the_last_common_transaction() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commits(&db, 1..=10);
    replica.copy(&primary, &db);
    replica.commits(&db, (0..3).map(|n| 2000 + n));
    // A new term has begun: its history is the right one at once.
    primary.set_epoch(2);
    let site = Site::start(&primary).await;
    let patient = |options: &mut crate::ship::follow::FollowOptions| {
        options.behind_grace = Duration::from_secs(3600);
    };
    let follower = follow_with(&replica, site.address, patient);
    until("the shorter history", || replica.pos(&db) == primary.pos(&db)).await;
    assert_eq!(replica.seen.lock().installs, [(db.clone(), primary.pos(&db), Some(Txid(10)))]);
    follower.stop().await;
}

#[tokio::test]
async fn an_upstream_of_the_same_term_that_lags_behind_is_waited_for() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    let middle = primary.commits(&db, 1..=5);
    primary.commits(&db, 6..=9);
    replica.copy(&primary, &db);
    // The upstream is a replica that has only half of it yet.
    let lagging = MemoryNode::new(3);
    lagging.copy(&primary, &db);
    {
        let mut databases = lagging.databases.lock();
        let db = databases.get_mut(&db).unwrap();
        db.pos = middle;
        db.records.retain(|min, _| *min <= 5);
    }
    let site = Site::start(&lagging).await;
    let patient = |options: &mut crate::ship::follow::FollowOptions| {
        options.behind_grace = Duration::from_secs(3600);
    };
    let follower = follow_with(&replica, site.address, patient);
    until("the report", || follower.status().failing.iter().any(|(_, why)| why.contains("is behind"))).await;
    lagging.copy(&primary, &db);
    let target = lagging.commit(&db, 1, 10);
    until("the next record", || replica.pos(&db) == target).await;
    assert!(replica.seen.lock().installs.is_empty(), "nothing was rolled back");
    until("the end of the report", || follower.status().failing.is_empty()).await;
    follower.stop().await;
}

#[tokio::test]
async fn a_follower_refuses_an_upstream_of_an_older_epoch() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    primary.set_epoch(4);
    replica.set_epoch(5);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    refused(&follower, "its epoch 4 is older than epoch 5").await;
    assert_eq!(replica.pos(&db).txid, Txid(0));
    // The same upstream in a newer term is followed.
    primary.set_epoch(6);
    until("the record", || replica.pos(&db) == primary.pos(&db)).await;
    assert_eq!(crate::ship::engine::Sink::epoch(&*replica).0, 6, "the newer epoch was adopted");
    follower.stop().await;
}

#[tokio::test]
async fn an_upstream_refuses_a_follower_of_a_newer_epoch_and_says_that_it_is_stale() {
    let primary = MemoryNode::new(1);
    primary.set_epoch(4);
    let site = Site::start(&primary).await;
    let identity = crate::ship::peer::Identity {
        node_id: 2,
        node_name: "host-2".into(),
        cluster: "test".into(),
        epoch: crate::ship::engine::Epoch(5),
    };
    let (status, text) = super::peers::ask(site.address, "/v1/databases/log?name=a", &identity).await;
    assert_eq!(status, 412);
    assert!(text.contains("is stale") && text.contains("epoch 4") && text.contains("epoch 5"), "{text}");
}

#[tokio::test]
async fn an_epoch_that_moves_during_a_session_is_noticed_both_ways() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let site = Site::start_with(&primary, "127.0.0.1:0".parse().unwrap(), |options| {
        options.heartbeat = Duration::from_millis(5);
    })
    .await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    primary.set_epoch(7);
    until("the newer epoch", || crate::ship::engine::Sink::epoch(&*replica).0 == 7).await;
    // The follower hears of a newer epoch from somewhere else: its upstream is stale from then on.
    replica.set_epoch(8);
    refused(&follower, "its epoch 7 is older than epoch 8").await;
    follower.stop().await;
}

#[tokio::test]
async fn records_of_earlier_terms_are_shipped_in_later_ones() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    primary.set_epoch(9);
    primary.commit(&db, 1, 2);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("both records", || replica.pos(&db) == primary.pos(&db)).await;
    assert!(replica.seen.lock().installs.is_empty());
    follower.stop().await;
}

#[tokio::test]
async fn an_upstream_without_transactions_never_empties_a_follower() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    let kept = replica.commits(&db, 1..=5);
    // The upstream has the name, and nothing in it yet.
    primary.databases.lock().insert(db.clone(), Database::default());
    primary.set_epoch(3);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    assert_eq!(follower.status().unknown_upstream, std::slice::from_ref(&db));
    assert_eq!(replica.pos(&db), kept);
    // Its first transaction is another history.
    let target = primary.commit(&db, 1, 99);
    until("the other history", || replica.pos(&db) == target).await;
    assert_eq!(replica.seen.lock().installs, [(db.clone(), target, None)]);
    until("the end of the report", || follower.status().unknown_upstream.is_empty()).await;
    follower.stop().await;
}

#[tokio::test]
async fn a_database_that_is_quarantined_at_the_upstream_is_reported_and_waited_for() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commits(&db, 1..=5);
    primary.fault(|faults| faults.unreadable = true);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    let reported = || follower.status().failing.iter().any(|(_, why)| why.contains("page 7 is damaged"));
    until("the report", reported).await;
    primary.fault(|faults| faults.unreadable = false);
    until("the records", || replica.pos(&db) == primary.pos(&db)).await;
    until("the end of the report", || follower.status().failing.is_empty()).await;
    follower.stop().await;
}

#[tokio::test]
async fn a_database_that_was_set_aside_is_healed_when_the_node_asks() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commits(&db, 1..=5);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the records", || replica.pos(&db) == primary.pos(&db)).await;
    // As a node says of a database that it does not trust: no history has this checksum.
    replica.databases.lock().get_mut(&db).unwrap().pos.checksum = ltx::Checksum(0);
    follower.stop().await;
    let follower =
        follow_with(&replica, site.address, |options| options.behind_grace = Duration::from_secs(3600));
    until("the healed database", || replica.pos(&db) == primary.pos(&db)).await;
    assert_eq!(replica.seen.lock().installs.len(), 1, "healed when the follower connected");

    // Now with a log stream that is open and idle, which asks for no news by itself.
    let target = primary.commit(&db, 1, 77);
    until("the tail", || replica.pos(&db) == target).await;
    replica.databases.lock().get_mut(&db).unwrap().pos.checksum = ltx::Checksum(0);
    follower.recheck(db.clone());
    until("the healed database", || replica.seen.lock().installs.len() == 2).await;
    assert_eq!(replica.pos(&db), primary.pos(&db));
    let target = primary.commit(&db, 1, 78);
    until("the tail", || replica.pos(&db) == target).await;
    follower.stop().await;
}
