//! What an agent makes of a data directory that a crash has left: of itself, of an application, of the host.
//!
//! A power failure is simulated on copies of the data directory: whatever was not synced since a point at which all was
//! durable may have reached the disk or not, block by block, in any combination. `LITEFS_CRASH_IMAGES` (6) and
//! `LITEFS_CRASH_SEED` (1) try more of them.

use litefs_tests::{
    Fleet, Host, Random, Role, Shell, SystemCall, assert_equal, assert_nothing_diverged, assert_sane,
    is_about_fuse, replace_system_calls, run, sqlite3,
};
use sqlite_file::journal::{JournalHeader, record_checksum};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

fn sidecar(host: &Host, database: &str) -> PathBuf {
    host.data().join("checksums").join(format!("{database}.sum"))
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("the file is there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("the file reaches there");
    file.write_all_at(&[byte[0] ^ 0x40], offset).expect("the file can be written");
}

/// What a start has written to the log.
fn log_of_start(host: &Host) -> String {
    let before = host.log().len();
    host.start();
    host.log()[before..].to_owned()
}

/// Creates a table with 200 rows of about a kilobyte.
fn fill(host: &Host, database: &str, mode: &str) {
    let sql = format!(
        "PRAGMA journal_mode={mode};\n\
         CREATE TABLE t(id INTEGER PRIMARY KEY, x);\n\
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200) \
         INSERT INTO t SELECT i, printf('%04d', i) || hex(zeroblob(500)) FROM n;"
    );
    host.sql(database, &sql);
}

const SUM: &str = "SELECT count(*), total(id), total(length(x)), min(x), max(x) FROM t";

#[test]
fn what_was_written_without_a_journal_just_before_a_crash_is_captured() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (first_mode, mode) in [("DELETE", "OFF"), ("DELETE", "MEMORY"), ("WAL", "OFF"), ("WAL", "MEMORY")] {
        let name = format!("{first_mode}-{mode}.db");
        fill(&primary, &name, first_mode);
        primary.wait_position_equal(&replica, &name);
        for round in 1..=3 {
            // The door does not see what a connection writes that opened the database in WAL mode.
            primary.sql(&name, &format!("PRAGMA journal_mode={first_mode};"));
            let mut shell = Shell::open(&primary.path(&name));
            shell.run("SELECT count(*) FROM t;");
            shell.run(&format!("PRAGMA journal_mode={mode}; PRAGMA synchronous=OFF;"));
            shell.run(&format!("UPDATE t SET x = 'round {round}' || substr(x, 8) WHERE id <= 100;"));
            primary.kill();
            shell.kill();
            primary.start();
            replica.wait_connected();
            assert_equal(&primary, &replica, &name);
            let rows = replica.sql(&name, &format!("SELECT count(*) FROM t WHERE x LIKE 'round {round}%'"));
            assert_eq!(rows, "100", "{name}, round {round}");
        }
    }
}

#[test]
fn a_hot_journal_is_rolled_back_and_nothing_of_its_transaction_is_left() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let modes = ["DELETE", "TRUNCATE", "PERSIST"];
    let mut before = Vec::new();
    for mode in modes {
        let name = format!("{mode}.db");
        fill(&primary, &name, mode);
        // Pages on the free list are written without being journaled.
        primary.sql(&name, &format!("PRAGMA journal_mode={mode}; DELETE FROM t WHERE id > 150;"));
        primary.wait_position_equal(&replica, &name);
        before.push((primary.sql(&name, SUM), primary.position(&name)));
    }
    let shells = modes.map(|mode| {
        let mut shell = Shell::open(&primary.path(format!("{mode}.db")));
        shell.run(&format!(
            "PRAGMA journal_mode={mode}; PRAGMA cache_size=5; BEGIN; UPDATE t SET x = 'changed' || x; \
             INSERT INTO t SELECT id + 1000, x FROM t; DELETE FROM t WHERE id < 20;"
        ));
        shell
    });
    primary.kill();
    shells.into_iter().for_each(Shell::kill);
    for mode in modes {
        let journal = fs::metadata(primary.stored(format!("{mode}.db-journal"))).expect("a journal");
        assert!(journal.len() > 10_000, "the transaction did not spill");
    }
    primary.start();
    replica.wait_connected();
    for (mode, (rows, position)) in modes.iter().zip(before) {
        let name = format!("{mode}.db");
        // After a mark the log is not replayed, and what was written over free pages stays: a transaction of its own.
        let of_its_own = format!("they become a transaction of their own database={name}");
        assert!(
            primary.position(&name) == position || primary.log().contains(&of_its_own),
            "{name}: a rollback is no transaction"
        );
        assert_eq!(primary.sql(&name, SUM), rows);
        assert_equal(&primary, &replica, &name);
        primary.sql(&name, "INSERT INTO t VALUES (5000, 'after')");
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn commits_that_only_a_wal_has_are_dropped_with_a_word() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    fill(&primary, "app.db", "WAL");
    let mut application = Shell::open(&primary.path("app.db"));
    application.run("UPDATE t SET x = 'known to the log' WHERE id = 1;");
    let position = primary.wait_position_equal(&replica, "app.db");
    primary.kill();
    application.kill();
    // Frames that are as valid as the others, of a commit that did not reach the log.
    let mut behind_the_agent = Shell::open(&primary.stored("app.db"));
    behind_the_agent.run("UPDATE t SET x = 'unknown to the log' WHERE id = 2;");
    behind_the_agent.kill();

    let log = log_of_start(&primary);
    assert!(log.contains("WARN") && log.contains("never reached the log"), "{log}");
    assert_eq!(primary.position("app.db"), Some(position));
    assert_eq!(primary.sql("app.db", "SELECT x FROM t WHERE id = 1"), "known to the log");
    assert_eq!(primary.sql("app.db", "SELECT count(*) FROM t WHERE x LIKE 'unknown%'"), "0");
    replica.wait_connected();
    assert_equal(&primary, &replica, "app.db");
}

/// A program that is killed when it syncs a file.
fn killed_at_its_first_sync(command: &mut Command) -> &mut Command {
    let syncs = [libc::SYS_fdatasync, libc::SYS_fsync].map(|number| SystemCall { number, second: None });
    replace_system_calls(command, &syncs, libc::SECCOMP_RET_KILL_PROCESS)
}

/// SQLite has written the commit frame and is killed before other connections can see the commit (it syncs in
/// between). What the next one does with these frames is up to SQLite; log, database and replica must agree on it.
#[test]
fn a_commit_whose_writer_died_before_publishing_it_is_there_everywhere_or_nowhere() {
    for next in ["the next writer", "a restart of the WAL", "the last close", "a restart of the agent"] {
        let fleet = Fleet::new();
        let (primary, replica) = fleet.pair();
        primary.sql(
            "app.db",
            "PRAGMA journal_mode=WAL;\n\
             CREATE TABLE a(x); INSERT INTO a VALUES (0); CREATE TABLE b(x); INSERT INTO b VALUES (0);\n\
             CREATE TABLE c(x); INSERT INTO c VALUES (0);",
        );
        // Keeps the wal-index alive.
        let mut other = Shell::open(&primary.path("app.db"));
        other.run("PRAGMA synchronous=FULL; UPDATE c SET x = 1;");
        let mut dies = Command::new("sqlite3");
        dies.args(["-batch", "-init", "/dev/null", "-cmd", "PRAGMA synchronous=FULL"])
            .arg(primary.path("app.db"));
        dies.arg("BEGIN; UPDATE a SET x = 1; UPDATE b SET x = 1; COMMIT;");
        let status = killed_at_its_first_sync(&mut dies).stdout(Stdio::null()).status().expect("it runs");
        assert_eq!(status.signal(), Some(libc::SIGSYS), "it was killed in its commit");

        match next {
            "the next writer" => drop(other.run("UPDATE c SET x = 2;")),
            "a restart of the WAL" => drop(other.run("PRAGMA wal_checkpoint; UPDATE c SET x = 2;")),
            "the last close" => {
                drop(other);
                primary.wait_for("the database is closed", || {
                    primary.database("app.db").is_some_and(|db| db["open_handles"] == 0)
                });
                primary.sql("app.db", "UPDATE c SET x = 2;");
            }
            _ => {
                primary.kill();
                drop(other);
                primary.start();
                replica.wait_connected();
                primary.sql("app.db", "UPDATE c SET x = 2;");
            }
        }
        // Only a refusal to remove a WAL that SQLite has not checkpointed is an error that belongs here.
        primary.expect_error("the WAL has transactions that are not in the database file yet");
        let rows = primary.sql("app.db", "SELECT a.x, b.x, c.x FROM a, b, c");
        assert!(["0|0|2", "1|1|2"].contains(&rows.as_str()), "after {next}: {rows}");
        assert_equal(&primary, &replica, "app.db");
        primary.sql("app.db", "UPDATE a SET x = 3; UPDATE b SET x = 3;");
        assert_equal(&primary, &replica, "app.db");
    }
}

/// TXID of the mark in a sidecar: up to there the files are durable, and recovery does not replay the log.
fn mark(host: &Host, database: &str) -> u64 {
    let mut txid = [0; 8];
    let file = File::open(sidecar(host, database)).expect("there is a sidecar");
    file.read_exact_at(&mut txid, 16).expect("it has a header");
    u64::from_le_bytes(txid)
}

/// Commits something, kills the agent before it has marked that durable, and gives the position.
fn kill_before_it_marks(host: &Host, database: &str, sql: &str) -> String {
    loop {
        host.sql(database, sql);
        let (position, txid) = (host.position(database).expect("it is there"), host.txid(database));
        host.kill();
        if mark(host, database) < txid {
            return position;
        }
        host.start();
    }
}

#[test]
fn a_database_file_damaged_in_its_last_transaction_is_healed_from_the_log() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    for mode in ["WAL", "DELETE"] {
        let fleet = Fleet::new();
        let (primary, replica) = fleet.pair();
        for damage in ["a flipped page", "a truncated file", "a missing file", "zeros"] {
            let name = format!("{}.db", damage.rsplit(' ').next().expect("a word"));
            // All pages are in the last transaction.
            let sql = format!(
                "PRAGMA journal_mode={mode};\nDROP TABLE IF EXISTS t;\nVACUUM;\n\
                 CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) \
                 SELECT i AS id, randomblob(500) AS x FROM n;"
            );
            let position = kill_before_it_marks(&primary, &name, &sql);
            let file = primary.stored(&name);
            let len = fs::metadata(&file).expect("the database").len();
            assert!(len > 16_384, "the database is too small for this test");
            match damage {
                "a flipped page" => flip(&file, len - 2000),
                "a truncated file" => File::options().write(true).open(&file).unwrap().set_len(4096).unwrap(),
                "a missing file" => fs::remove_file(&file).unwrap(),
                _ => File::options()
                    .write(true)
                    .open(&file)
                    .unwrap()
                    .write_all_at(&[0; 4096], len - 4096)
                    .unwrap(),
            }
            primary.start();
            replica.wait_connected();
            assert_eq!(primary.position(&name).as_ref(), Some(&position), "{damage}, {mode}");
            assert_eq!(assert_equal(&primary, &replica, &name), position, "{damage}, {mode}");
        }
    }
}

#[test]
fn page_checksums_that_are_lost_or_damaged_are_made_anew() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 5] = [
        ("missing", |path| fs::remove_file(path).unwrap()),
        ("cut.in.the.header", |path| File::options().write(true).open(path).unwrap().set_len(1000).unwrap()),
        ("cut.in.the.entries", |path| File::options().write(true).open(path).unwrap().set_len(4100).unwrap()),
        ("flipped.header", |path| flip(path, 20)),
        ("flipped.entry", |path| flip(path, 4096 + 8 + 3)),
    ];
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (name, _) in damages {
        fill(&primary, name, "WAL");
        primary.wait_position_equal(&replica, name);
    }
    for after_crash in [true, false] {
        let mut positions = Vec::new();
        for (name, _) in damages {
            primary.sql(name, "UPDATE t SET x = x || '.' WHERE id % 7 = 0");
            positions.push(primary.wait_position_equal(&replica, name));
        }
        if after_crash {
            primary.kill()
        } else {
            primary.stop()
        };
        for (name, damage) in damages {
            damage(&sidecar(&primary, name));
        }
        primary.start();
        replica.wait_connected();
        for ((name, _), position) in damages.iter().zip(positions) {
            let context = format!("{name}, after a {}", if after_crash { "crash" } else { "stop" });
            assert_eq!(primary.position(name), Some(position), "{context}");
            primary.sql(name, "UPDATE t SET x = 'after' || x WHERE id % 5 = 0");
            assert_equal(&primary, &replica, name);
        }
    }
    assert_nothing_diverged(&[&primary, &replica]);
}

#[test]
fn what_a_crash_left_in_the_staging_directory_is_removed() {
    if is_about_fuse("plain files may be in use when an agent starts: they are taken up and not recovered") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    fill(&primary, "app.db", "WAL");
    let position = primary.wait_position_equal(&replica, "app.db");
    for host in [&replica, &primary] {
        host.kill();
        let staging = host.data().join("staging");
        // Half of an import, of a copy over a database, of an export, of a large transaction; a snapshot that did not
        // get into the log; a snapshot whose progress cannot be read.
        for name in [
            "import-x1y2z3.db",
            "copy-x1y2z3.db",
            "export-x1y2z3.db",
            "transaction-x1y2z3.ltx",
            "app.db@00000000000000ff.snapshot",
        ] {
            fs::write(staging.join(name), b"SQLite format 3\0 and no more").unwrap();
        }
        host.start();
        let left: Vec<_> = fs::read_dir(&staging).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "still in the staging directory of {}: {left:?}", host.name());
    }
    replica.wait_connected();
    assert_eq!(assert_equal(&primary, &replica, "app.db"), position);
}

#[test]
fn a_replica_killed_while_it_takes_a_snapshot_ends_with_the_primarys_database() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let replica = fleet.primary("b");
    // Two histories, in pages of different sizes: the replica has to keep its own and take the other's as a snapshot.
    for (host, page_size) in [(&primary, 4096), (&replica, 1024)] {
        host.sql(
            "app.db",
            &format!(
                "PRAGMA page_size={page_size};\nPRAGMA journal_mode=WAL;\nCREATE TABLE t(x);\nINSERT INTO t VALUES ('{}');\n\
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500) \
                 INSERT INTO t SELECT randomblob(4000) FROM n;",
                host.name()
            ),
        );
    }
    replica.stop();
    replica.set_role(Role::ReplicaOf(&primary));
    let mut random = Random(1);
    for _ in 0..8 {
        replica.start();
        std::thread::sleep(Duration::from_millis(random.below(150)));
        replica.kill();
    }
    replica.start();
    replica.wait_connected();
    assert_equal(&primary, &replica, "app.db");
    assert_eq!(replica.sql("app.db", "SELECT x FROM t WHERE length(x) = 1"), "a");
    let staged = replica.data().join("staging");
    replica.wait_for("nothing is staged any more", || {
        fs::read_dir(&staged).is_ok_and(|mut d| d.next().is_none())
    });
    // What it had alone is kept, whole.
    let kept = replica.data().join("diverged/app.db");
    let kept: Vec<_> = fs::read_dir(kept).expect("something is kept").map(|e| e.unwrap().path()).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let database = kept[0].join("database.db");
    assert_eq!(sqlite3(&database, "PRAGMA integrity_check; SELECT x FROM t WHERE length(x) = 1"), "ok\nb");
}

#[test]
fn an_import_that_is_killed_is_there_as_a_whole_or_not_at_all() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let dir = fleet.scratch();
    // Two databases of which each page differs; they replace each other.
    let sources = ["one", "two"].map(|name| {
        let path = dir.join(format!("{name}.db"));
        let sql = format!(
            "CREATE TABLE t(x);\nINSERT INTO t VALUES ('{name}');\n\
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1500) \
             INSERT INTO t SELECT '{name}' || hex(randomblob(2000)) FROM n;"
        );
        sqlite3(&path, &sql);
        path
    });
    let mut random = Random(1);
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        primary.import(&name, &sources[0]);
        primary.sql(&name, &format!("PRAGMA journal_mode={mode}"));
        let mut imported = 0;
        for i in 0..6 {
            let mut command = primary.litefs(&["import", &name]);
            command.arg(&sources[(i + 1) % 2]).stdout(Stdio::null()).stderr(Stdio::null());
            let mut import = command.spawn().expect("the command runs");
            std::thread::sleep(Duration::from_millis(random.below(300)));
            primary.kill();
            imported += u32::from(import.wait().expect("it ends with the agent").success());
            primary.start();
            replica.wait_connected();
            let rows = primary.sql(&name, "SELECT DISTINCT substr(x, 1, 3) FROM t; SELECT count(*) FROM t;");
            assert!(
                ["one\n1501", "two\n1501"].contains(&rows.as_str()),
                "{mode}, {imported} imported: {rows}"
            );
            assert_equal(&primary, &replica, &name);
        }
    }
}

/// A rollback journal that counts two records (SQLite's file format, section 3).
fn journal_of(initial_pages: u32, records: [(u32, &[u8]); 2]) -> Vec<u8> {
    let count = records.len() as u32;
    let header = JournalHeader { records: count, nonce: 7, initial_pages, sector_size: 512, page_size: 4096 };
    let mut bytes = header.encode().to_vec();
    bytes.resize(512, 0);
    for (pgno, page) in records {
        bytes.extend(pgno.to_be_bytes());
        bytes.extend(page);
        bytes.extend(record_checksum(header.nonce, page).to_be_bytes());
    }
    bytes
}

/// What the file `running` says of an agent on a host that has been booted since.
const ANOTHER_BOOT: &str = "ffffffff-0000-4000-8000-000000000000\n";

#[test]
fn after_a_power_failure_a_journal_puts_back_only_what_the_log_knows() {
    if is_about_fuse("the preload door leaves a journal's syncs to SQLite") {
        return;
    }
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    primary.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (randomblob(100000))");
    let position = primary.position("app.db");
    primary.stop();
    let file = primary.stored("app.db");
    let pages = fs::read(&file).expect("the database is there");
    let page = |pgno: usize| pages[(pgno - 1) * 4096..pgno * 4096].to_vec();
    // Only every 200th byte is in the checksum of a record: this page is torn, and SQLite would not see it.
    let mut torn = page(5);
    torn[300..390].fill(0);
    // What a transaction wrote over whose journal was durable.
    File::options().write(true).open(&file).unwrap().write_all_at(&[0xee; 4096], 9 * 4096).unwrap();
    let journal = journal_of(pages.len() as u32 / 4096, [(5, &torn), (10, &page(10))]);
    fs::write(primary.stored("app.db-journal"), journal).expect("it can be written");
    fs::write(primary.data().join("running"), ANOTHER_BOOT).expect("it can be written");
    primary.start();
    assert_sane(&primary, "app.db");
    assert_eq!(primary.position("app.db"), position, "recovery took a torn page for a transaction");
    assert_eq!(fs::read(&file).unwrap(), pages);
}

/// Copies a directory, with holes as holes.
fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").args(["-a", "--sparse=always", "--"]).arg(from).arg(to));
}

const BLOCK: usize = 4096;

/// LSN of the first record of a segment, by its name; that record is at byte 4096.
fn first_lsn(segment: &Path) -> Option<u64> {
    let stem = segment.file_stem()?.to_str()?;
    u64::from_str_radix(stem, 16).ok().filter(|_| segment.extension().is_some_and(|e| e == "log"))
}

/// Where a log ends, when nothing of it is lost.
fn log_end(data: &Path) -> u64 {
    let files = fs::read_dir(data.join("log")).expect("there is a log");
    let ends = files.filter_map(|entry| {
        let path = entry.expect("a file").path();
        let used = read(&path).iter().rposition(|b| *b != 0).map_or(0, |last| last as u64 + 1);
        Some(first_lsn(&path)? + used.saturating_sub(4096))
    });
    ends.max().unwrap_or(0)
}

/// A data directory as a power failure may leave it: each block of each file is as it was at `durable`, when all was
/// on the disk, or as it was written later, at `later`. The log was synced up to `lsn`; how much more of it was
/// written is up to chance. A record tells up to where the log was durable when it was appended, so there is none
/// without all that is before it.
fn power_failure(durable: &Path, later: &Path, lsn: u64, random: &mut Random, image: &Path) {
    let end = lsn + random.below(log_end(later).saturating_sub(lsn) + 1);
    combine(durable, later, end, random, image);
}

fn combine(durable: &Path, later: &Path, log_end: u64, random: &mut Random, image: &Path) {
    fs::create_dir_all(image).expect("the temporary directory is writable");
    let names = |dir: &Path| -> BTreeSet<_> {
        fs::read_dir(dir).into_iter().flatten().map(|entry| entry.expect("a file").file_name()).collect()
    };
    for name in names(later).union(&names(durable)) {
        let (old, new, to) = (durable.join(name), later.join(name), image.join(name));
        if new.is_dir() {
            combine(&old, &new, log_end, random, &to);
            continue;
        }
        let text = name.to_str().expect("a name in ASCII");
        let replaced_as_a_whole = text.starts_with("spare") || ["node-id", "epoch", "lock"].contains(&text);
        if let Some(first) = first_lsn(&new) {
            // A segment that begins later may be there already, empty.
            if new.exists() && (first <= log_end || random.below(2) == 0) {
                let mut bytes = read(&new);
                let end = bytes.len().min(4096 + log_end.saturating_sub(first) as usize);
                bytes[end..].fill(0);
                write_with_holes(&to, &bytes);
            }
        } else if let Some(index) = new.file_name().and_then(|n| n.to_str()?.strip_suffix(".idx")) {
            // Written when its segment was full and all of it was synced.
            let this = u64::from_str_radix(index, 16).expect("it is named like its segment");
            let segments = names(later).into_iter().filter_map(|name| first_lsn(&later.join(name)));
            if new.exists() && segments.filter(|first| *first > this).any(|next| next <= log_end) {
                fs::copy(&new, &to).expect("it can be copied");
            }
        } else if replaced_as_a_whole {
            let from = if new.exists() { &new } else { &old };
            fs::copy(from, &to).expect("it can be copied");
        } else if text == "running" {
            // Written by an agent on a host that has been booted since.
            fs::write(&to, ANOTHER_BOOT).expect("it can be written");
        } else if text == VANISHED_JOURNAL {
            // It was synced, so all of it is there when its removal was lost.
            if random.below(2) == 0 {
                fs::copy(&new, &to).expect("it can be copied");
            }
        } else if old.exists() == new.exists() {
            mix(&read(&old), &read(&new), random, &to);
        } else if random.below(2) == 0 {
            // A file made or removed since: the directory may say so or not.
            let from = if new.exists() { &new } else { &old };
            mix(&[], &read(from), random, &to);
        }
    }
}

/// The content of a file; nothing when there is none.
fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(path) {
        file.read_to_end(&mut bytes).expect("it can be read");
    }
    bytes
}

/// A file of which each block is as in `old` or as in `new`.
fn mix(old: &[u8], new: &[u8], random: &mut Random, to: &Path) {
    let mut mixed = new.to_vec();
    // Also all or nothing, which a coin for each block would hardly give.
    let newer_of_8 = [0, 2, 4, 6, 8][random.below(5) as usize];
    for (i, block) in mixed.chunks_mut(BLOCK).enumerate() {
        if random.below(8) >= newer_of_8 {
            let before = old.get(i * BLOCK..).unwrap_or_default();
            let n = before.len().min(block.len());
            block[..n].copy_from_slice(&before[..n]);
            block[n..].fill(0);
        }
    }
    write_with_holes(to, &mixed);
}

/// Segments of the log are preallocated: 32 MiB that are mostly zeros.
fn write_with_holes(to: &Path, bytes: &[u8]) {
    let file = File::create(to).expect("it can be written");
    file.set_len(bytes.len() as u64).expect("it can be written");
    for (i, block) in bytes.chunks(BLOCK).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0)) {
        file.write_all_at(block, (i * BLOCK) as u64).expect("it can be written");
    }
}

/// Databases of the power failure test: name, journal mode, `synchronous`.
const POWER: [(&str, &str, &str); 4] = [
    ("wal-full.db", "WAL", "FULL"),
    ("wal-normal.db", "WAL", "NORMAL"),
    ("delete-full.db", "DELETE", "FULL"),
    ("persist-normal.db", "PERSIST", "NORMAL"),
];

/// The journal of the last transaction of one of them; it was removed, but nobody has synced the directory.
const VANISHED_JOURNAL: &str = "delete-full.db-journal";

/// One transaction: a numbered row, and the number in another place.
fn numbered(n: u64, bytes: u64) -> String {
    format!(
        "BEGIN IMMEDIATE; INSERT INTO row VALUES ({n}, randomblob({bytes})); UPDATE last SET n = {n}; \
         DELETE FROM junk; INSERT INTO junk VALUES (randomblob({}));  COMMIT;",
        bytes / 2 + 1
    )
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("the variable is a number"))
}

/// A host with a small log, of which many copies are made.
fn host_with_small_log(fleet: &Fleet, name: &str, role: Role<'_>) -> Host {
    let host = fleet.host(name, role);
    host.set("log.segment-size=1MiB");
    host
}

/// Makes the databases and writes the first 19 transactions.
fn make_databases(primary: &Host) {
    for (name, mode, _) in POWER {
        let sql = format!(
            "PRAGMA journal_mode={mode};\nCREATE TABLE row(n INTEGER PRIMARY KEY, body); \
             CREATE TABLE last(n INTEGER); INSERT INTO last VALUES (0); CREATE TABLE junk(body);"
        );
        primary.sql(name, &sql);
        for n in 1..20 {
            primary.sql(name, &numbered(n, 3000));
        }
    }
}

/// An application on each database.
fn applications(primary: &Host) -> [Shell; 4] {
    POWER.map(|(name, mode, synchronous)| {
        let mut shell = Shell::open(&primary.path(name));
        // Small, so that frames and pages are written before the commit, and the WAL begins anew.
        shell.run(&format!(
            "PRAGMA journal_mode={mode}; PRAGMA synchronous={synchronous}; PRAGMA cache_size=5; \
             PRAGMA wal_autocheckpoint=40;"
        ));
        shell
    })
}

/// Commits on all databases; `numbers` are the last transactions of each.
fn load(shells: &mut [Shell; 4], numbers: &mut [u64; 4], random: &mut Random) {
    // FULL last: the log of the primary is durable then, up to here, for all.
    for i in [1, 3, 0, 2] {
        for _ in 0..20 {
            numbers[i] += 1;
            assert_eq!(shells[i].ask(&numbered(numbers[i], random.below(20_000))), "");
        }
    }
}

/// Whether an agent has synced a database between two copies of its data directory, as it does every few seconds: what
/// was on the disk at the second is not known then.
fn synced_between(before: &Path, after: &Path) -> bool {
    let mark = |dir: &Path, name: &str| {
        let mut header = [0; 40];
        let file = File::open(dir.join("checksums").join(format!("{name}.sum"))).expect("there is a sidecar");
        file.read_exact_at(&mut header, 0).expect("it has a header");
        header
    };
    POWER.iter().any(|(name, ..)| mark(before, name) != mark(after, name))
}

/// The number of the last transaction; all before it must be there, and nothing else.
#[track_caller]
fn last_transaction(host: &Host, database: &str) -> u64 {
    let rows = host.sql(database, "SELECT (SELECT n FROM last), count(*), total(n) FROM row");
    let found: Vec<f64> = rows.split('|').map(|n| n.parse().expect("a number")).collect();
    let (last, count, sum) = (found[0] as u64, found[1] as u64, found[2] as u64);
    assert!(last == count && sum == last * (last + 1) / 2, "{database} on {}: {rows}", host.name());
    last
}

fn durable_lsn(host: &Host) -> u64 {
    host.status()["log"]["durable_lsn"].as_u64().expect("a number")
}

#[test]
fn after_a_power_failure_nothing_is_lost_that_was_synced_and_nothing_is_half_there() {
    let fleet = Fleet::new();
    let primary = host_with_small_log(&fleet, "a", Role::Primary);
    primary.start();
    let replica = fleet.replica("b", &primary);
    make_databases(&primary);
    let dir = fleet.scratch();
    let (durable, later, journal) = (dir.join("durable"), dir.join("later"), dir.join("journal"));
    let mut random = Random(number("LITEFS_CRASH_SEED", 1));
    let mut numbers = [19; 4];
    let mut tries = 0;
    // Up to where the log was surely durable, and what was committed by then.
    let (lsn, synced) = loop {
        // After an orderly stop all is on the disk.
        primary.stop();
        copy(&primary.data(), &durable);
        primary.start();
        let mut shells = applications(&primary);
        load(&mut shells, &mut numbers, &mut random);
        // Its file may be missing after the failure.
        let made_since = format!("since-{tries}.db");
        primary.sql(&made_since, "CREATE TABLE t(x); INSERT INTO t VALUES ('made since');");
        // A large transaction, whose journal is synced when it no longer fits into the cache.
        numbers[2] += 1;
        let n = numbers[2];
        shells[2].run(&format!(
            "BEGIN IMMEDIATE; UPDATE row SET body = randomblob(3000) WHERE n < 19; UPDATE last SET n = {n}; \
             INSERT INTO row VALUES ({n}, randomblob(30000));"
        ));
        fs::copy(primary.stored(VANISHED_JOURNAL), &journal).unwrap();
        assert!(fs::metadata(&journal).unwrap().len() > 20_000, "the transaction did not spill");
        shells[2].run("COMMIT;");
        // It has nothing of what may be lost.
        replica.kill();
        let (lsn, synced) = (durable_lsn(&primary), numbers);
        // NORMAL in WAL mode once more, without a checkpoint: nothing is synced any more, so these may be lost.
        shells[1].run("PRAGMA wal_autocheckpoint=0;");
        for _ in 0..5 {
            numbers[1] += 1;
            assert_eq!(shells[1].ask(&numbered(numbers[1], 2000)), "");
        }
        primary.kill();
        shells.into_iter().for_each(Shell::kill);
        copy(&primary.data(), &later);
        if !synced_between(&durable, &later) {
            break (lsn, (synced, made_since));
        }
        tries += 1;
        assert!(tries < 20, "this machine is too slow for this test");
        primary.start();
        replica.start();
        replica.wait_connected();
        for copied in [&durable, &later] {
            fs::remove_dir_all(copied).unwrap();
        }
    };
    let (synced, made_since) = synced;
    fs::rename(journal, later.join("files").join(VANISHED_JOURNAL)).unwrap();

    for i in 0..number("LITEFS_CRASH_IMAGES", 4) {
        let host = host_with_small_log(&fleet, &format!("image-{i}"), Role::Primary);
        power_failure(&durable, &later, lsn, &mut random, &host.data());
        host.start();
        for (k, (name, ..)) in POWER.iter().enumerate() {
            assert_sane(&host, name);
            let last = last_transaction(&host, name);
            assert!(
                (synced[k]..=numbers[k]).contains(&last),
                "{name} of image {i} ends at {last}; {} was synced, {} written",
                synced[k],
                numbers[k]
            );
            host.sql(name, &numbered(last + 1, 1000));
            assert_sane(&host, name);
        }
        assert_eq!(host.sql(&made_since, "SELECT x FROM t"), "made since");
        // Whoever followed before the failure has nothing that the primary has lost.
        if i == 0 {
            replica.set_role(Role::ReplicaOf(&host)).start();
            replica.wait_connected();
            for (name, ..) in POWER {
                assert_equal(&host, &replica, name);
            }
            let kept = fs::read_dir(replica.data().join("diverged")).unwrap().count();
            assert_eq!(kept, 0, "the replica had transactions that were not durable on the primary");
        }
        host.stop();
    }
}

#[test]
fn a_replica_goes_on_after_a_power_failure_where_its_log_ends() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let replica = host_with_small_log(&fleet, "b", Role::ReplicaOf(&primary));
    replica.start();
    make_databases(&primary);
    let wait_equal = |replica: &Host| {
        for (name, ..) in POWER {
            primary.wait_position_equal(replica, name);
        }
    };
    wait_equal(&replica);
    let dir = fleet.scratch();
    let (durable, later) = (dir.join("durable"), dir.join("later"));
    let mut random = Random(number("LITEFS_CRASH_SEED", 1));
    let mut numbers = [19; 4];
    let mut tries = 0;
    let lsn = loop {
        replica.stop();
        copy(&replica.data(), &durable);
        replica.start();
        let mut shells = applications(&primary);
        load(&mut shells, &mut numbers, &mut random);
        wait_equal(&replica);
        // What was acknowledged is durable; of what comes now some may be lost.
        let lsn = durable_lsn(&replica);
        load(&mut shells, &mut numbers, &mut random);
        replica.kill();
        copy(&replica.data(), &later);
        if !synced_between(&durable, &later) {
            break lsn;
        }
        tries += 1;
        assert!(tries < 20, "this machine is too slow for this test");
        replica.start();
        for copied in [&durable, &later] {
            fs::remove_dir_all(copied).unwrap();
        }
    };
    for i in 0..number("LITEFS_CRASH_IMAGES", 4) {
        let host = host_with_small_log(&fleet, &format!("image-{i}"), Role::ReplicaOf(&primary));
        power_failure(&durable, &later, lsn, &mut random, &host.data());
        host.start();
        host.wait_connected();
        for (k, (name, ..)) in POWER.iter().enumerate() {
            assert_equal(&primary, &host, name);
            assert_eq!(last_transaction(&host, name), numbers[k]);
        }
        let log = host.log();
        assert!(!log.contains("snapshot"), "the log had all that is needed:\n{log}");
        host.stop();
    }
}
