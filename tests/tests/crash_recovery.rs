//! What an agent makes of a data directory that a crash has left: of itself, or of an application. That of a host is in
//! `power_failure`.

use fastrand::Rng;
use litefs_tests::data_files::{flip, kill_before_it_marks, sidecar};
use litefs_tests::{
    Fleet, Host, Role, Shell, SystemCall, assert_equal, assert_nothing_diverged, is_about_fuse,
    replace_system_calls, sqlite3,
};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// What a start has written to the log.
fn log_of_start(host: &Host) -> String {
    let before = host.log().len();
    host.start();
    host.log()[before..].to_owned()
}

/// Creates a table with 200 rows of about a kilobyte.
fn fill(host: &Host, database: &str, mode: &str) {
    let sql = format!(
        "PRAGMA journal_mode={mode};\n\
         CREATE TABLE t(id INTEGER PRIMARY KEY, x);\n\
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200) \
         INSERT INTO t SELECT i, printf('%04d', i) || hex(zeroblob(500)) FROM n;"
    );
    host.sql(database, &sql);
}

const SUM: &str = "SELECT count(*), total(id), total(length(x)), min(x), max(x) FROM t";

#[test]
fn what_was_written_without_a_journal_just_before_a_crash_is_captured() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (first_mode, mode) in [("DELETE", "OFF"), ("DELETE", "MEMORY"), ("WAL", "OFF"), ("WAL", "MEMORY")] {
        let name = format!("{first_mode}-{mode}.db");
        fill(&primary, &name, first_mode);
        primary.wait_position_equal(&replica, &name);
        for round in 1..=3 {
            // The door does not see what a connection writes that opened the database in WAL mode.
            primary.sql(&name, &format!("PRAGMA journal_mode={first_mode};"));
            let mut shell = Shell::open(&primary.path(&name));
            shell.run("SELECT count(*) FROM t;");
            shell.run(&format!("PRAGMA journal_mode={mode}; PRAGMA synchronous=OFF;"));
            shell.run(&format!("UPDATE t SET x = 'round {round}' || substr(x, 8) WHERE id <= 100;"));
            primary.kill();
            shell.kill();
            primary.start();
            replica.wait_connected();
            assert_equal(&primary, &replica, &name);
            let rows = replica.sql(&name, &format!("SELECT count(*) FROM t WHERE x LIKE 'round {round}%'"));
            assert_eq!(rows, "100", "{name}, round {round}");
        }
    }
}

#[test]
fn a_hot_journal_is_rolled_back_and_nothing_of_its_transaction_is_left() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let modes = ["DELETE", "TRUNCATE", "PERSIST"];
    let mut before = Vec::new();
    for mode in modes {
        let name = format!("{mode}.db");
        fill(&primary, &name, mode);
        // Pages on the free list are written without being journaled.
        primary.sql(&name, &format!("PRAGMA journal_mode={mode}; DELETE FROM t WHERE id > 150;"));
        primary.wait_position_equal(&replica, &name);
        before.push((primary.sql(&name, SUM), primary.position(&name)));
    }
    let shells = modes.map(|mode| {
        let mut shell = Shell::open(&primary.path(format!("{mode}.db")));
        shell.run(&format!(
            "PRAGMA journal_mode={mode}; PRAGMA cache_size=5; BEGIN; UPDATE t SET x = 'changed' || x; \
             INSERT INTO t SELECT id + 1000, x FROM t; DELETE FROM t WHERE id < 20;"
        ));
        shell
    });
    primary.kill();
    shells.into_iter().for_each(Shell::kill);
    for mode in modes {
        let journal = fs::metadata(primary.stored(format!("{mode}.db-journal"))).expect("a journal");
        assert!(journal.len() > 10_000, "the transaction did not spill");
    }
    primary.start();
    replica.wait_connected();
    for (mode, (rows, position)) in modes.iter().zip(before) {
        let name = format!("{mode}.db");
        // After a mark the log is not replayed, and what was written over free pages stays: a transaction of its own.
        let of_its_own = format!("they become a transaction of their own database={name}");
        assert!(
            primary.position(&name) == position || primary.log().contains(&of_its_own),
            "{name}: a rollback is no transaction"
        );
        assert_eq!(primary.sql(&name, SUM), rows);
        assert_equal(&primary, &replica, &name);
        primary.sql(&name, "INSERT INTO t VALUES (5000, 'after')");
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn commits_that_only_a_wal_has_are_dropped_with_a_word() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    fill(&primary, "app.db", "WAL");
    let mut application = Shell::open(&primary.path("app.db"));
    application.run("UPDATE t SET x = 'known to the log' WHERE id = 1;");
    let position = primary.wait_position_equal(&replica, "app.db");
    primary.kill();
    application.kill();
    // Frames that are as valid as the others, of a commit that did not reach the log.
    let mut behind_the_agent = Shell::open(&primary.stored("app.db"));
    behind_the_agent.run("UPDATE t SET x = 'unknown to the log' WHERE id = 2;");
    behind_the_agent.kill();

    let log = log_of_start(&primary);
    assert!(log.contains("WARN") && log.contains("never reached the log"), "{log}");
    assert_eq!(primary.position("app.db"), Some(position));
    assert_eq!(primary.sql("app.db", "SELECT x FROM t WHERE id = 1"), "known to the log");
    assert_eq!(primary.sql("app.db", "SELECT count(*) FROM t WHERE x LIKE 'unknown%'"), "0");
    replica.wait_connected();
    assert_equal(&primary, &replica, "app.db");
}

/// A program that is killed when it syncs a file.
fn killed_at_its_first_sync(command: &mut Command) -> &mut Command {
    let syncs = [libc::SYS_fdatasync, libc::SYS_fsync].map(|number| SystemCall { number, second: None });
    replace_system_calls(command, &syncs, libc::SECCOMP_RET_KILL_PROCESS)
}

/// SQLite has written the commit frame and is killed before other connections can see the commit (it syncs in
/// between). What the next one does with these frames is up to SQLite; log, database and replica must agree on it.
#[test]
fn a_commit_whose_writer_died_before_publishing_it_is_there_everywhere_or_nowhere() {
    for next in ["the next writer", "a restart of the WAL", "the last close", "a restart of the agent"] {
        let fleet = Fleet::new();
        let (primary, replica) = fleet.pair();
        primary.sql(
            "app.db",
            "PRAGMA journal_mode=WAL;\n\
             CREATE TABLE a(x); INSERT INTO a VALUES (0); CREATE TABLE b(x); INSERT INTO b VALUES (0);\n\
             CREATE TABLE c(x); INSERT INTO c VALUES (0);",
        );
        // Keeps the wal-index alive.
        let mut other = Shell::open(&primary.path("app.db"));
        other.run("PRAGMA synchronous=FULL; UPDATE c SET x = 1;");
        let mut dies = Command::new("sqlite3");
        dies.args(["-batch", "-init", "/dev/null", "-cmd", "PRAGMA synchronous=FULL"])
            .arg(primary.path("app.db"));
        dies.arg("BEGIN; UPDATE a SET x = 1; UPDATE b SET x = 1; COMMIT;");
        let status = killed_at_its_first_sync(&mut dies).stdout(Stdio::null()).status().expect("it runs");
        assert_eq!(status.signal(), Some(libc::SIGSYS), "it was killed in its commit");

        match next {
            "the next writer" => drop(other.run("UPDATE c SET x = 2;")),
            "a restart of the WAL" => drop(other.run("PRAGMA wal_checkpoint; UPDATE c SET x = 2;")),
            "the last close" => {
                drop(other);
                primary.wait_for("the database is closed", || {
                    primary.database("app.db").is_some_and(|db| db["open_handles"] == 0)
                });
                primary.sql("app.db", "UPDATE c SET x = 2;");
            }
            _ => {
                primary.kill();
                drop(other);
                primary.start();
                replica.wait_connected();
                primary.sql("app.db", "UPDATE c SET x = 2;");
            }
        }
        // Only a refusal to remove a WAL that SQLite has not checkpointed is an error that belongs here.
        primary.expect_error("the WAL has transactions that are not in the database file yet");
        let rows = primary.sql("app.db", "SELECT a.x, b.x, c.x FROM a, b, c");
        assert!(["0|0|2", "1|1|2"].contains(&rows.as_str()), "after {next}: {rows}");
        assert_equal(&primary, &replica, "app.db");
        primary.sql("app.db", "UPDATE a SET x = 3; UPDATE b SET x = 3;");
        assert_equal(&primary, &replica, "app.db");
    }
}

#[test]
fn a_database_file_damaged_in_its_last_transaction_is_healed_from_the_log() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    for mode in ["WAL", "DELETE"] {
        let fleet = Fleet::new();
        let (primary, replica) = fleet.pair();
        for damage in ["a flipped page", "a truncated file", "a missing file", "zeros"] {
            let name = format!("{}.db", damage.rsplit(' ').next().expect("a word"));
            // All pages are in the last transaction.
            let sql = format!(
                "PRAGMA journal_mode={mode};\nDROP TABLE IF EXISTS t;\nVACUUM;\n\
                 CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) \
                 SELECT i AS id, randomblob(500) AS x FROM n;"
            );
            let position = kill_before_it_marks(&primary, &name, &sql);
            let file = primary.stored(&name);
            let len = fs::metadata(&file).expect("the database").len();
            assert!(len > 16_384, "the database is too small for this test");
            match damage {
                "a flipped page" => flip(&file, len - 2000),
                "a truncated file" => File::options().write(true).open(&file).unwrap().set_len(4096).unwrap(),
                "a missing file" => fs::remove_file(&file).unwrap(),
                _ => File::options()
                    .write(true)
                    .open(&file)
                    .unwrap()
                    .write_all_at(&[0; 4096], len - 4096)
                    .unwrap(),
            }
            primary.start();
            replica.wait_connected();
            assert_eq!(primary.position(&name).as_ref(), Some(&position), "{damage}, {mode}");
            assert_eq!(assert_equal(&primary, &replica, &name), position, "{damage}, {mode}");
        }
    }
}

#[test]
fn page_checksums_that_are_lost_or_damaged_are_made_anew() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 5] = [
        ("missing", |path| fs::remove_file(path).unwrap()),
        ("cut.in.the.header", |path| File::options().write(true).open(path).unwrap().set_len(1000).unwrap()),
        ("cut.in.the.entries", |path| File::options().write(true).open(path).unwrap().set_len(4100).unwrap()),
        ("flipped.header", |path| flip(path, 20)),
        ("flipped.entry", |path| flip(path, 4096 + 8 + 3)),
    ];
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (name, _) in damages {
        fill(&primary, name, "WAL");
        primary.wait_position_equal(&replica, name);
    }
    for after_crash in [true, false] {
        let mut positions = Vec::new();
        for (name, _) in damages {
            primary.sql(name, "UPDATE t SET x = x || '.' WHERE id % 7 = 0");
            positions.push(primary.wait_position_equal(&replica, name));
        }
        if after_crash {
            primary.kill()
        } else {
            primary.stop()
        };
        for (name, damage) in damages {
            damage(&sidecar(&primary, name));
        }
        primary.start();
        replica.wait_connected();
        for ((name, _), position) in damages.iter().zip(positions) {
            let context = format!("{name}, after a {}", if after_crash { "crash" } else { "stop" });
            assert_eq!(primary.position(name), Some(position), "{context}");
            primary.sql(name, "UPDATE t SET x = 'after' || x WHERE id % 5 = 0");
            assert_equal(&primary, &replica, name);
        }
    }
    assert_nothing_diverged(&[&primary, &replica]);
}

#[test]
fn what_a_crash_left_in_the_staging_directory_is_removed() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    fill(&primary, "app.db", "WAL");
    let position = primary.wait_position_equal(&replica, "app.db");
    for host in [&replica, &primary] {
        host.kill();
        let staging = host.data().join("staging");
        // Half of an import, of a copy over a database, of an export, of a large transaction; a snapshot that did not
        // get into the log; a snapshot whose progress cannot be read.
        for name in [
            "import-x1y2z3.db",
            "copy-x1y2z3.db",
            "export-x1y2z3.db",
            "transaction-x1y2z3.ltx",
            "app.db@00000000000000ff.snapshot",
        ] {
            fs::write(staging.join(name), b"SQLite format 3\0 and no more").unwrap();
        }
        host.start();
        let left: Vec<_> = fs::read_dir(&staging).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "still in the staging directory of {}: {left:?}", host.name());
    }
    replica.wait_connected();
    assert_eq!(assert_equal(&primary, &replica, "app.db"), position);
}

#[test]
fn a_replica_killed_while_it_takes_a_snapshot_ends_with_the_primarys_database() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let replica = fleet.primary("b");
    // Two histories, in pages of different sizes: the replica has to keep its own and take the other's as a snapshot.
    for (host, page_size) in [(&primary, 4096), (&replica, 1024)] {
        host.sql(
            "app.db",
            &format!(
                "PRAGMA page_size={page_size};\nPRAGMA journal_mode=WAL;\nCREATE TABLE t(x);\nINSERT INTO t VALUES ('{}');\n\
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500) \
                 INSERT INTO t SELECT randomblob(4000) FROM n;",
                host.name()
            ),
        );
    }
    replica.stop();
    replica.set_role(Role::ReplicaOf(&primary));
    let mut random = Rng::with_seed(1);
    for _ in 0..8 {
        replica.start();
        std::thread::sleep(Duration::from_millis(random.u64(..150)));
        replica.kill();
    }
    replica.start();
    replica.wait_connected();
    assert_equal(&primary, &replica, "app.db");
    assert_eq!(replica.sql("app.db", "SELECT x FROM t WHERE length(x) = 1"), "a");
    let staged = replica.data().join("staging");
    replica.wait_for("nothing is staged any more", || {
        fs::read_dir(&staged).is_ok_and(|mut d| d.next().is_none())
    });
    // What it had alone is kept, whole.
    let kept = replica.data().join("diverged/app.db");
    let kept: Vec<_> = fs::read_dir(kept).expect("something is kept").map(|e| e.unwrap().path()).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let database = kept[0].join("database.db");
    assert_eq!(sqlite3(&database, "PRAGMA integrity_check; SELECT x FROM t WHERE length(x) = 1"), "ok\nb");
}

#[test]
fn an_import_that_is_killed_is_there_as_a_whole_or_not_at_all() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let dir = fleet.scratch();
    // Two databases of which each page differs; they replace each other.
    let sources = ["one", "two"].map(|name| {
        let path = dir.join(format!("{name}.db"));
        let sql = format!(
            "CREATE TABLE t(x);\nINSERT INTO t VALUES ('{name}');\n\
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1500) \
             INSERT INTO t SELECT '{name}' || hex(randomblob(2000)) FROM n;"
        );
        sqlite3(&path, &sql);
        path
    });
    let mut random = Rng::with_seed(1);
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        primary.import(&name, &sources[0]);
        primary.sql(&name, &format!("PRAGMA journal_mode={mode}"));
        let mut imported = 0;
        for i in 0..6 {
            let mut command = primary.litefs(&["import", &name]);
            command.arg(&sources[(i + 1) % 2]).stdout(Stdio::null()).stderr(Stdio::null());
            let mut import = command.spawn().expect("the command runs");
            std::thread::sleep(Duration::from_millis(random.u64(..300)));
            primary.kill();
            imported += u32::from(import.wait().expect("it ends with the agent").success());
            primary.start();
            replica.wait_connected();
            let rows = primary.sql(&name, "SELECT DISTINCT substr(x, 1, 3) FROM t; SELECT count(*) FROM t;");
            assert!(
                ["one\n1501", "two\n1501"].contains(&rows.as_str()),
                "{mode}, {imported} imported: {rows}"
            );
            assert_equal(&primary, &replica, &name);
        }
    }
}
