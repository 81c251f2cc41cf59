//! Halt locks: a program on a replica writes a database of the primary, and nobody else does meanwhile.

use litefs_tests::halt_locks::{ROWS, assert_one_history, create, insert, pair};
use litefs_tests::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::{Command, Output};
use std::time::Duration;

/// `litefs run` on a host.
fn run_command(host: &Host, args: &[&str]) -> Command {
    let mut command = Command::new(litefs());
    command.arg("--socket").arg(host.socket()).arg("run").args(args).env_remove("LD_PRELOAD");
    command
}

fn output(host: &Host, args: &[&str]) -> Output {
    run_command(host, args).output().expect("litefs runs")
}

/// Runs SQL on a host under a halt lock on its database.
fn halt_sql(host: &Host, database: &str, sql: &str) -> Result<String, String> {
    let path = host.path(database);
    let path = path.to_str().expect("a path");
    let args =
        ["--with-halt-lock-on", database, "--", "sqlite3", "-bail", "-cmd", ".timeout 20000", path, sql];
    let output = output(host, &args);
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(said(&output.stdout)) } else { Err(said(&output.stderr)) }
}

/// A program that has a halt lock, and runs what it is told. Each line is run by a connection of its own; see [`tell`].
fn holder(host: &Host) -> Client {
    let script =
        r#"echo ready; while read -r sql; do sqlite3 -cmd ".timeout 5000" "$0" "$sql" 2>&1; echo done; done"#;
    run_under_lock(host, script)
}

/// One connection for all that it is told.
fn holding_connection(host: &Host) -> Client {
    run_under_lock(host, r#"echo ready; exec sqlite3 -batch "$0" 2>&1"#)
}

fn run_under_lock(host: &Host, script: &str) -> Client {
    let path = host.path("app.db");
    let mut command = run_command(host, &["--with-halt-lock-on", path.to_str().expect("a path"), "--"]);
    let mut client = Client::start(command.args(["sh", "-c", script]).arg(&path));
    assert_eq!(client.line(), "ready");
    client
}

/// What a statement of a [`holder`] said.
fn tell(holder: &mut Client, sql: &str) -> String {
    holder.tell_until(sql, "done").join(" ")
}

#[test]
fn a_program_on_a_replica_commits_on_the_primary() {
    for mode in ["WAL", "DELETE", "TRUNCATE", "MEMORY"] {
        let fleet = Fleet::new();
        let (primary, replica) = pair(&fleet, mode);
        assert!(insert(&replica, "no").is_err(), "a replica takes no writes");
        let sql = "INSERT INTO t VALUES ('lent'); INSERT INTO t VALUES ('again'); SELECT count(*) FROM t";
        assert_eq!(halt_sql(&replica, "app.db", sql).expect("it may write"), "3", "{mode}");
        // Acknowledged there is durable on the primary: no waiting.
        assert_eq!(primary.sql("app.db", ROWS), "first,lent,again", "{mode}");
        assert_eq!(replica.sql("app.db", ROWS), "first,lent,again", "{mode}");
        assert!(insert(&replica, "no").is_err(), "{mode}: the lock ended with the program");
        insert(&primary, "own").expect("the primary writes again");
        primary.wait_position_equal(&replica, "app.db");
        assert_eq!(
            halt_sql(&replica, "app.db", "INSERT INTO t VALUES ('third'); VACUUM").expect("again"),
            ""
        );
        insert(&primary, "last").expect("the primary writes again");
        assert_eq!(primary.sql("app.db", ROWS), "first,lent,again,own,third,last", "{mode}");
        assert_one_history(&[&primary, &replica]);
        primary.assert_no_errors();
        replica.assert_no_errors();
    }
}

#[test]
fn writers_on_the_primary_wait_while_somebody_else_has_the_lock() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let other = fleet.replica("c", &primary);
    create(&primary, &[&replica, &other], "WAL");
    let waiting = primary.open("app.db");
    let mut holder = holder(&replica);
    assert_eq!(primary.database("app.db").expect("it is there")["halt_lock"], "b");
    waiting.busy_timeout(Duration::ZERO).expect("it can be set");
    let error = waiting.execute("INSERT INTO t VALUES ('early')", []).expect_err("the database is lent");
    assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::DatabaseBusy), "{error}");
    // Others are not written by it, and nobody else gets this one.
    primary.sql("other.db", "CREATE TABLE t(x)");
    let refused = output(&other, &["--timeout", "200ms", "--with-halt-lock-on", "app.db", "--", "true"]);
    assert_eq!(refused.status.code(), Some(75));
    assert_eq!(tell(&mut holder, "INSERT INTO t VALUES ('lent')"), "");
    assert_eq!(ask(&waiting, ROWS), "first,lent", "readers on the primary go on");
    other.wait_sql("app.db", ROWS, "first,lent");
    waiting.busy_timeout(Duration::from_secs(20)).expect("it can be set");
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || waiting.execute("INSERT INTO t VALUES ('late')", []));
        holder.finish();
        writer.join().expect("no panic").expect("the writer goes on");
    });
    assert_eq!(halt_sql(&other, "app.db", "INSERT INTO t VALUES ('c')").expect("the other one gets it"), "");
    assert_eq!(primary.sql("app.db", ROWS), "first,lent,late,c");
    assert_one_history(&[&primary, &replica, &other]);
}

#[test]
fn hosts_that_take_turns_lose_nothing() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let other = fleet.replica("c", &primary);
    primary.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (0)");
    for host in [&replica, &other] {
        primary.wait_position_equal(host, "app.db");
    }
    let add = "UPDATE t SET x = x + 1";
    std::thread::scope(|scope| {
        for host in [&replica, &other] {
            scope.spawn(move || {
                for _ in 0..8 {
                    halt_sql(host, "app.db", add).expect("it gets its turn");
                }
            });
        }
        for _ in 0..8 {
            primary.try_sql("app.db", add).expect("the primary gets its turn");
        }
    });
    assert_eq!(primary.sql("app.db", "SELECT x FROM t"), "24");
    assert_one_history(&[&primary, &replica, &other]);
}

#[test]
fn large_transactions_go_the_same_way() {
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet, "WAL");
    let fill = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 3000) \
                INSERT INTO t SELECT randomblob(2000) FROM n";
    halt_sql(&replica, "app.db", fill).expect("it may write");
    assert_eq!(primary.sql("app.db", "SELECT count(*) FROM t"), "3001");
    halt_sql(&replica, "app.db", "DELETE FROM t WHERE x <> 'first'; VACUUM").expect("it may write");
    insert(&primary, "own").expect("the primary writes again");
    assert_one_history(&[&primary, &replica]);
}

#[test]
fn a_holder_that_is_killed_lets_go() {
    for mode in ["WAL", "DELETE"] {
        let fleet = Fleet::new();
        let (primary, replica) = pair(&fleet, mode);
        let mut holder = holding_connection(&replica);
        holder.send(
            "INSERT INTO t VALUES ('lent'); BEGIN IMMEDIATE; INSERT INTO t VALUES ('open'); SELECT 'begun';",
        );
        assert_eq!(holder.line(), "begun");
        // The program lives on, with a transaction under way.
        let pid = i32::try_from(holder.id()).expect("a process id");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
        // It waits longer than the transaction has to end.
        primary.sql("app.db", ".timeout 20000\nINSERT INTO t VALUES ('own')");
        holder.send("COMMIT;");
        let said = holder.line();
        assert!(said.to_lowercase().contains("error"), "{mode}: {said}");
        assert_eq!(primary.sql("app.db", ROWS), "first,lent,own", "{mode}");
        drop(holder);
        assert_one_history(&[&primary, &replica]);
    }
}

#[test]
fn a_primary_that_dies_ends_the_lock_and_keeps_what_it_acknowledged() {
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet, "WAL");
    let mut holder = holder(&replica);
    assert_eq!(tell(&mut holder, "INSERT INTO t VALUES ('acknowledged')"), "");
    primary.kill();
    let said = tell(&mut holder, "INSERT INTO t VALUES ('not')");
    assert!(said.contains("rror"), "{said}");
    primary.start();
    // It leads in another term, and knows of no lock.
    replica.wait_for("it follows again", || replica.follows(&primary));
    let said = tell(&mut holder, "INSERT INTO t VALUES ('of an earlier term')");
    assert!(said.contains("rror"), "{said}");
    insert(&primary, "own").expect("the primary writes");
    assert_eq!(primary.sql("app.db", ROWS), "first,acknowledged,own");
    assert_one_history(&[&primary, &replica]);
    holder.finish();
    halt_sql(&replica, "app.db", "INSERT INTO t VALUES ('anew')").expect("a new lock is to be had");
    assert_one_history(&[&primary, &replica]);
}

#[test]
fn a_lock_that_is_not_renewed_runs_out_on_both_sides() {
    let fleet = Fleet::new();
    let (primary, replica) = (fleet.host("a", Role::Primary), fleet.host("b", Role::Primary));
    primary.set("lease.ttl=2s").set("replication.timeout=60s").start();
    replica.set_role(Role::ReplicaOf(&primary)).set("replication.timeout=60s").start();
    create(&primary, &[&replica], "WAL");
    let mut holder = holder(&replica);
    assert_eq!(tell(&mut holder, "INSERT INTO t VALUES ('lent')"), "");
    replica.signal(Signal::SIGSTOP);
    insert(&primary, "own").expect("the primary takes the database back");
    // Whoever writes now waits for the agent, which finds that its lock has run out.
    holder.send("INSERT INTO t VALUES ('late')");
    replica.signal(Signal::SIGCONT);
    let said = holder.line();
    assert!(said.contains("rror"), "{said}");
    assert_eq!(holder.line(), "done");
    assert_eq!(primary.sql("app.db", ROWS), "first,lent,own");
    assert_one_history(&[&primary, &replica]);
    holder.finish();
}

/// Starts three candidates, of which the first leads and the second then has a halt lock and has committed once.
fn begin_and_lend(hosts: &[Host; 3]) -> Client {
    let [a, b, c] = hosts;
    a.start();
    a.wait_for("the first host is primary", || a.is_primary());
    for host in [b, c] {
        host.start();
        host.wait_for("it follows", || host.follows(a));
    }
    create(a, &[b, c], "WAL");
    let mut holder = holder(b);
    assert_eq!(tell(&mut holder, "INSERT INTO t VALUES ('lent')"), "");
    holder
}

#[test]
fn a_lock_of_an_earlier_term_is_worth_nothing() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let address = consul.address();
    let hosts = ["a", "b", "c"].map(|name| fleet.host(name, Role::Candidate(&address)));
    let [a, b, c] = &hosts;
    b.set("lease.candidate=false");
    // Nobody is taken for dead because a connection is silent.
    for host in &hosts {
        host.set("lease.ttl=2s").set("replication.timeout=60s");
    }
    let mut holder = begin_and_lend(&hosts);
    for host in [b, c] {
        a.wait_position_equal(host, "app.db");
    }
    let said =
        String::from_utf8_lossy(&a.litefs(&["handoff"]).output().expect("litefs runs").stderr).into_owned();
    assert!(said.contains("halt lock on app.db"), "{said}");
    a.signal(Signal::SIGSTOP);
    c.wait_for("another host leads", || c.is_primary());
    b.wait_for("the host with the lock follows it", || b.follows(c));
    let said = tell(&mut holder, "INSERT INTO t VALUES ('of an earlier term')");
    assert!(said.contains("rror"), "{said}");
    insert(c, "own").expect("the new primary writes");
    a.signal(Signal::SIGCONT);
    a.wait_for("the old primary follows", || a.follows(c));
    assert_eq!(c.sql("app.db", ROWS), "first,lent,own");
    assert_one_history(&[c, a, b]);
    holder.finish();
}

/// Three hosts whose commits need one more of them; `b` and `c` follow `a`.
fn synchronous(fleet: &Fleet, settings: &[&str]) -> [Host; 3] {
    let hosts = ["a", "b", "c"].map(|name| fleet.host(name, Role::Primary));
    for host in &hosts {
        // Nobody is taken for dead because a connection is silent.
        host.set("replication.timeout=60s").set("sync.acks=1").set("sync.members=a,b,c");
        for setting in settings {
            host.set(setting);
        }
        if host.name() != "a" {
            host.set_role(Role::ReplicaOf(&hosts[0]));
        }
        host.start();
    }
    hosts
}

fn waiting(host: &Host) -> u64 {
    host.status()["sync"][0]["waiting"].as_u64().unwrap_or_default()
}

#[test]
fn a_commit_under_a_halt_lock_waits_for_a_third_host_and_is_not_seen_before() {
    for mode in ["WAL", "DELETE"] {
        let fleet = Fleet::new();
        let [a, b, c] = synchronous(&fleet, &["lease.ttl=2s"]);
        create(&a, &[&b, &c], mode);
        let mut holder = holder(&b);
        assert_eq!(tell(&mut holder, "INSERT INTO t VALUES ('lent')"), "");
        // Not because the one who writes has it.
        a.wait_position_equal(&c, "app.db");
        c.signal(Signal::SIGSTOP);
        let visible = a.txid("app.db");
        holder.send("INSERT INTO t VALUES ('waits')");
        a.wait_for("the commit waits", || waiting(&a) == 1);
        assert_eq!(a.txid("app.db"), visible, "{mode}: the position is that of what is visible");
        assert_eq!(a.sql("app.db", ROWS), "first,lent", "{mode}");
        // The lock outlasts its TTL: it is renewed while the commit waits.
        let sentinel = std::time::Instant::now() + Duration::from_secs(4);
        a.wait_for("two terms pass", || {
            assert_eq!(waiting(&a), 1, "{mode}");
            std::time::Instant::now() > sentinel
        });
        // Nobody who looks waits for it, and neither do other databases, but where the kernel has locked the directory to
        // remove a journal.
        let status = b.database("app.db").expect("it is there");
        assert_eq!(status["halt_lock"], "b", "{mode}");
        assert_eq!(b.txid("app.db"), visible, "{mode}");
        if mode == "WAL" {
            a.sql("other.db", "CREATE TABLE t(x)");
            a.wait_position_equal(&b, "other.db");
        }
        assert_eq!(waiting(&a), 1, "{mode}: all this while it waits");
        c.signal(Signal::SIGCONT);
        assert_eq!(holder.line(), "done", "{mode}");
        assert_eq!(tell(&mut holder, "INSERT INTO t VALUES ('goes on')"), "", "{mode}");
        assert_eq!(a.sql("app.db", ROWS), "first,lent,waits,goes on", "{mode}");
        for host in [&b, &c] {
            a.wait_position_equal(host, "app.db");
        }
        assert_one_history(&[&a, &b, &c]);
        holder.finish();
        insert(&a, "own").expect("the primary has its database again");
    }
}

/// The program that `litefs run` runs.
fn program_of(holder: &Client) -> Pid {
    let run = holder.id();
    let children = std::fs::read_to_string(format!("/proc/{run}/task/{run}/children")).expect("it runs");
    Pid::from_raw(children.trim().parse().expect("it has one"))
}

#[test]
fn a_program_that_dies_while_its_commit_waits_leaves_its_host_like_the_others() {
    for mode in ["WAL", "DELETE", "TRUNCATE"] {
        let fleet = Fleet::new();
        let [a, b, c] = synchronous(&fleet, &[]);
        create(&a, &[&b, &c], mode);
        let mut holder = holding_connection(&b);
        holder.send("INSERT INTO t VALUES ('lent'); SELECT 'done';");
        assert_eq!(holder.line(), "done", "{mode}");
        a.wait_position_equal(&c, "app.db");
        c.signal(Signal::SIGSTOP);
        holder.send("INSERT INTO t VALUES ('open');");
        a.wait_for("the commit waits", || waiting(&a) == 1);
        kill(program_of(&holder), Signal::SIGKILL).expect("it runs");
        c.signal(Signal::SIGCONT);
        let _ = holder.wait();
        a.wait_for("the primary writes again", || insert(&a, "own").is_ok());
        let rows = a.sql("app.db", ROWS);
        assert!(["first,lent,own", "first,lent,open,own"].contains(&&*rows), "{mode}: {rows}");
        for host in [&b, &c] {
            host.wait_sql("app.db", ROWS, &rows);
        }
        assert_one_history(&[&a, &b, &c]);
    }
}

#[test]
fn where_too_few_members_are_connected_besides_the_borrower_a_lock_is_waited_for() {
    let fleet = Fleet::new();
    let [a, b, c] = synchronous(&fleet, &[]);
    create(&a, &[&b], "WAL");
    c.stop();
    std::thread::scope(|scope| {
        let holder = scope.spawn(|| halt_sql(&b, "app.db", "INSERT INTO t VALUES ('lent')"));
        // Its own commits need the borrower only.
        insert(&a, "own").expect("the borrower acknowledges it");
        assert!(!holder.is_finished());
        c.start();
        holder.join().expect("no panic").expect("the third host is there again");
    });
    assert_eq!(c.sql("app.db", ROWS), "first,own,lent", "acknowledged means that it is there");
    assert_one_history(&[&a, &b, &c]);
}

#[test]
fn a_primary_that_dies_while_a_commit_under_a_halt_lock_waits_answers_nothing() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let address = consul.address();
    let hosts = ["a", "b", "c"].map(|name| fleet.host(name, Role::Candidate(&address)));
    let [a, b, c] = &hosts;
    for host in &hosts {
        host.set("lease.ttl=2s").set("replication.timeout=60s");
        host.set("sync.acks=1").set("sync.members=a,b,c");
    }
    b.set("lease.candidate=false");
    let mut holder = begin_and_lend(&hosts);
    a.wait_position_equal(c, "app.db");
    c.signal(Signal::SIGSTOP);
    holder.send("INSERT INTO t VALUES ('open')");
    a.wait_for("the commit waits", || waiting(a) == 1);
    a.kill();
    let said = holder.line();
    assert!(said.contains("rror"), "{said}");
    assert_eq!(holder.line(), "done");
    c.signal(Signal::SIGCONT);
    c.wait_for("another host leads", || c.is_primary());
    b.wait_for("the host that had the lock follows it", || b.follows(c));
    insert(c, "own").expect("the new primary writes");
    // What was acknowledged is there, and what was not may be.
    let rows = c.sql("app.db", ROWS);
    assert!(["first,lent,own", "first,lent,open,own"].contains(&&*rows), "{rows}");
    a.start();
    a.wait_for("the old primary follows", || a.follows(c));
    for host in [a, b] {
        c.wait_position_equal(host, "app.db");
        assert_equal(c, host, "app.db");
    }
    holder.finish();
}

#[test]
fn where_a_halt_lock_would_break_a_promise_there_is_none() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("sync.acks=1").set("sync.members=a,b");
    primary.start();
    let replica = fleet.replica("b", &primary);
    create(&primary, &[&replica], "WAL");
    let error =
        halt_sql(&replica, "app.db", "INSERT INTO t VALUES ('no')").expect_err("commits wait for replicas");
    assert!(error.contains("[sync]"), "{error}");
    let error = halt_sql(&replica, "none.db", "SELECT 1").expect_err("there is no such database");
    assert!(error.contains("none.db"), "{error}");
    // On the primary there is nothing to lock.
    assert_eq!(halt_sql(&primary, "app.db", "INSERT INTO t VALUES ('own')").expect("it may write"), "");
}

#[test]
fn a_program_is_run_once_its_host_leads() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let address = consul.address();
    let (a, b) = (fleet.host("a", Role::Candidate(&address)), fleet.host("b", Role::Candidate(&address)));
    a.start();
    a.wait_for("the first host is primary", || a.is_primary());
    b.start();
    b.wait_for("the other one follows", || b.follows(&a));
    create(&a, &[&b], "WAL");
    let path = b.path("app.db");
    // Like all applications it waits for others: an agent that begins to lead lets go of databases.
    let program = [
        "sqlite3",
        "-cmd",
        ".timeout 20000",
        path.to_str().expect("a path"),
        "INSERT INTO t VALUES ('leads')",
    ];
    let late = output(&b, &[&["--on-primary", "--timeout", "200ms", "--"], &program[..]].concat());
    assert_eq!(late.status.code(), Some(75));
    for _ in 0..3 {
        let promoted = output(&b, &[&["--promote", "--"], &program[..]].concat());
        assert!(promoted.status.success(), "{}", String::from_utf8_lossy(&promoted.stderr));
        run(&mut a.litefs(&["promote"]));
        b.wait_for("it follows again", || b.follows(&a));
    }
    let waiting =
        run_command(&b, &[&["--on-primary", "--"], &program[..]].concat()).spawn().expect("litefs runs");
    run(&mut b.litefs(&["promote"]));
    assert!(waiting.wait_with_output().expect("it ends").status.success());
    assert_eq!(b.sql("app.db", "SELECT count(*) FROM t WHERE x = 'leads'"), "4");
    let code = output(&b, &["--on-primary", "--", "sh", "-c", "exit 7"]).status.code();
    assert_eq!(code, Some(7));
}
