//! The preload door, where calls of the C library fail below the library: with errors of the disk, with a full one, with
//! signals, and with writes of a part. SQLite reports an error or goes on, and no host has anything but what was committed.
//!
//! `LITEFS_FAULTS_ROUNDS` (2) lengthens the test, `LITEFS_FAULTS_SEED` (1) changes what fails when.

use litefs_tests::library::*;
use litefs_tests::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The library that lets calls fail.
fn faults() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let library = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("faults.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/faults.c");
        run(Command::new("cc").args(["-O1", "-shared", "-fPIC", source, "-ldl", "-o"]).arg(&library));
        library
    })
}

/// Writes while calls fail, on connections of its own in turn; then says how many transactions were reported as
/// committed, and how many were tried.
const WRITER: &str = r#"
import random, sqlite3, sys
path, mode, seed, count = sys.argv[1] + "/" + sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
choose = random.Random(seed)
c, committed, tried, errors = None, [], 0, {}
while tried < count:
    try:
        if c is None:
            c = sqlite3.connect(path, isolation_level=None, timeout=20)
            c.execute("PRAGMA synchronous=" + choose.choice(["OFF", "NORMAL", "FULL"]))
            c.execute("PRAGMA cache_size=" + choose.choice(["5", "200"]))
        tried += 1
        c.execute("BEGIN IMMEDIATE")
        c.execute("INSERT INTO t VALUES(?, randomblob(?))", (seed * 100000 + tried, choose.choice([10, 5000, 90000])))
        if choose.random() < 0.3:
            c.execute("UPDATE t SET v = randomblob(300) WHERE id % 5 = ?", (choose.randrange(5),))
        if choose.random() < 0.1:
            c.execute("ROLLBACK")
            continue
        c.execute("COMMIT")
        committed.append(tried)
        if choose.random() < 0.1:
            c.execute(choose.choice(["PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA wal_checkpoint", "VACUUM"]))
    except sqlite3.Error as e:
        text = str(e)
        assert "malformed" not in text and "not a database" not in text, text
        errors[text] = errors.get(text, 0) + 1
        try:
            if c is not None and c.in_transaction:
                c.execute("ROLLBACK")
        except sqlite3.Error:
            pass
        if choose.random() < 0.3:
            c = None
print(" ".join(str(seed * 100000 + n) for n in committed))
print(errors)
"#;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

fn round(seed: u64, hold: &str) {
    println!("calls fail with LITEFS_FAULTS_SEED={seed}, preload.hold={hold}");
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").set(&format!("preload.hold={hold}")).start();
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.set("door=preload").start();
    replica.wait_connected();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        sql(
            &primary,
            &name,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v)"),
        );
        let files = std::fs::canonicalize(primary.mount()).expect("it is a link to the files");
        let libraries = format!("{} {}", liblitefs().display(), faults().display());
        let mut wrong = Vec::new();
        for part in 0..3 {
            let seed = seed * 10 + part;
            let mut writer = python(&primary, WRITER, &[&name, mode, &seed.to_string(), "60"]);
            // SQLite names its files by the path without links.
            writer.env("LD_PRELOAD", &libraries).env("FAULTS_DIR", &files).env("FAULTS_ONE_IN", "40");
            writer.env("FAULTS_SEED", seed.to_string());
            let said = run(&mut writer);
            let (committed, errors) = said.split_once('\n').expect("two lines");
            println!("{name}: {errors}");
            assert!(errors.contains("disk"), "nothing failed: {errors}");
            let count = committed.split_whitespace().count();
            for id in committed.split_whitespace() {
                let there = sql(&primary, &name, &format!("SELECT count(*) FROM t WHERE id = {id}"));
                if there.trim() != "1" {
                    wrong.push(id.to_owned());
                }
            }
            assert!(count > 5, "{name}: next to nothing was committed: {committed}");
        }
        assert!(wrong.is_empty(), "{name} lacks what was reported as committed: {wrong:?}");
        assert_eq!(sql(&primary, &name, "PRAGMA integrity_check").trim(), "ok");
        let count = rows(&primary, &name);
        assert_follows(&primary, &replica, &name, count);
    }
    replica.assert_no_errors();
}

#[test]
fn whatever_fails_below_the_library_hosts_have_what_was_committed() {
    let first = number("LITEFS_FAULTS_SEED", 1);
    for seed in first..first + number("LITEFS_FAULTS_ROUNDS", 2) {
        round(seed, if seed % 2 == 0 { "always" } else { "never" });
    }
}
