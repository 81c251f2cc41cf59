//! Records: resume, live tail, large ones, many databases, databases that misbehave.

use super::memory_node::{MemoryNode, content, name};
use super::site::{Site, compared, follow, follow_with, until};
use crate::ship::engine::Source;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

#[tokio::test]
async fn a_follower_resumes_where_it_was_and_then_tails() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("app/a.db");
    primary.commit(&db, 1, 1);
    replica.copy(&primary, &db);
    let target = primary.commits(&db, 2..=50);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the resumed records", || replica.pos(&db) == target).await;
    for n in 51..=60 {
        let target = primary.commit(&db, 2, n);
        until("a live record", || replica.pos(&db) == target).await;
    }
    assert_eq!(replica.pages(&db), primary.pages(&db));
    assert!(replica.seen.lock().installs.is_empty(), "no snapshot was needed");
    assert_eq!(replica.seen.lock().upstreams, [Some("host-1".into())]);
    until("the position for lag", || {
        replica.seen.lock().upstream_positions.get(&db) == Some(&primary.pos(&db))
    })
    .await;
    follower.stop().await;
    assert_eq!(replica.seen.lock().upstreams.last(), Some(&None));
    site.stop().await;
}

#[tokio::test]
async fn acknowledgements_reach_the_source_and_end_with_the_follower() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    replica.copy(&primary, &db);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    let needs = || primary.seen.lock().needs.get(&(2, db.clone())).copied().flatten();
    until("the position in the follower's list", || needs() == Some(ltx::Txid(1))).await;
    for n in 2..=20 {
        primary.commit(&db, 1, n);
    }
    until("the last acknowledgement", || needs() == Some(ltx::Txid(20))).await;
    let followers = site.server.followers();
    assert_eq!(followers.len(), 1);
    assert_eq!(followers[0].identity.node_name, "host-2");
    assert_eq!(followers[0].acknowledged, [(db.clone(), primary.pos(&db))]);
    follower.stop().await;
    until("the end of the needs", || primary.seen.lock().needs[&(2, db.clone())].is_none()).await;
    until("the end of the session", || site.server.followers().is_empty()).await;
}

#[tokio::test]
async fn a_large_record_goes_from_file_to_file() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("big.db");
    primary.commit_pages(&db, 65536, &[(1, content(1, 65536))], 1);
    replica.copy(&primary, &db);
    let pages: Vec<_> = (1..=80).map(|n| (n, content(u64::from(n) + 9, 65536))).collect();
    primary.commit_pages(&db, 65536, &pages, 80);
    primary.last_record_to_file(&db);
    // One that is large and in memory, then a small one.
    primary.commit_pages(&db, 65536, &pages[..40], 80);
    let target = primary.commit_pages(&db, 65536, &pages[..1], 80);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the records", || replica.pos(&db) == target).await;
    assert_eq!(replica.pages(&db), primary.pages(&db));
    assert_eq!(replica.seen.lock().file_records, 2, "both large records came as files");
    follower.stop().await;
    assert_eq!(replica.staged_files(), [""; 0], "nothing is left over");
}

#[tokio::test]
async fn idle_databases_cost_no_stream_and_one_that_moves_costs_one() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let names: Vec<_> = (0..2000).map(|n| name(&format!("tenant/{n}.db"))).collect();
    for db in &names {
        primary.commit(db, 1, 1);
        replica.copy(&primary, db);
    }
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    assert_eq!(follower.status().active, 0);
    let target = primary.commit(&names[777], 1, 2);
    until("the record", || replica.pos(&names[777]) == target).await;
    assert_eq!(follower.status().active, 1);
    // And all at once.
    let targets: Vec<_> = names.iter().map(|db| primary.commit(db, 1, 3)).collect();
    until("all records", || names.iter().zip(&targets).all(|(db, pos)| replica.pos(db) == *pos)).await;
    assert!(replica.seen.lock().installs.is_empty());
}

#[tokio::test]
async fn an_idle_stream_is_closed_and_opened_again_when_the_database_moves() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    replica.copy(&primary, &db);
    let idle =
        |options: &mut crate::ship::server::ServerOptions| options.idle_stream = Duration::from_millis(20);
    let site = Site::start_with(&primary, "127.0.0.1:0".parse().unwrap(), idle).await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    for n in 2..=5 {
        let target = primary.commit(&db, 1, n);
        until("the record", || replica.pos(&db) == target).await;
        until("the end of the idle task", || follower.status().active == 0).await;
    }
}

#[tokio::test]
async fn few_streams_are_shared_by_many_databases() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let names: Vec<_> = (0..20).map(|n| name(&format!("{n}.db"))).collect();
    names.iter().for_each(|db| _ = primary.commit(db, 1, 1));
    let site = Site::start(&primary).await;
    // Streams stay open for a minute when nobody needs their place: they must make room for others.
    let follower = follow_with(&replica, site.address, |options| options.streams_max = 3);
    for n in 2..=4 {
        let targets: Vec<_> = names.iter().map(|db| primary.commit(db, 1, n)).collect();
        until("all databases", || names.iter().zip(&targets).all(|(db, pos)| replica.pos(db) == *pos)).await;
    }
    follower.stop().await;
}

#[tokio::test]
async fn a_slow_database_holds_up_no_other() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let (slow, quick) = (name("slow.db"), name("quick.db"));
    for db in [&slow, &quick] {
        primary.commit_pages(db, 4096, &[(1, content(1, 4096))], 1);
        replica.copy(&primary, db);
    }
    replica.fault(|faults| _ = faults.held.insert(slow.clone()));
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    // Far more than windows and queues take, so that the slow stream is full up to the source.
    let pages: Vec<_> = (1..=200).map(|n| (n, content(u64::from(n), 4096))).collect();
    let end = (0..40).fold(ltx::Pos::default(), |_, _| primary.commit_pages(&slow, 4096, &pages, 200));
    for n in 2..=100 {
        let target = primary.commit_pages(&quick, 4096, &[(1, content(n, 4096))], 1);
        until("the quick database", || replica.pos(&quick) == target).await;
    }
    assert_eq!(replica.pos(&slow).txid.0, 1);
    replica.fault(|faults| _ = faults.held.remove(&slow));
    until("the slow database", || replica.pos(&slow) == end).await;
    // Nothing was dropped and fetched again, and the batches stayed within their bounds.
    assert!(replica.seen.lock().batches.iter().all(|(_, records)| *records <= 256));
    follower.stop().await;
}

#[tokio::test]
async fn a_busy_database_gets_the_same_batch_again() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    replica.copy(&primary, &db);
    replica.fault(|faults| _ = faults.busy.insert(db.clone(), 15));
    let target = primary.commit(&db, 1, 2);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    until("the record", || replica.pos(&db) == target).await;
    assert_eq!(replica.seen.lock().busy_answers, 15);
    until("the recovery", || follower.status().failing.is_empty()).await;
}

#[tokio::test]
async fn a_quarantined_database_stands_back_alone_and_comes_back() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let (bad, good) = (name("bad.db"), name("good.db"));
    for db in [&bad, &good] {
        primary.commit(db, 1, 1);
        replica.copy(&primary, db);
    }
    replica.fault(|faults| _ = faults.quarantined.insert(bad.clone()));
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    let missed = primary.commit(&bad, 1, 2);
    until("the report", || {
        follower.status().failing.iter().any(|(db, why)| *db == bad && why.contains("page 7 is damaged"))
    })
    .await;
    let target = primary.commit(&good, 1, 2);
    until("the good database", || replica.pos(&good) == target).await;
    assert_eq!(replica.pos(&bad).txid.0, 1);
    replica.fault(|faults| faults.quarantined.clear());
    until("the recovery", || replica.pos(&bad) == missed).await;
    until("the end of the report", || follower.status().failing.is_empty()).await;
}

#[tokio::test]
async fn a_database_that_the_upstream_does_not_know_is_left_alone_and_reported() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let (own, shared) = (name("own.db"), name("shared.db"));
    let kept = replica.commit(&own, 1, 1);
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    assert_eq!(follower.status().unknown_upstream, std::slice::from_ref(&own));
    let target = primary.commit(&shared, 1, 1);
    until("the other database", || replica.pos(&shared) == target).await;
    assert_eq!(replica.pos(&own), kept);
}

#[tokio::test]
async fn a_replica_feeds_a_further_replica() {
    let nodes: Vec<_> = (1..=3).map(MemoryNode::new).collect();
    let db = name("a.db");
    let first = Site::start(&nodes[0]).await;
    let second = Site::start(&nodes[1]).await;
    let _followers = [follow(&nodes[1], first.address), follow(&nodes[2], second.address)];
    for n in 1..=30 {
        let target = nodes[0].commit(&db, n as u32 % 5 + 1, n);
        until("the end of the chain", || nodes[2].pos(&db) == target).await;
    }
    assert_eq!(nodes[2].pages(&db), nodes[0].pages(&db));
}

#[tokio::test]
async fn a_restarted_upstream_is_found_again() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    let site = Site::start(&primary).await;
    let address = site.address;
    let follower = follow(&replica, address);
    until("the first record", || replica.pos(&db) == primary.pos(&db)).await;
    site.stop().await;
    until("the loss", || follower.status().upstream.is_none()).await;
    let target = primary.commit(&db, 1, 2);
    let _site = Site::start_with(&primary, address, |_| {}).await;
    until("the second record", || replica.pos(&db) == target).await;
    let upstreams = replica.seen.lock().upstreams.clone();
    assert_eq!(upstreams, [Some("host-1".into()), None, Some("host-1".into())]);
}

#[tokio::test]
async fn news_that_the_source_lost_are_made_up_for() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let names: Vec<_> = (0..300).map(|n| name(&format!("{n}.db"))).collect();
    names.iter().for_each(|db| _ = primary.commit(db, 1, 1));
    let site = Site::start(&primary).await;
    let follower = follow(&replica, site.address);
    compared(&follower).await;
    // The channel of the memory node holds 64 names; these commits come without a pause for its reader.
    let targets: Vec<_> = names.iter().map(|db| primary.commit(db, 1, 2)).collect();
    until("all databases", || names.iter().zip(&targets).all(|(db, pos)| replica.pos(db) == *pos)).await;
}

#[tokio::test]
async fn a_stopping_upstream_says_so() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let site = Site::start(&primary).await;
    let address = site.address;
    let follower = follow(&replica, address);
    compared(&follower).await;
    // Occupies the port at once, so that the reason is not replaced by a refused connection.
    site.stop().await;
    let _silent = TcpListener::bind(address).await.unwrap();
    until("the reason", || follower.status().last_error.is_some_and(|why| why.contains("it is stopping")))
        .await;
}

#[tokio::test]
async fn a_second_connection_of_a_follower_takes_over_from_the_first() {
    let primary = MemoryNode::new(1);
    let (first, second) = (MemoryNode::new(2), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    first.copy(&primary, &db);
    second.copy(&primary, &db);
    let site = Site::start(&primary).await;
    let patient = |options: &mut crate::ship::follow::FollowOptions| {
        options.retry = (Duration::from_secs(3600), Duration::from_secs(3600));
    };
    let follower = follow_with(&first, site.address, patient);
    compared(&follower).await;
    let successor = follow_with(&second, site.address, patient);
    compared(&successor).await;
    super::site::refused(&follower, "took over").await;
    assert_eq!(site.server.followers().len(), 1);
    let needs = primary.seen.lock().needs[&(2, db)];
    assert_eq!(needs, Some(ltx::Txid(1)), "what the second one needs is not forgotten with the first");
}

/// Prints what shipping costs; run with `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_small_records() {
    let (primary, replica) = (MemoryNode::new(1), MemoryNode::new(2));
    let db = name("a.db");
    primary.commit(&db, 1, 1);
    replica.copy(&primary, &db);
    let site = Site::start(&primary).await;
    let _follower = follow(&replica, site.address);
    let mut latencies = Vec::new();
    for n in 2..=1000 {
        let began = std::time::Instant::now();
        let mut news = Source::changes(&*replica);
        let target = primary.commit(&db, 1, n);
        while replica.pos(&db) != target {
            news.recv().await.unwrap();
        }
        latencies.push(began.elapsed());
    }
    latencies.sort();
    println!("{:?}", (0..20).map(|i| latencies[i * 49]).collect::<Vec<_>>());
    println!("commit to visible: median {:?}, p99 {:?}", latencies[500], latencies[989]);
    let committer = Arc::clone(&primary);
    let of = db.clone();
    let began = std::time::Instant::now();
    let target = tokio::task::spawn_blocking(move || committer.commits(&of, 0..20_000));
    let target = target.await.unwrap();
    let committed = began.elapsed();
    while replica.pos(&db) != target {
        tokio::task::yield_now().await;
    }
    println!("20,000 records: committed in {committed:?}, visible after {:?}", began.elapsed());
    println!("in {} batches", replica.seen.lock().batches.len() - 999);
}
