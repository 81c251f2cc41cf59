//! Programs that run with the preload library, on hosts that a test gives the preload door itself.

use crate::compare::assert_equal;
use crate::{Fleet, Host, Role, liblitefs, try_run};
use std::process::Command;

/// A running primary `a` and a connected replica `b`, with these doors.
pub fn hosts(fleet: &Fleet, doors: (&str, &str)) -> (Host, Host) {
    let primary = fleet.host("a", Role::Primary);
    primary.set(&format!("door={}", doors.0)).start();
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.set(&format!("door={}", doors.1)).start();
    replica.wait_connected();
    (primary, replica)
}

/// A running primary `a` that holds commits until its log has them, and a connected replica `b`.
pub fn hosts_that_hold(fleet: &Fleet) -> (Host, Host) {
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").set("preload.hold=always").start();
    let replica = fleet.replica("b", &primary);
    (primary, replica)
}

/// A command of an application on this host.
pub fn with_library(host: &Host, program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LD_PRELOAD", liblitefs());
    command.env("LITEFS_RUNTIME_DIR", host.socket().parent().expect("the socket is in a directory"));
    command
}

/// Runs SQL in a shell with the library; gives rows or the error.
pub fn try_sql(host: &Host, database: &str, sql: &str) -> Result<String, String> {
    let mut command = with_library(host, "sqlite3");
    command.args(["-bail", "-cmd", ".timeout 10000"]).arg(host.path(database)).arg(sql);
    try_run(&mut command)
}

/// Runs SQL that must succeed in a shell with the library.
pub fn sql(host: &Host, database: &str, statements: &str) -> String {
    try_sql(host, database, statements).unwrap_or_else(|e| panic!("{statements}: {e}"))
}

/// A Python program with the library; its first argument is the directory of the databases.
pub fn python(host: &Host, script: &str, arguments: &[&str]) -> Command {
    let mut command = with_library(host, "python3");
    command.arg("-c").arg(script).arg(host.mount()).args(arguments);
    command
}

/// Rows of the table `t`.
pub fn rows(host: &Host, database: &str) -> u64 {
    let rows = sql(host, database, "SELECT count(*) FROM t");
    rows.trim().parse().unwrap_or_else(|_| panic!("no number of rows: {rows:?}"))
}

/// Waits until the replica has the rows and the same position, and compares the files.
#[track_caller]
pub fn assert_follows(primary: &Host, replica: &Host, database: &str, count: u64) {
    primary.wait_for("the agent has captured all rows", || {
        replica.wait_position_equal(primary, database);
        let mut read = with_library(replica, "sqlite3");
        read.args(["-cmd", ".timeout 10000"]).arg(replica.path(database)).arg("SELECT count(*) FROM t");
        try_run(&mut read).is_ok_and(|seen| seen.trim() == count.to_string())
    });
    assert_equal(primary, replica, database);
}

/// Inserts as many rows as it is told, on one connection; says how many there are.
pub const STEPS: &str = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/" + sys.argv[2], isolation_level=None, timeout=30)
c.execute("PRAGMA journal_mode=" + sys.argv[3])
c.execute("PRAGMA synchronous=FULL")
c.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v TEXT)")
for line in sys.stdin:
    for i in range(int(line)):
        c.execute("INSERT INTO t(v) VALUES(?)", ("x" * 500,))
    print(c.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
"#;

/// Reads on one connection, which stays open.
pub const STEPS_OF_READER: &str = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/" + sys.argv[2], isolation_level=None, timeout=30)
for line in sys.stdin:
    print(c.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
"#;
