//! Random workloads: whatever applications do on the primary, the replica is the same file, page for page.
//!
//! `LITEFS_WORKLOAD_SEED` repeats a run (its seed is printed), `LITEFS_WORKLOAD_SECONDS` makes it longer.

use fastrand::Rng;
use litefs_tests::{Fleet, Host, JOURNAL_MODES, PATIENCE, Role, Shell, assert_equal, sqlite3, try_exec};
use rusqlite::{Connection, ErrorCode};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn seed() -> u64 {
    let given =
        std::env::var("LITEFS_WORKLOAD_SEED").ok().map(|seed| seed.parse().expect("the seed is a number"));
    given.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_millis() as u64)
    })
}

/// How long to go on: a share of the time for all tests of this file.
fn time(share: f64) -> Duration {
    let seconds = std::env::var("LITEFS_WORKLOAD_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(25.0);
    Duration::from_secs_f64(seconds * share)
}

/// The last steps, shown with the seed when the test fails.
struct Trace {
    seed: u64,
    steps: VecDeque<String>,
}

impl Trace {
    fn new(seed: u64) -> Trace {
        println!("LITEFS_WORKLOAD_SEED={seed}");
        Trace { seed, steps: VecDeque::new() }
    }

    fn step(&mut self, what: String) {
        if self.steps.len() == 80 {
            self.steps.pop_front();
        }
        self.steps.push_back(what);
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let steps: Vec<_> = self.steps.iter().map(String::as_str).collect();
            eprintln!("LITEFS_WORKLOAD_SEED={}\n{}", self.seed, steps.join("\n"));
        }
    }
}

fn one_of<T: Copy, const N: usize>(random: &mut Rng, choices: [T; N]) -> T {
    choices[random.usize(..N)]
}

/// Statements that change something; some of them fail, as they do in applications.
fn change(random: &mut Rng) -> String {
    let table = random.u64(..3);
    let bytes = one_of(random, [20, 300, 3000, 30_000]);
    let rows = 1 + random.u64(..60);
    let (divisor, rest) = (2 + random.u64(..9), random.u64(..3));
    match random.u64(..17) {
        0..=4 => format!(
            "INSERT INTO t{table}(a, v) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {rows})
             SELECT i, randomblob(abs(random()) % {bytes}) FROM n"
        ),
        5..=7 => format!("UPDATE t{table} SET v = randomblob(abs(random()) % {bytes}) WHERE id % {divisor} = {rest}"),
        8..=10 => format!("DELETE FROM t{table} WHERE id % {divisor} = {rest}"),
        11 => format!("DELETE FROM t{table} WHERE id > (SELECT avg(id) FROM t{table})"),
        12 => format!("CREATE INDEX IF NOT EXISTS i{table} ON t{table}(v, a)"),
        13 => format!("DROP INDEX IF EXISTS i{table}"),
        14 => format!("DROP TABLE IF EXISTS t{table}"),
        15 => format!("ALTER TABLE t{table} ADD COLUMN c{} DEFAULT 'x'", random.u64(..20)),
        _ => format!("DELETE FROM t{table}; PRAGMA user_version={rows}"),
    }
}

const TABLES: &str = "CREATE TABLE IF NOT EXISTS t0(id INTEGER PRIMARY KEY, a, v);
    CREATE TABLE IF NOT EXISTS t1(id INTEGER PRIMARY KEY, a, v); CREATE TABLE IF NOT EXISTS t2(id INTEGER PRIMARY KEY, a, v)";

/// A transaction with savepoints that may be undone in parts or as a whole.
fn transaction(random: &mut Rng) -> String {
    let mut sql = format!(
        "PRAGMA cache_size={}; BEGIN {};",
        one_of(random, [1, 5, -2000]),
        one_of(random, ["", "IMMEDIATE"])
    );
    for depth in 0..1 + random.u64(..4) {
        if random.bool() {
            sql.push_str(&format!("SAVEPOINT s{depth}; {}; {}; ", change(random), change(random)));
            sql.push_str(&match random.u64(..3) {
                0 => format!("ROLLBACK TO s{depth};"),
                1 => format!("ROLLBACK TO s{depth}; {}; RELEASE s{depth};", change(random)),
                _ => format!("RELEASE s{depth};"),
            });
        } else {
            sql.push_str(&format!("{}; ", change(random)));
        }
    }
    sql + if random.u64(..4) == 0 { "ROLLBACK" } else { "COMMIT" }
}

/// What applications may be told: that somebody else has the database, or that their statement does not fit.
#[track_caller]
fn may_fail(sql: &str, error: &rusqlite::Error) {
    let harmless = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => true,
        // No such table, duplicate column, VACUUM in a transaction, ...
        Some(ErrorCode::Unknown) => {
            let text = error.to_string();
            [
                "no such",
                "duplicate column",
                "already exists",
                "transaction",
                "VACUUM",
                "safety level",
                "into wal mode",
                "has no column",
            ]
            .iter()
            .any(|part| text.contains(part))
        }
        // Also on a plain file: a connection that made WAL mode and could not leave it again, because another one was there,
        // has no wal-index to lock for a checkpoint.
        Some(ErrorCode::SystemIoFailure) => {
            let code = error.sqlite_error().map(|error| error.extended_code);
            sql.contains("wal_checkpoint") && code == Some(rusqlite::ffi::SQLITE_IOERR_SHMLOCK)
        }
        _ => false,
    };
    assert!(harmless, "{sql}: {error} ({:?})", error.sqlite_error());
}

/// One database and everybody who uses it.
struct Database<'a> {
    name: String,
    primary: &'a Host,
    replica: &'a Host,
    writers: Vec<Option<Connection>>,
    reader: Option<Connection>,
}

impl<'a> Database<'a> {
    fn new(name: String, primary: &'a Host, replica: &'a Host, random: &mut Rng) -> Database<'a> {
        let mut db = Database { name, primary, replica, writers: Vec::new(), reader: None };
        db.writers.resize_with(3, || None);
        db.create(random);
        db
    }

    /// What holds for the file, and the tables.
    fn create(&mut self, random: &mut Rng) {
        let page_size = 512 << random.u64(..8);
        let sql = format!(
            "PRAGMA page_size={page_size}; PRAGMA auto_vacuum={}; PRAGMA journal_mode={}; {TABLES};",
            random.u64(..3),
            one_of(random, JOURNAL_MODES)
        );
        self.primary.sql(&self.name, &sql);
    }

    fn writer(&mut self, i: usize) -> &Connection {
        let (primary, name) = (self.primary, &self.name);
        self.writers[i].get_or_insert_with(|| {
            let connection = primary.open(name);
            // Others may be in a transaction for as long as this test likes.
            connection.busy_timeout(Duration::from_millis(20)).expect("a timeout can be set");
            connection
        })
    }

    fn close(&mut self) {
        self.writers.iter_mut().for_each(|writer| *writer = None);
        self.reader = None;
    }

    fn run(&mut self, i: usize, sql: &str) {
        let connection = self.writer(i);
        if let Err(error) = try_exec(connection, sql) {
            may_fail(sql, &error);
            if !connection.is_autocommit() {
                try_exec(connection, "ROLLBACK").unwrap_or_else(|error| may_fail("ROLLBACK", &error));
            }
        }
    }

    /// One step of the workload; says what it was.
    fn step(&mut self, random: &mut Rng) -> String {
        let i = random.usize(..self.writers.len());
        let sql = match random.u64(..100) {
            0..=24 => change(random),
            25..=49 => transaction(random),
            // Stays open over the next steps.
            50..=54 => {
                format!("BEGIN {}; {}", one_of(random, ["", "IMMEDIATE", "EXCLUSIVE"]), change(random))
            }
            55..=60 => one_of(random, ["COMMIT", "ROLLBACK"]).to_owned(),
            61..=64 => TABLES.to_owned(),
            65..=70 => {
                format!(
                    "PRAGMA wal_checkpoint({})",
                    one_of(random, ["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
                )
            }
            71..=75 => format!("PRAGMA journal_mode={}", one_of(random, JOURNAL_MODES)),
            76..=78 => {
                // Another page size waits for connections that have been in WAL mode to be closed.
                self.reader = None;
                format!("PRAGMA page_size={}; VACUUM", 512 << random.u64(..8))
            }
            79..=80 => format!("PRAGMA incremental_vacuum({})", random.u64(..50)),
            81 => format!("PRAGMA synchronous={}", random.u64(..3)),
            82 => format!("PRAGMA mmap_size={}", random.u64(..2) << 22),
            83 => format!("PRAGMA journal_size_limit={}", random.u64(..2) * 40_000),
            84 => format!("PRAGMA wal_autocheckpoint={}", one_of(random, [0, 10, 1000])),
            85 => format!("PRAGMA secure_delete={}", random.u64(..2)),
            86 => {
                // Closed at the end: a connection that began in WAL mode like this never shares it.
                let sql = format!("PRAGMA locking_mode=EXCLUSIVE; {}", change(random));
                self.run(i, &sql);
                self.writers[i] = None;
                return format!("{} {i}: {sql}", self.name);
            }
            87..=89 => {
                self.writers[i] = None;
                return format!("{} close {i}", self.name);
            }
            90..=92 => {
                // A process that dies in the middle.
                let mut victim = Shell::open(&self.primary.path(&self.name));
                let sql = format!(
                    ".timeout 20\nPRAGMA cache_size=1; BEGIN; {}; {};",
                    change(random),
                    change(random)
                );
                victim.ask(&sql);
                victim.kill();
                return format!("{} killed: {sql}", self.name);
            }
            93..=97 => return self.read(random),
            _ => {
                // Another file takes its place. Nobody is in a transaction, or this waits for him.
                self.writers.iter_mut().for_each(|writer| *writer = None);
                let dir = tempfile::tempdir().expect("a directory");
                let file = dir.path().join("import.db");
                let mode = one_of(random, JOURNAL_MODES);
                sqlite3(
                    &file,
                    &format!("PRAGMA journal_mode={mode}; {TABLES}; {};", change(random))
                        .replace("PRAGMA user", ";PRAGMA user"),
                );
                self.reader = None;
                self.primary.import(&self.name, &file);
                return format!("{} import in {mode}", self.name);
            }
        };
        self.run(i, &sql);
        format!("{} {i}: {sql}", self.name)
    }

    /// A reader on the replica looks, maybe for longer.
    fn read(&mut self, random: &mut Rng) -> String {
        if self.reader.is_none() && self.replica.path(&self.name).exists() {
            self.reader = Some(self.replica.open(&self.name));
        }
        let Some(reader) = &self.reader else { return format!("{} has no reader", self.name) };
        let sql = match (reader.is_autocommit(), random.bool()) {
            (true, true) => "BEGIN; SELECT count(*) FROM sqlite_schema",
            (false, true) => "COMMIT",
            _ => "PRAGMA integrity_check",
        };
        if sql.starts_with("PRAGMA") {
            let found: String = reader.query_row(sql, [], |row| row.get(0)).expect("readers are served");
            assert_eq!(found, "ok", "{} on the replica", self.name);
        } else {
            try_exec(reader, sql)
                .unwrap_or_else(|error| panic!("{} on the replica: {sql}: {error}", self.name));
        }
        format!("{} reader: {sql}", self.name)
    }

    /// Everybody comes to an end, and the hosts are compared.
    fn compare(&mut self, random: &mut Rng) {
        for writer in self.writers.iter().flatten().filter(|writer| !writer.is_autocommit()) {
            try_exec(writer, one_of(random, ["COMMIT", "ROLLBACK"])).unwrap_or_else(|error| {
                may_fail("COMMIT", &error);
                try_exec(writer, "ROLLBACK").unwrap_or_else(|error| may_fail("ROLLBACK", &error));
            });
        }
        if let Some(reader) = self.reader.as_ref().filter(|reader| !reader.is_autocommit()) {
            try_exec(reader, "COMMIT").expect("a reader can end its transaction");
        }
        // Taking back what a killed writer left is a transaction as well, if it took pages from the free list.
        let journal = self.primary.stored(format!("{}-journal", self.name));
        self.primary.wait_for("no journal is left of a killed writer", || !is_hot(&journal));
        assert_equal(self.primary, self.replica, &self.name);
    }
}

/// Whether a journal that nobody writes has to be rolled back.
fn is_hot(journal: &Path) -> bool {
    File::open(journal).is_ok_and(|file| sqlite_file::journal::is_hot(&file).expect("it can be read"))
}

#[test]
fn random_workloads_leave_the_replica_equal() {
    let seed = seed();
    let mut trace = Trace::new(seed);
    let mut random = Rng::with_seed(seed);
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    for host in [&primary, &replica] {
        // As on a kernel that cannot pass reads and writes through.
        host.set(one_of(
            &mut random,
            ["mount.passthrough=auto", "mount.passthrough=auto", "mount.passthrough=off"],
        ))
        .start();
    }
    replica.wait_connected();
    let mut databases: Vec<_> =
        (0..3).map(|i| Database::new(format!("{i}.db"), &primary, &replica, &mut random)).collect();
    let (end, mut steps, mut rounds) = (Instant::now() + time(0.65), 0, 0);
    while Instant::now() < end {
        for _ in 0..40 + random.u64(..40) {
            let i = random.usize(..3);
            let step = databases[i].step(&mut random);
            trace.step(step);
            steps += 1;
        }
        trace.step("compare".to_owned());
        for db in &mut databases {
            db.compare(&mut random);
        }
        rounds += 1;
        if rounds % 3 != 0 {
            continue;
        }
        match random.u64(..4) {
            0 => {
                trace.step("the replica is killed".to_owned());
                databases.iter_mut().for_each(|db| db.reader = None);
                replica.kill().start().wait_connected();
            }
            1 => {
                trace.step("the primary is killed".to_owned());
                databases.iter_mut().for_each(Database::close);
                primary.kill().start();
                replica.wait_connected();
            }
            2 => {
                trace.step("the primary stops".to_owned());
                databases.iter_mut().for_each(Database::close);
                primary.restart();
                replica.wait_connected();
            }
            _ => {
                let db = &mut databases[random.usize(..3)];
                trace.step(format!("{} is dropped and made again", db.name));
                db.close();
                fs::remove_file(primary.path(&db.name)).expect("it is there");
                for suffix in ["-journal", "-wal", "-shm"] {
                    let _ = fs::remove_file(primary.path(format!("{}{suffix}", db.name)));
                }
                db.create(&mut random);
            }
        }
    }
    println!("{steps} steps, {rounds} comparisons");
    assert!(rounds > 0);
}

#[test]
fn concurrent_writers_leave_the_replica_equal() {
    let seed = seed();
    let _trace = Trace::new(seed);
    let mut random = Rng::with_seed(seed ^ 1);
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let names = ["wal.db", "delete.db"];
    for (name, mode) in names.iter().zip(["wal", "delete"]) {
        primary.sql(name, &format!("PRAGMA journal_mode={mode}; {TABLES};"));
    }
    let (end, mut rounds) = (Instant::now() + time(0.3), 0);
    while Instant::now() < end {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let (primary, mut random) = (&primary, Rng::with_seed(random.u64(..)));
                scope.spawn(move || {
                    let connections = names.map(|name| primary.open(name));
                    for connection in &connections {
                        connection.busy_timeout(PATIENCE).expect("a timeout can be set");
                    }
                    for i in 0..25 {
                        let connection = &connections[random.usize(..2)];
                        let sql = match i % 5 {
                            0 => TABLES.to_owned(),
                            1 => format!("PRAGMA synchronous={}; {}", random.u64(..3), change(&mut random)),
                            2 => "PRAGMA wal_checkpoint(PASSIVE)".to_owned(),
                            // Writers that begin as readers cannot wait for each other.
                            _ => transaction(&mut random).replace("BEGIN ;", "BEGIN IMMEDIATE;"),
                        };
                        if let Err(error) = try_exec(connection, &sql) {
                            may_fail(&sql, &error);
                            if !connection.is_autocommit() {
                                try_exec(connection, "ROLLBACK").expect("a transaction can be undone");
                            }
                        }
                    }
                });
            }
            // And processes of their own.
            scope.spawn(|| {
                for i in 0..10 {
                    for name in names {
                        primary.sql(name, &format!("CREATE TABLE IF NOT EXISTS p(a); INSERT INTO p VALUES ({i}); UPDATE p SET a = a + 1;"));
                        if replica.path(name).exists() {
                            replica.sql(name, "SELECT count(*) FROM sqlite_schema");
                        }
                    }
                }
            });
        });
        for name in names {
            assert_equal(&primary, &replica, name);
        }
        rounds += 1;
    }
    println!("{rounds} rounds");
    assert!(rounds > 0);
}
