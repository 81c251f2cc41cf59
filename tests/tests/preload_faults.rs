//! The preload door, where calls of the C library fail below the library: with errors of the disk, with a full one, with
//! signals, and with writes of a part. SQLite reports an error or goes on, and no host has anything but what was committed.
//!
//! The library's own calls fail too: those by which it reaches the agent.
//!
//! `LITEFS_FAULTS_ROUNDS` (2) lengthens the test, `LITEFS_FAULTS_SEED` (1) changes what fails when.

use litefs_tests::library::*;
use litefs_tests::*;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::Pid;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The library that lets calls fail.
fn faults() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let library = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("faults.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/faults.c");
        run(Command::new("cc").args(["-O1", "-shared", "-fPIC", source, "-ldl", "-o"]).arg(&library));
        library
    })
}

/// Writes while calls fail, on connections of its own in turn; then says how many transactions were reported as
/// committed, and how many were tried.
const WRITER: &str = r#"
import random, sqlite3, sys
path, mode, seed, count = sys.argv[1] + "/" + sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
choose = random.Random(seed)
c, committed, tried, errors = None, [], 0, {}
while tried < count:
    try:
        if c is None:
            c = sqlite3.connect(path, isolation_level=None, timeout=20)
            c.execute("PRAGMA synchronous=" + choose.choice(["OFF", "NORMAL", "FULL"]))
            c.execute("PRAGMA cache_size=" + choose.choice(["5", "200"]))
        tried += 1
        c.execute("BEGIN IMMEDIATE")
        c.execute("INSERT INTO t VALUES(?, randomblob(?))", (seed * 100000 + tried, choose.choice([10, 5000, 90000])))
        if choose.random() < 0.3:
            c.execute("UPDATE t SET v = randomblob(300) WHERE id % 5 = ?", (choose.randrange(5),))
        if choose.random() < 0.1:
            c.execute("ROLLBACK")
            continue
        c.execute("COMMIT")
        committed.append(tried)
        if choose.random() < 0.1:
            c.execute(choose.choice(["PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA wal_checkpoint", "VACUUM"]))
    except sqlite3.Error as e:
        text = str(e)
        assert "malformed" not in text and "not a database" not in text, text
        errors[text] = errors.get(text, 0) + 1
        try:
            if c is not None and c.in_transaction:
                c.execute("ROLLBACK")
        except sqlite3.Error:
            pass
        if choose.random() < 0.3:
            c = None
print(" ".join(str(seed * 100000 + n) for n in committed))
print(errors)
"#;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

fn round(seed: u64, hold: &str) {
    println!("calls fail with LITEFS_FAULTS_SEED={seed}, preload.hold={hold}");
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").set(&format!("preload.hold={hold}")).start();
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.set("door=preload").start();
    replica.wait_connected();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        sql(
            &primary,
            &name,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v)"),
        );
        let files = std::fs::canonicalize(primary.mount()).expect("it is a link to the files");
        let libraries = format!("{} {}", liblitefs().display(), faults().display());
        let mut wrong = Vec::new();
        for part in 0..3 {
            let seed = seed * 10 + part;
            let mut writer = python(&primary, WRITER, &[&name, mode, &seed.to_string(), "60"]);
            // SQLite names its files by the path without links.
            writer.env("LD_PRELOAD", &libraries).env("FAULTS_DIR", &files).env("FAULTS_ONE_IN", "40");
            writer.env("FAULTS_SEED", seed.to_string());
            let said = run(&mut writer);
            let (committed, errors) = said.split_once('\n').expect("two lines");
            println!("{name}: {errors}");
            assert!(errors.contains("disk"), "nothing failed: {errors}");
            let count = committed.split_whitespace().count();
            for id in committed.split_whitespace() {
                let there = sql(&primary, &name, &format!("SELECT count(*) FROM t WHERE id = {id}"));
                if there.trim() != "1" {
                    wrong.push(id.to_owned());
                }
            }
            assert!(count > 5, "{name}: next to nothing was committed: {committed}");
        }
        assert!(wrong.is_empty(), "{name} lacks what was reported as committed: {wrong:?}");
        assert_eq!(sql(&primary, &name, "PRAGMA integrity_check").trim(), "ok");
        let count = rows(&primary, &name);
        assert_follows(&primary, &replica, &name, count);
    }
    replica.assert_no_errors();
}

#[test]
fn whatever_fails_below_the_library_hosts_have_what_was_committed() {
    let first = number("LITEFS_FAULTS_SEED", 1);
    for seed in first..first + number("LITEFS_FAULTS_ROUNDS", 2) {
        round(seed, if seed % 2 == 0 { "always" } else { "never" });
    }
}

/// Reads and writes, and says what came of it.
const READER_AND_WRITER: &str = r#"
import sqlite3, sys
for name in ("WAL.db", "DELETE.db"):
    c = sqlite3.connect(sys.argv[1] + "/" + name, isolation_level=None, timeout=0)
    print(c.execute("SELECT count(*) FROM t").fetchone()[0])
    try:
        c.execute("INSERT INTO t VALUES(0)")
        print("written")
    except sqlite3.OperationalError as e:
        print("refused:", e)
try:
    print(open(sys.argv[1] + "/WAL.db-pos").read())
except OSError as e:
    print("refused:", e)
"#;

/// A primary that has two databases of a row, in WAL mode and not, and a replica.
fn two_databases(fleet: &Fleet) -> (Host, Host) {
    let (primary, replica) = hosts(fleet, ("preload", "preload"));
    for mode in ["WAL", "DELETE"] {
        let create = format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES(1)");
        sql(&primary, &format!("{mode}.db"), &create);
    }
    (primary, replica)
}

#[test]
fn an_agent_that_cannot_be_reached_for_want_of_anything_is_no_agent() {
    let fleet = Fleet::new();
    let (primary, replica) = two_databases(&fleet);
    let page = Some(u32::try_from(size_of::<shim_protocol::Page>()).expect("it is small"));
    let failing: [(_, _, &[i32]); 5] = [
        (libc::SYS_socket, None, &[libc::EMFILE, libc::ENFILE, libc::ENOMEM]),
        (libc::SYS_connect, None, &[libc::EAGAIN, libc::EINTR, libc::ENOMEM, libc::ECONNREFUSED]),
        (libc::SYS_sendto, None, &[libc::EAGAIN, libc::EPIPE]),
        (libc::SYS_recvmsg, None, &[libc::EAGAIN, libc::EINTR, libc::ENOMEM]),
        (libc::SYS_mmap, page, &[libc::ENOMEM, libc::EAGAIN]),
    ];
    for (number, second, errors) in failing {
        for error in errors {
            let mut client = python(&primary, READER_AND_WRITER, &[]);
            client.env("LITEFS_WAIT_MS", "100").stderr(Stdio::piped());
            let action = libc::SECCOMP_RET_ERRNO | error.cast_unsigned();
            let output = replace_system_calls(&mut client, &[SystemCall { number, second }], action).output();
            let output = output.expect("python runs");
            let said = String::from_utf8_lossy(&output.stdout);
            let complaints = String::from_utf8_lossy(&output.stderr);
            let what = format!("call {number}, error {error}: {said} {complaints}");
            assert!(output.status.success(), "{what}");
            let lines: Vec<&str> = said.lines().collect();
            assert_eq!((lines[0], lines[2]), ("1", "1"), "{what}");
            assert_eq!(lines.iter().filter(|line| line.starts_with("refused: ")).count(), 3, "{what}");
            let no_room = [libc::EMFILE, libc::ENFILE, libc::ENOMEM].contains(error);
            let why = if no_room { "raise the limits of this process" } else { "no agent answers" };
            assert!(complaints.contains(why), "{what}");
        }
    }
    for name in ["WAL.db", "DELETE.db"] {
        assert_follows(&primary, &replica, name, 1);
    }
    assert!(!primary.log().contains("without the preload library"), "{}", primary.log());
}

#[test]
fn a_process_that_has_descriptors_again_writes_on_the_same_connection() {
    let script = r#"
import os, resource, sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/WAL.db", isolation_level=None, timeout=0)
print(c.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for line in sys.stdin:
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if line.strip() == "none":
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        c.execute("INSERT INTO t VALUES(0)")
        print("written", flush=True)
    except sqlite3.OperationalError as e:
        print(e, flush=True)
"#;
    let fleet = Fleet::new();
    let (primary, replica) = two_databases(&fleet);
    // It opens the files without an agent, so that all it needs afterwards is the connection to one.
    primary.stop();
    let mut client = Client::start(python(&primary, script, &[]).env("LITEFS_WAIT_MS", "100"));
    assert_eq!(client.line(), "1");
    primary.start();
    assert_eq!(client.tell("none"), "database is locked");
    assert_eq!(client.tell("all"), "written");
    drop(client);
    replica.wait_connected();
    assert_follows(&primary, &replica, "WAL.db", 2);
}

#[test]
fn an_agent_that_is_stopped_and_has_a_queue_of_processes_holds_up_nobody_for_ever() {
    let fleet = Fleet::new();
    let (primary, replica) = two_databases(&fleet);
    let agent = Pid::from_raw(primary.pid().try_into().expect("a process id"));
    kill(agent, Signal::SIGSTOP).expect("the agent runs");
    // As many as the kernel keeps waiting.
    let address = UnixAddr::new(&primary.socket().with_file_name(shim_protocol::SOCKET)).expect("a path");
    let mut queue = Vec::new();
    loop {
        let next = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_NONBLOCK, None);
        let next = next.expect("a socket");
        match connect(next.as_raw_fd(), &address) {
            Ok(()) => queue.push(next),
            Err(error) => break assert_eq!(error, nix::errno::Errno::EAGAIN),
        }
    }
    let mut client = python(&primary, READER_AND_WRITER, &[]);
    let mut client = client.env("LITEFS_WAIT_MS", "100").stdout(Stdio::null()).spawn().expect("python runs");
    let status = wait_for("it gives up", PATIENCE, || client.try_wait().expect("it is our child"));
    assert!(status.success());
    drop(queue);
    kill(agent, Signal::SIGCONT).expect("the agent is there");
    for name in ["WAL.db", "DELETE.db"] {
        assert_follows(&primary, &replica, name, 1);
    }
}

#[test]
fn signals_do_not_disturb_commits() {
    let script = r#"
import signal, sqlite3, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for name in ("WAL.db", "DELETE.db"):
    for n in range(10):
        c = sqlite3.connect(sys.argv[1] + "/" + name, isolation_level=None, timeout=30)
        for n in range(10):
            c.execute("INSERT INTO t VALUES(randomblob(3000))")
signal.setitimer(signal.ITIMER_REAL, 0)
"#;
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").set("preload.hold=always").start();
    let replica = fleet.replica("b", &primary);
    for mode in ["WAL", "DELETE"] {
        sql(&primary, &format!("{mode}.db"), &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v)"));
    }
    assert_eq!(run(&mut python(&primary, script, &[])), "");
    for name in ["WAL.db", "DELETE.db"] {
        assert_follows(&primary, &replica, name, 100);
    }
    primary.assert_no_errors();
}
