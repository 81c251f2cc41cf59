//! A lease at a real Consul: who becomes primary, when, and what writers see of it.

use litefs_tests::*;
use nix::sys::signal::Signal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A primary `a`, and a candidate `b` that follows it.
fn pair(fleet: &Fleet, consul: &Consul) -> (Host, Host) {
    pair_with(fleet, consul, &[])
}

/// The same, with these settings.
fn pair_with(fleet: &Fleet, consul: &Consul, settings: &[&str]) -> (Host, Host) {
    let address = consul.address();
    let host = |name| {
        let host = fleet.host(name, Role::Candidate(&address));
        for setting in settings {
            host.set(setting);
        }
        host.start();
        host
    };
    let a = host("a");
    a.wait_for("the first host is primary", || a.is_primary());
    let b = host("b");
    b.wait_for("the second host follows", || b.follows(&a));
    (a, b)
}

fn create(host: &Host, mode: &str) {
    host.sql("app.db", &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x INTEGER PRIMARY KEY);"));
}

fn insert(host: &Host) -> Result<String, String> {
    host.try_sql("app.db", "INSERT INTO t DEFAULT VALUES")
}

/// Stops a writer also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Commits until it is told to stop. A commit fails only once the host is a replica; returns how many succeeded.
fn write_until(database: &Path, stop: &AtomicBool) -> (u64, String) {
    let connection = rusqlite::Connection::open(database).expect("the database opens");
    // Longer than a handoff takes.
    connection.busy_timeout(Duration::from_secs(2)).expect("a timeout can be set");
    let mut written = 0;
    while !stop.load(Ordering::Relaxed) {
        match connection.execute("INSERT INTO t DEFAULT VALUES", []) {
            Ok(_) => written += 1,
            Err(error) => return (written, error.to_string()),
        }
    }
    (written, String::new())
}

#[test]
fn when_the_primary_dies_the_other_host_leads_and_the_old_one_follows_it() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let (a, b) = pair(&fleet, &consul);
    create(&a, "WAL");
    insert(&a).expect("the primary takes writes");
    assert!(insert(&b).is_err(), "a replica takes no writes");
    a.wait_position_equal(&b, "app.db");
    let before = a.epoch();
    a.kill();
    b.wait_for("the other host leads", || b.is_primary());
    assert!(b.epoch() > before);
    insert(&b).expect("the new primary takes writes");
    a.start();
    a.wait_for("the old primary follows", || a.follows(&b));
    assert_equal(&b, &a, "app.db");
    assert_eq!(a.sql("app.db", "SELECT count(*) FROM t"), "2");
    assert!(insert(&a).is_err(), "a replica takes no writes");
}

#[test]
fn a_primary_that_comes_back_within_the_ttl_goes_on() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    // Also on a machine that is busy, where an agent needs seconds to start; longer than the test waits for it to lead.
    let (a, b) = pair_with(&fleet, &consul, &["lease.ttl=60s"]);
    create(&a, "WAL");
    let before = a.epoch();
    a.kill();
    a.start();
    a.wait_for("it leads again", || a.is_primary());
    insert(&a).expect("the primary takes writes");
    assert!(a.epoch() > before, "each term has an epoch of its own");
    b.wait_for("the other one follows it", || b.follows(&a));
    assert_equal(&a, &b, "app.db");
}

#[test]
fn a_primary_that_is_stopped_hands_over_first() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let (a, b) = pair(&fleet, &consul);
    for mode in ["WAL", "DELETE"] {
        create(&a, mode);
        let stop = AtomicBool::new(false);
        let (path, stop) = (a.path("app.db"), &stop);
        let written = std::thread::scope(|scope| {
            let writer = scope.spawn(move || write_until(&path, stop));
            let failing = Stop(stop);
            a.wait_for("the writer is at work", || a.txid("app.db") > 20);
            let begun = Instant::now();
            a.signal(Signal::SIGTERM);
            b.wait_for("the other host leads", || b.is_primary());
            eprintln!("{mode}: the other host led after {:?}", begun.elapsed());
            std::mem::forget(failing);
            // What was acknowledged before the old one let go is there.
            let (written, why) = writer.join().expect("the writer does not panic");
            eprintln!("{mode}: {written} commits, then {why:?}");
            assert!(!why.contains("malformed"), "{why}");
            written
        });
        assert!(a.wait_ended().success());
        assert_eq!(b.sql("app.db", "SELECT count(*) FROM t"), written.to_string());
        insert(&b).expect("the new primary takes writes");
        a.start();
        a.wait_for("it follows", || a.follows(&b));
        assert_equal(&b, &a, "app.db");
        run(&mut a.litefs(&["promote"]));
        b.wait_for("it follows", || b.follows(&a));
        a.sql("app.db", "DROP TABLE t");
    }
}

#[test]
fn the_lease_goes_from_hand_to_hand_and_nothing_is_lost() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let (a, b) = pair(&fleet, &consul);
    create(&a, "WAL");
    let mut written = 0;
    let mut stalls = Vec::new();
    for round in 0..10 {
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let stop = AtomicBool::new(false);
        let (path, stop) = (from.path("app.db"), &stop);
        let begin = from.txid("app.db");
        let (count, why) = std::thread::scope(|scope| {
            let writer = scope.spawn(move || write_until(&path, stop));
            let failing = Stop(stop);
            from.wait_for("the writer is at work", || from.txid("app.db") > begin + 5);
            let begun = Instant::now();
            match round % 3 {
                0 => run(&mut from.litefs(&["handoff", "--to", to.name()])),
                1 => run(&mut from.litefs(&["demote"])),
                _ => run(&mut to.litefs(&["promote"])),
            };
            to.wait_for("the other host leads", || to.is_primary());
            stalls.push(begun.elapsed());
            std::mem::forget(failing);
            writer.join().expect("the writer does not panic")
        });
        written += count;
        // What a replica says to a connection that was opened on a primary.
        assert!(why.contains("locked"), "{why}");
        assert_eq!(to.sql("app.db", "SELECT count(*) FROM t"), written.to_string());
        insert(to).expect("the new primary takes writes");
        written += 1;
        from.wait_for("the old one follows", || from.follows(to));
        assert_equal(to, from, "app.db");
    }
    eprintln!("from the command to the new primary: {stalls:?}");
}

#[test]
fn writers_wait_while_their_host_is_a_replica_and_then_go_on() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let (a, b) = pair(&fleet, &consul);
    create(&a, "WAL");
    let mut shell = Shell::open(&a.path("app.db"));
    shell.run(".timeout 60000");
    shell.run("INSERT INTO t DEFAULT VALUES;");
    let mut impatient = Shell::open(&a.path("app.db"));
    impatient.run("INSERT INTO t DEFAULT VALUES;");
    run(&mut a.litefs(&["handoff", "--to", "b"]));
    b.wait_for("the other host leads", || b.is_primary());
    a.wait_for("the old one follows", || a.follows(&b));
    insert(&b).expect("the new primary takes writes");
    a.wait_position_equal(&b, "app.db");
    let refused = impatient.ask("INSERT INTO t DEFAULT VALUES;");
    assert!(refused.contains("locked"), "{refused}");
    // Reading goes on, and sees what is applied behind the same lock.
    assert_eq!(impatient.run("SELECT count(*) FROM t;"), "3");
    shell.send("INSERT INTO t DEFAULT VALUES RETURNING 'written';");
    insert(&b).expect("the new primary takes writes");
    run(&mut a.litefs(&["promote"]));
    a.wait_for("it leads again", || a.is_primary());
    assert_eq!(shell.ask("SELECT count(*) FROM t;"), "written\n5");
    impatient.run("INSERT INTO t DEFAULT VALUES;");
    a.wait_position_equal(&b, "app.db");
    assert_equal(&a, &b, "app.db");
}

#[test]
fn an_empty_host_and_one_that_is_no_candidate_never_become_primary_by_themselves() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let address = consul.address();
    let a = fleet.host("a", Role::Candidate(&address));
    a.start();
    a.wait_for("the first host is primary", || a.is_primary());
    create(&a, "WAL");
    // Its position has to be known where the lease is.
    a.wait_for("the lease says what the primary has", || {
        consul.get("/v1/kv/litefs/db/primary?raw").is_some_and(|record| record.contains("\"transactions\":2"))
    });
    let c = fleet.host("c", Role::Candidate(&address));
    c.set("lease.candidate=false").start();
    c.wait_for("it follows", || c.follows(&a));
    a.wait_position_equal(&c, "app.db");
    a.kill();
    let empty = fleet.host("b", Role::Candidate(&address));
    empty.start();
    empty.wait_for("the empty host waits", || empty.log().contains("has none of the last term's data"));
    assert!(!empty.is_primary() && !c.is_primary());
    let refused = try_run(&mut c.litefs(&["promote"])).unwrap_err();
    assert!(refused.contains("candidate"), "{refused}");
    let refused = try_run(&mut empty.litefs(&["promote"])).unwrap_err();
    assert!(refused.contains("--force"), "{refused}");
    // The one with the data comes back and leads.
    a.start();
    a.wait_for("it leads", || a.is_primary());
    empty.wait_for("the empty host follows it", || empty.follows(&a));
    assert_equal(&a, &empty, "app.db");
}

#[test]
fn a_dead_agents_lease_is_released_at_once() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let address = consul.address();
    let long = |name| {
        let host = fleet.host(name, Role::Candidate(&address));
        // Nobody waits for that.
        host.set("lease.ttl=600s").start();
        host
    };
    let a = long("a");
    a.wait_for("the first host is primary", || a.is_primary());
    create(&a, "WAL");
    let b = long("b");
    b.wait_for("it follows", || b.follows(&a));
    a.wait_position_equal(&b, "app.db");
    let release = || {
        let agent = a.agent_command();
        let mut release = std::process::Command::new(agent.get_program());
        release.arg("release-lease").args(agent.get_args().filter(|word| *word != "agent"));
        release
    };
    let refused = try_run(&mut release()).unwrap_err();
    assert!(refused.contains("an agent has"), "{refused}");
    assert!(a.is_primary());
    a.kill();
    assert_eq!(run(&mut release()), "the lease is free");
    b.wait_for("the other host leads", || b.is_primary());
    insert(&b).expect("the new primary takes writes");
    assert_eq!(run(&mut release()), "this host has no session");
}

#[test]
fn a_primary_whose_consul_hangs_stops_writing_in_time_and_goes_on_when_it_answers() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let (a, b) = pair(&fleet, &consul);
    create(&a, "WAL");
    a.wait_position_equal(&b, "app.db");
    consul.freeze();
    a.wait_for("the primary is fenced", || insert(&a).is_err());
    assert!(!b.is_primary() && insert(&b).is_err());
    consul.thaw();
    wait_for("one of them leads", PATIENCE, || (a.is_primary() ^ b.is_primary()).then_some(()));
    let (new, old) = if a.is_primary() { (&a, &b) } else { (&b, &a) };
    new.wait_for("it takes writes", || insert(new).is_ok());
    old.wait_for("the other follows", || old.follows(new));
    assert_equal(new, old, "app.db");
}

#[test]
fn a_primary_that_was_stopped_like_a_process_takes_no_commit_when_it_goes_on() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let (a, b) = pair(&fleet, &consul);
    create(&a, "WAL");
    a.wait_position_equal(&b, "app.db");
    // In a process of its own: who forks with a file open there would wait for the agent.
    let mut shell = Shell::open(&a.path("app.db"));
    shell.run("INSERT INTO t DEFAULT VALUES;");
    a.wait_position_equal(&b, "app.db");
    a.signal(Signal::SIGSTOP);
    b.wait_for("the other host leads", || b.is_primary());
    insert(&b).expect("the new primary takes writes");
    a.signal(Signal::SIGCONT);
    // Nothing of before is believed: by its own clock its time is over.
    let refused = shell.ask("INSERT INTO t DEFAULT VALUES;");
    assert!(refused.contains("rror"), "{refused}");
    shell.kill();
    a.wait_for("the old primary follows", || a.follows(&b));
    assert_equal(&b, &a, "app.db");
    assert_eq!(a.sql("app.db", "SELECT count(*) FROM t"), "2");
}

#[test]
fn a_consul_that_lost_its_data_is_taken_up_again() {
    let mut consul = Consul::start();
    let fleet = Fleet::new();
    let (a, b) = pair(&fleet, &consul);
    create(&a, "WAL");
    a.wait_position_equal(&b, "app.db");
    let before = a.epoch();
    consul.kill();
    consul.restart();
    wait_for("one of them leads in a new term", PATIENCE, || {
        [&a, &b].into_iter().find(|host| host.is_primary() && host.epoch() > before && insert(host).is_ok())
    });
    let (new, old) = if a.is_primary() { (&a, &b) } else { (&b, &a) };
    old.wait_for("the other follows", || old.follows(new));
    assert_equal(new, old, "app.db");
}

#[test]
fn the_most_advanced_of_three_hosts_wins_and_three_servers_outlive_one() {
    let mut servers = Consul::cluster();
    // A session belongs to the server that it was made at (the first address), and goes with it.
    servers.sort_by_key(|server| {
        server.get("/v1/agent/self").is_some_and(|own| own.contains("\"leader\": \"true\""))
    });
    let fleet = Fleet::new();
    let addresses: Vec<String> = servers.iter().map(Consul::address).collect();
    let addresses = addresses.join(",");
    let hosts: Vec<Host> = ["a", "b", "c"]
        .into_iter()
        .map(|name| {
            let host = fleet.host(name, Role::Candidate(&addresses));
            // A leader's election of Consul takes longer than a second.
            host.set("lease.ttl=6s").start();
            host.wait_for("it has a role", || host.status()["role"]["name"] != "none");
            host
        })
        .collect();
    let [a, b, c] = &hosts[..] else { unreachable!() };
    assert!(a.is_primary());
    for host in [b, c] {
        host.wait_for("it follows", || host.follows(a));
    }
    create(a, "WAL");
    insert(a).expect("the primary takes writes");
    a.wait_position_equal(b, "app.db");
    a.wait_position_equal(c, "app.db");
    // c stays behind, and is back before the lease is free.
    c.kill();
    insert(a).expect("the primary takes writes");
    a.wait_position_equal(b, "app.db");
    a.kill();
    c.start();
    b.wait_for("the one with everything leads", || b.is_primary());
    c.wait_for("the other one follows it", || c.follows(b));
    assert_equal(b, c, "app.db");

    // Losing the leader does not end its term.
    let term = b.epoch();
    servers.last_mut().expect("there are three").kill();
    let until = Instant::now() + Duration::from_secs(12);
    wait_for("two terms of the TTL pass", PATIENCE, || (Instant::now() > until).then_some(()));
    assert!(b.is_primary());
    assert_eq!(b.epoch(), term);
    insert(b).expect("the primary takes writes");
}
