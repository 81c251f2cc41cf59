//! Hosts whose roles are changed: what was acknowledged stays, and one history wins where there were two.

use litefs_tests::{
    COUNT, CREATE_DELETE, CREATE_WAL, FILL, Fleet, Host, Role, Shell, ask, assert_equal, exec,
    insert_until_it_fails, integrity_check, is_preload, run, sqlite3, wait_seen,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[test]
fn two_hosts_swap_roles_and_back_without_a_restart() {
    let fleet = Fleet::new();
    let (a, b) = fleet.pair();
    for mode in ["WAL", "DELETE"] {
        a.sql(&format!("{mode}.db"), &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x);"));
        a.wait_position_equal(&b, &format!("{mode}.db"));
    }
    // A connection on each host that lives through everything.
    let mut wal = [&a, &b].map(|host| Shell::open(&host.path("WAL.db")));
    let mut delete = [&a, &b].map(|host| Shell::open(&host.path("DELETE.db")));
    let mut rows = 0;
    for (epoch, primary, replica, p) in [(1, &a, &b, 0), (2, &b, &a, 1), (3, &a, &b, 0)] {
        if epoch > 1 {
            // First the old primary gives up, then the new one begins.
            replica.set_role(Role::ReplicaOf(primary)).reload();
            replica.wait_role("replica");
            primary.set_role(Role::Primary).reload();
            primary.wait_role("primary");
            replica.wait_connected();
        }
        assert_eq!(primary.status()["role"]["epoch"], epoch);
        for (name, shells) in [("WAL.db", &mut wal), ("DELETE.db", &mut delete)] {
            primary.sql(name, "INSERT INTO t VALUES (1);");
            assert_equal(primary, replica, name);
            for shell in shells.iter_mut() {
                assert_eq!(shell.run("SELECT count(*) FROM t;"), (rows + 1).to_string(), "{name}");
            }
            // In WAL mode SQLite knows no such error for a connection that it has opened for writing: it finds a lock.
            // Without a handoff it takes the agent a moment to have that lock, and the WAL's write is refused until then.
            let shell = &mut shells[1 - p];
            replica.wait_for("a write is refused", || {
                let refused = shell.ask("INSERT INTO t VALUES (0);");
                let fine = refused.contains("readonly") || name == "WAL.db" && refused.contains("locked");
                let not_yet = name == "WAL.db" && !is_preload() && refused.contains("disk I/O error");
                assert!(fine || not_yet, "{name} on a replica: {refused:?}");
                fine
            });
        }
        rows += 1;
    }
    // The connection of the old and new primary, opened when it was one, writes again.
    for (name, shells) in [("WAL.db", &mut wal), ("DELETE.db", &mut delete)] {
        assert_eq!(shells[0].run("INSERT INTO t VALUES (2);"), "", "{name}");
    }
    drop((wal, delete));
    for name in ["WAL.db", "DELETE.db"] {
        assert_equal(&a, &b, name);
        assert_eq!(b.sql(name, "SELECT count(*) FROM t"), (rows + 1).to_string());
    }
    for host in [&a, &b] {
        let kept = fs::read_dir(host.data().join("diverged")).unwrap().count();
        assert_eq!(kept, 0, "{} had transactions of its own after an orderly change", host.name());
    }
}

#[test]
fn a_transaction_in_progress_at_a_role_change_is_refused_as_a_whole() {
    let fleet = Fleet::new();
    let (a, b) = fleet.pair();
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        a.sql(
            &name,
            &format!(
                "PRAGMA journal_mode={mode};\nCREATE TABLE t(id INTEGER PRIMARY KEY, x);\n\
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300) \
                 INSERT INTO t SELECT i, zeroblob(1000) FROM n;"
            ),
        );
        a.wait_position_equal(&b, &name);
    }
    // Both have more in the file, or in the WAL, than fits into the cache.
    let mut shells = ["WAL.db", "DELETE.db"].map(|name| Shell::open(&a.path(name)));
    for shell in &mut shells {
        shell.run("PRAGMA cache_size=5; BEGIN; UPDATE t SET x = randomblob(1000);");
    }
    a.set_role(Role::ReplicaOf(&b)).reload();
    a.wait_role("replica");
    for shell in &mut shells {
        let answer = shell.ask("COMMIT;");
        assert!(answer.contains("rror"), "committed on a replica: {answer:?}");
    }
    b.set_role(Role::Primary).reload();
    b.wait_role("primary");
    a.wait_connected();
    for name in ["WAL.db", "DELETE.db"] {
        assert_eq!(b.sql(name, "SELECT count(*) FROM t WHERE x = zeroblob(1000)"), "300", "{name}");
        b.sql(name, "UPDATE t SET x = 'of b' WHERE id = 7;");
    }
    drop(shells);
    for name in ["WAL.db", "DELETE.db"] {
        assert_equal(&b, &a, name);
        assert_eq!(a.sql(name, "SELECT count(*) FROM t WHERE x = zeroblob(1000)"), "299", "{name}");
    }
}

/// SQLite writes pages that it takes from the free list without a copy in the journal.
#[test]
fn what_a_refused_transaction_left_in_free_pages_does_not_stay() {
    let fleet = Fleet::new();
    let (a, b) = fleet.pair();
    let name = "free.db";
    a.sql(
        name,
        "CREATE TABLE t(v); CREATE TABLE u(v);
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300) \
         INSERT INTO u SELECT randomblob(1000) FROM n;
         DELETE FROM u;",
    );
    a.wait_position_equal(&b, name);
    let mut shell = Shell::open(&a.path(name));
    shell.run(
        "PRAGMA cache_size=5; BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100) \
         INSERT INTO u SELECT randomblob(1000) FROM n;",
    );
    a.set_role(Role::ReplicaOf(&b)).reload();
    a.wait_role("replica");
    let set_aside = "has left its content in pages from the free list";
    a.expect_error(set_aside);
    let answer = shell.ask("COMMIT;");
    assert!(answer.contains("rror"), "committed on a replica: {answer:?}");
    drop(shell);
    b.set_role(Role::Primary).reload();
    b.wait_role("primary");
    a.wait_connected();
    b.sql(name, "INSERT INTO t VALUES (1)");
    a.wait_for("it is compared and set aside", || a.log().contains(set_aside));
    // A snapshot heals it.
    a.wait_database(name, "ok");
    assert_equal(&b, &a, name);
    assert_eq!(a.sql(name, "SELECT count(*) FROM u"), "0");
    assert_eq!(a.sql(name, "PRAGMA integrity_check"), "ok");
}

#[test]
fn a_role_change_under_load_loses_nothing_that_was_acknowledged() {
    let fleet = Fleet::new();
    let (a, b) = fleet.pair();
    let databases = ["wal.db", "delete.db"];
    for (name, mode) in databases.iter().zip(["WAL", "DELETE"]) {
        a.sql(name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x INTEGER PRIMARY KEY);"));
    }
    let (acknowledged, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let last = std::thread::scope(|scope| {
        let writers = databases.map(|name| {
            let (path, acknowledged, done) = (a.path(name), &acknowledged, &done);
            scope.spawn(move || insert_until_it_fails(&path, "FULL", acknowledged, done))
        });
        a.wait_for("the writers are at work", || {
            writers.iter().any(|writer| writer.is_finished()) || acknowledged.load(Ordering::Relaxed) > 300
        });
        a.set_role(Role::ReplicaOf(&b)).reload();
        // Each is refused at its next transaction.
        writers.map(|writer| writer.join().expect("a writer"))
    });
    a.wait_role("replica");
    for name in databases {
        a.wait_position_equal(&b, name);
    }
    b.set_role(Role::Primary).reload();
    b.wait_role("primary");
    a.wait_connected();
    for (name, last) in databases.iter().zip(last) {
        assert!(last > 0, "nothing was written to {name}");
        b.sql(name, "INSERT INTO t VALUES (1000000);");
        assert_equal(&b, &a, name);
        let rows = b.sql(name, "SELECT count(*) - 1 FROM t");
        let rows: u64 = rows.parse().unwrap();
        // A transaction that was refused in the middle of its commit may not be there; one that was granted must be.
        assert!((last..=last + 1).contains(&rows), "{name}: {last} were acknowledged, {rows} are there");
    }
    for host in [&a, &b] {
        let kept = fs::read_dir(host.data().join("diverged")).unwrap().count();
        assert_eq!(kept, 0, "{} had transactions of its own after an orderly change", host.name());
    }
}

/// What a host keeps of the transactions that it had alone.
#[track_caller]
fn kept(host: &Host, database: &str) -> PathBuf {
    let dir = host.data().join("diverged").join(database);
    let mut kept = list(&dir);
    assert_eq!(kept.len(), 1, "{} has {kept:?}", dir.display());
    kept.remove(0)
}

fn list(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries.map(|entry| entry.expect("the directory can be read").path()).collect()
}

/// The kept records can be read with the tool for it; says how many there are.
#[track_caller]
fn verify_ltx(dir: &Path) -> usize {
    let files: Vec<_> = list(dir).into_iter().filter(|p| p.extension().is_some_and(|e| e == "ltx")).collect();
    for file in &files {
        run(Command::new(litefs_tests::litefs()).args(["ltx", "verify"]).arg(file));
    }
    files.len()
}

/// A primary with a database of each kind, its replica, and a copy of the primary's data directory.
fn pair_with_old_copy(fleet: &Fleet) -> (Host, Host, PathBuf) {
    let (primary, replica) = fleet.pair();
    for (name, create) in [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)] {
        primary.sql(name, create);
    }
    primary.stop();
    let copy = fleet.scratch().join("data");
    run(Command::new("cp").arg("-a").arg(primary.data()).arg(&copy));
    primary.start();
    (primary, replica, copy)
}

/// The primary begins again from the copy.
fn restore(primary: &Host, copy: &Path) {
    primary.stop();
    fs::remove_dir_all(primary.data()).expect("it is there");
    fs::rename(copy, primary.data()).expect("it can be moved");
    primary.start();
}

#[test]
fn a_primary_restored_from_an_old_copy_wins_and_what_the_replica_had_alone_is_kept() {
    let fleet = Fleet::new();
    let (primary, replica, copy) = pair_with_old_copy(&fleet);
    for name in ["wal.db", "delete.db"] {
        for i in 0..3 {
            primary.sql(name, &format!("INSERT INTO t(v) VALUES ('lost {i}')"));
        }
        primary.wait_position_equal(&replica, name);
    }
    let lost = replica.position("wal.db").unwrap();
    restore(&primary, &copy);
    // As many transactions, one fewer, one more: the number alone says nothing.
    primary.sql("wal.db", "INSERT INTO t(v) VALUES ('new')");
    primary.sql("delete.db", "INSERT INTO t(v) VALUES ('new')");
    primary.sql("delete.db", "INSERT INTO t(v) VALUES ('new')");
    primary.sql("delete.db", "INSERT INTO t(v) VALUES ('new')");
    for name in ["wal.db", "delete.db"] {
        assert_equal(&primary, &replica, name);
        assert_eq!(replica.sql(name, "SELECT count(*) FROM t WHERE v LIKE 'lost%'"), "0");
        let dir = kept(&replica, name);
        assert_eq!(
            sqlite3(&dir.join("database.db"), "SELECT v FROM t WHERE v LIKE 'lost%'"),
            "lost 0\nlost 1\nlost 2"
        );
        integrity_check(&dir.join("database.db"), "what is kept");
        assert_eq!(verify_ltx(&dir), 3, "{name}");
    }
    assert!(kept(&replica, "wal.db").ends_with(lost.replace('/', "-")));
    assert!(replica.log().contains("this node had transactions of its own; they are kept as files"));
    // An open connection on the replica goes on, and so does everything else.
    let reader = replica.open("wal.db");
    primary.sql("wal.db", "INSERT INTO t(v) VALUES ('newer')");
    wait_seen(&reader, COUNT, "3");
}

#[test]
fn an_open_connection_survives_that_its_database_is_replaced_by_another_history() {
    let fleet = Fleet::new();
    let (primary, replica, copy) = pair_with_old_copy(&fleet);
    let names = ["wal.db", "delete.db"];
    for name in names {
        primary.sql(name, FILL);
        primary.wait_position_equal(&replica, name);
    }
    let readers = names.map(|name| replica.open(name));
    readers.iter().for_each(|reader| assert_eq!(ask(reader, COUNT), "301"));
    restore(&primary, &copy);
    for (name, reader) in names.iter().zip(&readers) {
        primary.sql(name, "INSERT INTO t(v) VALUES ('new')");
        wait_seen(reader, COUNT, "2");
        assert_eq!(ask(reader, "PRAGMA integrity_check"), "ok");
        primary.sql(name, "INSERT INTO t(v) VALUES ('new')");
        wait_seen(reader, COUNT, "3");
    }
    drop(readers);
    for name in names {
        assert_equal(&primary, &replica, name);
    }
}

#[test]
fn a_promoted_replica_takes_writes_and_the_old_primary_follows_it() {
    let fleet = Fleet::new();
    let (old, new) = fleet.pair();
    let names = [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)];
    for (name, create) in names {
        old.sql(name, create);
        old.wait_position_equal(&new, name);
    }
    // A connection that was there before stays usable, now for writing: SQLite keeps a connection read-only that was
    // opened so, therefore a new one.
    let reader = new.open("wal.db");
    assert_eq!(ask(&reader, COUNT), "1");
    new.set_role(Role::Primary).reload();
    new.wait_for("the role is taken", || new.status()["role"]["name"] == "primary");
    assert_eq!(new.status()["role"]["epoch"], 2);
    for (name, _) in names {
        new.sql(name, "INSERT INTO t(v) VALUES ('new primary')");
        // Meanwhile the old one does not know yet: this is what must not be lost without a trace.
        old.sql(name, "INSERT INTO t(v) VALUES ('alone 1')");
        old.sql(name, "INSERT INTO t(v) VALUES ('alone 2')");
    }
    wait_seen(&reader, COUNT, "2");

    old.set_role(Role::ReplicaOf(&new)).reload();
    old.wait_connected();
    for (name, _) in names {
        assert_equal(&new, &old, name);
        assert_eq!(old.sql(name, "SELECT group_concat(v) FROM t"), "1,new primary");
        let dir = kept(&old, name);
        assert_eq!(sqlite3(&dir.join("database.db"), "SELECT group_concat(v) FROM t"), "1,alone 1,alone 2");
        assert_eq!(verify_ltx(&dir), 2, "{name}");
        let error = old.try_sql(name, "INSERT INTO t(v) VALUES (1)").unwrap_err();
        let refusal = if is_preload() && name == "wal.db" { "locked" } else { "readonly" };
        assert!(error.contains(refusal), "{error}");
        new.sql(name, "INSERT INTO t(v) VALUES (3)");
        assert_equal(&new, &old, name);
    }
    assert_eq!(old.status()["role"]["epoch"], 2);

    // And back again.
    new.set_role(Role::ReplicaOf(&old));
    old.set_role(Role::Primary).reload();
    old.wait_for("the role is taken", || old.status()["role"]["name"] == "primary");
    assert_eq!(old.status()["role"]["epoch"], 3);
    new.reload();
    new.wait_connected();
    old.sql("wal.db", "INSERT INTO t(v) VALUES (4)");
    assert_equal(&old, &new, "wal.db");
}

#[test]
fn a_writer_that_is_open_when_the_role_is_lost_is_refused_at_its_commit() {
    let fleet = Fleet::new();
    let (old, new) = fleet.pair();
    for (name, create) in [("wal.db", CREATE_WAL), ("delete.db", CREATE_DELETE)] {
        old.sql(name, create);
        old.wait_position_equal(&new, name);
    }
    let writers = ["wal.db", "delete.db"].map(|name| old.open(name));
    for writer in &writers {
        exec(writer, "BEGIN; INSERT INTO t(v) VALUES ('refused');");
    }
    new.set_role(Role::Primary).reload();
    new.wait_for("the role is taken", || new.status()["role"]["name"] == "primary");
    old.set_role(Role::ReplicaOf(&new)).reload();
    old.wait_for("the role is lost", || old.status()["role"]["name"] == "replica");
    for writer in writers {
        let error = litefs_tests::try_exec(&writer, "COMMIT").unwrap_err();
        assert!(error.sqlite_error_code().is_some(), "{error}");
    }
    old.wait_connected();
    for name in ["wal.db", "delete.db"] {
        new.sql(name, "INSERT INTO t(v) VALUES ('kept')");
        assert_equal(&new, &old, name);
        assert_eq!(old.sql(name, "SELECT group_concat(v) FROM t"), "1,kept");
    }
}

#[test]
fn an_upstream_of_an_older_epoch_is_refused() {
    let fleet = Fleet::new();
    let (old, new) = fleet.pair();
    old.sql("x.db", CREATE_WAL);
    old.wait_position_equal(&new, "x.db");
    new.set_role(Role::Primary).reload();
    new.wait_for("the role is taken", || new.status()["role"]["name"] == "primary");
    let replica = fleet.replica("c", &new);
    new.sql("x.db", "INSERT INTO t(v) VALUES ('epoch 2')");
    assert_equal(&new, &replica, "x.db");
    assert_eq!(replica.status()["role"]["epoch"], 2);

    // Whoever has seen epoch 2 does not go back to a primary of epoch 1, whatever it offers.
    for _ in 0..5 {
        old.sql("x.db", "INSERT INTO t(v) VALUES ('epoch 1')");
    }
    replica.set_role(Role::ReplicaOf(&old)).reload();
    replica.wait_for("it says why", || replica.log().contains("epoch 1"));
    let status = replica.status();
    assert_eq!(status["role"]["upstream"]["connected"], false, "{status}");
    assert_eq!(replica.sql("x.db", "SELECT group_concat(v) FROM t"), "1,epoch 2");
    assert_eq!(replica.status()["role"]["epoch"], 2);

    replica.set_role(Role::ReplicaOf(&new)).reload();
    replica.wait_connected();
    new.sql("x.db", "INSERT INTO t(v) VALUES ('more')");
    assert_equal(&new, &replica, "x.db");
}
