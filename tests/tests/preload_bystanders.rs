//! The preload door, where somebody does what the agent cannot see: dies in the middle of it, or has no library.

use litefs_tests::library::*;
use litefs_tests::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim_protocol::{Registration, VERSION};
use sqlite_file::locks::{LockKind, SHARED, conflicting_holder};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

/// Runs each line as SQL on one connection; answers with the first value, or with the error.
const SQL: &str = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/" + sys.argv[2], isolation_level=None, timeout=30)
for line in sys.stdin:
    try:
        row = c.execute(line).fetchone()
        print("ok" if row is None else row[0], flush=True)
    except sqlite3.Error as e:
        print(e, flush=True)
"#;

fn connect(host: &Host, database: &str) -> Client {
    Client::start(&mut python(host, SQL, &[database]))
}

fn agent(host: &Host) -> Pid {
    Pid::from_raw(host.pid().try_into().expect("a process id"))
}

/// Waits until the kernel has stopped the agent.
fn stop_for_now(host: &Host) {
    kill(agent(host), Signal::SIGSTOP).expect("the agent runs");
    host.wait_for("the agent has stopped", || {
        fs::read_to_string(format!("/proc/{}/stat", host.pid())).is_ok_and(|stat| stat.contains(") T "))
    });
}

#[test]
fn a_held_commit_of_a_process_that_died_meanwhile_is_not_taken() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts_that_hold(&fleet);
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        sql(&primary, &name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v)"));
        let mut rows = 0;
        for _ in 0..5 {
            let mut first = connect(&primary, &name);
            let mut second = connect(&primary, &name);
            assert_eq!(first.tell("SELECT count(*) FROM t"), rows.to_string());
            // The WAL has begun: that would not go on without the agent.
            assert_eq!(second.tell("INSERT INTO t VALUES(0)"), "ok");
            stop_for_now(&primary);
            let database = File::open(primary.path(&name)).expect("it is there");
            let wal = primary.path(format!("{name}-wal"));
            let before = fs::metadata(&wal).map_or(0, |wal| wal.len());
            // Larger than the next one, which takes its place.
            first.send("INSERT INTO t VALUES(randomblob(50000))");
            primary.wait_for(&format!("the first writer of {name} asks the agent, {rows} {before}"), || {
                match mode {
                    "WAL" => fs::metadata(&wal).is_ok_and(|wal| wal.len() > before.max(50_000)),
                    _ => conflicting_holder(&database, LockKind::Read, SHARED)
                        .is_ok_and(|holder| holder.is_some()),
                }
            });
            first.kill();
            second.send("INSERT INTO t VALUES(1)");
            kill(agent(&primary), Signal::SIGCONT).expect("the agent is there");
            assert_eq!(second.line(), "ok");
            rows = second.tell("SELECT count(*) FROM t").parse().expect("a number");
        }
        assert_follows(&primary, &replica, &name, rows);
    }
    primary.assert_no_errors();
    replica.assert_no_errors();
}

#[test]
fn a_reader_takes_back_what_a_dead_agent_has_applied_in_part() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    sql(&primary, "x.db", "CREATE TABLE t(v); INSERT INTO t VALUES(1)");
    assert_follows(&primary, &replica, "x.db", 1);
    // The transaction is in the replica's log, and a reader keeps it out of the file.
    let mut reader = connect(&replica, "x.db");
    assert_eq!(reader.tell("BEGIN"), "ok");
    assert_eq!(reader.tell("SELECT count(*) FROM t"), "1");
    sql(&primary, "x.db", "INSERT INTO t VALUES(2)");
    replica
        .wait_for("it is in the log and waits", || replica.log().contains("applying waits and tries again"));
    replica.kill();
    reader.kill();
    // What an agent leaves that dies while it writes: pages of the transaction, and the journal with those of before.
    let (copy, journal) = (fleet.scratch().join("x.db"), fleet.scratch().join("x.db-journal"));
    fs::copy(replica.path("x.db"), &copy).expect("the directory is writable");
    let mut writer = Shell::open(&copy);
    writer.run("PRAGMA synchronous=OFF; PRAGMA cache_size=1; PRAGMA cache_spill=1; BEGIN IMMEDIATE;");
    writer.run("INSERT INTO t SELECT randomblob(3000) FROM generate_series(1, 50);");
    writer.kill();
    assert!(fs::metadata(&journal).expect("a journal is left").len() > 512);
    fs::copy(&journal, replica.path("x.db-journal")).expect("the directory is writable");
    fs::copy(&copy, replica.path("x.db")).expect("the directory is writable");
    // Has EXCLUSIVE, and waits for an agent.
    let mut reader = Client::start(python(&replica, SQL, &["x.db"]).env("LITEFS_WAIT_MS", "60000"));
    reader.send("SELECT count(*) FROM t");
    let database = File::open(replica.path("x.db")).expect("it is there");
    replica.wait_for("the reader plays the journal back", || {
        conflicting_holder(&database, LockKind::Read, SHARED).is_ok_and(|holder| holder.is_some())
    });
    replica.start();
    // The agent may apply the transaction before the reader, which looked at the schema first, counts.
    let seen = reader.line();
    assert!(["1", "2"].contains(&seen.as_str()), "{seen}");
    drop(reader);
    replica.wait_connected();
    assert_follows(&primary, &replica, "x.db", 2);
    replica.assert_no_errors();
}

#[test]
fn what_somebody_writes_to_a_replica_without_a_wal_is_found() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    let tables = "CREATE TABLE t(v); CREATE TABLE u(v); INSERT INTO u VALUES(1); INSERT INTO t VALUES(1)";
    sql(&primary, "x.db", tables);
    assert_follows(&primary, &replica, "x.db", 1);
    replica.expect_error("somebody wrote to it on this replica");
    for n in 2..5 {
        // As root, and without the library, nothing keeps a program from it. Not in the page of the next transaction.
        sqlite3(&replica.path("x.db"), "UPDATE u SET v = 'own'");
        sql(&primary, "x.db", "INSERT INTO t VALUES(2)");
        replica.wait_for("it was found", || {
            replica.log().matches("somebody wrote to it on this replica").count() >= n - 1
        });
        sql(&primary, "x.db", "INSERT INTO t VALUES(2)");
        assert_follows(&primary, &replica, "x.db", 2 * n as u64 - 1);
    }
    // Also where the primary has nothing new: it is found, and healed.
    let before = replica.log().matches("somebody wrote to it on this replica").count();
    sqlite3(&replica.path("x.db"), "UPDATE u SET v = 'own'");
    replica.wait_for("it was found", || {
        replica.log().matches("somebody wrote to it on this replica").count() > before
    });
    replica.wait_database("x.db", "ok");
    assert_follows(&primary, &replica, "x.db", 7);
    // What was written is kept, the last of it at each position.
    let kept = fs::read_dir(replica.data().join("diverged/x.db")).expect("it is there");
    let kept: Vec<_> = kept.map(|entry| entry.expect("it is readable").path().join("database.db")).collect();
    assert_eq!(kept.len(), 4, "{kept:?}");
    kept.iter().for_each(|copy| assert_eq!(sqlite3(copy, "SELECT v FROM u"), "own"));
    primary.assert_no_errors();
}

#[test]
fn what_somebody_commits_on_a_replica_whose_agent_is_away_is_found() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    let mut rows = 1;
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        let tables = "CREATE TABLE t(v); CREATE TABLE u(v); INSERT INTO u VALUES(1); INSERT INTO t VALUES(1)";
        sql(&primary, &name, &format!("PRAGMA journal_mode={mode}; {tables}"));
        rows = 1;
        assert_follows(&primary, &replica, &name, rows);
        for killed in [false, true] {
            // What is committed stays in the WAL, or is moved to the file.
            for stays in [false, true] {
                // Whoever has it open keeps the agent from cleaning up behind itself.
                let mut reader = connect(&replica, &name);
                assert_eq!(reader.tell("SELECT count(*) FROM t"), rows.to_string());
                if killed {
                    replica.kill();
                } else {
                    replica.stop();
                }
                reader.kill();
                replica.expect_error(&format!("/{name}: somebody wrote to it on this replica"));
                let mut stranger = Shell::open(&replica.path(&name));
                stranger.run("UPDATE u SET v = 'own';");
                if stays {
                    stranger.kill();
                } else {
                    stranger.end();
                }
                let found = || replica.log().matches("somebody wrote to it on this replica").count();
                let before = found();
                replica.start();
                if mode == "WAL" {
                    replica.wait_for("it was found", || found() > before);
                }
                replica.wait_connected();
                sql(&primary, &name, "INSERT INTO t VALUES(2)");
                replica.wait_for("it was found", || found() > before);
                sql(&primary, &name, "INSERT INTO t VALUES(2)");
                rows += 2;
                // A snapshot heals it.
                replica.wait_database(&name, "ok");
                assert_follows(&primary, &replica, &name, rows);
            }
        }
    }
    // Where nobody has written nothing is set aside, and nothing is said.
    let before = replica.log().len();
    for name in ["WAL.db", "DELETE.db"] {
        replica.kill();
        assert_eq!(sql(&replica, name, "SELECT count(*) FROM t").trim(), rows.to_string());
        replica.start();
        replica.wait_connected();
        sql(&primary, name, "INSERT INTO t VALUES(3)");
        assert_follows(&primary, &replica, name, rows + 1);
    }
    assert!(!replica.log()[before..].contains("ERROR"), "{}", &replica.log()[before..]);
    primary.assert_no_errors();
}

#[test]
fn what_a_transaction_left_that_ended_with_the_term_is_not_taken_for_a_foreign_write() {
    let fleet = Fleet::new();
    let (a, b) = hosts(&fleet, ("preload", "preload"));
    let fill = "CREATE TABLE t(v); INSERT INTO t SELECT zeroblob(1000) FROM generate_series(1, 300)";
    for name in ["x.db", "y.db", "z.db"] {
        sql(&a, name, fill);
        assert_follows(&a, &b, name, 300);
    }
    // More than fits into the cache.
    let mut writer = connect(&a, "x.db");
    for statement in ["PRAGMA cache_size=5", "BEGIN", "UPDATE t SET v = randomblob(1000)"] {
        assert_eq!(writer.tell(statement), "ok");
    }
    a.set_role(Role::ReplicaOf(&b)).reload();
    a.wait_role("replica");
    assert_eq!(writer.tell("COMMIT"), "disk I/O error");
    assert!(fs::metadata(a.path("x.db-journal")).is_ok_and(|journal| journal.len() > 512));
    // The agent has looked at all of them when it has found one after the other.
    for name in ["y.db", "z.db"] {
        let set_aside = format!("/{name}: somebody wrote to it on this replica");
        a.expect_error(&set_aside);
        sqlite3(&a.path(name), "UPDATE t SET v = 'own'");
        a.wait_for("it is set aside", || a.log().contains(&set_aside));
    }
    assert_eq!(a.database("x.db").expect("it is known")["state"], "ok");
    b.set_role(Role::Primary).reload();
    b.wait_role("primary");
    a.wait_connected();
    for name in ["x.db", "y.db", "z.db"] {
        sql(&b, name, "INSERT INTO t VALUES(1)");
        assert_follows(&b, &a, name, 301);
    }
    assert_eq!(sql(&a, "x.db", "SELECT count(*) FROM t WHERE v = zeroblob(1000)"), "300");
    a.assert_no_errors();
    b.assert_no_errors();
}

#[test]
fn pages_from_the_free_list_that_a_refused_transaction_wrote_are_put_right() {
    let fleet = Fleet::new();
    let (a, b) = hosts(&fleet, ("preload", "preload"));
    sql(
        &a,
        "x.db",
        "CREATE TABLE t(v); CREATE TABLE u(v); INSERT INTO u SELECT randomblob(1000) FROM generate_series(1, 300); \
         INSERT INTO t VALUES(1); DELETE FROM u",
    );
    assert_follows(&a, &b, "x.db", 1);
    let mut writer = connect(&a, "x.db");
    let insert = "INSERT INTO u SELECT randomblob(1000) FROM t, (VALUES(1),(2),(3),(4),(5),(6),(7),(8),(9)) x, \
                  (VALUES(1),(2),(3),(4),(5),(6),(7),(8),(9)) y";
    for statement in ["PRAGMA cache_size=5", "BEGIN", insert] {
        assert_eq!(writer.tell(statement), "ok");
    }
    a.set_role(Role::ReplicaOf(&b)).reload();
    a.wait_role("replica");
    assert_eq!(writer.tell("COMMIT"), "disk I/O error");
    // SQLite plays the journal back, in which these pages are not.
    a.expect_error("has left its content in pages from the free list");
    assert_eq!(writer.tell("SELECT count(*) FROM u"), "0");
    a.wait_for("it is set aside", || a.log().contains("has left its content in pages from the free list"));
    b.set_role(Role::Primary).reload();
    b.wait_role("primary");
    a.wait_connected();
    sql(&b, "x.db", "INSERT INTO t VALUES(2)");
    // A snapshot heals it.
    a.wait_database("x.db", "ok");
    assert_follows(&b, &a, "x.db", 2);
    a.assert_no_errors();
    b.assert_no_errors();
}

#[test]
fn commits_that_the_log_has_are_no_transactions_of_the_next_agent() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").start();
    sql(&primary, "x.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(v)");
    let mut writer = connect(&primary, "x.db");
    let before = primary.txid("x.db");
    // All in one WAL, and in the same page.
    for n in 1..5 {
        assert_eq!(writer.tell(&format!("INSERT INTO t VALUES({n})")), "ok");
        primary.wait_for("it is captured", || primary.txid("x.db") >= before + n);
        let position = primary.position("x.db");
        primary.kill();
        primary.start();
        assert_eq!(primary.position("x.db"), position, "after {n} commits");
    }
    primary.assert_no_errors();
}

#[test]
fn a_database_that_the_agent_cannot_follow_takes_no_more_writes() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").start();
    sql(&primary, "x.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(v); INSERT INTO t VALUES(1)");
    let mut writer = connect(&primary, "x.db");
    assert_eq!(writer.tell("INSERT INTO t VALUES(2)"), "ok");
    assert!(primary.txid("x.db") > 0);
    stop_for_now(&primary);
    let wal = File::options().read(true).write(true).open(primary.path("x.db-wal")).expect("there is a WAL");
    let end = wal.metadata().expect("it is open").len();
    assert_eq!(writer.tell("INSERT INTO t VALUES(3)"), "ok");
    primary.expect_error("its wal-index counts frames that the WAL does not have");
    wal.write_all_at(&[0; 24], end).expect("it can be written");
    kill(agent(&primary), Signal::SIGCONT).expect("the agent is there");
    primary.wait_database("x.db", "quarantined");
    primary.wait_for("writes are refused", || writer.tell("INSERT INTO t VALUES(4)") == "disk I/O error");
    assert_eq!(writer.tell("INSERT INTO t VALUES(5)"), "disk I/O error");
    // Whoever comes later, too.
    let refused = try_sql(&primary, "x.db", "INSERT INTO t VALUES(6)");
    assert!(refused.as_ref().is_err_and(|error| error.contains("disk I/O error")), "{refused:?}");
}

#[test]
fn damaged_page_checksums_are_rebuilt_when_nobody_has_the_database_open() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        let tables = "CREATE TABLE t(v); CREATE TABLE u(v); INSERT INTO t VALUES(1)";
        sql(&primary, &name, &format!("PRAGMA journal_mode={mode}; {tables}"));
        assert_follows(&primary, &replica, &name, 1);
        // All of it is marked durable: what the log has after that, is set right in any case.
        primary.stop();
        primary.start();
        let mut client = connect(&primary, &name);
        assert_eq!(client.tell("INSERT INTO t VALUES(2)"), "ok");
        assert_eq!(client.tell("BEGIN"), "ok");
        assert_eq!(client.tell("SELECT count(*) FROM t"), "2");
        primary.kill();
        let sums = File::options().write(true).open(primary.data().join(format!("checksums/{name}.sum")));
        // The entry of page 3, the root of the other table, after the header.
        sums.and_then(|sums| sums.write_all_at(&[0xd5; 8], 4096 + 16)).expect("it is there");
        primary.expect_error("its page checksums add up to");
        primary.start();
        let state = primary.database(&name).expect("it is known")["state"].clone();
        assert_eq!(state, "quarantined", "applications have it open");
        primary.stop();
        client.kill();
        primary.start();
        assert_eq!(primary.database(&name).expect("it is known")["state"], "ok");
        sql(&primary, &name, "INSERT INTO t VALUES(3)");
        replica.wait_connected();
        assert_follows(&primary, &replica, &name, 3);
    }
    primary.assert_no_errors();
    replica.assert_no_errors();
}

#[test]
fn commits_under_an_exclusive_lock_are_captured() {
    // The wal-index is in the application's memory where the mode is set before the first access.
    let modes =
        [("heap", "exclusive", "WAL"), ("shared", "normal", "WAL"), ("journal", "exclusive", "DELETE")];
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    for (name, before, mode) in modes {
        let name = format!("{name}.db");
        sql(
            &primary,
            &name,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v)"),
        );
        let mut writer = connect(&primary, &name);
        assert_eq!(writer.tell(&format!("PRAGMA locking_mode={before}")), before);
        assert_eq!(writer.tell("SELECT count(*) FROM t"), "0");
        assert_eq!(writer.tell("PRAGMA locking_mode=exclusive"), "exclusive");
        assert_eq!(writer.tell("PRAGMA cache_size=5"), "ok");
        for n in 1..=20 {
            assert_eq!(writer.tell("BEGIN"), "ok");
            assert_eq!(writer.tell(&format!("INSERT INTO t VALUES({n}, randomblob(60000))")), "ok");
            assert_eq!(writer.tell("UPDATE t SET v = randomblob(9000) WHERE id % 3 = 0"), "ok");
            assert_eq!(writer.tell("COMMIT"), "ok");
        }
        // Also what was committed last, with nothing after it.
        let last = primary.txid(&name);
        primary.stop();
        primary.start();
        assert!(primary.txid(&name) >= last);
        drop(writer);
        replica.wait_connected();
        assert_follows(&primary, &replica, &name, 20);
    }
    primary.assert_no_errors();
    replica.assert_no_errors();
}

#[test]
fn a_process_uses_a_cluster_among_many_and_no_more_than_it_can() {
    let fleet = Fleet::new();
    let primary = fleet.host("z", Role::Primary);
    primary.set("door=preload").start();
    let places = fleet.scratch();
    let mut all = Vec::new();
    for n in 0..70 {
        let (directory, place) = (places.join(format!("files-{n}")), places.join(format!("run/{n}")));
        fs::create_dir_all(&directory).expect("the directory is writable");
        fs::create_dir_all(&place).expect("the directory is writable");
        sqlite3(&directory.join("x.db"), "CREATE TABLE t(v)");
        let metadata = fs::metadata(&directory).expect("it was made");
        use std::os::unix::fs::MetadataExt;
        let text =
            Registration { version: VERSION, device: metadata.dev(), inode: metadata.ino() }.to_string();
        fs::write(place.join("preload"), text).expect("the directory is writable");
        all.push(directory);
    }
    let own = primary.socket();
    let own = own.parent().expect("it is in a directory");
    let runtime = format!("{}:{}", places.join("run").display(), own.display());
    let run = |script: &str, wait_ms: &str, arguments: &[&str]| {
        let mut command = python(&primary, script, arguments);
        command.env("LITEFS_RUNTIME_DIR", &runtime).env("LITEFS_WAIT_MS", wait_ms).stderr(Stdio::piped());
        command.output().expect("python runs")
    };
    // It has the name that it would have alone.
    let script = "import sqlite3, sys; sqlite3.connect(sys.argv[1] + '/x.db').execute('CREATE TABLE t(v)')";
    let output = run(script, "60000", &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    primary.wait_for("the database is known", || primary.txid("x.db") > 0);
    primary.assert_no_errors();
    let script = r#"
import sqlite3, sys
opened = []
for path in sys.argv[2:]:
    try:
        c = sqlite3.connect(path + "/x.db")
        c.execute("SELECT * FROM t")
        opened.append(c)
    except sqlite3.OperationalError as e:
        print(len(opened), e)
        break
"#;
    let paths: Vec<&str> = all.iter().map(|path| path.to_str().expect("a path in UTF-8")).collect();
    // None of these has an agent to wait for.
    let output = run(script, "0", &paths);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(stdout.trim(), "64 unable to open database file");
    assert!(stderr.contains("this process uses 64 clusters already"), "{stderr}");
}

#[test]
fn storms_of_forks_write_and_end() {
    let script = r#"
import os, sqlite3, subprocess, sys
path = sys.argv[1] + "/" + sys.argv[2]
c = sqlite3.connect(path, isolation_level=None, timeout=120)
insert = "INSERT INTO t(v) VALUES(hex(randomblob(200)))"
# A parent that writes between the forks, children that write and fork again, and programs of their own.
for round in range(6):
    for _ in range(5):
        if os.fork() == 0:
            own = sqlite3.connect(path, isolation_level=None, timeout=120)
            own.execute(insert)
            if os.fork() == 0:
                grandchild = sqlite3.connect(path, isolation_level=None, timeout=120)
                grandchild.execute(insert)
                os._exit(0)
            os._exit(0 if os.wait()[1] == 0 else 1)
    c.execute(insert)
    subprocess.run(["sqlite3", "-cmd", ".timeout 120000", path, insert], check=True, close_fds=True)
    for _ in range(5):
        assert os.wait()[1] == 0
# Children that are killed at once: whatever they hold is given back.
for _ in range(20):
    child = os.fork()
    if child == 0:
        own = sqlite3.connect(path, isolation_level=None, timeout=120)
        while True:
            own.execute("UPDATE t SET v = v WHERE rowid = 1")
    os.kill(child, 9)
    os.wait()
c.execute(insert)
"#;
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        sql(&primary, &name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v)"));
        let done = try_run(&mut python(&primary, script, &[&name]));
        assert!(done.is_ok(), "{done:?}");
        assert_follows(&primary, &replica, &name, 6 * (5 + 5 + 1 + 1) + 1);
        primary.wait_for("all processes are let go", || {
            primary.database(&name).is_some_and(|database| database["open_handles"] == 0)
        });
    }
    primary.assert_no_errors();
    replica.assert_no_errors();
}

#[test]
fn what_is_written_without_the_library_between_two_commits_of_it_is_captured() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    for mode in ["DELETE", "TRUNCATE", "PERSIST", "WAL"] {
        let name = format!("{mode}.db");
        let tables = "CREATE TABLE t(v); CREATE TABLE u(v); INSERT INTO u VALUES(1)";
        sql(&primary, &name, &format!("PRAGMA journal_mode={mode}; {tables}"));
        let mut client = connect(&primary, &name);
        for _ in 0..3 {
            assert_eq!(client.tell("INSERT INTO t VALUES(1)"), "ok");
            run(Command::new("sqlite3").arg(primary.path(&name)).arg("UPDATE u SET v = v + 1"));
            assert_eq!(client.tell("INSERT INTO t VALUES(2)"), "ok");
        }
        assert_follows(&primary, &replica, &name, 6);
        assert_eq!(sql(&replica, &name, "SELECT v FROM u"), "4", "{mode}");
        // Nothing of the library comes after it.
        assert_eq!(client.tell("INSERT INTO t VALUES(1)"), "ok");
        run(Command::new("sqlite3").arg(primary.path(&name)).arg("UPDATE u SET v = v + 1"));
        replica.wait_for(&format!("{name} has it too"), || sql(&replica, &name, "SELECT v FROM u") == "5");
        assert_follows(&primary, &replica, &name, 7);
    }
}

#[test]
fn what_is_moved_to_the_file_without_the_library_is_captured_though_others_use_it_already() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    let tables = "CREATE TABLE t(v); CREATE TABLE u(v); INSERT INTO u VALUES(1)";
    for (name, commits) in [("some.db", true), ("none.db", false)] {
        sql(&primary, name, &format!("PRAGMA journal_mode=WAL; {tables}"));
        assert_follows(&primary, &replica, name, 0);
        stop_for_now(&primary);
        // Gone again, and with it the WAL, before anybody looks.
        run(Command::new("sqlite3").arg(primary.path(name)).arg("UPDATE u SET v = v + 1"));
        let mut other =
            Client::start(Command::new("python3").arg("-c").arg(SQL).arg(primary.mount()).arg(name));
        assert_eq!(other.tell("SELECT v FROM u"), "2");
        if commits {
            assert_eq!(other.tell("INSERT INTO t VALUES(1)"), "ok");
        }
        kill(agent(&primary), Signal::SIGCONT).expect("the agent is there");
        replica.wait_for(&format!("{name} has it"), || sql(&replica, name, "SELECT v FROM u") == "2");
        assert_eq!(other.tell("INSERT INTO t VALUES(2)"), "ok");
        assert_follows(&primary, &replica, name, if commits { 2 } else { 1 });
    }
    primary.assert_no_errors();
}

#[test]
fn what_somebody_commits_on_a_replica_after_a_snapshot_is_found() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    let tables = "CREATE TABLE t(v); CREATE TABLE u(v); INSERT INTO u VALUES(1); INSERT INTO t VALUES(1)";
    sql(&primary, "x.db", &format!("PRAGMA journal_mode=WAL; {tables}"));
    assert_follows(&primary, &replica, "x.db", 1);
    replica.expect_error("/x.db: somebody wrote to it on this replica");
    // The first time its newest record is a transaction, then the snapshot that has healed it.
    for time in 1..=3 {
        replica.kill();
        let mut stranger = Shell::open(&replica.path("x.db"));
        stranger.run("UPDATE u SET v = 'own';");
        stranger.kill();
        replica.start();
        replica.wait_connected();
        replica.wait_for(&format!("a snapshot has healed it, {time}"), || {
            sql(&replica, "x.db", "SELECT v FROM u") == "1"
        });
        replica.wait_database("x.db", "ok");
        assert_follows(&primary, &replica, "x.db", 1);
    }
    primary.assert_no_errors();
}

#[test]
fn each_transaction_of_a_program_without_the_library_is_noticed_while_it_keeps_the_database_open() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    for mode in ["DELETE", "TRUNCATE", "PERSIST"] {
        let name = format!("{mode}.db");
        let stranger = |name: &str| {
            Client::start(Command::new("python3").arg("-c").arg(SQL).arg(primary.mount()).arg(name))
        };
        let mut first = stranger(&name);
        assert_eq!(first.tell(&format!("PRAGMA journal_mode={mode}")), mode.to_lowercase());
        assert_eq!(first.tell("CREATE TABLE t(v)"), "ok");
        for count in 1..=3 {
            assert_eq!(first.tell("INSERT INTO t VALUES(1)"), "ok");
            assert_follows(&primary, &replica, &name, count);
        }
        first.kill();
        // By another name it is watched as well.
        let moved = format!("moved-{name}");
        fs::rename(primary.path(&name), primary.path(&moved)).expect("it can be moved");
        let _ = fs::remove_file(primary.path(format!("{name}-journal")));
        assert_follows(&primary, &replica, &moved, 3);
        let mut second = stranger(&moved);
        assert_eq!(second.tell("INSERT INTO t VALUES(1)"), "ok");
        second.kill();
        assert_follows(&primary, &replica, &moved, 4);
    }
}
