//! Files that were damaged while no agent looked: what is not as the log says is never served, and never goes without a
//! word.

use litefs_tests::data_files::{flip, kill_before_it_marks, mark, segments};
use litefs_tests::{Fleet, Host, assert_equal, litefs, try_run};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Number of bytes of a segment that are in use.
fn used(segment: &Path) -> u64 {
    let bytes = fs::read(segment).expect("the segment is there");
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)
}

/// Flips a bit in the payload of the last record of a database.
fn damage_last_record(segment: &Path, database: &str) {
    let bytes = fs::read(segment).expect("the segment is there");
    // The name comes after the 136 bytes of the header, the payload after the name, at a multiple of 8 bytes.
    let name = (136..bytes.len() - database.len())
        .rev()
        .find(|at| bytes[*at..].starts_with(database.as_bytes()) && bytes[at - 136..].starts_with(b"LFR1"));
    let name = name.unwrap_or_else(|| panic!("{} has no record of {database}", segment.display()));
    flip(segment, (name + database.len()).next_multiple_of(8) as u64 + 120);
}

/// A database that is set aside, and why.
#[track_caller]
fn quarantine_reason(host: &Host, database: &str) -> String {
    let db = host.database(database).unwrap_or_else(|| panic!("{database} is not in the status"));
    assert_eq!(db["state"], "quarantined", "{db}");
    db["reason"].as_str().expect("there is a reason").to_owned()
}

#[test]
fn a_flipped_bit_in_the_log_sets_one_database_aside_and_a_replica_heals_itself() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for name in ["good.db", "bad.db"] {
        primary.sql(name, "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
        primary.wait_position_equal(&replica, name);
    }
    for host in [&replica, &primary] {
        loop {
            primary.sql("bad.db", "INSERT INTO t VALUES (randomblob(3000));");
            // A record after it proves that the damaged one once was whole.
            primary.sql("good.db", "INSERT INTO t VALUES (2);");
            for name in ["good.db", "bad.db"] {
                primary.wait_position_equal(&replica, name);
            }
            let needed = host.txid("bad.db");
            host.kill();
            // Otherwise nobody needs the record any more.
            if mark(host, "bad.db") < needed {
                break;
            }
            host.start();
            replica.wait_connected();
        }
        let segment = segments(host).pop().expect("there is a segment");
        damage_last_record(&segment, "bad.db");
        host.expect_error("log is damaged").expect_error("database is quarantined");
        let before = host.log().len();
        host.start();
        let named = segment.display().to_string();
        let log = host.log()[before..].to_owned();
        assert!(log.contains(&format!("{named} is damaged at offset")) && log.contains("bad.db"), "{log}");
        if host.name() == "b" {
            // The primary is still there and has the database.
            host.wait_connected();
            // A snapshot heals it.
            host.wait_database("bad.db", "ok");
            assert_equal(&primary, host, "bad.db");
            continue;
        }
        let reason = quarantine_reason(host, "bad.db");
        assert!(reason.contains(&named) && reason.contains("bad.db"), "{reason}");
        assert!(host.try_sql("bad.db", "SELECT * FROM t").is_err(), "a quarantined database was opened");
        let shown = host.litefs(&["status"]).output().expect("it runs");
        assert_eq!(shown.status.code(), Some(1));
        let export = try_run(host.litefs(&["export", "bad.db"]).arg(fleet.scratch().join("bad.db")));
        assert!(export.is_err_and(|error| error.contains("quarantined")));
    }
    // All others go on.
    primary.sql("good.db", "INSERT INTO t VALUES ('after');");
    replica.wait_connected();
    assert_equal(&primary, &replica, "good.db");
    let rows = replica.sql("bad.db", "SELECT count(*) FROM t");
    assert!(
        rows.parse::<u64>().expect("a number") >= 3,
        "the replica lost what the primary cannot read: {rows}"
    );
}

/// Two databases and a log, of which the newest segment is then damaged. Whatever is served afterwards is whole, can be
/// written and reaches the replica; what is not is quarantined; and an ERROR line says that the log is damaged.
fn nothing_disappears_without_a_word(orderly: bool, damage: fn(&Path)) {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for i in 0..10 {
        for name in ["a.db", "b.db"] {
            primary.sql(name, "PRAGMA journal_mode=WAL; CREATE TABLE IF NOT EXISTS t(x);");
            primary
                .sql(name, &format!("INSERT INTO t VALUES ({i}); INSERT INTO t VALUES (randomblob(2000));"));
        }
    }
    for name in ["a.db", "b.db"] {
        primary.wait_position_equal(&replica, name);
    }
    if orderly {
        primary.stop()
    } else {
        primary.kill()
    };
    damage(&segments(&primary).pop().expect("there is a segment"));
    primary.expect_error("damaged").expect_error("quarantined").expect_error("lost");
    let before = primary.log().len();
    primary.start();
    let said = primary.log()[before..].to_owned();
    let reported = said.lines().any(|line| line.contains("ERROR") && line.contains("log"));
    assert!(reported, "the log is damaged, and nobody is told: {said}");
    for name in ["a.db", "b.db"] {
        let db = primary.database(name).unwrap_or_else(|| panic!("{name} is not in the status"));
        if db["state"] == "quarantined" {
            continue;
        }
        assert_eq!(primary.sql(name, "SELECT count(*) FROM t WHERE typeof(x) = 'integer'"), "10", "{name}");
        primary.sql(name, "INSERT INTO t VALUES ('after');");
        replica.wait_connected();
        assert_equal(&primary, &replica, name);
    }
}

fn cut_in_half(segment: &Path) {
    let half = used(segment) / 2;
    let file = File::options().write(true).open(segment).expect("the segment is there");
    file.set_len(half).expect("it can be cut");
}

#[test]
fn a_segment_cut_in_half_after_an_orderly_stop_is_reported() {
    nothing_disappears_without_a_word(true, cut_in_half);
}

#[test]
fn a_segment_cut_in_half_after_a_crash_is_reported() {
    nothing_disappears_without_a_word(false, cut_in_half);
}

#[test]
fn a_segment_with_a_damaged_header_costs_the_history_and_not_the_databases() {
    // After an orderly stop the index beside the segment says the same.
    nothing_disappears_without_a_word(false, |segment| flip(segment, 40));
}

/// A transaction of 10 MB, whose content is in no segment of the log.
const LARGE: &str =
    "PRAGMA journal_mode=WAL; CREATE TABLE IF NOT EXISTS t(x);\nINSERT INTO t VALUES (randomblob(10000000));";

/// The file of the newest such transaction in `big.db`.
fn large_transaction(host: &Host) -> PathBuf {
    let file = fs::read_dir(host.data().join("ltx/big.db")).expect("it is in a file of its own");
    file.map(|entry| entry.expect("it can be listed").path()).max().expect("one file")
}

fn flip_in_the_middle(file: &Path) {
    flip(file, fs::metadata(file).expect("it is there").len() / 2);
}

#[test]
fn a_damaged_file_of_a_large_transaction_is_not_sent() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    primary.sql("good.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    primary.sql("big.db", LARGE);
    let file = large_transaction(&primary);
    flip_in_the_middle(&file);
    let verified = try_run(Command::new(litefs()).args(["ltx", "verify"]).arg(&file));
    assert!(verified.is_err_and(|error| error.contains(file.to_str().unwrap())));

    // A replica gets the database in another way, or not at all, but never wrong.
    primary.expect_error("damaged");
    let replica = fleet.replica("b", &primary);
    primary.wait_position_equal(&replica, "good.db");
    assert_equal(&primary, &replica, "big.db");
}

#[test]
fn a_damaged_file_of_a_large_transaction_is_not_replayed() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    primary.sql("good.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    // Once the database itself is durable, nobody needs the file any more.
    kill_before_it_marks(&primary, "big.db", LARGE);
    let file = large_transaction(&primary);
    flip_in_the_middle(&file);
    // The database is set aside under its name, the other runs.
    primary.expect_error("damaged").expect_error("quarantined");
    primary.start();
    let reason = quarantine_reason(&primary, "big.db");
    assert!(reason.contains(file.to_str().unwrap()), "{reason}");
    primary.sql("good.db", "INSERT INTO t VALUES (2);");
    let replica = fleet.replica("b", &primary);
    primary.wait_position_equal(&replica, "good.db");
    assert_equal(&primary, &replica, "good.db");
}

#[test]
fn files_that_disappeared_or_shrank_while_the_agent_was_stopped_are_not_served() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for name in ["gone.db", "short.db", "good.db"] {
        primary.sql(
            name,
            "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (randomblob(20000));",
        );
        primary.wait_position_equal(&replica, name);
    }
    // First on the replica, which can get everything again, then on the primary.
    for host in [&replica, &primary] {
        host.stop();
        let files = host.data().join("files");
        fs::remove_file(files.join("gone.db")).unwrap();
        File::options().write(true).open(files.join("short.db")).unwrap().set_len(8192).unwrap();
        host.expect_error("database is quarantined");
        host.start();
        if host.name() == "b" {
            host.wait_connected();
            for name in ["gone.db", "short.db"] {
                // A snapshot heals it.
                host.wait_database(name, "ok");
                assert_equal(&primary, host, name);
            }
        } else {
            for name in ["gone.db", "short.db"] {
                let reason = quarantine_reason(host, name);
                assert!(reason.contains(files.join(name).to_str().unwrap()), "{reason}");
                let opened = host.try_sql(name, "SELECT count(*) FROM t");
                assert!(opened.is_err(), "{name} is served: {opened:?}");
                let opened = host.try_sql(name, "CREATE TABLE another(x)");
                assert!(opened.is_err(), "{name} is made anew: {opened:?}");
            }
        }
    }
    primary.sql("good.db", "INSERT INTO t VALUES (1);");
    replica.wait_connected();
    assert_equal(&primary, &replica, "good.db");
    assert_eq!(replica.sql("gone.db", "SELECT length(x) FROM t"), "20000");
}
