//! Databases in rollback mode, switches of the mode, page size changes, drops.

use super::*;
use ltx::Owner;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn idle_connections_see_every_transaction_without_reopening() {
    for page_size in [512, 4096, 65536] {
        let mut primary = Primary::new(page_size, "delete");
        let mut replica = Replica::new();
        replica.apply(&[primary.exec(CREATE)]);
        let mut reader = Sqlite::open(&replica.path);
        for round in 0..15 {
            replica.apply(&[primary.insert(40, 500)]);
            assert_eq!(reader.digest(), digest_of(&primary.db));
            replica.apply(&[
                primary.exec(&format!(
                    "delete from t where a % 9 = {} or a = (select max(a) from t)",
                    round % 9
                )),
                primary.insert(1, 1),
            ]);
            assert_eq!(reader.digest(), digest_of(&primary.db));
            replica.assert_equals(&primary.image);
            assert!(!replica.file("-journal").exists() && !replica.file("-wal").exists());
        }
        assert_eq!(reader.ask("pragma integrity_check;"), "ok");
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn a_reader_in_a_transaction_makes_it_busy_and_nothing_changes() {
    let mut primary = Primary::new(4096, "delete");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE), primary.insert(20, 900)]);
    let mut reader = Sqlite::open(&replica.path);
    let before = reader.ask(&format!("begin; {DIGEST}"));
    let bytes = std::fs::read(&replica.path).unwrap();
    let file = primary.insert(20, 900);
    let error = replica.try_apply(std::slice::from_ref(&file), Duration::from_millis(30)).unwrap_err();
    assert!(matches!(&error, ApplyError::Busy { .. }), "{error}");
    assert!(error.to_string().contains("replica.db is busy: could not get EXCLUSIVE"), "{error}");
    assert_eq!(reader.digest(), before);
    assert_eq!(std::fs::read(&replica.path).unwrap(), bytes);
    assert!(!replica.file("-journal").exists());
    // Others can begin to read again, so PENDING was given back.
    assert_eq!(Sqlite::open(&replica.path).digest(), before);
    reader.ask("commit;");
    replica.apply(&[file]);
    assert_eq!(reader.digest(), digest_of(&primary.db));
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_waiting_applier_goes_in_when_the_reader_ends() {
    let mut primary = Primary::new(4096, "delete");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE), primary.insert(20, 900)]);
    let mut reader = Sqlite::open(&replica.path);
    reader.ask(&format!("begin; {DIGEST}"));
    let file = primary.insert(20, 900);
    let path = replica.path.clone();
    std::thread::scope(|scope| {
        let applying = scope.spawn(|| replica.apply(&[file]));
        // PENDING tells that the applier waits: from then on nobody new may read.
        let probe = File::options().read(true).write(true).open(&path).unwrap();
        use sqlite_file::locks::{LockKind, PENDING, conflicting_holder};
        while conflicting_holder(&probe, LockKind::Write, PENDING).unwrap().is_none() {
            std::thread::yield_now();
        }
        assert_eq!(Sqlite::open(&path).digest(), "");
        reader.ask("commit;");
        applying.join().unwrap();
    });
    assert_eq!(reader.digest(), digest_of(&primary.db));
    replica.assert_file_equals(&primary.image);
}

#[test]
fn vacuum_shrinks_and_changes_the_page_size() {
    let mut primary = Primary::new(4096, "delete");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE), primary.insert(500, 900)]);
    let mut reader = Sqlite::open(&replica.path);
    reader.digest();
    for page_size in [1024, 65536, 512, 8192] {
        replica.apply(&[
            primary.exec("delete from t where a % 3 = 1"),
            primary.exec(&format!("pragma page_size={page_size}; vacuum;")),
            primary.insert(30, 100),
        ]);
        assert_eq!(primary.image.page_size, page_size);
        assert_eq!(reader.digest(), digest_of(&primary.db));
        replica.assert_equals(&primary.image);
    }
    replica.assert_file_equals(&primary.image);
}

#[test]
fn the_journal_mode_switches_both_ways_with_readers_attached() {
    let mut primary = Primary::new(1024, "delete");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE), primary.insert(50, 300)]);
    let mut reader = Sqlite::open(&replica.path);
    for _ in 0..3 {
        assert_eq!(reader.ask("pragma journal_mode;"), "delete");
        let files = [primary.exec("pragma journal_mode=wal"), primary.insert(50, 300)];
        replica.apply(&files);
        assert!(replica.shape.wal_mode);
        assert_eq!(reader.digest(), digest_of(&primary.db));
        replica.apply(&[primary.insert(50, 300)]);
        let during = reader.ask(&format!("begin; {DIGEST}"));
        assert_eq!(during, digest_of(&primary.db));
        // The reader is connected through the WAL, so the way back and what follows goes through the WAL as well.
        let files = [primary.exec("pragma journal_mode=delete"), primary.insert(20, 300)];
        replica.apply(&files);
        assert!(!replica.shape.wal_mode);
        replica.apply(&[primary.insert(20, 300)]);
        assert_eq!(reader.digest(), during);
        reader.ask("commit;");
        assert_eq!(reader.digest(), digest_of(&primary.db));
        replica.assert_equals(&primary.image);
        // When it has gone the next transaction takes the WAL away.
        drop(reader);
        replica.apply(&[primary.insert(20, 300)]);
        assert!(!replica.file("-wal").exists() && !replica.applier.is_attached());
        replica.assert_equals(&primary.image);
        reader = Sqlite::open(&replica.path);
        assert_eq!(reader.digest(), digest_of(&primary.db));
    }
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_page_size_change_waits_for_reading_transactions_and_idle_connections_see_it() {
    for (before, after, rows) in [(1024, 4096, 50), (4096, 512, 50), (512, 65536, 400), (65536, 1024, 400)] {
        let mut primary = Primary::new(before, "wal");
        let mut replica = Replica::new();
        replica.apply(&[primary.exec(CREATE), primary.insert(rows, 300)]);
        let mut idle = Sqlite::open(&replica.path);
        let mut reading = Sqlite::open(&replica.path);
        idle.digest();
        let seen = reading.ask(&format!("begin; {DIGEST}"));
        let files = [
            primary.insert(5, 5),
            primary.exec("pragma journal_mode=delete"),
            primary.exec(&format!("pragma page_size={after}; vacuum")),
            primary.insert(rows, 100),
            primary.exec("pragma journal_mode=wal"),
        ];
        let error = replica.try_apply(&files, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, ApplyError::Busy { .. }), "{error}");
        assert_eq!(reading.digest(), seen);
        assert_eq!(reading.ask("commit; pragma integrity_check;"), "ok");
        replica.apply(&files);
        replica.assert_equals(&primary.image);
        for reader in [&mut idle, &mut reading] {
            assert_eq!(reader.digest(), digest_of(&primary.db), "{before} -> {after}");
            assert_eq!(reader.ask("pragma integrity_check;"), "ok");
            assert_eq!(reader.ask("pragma page_size;"), after.to_string());
        }
        replica.apply(&[primary.insert(5, 5)]);
        assert_eq!(idle.digest(), digest_of(&primary.db));
        drop((idle, reading));
        assert_eq!(Sqlite::open(&replica.path).digest(), digest_of(&primary.db));
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn a_drop_removes_all_files_and_a_new_database_takes_the_name() {
    for mode in ["wal", "delete"] {
        for reading in [false, true] {
            let mut primary = Primary::new(4096, mode);
            let mut replica = Replica::new();
            replica.apply(&[primary.exec(CREATE), primary.insert(50, 300)]);
            let mut old = Sqlite::open(&replica.path);
            let before = old.ask(&format!("begin; {DIGEST}"));
            if !reading {
                old.ask("commit;");
            }
            let dropped = Image { page_size: 4096, bytes: Vec::new() }.transaction_after(&primary.image, 99);
            replica.try_apply(std::slice::from_ref(&dropped), Duration::from_millis(20)).unwrap();
            assert_eq!(replica.shape, DatabaseShape::default());
            for suffix in ["", "-wal", "-shm", "-journal"] {
                assert!(!replica.file(suffix).exists(), "{suffix}");
            }
            if reading {
                assert_eq!(old.digest(), before);
            }
            drop(old);
            // Dropping what is not there is no error; then a database of that name comes again.
            let mut second = Primary::new(1024, "delete");
            replica.apply(&[dropped, second.exec(CREATE), second.insert(10, 10)]);
            replica.assert_equals(&second.image);
            assert_eq!(Sqlite::open(&replica.path).digest(), digest_of(&second.db));
        }
    }
}

#[test]
fn a_new_file_gets_the_owner_and_mode_of_the_record() {
    let mut primary = Primary::new(4096, "wal");
    let mut replica = Replica::new();
    let file = primary.exec(CREATE);
    let header = ltx::Decoder::new(&file[..]).unwrap().header().clone();
    // SAFETY: these calls have no preconditions.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    let mut encoder =
        ltx::Encoder::new(Vec::new(), Header { owner: Some(Owner { uid, gid, mode: 0o640 }), ..header })
            .unwrap();
    for pgno in 1..=primary.image.page_count() {
        encoder.encode_page(pgno, primary.image.page(pgno).unwrap()).unwrap();
    }
    let file = encoder.finish(primary.image.checksum()).unwrap().1;
    replica.apply(&[file]);
    replica.apply(&[primary.insert(1, 1)]);
    for suffix in ["", "-wal", "-shm"] {
        let mode = std::fs::metadata(replica.file(suffix)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640, "{suffix}");
    }
}

#[test]
fn a_snapshot_replaces_whatever_was_there() {
    for (from, to) in [("wal", "delete"), ("delete", "wal"), ("wal", "wal")] {
        let mut old = Primary::new(1024, from);
        let mut replica = Replica::new();
        replica.apply(&[old.exec(CREATE), old.insert(500, 300)]);
        let mut reader = Sqlite::open(&replica.path);
        reader.digest();
        let mut new = Primary::new(4096, to);
        new.db.execute_batch(CREATE).unwrap();
        let snapshot = new.insert(20, 200);
        if from == "wal" {
            drop(reader);
            replica.apply(&[snapshot]);
        } else {
            replica.apply(&[snapshot]);
            assert_eq!(reader.digest(), digest_of(&new.db));
            drop(reader);
        }
        replica.assert_equals(&new.image);
        replica.assert_file_equals(&new.image);
    }
}

#[test]
fn a_hot_journal_of_a_dead_application_is_played_back_first() {
    for mode in ["delete", "wal"] {
        let mut primary = Primary::new(1024, "delete");
        let mut replica = Replica::new();
        replica.apply(&[primary.exec(CREATE), primary.insert(300, 300)]);
        // As a former primary: an application dies in the middle of a transaction that has spilled.
        let mut app = Sqlite::open(&replica.path);
        app.ask(&format!("pragma cache_size=5; begin; update t set b = 1; {}", insert_sql(300, 300)));
        app.kill();
        assert!(replica.file("-journal").exists());
        assert_ne!(std::fs::read(&replica.path).unwrap(), primary.image.bytes);
        let file = primary.exec(&format!("pragma journal_mode={mode}; {}", insert_sql(1, 1)));
        replica.apply(&[file]);
        replica.assert_equals(&primary.image);
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn who_keeps_writers_out_does_not_hide_the_journal_of_a_dead_one_from_readers() {
    let mut primary = Primary::new(1024, "delete");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE), primary.insert(300, 300)]);
    let mut app = Sqlite::open(&replica.path);
    app.ask(&format!("pragma cache_size=5; begin; update t set b = 1; {}", insert_sql(300, 300)));
    app.kill();
    let (database, journal) = (replica.path.clone(), replica.file("-journal"));
    let left = [&database, &journal].map(|path| std::fs::read(path).unwrap());
    for _ in 0..50 {
        // As that application left them.
        std::fs::write(&database, &left[0]).unwrap();
        std::fs::write(&journal, &left[1]).unwrap();
        let mut reader = Sqlite::open(&database);
        let answered = AtomicBool::new(false);
        let count = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !answered.load(Ordering::Acquire) {
                    drop(replica.applier.hold_writers(Duration::ZERO));
                }
            });
            let count = reader.ask(".timeout 20000\nselect count(*) from t where b = 1;");
            answered.store(true, Ordering::Release);
            count
        });
        // The first reader plays the journal back, and then the hold is to be had.
        assert_eq!(count, "0");
        assert!(replica.applier.hold_writers(LONG).unwrap().is_some_and(|hold| !hold.is_of_wal()));
    }
}
