//! One database, many hosts.

use litefs_tests::{Fleet, assert_equal};

#[test]
fn smoke() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    assert_equal(&primary, &replica, "app.db");
    assert_eq!(replica.sql("app.db", "SELECT * FROM t"), "1");
    replica.stop();
    primary.stop();
}
