//! The oldest segments go, and nothing that is needed.

use super::*;

/// A log of several segments with records of `a`, whose times are their TXIDs.
fn filled(storage: &MemoryStorage, options: Options) -> CommitLog {
    let log = open_by_hand(storage, options);
    fill(&log, &name("a"), 1, 200, 300);
    log.wait_durable(log.appended()).unwrap();
    log.keep_for_test();
    log
}

fn lsn_of(log: &CommitLog, txid: u64) -> Lsn {
    log.find(&name("a"), Txid(txid)).unwrap().unwrap().lsn
}

#[test]
fn segments_go_by_the_age_of_their_newest_record() {
    let storage = MemoryStorage::default();
    let log = filled(&storage, Options { retention_age: Duration::from_millis(1000), ..small() });
    let all = log.shared.segments.all();
    assert!(all.len() > 5);
    let unneeded = log.appended();
    let old = log.find(&name("a"), Txid(1)).unwrap().unwrap();
    assert_eq!(log.enforce_retention(1000, unneeded, unneeded).unwrap().removed, 0);
    let retained = log.enforce_retention(1100, unneeded, unneeded).unwrap();
    assert!(retained.removed > 0 && !retained.followers_cut);
    // The segment with the record of time 100 has a newer one, and so stays.
    let (first, last) = log.kept(&name("a")).unwrap().unwrap();
    assert!(first <= Txid(101) && first > Txid(60), "{first}");
    assert_eq!((last, retained.oldest), (Txid(200), lsn_of(&log, first.0)));
    assert_eq!(log.find(&name("a"), Txid(first.0 - 1)).unwrap(), None);
    assert!(matches!(log.read(&old), Err(LogError::Gone { .. })));
    for txid in first.0..=200 {
        assert_eq!(log.find(&name("a"), Txid(txid)).unwrap().unwrap().min_txid, Txid(txid));
    }
    assert_eq!((all_records(&log).len() as u64, log.damaged()), (201 - first.0, vec![]));
    drop(log);
    let log = open_by_hand(&storage, small());
    assert_eq!(log.kept(&name("a")).unwrap(), Some((first, Txid(200))));
}

#[test]
fn segments_go_when_there_is_too_much_but_never_the_newest() {
    let storage = MemoryStorage::default();
    let log = filled(&storage, Options { retention_bytes: 40 << 10, ..small() });
    let before = log.disk_bytes();
    let retained = log.enforce_retention(0, log.appended(), log.appended()).unwrap();
    assert_eq!((retained.bytes, retained.bytes), (log.disk_bytes(), 2 * (16 << 10)));
    assert!(before > retained.bytes);
    drop(log);
    let log = open_by_hand(&storage, Options { retention_bytes: 0, ..small() });
    log.enforce_retention(i64::MAX, log.appended(), log.appended()).unwrap();
    assert_eq!(log.shared.segments.all().len(), 1);
    assert!(log.last(&name("a")).is_some());
}

#[test]
fn what_is_needed_stays_whatever_its_age_and_size() {
    let storage = MemoryStorage::default();
    let log = filled(&storage, Options { retention_bytes: 0, retention_age: Duration::ZERO, ..small() });
    let needed = lsn_of(&log, 70);
    log.enforce_retention(i64::MAX, needed, log.appended()).unwrap();
    assert_eq!(lsn_of(&log, 70), needed);
    assert!(log.kept(&name("a")).unwrap().unwrap().0 > Txid(20));
    let retained = log.enforce_retention(i64::MAX, needed, log.appended()).unwrap();
    assert_eq!(retained.removed, 0);
}

#[test]
fn followers_hold_what_is_too_old_but_not_what_is_too_much() {
    let storage = MemoryStorage::default();
    let options = Options { retention_age: Duration::ZERO, ..small() };
    let log = filled(&storage, options.clone());
    let follower = lsn_of(&log, 70);
    let retained = log.enforce_retention(i64::MAX, log.appended(), follower).unwrap();
    assert!(retained.removed > 0 && !retained.followers_cut);
    assert_eq!(lsn_of(&log, 70), follower);
    drop(log);
    let log = open_by_hand(&storage, Options { retention_bytes: 40 << 10, ..options });
    let retained = log.enforce_retention(i64::MAX, log.appended(), follower).unwrap();
    assert!(retained.removed > 0 && retained.followers_cut);
    assert_eq!(log.find(&name("a"), Txid(70)).unwrap(), None);
}

#[test]
fn a_segment_that_is_used_again_gives_no_old_record_away() {
    let storage = MemoryStorage::default();
    let log = filled(&storage, small());
    let old = all_records(&log);
    let retained = log.enforce_retention(i64::MAX, log.appended(), log.appended()).unwrap();
    assert!(retained.removed >= 5);
    let spares = storage.paths().iter().filter(|path| path.to_str().unwrap().contains("spare")).count();
    assert!((1..=3).contains(&spares), "{spares} spares");
    let mut txid = 200;
    for _ in 0..10 {
        // Each round ends in the middle of a segment that was used before, full of old records of equal length.
        for _ in 0..40 {
            txid += 1;
            fill(&log, &name("a"), txid, txid, 300);
        }
        log.wait_durable(log.appended()).unwrap();
        log.keep_for_test();
        let crashed = open_by_hand(&storage.copy(), small());
        assert_eq!(crashed.damaged(), []);
        assert_eq!(all_records(&crashed), all_records(&log));
        assert_eq!(crashed.last(&name("a")).unwrap().max_txid, Txid(txid));
        log.enforce_retention(i64::MAX, log.appended(), log.appended()).unwrap();
    }
    assert!(matches!(log.read(&old[0]), Err(LogError::Gone { .. })));
}

#[test]
fn external_payloads_count_and_go_with_their_segment() {
    let storage = MemoryStorage::default();
    let log = open_by_hand(&storage, Options { retention_bytes: 100_000, ..small() });
    let (a, b) = (name("a"), name("b"));
    log.append(&transaction(&b, 1), &payload_of(&b, 1, 90_000)).unwrap();
    fill(&log, &a, 1, 60, 300);
    log.wait_durable(log.appended()).unwrap();
    log.keep_for_test();
    assert!(log.disk_bytes() > 90_000 + (32 << 10));
    let external = |storage: &MemoryStorage| storage.paths().iter().any(|path| path.starts_with("/data/ltx"));
    assert!(external(&storage));
    let retained = log.enforce_retention(0, log.appended(), log.appended()).unwrap();
    assert_eq!((retained.removed, external(&storage)), (1, false));
    // Nothing of `b` is left.
    assert_eq!((log.last(&b), log.kept(&b).unwrap(), log.databases()), (None, None, vec![a.clone()]));
    drop(log);
    let log = open_by_hand(&storage, small());
    assert_eq!(log.databases(), [a]);
}

#[test]
fn an_external_file_without_record_is_removed_when_the_log_is_opened() {
    let storage = MemoryStorage::default();
    let log = filled(&storage, small());
    log.append(&transaction(&name("a"), 201), &payload_of(&name("a"), 201, 5000)).unwrap();
    drop(log);
    let orphan = Path::new("/data/ltx/a/0000000000000300-0000000000000300.ltx");
    storage.open(orphan, true).unwrap();
    let log = open_by_hand(&storage, small());
    assert!(storage.open(orphan, false).is_err());
    assert_eq!(bytes_of(&log, &storage, &log.last(&name("a")).unwrap()).len(), 5000);
}
