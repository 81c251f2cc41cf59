//! A full disk fails what needs the space, and costs nothing that was acknowledged.

use litefs_tests::{Fleet, Host, Mounted, Role, Shell, assert_equal, assert_sane, run, sqlite3};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A host whose data directory is on a small file system, and what takes that away at the end.
fn small_host<'a>(fleet: &'a Fleet, name: &str, role: Role<'a>, size: &str) -> (Mounted, Host) {
    let host = fleet.host(name, role);
    let disk = Mounted::tmpfs(&host.data(), size);
    // Small segments, so that the log takes no more than it has.
    host.set("log.segment-size=1MiB").set("log.retention-size=2MiB").set("log.retention-age=0s");
    host.expect_error("No space left on device");
    (disk, host)
}

/// Leaves no byte free in a directory's file system.
fn fill_up(dir: &Path) -> PathBuf {
    let ballast = dir.join("ballast");
    let mut file = File::options().create(true).append(true).open(&ballast).expect("it can be made");
    for bytes in [1 << 20, 1 << 16, 1 << 12] {
        while file.write_all(&vec![1; bytes]).is_ok() {}
    }
    ballast
}

/// Whether SQLite says that the disk is full.
fn is_full(answer: &str) -> bool {
    answer.contains("database or disk is full")
}

/// Commits until the disk is full; gives the number of acknowledged rows. The error must be SQLite's for a full disk.
#[track_caller]
fn insert_until_full(shell: &mut Shell, from: u64, bytes: u64) -> u64 {
    for n in from.. {
        let answer = shell.ask(&format!("INSERT INTO t VALUES ({n}, randomblob({bytes}));"));
        if !answer.is_empty() {
            assert!(is_full(&answer), "{answer}");
            return n - 1;
        }
        assert!(n < 100_000, "the disk does not become full");
    }
    unreachable!()
}

#[test]
fn a_full_disk_fails_the_commit_and_nothing_else() {
    for mode in ["WAL", "DELETE"] {
        for synchronous in ["FULL", "OFF"] {
            let fleet = Fleet::new();
            let (_disk, primary) = small_host(&fleet, "a", Role::Primary, "24m");
            primary.start();
            let replica = fleet.replica("b", &primary);
            for name in ["app.db", "other.db"] {
                primary.sql(
                    name,
                    &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(n INTEGER PRIMARY KEY, x);"),
                );
            }
            let [mut shell, mut other] = ["app.db", "other.db"].map(|name| Shell::open(&primary.path(name)));
            for shell in [&mut shell, &mut other] {
                shell.run(&format!("PRAGMA synchronous={synchronous};"));
            }
            assert_eq!(other.ask("INSERT INTO t VALUES (1, 'x');"), "");
            let mut rows = insert_until_full(&mut shell, 1, 15_000);
            // The very last byte, in small steps.
            fill_up(&primary.data());
            rows = insert_until_full(&mut shell, rows + 1, 10);
            // Again and again: the error stays the same, a rolled-back transaction is no damage, reading works.
            let spilled = "PRAGMA cache_size=5; BEGIN; UPDATE t SET x = randomblob(1500); COMMIT;";
            for sql in [spilled, "ROLLBACK;", "UPDATE t SET x = randomblob(1500) WHERE n = 1;"] {
                let answer = shell.ask(sql);
                let expected = answer.is_empty() || answer.contains("no transaction is active");
                assert!(expected || is_full(&answer), "{answer}");
            }
            assert_eq!(shell.run("SELECT count(*), max(n) FROM t;"), format!("{rows}|{rows}"));
            let mut others = 1;
            for n in 2..6 {
                let answer = other.ask(&format!("INSERT INTO t VALUES ({n}, randomblob(5000));"));
                assert!(answer.is_empty() || is_full(&answer), "{answer}");
                others += u64::from(answer.is_empty());
            }
            for name in ["app.db", "other.db"] {
                let db = primary.database(name).expect("it is there");
                assert_eq!(db["state"], "ok", "{mode}, {synchronous}: {db}");
            }
            // With space it works again, without a restart.
            fs::remove_file(primary.data().join("ballast")).unwrap();
            run(Command::new("mount").args(["-o", "remount,size=64m"]).arg(primary.data()));
            primary.wait_for("commits work again", || {
                let answer = shell.ask(&format!("INSERT INTO t VALUES ({}, randomblob(15000));", rows + 1));
                answer.is_empty()
            });
            rows += 1;
            assert_eq!(other.ask("INSERT INTO t(x) VALUES (randomblob(5000));"), "");
            others += 1;
            drop((shell, other));
            for (name, rows) in [("app.db", rows), ("other.db", others)] {
                assert_equal(&primary, &replica, name);
                assert_eq!(replica.sql(name, "SELECT count(*) FROM t"), rows.to_string(), "{name}, {mode}");
            }
            primary.kill();
            primary.start();
            replica.wait_connected();
            assert_equal(&primary, &replica, "app.db");
        }
    }
}

#[test]
fn a_commit_for_which_the_log_has_no_space_is_never_acknowledged() {
    for synchronous in ["FULL", "OFF"] {
        let fleet = Fleet::new();
        let (_disk, primary) = small_host(&fleet, "a", Role::Primary, "24m");
        primary.start();
        primary.sql(
            "app.db",
            "PRAGMA journal_mode=WAL;\nCREATE TABLE t(id INTEGER PRIMARY KEY, n, x);\n\
             WITH RECURSIVE i(v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM i WHERE v < 20) \
             INSERT INTO t SELECT v, 0, randomblob(3000) FROM i;",
        );
        let mut shell = Shell::open(&primary.path("app.db"));
        shell.run(&format!("PRAGMA synchronous={synchronous}; PRAGMA wal_autocheckpoint=100;"));
        // The WAL is as large as it will be and is written from its beginning again: only the log still grows.
        let (mut tried, mut acknowledged, mut refused) = (0, 0, 0);
        let mut update = |shell: &mut Shell| {
            tried += 1;
            let answer = shell.ask(&format!("UPDATE t SET n = {tried}, x = randomblob(3000);"));
            assert!(answer.is_empty() || answer.contains("full"), "{answer}");
            if answer.is_empty() {
                acknowledged = tried;
            }
            (acknowledged, answer.is_empty())
        };
        for _ in 0..20 {
            assert!(update(&mut shell).1);
        }
        fill_up(&primary.data());
        while refused < 10 {
            let (acknowledged, told) = update(&mut shell);
            refused += u32::from(!told);
            assert!(acknowledged < 1000, "the log does not become full");
            let seen = shell.run("SELECT DISTINCT n FROM t;");
            assert_eq!(seen, acknowledged.to_string(), "a refused update is there, or half of it");
        }
        fs::remove_file(primary.data().join("ballast")).unwrap();
        primary.wait_for("commits work again", || update(&mut shell).1);
        let (acknowledged, _) = update(&mut shell);
        drop(shell);
        assert_sane(&primary, "app.db");
        primary.kill();
        primary.start();
        assert_eq!(primary.sql("app.db", "SELECT DISTINCT n FROM t"), acknowledged.to_string());
        assert_sane(&primary, "app.db");
    }
}

#[test]
fn a_replica_whose_disk_is_full_waits_and_then_has_everything() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let (_disk, replica) = small_host(&fleet, "b", Role::ReplicaOf(&primary), "16m");
    replica.start();
    replica.wait_connected();
    for mode in ["WAL", "DELETE"] {
        primary.sql(&format!("{mode}.db"), &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x);"));
        primary.wait_position_equal(&replica, &format!("{mode}.db"));
    }
    // Connected already: a new connection to a database in WAL mode needs space, with or without an agent.
    let mut readers = ["WAL.db", "DELETE.db"].map(|name| Shell::open(&replica.path(name)));
    for reader in &mut readers {
        assert_eq!(reader.run("SELECT count(*) FROM t;"), "0");
    }
    fill_up(&replica.data());
    for _ in 0..40 {
        for mode in ["WAL", "DELETE"] {
            primary.sql(&format!("{mode}.db"), "INSERT INTO t VALUES (randomblob(100000));");
        }
    }
    replica.wait_for("the replica says that its disk is full", || replica.log().contains("No space left"));
    replica.assert_running();
    // What it has can be read.
    for reader in &mut readers {
        let rows = reader.run("SELECT count(*) FROM t;");
        assert!(rows.parse::<u64>().is_ok_and(|rows| rows < 40), "{rows}");
    }
    for name in ["WAL.db", "DELETE.db"] {
        assert_eq!(replica.database(name).expect("it is there")["state"], "ok");
    }
    run(Command::new("mount").args(["-o", "remount,size=96m"]).arg(replica.data()));
    for (name, reader) in ["WAL.db", "DELETE.db"].iter().zip(&mut readers) {
        assert_equal(&primary, &replica, name);
        assert_eq!(reader.run("SELECT count(*) FROM t;"), "40");
    }
}

#[test]
fn an_import_for_which_there_is_no_space_changes_nothing() {
    let fleet = Fleet::new();
    let (_disk, primary) = small_host(&fleet, "a", Role::Primary, "24m");
    primary.start();
    primary.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES ('kept');");
    let source = fleet.scratch().join("source.db");
    sqlite3(&source, "CREATE TABLE t(x);\nINSERT INTO t VALUES (randomblob(30000000));");
    for name in ["app.db", "new.db"] {
        let error = primary.try_import(name, &source).expect_err("it does not fit");
        assert!(error.contains("No space left"), "{error}");
    }
    assert_eq!(primary.database("new.db"), None);
    let staged = fs::read_dir(primary.data().join("staging")).unwrap().count();
    assert_eq!(staged, 0, "the import was left in the staging directory");
    assert_eq!(primary.sql("app.db", "SELECT x FROM t"), "kept");
    primary.sql("app.db", "INSERT INTO t VALUES (2);");
    assert_sane(&primary, "app.db");
}
