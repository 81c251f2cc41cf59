//! What tests of halt locks share: `app.db`, which a primary lends to a replica.

use crate::{Fleet, Host, assert_equal, assert_nothing_diverged};

/// Values in the order in which they were inserted.
pub const ROWS: &str = "SELECT group_concat(x) FROM t";

/// Makes it on the primary, with one row, and waits until the others have it.
#[track_caller]
pub fn create(primary: &Host, others: &[&Host], mode: &str) {
    let sql = format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x); INSERT INTO t VALUES ('first')");
    primary.sql("app.db", &sql);
    for host in others {
        primary.wait_position_equal(host, "app.db");
    }
}

/// A primary `a` and a replica `b` that have it.
#[track_caller]
pub fn pair(fleet: &Fleet, mode: &str) -> (Host, Host) {
    let (primary, replica) = fleet.pair();
    create(&primary, &[&replica], mode);
    (primary, replica)
}

/// Inserts a row on a host.
pub fn insert(host: &Host, value: &str) -> Result<String, String> {
    host.try_sql("app.db", &format!("INSERT INTO t VALUES ('{value}')"))
}

/// Who has the halt lock, by the status of a host.
#[track_caller]
pub fn holder(host: &Host) -> Option<String> {
    host.database("app.db").expect("it is there")["halt_lock"].as_str().map(str::to_owned)
}

/// Proves that all hosts have the same, and nobody had anything alone.
#[track_caller]
pub fn assert_one_history(hosts: &[&Host]) {
    for host in hosts {
        assert_equal(hosts[0], host, "app.db");
    }
    assert_nothing_diverged(hosts);
}
