//! Unmodified programs that write on replicas behind the preload door (`preload.forward-writes`): what they are told is
//! written is on the primary first, and everywhere once.

use litefs_tests::library::*;
use litefs_tests::*;
use std::collections::HashMap;

/// Inserts rows, and counts with what it reads in the same transaction. Says which it was told are there.
const WRITER: &str = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/app.db", isolation_level=None, timeout=30)
for i in range(int(sys.argv[3])):
    row = sys.argv[2] + str(i)
    try:
        if i % 4 == 3:
            c.execute("BEGIN IMMEDIATE")
            x = c.execute("SELECT x FROM counter").fetchone()[0]
            c.execute("UPDATE counter SET x = ?", (x + 1,))
            c.execute("INSERT INTO t VALUES(?)", (row,))
            c.execute("COMMIT")
        else:
            c.execute("INSERT INTO t VALUES(?)", (row,))
        print("+" + row, flush=True)
    except sqlite3.Error as e:
        print("-" + row, e, flush=True)
        if c.in_transaction:
            c.execute("ROLLBACK")
print("end", flush=True)
"#;

/// A primary `a` and two replicas, whose writers need not ask for anything.
fn site(fleet: &Fleet, mode: &str) -> [Host; 3] {
    site_with(fleet, mode, &[])
}

fn site_with(fleet: &Fleet, mode: &str, settings: &[&str]) -> [Host; 3] {
    let hosts = ["a", "b", "c"].map(|name| fleet.host(name, Role::Primary));
    for host in &hosts {
        host.set("door=preload").set("preload.forward-writes=true");
        for setting in settings {
            host.set(setting);
        }
        if host.name() != "a" {
            host.set_role(Role::ReplicaOf(&hosts[0]));
        }
        host.start();
    }
    let tables = "CREATE TABLE t(v); CREATE TABLE counter(x); INSERT INTO counter VALUES(0)";
    sql(&hosts[0], "app.db", &format!("PRAGMA journal_mode={mode}; {tables}"));
    for host in &hosts[1..] {
        host.wait_position_equal(&hosts[0], "app.db");
    }
    hosts
}

fn writer(host: &Host, rows: usize) -> Client {
    Client::start(&mut python(host, WRITER, &[host.name(), &rows.to_string()]))
}

/// Rows that it was told are there, and of which it was told that they are not.
fn told(client: &mut Client) -> (Vec<String>, Vec<String>) {
    let (mut there, mut failed) = (Vec::new(), Vec::new());
    loop {
        let line = client.line();
        match line.strip_prefix('+') {
            Some(row) => there.push(row.to_owned()),
            None if line == "end" => return (there, failed),
            None => failed.push(line),
        }
    }
}

fn wait_until_not_lent(primary: &Host) {
    primary.wait_for("the primary has its database again", || {
        primary.database("app.db").expect("it is there")["halt_lock"].is_null()
    });
}

/// All hosts have the same, each acknowledged row once and no row twice.
fn assert_rows(hosts: &[Host; 3], acknowledged: &[String], of: usize) {
    for host in hosts {
        host.wait_position_equal(&hosts[0], "app.db");
        assert_equal(&hosts[0], host, "app.db");
        let mut there: HashMap<String, usize> = HashMap::new();
        let listed = sql(host, "app.db", "SELECT v FROM t");
        listed.lines().for_each(|row| *there.entry(row.to_owned()).or_default() += 1);
        let name = host.name();
        let twice: Vec<_> = there.iter().filter(|(_, times)| **times > 1).collect();
        assert!(twice.is_empty(), "{name} has rows twice: {twice:?}");
        let lost: Vec<_> = acknowledged.iter().filter(|row| !there.contains_key(*row)).collect();
        assert!(lost.is_empty(), "{name} has lost {lost:?}");
        assert!(there.len() <= of, "{name} has rows that nobody wrote");
        assert_eq!(sql(host, "app.db", "PRAGMA integrity_check").trim(), "ok", "{name}");
    }
}

#[test]
fn writers_on_all_hosts_at_once_all_get_their_turn() {
    for mode in ["WAL", "DELETE", "TRUNCATE"] {
        let fleet = Fleet::new();
        let hosts = site(&fleet, mode);
        let mut clients = hosts.each_ref().map(|host| writer(host, 40));
        let mut acknowledged = Vec::new();
        for client in &mut clients {
            let (there, failed) = told(client);
            assert_eq!(failed, Vec::<String>::new(), "{mode}");
            assert_eq!(there.len(), 40, "{mode}");
            acknowledged.extend(there);
        }
        assert_rows(&hosts, &acknowledged, 120);
        assert_eq!(sql(&hosts[0], "app.db", "SELECT count(*), x FROM t, counter").trim(), "120|30", "{mode}");
        // No lock is kept when nobody writes.
        wait_until_not_lent(&hosts[0]);
        hosts.iter().for_each(Host::assert_no_errors);
    }
}

#[test]
fn with_synchronous_replication_each_commit_waits_for_a_third_host() {
    for mode in ["WAL", "DELETE"] {
        let fleet = Fleet::new();
        let hosts = site_with(&fleet, mode, &["sync.acks=1", "sync.members=a,b,c"]);
        let mut clients = hosts.each_ref().map(|host| writer(host, 24));
        let mut acknowledged = Vec::new();
        for client in &mut clients {
            let (there, failed) = told(client);
            assert_eq!(failed, Vec::<String>::new(), "{mode}");
            acknowledged.extend(there);
        }
        assert_rows(&hosts, &acknowledged, 72);

        // A lock that b still had would not be refused below.
        wait_until_not_lent(&hosts[0]);
        // Without the third host nobody would acknowledge what b commits: it waits, and goes on when that is back.
        let [a, b, c] = &hosts;
        let before = rows(a, "app.db");
        c.stop();
        a.wait_for("it is gone", || {
            let connected = a.status()["sync"][0]["connected"].clone();
            connected.as_array().is_some_and(|names| names.iter().all(|name| name != "c"))
        });
        let mut impatient = with_library(b, "sqlite3");
        impatient.args(["-cmd", ".timeout 500"]).arg(b.path("app.db")).arg("INSERT INTO t VALUES('no')");
        let locked = try_run(&mut impatient).expect_err("nobody would acknowledge it");
        assert!(locked.contains("locked"), "{mode}: {locked}");
        let mut client = writer(b, 4);
        assert_eq!(rows(a, "app.db"), before, "{mode}");
        c.start();
        let (there, failed) = told(&mut client);
        assert_eq!(failed, Vec::<String>::new(), "{mode}");
        assert_eq!(there.len(), 4, "{mode}");
        b.wait_position_equal(a, "app.db");
        c.wait_position_equal(a, "app.db");
        assert_eq!(rows(c, "app.db"), before + 4, "{mode}");
        assert_equal(a, c, "app.db");
    }
}

#[test]
fn a_transaction_that_has_read_is_told_to_begin_anew() {
    let fleet = Fleet::new();
    let hosts = site(&fleet, "WAL");
    let script = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/app.db", isolation_level=None, timeout=30)
for line in sys.stdin:
    c.execute("BEGIN")
    c.execute("SELECT count(*) FROM t").fetchone()
    try:
        c.execute("INSERT INTO t VALUES('early')")
        c.execute("COMMIT")
        print("written", flush=True)
    except sqlite3.OperationalError as e:
        c.execute("ROLLBACK")
        print(e, flush=True)
    c.execute("INSERT INTO t VALUES('anew')")
    print(c.execute("SELECT group_concat(v) FROM t").fetchone()[0], flush=True)
"#;
    let mut client = Client::start(&mut python(&hosts[1], script, &[]));
    assert_eq!(client.ask(2), ["database is locked", "anew"]);
    assert_rows(&hosts, &["anew".to_owned()], 1);
}

#[test]
fn without_it_a_writer_on_a_replica_is_refused() {
    let fleet = Fleet::new();
    let (primary, replica) = hosts(&fleet, ("preload", "preload"));
    sql(&primary, "app.db", "CREATE TABLE t(v)");
    replica.wait_position_equal(&primary, "app.db");
    let refused = try_sql(&replica, "app.db", "INSERT INTO t VALUES('no')").expect_err("it is a replica");
    assert!(refused.contains("readonly"), "{refused}");
}

#[test]
fn nothing_acknowledged_is_lost_when_agents_are_killed() {
    for mode in ["WAL", "DELETE"] {
        let fleet = Fleet::new();
        let hosts = site(&fleet, mode);
        let [a, b, _] = &hosts;
        let mut clients = hosts.each_ref().map(|host| writer(host, 60));
        let has_rows = |count: u64| {
            a.wait_for("rows are there", || rows(a, "app.db") >= count);
        };
        has_rows(15);
        b.wait_for("it has the lock", || b.database("app.db").is_some_and(|db| db["halt_lock"] == "b"));
        b.kill();
        b.start();
        has_rows(60);
        a.kill();
        a.start();
        let mut acknowledged = Vec::new();
        for client in &mut clients {
            let (there, failed) = told(client);
            eprintln!("{mode}: {} rows, and not {failed:?}", there.len());
            acknowledged.extend(there);
        }
        assert_rows(&hosts, &acknowledged, 180);
    }
}

#[test]
fn what_the_primary_commits_without_an_agent_after_a_commit_of_another_host_is_kept() {
    let fleet = Fleet::new();
    let hosts = site(&fleet, "WAL");
    let [a, b, c] = &hosts;
    let mut shell = with_library(a, "sqlite3");
    let mut shell = Client::start(shell.arg("-batch").arg(a.path("app.db")));
    let mut tell = |statement: &str| shell.tell_until(&format!("{statement}; SELECT 'done';"), "done");
    assert_eq!(tell("INSERT INTO t VALUES('first')"), Vec::<String>::new());
    b.wait_position_equal(a, "app.db");
    sql(b, "app.db", "INSERT INTO t VALUES('forwarded')");
    wait_until_not_lent(a);
    a.kill();
    assert_eq!(tell("INSERT INTO t VALUES('alone')"), Vec::<String>::new());
    drop(shell);
    // Other hosts want it as soon as there is an agent.
    let mut waiting = [b, c].map(|host| {
        let statement = format!(".timeout 20000\nINSERT INTO t VALUES('{}'); SELECT 'done';", host.name());
        let mut shell = Client::start(with_library(host, "sqlite3").arg("-batch").arg(host.path("app.db")));
        shell.send(&statement);
        shell
    });
    a.start();
    waiting.iter_mut().for_each(|shell| assert_eq!(shell.line(), "done"));
    assert_rows(&hosts, &["first", "forwarded", "alone", "b", "c"].map(str::to_owned), 5);
    hosts.iter().for_each(Host::assert_no_errors);
}
