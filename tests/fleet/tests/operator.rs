//! What an operator does, with the packages, on hosts that boot.

use fleet::{Fleet, Host};

const DB: &str = "/srv/litefs/db/app.db";

/// Two hosts: a primary and its replica, with a table `t`.
fn pair() -> Fleet {
    let fleet = Fleet::new(2);
    for host in fleet.hosts() {
        host.install_litefs();
    }
    fleet[0].start_litefs(None);
    fleet[1].start_litefs(Some(&fleet[0]));
    sql(&fleet[0], "PRAGMA journal_mode=WAL; CREATE TABLE t(x)");
    fleet
}

fn sql(host: &Host, sql: &str) -> String {
    host.run(&format!("sqlite3 -cmd '.timeout 10000' {DB} \"{sql}\""))
}

/// Waits until the host shows this result.
#[track_caller]
fn wait_sql(host: &Host, sql: &str, expected: &str) {
    host.wait_for(&format!("test \"$(sqlite3 -cmd '.timeout 10000' {DB} '{sql}')\" = '{expected}'"));
}

#[test]
fn install_enable_write_read() {
    let fleet = pair();
    let (a, b) = (&fleet[0], &fleet[1]);
    sql(a, "INSERT INTO t VALUES (1)");
    wait_sql(b, "SELECT count(*) FROM t", "1");
    let refused = b.try_run(&format!("sqlite3 {DB} 'INSERT INTO t VALUES (2)'")).expect("host b is on");
    assert!(refused.stderr.contains("readonly"), "{refused:?}");

    // What the operator looks at.
    a.wait_for("systemctl status litefs@db | grep 'Status: \"primary, epoch 1; 1 database, 1 follower\"'");
    b.wait_for(
        "systemctl status litefs@db | grep 'Status: \"replica of host-a, epoch 1, .* ms behind; 1 database'",
    );
    a.run("journalctl -u litefs@db LITEFS_CLUSTER=db | grep mounted");
    a.run("litefs status");
    b.run("litefs status");
    a.wait_for("systemctl is-active litefs-primary@db.target");
    b.wait_for("systemctl is-active litefs-replica@db.target");
    assert!(!b.try_run("systemctl is-active litefs-primary@db.target").expect("on").success());
}
