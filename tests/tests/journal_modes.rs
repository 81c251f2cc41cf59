//! Journal modes, locking modes and checkpoints of databases on the primary: each time the replica ends at the same position
//! with the same bytes, and what it shows is sound.

use litefs_tests::{FILL, Fleet, JOURNAL_MODES, Shell, ask, assert_equal, exec, set_journal_mode, wait_seen};
use std::fs;

#[test]
fn each_commit_is_one_transaction_in_every_journal_mode_and_at_every_level_of_synchronous() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        for synchronous in ["off", "normal", "full", "extra"] {
            let name = format!("{mode}-{synchronous}.db");
            let db = primary.open(&name);
            set_journal_mode(&db, mode);
            exec(
                &db,
                &format!("PRAGMA synchronous={synchronous}; CREATE TABLE t(id INTEGER PRIMARY KEY, v);"),
            );
            let created = primary.txid(&name);
            for i in 1..=20u32 {
                db.execute("INSERT INTO t(v) VALUES (randomblob(?1))", [i * 100]).unwrap();
                assert_eq!(primary.txid(&name), created + u64::from(i), "{name}");
            }
            exec(&db, "BEGIN; UPDATE t SET v = 'x' WHERE id % 2; DELETE FROM t WHERE id % 3 = 0; COMMIT;");
            assert_eq!(primary.txid(&name), created + 21, "{name}");
            drop(db);
            assert_equal(&primary, &replica, &name);
            assert_eq!(replica.sql(&name, "SELECT count(*), sum(v = 'x') FROM t"), "14|7", "{name}");
        }
    }
}

#[test]
fn journal_modes_switch_while_the_replica_reads() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let db = primary.open("x.db");
    exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
    primary.wait_position_equal(&replica, "x.db");
    let reader = replica.open("x.db");
    let mut rows = 0;
    // Every mode after every other one.
    let order = "delete truncate delete persist delete wal truncate persist truncate wal persist wal delete";
    for mode in order.split(' ') {
        set_journal_mode(&db, mode);
        for _ in 0..3 {
            exec(&db, "INSERT INTO t(v) VALUES (randomblob(5000))");
            rows += 1;
        }
        wait_seen(&reader, "SELECT count(*) FROM t", &rows.to_string());
        assert_equal(&primary, &replica, "x.db");
        // A connection that opens the database now sees it too, whatever the old one still thinks of its mode.
        assert_eq!(replica.sql("x.db", "SELECT count(*) FROM t"), rows.to_string(), "in {mode}");
        assert_eq!(ask(&reader, "PRAGMA integrity_check"), "ok", "in {mode}");
    }
}

#[test]
fn a_reader_that_still_has_the_wal_may_move_it_to_the_file_after_the_mode_was_switched() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let db = primary.open("x.db");
    set_journal_mode(&db, "wal");
    exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
    primary.wait_position_equal(&replica, "x.db");
    let reader = replica.open("x.db");
    wait_seen(&reader, "SELECT count(*) FROM t", "0");
    set_journal_mode(&db, "delete");
    for rows in 1..=5 {
        exec(&db, "INSERT INTO t(v) VALUES (randomblob(5000))");
        wait_seen(&reader, "SELECT count(*) FROM t", &rows.to_string());
        // Behind FUSE it may be told that it may not write.
        let _ = reader.execute_batch("PRAGMA wal_checkpoint");
    }
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn journal_modes_switch_between_processes_on_the_primary() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    // A connection that is idle in between; leaving WAL mode needs it to be the only one, so it is told to let go.
    primary.sql("x.db", "CREATE TABLE t(v);");
    for (i, mode) in ["wal", "delete", "wal", "persist", "wal", "truncate"].iter().enumerate() {
        let mut other = Shell::open(&primary.path("x.db"));
        assert_eq!(other.run(&format!("PRAGMA journal_mode={mode};")), *mode);
        other.run(&format!("INSERT INTO t VALUES ({i});"));
        primary.sql("x.db", &format!("INSERT INTO t VALUES ({i});"));
        other.run(&format!("INSERT INTO t VALUES ({i});"));
        drop(other);
        assert_equal(&primary, &replica, "x.db");
    }
    assert_eq!(replica.sql("x.db", "SELECT count(*) FROM t"), "18");
}

#[test]
fn a_page_size_that_changes_on_the_way_out_of_wal_mode_waits_for_connections_in_wal_mode() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let db = primary.open("x.db");
    set_journal_mode(&db, "wal");
    exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES (1);");
    primary.wait_position_equal(&replica, "x.db");
    let reader = replica.open("x.db");
    assert_eq!(ask(&reader, "SELECT count(*) FROM t"), "1");
    set_journal_mode(&db, "delete");
    exec(&db, "INSERT INTO t(v) VALUES (2)");
    wait_seen(&reader, "SELECT count(*) FROM t", "2");
    exec(&db, "PRAGMA page_size=16384; VACUUM;");
    set_journal_mode(&db, "wal");
    exec(&db, "INSERT INTO t(v) VALUES (3)");
    // It keeps what it has, and holds up no other database.
    primary.sql("other.db", "CREATE TABLE t(v)");
    assert_equal(&primary, &replica, "other.db");
    let rows = ask(&reader, "SELECT count(*) FROM t");
    assert!(rows == "2" || rows == "3", "{rows}");
    drop((reader, db));
    assert_equal(&primary, &replica, "x.db");
    // Until it has read something, a connection knows only what the file says, and the new size may be in the WAL.
    assert_eq!(replica.sql("x.db", "SELECT count(*) FROM t; PRAGMA page_size;"), "3\n16384");
}

#[test]
fn checkpoints_of_every_kind_change_nothing_that_replicates() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let db = primary.open("x.db");
    set_journal_mode(&db, "wal");
    exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v); PRAGMA wal_autocheckpoint=0;");
    primary.wait_position_equal(&replica, "x.db");
    let reader = replica.open("x.db");
    for kind in ["PASSIVE", "FULL", "RESTART", "TRUNCATE"] {
        for _ in 0..3 {
            exec(&db, FILL);
            let position = primary.position("x.db");
            exec(&db, &format!("PRAGMA wal_checkpoint({kind});"));
            assert_eq!(primary.position("x.db"), position, "{kind}");
            exec(&db, "UPDATE t SET v = randomblob(50) WHERE id = abs(random()) % 300");
        }
        wait_seen(&reader, "SELECT count(*) FROM t", &ask(&db, "SELECT count(*) FROM t"));
        assert_equal(&primary, &replica, "x.db");
    }
    // The last connection removes the WAL when it closes, on both hosts.
    drop((db, reader));
    assert!(!primary.path("x.db-wal").exists());
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn exclusive_locking_mode_replicates_while_it_is_held() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        for from_the_start in [true, false] {
            let name = format!("{mode}-{from_the_start}.db");
            let db = primary.open(&name);
            if from_the_start {
                // In WAL mode there is no wal-index at all then.
                exec(&db, "PRAGMA locking_mode=EXCLUSIVE;");
                set_journal_mode(&db, mode);
                exec(&db, "CREATE TABLE t(v);");
                assert!(!primary.path(format!("{name}-shm")).exists());
            } else {
                set_journal_mode(&db, mode);
                exec(&db, "CREATE TABLE t(v); PRAGMA locking_mode=EXCLUSIVE;");
            }
            for _ in 0..5 {
                exec(&db, "INSERT INTO t VALUES (randomblob(6000))");
            }
            primary.wait_position_equal(&replica, &name);
            assert_eq!(replica.sql(&name, "SELECT count(*) FROM t"), "5", "{name}");
            assert!(primary.open(&name).busy_timeout(std::time::Duration::ZERO).is_ok());
            exec(&db, "PRAGMA locking_mode=NORMAL; SELECT * FROM t; INSERT INTO t VALUES (1);");
            drop(db);
            primary.sql(&name, "INSERT INTO t VALUES (2)");
            assert_equal(&primary, &replica, &name);
            assert_eq!(replica.sql(&name, "SELECT count(*) FROM t"), "7", "{name}");
        }
    }
}

#[test]
fn journal_size_limit_cuts_journals_without_harm() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        for limit in [0, 20_000] {
            let name = format!("{mode}-{limit}.db");
            let db = primary.open(&name);
            set_journal_mode(&db, mode);
            exec(
                &db,
                &format!("PRAGMA journal_size_limit={limit}; CREATE TABLE t(id INTEGER PRIMARY KEY, v);"),
            );
            for _ in 0..3 {
                exec(&db, FILL);
                exec(
                    &db,
                    "UPDATE t SET v = randomblob(700) WHERE id % 9 = 0; PRAGMA wal_checkpoint(RESTART);",
                );
                exec(&db, "INSERT INTO t(v) VALUES (1)");
                exec(&db, "BEGIN; UPDATE t SET v = randomblob(800); ROLLBACK;");
            }
            if mode == "persist" {
                let journal = fs::metadata(primary.path(format!("{name}-journal"))).unwrap().len();
                assert!(journal <= limit, "{journal}");
            }
            drop(db);
            assert_equal(&primary, &replica, &name);
        }
    }
}

#[test]
fn journal_mode_memory_and_off_arrive_shortly_after_the_commit() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in ["memory", "off"] {
        for synchronous in ["full", "off"] {
            let name = format!("{mode}-{synchronous}.db");
            let db = primary.open(&name);
            set_journal_mode(&db, mode);
            exec(
                &db,
                &format!("PRAGMA synchronous={synchronous}; CREATE TABLE t(id INTEGER PRIMARY KEY, v);"),
            );
            replica.wait_sql(&name, "SELECT count(*) FROM t", "0");
            let reader = replica.open(&name);
            for i in 1..=5 {
                exec(&db, "INSERT INTO t(v) VALUES (randomblob(7000))");
                // Nobody else touches the database: what is taken in is taken in by itself.
                wait_seen(&reader, "SELECT count(*) FROM t", &i.to_string());
            }
            exec(&db, FILL);
            wait_seen(&reader, "SELECT count(*) FROM t", "305");
            // From and to a mode with a journal, with the same connection.
            set_journal_mode(&db, "delete");
            exec(&db, "INSERT INTO t(v) VALUES (1)");
            set_journal_mode(&db, mode);
            exec(&db, "DELETE FROM t WHERE id > 100");
            wait_seen(&reader, "SELECT count(*) FROM t", "100");
            set_journal_mode(&db, "wal");
            exec(&db, "INSERT INTO t(v) VALUES (1)");
            wait_seen(&reader, "SELECT count(*) FROM t", "101");
            drop(db);
            assert_equal(&primary, &replica, &name);
        }
    }
}

#[test]
fn journal_mode_memory_on_a_database_in_wal_mode_elsewhere_is_followed() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    // Opened while in WAL mode, so its handle is passed through; then written without any journal.
    let db = primary.open("x.db");
    set_journal_mode(&db, "wal");
    exec(&db, "CREATE TABLE t(v);");
    drop(db);
    let db = primary.open("x.db");
    exec(&db, "INSERT INTO t VALUES (1)");
    for mode in ["memory", "delete", "off", "persist"] {
        set_journal_mode(&db, mode);
        exec(&db, "INSERT INTO t VALUES (randomblob(5000)); INSERT INTO t VALUES (2);");
        replica.wait_sql("x.db", "SELECT count(*) FROM t", &ask(&db, "SELECT count(*) FROM t"));
        set_journal_mode(&db, "wal");
        exec(&db, "INSERT INTO t VALUES (3)");
    }
    drop(db);
    assert_equal(&primary, &replica, "x.db");
}
