//! Synchronous replication: a commit counts when followers have it, and is not seen before.

use litefs_tests::*;
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

/// Journal modes, each with another way to end a transaction.
const MODES: [&str; 4] = ["wal", "delete", "truncate", "persist"];

struct Pair {
    primary: Host,
    replica: Host,
    door: &'static str,
    _fleet: Fleet,
}

impl Pair {
    /// A primary whose commits wait for its only follower.
    fn new(door: &'static str, settings: &[&str]) -> Pair {
        let fleet = Fleet::new();
        let primary = fleet.host("a", Role::Primary);
        primary.set(&format!("door={door}")).set("sync.acks=1").set("sync.members=a,b");
        settings.iter().for_each(|setting| {
            primary.set(setting);
        });
        primary.start();
        let replica = fleet.host("b", Role::ReplicaOf(&primary));
        replica.start();
        replica.wait_connected();
        Pair { primary, replica, door, _fleet: fleet }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if self.door == "preload" {
            command.env("LD_PRELOAD", liblitefs());
            command.env("LITEFS_RUNTIME_DIR", self.primary.socket().parent().expect("in a directory"));
        }
        command
    }

    fn try_sql(&self, database: &str, sql: &str) -> Result<String, String> {
        let mut command = self.command("sqlite3");
        command.args(["-bail", "-cmd", ".timeout 10000"]).arg(self.primary.path(database)).arg(sql);
        try_run(&mut command)
    }

    fn sql(&self, database: &str, sql: &str) -> String {
        self.try_sql(database, sql).unwrap_or_else(|e| panic!("{sql}: {e}")).trim().to_owned()
    }

    /// Runs it in the background.
    fn begin(&self, database: &str, sql: &str) -> JoinHandle<Result<String, String>> {
        let mut command = self.command("sqlite3");
        command.args(["-bail", "-cmd", ".timeout 10000"]).arg(self.primary.path(database)).arg(sql);
        std::thread::spawn(move || try_run(&mut command))
    }

    fn create(&self, mode: &str) -> String {
        let name = format!("{mode}.db");
        self.sql(&name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES (1)"));
        name
    }

    fn state(&self) -> String {
        self.primary.status()["sync"][0]["state"].as_str().unwrap_or_default().to_owned()
    }

    fn wait_state(&self, state: &str) {
        self.primary.wait_for(state, || self.state() == state);
    }

    fn waiting(&self) -> u64 {
        self.primary.status()["sync"][0]["waiting"].as_u64().unwrap_or_default()
    }
}

const DOORS: [&str; 2] = ["fuse", "preload"];

#[test]
fn a_commit_waits_for_its_follower_and_is_not_seen_before() {
    for door in DOORS {
        let pair = Pair::new(door, &[]);
        for mode in MODES {
            let name = pair.create(mode);
            let before = pair.primary.txid(&name);
            // Opened before: SQLite as root sets the owner of a WAL that it opens, and the kernel has that wait for the writer.
            let reader = rusqlite::Connection::open(pair.primary.path(&name)).expect("opens");
            reader.busy_timeout(Duration::ZERO).expect("set");
            let read = || reader.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, u32>(0));
            assert_eq!(read(), Ok(1));
            pair.replica.signal(Signal::SIGSTOP);
            let commit = pair.begin(&name, "INSERT INTO t VALUES (2)");
            pair.primary.wait_for("the commit waits", || pair.waiting() == 1);
            if mode == "wal" {
                // In the other modes a reader waits for the writer, as ever.
                assert_eq!(read(), Ok(1), "{door}, {mode}");
            } else {
                assert!(read().is_err(), "{door}, {mode}");
            }
            assert_eq!(
                pair.primary.txid(&name),
                before,
                "{door}, {mode}: the position is that of what is visible"
            );
            assert!(!commit.is_finished());
            pair.replica.signal(Signal::SIGCONT);
            commit.join().expect("no panic").unwrap_or_else(|e| panic!("{door}, {mode}: {e}"));
            assert_eq!(read(), Ok(2), "{door}, {mode}");
            assert_eq!(pair.primary.txid(&name), before + 1);
            pair.primary.wait_position_equal(&pair.replica, &name);
            assert_equal(&pair.primary, &pair.replica, &name);
        }
    }
}

#[test]
fn a_commit_waits_for_a_follower_that_has_to_come_back() {
    for door in DOORS {
        let pair = Pair::new(door, &["replication.timeout=2s"]);
        let name = pair.create("wal");
        pair.replica.kill();
        let commit = pair.begin(&name, "INSERT INTO t VALUES (2)");
        pair.wait_state("waiting");
        pair.primary.wait_for("the commit waits", || pair.waiting() == 1);
        assert!(!commit.is_finished());
        pair.replica.start();
        commit.join().expect("no panic").unwrap_or_else(|e| panic!("{door}: {e}"));
        pair.wait_state("synchronous");
        assert_equal(&pair.primary, &pair.replica, &name);
    }
}

#[test]
fn degraded_commits_go_on_until_the_follower_has_caught_up() {
    for door in DOORS {
        let pair = Pair::new(door, &["sync.timeout=300ms", "sync.on-timeout=degrade"]);
        for mode in ["wal", "delete"] {
            let name = pair.create(mode);
            pair.replica.kill();
            for _ in 0..3 {
                pair.sql(&name, "INSERT INTO t VALUES (2)");
            }
            assert_eq!(pair.state(), "degraded");
            let metrics = String::from_utf8(pair.primary.get("/metrics").expect("metrics")).expect("text");
            let state = "litefs_sync_state{databases=\"**\",state=\"degraded\"} 1";
            assert!(metrics.contains(state), "{metrics}");
            pair.replica.start();
            pair.wait_state("synchronous");
            pair.sql(&name, "INSERT INTO t VALUES (3)");
            pair.primary.wait_position_equal(&pair.replica, &name);
            assert_equal(&pair.primary, &pair.replica, &name);
        }
    }
}

#[test]
fn refusing_fails_commits_before_they_are_sent_and_keeps_those_that_were() {
    for door in DOORS {
        let pair =
            Pair::new(door, &["sync.timeout=300ms", "sync.on-timeout=refuse", "replication.timeout=60s"]);
        pair.primary.expect_error("an application's operation failed");
        for mode in ["wal", "delete"] {
            let name = pair.create(mode);
            // The kernel locks a directory while a journal in it is being removed.
            std::fs::create_dir(pair.primary.path(mode)).expect("made");
            let other = format!("{mode}/other.db");
            pair.replica.signal(Signal::SIGSTOP);
            let sent = pair.begin(&name, "INSERT INTO t VALUES (2)");
            pair.wait_state("refusing");
            let refused = pair.try_sql(&other, "CREATE TABLE t(v)").expect_err("refused");
            assert!(refused.contains("disk I/O error"), "{door}, {mode}: {refused}");
            assert!(!sent.is_finished());
            pair.replica.signal(Signal::SIGCONT);
            sent.join().expect("no panic").unwrap_or_else(|e| panic!("{door}, {mode}: {e}"));
            pair.wait_state("synchronous");

            pair.replica.kill();
            pair.wait_state("refusing");
            let position = pair.primary.position(&name);
            let refused = pair.try_sql(&name, "INSERT INTO t VALUES (3)").expect_err("refused");
            assert!(refused.contains("disk I/O error"), "{door}, {mode}: {refused}");
            assert_eq!(
                pair.sql(&name, "SELECT count(*) FROM t; PRAGMA integrity_check"),
                "2\nok",
                "{door}, {mode}"
            );
            assert_eq!(pair.primary.position(&name), position);
            pair.replica.start();
            pair.wait_state("synchronous");
            pair.sql(&name, "INSERT INTO t VALUES (4)");
            pair.primary.wait_position_equal(&pair.replica, &name);
            assert_equal(&pair.primary, &pair.replica, &name);
        }
    }
}

#[test]
fn rules_are_for_their_databases_and_can_change_while_running() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.configure("\n[sync]\nacks = 1\n[[sync-rule]]\ndatabases = [\"free/*\"]\nacks = 0\n").start();
    std::fs::create_dir(primary.path("free")).expect("made");
    primary.sql("free/a.db", "CREATE TABLE t(v)");
    let path = primary.path("held.db");
    let commit = std::thread::spawn(move || try_sqlite3(&path, "CREATE TABLE t(v)"));
    primary.wait_for("it waits", || primary.status()["sync"][0]["waiting"] == 1);
    primary.configure("[[sync-rule]]\ndatabases = [\"held.db\"]\nacks = 0\n");
    primary.reload();
    commit.join().expect("no panic").expect("an asynchronous commit waits for nobody");
}

/// Appends rows until it is killed or fails; says each row that SQLite has acknowledged.
const APPENDER: &str = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
c.execute("PRAGMA journal_mode=" + sys.argv[2])
c.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)")
while True:
    c.execute("INSERT INTO t(v) VALUES (randomblob(500))")
    print(c.execute("SELECT max(id) FROM t").fetchone()[0], flush=True)
"#;

fn acknowledged(mut child: Child) -> u64 {
    let out = BufReader::new(child.stdout.take().expect("piped"));
    let last = out.lines().map_while(Result::ok).filter_map(|line| line.parse().ok()).last();
    let _ = child.kill();
    let _ = child.wait();
    last.unwrap_or(0)
}

#[test]
fn nothing_acknowledged_is_lost_with_the_primary() {
    for door in DOORS {
        for (round, mode) in MODES.iter().cycle().take(8).enumerate() {
            // Without a wait for durability here, only the follower can have it.
            let pair = Pair::new(door, &[]);
            let name = pair.create("wal");
            let database = pair.primary.path(format!("rows-{mode}.db"));
            let mut writer = pair.command("python3");
            writer
                .arg("-c")
                .arg(APPENDER)
                .arg(&database)
                .arg(mode)
                .stdout(Stdio::piped())
                .stderr(Stdio::null());
            let writer = writer.spawn().expect("python3 runs");
            let file = format!("rows-{mode}.db");
            let rows = 20 * (round as u64 + 1);
            pair.primary.wait_for("rows", || pair.replica.txid(&file) > rows);
            pair.primary.kill();
            // Behind the preload door an application waits for another agent: it never comes.
            let pid = nix::unistd::Pid::from_raw(writer.id() as i32);
            let reaper = std::thread::spawn(move || acknowledged(writer));
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
            let last: u64 = reaper.join().expect("no panic");
            pair.replica.set_role(Role::Primary).restart();
            let seen: u64 =
                pair.replica.sql(&file, "SELECT max(id) FROM t").trim().parse().expect("a number");
            assert!(seen >= last, "{door}, {mode}: row {last} was acknowledged, the follower has {seen}");
            assert!(seen <= last + 1, "{door}, {mode}: {seen} rows, {last} acknowledged");
            assert!(last > 0);
            drop(name);
        }
    }
}

#[test]
fn a_commit_that_waited_when_the_agent_died_is_rolled_forward() {
    for mode in ["wal", "delete"] {
        let pair = Pair::new("fuse", &[]);
        let name = pair.create(mode);
        pair.replica.kill();
        let commit = pair.begin(&name, "INSERT INTO t VALUES (2)");
        pair.primary.wait_for("the commit waits", || pair.waiting() == 1);
        pair.primary.kill();
        commit.join().expect("no panic").expect_err("nobody acknowledged it");
        pair.primary.start();
        assert_eq!(pair.sql(&name, "SELECT count(*) FROM t"), "2", "{mode}");
        pair.replica.start();
        pair.sql(&name, "INSERT INTO t VALUES (3)");
        pair.primary.wait_position_equal(&pair.replica, &name);
        assert_equal(&pair.primary, &pair.replica, &name);
    }
}

#[test]
fn a_commit_that_waits_when_the_term_ends_fails_and_the_database_follows() {
    for door in DOORS {
        for mode in ["wal", "delete"] {
            let pair = Pair::new(door, &[]);
            let name = pair.create(mode);
            pair.primary.wait_position_equal(&pair.replica, &name);
            pair.replica.kill();
            let commit = pair.begin(&name, "INSERT INTO t VALUES (2)");
            pair.primary.wait_for("the commit waits", || pair.waiting() == 1);
            // The other one leads from now on: it never had the commit.
            pair.replica.set_role(Role::Primary).start();
            pair.primary.set_role(Role::ReplicaOf(&pair.replica)).reload();
            let failed = commit.join().expect("no panic");
            assert!(failed.is_err(), "{door}, {mode}: {failed:?}");
            // Two terms of the same number would not be told apart: the second start makes it newer.
            pair.replica.restart();
            pair.replica.sql(&name, "INSERT INTO t VALUES (7)");
            pair.replica.wait_position_equal(&pair.primary, &name);
            assert_equal(&pair.replica, &pair.primary, &name);
            assert_eq!(
                pair.primary.sql(&name, "SELECT group_concat(v) FROM t").trim(),
                "1,7",
                "{door}, {mode}"
            );
        }
    }
}

/// SQLite reports a commit over several databases whatever becomes of their journals, once its super-journal is gone.
#[test]
fn a_commit_over_several_databases_that_waits_when_the_term_ends_fails() {
    for door in DOORS {
        let pair = Pair::new(door, &[]);
        for mode in ["delete", "truncate", "persist"] {
            let (one, two) = (format!("{mode}-1.db"), format!("{mode}-2.db"));
            for name in [&one, &two] {
                pair.sql(name, "CREATE TABLE t(v)");
            }
            let attach = format!(
                "ATTACH '{}' AS two; PRAGMA journal_mode={mode}; PRAGMA two.journal_mode={mode}; BEGIN; \
                 INSERT INTO t VALUES (1); INSERT INTO two.t VALUES (1); COMMIT;",
                pair.primary.path(&two).display()
            );
            pair.replica.signal(Signal::SIGSTOP);
            let commit = pair.begin(&one, &attach);
            pair.primary.wait_for("the commit waits", || pair.waiting() > 0);
            pair.primary.set_role(Role::ReplicaOf(&pair.replica)).reload();
            let said = commit.join().expect("it ends");
            assert!(said.is_err(), "{door}, {mode}: nobody has acknowledged it: {said:?}");
            pair.replica.signal(Signal::SIGCONT);
            pair.primary.set_role(Role::Primary).reload();
            pair.primary.wait_role("primary");
            pair.replica.wait_connected();
            // What was in the log counts; the application was told that it is not known.
            for name in [&one, &two] {
                assert_equal(&pair.primary, &pair.replica, name);
            }
        }
    }
}

#[test]
fn many_databases_commit_side_by_side() {
    let pair = Pair::new("fuse", &[]);
    let writers: Vec<_> = (0..4)
        .map(|i| {
            let mode = MODES[i];
            let path = pair.primary.path(format!("w{i}.db"));
            std::thread::spawn(move || {
                let db = rusqlite::Connection::open(path).expect("opens");
                db.busy_timeout(Duration::from_secs(30)).expect("set");
                set_journal_mode(&db, mode);
                exec(&db, "CREATE TABLE t(v)");
                for row in 0..50 {
                    exec(&db, &format!("INSERT INTO t VALUES ({row})"));
                }
            })
        })
        .collect();
    writers.into_iter().for_each(|writer| writer.join().expect("no panic"));
    for i in 0..4 {
        let name = format!("w{i}.db");
        pair.primary.wait_position_equal(&pair.replica, &name);
        assert_equal(&pair.primary, &pair.replica, &name);
    }
    pair.primary.assert_no_errors();
}

#[test]
fn readers_on_a_fenced_primary_see_no_commit_that_nobody_acknowledged() {
    for mode in ["wal", "delete"] {
        let mut consul = Consul::start();
        let fleet = Fleet::new();
        let address = consul.address();
        let hosts = ["a", "b"].map(|name| fleet.host(name, Role::Candidate(&address)));
        for host in &hosts {
            host.set("sync.acks=1")
                .set("sync.members=a,b")
                .set("lease.ttl=2s")
                .set("replication.timeout=60s");
        }
        let [a, b] = &hosts;
        a.start();
        a.wait_for("the first host is primary", || a.is_primary());
        b.start();
        b.wait_for("it follows", || b.follows(a));
        a.sql("app.db", &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x); INSERT INTO t VALUES (1)"));
        a.wait_position_equal(b, "app.db");
        b.signal(Signal::SIGSTOP);
        let path = a.path("app.db");
        let insert = move || try_sqlite3(&path, "INSERT INTO t VALUES (2)");
        let commit = std::thread::spawn(insert);
        a.wait_for("the commit waits", || a.status()["sync"][0]["waiting"] == 1);
        // Neither renewed nor acknowledged: the term ends, and the application is told.
        consul.freeze();
        commit.join().expect("no panic").expect_err("nobody acknowledged it");
        let until = std::time::Instant::now() + Duration::from_millis(500);
        while std::time::Instant::now() < until {
            assert_eq!(a.sql("app.db", "SELECT group_concat(x) FROM t"), "1", "{mode}");
        }
        consul.thaw();
        b.signal(Signal::SIGCONT);
        // Whoever leads: the commit is with both of them, or kept aside. They agree.
        wait_for("there is a primary", PATIENCE, || {
            (a.is_primary() && b.follows(a) || b.is_primary() && a.follows(b)).then_some(())
        });
        let (primary, replica) = if a.is_primary() { (a, b) } else { (b, a) };
        primary.wait_for("it takes writes", || primary.try_sql("app.db", "INSERT INTO t VALUES (3)").is_ok());
        assert_equal(primary, replica, "app.db");
        consul.kill();
    }
}

#[test]
fn an_export_has_no_commit_that_waits() {
    let pair = Pair::new("fuse", &[]);
    let name = pair.create("wal");
    let before = pair.primary.txid(&name);
    pair.replica.signal(Signal::SIGSTOP);
    let commit = pair.begin(&name, "INSERT INTO t VALUES (2)");
    pair.primary.wait_for("the commit waits", || pair.waiting() == 1);
    let out = pair.primary.data().join("out.db");
    let export = || try_run(&mut pair.primary.litefs(&["export", &name, out.to_str().expect("a path")]));
    let error = export().expect_err("a copy would have what may come to nothing");
    assert!(error.contains("waited for its followers"), "{error}");
    assert_eq!(pair.primary.txid(&name), before);
    pair.replica.signal(Signal::SIGCONT);
    commit.join().expect("no panic").expect("it is acknowledged");
    export().expect("nothing waits any more");
    assert_eq!(sqlite3(&out, "SELECT count(*) FROM t"), "2");
}

#[test]
fn a_commit_that_waits_is_acknowledged_to_its_application_by_the_next_agent() {
    for killed in [false, true] {
        for mode in MODES {
            let pair = Pair::new("fuse", &["mount.takeover-wait=60s"]);
            let name = pair.create(mode);
            pair.replica.signal(Signal::SIGSTOP);
            let commit = pair.begin(&name, "INSERT INTO t VALUES (2)");
            pair.primary.wait_for("the commit waits", || pair.waiting() == 1);
            if killed {
                pair.primary.kill()
            } else {
                pair.primary.leave()
            };
            pair.primary.start();
            assert!(!commit.is_finished(), "{mode}: nobody has acknowledged it");
            pair.replica.signal(Signal::SIGCONT);
            commit.join().expect("no panic").unwrap_or_else(|e| panic!("{mode}, killed {killed}: {e}"));
            assert_eq!(pair.sql(&name, "SELECT count(*) FROM t"), "2", "{mode}, killed {killed}");
            pair.sql(&name, "INSERT INTO t VALUES (3)");
            pair.primary.wait_position_equal(&pair.replica, &name);
            assert_equal(&pair.primary, &pair.replica, &name);
        }
    }
}
