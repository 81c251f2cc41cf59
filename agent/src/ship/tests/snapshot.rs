//! Snapshots: with writes going on, resumed, of dropped databases, of changing page sizes.

use super::memory_node::{MemoryNode, content, name};
use super::site::{Proxy, Site, follow, until};
use crate::DatabaseName;
use ltx::Pos;
use std::sync::atomic::Ordering;

/// A database of `pages` pages of 4096 bytes whose first records are no longer kept.
fn old_database(node: &MemoryNode, db: &DatabaseName, pages: u32) {
    let contents: Vec<_> = (1..=pages).map(|n| (n, content(u64::from(n), 4096))).collect();
    node.commit_pages(db, 4096, &contents, pages);
    node.commit_pages(db, 4096, &contents[..1], pages);
    node.forget_records(db, 2);
}

fn write(node: &MemoryNode, db: &DatabaseName, pgno: u32, fill: u64, commit: u32) -> Pos {
    node.commit_pages(db, 4096, &[(pgno, content(fill, 4096))], commit)
}

#[tokio::test]
async fn a_gap_is_closed_by_a_snapshot_while_writes_go_on() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("app/a.db");
    old_database(&primary, &db, 400);
    // The reading of pages stops half-way until the writes below are done.
    primary.fault(|faults| faults.pages_held_after = 200);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the first pages", || primary.seen.lock().pages_read.len() >= 2).await;
    // Pages that were sent, pages that were not, a shrink below what was sent, and growth with other contents.
    write(&primary, &db, 10, 1001, 400);
    write(&primary, &db, 300, 1002, 400);
    write(&primary, &db, 1, 1003, 120);
    let grown: Vec<_> = (121..=350).map(|n| (n, content(5000 + u64::from(n), 4096))).collect();
    primary.commit_pages(&db, 4096, &grown, 350);
    let before_end = write(&primary, &db, 2, 1004, 350);
    primary.fault(|faults| faults.pages_held_after = 0);
    until("the snapshot", || !replica.seen.lock().installs.is_empty()).await;
    let installed = replica.seen.lock().installs[0].clone();
    assert_eq!((installed.0, installed.2), (db.clone(), None));
    assert!(installed.1.txid >= before_end.txid, "it is at one exact position, with all writes");
    for n in 0..20 {
        let target = write(&primary, &db, n + 1, 7000 + u64::from(n), 350);
        until("the live tail", || replica.pos(&db) == target).await;
    }
    assert_eq!(replica.pages(&db), primary.pages(&db));
    assert_eq!(replica.seen.lock().installs.len(), 1);
    follower.stop().await;
    assert_eq!(replica.staged_files(), [""; 0], "nothing is left over");
}

#[tokio::test]
async fn records_that_the_base_needs_are_asked_for_while_a_snapshot_is_taken() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    old_database(&primary, &db, 400);
    primary.fault(|faults| faults.pages_held_after = 200);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    let needs = || primary.seen.lock().needs.get(&(2, db.clone())).copied().flatten();
    until("the base is noted", || needs() == Some(ltx::Txid(2))).await;
    primary.fault(|faults| faults.pages_held_after = 0);
    let target = write(&primary, &db, 5, 1, 400);
    until("the acknowledgement", || needs() == Some(target.txid)).await;
    follower.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_was_cut_goes_on_with_the_next_page() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    old_database(&primary, &db, 1000);
    let site = Site::start(&primary).await;
    let proxy = Proxy::start(site.address).await;
    proxy.state.budget.store(2_000_000, Ordering::SeqCst);
    let follower = follow(&replica, proxy.address);
    until("the snapshot", || replica.pos(&db) == primary.pos(&db)).await;
    assert_eq!(proxy.state.cuts.load(Ordering::SeqCst), 1, "the connection was cut once");
    assert_eq!(replica.pages(&db), primary.pages(&db));
    // Only what was on its way when the connection was cut is read twice.
    let reads = primary.seen.lock().pages_read.clone();
    let again = 1 + reads.windows(2).position(|pair| pair[1].start() <= pair[0].start()).unwrap();
    let resumed = *reads[again].start();
    assert!(resumed > 200, "it began again at page {resumed}");
    assert!(reads[again..].iter().all(|range| *range.start() >= resumed));
    follower.stop().await;
    assert_eq!(replica.staged_files(), [""; 0]);
}

#[tokio::test]
async fn a_snapshot_goes_on_after_a_restart_of_the_follower() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    old_database(&primary, &db, 1000);
    primary.fault(|faults| faults.pages_held_after = 500);
    let site = Site::start(&primary).await;
    let first = follow(&replica, site.address);
    until("half of the pages", || replica.staged_bytes(&db) >= 300 * 4096).await;
    first.stop().await;
    let reads = primary.seen.lock().pages_read.len();
    primary.fault(|faults| faults.pages_held_after = 0);
    let second = follow(&replica, site.address);
    until("the snapshot", || replica.pos(&db) == primary.pos(&db)).await;
    // The read that was held when the first one stopped may come to its end now.
    let again = primary.seen.lock().pages_read[reads..].to_vec();
    assert!(again.iter().all(|range| *range.start() > 300), "{again:?}");
    second.stop().await;
    assert_eq!(replica.staged_files(), [""; 0]);
    assert_eq!(replica.pages(&db), primary.pages(&db));
}

#[tokio::test]
async fn a_snapshot_whose_base_is_no_longer_kept_begins_anew() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    old_database(&primary, &db, 1000);
    primary.fault(|faults| faults.pages_held_after = 500);
    let site = Site::start(&primary).await;
    let proxy = Proxy::start(site.address).await;
    let follower = follow(&replica, proxy.address);
    until("half of the pages", || primary.seen.lock().pages_read.iter().any(|range| *range.start() > 300))
        .await;
    write(&primary, &db, 7, 4711, 1000);
    write(&primary, &db, 8, 4712, 1000);
    primary.forget_records(&db, 3);
    let reads = primary.seen.lock().pages_read.len();
    proxy.state.budget.store(0, Ordering::SeqCst);
    primary.fault(|faults| faults.pages_held_after = 0);
    until("the snapshot", || replica.pos(&db) == primary.pos(&db)).await;
    assert!(primary.seen.lock().pages_read[reads..].iter().any(|range| *range.start() == 1));
    assert_eq!(replica.pages(&db), primary.pages(&db));
    follower.stop().await;
}

#[tokio::test]
async fn a_dropped_database_is_dropped_by_snapshot_and_by_record() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    old_database(&primary, &db, 10);
    primary.commit_pages(&db, 4096, &[], 0);
    primary.forget_records(&db, 3);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the drop", || replica.pos(&db) == primary.pos(&db)).await;
    assert_eq!(replica.pages(&db).len(), 0);
    // It is made again with other pages, while the replica follows.
    let target = primary.commit_pages(&db, 512, &[(1, content(1, 512))], 1);
    until("the new one", || replica.pos(&db) == target).await;
    assert_eq!(replica.pages(&db), primary.pages(&db));
    follower.stop().await;
}

#[tokio::test]
async fn a_page_size_that_changes_under_a_snapshot_makes_it_begin_anew() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    old_database(&primary, &db, 400);
    primary.fault(|faults| faults.pages_held_after = 200);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the first pages", || primary.seen.lock().pages_read.len() >= 2).await;
    let pages: Vec<_> = (1..=900).map(|n| (n, content(u64::from(n), 1024))).collect();
    primary.commit_pages(&db, 1024, &pages, 900);
    primary.fault(|faults| faults.pages_held_after = 0);
    until("the snapshot", || replica.pos(&db) == primary.pos(&db)).await;
    assert_eq!(replica.pages(&db), primary.pages(&db));
    assert_eq!(replica.seen.lock().installs.len(), 1);
    follower.stop().await;
}

#[tokio::test]
async fn a_snapshot_with_wrong_bytes_is_never_installed() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    old_database(&primary, &db, 300);
    // The upstream reads a page that is not what its checksum says.
    let right = primary.pages(&db)[250].clone();
    primary.databases.lock().get_mut(&db).unwrap().pages[250][17] ^= 4;
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    let reported = || follower.status().failing.iter().any(|(_, why)| why.contains("it has checksum"));
    until("the report", reported).await;
    assert!(replica.seen.lock().installs.is_empty());
    primary.databases.lock().get_mut(&db).unwrap().pages[250] = right;
    until("the snapshot", || replica.pos(&db) == primary.pos(&db)).await;
    until("the end of the report", || follower.status().failing.is_empty()).await;
    follower.stop().await;
}

#[tokio::test]
async fn many_databases_are_taken_as_snapshots_with_few_at_once() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let names: Vec<_> = (0..50).map(|n| name(&format!("dir/{n}.db"))).collect();
    names.iter().for_each(|db| old_database(&primary, db, 20));
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    let complete = || names.iter().all(|db| replica.pos(db) == primary.pos(db));
    until("all snapshots", complete).await;
    assert!(names.iter().all(|db| replica.pages(db) == primary.pages(db)));
    follower.stop().await;
}
