//! What is appended is found again: in memory, and after opening anew.

use super::*;
use std::sync::mpsc;
use std::time::{Duration, Instant};

#[test]
fn records_of_many_databases_come_back_in_order_and_whole() {
    let storage = MemoryStorage::default();
    let databases: Vec<_> = (0..7).map(|i| name(&format!("d{i}/x.db"))).collect();
    let log = open_by_hand(&storage, small());
    let mut appended = Vec::new();
    for txid in 1..=40 {
        for database in &databases {
            let payload = payload_of(database, txid, (txid as usize * 37) % 900);
            let end = log.append(&transaction(database, txid), &payload).unwrap();
            appended.push((database.clone(), txid, payload, end));
        }
    }
    log.wait_durable(log.appended()).unwrap();
    let check = |log: &CommitLog| {
        let records = all_records(log);
        assert_eq!(records.len(), appended.len());
        for (info, (database, txid, payload, end)) in records.iter().zip(&appended) {
            assert_eq!((&info.database, info.min_txid.0, info.end()), (database, *txid, *end));
            assert_eq!(&bytes_of(log, &storage, info), payload);
            let new = transaction(database, *txid);
            assert_eq!(
                (info.epoch, info.pre_apply, info.post_apply),
                (new.epoch, new.pre_apply, new.post_apply)
            );
            assert_eq!((info.page_size, info.commit, info.wal), (new.page_size, new.commit, new.wal));
            assert_eq!((info.timestamp_ms, info.kind), (new.timestamp_ms, new.kind));
        }
        let mut names = log.databases();
        names.sort();
        assert_eq!(names, databases);
    };
    check(&log);
    drop(log);
    check(&open_by_hand(&storage, small()));
}

#[test]
fn every_transaction_is_found_and_no_other() {
    let storage = MemoryStorage::default();
    let (a, b) = (name("a"), name("b"));
    let log = open_by_hand(&storage, small());
    // Records of several transactions each, between those of another database.
    for i in 0..300 {
        let record = NewRecord {
            min_txid: Txid(i * 3 + 1),
            max_txid: Txid(i * 3 + 3),
            pre_apply: Checksum(i),
            post_apply: Checksum(i + 1),
            ..transaction(&a, 1)
        };
        log.append(&record, b"x").unwrap();
        fill(&log, &b, i + 1, i + 1, 20);
    }
    let check = |log: &CommitLog| {
        assert_eq!(log.kept(&a).unwrap(), Some((Txid(1), Txid(900))));
        for txid in 1..=900 {
            let found = log.find(&a, Txid(txid)).unwrap().unwrap();
            assert_eq!((found.min_txid.0, &found.database), ((txid - 1) / 3 * 3 + 1, &a));
        }
        assert_eq!(log.find(&a, Txid(0)).unwrap(), None);
        assert_eq!(log.find(&a, Txid(901)).unwrap(), None);
        assert_eq!(log.find(&name("c"), Txid(1)).unwrap(), None);
        assert_eq!(log.kept(&name("c")).unwrap(), None);
        assert_eq!(log.last(&a).unwrap().max_txid, Txid(900));
    };
    check(&log);
    drop(log);
    check(&open_by_hand(&storage, small()));
}

#[test]
fn reading_from_a_position_starts_with_its_record() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    fill(&log, &a, 1, 100, 400);
    for (i, info) in all_records(&log).iter().enumerate() {
        for (from, first) in [(info.lsn, i), (Lsn(info.lsn.0 + 8), i + 1)] {
            let (records, damaged) = records_from(&log, from);
            assert_eq!((records.len(), damaged.len()), (100 - first, 0));
            assert!(records.first().is_none_or(|r| r.min_txid.0 == first as u64 + 1));
        }
    }
    let third = log.records_from(Lsn(0), |visit| match visit {
        Visit::Record(info) if info.min_txid.0 == 3 => ControlFlow::Break(info.lsn),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(third.unwrap().unwrap(), log.find(&a, Txid(3)).unwrap().unwrap().lsn);
}

#[test]
fn a_large_payload_becomes_a_file() {
    let storage = MemoryStorage::default();
    let a = name("app/a.db");
    let log = open_by_hand(&storage, small());
    let payload = payload_of(&a, 1, 100_000);
    log.append(&transaction(&a, 1), &payload).unwrap();
    storage.create_dir(Path::new("/data/staging")).unwrap();
    let staged = Path::new("/data/staging/x");
    let second = payload_of(&a, 2, 50_000);
    storage.open(staged, true).unwrap().write_at(&second, 0).unwrap();
    log.append_file(&transaction(&a, 2), staged).unwrap();
    assert!(storage.open(staged, false).is_err());
    drop(log);
    let log = open_by_hand(&storage, small());
    let [first, last] = &all_records(&log)[..] else { panic!("two records") };
    let expected = "/data/ltx/app%2Fa.db/0000000000000001-0000000000000001.ltx";
    assert_eq!(log.read(first).unwrap(), Payload::File { path: expected.into(), size: 100_000 });
    assert_eq!(bytes_of(&log, &storage, first), payload);
    assert_eq!(bytes_of(&log, &storage, last), second);
    assert_eq!(last.payload_bytes(), 50_000);
}

#[test]
fn a_file_that_is_refused_stays_where_it_was() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    fill(&log, &a, 1, 1, 10);
    let staged = Path::new("/data/x");
    storage.open(staged, true).unwrap().write_at(b"content", 0).unwrap();
    let error = log.append_file(&transaction(&a, 5), staged).unwrap_err();
    assert!(matches!(error, LogError::OutOfSequence { .. }), "{error}");
    assert_eq!(storage.content(staged), b"content");
}

#[test]
fn history_begins_anew_with_a_reset() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    let before = fill(&log, &a, 1, 100, 100);
    log.append(&reset(&a, 50), b"snapshot").unwrap();
    let check = |log: &CommitLog, last| {
        assert_eq!(log.kept(&a).unwrap(), Some((Txid(50), Txid(last))));
        let found = log.find(&a, Txid(50)).unwrap().unwrap();
        assert_eq!((found.kind, found.post_apply, found.lsn), (RecordKind::Reset, Checksum(50), before));
        assert_eq!(log.find(&a, Txid(49)).unwrap(), None);
        assert_eq!(log.find(&a, Txid(1)).unwrap(), None);
    };
    check(&log, 50);
    assert_eq!(log.find(&a, Txid(51)).unwrap(), None);
    fill(&log, &a, 51, 200, 100);
    check(&log, 200);
    assert_eq!(log.find(&a, Txid(75)).unwrap().unwrap().lsn, records_from(&log, before).0[25].lsn);
    drop(log);
    let log = open_by_hand(&storage, small());
    check(&log, 200);
    assert_eq!(all_records(&log).len(), 251);
}

#[test]
fn external_files_of_the_same_transactions_do_not_replace_each_other() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    log.append(&transaction(&a, 1), &payload_of(&a, 1, 10_000)).unwrap();
    log.append(&NewRecord { kind: RecordKind::Reset, ..transaction(&a, 1) }, &payload_of(&a, 7, 20_000))
        .unwrap();
    let records = all_records(&log);
    assert_eq!(bytes_of(&log, &storage, &records[0]), payload_of(&a, 1, 10_000));
    assert_eq!(bytes_of(&log, &storage, &records[1]), payload_of(&a, 7, 20_000));
}

#[test]
fn what_does_not_follow_is_refused_and_changes_nothing() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    fill(&log, &a, 1, 3, 10);
    let refused = |record: NewRecord<'_>| log.append(&record, b"x").unwrap_err();
    for txid in [3, 5] {
        assert!(matches!(refused(transaction(&a, txid)), LogError::OutOfSequence { .. }));
    }
    let other = NewRecord { pre_apply: Checksum(77), ..transaction(&a, 4) };
    assert!(matches!(refused(other), LogError::OutOfSequence { .. }));
    let old = NewRecord { epoch: Epoch(0), ..transaction(&a, 4) };
    assert!(matches!(refused(old), LogError::OldEpoch { epoch: 0, last: 1, .. }));
    let fenced = NewRecord { fence: Some(&Closed), ..transaction(&a, 4) };
    assert!(matches!(log.append(&fenced, b"x"), Err(LogError::Fenced { .. })));
    assert!(matches!(log.append(&fenced, &[7; 30_000]), Err(LogError::Fenced { .. })));
    let backwards = NewRecord { max_txid: Txid(3), ..transaction(&a, 4) };
    assert!(matches!(refused(backwards), LogError::BadRecord { .. }));
    fill(&log, &a, 4, 4, 10);
    assert_eq!(all_records(&log).len(), 4);
}

#[test]
fn eight_threads_share_fsyncs() {
    let storage = MemoryStorage::default();
    let log = CommitLog::open_on(Arc::new(storage.clone()), Path::new(DIR), small(), true).unwrap();
    std::thread::scope(|scope| {
        for i in 0..8 {
            let log = &log;
            scope.spawn(move || {
                let database = name(&format!("t{i}"));
                for txid in 1..=50 {
                    let end = fill(log, &database, txid, txid, 100);
                    log.wait_durable(end).unwrap();
                    assert!(log.durable() >= end);
                }
            });
        }
    });
    assert_eq!(all_records(&log).len(), 400);
    assert_eq!(log.durable(), log.appended());
    drop(log);
    let log = open_by_hand(&storage, small());
    for i in 0..8 {
        assert_eq!(log.kept(&name(&format!("t{i}"))).unwrap(), Some((Txid(1), Txid(50))));
    }
}

#[test]
fn callbacks_come_once_their_record_is_durable() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = CommitLog::open_on(Arc::new(storage), Path::new(DIR), small(), true).unwrap();
    let log = Arc::new(log);
    let (sender, receiver) = mpsc::channel();
    for txid in 1..=100 {
        let end = fill(&log, &a, txid, txid, 10);
        let (sender, log2) = (sender.clone(), Arc::downgrade(&log));
        let callback = move |result: Result<(), LogError>| {
            result.unwrap();
            sender.send((txid, log2.upgrade().is_none_or(|log| log.durable() >= end))).unwrap();
        };
        log.on_durable(end, Box::new(callback));
    }
    let called: Vec<_> = receiver.iter().take(100).collect();
    assert_eq!(called, (1..=100).map(|txid| (txid, true)).collect::<Vec<_>>());
    // Also for what is durable already, and after the log was closed.
    let at_once = |log: &CommitLog| {
        let (sender, receiver) = mpsc::channel();
        log.on_durable(log.durable(), Box::new(move |result| sender.send(result.is_ok()).unwrap()));
        assert!(receiver.recv().unwrap());
    };
    at_once(&log);
    log.close();
    at_once(&log);
    assert!(matches!(log.append(&transaction(&a, 101), b""), Err(LogError::Closed(_))));
    assert_eq!(all_records(&log).len(), 100);
}

#[test]
fn who_asks_for_what_is_durable_does_not_wait_for_the_pace() {
    let log = CommitLog::open_on(Arc::new(MemoryStorage::default()), Path::new(DIR), small(), true).unwrap();
    let end = fill(&log, &name("a"), 1, 1, 10);
    log.wait_durable(end).unwrap();
    log.shared.pace_until(Instant::now() + Duration::from_secs(3600));
    log.on_durable_paced(end, Box::new(|_| ()));
    let (sender, receiver) = mpsc::channel();
    log.on_durable(end, Box::new(move |result| sender.send(result.is_ok()).unwrap()));
    assert!(receiver.recv_timeout(Duration::from_secs(60)).expect("it is called long before the paced one"));
}

#[test]
fn an_idle_log_marks_that_its_end_is_durable() {
    let storage = MemoryStorage::default();
    let options = Options { idle_mark: Some(Duration::from_millis(1)), ..small() };
    let log = CommitLog::open_on(Arc::new(storage), Path::new(DIR), options, true).unwrap();
    let end = fill(&log, &name("a"), 1, 1, 10);
    log.request_flush();
    let mut watch = log.watch();
    while *watch.borrow_and_update() <= end {
        assert!(*watch.borrow() <= log.appended());
        std::thread::yield_now();
    }
    assert_eq!(all_records(&log).len(), 1);
    assert_eq!(log.last(&name("a")).unwrap().end(), end);
}

#[test]
fn the_log_works_on_a_real_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, a) = (dir.path().join("cluster/log"), name("a/b.db"));
    let log = CommitLog::open(&dir, small()).unwrap();
    let end = fill(&log, &a, 1, 100, 700);
    log.wait_durable(end).unwrap();
    log.append(&transaction(&a, 101), &payload_of(&a, 101, 70_000)).unwrap();
    let retained = log.enforce_retention(i64::MAX, log.appended(), log.appended()).unwrap();
    assert!(retained.removed > 0);
    drop(log);
    let log = CommitLog::open(&dir, small()).unwrap();
    assert_eq!(log.damaged(), []);
    let (first, last) = log.kept(&a).unwrap().unwrap();
    assert_eq!((first > Txid(1), last), (true, Txid(101)));
    for txid in first.0..=100 {
        let found = log.find(&a, Txid(txid)).unwrap().unwrap();
        assert_eq!(log.read(&found).unwrap(), Payload::Bytes(payload_of(&a, txid, 700).into()));
    }
    let Payload::File { path, .. } = log.read(&log.last(&a).unwrap()).unwrap() else { panic!("a file") };
    assert_eq!(std::fs::read(path).unwrap(), payload_of(&a, 101, 70_000));
    fill(&log, &a, 102, 110, 700);
}
