//! Files of the log that changed behind its back: what was durable and cannot be read is named, and nothing else is lost.

use super::*;
use crate::log::format::{RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES};
use fastrand::Rng;
use std::path::PathBuf;

/// The segment that holds the record, and where in the file it is.
fn place_of(log: &CommitLog, info: &RecordInfo) -> (PathBuf, usize) {
    let segment = log.shared.segments.containing(info.lsn).unwrap();
    let path = log.shared.segments.path(segment.first);
    (path, (SEGMENT_HEADER_BYTES + info.lsn.0 - segment.first.0) as usize)
}

fn flip(storage: &MemoryStorage, path: &Path, at: usize) {
    storage.edit(path, |content| content[at] ^= 0x40);
}

/// A log of two databases in several segments, and its records. `clean`: it was closed in order.
fn two_databases(storage: &MemoryStorage, clean: bool) -> Vec<RecordInfo> {
    let log = open_by_hand(storage, small());
    for txid in 1..=60 {
        let end = fill(&log, &name("a"), txid, txid, 300);
        log.wait_durable(end).unwrap();
        fill(&log, &name("b"), txid, txid, 300);
    }
    log.wait_durable(log.appended()).unwrap();
    log.keep_for_test();
    let records = all_records(&log);
    if clean {
        drop(log)
    } else {
        kill(log)
    }
    records
}

fn is_damaged<T: std::fmt::Debug>(result: Result<T, LogError>) -> Damage {
    match result {
        Err(LogError::Damaged(damage)) => damage,
        other => panic!("expected damage, got {other:?}"),
    }
}

#[test]
fn a_flipped_bit_in_a_sealed_segment_hurts_only_its_record() {
    let name_at = RECORD_HEADER_BYTES;
    for at in [0, 4, 8, 20, 40, 130, name_at, name_at + 20, 400] {
        let storage = MemoryStorage::default();
        let records = two_databases(&storage, true);
        let log = open_by_hand(&storage, small());
        let victim = records.iter().find(|info| info.database == name("a") && info.min_txid.0 == 5).unwrap();
        let (path, offset) = place_of(&log, victim);
        flip(&storage, &path, offset + at);
        let damage = is_damaged(log.find(&name("a"), Txid(5)).and_then(|found| log.read(&found.unwrap())));
        assert_eq!((&damage.segment, damage.offset), (&path, offset as u64), "byte {at}");
        assert_eq!(damage.database, Some(name("a")));
        assert!(damage.to_string().contains(path.to_str().unwrap()));
        is_damaged(log.read(victim));
        // Everything else is found and read, also across the link that is cut, also after opening anew.
        let others = |log: &CommitLog| {
            for info in records.iter().filter(|info| info.lsn != victim.lsn) {
                assert_eq!(log.find(&info.database, info.min_txid).unwrap().as_ref(), Some(info));
                log.read(info).unwrap();
            }
            assert_eq!(log.kept(&name("b")).unwrap(), Some((Txid(1), Txid(60))));
        };
        others(&log);
        drop(log);
        others(&open_by_hand(&storage, small()));
    }
}

#[test]
fn a_flipped_bit_before_valid_records_in_the_last_segment_is_damage() {
    for at in [0, 8, 30, 132, RECORD_HEADER_BYTES, 300] {
        let storage = MemoryStorage::default();
        let records = two_databases(&storage, false);
        let log = open_by_hand(&storage.copy(), small());
        let victim = &records[records.len() - 5];
        let (path, offset) = place_of(&log, victim);
        flip(&storage, &path, offset + at);
        let log = open_by_hand(&storage, small());
        let [damage] = &log.damaged()[..] else { panic!("{:?}", log.damaged()) };
        assert_eq!((&damage.segment, damage.offset, damage.lsn), (&path, offset as u64, victim.lsn));
        // A name that is damaged itself names nobody.
        let named = at != RECORD_HEADER_BYTES;
        assert_eq!(damage.database, named.then(|| victim.database.clone()), "byte {at}");
        is_damaged(log.find(&victim.database, victim.min_txid).and_then(|found| log.read(&found.unwrap())));
        for info in records.iter().filter(|info| info.lsn != victim.lsn) {
            assert_eq!(log.find(&info.database, info.min_txid).unwrap().as_ref(), Some(info));
            log.read(info).unwrap();
        }
        let end = fill(&log, &name("a"), 61, 70, 300);
        log.wait_durable(end).unwrap();
        drop(log);
        // It is still known after the segment has been sealed.
        let log = open_by_hand(&storage, small());
        assert_eq!(log.damaged().len(), 1);
        assert_eq!(log.kept(&name("a")).unwrap().unwrap().1, Txid(70));
        let (visited, damaged) = records_from(&log, Lsn(0));
        let header_is_good = at == 300;
        assert_eq!((visited.len(), damaged.len()), if header_is_good { (130, 0) } else { (129, 1) });
    }
}

#[test]
fn a_torn_last_record_is_cut_off_unless_a_mark_says_it_was_durable() {
    for marked in [false, true] {
        let storage = MemoryStorage::default();
        let log = open_by_hand(&storage, small());
        fill(&log, &name("a"), 1, 10, 300);
        log.wait_durable(log.appended()).unwrap();
        if marked {
            log.append_mark_for_test();
        }
        let last = log.last(&name("a")).unwrap();
        let (path, offset) = place_of(&log, &last);
        kill(log);
        flip(&storage, &path, offset + 200);
        let log = open_by_hand(&storage, small());
        if marked {
            assert_eq!(log.damaged()[0].lsn, last.lsn);
            is_damaged(log.read(&last));
        } else {
            assert_eq!(log.damaged(), []);
            assert_eq!(log.kept(&name("a")).unwrap(), Some((Txid(1), Txid(9))));
            fill(&log, &name("a"), 10, 11, 300);
        }
    }
}

#[test]
fn a_last_segment_that_lost_its_end_is_damaged_wherever_it_was_cut() {
    // In the last record, between two, at its header, and in the zeros after everything.
    for cut in [50, 0, 130, 2000] {
        let storage = MemoryStorage::default();
        let log = open_by_hand(&storage, small());
        fill(&log, &name("a"), 1, 10, 300);
        log.wait_durable(log.appended()).unwrap();
        let last = log.last(&name("a")).unwrap();
        let (path, offset) = place_of(&log, &last);
        kill(log);
        storage.edit(&path, |content| content.truncate(offset + cut));
        for _ in 0..2 {
            let log = open_by_hand(&storage, small());
            let [damage] = &log.damaged()[..] else { panic!("cut at {cut}: {:?}", log.damaged()) };
            assert_eq!(damage.segment, path);
            assert!(damage.reason.contains("lost its end"), "{damage}");
            let kept = if cut == 2000 { 10 } else { 9 };
            assert_eq!(all_records(&log).len(), kept, "cut at {cut}");
            kill(log);
        }
        // What is appended goes where nothing was; the damage stays known.
        let log = open_by_hand(&storage, small());
        let kept = log.kept(&name("a")).unwrap().unwrap().1.0;
        fill(&log, &name("a"), kept + 1, kept + 2, 300);
        log.wait_durable(log.appended()).unwrap();
        drop(log);
        let log = open_by_hand(&storage, small());
        assert_eq!(log.damaged().len(), 1);
        assert_eq!(log.kept(&name("a")).unwrap().unwrap().1.0, kept + 2);
    }
}

#[test]
fn a_truncated_sealed_segment_is_damage_up_to_the_next_one() {
    for clean in [true, false] {
        let storage = MemoryStorage::default();
        let records = two_databases(&storage, clean);
        let log = open_by_hand(&storage.copy(), small());
        let (path, offset) = place_of(&log, &records[10]);
        let next = log.shared.segments.containing(records[10].lsn).unwrap().end();
        storage.edit(&path, |content| content.truncate(offset));
        let log = open_by_hand(&storage, small());
        let [damage] = &log.damaged()[..] else { panic!("{:?}", log.damaged()) };
        assert_eq!((&damage.segment, damage.lsn, damage.end), (&path, records[10].lsn, next));
        let expected: Vec<_> = records.iter().filter(|r| r.lsn < records[10].lsn || r.lsn >= next).collect();
        assert_eq!(all_records(&log).iter().collect::<Vec<_>>(), expected);
        for info in expected {
            assert_eq!(log.find(&info.database, info.min_txid).unwrap().as_ref(), Some(info));
        }
        is_damaged(log.find(&records[10].database, records[10].min_txid));
        fill(&log, &name("a"), 61, 62, 10);
    }
}

#[test]
fn a_clean_log_that_was_truncated_is_damaged_not_shorter() {
    let storage = MemoryStorage::default();
    let records = two_databases(&storage, true);
    let log = open_by_hand(&storage.copy(), small());
    let last = records.last().unwrap();
    let (path, offset) = place_of(&log, last);
    storage.edit(&path, |content| content.truncate(offset + 8));
    let log = open_by_hand(&storage, small());
    assert_eq!((log.damaged().len(), log.damaged()[0].lsn, log.damaged()[0].end), (1, last.lsn, last.end()));
}

#[test]
fn a_missing_segment_is_damage() {
    let storage = MemoryStorage::default();
    let records = two_databases(&storage, true);
    let log = open_by_hand(&storage.copy(), small());
    let segments = log.shared.segments.all();
    let missing = &segments[1];
    let path = log.shared.segments.path(missing.first);
    storage.remove(&path).unwrap();
    let log = open_by_hand(&storage, small());
    let [damage] = &log.damaged()[..] else { panic!("{:?}", log.damaged()) };
    assert_eq!((damage.lsn, damage.end), (missing.first, missing.end()));
    let kept = |info: &&RecordInfo| info.lsn < missing.first || info.lsn >= missing.end();
    assert_eq!(all_records(&log).iter().collect::<Vec<_>>(), records.iter().filter(kept).collect::<Vec<_>>());
}

#[test]
fn a_missing_or_bad_index_is_made_again() {
    for clean in [true, false] {
        for cut in [false, true] {
            let storage = MemoryStorage::default();
            let records = two_databases(&storage, clean);
            let indexes =
                storage.paths().into_iter().filter(|path| path.extension().is_some_and(|e| e == "idx"));
            let indexes: Vec<_> = indexes.collect();
            assert!(indexes.len() >= 3);
            let before: Vec<_> = indexes.iter().map(|path| storage.content(path)).collect();
            for path in &indexes {
                if cut {
                    storage.edit(path, |content| content.truncate(30));
                } else {
                    storage.remove(path).unwrap();
                }
            }
            let log = open_by_hand(&storage, small());
            assert_eq!(log.damaged(), []);
            assert_eq!(all_records(&log), records);
            for (path, before) in indexes.iter().zip(before) {
                assert_eq!(storage.content(path).len(), before.len());
            }
        }
    }
}

#[test]
fn a_damaged_segment_header_hides_its_segment_only_while_there_is_no_index() {
    let storage = MemoryStorage::default();
    let records = two_databases(&storage, true);
    let log = open_by_hand(&storage.copy(), small());
    let segments = log.shared.segments.all();
    let path = log.shared.segments.path(segments[1].first);
    flip(&storage, &path, 20);
    let log = open_by_hand(&storage, small());
    assert_eq!(all_records(&log), records, "the index knows the key");
    drop(log);
    storage.remove(&path.with_extension("idx")).unwrap();
    let log = open_by_hand(&storage, small());
    assert_eq!((log.damaged().len(), log.damaged()[0].offset, &log.damaged()[0].segment), (1, 0, &path));
    let (visited, damaged) = records_from(&log, Lsn(0));
    let hidden = records.iter().filter(|r| segments[1].first <= r.lsn && r.lsn < segments[1].end()).count();
    assert_eq!((visited.len(), damaged.len()), (records.len() - hidden, 1));
    let lost = records.iter().find(|r| r.lsn >= segments[1].first).unwrap();
    is_damaged(log.find(&lost.database, lost.min_txid));
    let retained = log.enforce_retention(i64::MAX - 1, log.appended(), log.appended()).unwrap();
    assert_eq!((retained.removed, log.damaged().len()), (1, 1), "its age is unknown");
}

#[test]
fn files_that_are_no_segments_of_this_log_are_named() {
    let with = |change: &dyn Fn(&MemoryStorage, &Path)| {
        let storage = MemoryStorage::default();
        let log = open_by_hand(&storage, small());
        fill(&log, &name("a"), 1, 60, 300);
        let path = log.shared.segments.path(log.shared.segments.all()[1].first);
        drop(log);
        change(&storage, &path);
        let opened = CommitLog::open_on(Arc::new(storage), Path::new(DIR), small(), false);
        (opened.err().expect("it must be refused"), path)
    };
    let (error, path) =
        with(&|storage, path| storage.edit(path, |content| content[..8].copy_from_slice(b"SQLite f")));
    assert!(matches!(&error, LogError::NotASegment { path: p, .. } if *p == path), "{error}");
    let (error, path) = with(&|storage, path| storage.edit(path, |content| content[11] = 9));
    assert!(matches!(&error, LogError::Version { path: p, found: 9, known: 1 } if *p == path), "{error}");
    let (error, _) =
        with(&|storage, path| storage.rename(path, &path.with_file_name("00000000000f0000.log")).unwrap());
    assert!(matches!(&error, LogError::NotASegment { .. }), "{error}");
    let (error, _) = with(&|storage, path| {
        let other = MemoryStorage::default();
        drop({
            let log = open_by_hand(&other, small());
            fill(&log, &name("a"), 1, 1, 300);
            log
        });
        let content = other.content(&Path::new(DIR).join("0000000000000008.log"));
        let _ = storage.remove(&path.with_extension("idx"));
        storage.edit(path, |old| *old = content);
    });
    assert!(matches!(&error, LogError::NotASegment { .. } | LogError::ForeignSegment { .. }), "{error}");
}

#[test]
fn what_the_disk_cannot_read_is_damage_even_at_the_end() {
    let storage = MemoryStorage::default();
    let records = two_databases(&storage, false);
    let log = open_by_hand(&storage.copy(), small());
    let last = records.last().unwrap();
    let (path, offset) = place_of(&log, last);
    let block = offset as u64 / 4096 * 4096;
    storage.set_unreadable(Some((path.clone(), block..block + 4096)));
    let log = open_by_hand(&storage, small());
    let [damage] = &log.damaged()[..] else { panic!("{:?}", log.damaged()) };
    assert_eq!(&damage.segment, &path);
    assert!(damage.lsn <= last.lsn && last.end() <= damage.end);
    let readable: Vec<_> = records.iter().filter(|info| info.lsn < damage.lsn).cloned().collect();
    assert_eq!(all_records(&log), readable);
    fill(&log, &name("c"), 1, 1, 10);
    drop(log);
    // Nothing was cut off: a disk that can read again has it all.
    storage.set_unreadable(None);
    let log = open_by_hand(&storage, small());
    assert_eq!(all_records(&log).len(), records.len() + 1);
    log.read(last).unwrap();
}

#[test]
fn a_missing_or_changed_external_file_is_damage() {
    let storage = MemoryStorage::default();
    let a = name("a");
    let log = open_by_hand(&storage, small());
    for txid in 1..=4 {
        log.append(&transaction(&a, txid), &payload_of(&a, txid, 10_000)).unwrap();
    }
    let records = all_records(&log);
    let path_of = |info: &RecordInfo| match log.read(info).unwrap() {
        Payload::File { path, .. } => path,
        Payload::Bytes(_) => panic!("a file"),
    };
    let paths: Vec<_> = records.iter().map(path_of).collect();
    storage.remove(&paths[0]).unwrap();
    storage.edit(&paths[1], |content| content.truncate(9000));
    storage.edit(&paths[2], |content| *content.last_mut().unwrap() ^= 1);
    for (info, path) in records.iter().zip(&paths).take(3) {
        let damage = is_damaged(log.read(info));
        assert_eq!((&damage.segment, damage.database), (path, Some(a.clone())));
    }
    assert_eq!(path_of(&records[3]), paths[3]);
}

#[test]
fn whatever_happens_to_the_files_nothing_wrong_is_read() {
    let mut random = Rng::with_seed(7);
    let bases = [true, false].map(|clean| {
        let storage = MemoryStorage::default();
        let records = two_databases(&storage, clean);
        (storage, records)
    });
    for round in 0..200 {
        let (storage, records) = &bases[round % 2];
        let storage = storage.copy();
        let paths = storage.paths();
        for _ in 0..=random.u64(..4) {
            let path = &paths[random.usize(..paths.len())];
            storage.edit(path, |content| {
                let at = random.usize(..content.len().max(1));
                match random.u64(..8) {
                    0 => content.truncate(at),
                    1 => content.clear(),
                    2 => {
                        let n = random.usize(..3000).min(content.len() - at);
                        content[at..at + n].fill(random.u8(..));
                    }
                    _ if content.is_empty() => {}
                    _ => content[at] ^= 1 << random.u64(..8),
                }
            });
        }
        let Ok(log) = CommitLog::open_on(Arc::new(storage.clone()), Path::new(DIR), small(), false) else {
            continue;
        };
        for info in records_from(&log, Lsn(0)).0 {
            let original =
                records.iter().find(|r| r.lsn == info.lsn).expect("a record that was never written");
            assert_eq!(&info, original);
            if let Ok(payload) = log.read(&info) {
                let expected = payload_of(&info.database, info.min_txid.0, 300);
                assert_eq!(payload, Payload::Bytes(expected.into()));
            }
        }
        for info in records {
            match log.find(&info.database, info.min_txid) {
                Ok(found) => assert!(found.is_none_or(|found| found == *info)),
                Err(e) => assert!(matches!(e, LogError::Damaged(_) | LogError::Io { .. }), "{e}"),
            }
        }
        let end = fill(&log, &name("new"), 1, 30, 300);
        log.wait_durable(end).unwrap();
        drop(log);
        let log = open_by_hand(&storage, small());
        assert_eq!(log.kept(&name("new")).unwrap(), Some((Txid(1), Txid(30))));
    }
}
