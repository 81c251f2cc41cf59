//! Elections with synchronous replication: whoever becomes primary has every commit that was acknowledged.

use litefs_tests::*;
use nix::sys::signal::Signal;

/// Candidates at one Consul whose commits need one more of them; the first one is primary, the others follow it.
fn candidates(fleet: &Fleet, consul: &Consul, names: &[&str]) -> Vec<Host> {
    candidates_with(fleet, consul, names, &[])
}

fn candidates_with(fleet: &Fleet, consul: &Consul, names: &[&str], settings: &[&str]) -> Vec<Host> {
    let address = consul.address();
    let hosts: Vec<Host> = names.iter().map(|name| fleet.host(name, Role::Candidate(&address))).collect();
    for host in &hosts {
        host.set("sync.acks=1").set(&format!("sync.members={}", names.join(",")));
        // Who is stopped for a while stays connected.
        host.set("replication.timeout=60s");
        for setting in settings {
            host.set(setting);
        }
    }
    hosts[0].start();
    hosts[0].wait_for("the first host is primary", || hosts[0].is_primary());
    for host in &hosts[1..] {
        host.start();
        host.wait_for("it follows", || host.follows(&hosts[0]));
    }
    hosts[0].sql("app.db", "PRAGMA journal_mode=wal; CREATE TABLE t(x)");
    for host in &hosts[1..] {
        hosts[0].wait_position_equal(host, "app.db");
    }
    hosts
}

fn insert(host: &Host, value: u32) {
    host.sql("app.db", &format!("INSERT INTO t VALUES ({value})"));
}

fn rows(host: &Host) -> String {
    host.sql("app.db", "SELECT group_concat(x) FROM t")
}

/// Commits a row while `c` is away, on `a` with `b`; then `c` runs without them.
fn leave_alone_without_the_last_commit(a: &Host, b: &Host, c: &Host) {
    c.kill();
    insert(a, 1);
    b.kill();
    a.kill();
    c.start();
    c.wait_for("it says that it waits", || c.waits().contains("must be heard"));
}

#[test]
fn one_that_may_lack_an_acknowledged_commit_waits_until_enough_members_are_heard() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let hosts = candidates(&fleet, &consul, &["a", "b", "c"]);
    let [a, b, c] = &hosts[..] else { unreachable!() };
    leave_alone_without_the_last_commit(a, b, c);
    assert!(c.log().contains("litefs promote --force"));
    assert!(!c.is_primary());
    // Either of the others suffices: it has what was acknowledged.
    b.start();
    // `b` leads, or it gives `c` what that lacks before it comes to the lease, and `c` leads.
    b.wait_for("one with the commit leads", || b.is_primary() || c.is_primary());
    let (leader, follower) = if b.is_primary() { (b, c) } else { (c, b) };
    follower.wait_for("the other one follows", || follower.follows(leader));
    assert_eq!(rows(leader), "1");
    assert_equal(leader, follower, "app.db");
    insert(leader, 2);
}

#[test]
fn an_operator_can_force_a_host_that_may_lack_commits() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let hosts = candidates(&fleet, &consul, &["a", "b", "c"]);
    let [a, b, c] = &hosts[..] else { unreachable!() };
    leave_alone_without_the_last_commit(a, b, c);
    run(&mut c.litefs(&["promote", "--force"]));
    assert!(c.is_primary());
    // What was only with the others is kept there, as files.
    b.start();
    b.wait_for("it follows", || b.follows(c));
    insert(c, 2);
    assert_equal(c, b, "app.db");
    assert_eq!(rows(b), "2");
    assert!(b.data().join("diverged").read_dir().is_ok_and(|mut kept| kept.next().is_some()));
}

#[test]
fn a_candidate_gets_what_it_lacks_from_one_that_must_not_lead() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let hosts = candidates(&fleet, &consul, &["a", "b", "c"]);
    let [a, b, c] = &hosts[..] else { unreachable!() };
    b.stop();
    b.set("lease.candidate=false").start();
    b.wait_for("it follows", || b.follows(a));
    c.kill();
    insert(a, 1);
    a.wait_position_equal(b, "app.db");
    a.kill();
    c.start();
    c.wait_for("the candidate leads", || c.is_primary());
    assert_eq!(rows(c), "1");
    b.wait_for("the other one follows", || b.follows(c));
    insert(c, 2);
    assert_equal(c, b, "app.db");
}

#[test]
fn a_handoff_fails_no_commit_that_waits_for_its_acknowledgement() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let hosts = candidates(&fleet, &consul, &["a", "b"]);
    let [a, b] = &hosts[..] else { unreachable!() };
    b.signal(Signal::SIGSTOP);
    std::thread::scope(|scope| {
        let commit = scope.spawn(|| a.try_sql("app.db", "INSERT INTO t VALUES (1)"));
        a.wait_for("the commit waits", || a.status()["sync"][0]["waiting"] == 1);
        let refused = try_run(&mut a.litefs(&["handoff", "--to", "b"])).unwrap_err();
        assert!(refused.contains('b'), "{refused}");
        assert!(a.is_primary() && !commit.is_finished());
        b.signal(Signal::SIGCONT);
        commit.join().expect("no panic").expect("it was only made to wait");
    });
    wait_for("the handoff succeeds", PATIENCE, || try_run(&mut a.litefs(&["handoff", "--to", "b"])).ok());
    b.wait_for("the other host leads", || b.is_primary());
    assert_eq!(rows(b), "1");
}

#[test]
fn acknowledgements_need_names_where_hosts_choose_the_primary() {
    let fleet = Fleet::new();
    let host = fleet.host("a", Role::Candidate("http://127.0.0.1:1"));
    host.set("sync.acks=1");
    let mut agent = host.agent_command();
    let refused = try_run(&mut agent).unwrap_err();
    assert!(refused.contains("sync.members does not say"), "{refused}");
}

/// Candidates of which the first two have an acknowledged commit in a database whose records are no longer in their logs;
/// the third one lacks it, and still has the record before it.
fn two_without_the_record(fleet: &Fleet, consul: &Consul) -> Vec<Host> {
    let small = ["log.segment-size=64KiB", "log.retention-age=1s"];
    let hosts = candidates_with(fleet, consul, &["a", "b", "c"], &small);
    let [a, b, c] = &hosts[..] else { unreachable!() };
    c.kill();
    insert(a, 1);
    a.wait_position_equal(b, "app.db");
    // Another database fills the log, until retention has removed what it had of the first one.
    let log = |host: &Host, what: &str| host.status()["log"][what].as_u64().expect("a number");
    let ends = [a, b].map(|host| (host, log(host, "durable_lsn")));
    a.sql("other.db", "PRAGMA journal_mode=wal; CREATE TABLE t(x)");
    for (host, end) in ends {
        host.wait_for("retention has removed the records", || {
            a.sql("other.db", "INSERT INTO t VALUES (randomblob(100000)); DELETE FROM t");
            log(host, "oldest_lsn") >= end
        });
    }
    a.wait_position_equal(b, "other.db");
    b.stop();
    a.kill();
    hosts
}

#[test]
fn an_acknowledged_commit_counts_when_its_record_is_no_longer_kept() {
    let consul = Consul::start();
    let fleet = Fleet::new();
    let hosts = two_without_the_record(&fleet, &consul);
    let [_a, b, c] = &hosts[..] else { unreachable!() };
    c.start();
    b.start();
    b.wait_for("the one with the commit leads", || b.is_primary());
    c.wait_for("the other one follows", || c.follows(b));
    assert_eq!(rows(b), "1");
    assert_equal(b, c, "app.db");
    assert_equal(b, c, "other.db");
}
