//! The preload door: unmodified programs with `liblitefs.so`, on hosts whose directory is a plain one.

use litefs_tests::library::*;
use litefs_tests::*;
use std::process::{Child, Stdio};

/// Commits until it is killed; says each commit after SQLite has reported it.
const WRITER: &str = r#"
import sqlite3, sys, itertools
c = sqlite3.connect(sys.argv[1] + "/" + sys.argv[2], isolation_level=None, timeout=30)
c.execute("PRAGMA journal_mode=" + sys.argv[3])
c.execute("PRAGMA synchronous=" + sys.argv[4])
c.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v TEXT)")
n = int(sys.argv[5]) if len(sys.argv) > 5 else None
for i in (range(n) if n else itertools.count()):
    c.execute("INSERT INTO t(v) VALUES(?)", (str(i) * 20,))
    print(c.execute("SELECT max(id) FROM t").fetchone()[0], flush=True)
"#;

#[test]
fn every_pair_of_doors_replicates_every_journal_mode() {
    for doors in [("preload", "fuse"), ("fuse", "preload"), ("preload", "preload")] {
        let fleet = Fleet::new();
        let (primary, replica) = hosts(&fleet, doors);
        for mode in JOURNAL_MODES {
            let name = format!("{mode}.db");
            let mut script = format!("PRAGMA journal_mode={mode};CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
            for i in 0..20 {
                script += &format!("INSERT INTO t(v) VALUES(randomblob({}));", 100 + i * 700);
            }
            script += "DELETE FROM t WHERE id % 3 = 0;VACUUM;UPDATE t SET v = randomblob(5000);";
            script += "BEGIN;DELETE FROM t;ROLLBACK;INSERT INTO t(v) VALUES(1);";
            sql(&primary, &name, &script);
            let count = rows(&primary, &name);
            assert_follows(&primary, &replica, &name, count);
        }
        primary.assert_no_errors();
        replica.assert_no_errors();
    }
}

/// A primary that holds commits, its replica, and the position of an empty table `t` in `h.db`.
fn holding(fleet: &Fleet) -> (Host, Host, u64) {
    let (primary, replica) = hosts_that_hold(fleet);
    sql(&primary, "h.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, v)");
    let before = primary.txid("h.db");
    (primary, replica, before)
}

#[test]
fn held_commits_are_in_the_log_when_sqlite_reports_them() {
    let fleet = Fleet::new();
    let (primary, replica, before) = holding(&fleet);
    let mut script = String::from("PRAGMA cache_size=5; PRAGMA cache_spill=5;");
    for _ in 0..50 {
        // Also transactions that spill: their frames' headers are written again after the commit.
        script += "BEGIN;INSERT INTO t(v) VALUES(randomblob(60000));UPDATE t SET v = randomblob(9000) WHERE id % 7 = 0;COMMIT;";
    }
    sql(&primary, "h.db", &script);
    assert_eq!(primary.txid("h.db"), before + 50, "each held commit is a transaction of its own");
    assert_follows(&primary, &replica, "h.db", 50);
    primary.assert_no_errors();
}

#[test]
fn held_commits_of_a_process_that_has_the_database_for_itself_are_taken_once() {
    let fleet = Fleet::new();
    let (primary, replica, before) = holding(&fleet);
    // No wal-index says that a commit counts.
    let script = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/h.db", isolation_level=None)
c.execute("PRAGMA locking_mode=EXCLUSIVE")
for line in sys.stdin:
    for i in range(20):
        c.execute("INSERT INTO t(v) VALUES(randomblob(9000))")
        c.execute("UPDATE t SET v = randomblob(5000) WHERE id = 1 + ?", (i // 2,))
    print(c.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
"#;
    let mut client = Client::start(&mut python(&primary, script, &[]));
    assert_eq!(client.tell("go"), "20");
    assert_eq!(primary.txid("h.db"), before + 40, "each held commit is a transaction of its own");
    assert_eq!(client.tell("go"), "40");
    primary.wait_position_equal(&replica, "h.db");
    assert_eq!(rows(&replica, "h.db"), 40);
    drop(client);
    assert_follows(&primary, &replica, "h.db", 40);
    assert!(!primary.log().contains("taken back"), "{}", primary.log());
    primary.assert_no_errors();
}

#[test]
fn a_replica_refuses_writes_and_the_same_connection_writes_after_a_promotion() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        sql(
            &primary,
            &name,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES(1)"),
        );
        assert_follows(&primary, &replica, &name, 1);
    }
    let script = r#"
import sqlite3, sys
wal = sqlite3.connect(sys.argv[1] + "/WAL.db", isolation_level=None, timeout=0.2)
delete = sqlite3.connect(sys.argv[1] + "/DELETE.db", isolation_level=None, timeout=0.2)
for line in sys.stdin:
    for c in (wal, delete):
        try:
            c.execute("INSERT INTO t VALUES(2)")
            print("written", flush=True)
        except sqlite3.OperationalError as e:
            print(e, flush=True)
        print(c.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
"#;
    let mut client = Client::start(&mut python(&replica, script, &[]));
    assert_eq!(client.ask(4), ["database is locked", "1", "attempt to write a readonly database", "1"]);
    primary.stop();
    replica.set_role(Role::Primary).reload();
    replica.wait_for("the replica is primary", || replica.status()["role"]["name"] == "primary");
    assert_eq!(client.ask(4), ["written", "2", "written", "2"]);
    replica.assert_no_errors();
}

#[test]
fn nothing_reported_is_lost_when_the_application_is_killed() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    for (mode, hold) in [("WAL", "never"), ("DELETE", "never"), ("WAL", "always")] {
        let name = format!("{mode}-{hold}.db");
        primary.stop();
        primary.set(&format!("preload.hold={hold}")).start();
        let mut reported = 0;
        for _ in 0..4 {
            let mut client = Client::start(&mut python(&primary, WRITER, &[&name, mode, "OFF"]));
            reported = client.lines(60).last().and_then(|l| l.parse().ok()).unwrap_or(reported);
            // Killed by `drop`, in the middle of whatever it does.
        }
        let count = rows(&primary, &name);
        assert!(count >= reported, "{name}: {count} rows, {reported} reported");
        assert_follows(&primary, &replica, &name, count);
    }
    primary.assert_no_errors();
}

#[test]
fn connections_outlive_agents() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    for hold in ["never", "always"] {
        primary.stop();
        primary.set(&format!("preload.hold={hold}")).start();
        for mode in ["WAL", "DELETE"] {
            let name = format!("{mode}-{hold}.db");
            let mut client = Client::start(&mut python(&primary, STEPS, &[&name, mode]));
            assert_eq!(client.tell("50"), "50");
            for round in 1..=3 {
                primary.kill();
                // Without an agent, readers go on; a commit goes on in WAL mode unless it is held, otherwise waits.
                if mode == "WAL" && hold == "never" {
                    assert_eq!(client.tell("30"), (50 + round * 60 - 30).to_string());
                } else {
                    client.send("30");
                }
                primary.start();
                if !(mode == "WAL" && hold == "never") {
                    assert_eq!(client.line(), (50 + round * 60 - 30).to_string());
                }
                assert_eq!(client.tell("30"), (50 + round * 60).to_string());
                assert_follows(&primary, &replica, &name, 50 + round * 60);
            }
        }
    }
    primary.assert_no_errors();
}

#[test]
fn commits_that_no_agent_saw_survive_a_power_failure() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    let mut client = Client::start(&mut python(&primary, STEPS, &["x.db", "WAL"]));
    assert_eq!(client.tell("20"), "20");
    primary.kill();
    assert_eq!(client.tell("25"), "45");
    drop(client);
    // The agent takes another boot of the host for a power failure.
    std::fs::write(primary.data().join("running"), "00000000-0000-0000-0000-000000000000\n")
        .expect("the data directory is writable");
    primary.start();
    assert_eq!(rows(&primary, "x.db"), 45);
    assert_follows(&primary, &replica, "x.db", 45);
}

#[test]
fn commits_that_no_agent_saw_are_kept_when_the_host_becomes_a_replica() {
    let fleet = Fleet::new();
    let (old, new) = hosts(&fleet, ("preload", "preload"));
    let mut client = Client::start(&mut python(&old, STEPS, &["x.db", "WAL"]));
    assert_eq!(client.tell("20"), "20");
    assert_follows(&old, &new, "x.db", 20);
    old.kill();
    assert_eq!(client.tell("5"), "25");
    new.set_role(Role::Primary).reload();
    new.wait_for("the role is taken", || new.status()["role"]["name"] == "primary");
    sql(&new, "x.db", "INSERT INTO t(v) VALUES('the new primary')");
    old.set_role(Role::ReplicaOf(&new)).start();
    old.wait_connected();
    assert_follows(&new, &old, "x.db", 21);
    let kept = std::fs::read_dir(old.data().join("diverged/x.db")).expect("they are kept");
    let kept: Vec<_> = kept.flatten().map(|entry| entry.path().join("database.db")).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(sqlite3(&kept[0], "SELECT count(*) FROM t"), "25");
    old.assert_no_errors();
}

/// A primary and a replica with a row in `x.db`, in WAL mode, and a program that keeps the replica's WAL.
fn hosts_with_reader(fleet: &Fleet) -> (Host, Host, Client) {
    let (primary, replica) = hosts(fleet, ("preload", "preload"));
    sql(&primary, "x.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(v); INSERT INTO t VALUES(1)");
    assert_follows(&primary, &replica, "x.db", 1);
    let mut reader = Client::start(&mut python(&replica, STEPS_OF_READER, &["x.db"]));
    assert_eq!(reader.tell("go"), "1");
    (primary, replica, reader)
}

#[test]
fn a_replica_that_somebody_has_written_to_becomes_what_the_primary_is() {
    const COMMITTED: &str = "somebody committed on this replica";
    for (before, after, said) in [
        ("", "", COMMITTED),
        // All of the WAL is in the file: who writes next begins it anew.
        ("PRAGMA wal_checkpoint; ", "", COMMITTED),
        ("", "; PRAGMA wal_checkpoint(TRUNCATE)", "somebody wrote to it on this replica"),
    ] {
        let fleet = Fleet::new();
        let (primary, replica, _reader) = hosts_with_reader(&fleet);
        replica.expect_error(said);
        sql(&primary, "x.db", "INSERT INTO t VALUES(2)");
        assert_follows(&primary, &replica, "x.db", 2);
        // As root, and without the library, nothing keeps a program from it.
        let write = "CREATE TABLE own(v); INSERT INTO own VALUES('own'); INSERT INTO t VALUES('own'),('own')";
        sqlite3(&replica.path("x.db"), &format!("{before}{write}{after}"));
        sql(&primary, "x.db", "INSERT INTO t VALUES(3)");
        assert_follows(&primary, &replica, "x.db", 3);
        assert!(replica.log().contains(said), "{before}, {after}");
    }
}

#[test]
fn a_wal_that_somebody_has_begun_anew_on_a_replica_is_no_write() {
    let fleet = Fleet::new();
    let (primary, replica, _reader) = hosts_with_reader(&fleet);
    for (count, kind) in (2..).zip(["PASSIVE", "FULL", "RESTART", "TRUNCATE"]) {
        sqlite3(&replica.path("x.db"), &format!("PRAGMA wal_checkpoint({kind})"));
        sql(&primary, "x.db", &format!("INSERT INTO t VALUES({count})"));
        assert_follows(&primary, &replica, "x.db", count);
    }
    replica.assert_no_errors();
}

#[test]
fn without_an_agent_writes_end_with_an_error_after_a_while() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").start();
    sql(&primary, "x.db", "CREATE TABLE t(v); INSERT INTO t VALUES(1)");
    primary.stop();
    let mut command = with_library(&primary, "sqlite3");
    command.env("LITEFS_WAIT_MS", "300").arg(primary.path("x.db")).arg("INSERT INTO t VALUES(2)");
    let error = try_run(&mut command).expect_err("there is no agent");
    assert!(error.contains("no agent answers"), "{error}");
    assert_eq!(sql(&primary, "x.db", "SELECT count(*) FROM t").trim(), "1");
}

#[test]
fn a_writer_waits_for_an_agent_that_does_not_keep_up() {
    use nix::sys::signal::{Signal, kill};
    let script = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/x.db", isolation_level=None, timeout=0)
c.execute("PRAGMA journal_mode=WAL")
c.execute("PRAGMA synchronous=OFF")
c.execute("PRAGMA wal_autocheckpoint=0")
c.execute("CREATE TABLE t(v)")
for line in sys.stdin:
    written = 0
    while written < 200:
        try:
            c.execute("INSERT INTO t VALUES(randomblob(100000))")
            written += 1
        except sqlite3.OperationalError as e:
            if line.strip() == "once":
                print(e, c.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
                break
    else:
        print("written", flush=True)
"#;
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    let mut command = python(&primary, script, &[]);
    let mut client = Client::start(command.env("LITEFS_WAIT_MS", "300").stderr(Stdio::null()));
    // A slow machine's agent is not near enough for all of them at once.
    assert_eq!(client.tell("patiently"), "written");
    let pid = nix::unistd::Pid::from_raw(primary.pid().try_into().expect("a process id"));
    assert_follows(&primary, &replica, "x.db", 200);
    kill(pid, Signal::SIGSTOP).expect("the agent runs");
    let before = std::fs::metadata(primary.path("x.db-wal")).expect("there is a WAL").len();
    let answer = client.tell("once");
    let ahead = std::fs::metadata(primary.path("x.db-wal")).expect("there is a WAL").len() - before;
    kill(pid, Signal::SIGCONT).expect("the agent is there");
    let locked = answer.strip_prefix("database is locked ").unwrap_or_else(|| panic!("{answer}"));
    let locked: u64 = locked.parse().expect("a number of rows");
    assert!((4 << 20..5 << 20).contains(&ahead), "the writer was {ahead} bytes ahead");
    assert_eq!(client.tell("patiently"), "written");
    let all = rows(&primary, "x.db");
    assert_eq!(all, locked + 200, "{locked} when the agent was stopped");
    assert_follows(&primary, &replica, "x.db", all);
    primary.assert_no_errors();
}

#[test]
fn threads_and_processes_write_one_database() {
    let script = r#"
import os, sqlite3, sys, threading
path = sys.argv[1] + "/" + sys.argv[2]
def work(n):
    c = sqlite3.connect(path, isolation_level=None, timeout=60)
    for i in range(n):
        c.execute("INSERT INTO t(v) VALUES(?)", (os.urandom(50),))
    c.close()
for _ in range(3):
    if os.fork() == 0:
        threads = [threading.Thread(target=work, args=(25,)) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        os._exit(0)
for _ in range(3):
    _, status = os.wait()
    assert status == 0, status
"#;
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        sql(&primary, &name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v)"));
        let done = try_run(&mut python(&primary, script, &[&name]));
        assert!(done.is_ok(), "{done:?}");
        assert_follows(&primary, &replica, &name, 300);
    }
    primary.assert_no_errors();
}

/// Eight threads insert their own numbers, each again until SQLite reports it, and note what it has reported.
const CROWD: &str = r#"
import os, sqlite3, sys, threading
path, who, notes = sys.argv[1] + "/" + sys.argv[2], sys.argv[3], sys.argv[4]
def work(name):
    note = os.open(notes + "/" + name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    i = os.fstat(note).st_size // 8
    c = None
    while True:
        try:
            if c is None:
                c = sqlite3.connect(path, isolation_level=None, timeout=60)
                c.execute("PRAGMA synchronous=OFF")
            c.execute("INSERT OR IGNORE INTO t VALUES(?, ?)", (name, i))
            os.write(note, b"%7d\n" % i)
            i += 1
        except sqlite3.OperationalError:
            if c: c.close()
            c = None
for n in range(8):
    threading.Thread(target=work, args=(f"{who}-{n}",)).start()
"#;

#[test]
fn a_crowd_of_writers_loses_nothing_when_it_and_the_agent_are_killed() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    for (mode, hold) in [("WAL", "never"), ("WAL", "always"), ("DELETE", "never")] {
        let name = format!("{mode}-{hold}.db");
        let notes = fleet.scratch().join(&name);
        std::fs::create_dir(&notes).expect("the directory is writable");
        primary.stop();
        primary.set(&format!("preload.hold={hold}")).start();
        let table = "CREATE TABLE t(who, i, PRIMARY KEY(who, i))";
        sql(&primary, &name, &format!("PRAGMA journal_mode={mode}; {table}"));
        let notes = notes.to_str().expect("a path in UTF-8");
        let start = |who: usize| {
            let mut command = python(&primary, CROWD, &[&name, &who.to_string(), notes]);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("python runs")
        };
        let noted = || -> u64 {
            let files = std::fs::read_dir(notes).expect("it is there").flatten();
            files.map(|file| file.metadata().map_or(0, |m| m.len() / 8)).sum()
        };
        let mut crowd: Vec<Child> = (0..4).map(start).collect();
        for round in 0..6 {
            let before = noted();
            primary.wait_for("the crowd is at work", || noted() > before + 40);
            if round % 3 == 2 {
                primary.kill();
                primary.start();
            } else {
                let who = round % 4;
                crowd[who].kill().expect("it runs");
                crowd[who].wait().expect("it was killed");
                crowd[who] = start(who);
            }
        }
        for mut process in crowd {
            process.kill().expect("it runs");
            process.wait().expect("it was killed");
        }
        for note in std::fs::read_dir(notes).expect("it is there").flatten() {
            let (who, acknowledged) = (note.file_name(), note.metadata().expect("a file").len() / 8);
            let count = format!("SELECT count(*) FROM t WHERE who = '{}'", who.to_string_lossy());
            let there: u64 = sql(&primary, &name, &count).trim().parse().expect("a number");
            assert!(
                there >= acknowledged,
                "{name}, {who:?}: {acknowledged} were reported, {there} are there"
            );
        }
        assert_eq!(sql(&primary, &name, "PRAGMA integrity_check").trim(), "ok");
        let count = rows(&primary, &name);
        assert_follows(&primary, &replica, &name, count);
    }
    primary.assert_no_errors();
}

#[test]
fn what_is_done_without_the_library_is_noticed_and_captured() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    // Made, copied in, written in both modes, and removed, by programs that do not have the library.
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        let path = primary.path(&name);
        sqlite3(&path, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES(1)"));
        primary.wait_for("the new database is captured", || primary.txid(&name) > 0);
        assert_follows(&primary, &replica, &name, 1);
        sqlite3(&path, "INSERT INTO t VALUES(2)");
        replica.wait_sql(&name, "SELECT count(*) FROM t", "2");
        assert_follows(&primary, &replica, &name, 2);
    }
    let copy = fleet.scratch().join("copy.db");
    sqlite3(&copy, "CREATE TABLE t(v); INSERT INTO t VALUES(1),(2),(3)");
    std::fs::copy(&copy, primary.path("copy.db")).expect("the directory is writable");
    primary.wait_for("the copy is captured", || primary.txid("copy.db") > 0);
    assert_follows(&primary, &replica, "copy.db", 3);
    std::fs::remove_file(primary.path("copy.db")).expect("the file is there");
    replica.wait_gone("copy.db");
    primary.assert_no_errors();
}

#[test]
fn dropping_and_renaming_replicate() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    sql(&primary, "x.db", "CREATE TABLE t(v); INSERT INTO t VALUES(1)");
    assert_follows(&primary, &replica, "x.db", 1);
    let done = try_run(&mut python(
        &primary,
        "import os, sys; os.rename(sys.argv[1] + '/x.db', sys.argv[1] + '/y.db')",
        &[],
    ));
    assert!(done.is_ok(), "{done:?}");
    replica.wait_gone("x.db");
    assert_follows(&primary, &replica, "y.db", 1);
    let done = try_run(&mut python(&primary, "import os, sys; os.unlink(sys.argv[1] + '/y.db')", &[]));
    assert!(done.is_ok(), "{done:?}");
    replica.wait_gone("y.db");
    primary.assert_no_errors();
}

#[test]
fn the_door_may_change_between_starts() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "fuse"));
    sql(&primary, "x.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(v); INSERT INTO t VALUES(1)");
    primary.stop();
    primary.set("door=fuse").start();
    assert_eq!(primary.status()["mount"]["door"], "fuse");
    primary.sql("x.db", "INSERT INTO t VALUES(2)");
    primary.stop();
    primary.set("door=preload").start();
    assert_eq!(primary.status()["mount"]["door"], "preload");
    sql(&primary, "x.db", "INSERT INTO t VALUES(3)");
    assert_follows(&primary, &replica, "x.db", 3);
    primary.assert_no_errors();
}

#[test]
fn processes_that_end_are_let_go() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").start();
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", primary.pid())).expect("the agent runs");
        let names = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.starts_with("preload-") && name.trim() != "preload-listen").count()
    };
    let mut clients: Vec<Client> = ["WAL", "DELETE"]
        .map(|mode| Client::start(&mut python(&primary, STEPS, &[&format!("{mode}.db"), mode])))
        .into();
    for client in &mut clients {
        assert_eq!(client.tell("5"), "5");
    }
    assert_eq!(threads(), 2);
    drop(clients);
    primary.wait_for("no thread serves a process that is gone", || threads() == 0);
    for name in ["WAL.db", "DELETE.db"] {
        let database = primary.database(name).expect("it is known");
        assert_eq!(database["open_handles"], 0, "{database}");
    }
}

#[test]
fn files_that_the_agent_makes_up_are_there_for_whoever_asks_by_name() {
    let script = r#"
import ctypes, os, stat, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.fopen.restype = ctypes.c_void_p
libc.fgets.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
for name in sys.argv[2:]:
    path = sys.argv[1] + "/" + name
    stream = libc.fopen(path.encode(), b"r")
    if not stream:
        print(name, os.strerror(ctypes.get_errno()), os.path.lexists(path), os.path.exists(path))
        continue
    line = ctypes.create_string_buffer(200)
    libc.fgets(line, 200, stream)
    libc.fclose(stream)
    content = line.value
    assert open(path, "rb").read() == content, (name, content)
    for of in (os.stat(path), os.lstat(path)):
        assert (of.st_size, of.st_nlink, stat.filemode(of.st_mode)) == (len(content), 1, "-r--r--r--"), of
    told = subprocess.check_output(["stat", "-c", "%s %h %A", path], text=True).split()
    assert told == [str(len(content)), "1", "-r--r--r--"], told
    assert not libc.fopen(path.encode(), b"r+")
    # They are made when they are asked for.
    assert name not in os.listdir(sys.argv[1])
    print(name, content.decode().strip())
"#;
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    sql(&primary, "x.db", "CREATE TABLE t(v)");
    assert_follows(&primary, &replica, "x.db", 0);
    let position = primary.position("x.db").expect("it is known");
    let asked = [".primary", ".lag", "x.db-pos", "no.db-pos"];
    let there = |host: &Host| run(&mut python(host, script, &asked));
    let nothing = |name: &str| format!("{name} No such file or directory False False");
    let rest = format!(".lag +000000000\nx.db-pos {position}\n{}", nothing("no.db-pos"));
    assert_eq!(there(&primary), format!("{}\n{rest}", nothing(".primary")));
    replica.wait_for("the lag is 0", || there(&replica) == format!(".primary a\n{rest}"));
}

#[test]
fn a_file_too_many_is_refused_and_drops_no_lock() {
    let script = r#"
import errno, os, resource, sqlite3, subprocess, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (18000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
path = sys.argv[1] + "/x.db"
c = sqlite3.connect(path, isolation_level=None)
c.execute("BEGIN EXCLUSIVE")
try:
    for i in range(17000):
        os.open(path, os.O_RDWR | os.O_CLOEXEC)
except OSError as e:
    assert e.errno == errno.ENFILE and i > 16000, (i, e)
else:
    raise RuntimeError("all were opened")
# Descriptors are left: the table of the library is full.
os.open("/dev/null", os.O_RDONLY)
other = subprocess.run(["sqlite3", path, "SELECT * FROM t"], capture_output=True, text=True)
assert "locked" in other.stderr, other
os._exit(0)
"#;
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    sql(&primary, "x.db", "CREATE TABLE t(v)");
    run(&mut python(&primary, script, &[]));
    sql(&primary, "x.db", "INSERT INTO t VALUES(2)");
    assert_follows(&primary, &replica, "x.db", 1);
}
