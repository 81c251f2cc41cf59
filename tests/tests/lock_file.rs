//! `NAME-lock`: programs written for LiteFS open it, lock its byte 72, write on a replica, unlock and close.

use litefs_tests::halt_locks::{ROWS, assert_one_history, create, holder, insert, pair};
use litefs_tests::library::{hosts, with_library};
use litefs_tests::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::Command;

/// Does what the client libraries of LiteFS do, one step for each line.
const PROGRAM: &str = r#"
import errno, fcntl, os, signal, sqlite3, struct, sys
path = sys.argv[1]
F_OFD_SETLKW, HALT = 38, 72
lock = None

def halt_byte(kind):
    fcntl.fcntl(lock, F_OFD_SETLKW, struct.pack("hhqqi4x", kind, 0, HALT, 1, 0))

# Also where tests run in the background of a shell, which has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def fork():
    child = os.fork()
    if child == 0:
        os.close(0)
        signal.pause()
    return child

def sql(statement):
    connection = sqlite3.connect(path, timeout=5, isolation_level=None)
    try:
        return ",".join(str(row[0]) for row in connection.execute(statement))
    finally:
        connection.close()

print("ready", flush=True)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    said = None
    try:
        if word == "open":
            lock = os.open(path + "-lock", os.O_RDWR | os.O_CLOEXEC)
        elif word == "halt":
            halt_byte(fcntl.F_WRLCK)
        elif word == "unhalt":
            halt_byte(fcntl.F_UNLCK)
        elif word == "close":
            os.close(lock)
        elif word == "fork":
            said = fork()
        elif word == "sql":
            said = sql(rest)
        print(said or "ok", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
    except sqlite3.Error as error:
        print("error:", error, flush=True)
"#;

struct Program(Client);

impl Program {
    fn start(host: &Host) -> Program {
        Program::of(Command::new("python3"), host)
    }

    fn of(python: Command, host: &Host) -> Program {
        Program::with(python, PROGRAM, host)
    }

    fn with(mut python: Command, script: &str, host: &Host) -> Program {
        let mut client = Client::start(python.args(["-c", script]).arg(host.path("app.db")));
        assert_eq!(client.line(), "ready");
        Program(client)
    }

    #[track_caller]
    fn run(&mut self, step: &str) {
        assert_eq!(self.tell(step), "ok", "{step}");
    }

    fn insert(&mut self, value: &str) -> String {
        self.tell(&format!("sql INSERT INTO t VALUES ('{value}')"))
    }

    fn has_child_waiting_in_open(&self) -> bool {
        let syscall = std::fs::read_to_string(format!("/proc/{}/syscall", self.id())).unwrap_or_default();
        let number: i64 = syscall.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(-1);
        // Behind the preload door it waits for a message.
        [libc::SYS_openat, libc::SYS_open, libc::SYS_recvmsg].contains(&number)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.id()).expect("a process id"))
    }

    fn finish(self) {
        self.0.finish();
    }

    fn kill(self) {
        self.0.kill();
    }
}

impl std::ops::Deref for Program {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.0
    }
}

impl std::ops::DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.0
    }
}

#[test]
fn who_has_the_file_open_for_writing_writes_on_a_replica() {
    for mode in ["WAL", "DELETE"] {
        let fleet = Fleet::new();
        let (primary, replica) = pair(&fleet, mode);
        let mut program = Program::start(&replica);
        assert!(program.insert("no").starts_with("error"), "{mode}");
        for value in ["lent", "again"] {
            program.run("open");
            program.run("halt");
            assert_eq!(holder(&primary).as_deref(), Some("b"), "{mode}");
            assert_eq!(program.insert(value), "ok", "{mode}");
            assert!(primary.sql("app.db", ROWS).ends_with(value), "{mode}: durable on the primary at once");
            program.run("unhalt");
            program.run("close");
            replica.wait_for("closing it ends the lock", || holder(&replica).is_none());
            assert!(program.insert("no").starts_with("error"), "{mode}");
            insert(&primary, "own").expect("the primary writes again");
        }
        program.finish();
        assert_eq!(primary.sql("app.db", ROWS), "first,lent,own,again,own", "{mode}");
        assert_one_history(&[&primary, &replica]);
    }
}

#[test]
fn on_the_primary_there_is_nothing_to_get() {
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet, "WAL");
    let (mut one, mut other) = (Program::start(&primary), Program::start(&primary));
    for program in [&mut one, &mut other] {
        program.run("open");
    }
    one.run("halt");
    assert_eq!(one.insert("one"), "ok");
    assert_eq!(other.insert("other"), "ok");
    assert_eq!(holder(&primary), None);
    for mut program in [one, other] {
        program.run("unhalt");
        program.run("close");
        program.finish();
    }
    primary.wait_position_equal(&replica, "app.db");
    assert_eq!(replica.sql("app.db", ROWS), "first,one,other");
}

#[test]
fn the_file_is_empty_and_not_listed_and_reading_it_takes_no_lock() {
    let fleet = Fleet::new();
    let (_primary, replica) = pair(&fleet, "WAL");
    let script = r#"
import errno, os, sys
lock = sys.argv[1] + "/app.db-lock"
status = os.stat(lock)
assert status.st_size == 0 and status.st_mode & 0o170000 == 0o100000, status
assert os.listdir(sys.argv[1]).count("app.db-lock") == 0
with open(lock, "rb") as file:
    assert file.read() == b""
    print("reading", flush=True)
    sys.stdin.readline()
with open(lock, "r+b", buffering=0) as file:
    try:
        file.write(b"x")
    except OSError as error:
        print(errno.errorcode[error.errno])
for none in ["/none.db-lock", "/-lock"]:
    try:
        os.open(sys.argv[1] + none, os.O_RDWR)
    except OSError as error:
        assert error.errno == errno.ENOENT, error
os.open(lock, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
print("created", flush=True)
sys.stdin.readline()
"#;
    let mut client = Client::start(Command::new("python3").args(["-c", script]).arg(replica.mount()));
    assert_eq!(client.line(), "reading");
    assert_eq!(holder(&replica), None);
    let refused = client.tell("");
    assert!(["EIO", "EPERM"].contains(&&*refused), "{refused}");
    assert_eq!(client.line(), "created");
    assert_eq!(holder(&replica).as_deref(), Some("b"));
    client.finish();
    replica.wait_for("its end ends the lock", || holder(&replica).is_none());
}

#[test]
fn a_real_file_of_that_name_stays_what_it_is() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    std::fs::write(primary.path("app.db-lock"), "mine").expect("it can be written");
    primary.sql("app.db", "CREATE TABLE t(x)");
    assert_eq!(std::fs::read_to_string(primary.path("app.db-lock")).expect("it is there"), "mine");
    std::fs::remove_file(primary.path("app.db-lock")).expect("it can be removed");
    assert_eq!(std::fs::read_to_string(primary.path("app.db-lock")).expect("it is made up now"), "");
}

#[test]
fn the_lock_ends_when_the_last_process_that_has_the_file_open_dies() {
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet, "WAL");
    let mut program = Program::start(&replica);
    program.run("open");
    program.run("halt");
    assert_eq!(program.insert("lent"), "ok");
    let child: i32 = program.tell("fork").parse().expect("a process id");
    program.kill();
    // Its child has it still: another program gets nothing.
    let mut other = Program::start(&replica);
    other.send("open");
    replica.wait_for("the other program waits", || other.has_child_waiting_in_open());
    assert_eq!(holder(&primary).as_deref(), Some("b"));
    // Who waits is not in the way of anybody.
    assert_eq!(replica.sql("app.db", ROWS), "first,lent");
    kill(Pid::from_raw(child), Signal::SIGKILL).expect("it runs");
    assert_eq!(other.line(), "ok");
    assert_eq!(other.insert("other"), "ok");
    other.kill();
    replica.wait_for("the lock ends", || holder(&replica).is_none());
    insert(&primary, "own").expect("the primary writes again");
    assert_eq!(primary.sql("app.db", ROWS), "first,lent,other,own");
    assert_one_history(&[&primary, &replica]);
}

#[test]
fn who_waits_for_the_lock_can_be_interrupted_and_killed() {
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet, "WAL");
    let mut holding = Program::start(&replica);
    holding.run("open");
    let mut waiting = Program::start(&replica);
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        waiting.send("open");
        replica.wait_for("it waits", || waiting.has_child_waiting_in_open());
        kill(waiting.pid(), signal).expect("it runs");
        // Python ends with KeyboardInterrupt.
        assert!(!waiting.wait().success());
        waiting = Program::start(&replica);
    }
    assert_eq!(holder(&replica).as_deref(), Some("b"));
    assert_eq!(holding.insert("lent"), "ok");
    holding.finish();
    waiting.run("open");
    assert_eq!(waiting.insert("after"), "ok");
    waiting.finish();
    assert_eq!(primary.sql("app.db", ROWS), "first,lent,after");
}

#[test]
fn a_primary_that_goes_away_ends_the_lock() {
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet, "WAL");
    let mut program = Program::start(&replica);
    program.run("open");
    program.run("halt");
    assert_eq!(program.insert("acknowledged"), "ok");
    primary.kill();
    assert!(program.insert("not").starts_with("error"));
    replica.wait_for("the log says so", || replica.log().contains("has lost the halt lock"));
    primary.start();
    replica.wait_for("it follows again", || replica.follows(&primary));
    assert!(program.insert("of an earlier term").starts_with("error"));
    insert(&primary, "own").expect("the primary writes");
    // Another one need not wait for the first to close the file.
    let mut other = Program::start(&replica);
    other.run("open");
    assert_eq!(other.insert("other"), "ok");
    program.run("unhalt");
    program.run("close");
    assert_eq!(other.insert("still"), "ok", "that was not its lock");
    other.run("close");
    program.run("open");
    assert_eq!(program.insert("anew"), "ok");
    program.finish();
    assert_eq!(primary.sql("app.db", ROWS), "first,acknowledged,own,other,still,anew");
    assert_one_history(&[&primary, &replica]);
}

#[test]
fn an_agent_that_comes_after_another_knows_of_no_lock_and_serves_who_waits() {
    let fleet = Fleet::new();
    let (primary, replica) = (fleet.host("a", Role::Primary), fleet.host("b", Role::Primary));
    primary.set("lease.ttl=2s").start();
    replica.set_role(Role::ReplicaOf(&primary)).start();
    create(&primary, &[&replica], "WAL");
    let mut program = Program::start(&replica);
    program.run("open");
    assert_eq!(program.insert("lent"), "ok");
    let mut waiting = Program::start(&replica);
    waiting.send("open");
    replica.wait_for("it waits", || waiting.has_child_waiting_in_open());
    replica.kill();
    replica.start();
    if !is_preload() && !replica.log().contains("took over the mount") {
        // An old kernel: open files are lost with the agent.
        return;
    }
    assert_eq!(waiting.line(), "ok", "the next agent gets it the lock");
    assert_eq!(waiting.insert("waited"), "ok");
    program.run("close");
    assert_eq!(waiting.insert("still"), "ok", "that was not its lock");
    waiting.finish();
    replica.wait_for("the lock ends", || holder(&replica).is_none());
    assert!(program.insert("no").starts_with("error"));
    program.finish();
    insert(&primary, "own").expect("the primary writes again");
    assert_eq!(primary.sql("app.db", ROWS), "first,lent,waited,still,own");
    assert_one_history(&[&primary, &replica]);
}

#[test]
fn a_refused_lock_is_an_error_with_a_number_and_a_line_in_the_log() {
    let fleet = Fleet::new();
    let (primary, replica) = (fleet.host("a", Role::Primary), fleet.host("b", Role::Primary));
    primary.configure("[sync]\nacks = 1\nmembers = [\"b\"]\n").start();
    replica.set_role(Role::ReplicaOf(&primary)).start();
    replica.wait_connected();
    create(&primary, &[&replica], "WAL");
    let mut program = Program::start(&replica);
    assert_eq!(program.tell("open"), "ENOLCK");
    let log = replica.log();
    assert!(log.contains("gets no halt lock") && log.contains("it is written on the primary only"), "{log}");
    program.finish();
    insert(&primary, "own").expect("the primary writes");
}

/// A program as it is run on a host with this door.
fn command(host: &Host, door: &str, program: &str) -> Command {
    if door == "preload" {
        return with_library(host, program);
    }
    let mut command = Command::new(program);
    command.env_remove("LD_PRELOAD");
    command
}

#[test]
fn hosts_with_different_doors_lend_to_each_other() {
    for doors in [("fuse", "preload"), ("preload", "fuse")] {
        for mode in ["WAL", "DELETE"] {
            let fleet = Fleet::new();
            let (primary, replica) = hosts(&fleet, doors);
            let sql = |host: &Host, timeout: &str, sql: &str| {
                let door = if host.name() == "a" { doors.0 } else { doors.1 };
                let mut shell = command(host, door, "sqlite3");
                let timeout = format!(".timeout {timeout}");
                try_run(shell.args(["-bail", "-cmd", &timeout]).arg(host.path("app.db")).arg(sql))
            };
            let on_primary = |timeout: &str, text: &str| sql(&primary, timeout, text);
            let create =
                format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x); INSERT INTO t VALUES ('first')");
            on_primary("10000", &create).expect("the primary takes writes");
            replica.wait_position_equal(&primary, "app.db");
            let mut program = Program::of(command(&replica, doors.1, "python3"), &replica);
            program.run("open");
            program.run("halt");
            assert_eq!(program.insert("lent"), "ok", "{doors:?} {mode}");
            let rows = on_primary("10000", ROWS).expect("the primary is read");
            assert_eq!(rows.trim(), "first,lent", "{doors:?} {mode}: durable on the primary at once");
            let waits = on_primary("0", "INSERT INTO t VALUES ('early')").expect_err("it is lent");
            assert!(waits.contains("locked"), "{doors:?} {mode}: {waits}");
            assert_eq!(program.insert("again"), "ok", "{doors:?} {mode}");
            program.run("close");
            on_primary("20000", "INSERT INTO t VALUES ('own')").expect("the primary writes again");
            replica.wait_position_equal(&primary, "app.db");
            program.run("open");
            assert_eq!(program.insert("anew"), "ok", "{doors:?} {mode}");
            program.kill();
            on_primary("20000", "INSERT INTO t VALUES ('last')").expect("the primary writes again");
            replica.wait_position_equal(&primary, "app.db");
            let rows = sql(&replica, "10000", ROWS).expect("the replica is read");
            assert_eq!(rows.trim(), "first,lent,again,own,anew,last", "{doors:?} {mode}");
            assert_one_history(&[&primary, &replica]);
        }
    }
}

/// A connection for each statement: the next one begins a new WAL.
const CONNECTIONS: &str = r#"
import os, sqlite3, sys
lock = os.open(sys.argv[1] + "-lock", os.O_RDWR)
print("ready", flush=True)
for line in sys.stdin:
    connection = sqlite3.connect(sys.argv[1], timeout=5, isolation_level=None)
    connection.execute(line)
    print("ok", flush=True)
    connection.close()
"#;

#[test]
fn a_wal_that_begins_anew_under_the_lock_takes_no_commit_back() {
    let fleet = Fleet::new();
    let (primary, replica) = (fleet.host("a", Role::Primary), fleet.host("b", Role::Primary));
    for host in [&primary, &replica] {
        host.set("replication.timeout=60s").set("lease.ttl=60s");
    }
    primary.set("door=fuse").start();
    replica.set_role(Role::ReplicaOf(&primary)).set("door=preload").start();
    replica.wait_connected();
    let mut shell = command(&primary, "fuse", "sqlite3");
    run(shell.arg(primary.path("app.db")).arg("PRAGMA journal_mode=WAL; CREATE TABLE t(x)"));
    replica.wait_position_equal(&primary, "app.db");
    let mut program = Program::with(command(&replica, "preload", "python3"), CONNECTIONS, &replica);
    let mut rows = String::new();
    for row in ["one", "two", "three", "four"] {
        program.run(&format!("INSERT INTO t VALUES ('{row}')"));
        rows += if rows.is_empty() { "" } else { "," };
        rows += row;
        let mut shell = command(&primary, "fuse", "sqlite3");
        assert_eq!(run(shell.arg(primary.path("app.db")).arg(ROWS)).trim(), rows);
    }
    program.finish();
    assert!(!replica.log().contains("taken back"), "{}", replica.log());
    primary.wait_for("it has its database again", || holder(&primary).is_none());
    assert_one_history(&[&primary, &replica]);
}
