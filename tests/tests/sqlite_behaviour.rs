//! What statements of SQLite can do to a database on the primary: each time the replica ends at the same position with the
//! same bytes, and what it shows is sound.

use litefs_tests::{
    FILL, Fleet, JOURNAL_MODES, Shell, ask, assert_equal, checksum_of, exec, is_preload, run,
    set_journal_mode, sqlite3, try_exec, wait_seen,
};
use rusqlite::ErrorCode;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

#[test]
fn every_page_size_replicates() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in ["delete", "wal"] {
        for page_size in [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536] {
            let name = format!("{mode}-{page_size}.db");
            let db = primary.open(&name);
            exec(&db, &format!("PRAGMA page_size={page_size};"));
            set_journal_mode(&db, mode);
            exec(
                &db,
                "PRAGMA synchronous=OFF; CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE INDEX i ON t(v);",
            );
            exec(&db, FILL);
            exec(&db, "DELETE FROM t WHERE id % 5 = 0; UPDATE t SET v = randomblob(10) WHERE id % 7 = 0;");
            exec(&db, FILL);
            drop(db);
            assert_equal(&primary, &replica, &name);
            assert_eq!(replica.sql(&name, "PRAGMA page_size"), page_size.to_string());
        }
    }
}

#[test]
fn vacuum_shrinks_the_replica_too_also_by_more_than_256_pages() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        let db = primary.open(&name);
        set_journal_mode(&db, mode);
        exec(&db, "PRAGMA synchronous=OFF; CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
        for _ in 0..3 {
            exec(&db, FILL);
        }
        primary.wait_position_equal(&replica, &name);
        let reader = replica.open(&name);
        let before: u32 = ask(&db, "PRAGMA page_count").parse().unwrap();
        exec(&db, "DELETE FROM t WHERE id > 20; VACUUM;");
        let after: u32 = ask(&db, "PRAGMA page_count").parse().unwrap();
        assert!(before - after > 600, "{mode}: {before} -> {after}");
        wait_seen(&reader, "PRAGMA page_count", &after.to_string());
        exec(&db, "INSERT INTO t(v) VALUES (randomblob(20000))");
        wait_seen(&reader, "SELECT count(*) FROM t", "21");
        assert_equal(&primary, &replica, &name);
        exec(&db, "DELETE FROM t; VACUUM;");
        wait_seen(&reader, "SELECT count(*) FROM t", "0");
        drop(db);
        assert_equal(&primary, &replica, &name);
        // The file itself has shrunk, now that everybody has let go of it.
        drop(reader);
        replica.sql(&name, "SELECT count(*) FROM t");
        assert_eq!(replica.database(&name).unwrap()["pages"], 2, "{mode}");
    }
}

#[test]
fn vacuum_changes_the_page_size_under_an_open_reader() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let db = primary.open("x.db");
    exec(&db, "PRAGMA synchronous=OFF; CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
    exec(&db, FILL);
    primary.wait_position_equal(&replica, "x.db");
    let reader = replica.open("x.db");
    for page_size in [512, 65536, 1024, 8192] {
        exec(&db, &format!("PRAGMA page_size={page_size}; VACUUM;"));
        assert_eq!(ask(&db, "PRAGMA page_size"), page_size.to_string());
        exec(&db, "INSERT INTO t(v) VALUES (randomblob(1000))");
        let rows = ask(&db, "SELECT count(*) FROM t");
        wait_seen(&reader, "SELECT count(*) FROM t", &rows);
        assert_eq!(ask(&reader, "PRAGMA integrity_check"), "ok");
        assert_equal(&primary, &replica, "x.db");
    }
}

#[test]
fn auto_vacuum_moves_pages_and_cuts_the_file() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in ["delete", "wal"] {
        for auto_vacuum in ["full", "incremental"] {
            let name = format!("{mode}-{auto_vacuum}.db");
            let db = primary.open(&name);
            exec(&db, &format!("PRAGMA auto_vacuum={auto_vacuum}; PRAGMA synchronous=OFF;"));
            set_journal_mode(&db, mode);
            exec(
                &db,
                "CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE TABLE u(v); CREATE INDEX i ON t(v);",
            );
            exec(&db, FILL);
            exec(&db, "INSERT INTO u SELECT v FROM t; DELETE FROM t WHERE id < 250; DROP TABLE u;");
            if auto_vacuum == "incremental" {
                for _ in 0..5 {
                    exec(&db, "PRAGMA incremental_vacuum(40);");
                }
                exec(&db, "INSERT INTO t(v) VALUES (randomblob(30000)); PRAGMA incremental_vacuum;");
            }
            drop(db);
            assert_equal(&primary, &replica, &name);
            let pages = replica.database(&name).unwrap()["pages"].as_u64().unwrap();
            assert!(pages < 200, "{name}: {pages}");
        }
    }
}

#[test]
fn a_commit_over_two_attached_databases_reaches_both() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let (one, two) = (format!("{mode}-1.db"), format!("{mode}-2.db"));
        let db = primary.open(&one);
        db.execute("ATTACH ?1 AS two", [primary.path(&two).to_str()]).unwrap();
        set_journal_mode(&db, mode);
        assert_eq!(ask(&db, &format!("PRAGMA two.journal_mode={mode}")), mode);
        exec(&db, "BEGIN; CREATE TABLE t(v); CREATE TABLE two.t(v); COMMIT;");
        let (a, b) = (primary.txid(&one), primary.txid(&two));
        for n in 1..=10 {
            exec(
                &db,
                "BEGIN; INSERT INTO t VALUES (randomblob(9000)); INSERT INTO two.t VALUES (randomblob(9000)); COMMIT;",
            );
            // Asked after each: behind the preload door commits of a WAL that wait together become one transaction.
            assert_eq!((primary.txid(&one), primary.txid(&two)), (a + n, b + n), "{mode}");
        }
        exec(&db, "BEGIN; INSERT INTO t VALUES (1); INSERT INTO two.t VALUES (1); ROLLBACK;");
        assert_eq!((primary.txid(&one), primary.txid(&two)), (a + 10, b + 10), "{mode}");
        drop(db);
        assert_equal(&primary, &replica, &one);
        assert_equal(&primary, &replica, &two);
        assert_eq!(replica.sql(&two, "SELECT count(*) FROM t"), "10");
    }
    // The super-journals are gone, and were never taken for databases.
    let left: Vec<_> = fs::read_dir(primary.mount()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("-mj")), "{left:?}");
    assert_eq!(primary.status()["databases"].as_array().unwrap().len(), 8);
}

#[test]
fn savepoints_and_spilled_caches_commit_what_sqlite_commits() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        for cache in [1, 10] {
            let name = format!("{mode}-{cache}.db");
            let db = primary.open(&name);
            set_journal_mode(&db, mode);
            exec(&db, &format!("PRAGMA cache_size={cache}; PRAGMA synchronous=NORMAL;"));
            exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE INDEX i ON t(v);");
            exec(&db, FILL);
            exec(&db, "DELETE FROM t WHERE id > 120");
            let before = primary.txid(&name);
            // Many spills, a part undone, the same pages written again.
            exec(&db, "BEGIN; UPDATE t SET v = randomblob(2000);");
            exec(
                &db,
                "SAVEPOINT a; DELETE FROM t WHERE id % 2; SAVEPOINT b; UPDATE t SET v = randomblob(3000);",
            );
            exec(
                &db,
                "ROLLBACK TO b; UPDATE t SET v = randomblob(100) WHERE id < 20; RELEASE b; ROLLBACK TO a;",
            );
            exec(&db, "INSERT INTO t(v) SELECT randomblob(500) FROM t; RELEASE a; COMMIT;");
            assert_eq!(primary.txid(&name), before + 1, "{name}");
            // Spilled, then undone as a whole. In a rollback mode this may change bytes: those of free pages, which
            // SQLite neither journals nor restores.
            let (position, sum) = (primary.position(&name), ask(&db, "SELECT sum(length(v)) FROM t"));
            exec(&db, "BEGIN; UPDATE t SET v = randomblob(4000); DELETE FROM t WHERE id > 50; ROLLBACK;");
            assert_eq!(ask(&db, "SELECT count(*) FROM t"), "240");
            assert_eq!(ask(&db, "SELECT sum(length(v)) FROM t"), sum);
            if mode == "wal" {
                assert_eq!(primary.position(&name), position, "{name}: a rollback is no transaction");
            }
            primary.wait_position_equal(&replica, &name);
            assert_eq!(replica.sql(&name, "SELECT sum(length(v)) FROM t"), sum);
            exec(&db, "UPDATE t SET v = 'end' WHERE id = 1");
            drop(db);
            assert_equal(&primary, &replica, &name);
        }
    }
}

#[test]
fn transactions_without_changes_take_no_number() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        let db = primary.open(&name);
        set_journal_mode(&db, mode);
        exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES (1, 1);");
        let position = primary.position(&name);
        exec(&db, "BEGIN IMMEDIATE; COMMIT; BEGIN EXCLUSIVE; COMMIT;");
        exec(&db, "BEGIN; INSERT INTO t(v) VALUES (randomblob(50000)); ROLLBACK;");
        exec(&db, "BEGIN; CREATE TABLE u(v); ROLLBACK; SELECT * FROM t; PRAGMA integrity_check;");
        assert!(db.execute("INSERT INTO t VALUES (1, 2)", []).is_err());
        exec(&db, "PRAGMA wal_checkpoint(TRUNCATE);");
        assert_eq!(primary.position(&name), position, "{mode}");
        drop(db);
        assert_eq!(primary.position(&name), position, "{mode}: closed");
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn memory_mapped_connections_write_and_see_what_others_do() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        let db = primary.open(&name);
        exec(&db, "PRAGMA mmap_size=67108864;");
        set_journal_mode(&db, mode);
        exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
        primary.wait_position_equal(&replica, &name);
        let reader = replica.open(&name);
        exec(&reader, "PRAGMA mmap_size=67108864;");
        for round in 1..=5 {
            exec(&db, FILL);
            exec(&db, "UPDATE t SET v = randomblob(300) WHERE id % 3 = 0; DELETE FROM t WHERE id % 4 = 0;");
            primary.sql(&name, "UPDATE t SET v = randomblob(200) WHERE id % 5 = 0;");
            let sum = "SELECT count(*) || '/' || sum(length(v)) FROM t";
            wait_seen(&reader, sum, &ask(&db, sum));
            if round == 3 {
                exec(&db, "DELETE FROM t WHERE id > 10; VACUUM;");
            }
        }
        assert_eq!(ask(&reader, "PRAGMA integrity_check"), "ok");
        drop(db);
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn pages_taken_from_the_free_list_are_captured_although_sqlite_does_not_journal_them() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        let db = primary.open(&name);
        set_journal_mode(&db, mode);
        exec(&db, "PRAGMA synchronous=OFF; CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
        exec(&db, FILL);
        for i in 0..6 {
            exec(&db, "DELETE FROM t WHERE id % 2 = 0");
            assert_ne!(ask(&db, "PRAGMA freelist_count"), "0");
            exec(&db, &format!("INSERT INTO t(v) SELECT randomblob({}) FROM t LIMIT 100", 1500 + i * 700));
            primary.wait_position_equal(&replica, &name);
        }
        // All free, then all used again.
        exec(&db, "DELETE FROM t");
        exec(&db, FILL);
        drop(db);
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn pages_that_the_file_grew_over_without_a_write_are_zeros_everywhere() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        let db = primary.open(&name);
        set_journal_mode(&db, mode);
        exec(&db, "PRAGMA synchronous=OFF; CREATE TABLE keep(v);");
        for _ in 0..3 {
            exec(&db, "BEGIN; CREATE TABLE a(v);");
            exec(
                &db,
                "INSERT INTO a WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100) SELECT randomblob(4000) FROM n;",
            );
            exec(&db, "DROP TABLE a; CREATE TABLE b(v); INSERT INTO b VALUES (randomblob(9000)); COMMIT;");
            exec(&db, "INSERT INTO keep SELECT v FROM b; DROP TABLE b;");
        }
        drop(db);
        assert_equal(&primary, &replica, &name);
        assert_eq!(replica.sql(&name, "SELECT count(*) FROM keep"), "3");
    }
}

#[test]
fn an_application_killed_in_mid_transaction_leaves_what_it_had_committed() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        primary
            .sql(&name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v);"));
        primary.sql(&name, FILL);
        primary.wait_position_equal(&replica, &name);
        let reader = replica.open(&name);
        for round in 0..3 {
            let position = primary.position(&name);
            let mut victim = Shell::open(&primary.path(&name));
            // A cache of one page: pages of the transaction are in the database, or in the WAL, when it dies.
            victim.run(
                "PRAGMA cache_size=1; BEGIN; UPDATE t SET v = randomblob(2000); DELETE FROM t WHERE id % 2;",
            );
            victim.kill();
            assert_eq!(primary.position(&name), position, "{mode}");
            // The next one rolls it back.
            assert_eq!(primary.sql(&name, "SELECT count(*) FROM t"), (300 + round).to_string(), "{mode}");
            assert_eq!(primary.position(&name), position, "{mode}: rolling back is no transaction");
            primary.sql(&name, "INSERT INTO t(v) VALUES (1)");
            wait_seen(&reader, "SELECT count(*) FROM t", &(301 + round).to_string());
            assert_equal(&primary, &replica, &name);
        }
    }
}

#[test]
fn a_killed_transaction_does_not_stop_exports_and_late_joiners() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        primary
            .sql(&name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v);"));
        primary.sql(&name, FILL);
        primary.sql(&name, "DELETE FROM t WHERE id > 100");
        let mut victim = Shell::open(&primary.path(&name));
        // Free pages are written over, which SQLite does not journal.
        victim.run("PRAGMA cache_size=1; BEGIN; UPDATE t SET v = randomblob(500);");
        victim.run("INSERT INTO t(v) SELECT randomblob(3000) FROM t;");
        victim.kill();
        // Nobody opens the database before it is exported.
        let export = fleet.scratch().join(&name);
        primary.export(&name, &export);
        assert_eq!(sqlite3(&export, "PRAGMA integrity_check; SELECT count(*) FROM t;"), "ok\n100", "{mode}");
    }
    let replica = fleet.replica("b", &primary);
    for mode in JOURNAL_MODES {
        assert_equal(&primary, &replica, &format!("{mode}.db"));
    }
}

#[test]
fn a_replica_refuses_writes_with_the_error_for_it() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        primary
            .sql(&name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES (1);"));
        primary.wait_position_equal(&replica, &name);
        let position = replica.position(&name);
        let reader = replica.open(&name);
        if is_preload() {
            // "locked" comes after the busy timeout.
            reader.busy_timeout(std::time::Duration::from_millis(50)).unwrap();
        }
        for sql in
            ["INSERT INTO t VALUES (2)", "DELETE FROM t", "CREATE TABLE u(v)", "DROP TABLE t", "VACUUM"]
        {
            let error = replica.try_sql(&name, sql).unwrap_err();
            // Behind the preload door SQLite has no such error for a WAL (decision 0019).
            let (says, code) = match mode {
                "wal" if is_preload() => ("database is locked", ErrorCode::DatabaseBusy),
                _ => ("attempt to write a readonly database", ErrorCode::ReadOnly),
            };
            assert!(error.contains(says), "{mode}: {sql}: {error}");
            let error = try_exec(&reader, sql).unwrap_err();
            assert_eq!(error.sqlite_error_code(), Some(code), "{mode}: {sql}: {error}");
            // The connection is as good as before.
            assert_eq!(ask(&reader, "SELECT v FROM t"), "1");
        }
        assert_eq!(replica.position(&name), position, "{mode}");
        primary.sql(&name, "INSERT INTO t VALUES (2)");
        wait_seen(&reader, "SELECT count(*) FROM t", "2");
        assert_equal(&primary, &replica, &name);
    }
    let error = replica.try_sql("new.db", "CREATE TABLE t(v)").unwrap_err();
    assert!(error.contains("unable to open database file") || error.contains("readonly"), "{error}");
    assert!(!replica.path("new.db").exists());
}

#[test]
fn what_else_is_in_a_schema_replicates() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql(
        "x.db",
        "PRAGMA journal_mode=WAL;
         PRAGMA user_version=7; PRAGMA application_id=99; PRAGMA encoding='UTF-16';
         CREATE VIRTUAL TABLE f USING fts5(body); CREATE VIRTUAL TABLE r USING rtree(id, a, b);
         CREATE TABLE w(k TEXT PRIMARY KEY, v) WITHOUT ROWID; CREATE TABLE log(what);
         CREATE TRIGGER tr AFTER INSERT ON w BEGIN INSERT INTO log VALUES (new.k); END; CREATE VIEW v AS SELECT k FROM w;
         INSERT INTO f VALUES ('the quick brown fox'), ('the lazy dog'); INSERT INTO r VALUES (1, 2, 3);
         INSERT INTO w VALUES ('a', 1), ('b', 2); INSERT INTO f(f) VALUES ('optimize'); ANALYZE; REINDEX;",
    );
    assert_equal(&primary, &replica, "x.db");
    assert_eq!(replica.sql("x.db", "SELECT body FROM f WHERE f MATCH 'fox'"), "the quick brown fox");
    assert_eq!(
        replica.sql("x.db", "SELECT * FROM r; SELECT * FROM v; SELECT * FROM log; PRAGMA user_version;"),
        "1|2.0|3.0\na\nb\na\nb\n7"
    );

    // Incremental writes into a blob go past the statements.
    let db = primary.open("x.db");
    exec(&db, "CREATE TABLE b(id INTEGER PRIMARY KEY, v); INSERT INTO b VALUES (1, zeroblob(100000));");
    drop(db);
    run(Command::new("python3").arg("-c").arg(
        "import sqlite3, sys\n\
         c = sqlite3.connect(sys.argv[1], isolation_level=None)\n\
         c.execute(\"UPDATE b SET v = ? WHERE id = 1\", (bytes(range(256)) * 400,))\n\
         c.execute('BEGIN'); c.executemany('INSERT INTO b(v) VALUES (?)', [(b'x' * n,) for n in range(0, 5000, 50)]); c.execute('COMMIT')\n",
    ).arg(primary.path("x.db")));
    assert_equal(&primary, &replica, "x.db");
    assert_eq!(replica.sql("x.db", "SELECT count(*), sum(length(v)) FROM b"), "101|349900");
}

/// A database that ends with the page before the one with the lock bytes (at 1 GiB). Almost all of its pages are
/// never used and were never written, so that it takes little room.
fn just_below_the_lock_page(path: &Path) {
    sqlite3(
        path,
        "PRAGMA page_size=65536; CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES (1);",
    );
    let file = File::options().write(true).open(path).expect("it was made");
    file.set_len(u64::from(LAST_BELOW) * 65_536).expect("a sparse file takes no room");
    // The size in pages (file format, section 1.3.8).
    file.write_all_at(&LAST_BELOW.to_be_bytes(), 28).expect("the file is writable");
}

const LAST_BELOW: u32 = (1 << 30) / 65_536;

#[test]
#[ignore = "moves 1 GiB to two hosts: a minute with a debug build"]
fn a_database_grows_over_the_lock_page_at_1_gib() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let replica = fleet.replica("b", &primary);
    let file = fleet.scratch().join("large.db");
    just_below_the_lock_page(&file);
    run(Command::new("cp").arg("--sparse=always").arg(&file).arg(primary.path("large.db")));
    assert_eq!(primary.txid("large.db"), 1);
    primary.wait_position_equal(&replica, "large.db");
    let reader = replica.open("large.db");
    let db = primary.open("large.db");
    exec(&db, "PRAGMA synchronous=OFF;");
    for (i, mode) in ["wal", "delete"].into_iter().enumerate() {
        set_journal_mode(&db, mode);
        exec(&db, "INSERT INTO t(v) VALUES (randomblob(1000000))");
        let pages: u32 = ask(&db, "PRAGMA page_count").parse().unwrap();
        assert!(pages > LAST_BELOW + 15 * (i as u32 + 1), "{pages}");
        wait_seen(&reader, "SELECT count(*) FROM t", &(i + 2).to_string());
        let content = "SELECT group_concat(hex(v)) FROM t";
        assert!(ask(&db, content) == ask(&reader, content), "{mode}");
    }
    let position = primary.wait_position_equal(&replica, "large.db");
    let complaints: Vec<String> = reader
        .prepare("PRAGMA integrity_check(100000)")
        .and_then(|mut check| check.query_map([], |row| row.get(0))?.collect())
        .unwrap();
    for complaint in complaints.iter().flat_map(|c| c.lines()).filter(|c| !c.starts_with("***")) {
        let page = complaint.strip_prefix("Page ").and_then(|c| c.strip_suffix(" is never used"));
        let page = page.or_else(|| complaint.strip_prefix("Page ")?.strip_suffix(": never used"));
        let page: u32 = page.and_then(|page| page.parse().ok()).unwrap_or_else(|| panic!("{complaint}"));
        assert!((3..=LAST_BELOW).contains(&page), "{complaint}");
    }
    drop((db, reader));
    for host in [&primary, &replica] {
        assert_eq!(host.export("large.db", &file), position);
        assert_eq!(position.split_once('/').unwrap().1, checksum_of(&file), "pages of {}", host.name());
    }
}
