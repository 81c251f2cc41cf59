//! One primary, replicas, and what happens between them.

use litefs_tests::{
    COUNT, CREATE_DELETE, CREATE_WAL, FILL, Fleet, Host, PATIENCE, Role, Shell, ask, assert_equal,
    assert_sane, checksum_of, exec, integrity_check, set_journal_mode, sqlite3, try_run, wait_for, wait_seen,
};
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Tells the threads of a test to end, also when it fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn an_open_connection_on_the_replica_sees_the_next_transaction() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (name, create) in [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)] {
        primary.sql(name, create);
        primary.wait_position_equal(&replica, name);
        let reader = replica.open(name);
        let mut other_process = Shell::open(&replica.path(name));
        for rows in 2..30u32 {
            primary.sql(name, "INSERT INTO t(v) VALUES (randomblob(3000))");
            wait_seen(&reader, COUNT, &rows.to_string());
            wait_for("another process sees it", PATIENCE, || {
                (other_process.run(&format!("{COUNT};")) == rows.to_string()).then_some(())
            });
            if rows % 10 == 0 {
                // The schema too.
                primary.sql(
                    name,
                    &format!("CREATE TABLE u{rows}(a); ALTER TABLE t ADD COLUMN c{rows} DEFAULT {rows};"),
                );
                let sql = format!("SELECT count(*) FROM pragma_table_info('t') WHERE name = 'c{rows}'");
                wait_seen(&reader, &sql, "1");
                assert_eq!(ask(&reader, &format!("SELECT c{rows} FROM t LIMIT 1")), rows.to_string());
            }
        }
        drop((reader, other_process));
        assert_equal(&primary, &replica, name);
    }
}

#[test]
fn a_long_reader_keeps_its_snapshot_and_neither_blocks_nor_is_blocked_in_wal_mode() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql("x.db", CREATE_WAL);
    primary.sql("x.db", FILL);
    primary.wait_position_equal(&replica, "x.db");

    let sum = "SELECT count(*) || '/' || sum(length(v)) || '/' || max(id) FROM t";
    let reader = replica.open("x.db");
    // Whatever makes it wait is an error.
    reader.busy_timeout(std::time::Duration::ZERO).unwrap();
    exec(&reader, "BEGIN");
    let snapshot = ask(&reader, sum);

    let db = primary.open("x.db");
    exec(&db, "PRAGMA synchronous=OFF");
    for i in 0..400u32 {
        exec(
            &db,
            &format!(
                "UPDATE t SET v = randomblob({i} * 10) WHERE id % 100 = {i} % 100; INSERT INTO t(v) VALUES ({i});"
            ),
        );
        if i % 10 == 0 {
            assert_eq!(ask(&reader, sum), snapshot);
        }
    }
    // The reader holds nothing up ...
    primary.wait_position_equal(&replica, "x.db");
    let current = ask(&db, sum);
    assert_ne!(current, snapshot);
    assert_eq!(replica.sql("x.db", sum), current);
    // ... and its snapshot is whole.
    assert_eq!(ask(&reader, sum), snapshot);
    assert_eq!(ask(&reader, "PRAGMA integrity_check"), "ok");
    exec(&reader, "COMMIT");
    assert_eq!(ask(&reader, sum), current);
    drop((reader, db));
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn readers_in_wal_mode_never_see_an_error_nor_a_state_that_was_not_committed() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql(
        "x.db",
        "PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE TABLE total(n);
        INSERT INTO total VALUES (0);",
    );
    primary.wait_position_equal(&replica, "x.db");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop_at_end = StopAtEnd(&stop);
        let reading = scope.spawn(|| {
            let reader = replica.open("x.db");
            reader.busy_timeout(std::time::Duration::ZERO).unwrap();
            let mut reads = 0u64;
            while !stop.load(Ordering::Relaxed) {
                // Each transaction changes both.
                assert_eq!(ask(&reader, "SELECT (SELECT count(*) FROM t) - n FROM total"), "0");
                reads += 1;
            }
            reads
        });
        let db = primary.open("x.db");
        exec(&db, "PRAGMA synchronous=OFF");
        let write = || {
            for _ in 0..1500 {
                exec(
                    &db,
                    "BEGIN; INSERT INTO t(v) VALUES (randomblob(4000)); UPDATE total SET n = n + 1; COMMIT;",
                );
            }
            primary.wait_position_equal(&replica, "x.db");
        };
        write();
        drop(stop_at_end);
        assert!(reading.join().unwrap() > 100);
        // Now that nobody reads all the time, the replica's WAL begins anew: it does not grow with what is written.
        let wal = || fs::metadata(replica.path("x.db-wal")).map_or(0, |m| m.len());
        let before = wal();
        write();
        assert!(wal() < before + (8 << 20), "{before} -> {}", wal());
    });
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn readers_in_rollback_mode_see_committed_states_and_wait_a_bounded_time() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql(
        "x.db",
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE TABLE total(n); INSERT INTO total VALUES (0);",
    );
    primary.wait_position_equal(&replica, "x.db");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop_at_end = StopAtEnd(&stop);
        let reading = scope.spawn(|| {
            // Waits as any application does that sets a timeout; never longer than that.
            let reader = replica.open("x.db");
            let mut reads = 0u64;
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(ask(&reader, "SELECT (SELECT count(*) FROM t) - n FROM total"), "0");
                reads += 1;
            }
            reads
        });
        let db = primary.open("x.db");
        exec(&db, "PRAGMA synchronous=OFF");
        for _ in 0..300 {
            exec(
                &db,
                "BEGIN; INSERT INTO t(v) VALUES (randomblob(4000)); UPDATE total SET n = n + 1; COMMIT;",
            );
        }
        primary.wait_position_equal(&replica, "x.db");
        drop(stop_at_end);
        assert!(reading.join().unwrap() > 50);
    });
    // A transaction that stays open keeps what it sees; when it ends, everything that waited arrives.
    let mut holder = Shell::open(&replica.path("x.db"));
    holder.run("BEGIN;");
    assert_eq!(holder.run(&format!("{COUNT};")), "300");
    for _ in 0..5 {
        primary.sql("x.db", "BEGIN; INSERT INTO t(v) VALUES (1); UPDATE total SET n = n + 1; COMMIT;");
    }
    replica.wait_for("the replica knows that it is behind", || {
        replica.database("x.db").is_some_and(|db| db["lag"]["transactions"] == 5)
    });
    assert_eq!(holder.run(&format!("{COUNT};")), "300");
    holder.run("COMMIT;");
    replica.wait_sql("x.db", COUNT, "305");
    drop(holder);
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn one_blocked_database_does_not_hold_up_the_others() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for name in ["blocked.db", "free.db"] {
        primary.sql(name, CREATE_DELETE);
        primary.wait_position_equal(&replica, name);
    }
    let mut holder = Shell::open(&replica.path("blocked.db"));
    holder.run("BEGIN; SELECT * FROM t;");
    let before = replica.position("blocked.db");
    for i in 2..=50u32 {
        primary.sql("blocked.db", "INSERT INTO t(v) VALUES (randomblob(2000))");
        primary.sql("free.db", "INSERT INTO t(v) VALUES (randomblob(2000))");
        if i % 10 == 0 {
            primary.wait_position_equal(&replica, "free.db");
        }
    }
    primary.sql("new.db", CREATE_WAL);
    assert_equal(&primary, &replica, "new.db");
    assert_equal(&primary, &replica, "free.db");
    assert_eq!(replica.position("blocked.db"), before);
    // What waits is safe in the replica's log: the primary is not needed for it.
    primary.stop();
    holder.run("COMMIT;");
    replica.wait_sql("blocked.db", COUNT, "50");
    drop(holder);
    assert_sane(&replica, "blocked.db");
}

#[test]
fn a_late_joiner_gets_a_snapshot_when_the_beginning_of_the_log_is_gone() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("log.segment-size=64KiB").set("log.retention-age=0s").set("log.retention-size=64KiB").start();
    let oldest = || primary.status()["log"]["oldest_lsn"].as_u64().unwrap();
    let before = oldest();
    for (name, create) in [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)] {
        primary.sql(name, create);
        primary.sql(name, FILL);
        primary.sql(name, FILL);
    }
    // Enough for several segments.
    let db = primary.open("wal.db");
    exec(&db, "PRAGMA synchronous=OFF");
    for _ in 0..100 {
        exec(&db, "UPDATE t SET v = randomblob(3000) WHERE id = 1");
    }
    drop(db);
    primary.wait_for("old records are removed", || oldest() > before);
    let replica = fleet.replica("b", &primary);
    for name in ["wal.db", "delete.db"] {
        assert_equal(&primary, &replica, name);
        assert_eq!(replica.sql(name, COUNT), "601");
    }
    assert!(replica.log().contains("snapshot"), "how else?");
    // From here on it follows as any other.
    primary.sql("wal.db", "INSERT INTO t(v) VALUES (1)");
    assert_equal(&primary, &replica, "wal.db");
}

#[test]
fn large_transactions_do_not_escape_retention() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("log.segment-size=64KiB").set("log.retention-age=0s").set("log.retention-size=1MiB").start();
    primary.sql("x.db", CREATE_DELETE);
    for _ in 0..6 {
        primary.sql("x.db", FILL);
    }
    // The content of every LTX file and of every segment.
    let bytes = || {
        // It fails when the agent removes a file that it has just listed.
        let du = wait_for("nothing is removed while it is counted", PATIENCE, || {
            let mut du = Command::new("du");
            try_run(du.args(["-scb", "--exclude=spare-*", "log", "ltx"]).current_dir(primary.data())).ok()
        });
        du.lines().last().and_then(|total| total.split('\t').next()?.parse::<u64>().ok()).unwrap()
    };
    assert!(bytes() > 6 << 20);
    primary.wait_for("the log is as small as it should be", || bytes() < 3 << 20);
    // More may go between the one look and the other.
    primary.wait_for("the size that it tells is that", || {
        primary.status()["log"]["bytes"].as_u64().unwrap() <= bytes()
    });
    assert_sane(&primary, "x.db");
    // Nor do they, once the log was read again.
    primary.restart();
    let replica = fleet.replica("b", &primary);
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn a_replica_that_was_away_goes_on_where_it_was() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let names = [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)];
    for (name, create) in names {
        primary.sql(name, create);
        primary.wait_position_equal(&replica, name);
    }
    for round in 0..4 {
        // Stopped, killed, and left alone by its primary.
        match round {
            0 => drop(replica.stop()),
            1 | 2 => drop(replica.kill()),
            _ => drop(primary.kill().start()),
        }
        for (name, _) in names {
            for _ in 0..5 {
                primary
                    .sql(name, "INSERT INTO t(v) VALUES (randomblob(5000)); DELETE FROM t WHERE id % 7 = 0;");
            }
        }
        if round < 3 {
            replica.start();
        }
        replica.wait_connected();
        for (name, _) in names {
            assert_equal(&primary, &replica, name);
        }
    }
    assert!(!replica.log().contains("snapshot"), "the log had everything");
}

#[test]
fn a_replica_starts_before_its_primary() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.start();
    assert_eq!(replica.status()["role"]["upstream"]["connected"], false);
    assert!(!replica.path(".primary").exists());
    primary.start();
    primary.sql("x.db", CREATE_WAL);
    replica.wait_connected();
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn a_replica_feeds_further_replicas() {
    let fleet = Fleet::new();
    let (primary, middle) = fleet.pair();
    let last = fleet.replica("c", &middle);
    for (name, create) in [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)] {
        primary.sql(name, create);
        let reader_of = |host: &Host| {
            primary.wait_position_equal(host, name);
            host.open(name)
        };
        let (in_the_middle, at_the_end) = (reader_of(&middle), reader_of(&last));
        for rows in 2..20u32 {
            primary.sql(name, "INSERT INTO t(v) VALUES (randomblob(3000))");
            wait_seen(&at_the_end, COUNT, &rows.to_string());
            wait_seen(&in_the_middle, COUNT, &rows.to_string());
        }
        drop((in_the_middle, at_the_end));
        assert_equal(&primary, &last, name);
    }
    middle.kill();
    primary.sql("wal.db", FILL);
    middle.start();
    assert_equal(&primary, &last, "wal.db");
    fs::remove_file(primary.path("delete.db")).unwrap();
    last.wait_gone("delete.db");
    // A joiner at the end gets everything from its upstream, also what is older than the connection.
    let joiner = fleet.replica("d", &last);
    assert_equal(&primary, &joiner, "wal.db");
}

#[test]
fn many_databases_at_once() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let name = |i: u32| format!("{i}.db");
    for i in 0..100 {
        let db = primary.open(&name(i));
        exec(&db, if i % 2 == 0 { CREATE_WAL } else { CREATE_DELETE });
    }
    let writers: Vec<_> = (0..100).map(|i| primary.open(&name(i))).collect();
    for db in &writers {
        exec(db, "PRAGMA synchronous=OFF; INSERT INTO t(v) VALUES (2);");
    }
    drop(writers);
    let positions = |host: &Host| {
        let status = host.status();
        let all = status["databases"].as_array().unwrap().iter();
        all.map(|db| format!("{} {} {}", db["name"], db["txid"], db["checksum"])).collect::<Vec<_>>()
    };
    let expected = positions(&primary);
    assert_eq!(expected.len(), 100);
    replica.wait_for("all databases arrive", || positions(&replica) == expected);
    for i in [0, 1, 98, 99] {
        assert_equal(&primary, &replica, &name(i));
    }
}

#[test]
fn import_replaces_a_live_database_under_open_connections() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (name, create) in [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)] {
        primary.sql(name, create);
        primary.sql(name, FILL);
        primary.wait_position_equal(&replica, name);
        let (writer, reader) = (primary.open(name), replica.open(name));
        assert_eq!((ask(&writer, COUNT), ask(&reader, COUNT)), ("301".into(), "301".into()));

        // Another schema, another size, another journal mode; then another page size; larger and smaller.
        for (round, page_size) in [4096, 4096, 1024].into_iter().enumerate() {
            if name == "wal.db" && page_size != 4096 {
                continue;
            }
            let file = fleet.scratch().join(format!("{round}-{name}"));
            sqlite3(&file, &format!("PRAGMA page_size={page_size}; CREATE TABLE other(a, b); CREATE TABLE t(id INTEGER PRIMARY KEY, v, extra);
                INSERT INTO t(v) VALUES ('imported {round}'); PRAGMA user_version={round};"));
            let before = primary.txid(name);
            let said = primary.import(name, &file);
            assert!(said.contains(name), "{said}");
            assert_eq!(primary.txid(name), before + 1);
            for connection in [&writer, &reader] {
                wait_seen(connection, "SELECT v FROM t", &format!("imported {round}"));
                assert_eq!(ask(connection, "PRAGMA integrity_check"), "ok");
            }
            exec(&writer, "INSERT INTO other VALUES (1, 2)");
            wait_seen(&reader, "SELECT count(*) FROM other", "1");
        }
        drop((writer, reader));
        assert_equal(&primary, &replica, name);
        primary.restart();
        replica.wait_connected();
        primary.sql(name, "INSERT INTO t(v) VALUES ('after')");
        assert_equal(&primary, &replica, name);
    }
    // What is no database, or not all of one, changes nothing.
    let position = primary.position("wal.db");
    let bad = fleet.scratch().join("bad.db");
    for (content, why) in [(&b"not a database, only text".repeat(50)[..], "SQLite"), (&b""[..], "")] {
        fs::write(&bad, content).unwrap();
        let error = primary.try_import("wal.db", &bad).unwrap_err();
        assert!(error.contains("bad.db") && error.contains(why), "{error}");
    }
    let error = replica.try_import("wal.db", &fleet.scratch().join("0-wal.db")).unwrap_err();
    assert!(error.contains("not the primary") && error.contains("run it on a"), "{error}");
    assert_eq!(primary.position("wal.db"), position);
    assert_equal(&primary, &replica, "wal.db");
}

#[test]
fn exports_made_while_others_write_are_exact_past_states() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (name, mode) in [("wal.db", "wal"), ("delete.db", "delete")] {
        let db = primary.open(name);
        set_journal_mode(&db, mode);
        exec(
            &db,
            "PRAGMA synchronous=OFF; CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE TABLE total(n); INSERT INTO total VALUES (0);",
        );
        exec(&db, FILL);
        exec(&db, "UPDATE total SET n = 300");
        primary.wait_position_equal(&replica, name);
        let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let stop_at_end = StopAtEnd(&stop);
            let (stop, written) = (&stop, &written);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    exec(
                        &db,
                        "BEGIN; INSERT INTO t(v) VALUES (randomblob(20000)); UPDATE total SET n = n + 1;
                        DELETE FROM t WHERE id = (SELECT min(id) FROM t) AND (SELECT n FROM total) > 1000;
                        UPDATE total SET n = n - changes();
                        UPDATE t SET v = randomblob(3000) WHERE id = (SELECT min(id) FROM t) + abs(random()) % 300; COMMIT;",
                    );
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
            let mut positions = Vec::new();
            for i in 0..6 {
                let seen = written.load(Ordering::Relaxed);
                wait_for("the writer goes on", PATIENCE, || {
                    (written.load(Ordering::Relaxed) > seen).then_some(())
                });
                for host in [&primary, &replica] {
                    let file = fleet.scratch().join(format!("{i}-{}-{name}", host.name()));
                    let position = host.export(name, &file);
                    assert_eq!(position.split_once('/').unwrap().1, checksum_of(&file));
                    integrity_check(&file, "an export");
                    assert_eq!(sqlite3(&file, "SELECT count(*) - (SELECT n FROM total) FROM t"), "0");
                    positions.push(position);
                }
            }
            drop(stop_at_end);
            assert_ne!(positions.first(), positions.last());
        });
        assert_equal(&primary, &replica, name);
    }
    let mut export = primary.litefs(&["export", "missing.db"]);
    let error = try_run(export.arg(fleet.scratch().join("missing.db"))).unwrap_err();
    assert!(error.contains("missing.db"), "{error}");
    assert!(!fleet.scratch().join("missing.db").exists());
}

#[test]
fn drops_and_new_beginnings_reach_a_replica_that_was_away() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let names = [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)];
    for (name, create) in names {
        primary.sql(name, create);
        primary.wait_position_equal(&replica, name);
    }
    // Dropped while it is away.
    replica.stop();
    names.iter().for_each(|(name, _)| fs::remove_file(primary.path(name)).unwrap());
    replica.start();
    names.iter().for_each(|(name, _)| replica.wait_gone(name));
    // Created again, dropped and created while it is away, killed this time.
    for (name, create) in names {
        primary.sql(name, &create.replace("(1)", "('second')"));
        primary.wait_position_equal(&replica, name);
    }
    replica.kill();
    for (name, create) in names {
        let txid = primary.txid(name);
        fs::remove_file(primary.path(name)).unwrap();
        primary.sql(name, &create.replace("(1)", "('third')"));
        assert!(primary.txid(name) > txid + 1);
    }
    replica.start();
    for (name, _) in names {
        assert_equal(&primary, &replica, name);
        assert_eq!(replica.sql(name, "SELECT v FROM t"), "third");
    }
    // The primary remembers across its own restart that a dropped database has a history.
    let txid = primary.txid("wal.db");
    fs::remove_file(primary.path("wal.db")).unwrap();
    primary.restart();
    assert!(primary.database("wal.db").is_none());
    primary.sql("wal.db", CREATE_WAL);
    assert!(primary.txid("wal.db") > txid + 1);
    assert_equal(&primary, &replica, "wal.db");
}
