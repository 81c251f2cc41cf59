//! Readers in other processes that never stop while transactions are applied.

use super::*;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// Applies transactions until `readings` readers have come, read and gone, one after the other, beside one that
/// stays; every answer must be a state that the database really had, never older than one seen before.
fn hammer(mode: &str, timeout_ms: u32, readings: usize) {
    let mut primary = Primary::new(1024, mode);
    let mut replica = Replica::new();
    replica.apply(&[
        primary.exec(CREATE),
        primary.insert(400, 300),
        primary.exec("create table version(n); insert into version values(0)"),
    ]);
    // In WAL mode the first transaction after the snapshot connects; from then on nobody is ever kept out.
    replica.apply(&[primary.insert(1, 1)]);
    // The version makes every state another, and says which came first.
    let state = |version: u32, db: &Connection| format!("{version}|{}", digest_of(db));
    let ask = DIGEST.replace("select ", "select (select n from version), ");
    let mut states = vec![state(0, &primary.db)];
    let path = replica.path.clone();
    let done = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            // Also when an assertion fails here the applying has to end.
            struct Done<'a>(&'a AtomicBool);
            impl Drop for Done<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::SeqCst);
                }
            }
            let _done = Done(&done);
            let mut staying = Sqlite::open(&path);
            staying.ask(&format!(".timeout {timeout_ms}"));
            let mut answers = Vec::new();
            for _ in 0..readings {
                let mut passing = Sqlite::open(&path);
                passing.ask(&format!(".timeout {timeout_ms}"));
                answers.push(passing.ask(&ask));
                answers.push(staying.ask(&ask));
                // Everything twice in one snapshot.
                let twice = passing.ask(&format!("begin; {ask} {ask} pragma integrity_check; commit;"));
                let lines: Vec<_> = twice.lines().collect();
                assert_eq!((lines.len(), lines[0], lines[2]), (3, lines[1], "ok"), "{twice}");
                answers.push(lines[0].to_owned());
            }
            answers
        });
        let mut round = 0;
        while !done.load(Ordering::SeqCst) {
            round += 1;
            let file = primary.exec(&format!(
                "begin; update version set n = {round};
                 update t set b = randomblob(300) where a % 3 = {}; commit;",
                round % 3
            ));
            // Known before it can be seen.
            states.push(state(round, &primary.db));
            replica.apply(&[file]);
            if round % 7 == 0 {
                replica.applier.checkpoint(Durability::Log).unwrap();
            }
        }
        reading.join().unwrap()
    });
    assert_eq!(answers.len(), 3 * readings);
    let known: HashSet<_> = states.iter().collect();
    assert!(answers.iter().all(|a| known.contains(a)), "a state that never was: {answers:?}");
    let order: Vec<_> = answers.iter().map(|a| states.iter().position(|s| s == a)).collect();
    assert!(order.is_sorted(), "time ran backwards: {order:?}");
    assert!(order.last() > order.first());
    replica.applier.sync().unwrap();
    replica.assert_equals(&primary.image);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn in_wal_mode_readers_without_patience_are_never_kept_out() {
    hammer("wal", 0, 100);
}

#[test]
fn in_rollback_mode_readers_with_a_timeout_get_their_turn() {
    hammer("delete", 20_000, 30);
}
