//! What an agent makes of a data directory after the host has lost its power.
//!
//! A power failure is simulated on copies of the data directory: whatever was not synced since a point at which all was
//! durable may have reached the disk or not, block by block, in any combination. `LITEFS_CRASH_IMAGES` (6) and
//! `LITEFS_CRASH_SEED` (1) try more of them.

use fastrand::Rng;
use litefs_tests::{Fleet, Host, Role, Shell, assert_equal, assert_sane, is_about_fuse, run};
use sqlite_file::journal::{JournalHeader, record_checksum};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

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
fn power_failure(durable: &Path, later: &Path, lsn: u64, random: &mut Rng, image: &Path) {
    let end = lsn + random.u64(..=log_end(later).saturating_sub(lsn));
    combine(durable, later, end, random, image);
}

fn combine(durable: &Path, later: &Path, log_end: u64, random: &mut Rng, image: &Path) {
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
            if new.exists() && (first <= log_end || random.u64(..2) == 0) {
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
            if random.u64(..2) == 0 {
                fs::copy(&new, &to).expect("it can be copied");
            }
        } else if old.exists() == new.exists() {
            mix(&read(&old), &read(&new), random, &to);
        } else if random.u64(..2) == 0 {
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
fn mix(old: &[u8], new: &[u8], random: &mut Rng, to: &Path) {
    let mut mixed = new.to_vec();
    // Also all or nothing, which a coin for each block would hardly give.
    let newer_of_8 = [0, 2, 4, 6, 8][random.usize(..5)];
    for (i, block) in mixed.chunks_mut(BLOCK).enumerate() {
        if random.u64(..8) >= newer_of_8 {
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
fn load(shells: &mut [Shell; 4], numbers: &mut [u64; 4], random: &mut Rng) {
    // FULL last: the log of the primary is durable then, up to here, for all.
    for i in [1, 3, 0, 2] {
        for _ in 0..20 {
            numbers[i] += 1;
            assert_eq!(shells[i].ask(&numbered(numbers[i], random.u64(..20_000))), "");
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
    let mut random = Rng::with_seed(number("LITEFS_CRASH_SEED", 1));
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
    let mut random = Rng::with_seed(number("LITEFS_CRASH_SEED", 1));
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
