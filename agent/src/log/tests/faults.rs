//! A disk that is full, or that fails.

use super::*;
use std::sync::mpsc;

fn is_full(result: Result<Lsn, LogError>) -> bool {
    match result {
        Err(e @ LogError::NoSpace { .. }) => e.to_string().contains("free some space"),
        _ => false,
    }
}

#[test]
fn a_full_disk_refuses_the_commit_and_takes_the_next_one_when_there_is_space() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    fill(&log, &a, 1, 1, 300);
    storage.set_space(Some(5000));
    let mut txid = 2;
    let refused = loop {
        match log.append(&transaction(&a, txid), &payload_of(&a, txid, 300)) {
            Ok(_) => txid += 1,
            Err(e) => break e,
        }
        assert!(txid < 1000, "the disk is full");
    };
    assert!(is_full(Err(refused)));
    assert!(txid > 20, "what is prepared is used up first");
    for _ in 0..3 {
        assert!(is_full(log.append(&transaction(&a, txid), &payload_of(&a, txid, 300))));
    }
    // What is there can be made durable and read, and the failed attempts left no litter.
    log.wait_durable(log.appended()).unwrap();
    assert_eq!(all_records(&log).len() as u64, txid - 1);
    assert!(storage.paths().iter().all(|path| !path.to_str().unwrap().contains("spare")));
    storage.set_space(None);
    fill(&log, &a, txid, txid + 100, 300);
    drop(log);
    let log = open_by_hand(&storage, small());
    assert_eq!(log.kept(&a).unwrap(), Some((Txid(1), Txid(txid + 100))));
}

#[test]
fn a_log_opens_and_reads_on_a_full_disk() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    fill(&log, &a, 1, 100, 300);
    kill(log);
    storage.set_space(Some(0));
    let log = open_by_hand(&storage, small());
    assert_eq!(log.kept(&a).unwrap(), Some((Txid(1), Txid(100))));
    assert!(is_full(log.append(&transaction(&a, 101), b"")));
    drop(log);
    let log = open_by_hand(&storage, small());
    storage.set_space(None);
    fill(&log, &a, 101, 200, 300);
    drop(log);
    let log = open_by_hand(&storage, small());
    assert_eq!((log.damaged(), all_records(&log).len()), (vec![], 200));
}

#[test]
fn a_write_that_stops_half_way_is_no_record() {
    for stop in [0, 1, 100, 135, 200, 430] {
        for killed in [false, true] {
            let storage = MemoryStorage::default();
            let a = name("a");
            let log = open_by_hand(&storage, small());
            fill(&log, &a, 1, 5, 300);
            storage.tear_next_write(stop);
            assert!(is_full(log.append(&transaction(&a, 6), &payload_of(&a, 6, 300))));
            assert_eq!(log.last(&a).unwrap().max_txid, Txid(5));
            if killed {
                kill(log);
            } else {
                // Another record takes its place.
                fill(&log, &a, 6, 6, 8);
                drop(log);
            }
            let log = open_by_hand(&storage, small());
            let expected = if killed { 5 } else { 6 };
            assert_eq!((log.damaged(), all_records(&log).len()), (vec![], expected));
            fill(&log, &a, expected as u64 + 1, 20, 300);
        }
    }
}

#[test]
fn a_large_payload_that_finds_no_space_leaves_nothing_behind() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    fill(&log, &a, 1, 1, 10);
    log.keep_for_test();
    storage.set_space(Some(5000));
    let large = payload_of(&a, 2, 20_000);
    assert!(is_full(log.append(&transaction(&a, 2), &large)));
    assert!(storage.paths().iter().all(|path| !path.starts_with("/data/ltx")));
    storage.set_space(None);
    log.append(&transaction(&a, 2), &large).unwrap();
    assert_eq!(bytes_of(&log, &storage, &log.last(&a).unwrap()), large);
}

#[test]
fn a_file_goes_back_when_the_log_is_full() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    fill(&log, &a, 1, 1, 10);
    let staged = Path::new("/data/x");
    storage.open(staged, true).unwrap().write_at(&payload_of(&a, 2, 20_000), 0).unwrap();
    storage.tear_next_write(0);
    assert!(is_full(log.append_file(&transaction(&a, 2), staged)));
    assert_eq!(storage.content(staged), payload_of(&a, 2, 20_000));
    log.append_file(&transaction(&a, 2), staged).unwrap();
    assert_eq!(bytes_of(&log, &storage, &log.last(&a).unwrap()), payload_of(&a, 2, 20_000));
}

#[test]
fn after_a_failed_fsync_nothing_is_promised_any_more() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = CommitLog::open_on(Arc::new(storage.clone()), Path::new(DIR), small(), true).unwrap();
    let durable = fill(&log, &a, 1, 1, 10);
    log.wait_durable(durable).unwrap();
    storage.set_broken(true);
    let lost = fill(&log, &a, 2, 2, 10);
    let failed = |error: LogError| matches!(error, LogError::Failed { .. });
    assert!(failed(log.wait_durable(lost).unwrap_err()));
    let (sender, receiver) = mpsc::channel();
    log.on_durable(lost, Box::new(move |result| sender.send(result).unwrap()));
    assert!(failed(receiver.recv().unwrap().unwrap_err()));
    // Syncing would work again, but what the kernel dropped would be missing.
    storage.set_broken(false);
    assert!(failed(log.append(&transaction(&a, 3), b"").unwrap_err()));
    assert!(failed(log.wait_durable(lost).unwrap_err()));
    assert_eq!(log.durable(), durable);
    log.wait_durable(durable).unwrap();
    log.read(&log.last(&a).unwrap()).unwrap();
    drop(log);
    // What is opened is written again before it is called durable.
    let before = storage.ops();
    let log = open_by_hand(&storage, small());
    assert_eq!(log.kept(&a).unwrap(), Some((Txid(1), Txid(2))));
    assert!((before..storage.ops()).any(|i| storage.is_sync(i)));
    assert!(log.durable() > lost);
}

#[test]
fn options_that_cannot_work_are_refused() {
    let refused = |options: Options, name: &str| {
        let opened = CommitLog::open_on(Arc::new(MemoryStorage::default()), Path::new(DIR), options, false);
        let error = opened.err().expect("it must be refused");
        assert!(matches!(&error, LogError::BadOption { option, .. } if *option == name), "{error}");
    };
    for segment_bytes in [0, 4096, 20_000, 2 << 30] {
        refused(Options { segment_bytes, ..small() }, "segment_bytes");
    }
    refused(Options { inline_bytes_max: 5000, ..small() }, "inline_bytes_max");
}
