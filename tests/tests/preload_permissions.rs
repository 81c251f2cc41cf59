//! The preload door on a replica: permissions keep programs without the library from writing, and from nothing else.

use litefs_tests::library::*;
use litefs_tests::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

const OWNER: u32 = 65534;
const STRANGER: u32 = 65533;

/// The same program and environment, run by this user, who may not get to programs and the library where tests are built.
fn run_by(uid: u32, command: &Command) -> Command {
    let mut by = Command::new("setpriv");
    by.args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"]);
    by.arg(Path::new("/usr/bin").join(command.get_program())).args(command.get_args());
    for (name, value) in command.get_envs() {
        by.env(name, value.unwrap_or_default());
    }
    by
}

/// For ordinary users, too.
fn with_shared_library(host: &Host, mut command: Command) -> Command {
    let library = host.data().with_file_name("liblitefs.so");
    if !library.exists() {
        fs::copy(liblitefs(), &library).expect("it is built");
    }
    command.env("LD_PRELOAD", library);
    command
}

fn shell(host: &Host, database: &str, sql: &str) -> Command {
    asked(Command::new("sqlite3"), host, database, sql)
}

fn shell_with_library(host: &Host, database: &str, sql: &str) -> Command {
    with_shared_library(host, asked(with_library(host, "sqlite3"), host, database, sql))
}

fn asked(mut sqlite3: Command, host: &Host, database: &str, sql: &str) -> Command {
    sqlite3.args(["-bail", "-cmd", ".timeout 2000"]).arg(host.path(database)).arg(sql);
    sqlite3
}

fn program(host: &Host, script: &str, arguments: &[&str]) -> Command {
    with_shared_library(host, python(host, script, arguments))
}

fn mode_of(host: &Host, database: &str) -> u32 {
    fs::metadata(host.stored(database)).expect("it is there").mode() & 0o7777
}

/// A primary with databases in both kinds of modes that belong to `OWNER`, and a replica that keeps others from writing.
fn protected(fleet: &Fleet) -> (Host, Host) {
    let (primary, replica) = hosts(fleet, ("preload", "preload"));
    // Ordinary users get through to the databases.
    for host in [&primary, &replica] {
        let files = fs::canonicalize(host.mount()).expect("the door is open");
        for directory in files.ancestors().filter(|d| d.starts_with(fleet.scratch())) {
            let mode = fs::metadata(directory).expect("it is there").mode() | 0o755;
            fs::set_permissions(directory, Permissions::from_mode(mode)).expect("this is root");
        }
        chown(&files, Some(OWNER), Some(OWNER)).expect("this is root");
    }
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        let create = format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES(1)");
        run(&mut run_by(OWNER, &shell_with_library(&primary, &name, &create)));
        assert_follows(&primary, &replica, &name, 1);
        replica.wait_for("it is protected", || mode_of(&replica, &name) == 0o444);
        assert_eq!(mode_of(&primary, &name), 0o644);
        assert_eq!(fs::metadata(replica.stored(&name)).expect("it is there").uid(), OWNER);
    }
    (primary, replica)
}

#[test]
fn who_has_no_library_reads_and_is_told_that_the_database_is_readonly() {
    let fleet = Fleet::new();
    let (primary, replica) = protected(&fleet);
    for name in ["WAL.db", "DELETE.db"] {
        let refused = try_run(&mut run_by(OWNER, &shell(&replica, name, "INSERT INTO t VALUES('own')")));
        let refused = refused.expect_err("nobody writes to a replica");
        assert!(refused.contains("attempt to write a readonly database"), "{refused}");
        run(&mut run_by(OWNER, &shell_with_library(&primary, name, "INSERT INTO t VALUES(2)")));
        assert_follows(&primary, &replica, name, 2);
        for uid in [OWNER, STRANGER] {
            let mut read = run_by(uid, &shell(&replica, name, "SELECT count(*) FROM t"));
            replica.wait_for("it is read", || try_run(&mut read).is_ok_and(|rows| rows.trim() == "2"));
        }
    }
    let diverged = run(&mut replica.litefs(&["diverged", "list"]));
    assert!(!diverged.contains(".db"), "{diverged}");
    primary.assert_no_errors();
    replica.assert_no_errors();
}

const WRITE_WHEN_TOLD: &str = r#"
import sqlite3, sys
connections = [sqlite3.connect(sys.argv[1] + name, isolation_level=None, timeout=0.2)
               for name in ("/WAL.db", "/DELETE.db")]
for line in sys.stdin:
    for c in connections:
        try:
            c.execute("INSERT INTO t VALUES('own')")
            print("written", flush=True)
        except sqlite3.OperationalError as e:
            print(e, flush=True)
        print(c.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
"#;

#[test]
fn who_has_the_library_and_the_right_to_write_does_so_after_a_promotion() {
    let fleet = Fleet::new();
    let (primary, replica) = protected(&fleet);
    let mut owner = Client::start(&mut run_by(OWNER, &program(&replica, WRITE_WHEN_TOLD, &[])));
    let mut stranger = Client::start(&mut run_by(STRANGER, &program(&replica, WRITE_WHEN_TOLD, &[])));
    let readonly = "attempt to write a readonly database";
    assert_eq!(owner.ask(4), ["database is locked", "1", readonly, "1"]);
    assert_eq!(stranger.ask(4), [readonly, "1", readonly, "1"]);

    primary.stop();
    replica.set_role(Role::Primary).reload();
    replica.wait_for("the replica is primary", || replica.status()["role"]["name"] == "primary");
    assert_eq!(owner.ask(4), ["written", "2", "written", "2"]);
    // Whoever had no right to write has none now.
    assert_eq!(stranger.ask(4), [readonly, "2", readonly, "2"]);
    for name in ["WAL.db", "DELETE.db"] {
        assert_eq!(mode_of(&replica, name), 0o644, "its permissions have not come back");
        run(&mut run_by(OWNER, &shell(&replica, name, "INSERT INTO t VALUES('without the library')")));
    }
    replica.assert_no_errors();
}

#[test]
fn permissions_come_back_with_another_agent_and_another_door() {
    let fleet = Fleet::new();
    let (primary, replica) = protected(&fleet);
    // Of an agent that had no time to do anything about it.
    replica.kill();
    assert_eq!(mode_of(&replica, "WAL.db"), 0o444);
    replica.set("door=fuse").start();
    replica.wait_connected();
    for name in ["WAL.db", "DELETE.db"] {
        assert_eq!(mode_of(&replica, name), 0o644);
        assert_eq!(fs::metadata(replica.path(name)).expect("it is mounted").mode() & 0o777, 0o644);
    }
    replica.stop();
    replica.set("door=preload").start();
    replica.wait_for("it is protected again", || mode_of(&replica, "WAL.db") == 0o444);
    replica.kill();
    primary.stop();
    replica.set_role(Role::Primary).start();
    for name in ["WAL.db", "DELETE.db"] {
        run(&mut run_by(OWNER, &shell_with_library(&replica, name, "INSERT INTO t VALUES(2)")));
        assert_eq!(mode_of(&replica, name), 0o644);
    }
}

#[test]
fn a_link_does_not_lead_to_files_of_others() {
    let fleet = Fleet::new();
    let (_primary, replica) = protected(&fleet);
    let foreign = fleet.scratch().join("foreign");
    fs::create_dir(&foreign).unwrap();
    let target = foreign.join("x.db");
    fs::write(&target, "").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(&foreign, Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink(&foreign, replica.stored("sub")).unwrap();
    std::os::unix::fs::symlink(&target, replica.stored("x.db")).unwrap();
    let try_open = "import os, sys\ntry: os.open(sys.argv[1] + sys.argv[2], os.O_RDWR); print('opened')\nexcept OSError as e: print(e.strerror)";
    for name in ["/sub/x.db", "/x.db", "/x.db-wal"] {
        let opened = try_run(&mut run_by(OWNER, &program(&replica, try_open, &[name]))).unwrap();
        assert_ne!(opened.trim(), "opened", "{name}");
    }
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o666);
}
