//! Applications, the primary's agent and the replica's agent are killed at random, under load, again and again.
//!
//! Each writer numbers its transactions and notes, outside of the mounts, which of them were acknowledged. A
//! transaction writes its row and its number, so that any mixture of two states is seen by everyone who reads.
//!
//! `LITEFS_TORTURE_ROUNDS` (1) lengthens the test, `LITEFS_TORTURE_SEED` (1) changes what is killed when.

use fastrand::Rng;
use litefs_tests::{Fleet, Host, PATIENCE, Shell, assert_equal};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long one round kills.
const ROUND: Duration = Duration::from_secs(20);

/// Name, journal mode and `synchronous` of each database. SIGKILL is no power failure: NORMAL may lose nothing.
const DATABASES: [(&str, &str, &str); 4] = [
    ("wal-full.db", "WAL", "FULL"),
    ("wal-normal.db", "WAL", "NORMAL"),
    ("delete-full.db", "DELETE", "FULL"),
    ("delete-normal.db", "DELETE", "NORMAL"),
];
const WRITERS_PER_DATABASE: u64 = 2;

fn pause(random: &mut Rng, from_ms: u64, to_ms: u64) {
    std::thread::sleep(Duration::from_millis(from_ms + random.u64(..(to_ms - from_ms))));
}

/// A host whose agent is killed: an application's error is excused only when the agent was killed meanwhile.
struct Victim {
    host: Host,
    /// Grows when it is killed and when it is back: odd while it is down.
    kills: AtomicU64,
}

impl Victim {
    fn new(host: Host) -> Victim {
        Victim { host, kills: AtomicU64::new(0) }
    }

    fn kill_and_start(&self, random: &mut Rng) {
        self.kills.fetch_add(1, Ordering::SeqCst);
        self.host.kill();
        // Sometimes applications meet the dead mount for a while.
        if random.u64(..2) == 0 {
            pause(random, 0, 150);
        }
        self.host.start();
        self.kills.fetch_add(1, Ordering::SeqCst);
    }

    fn open(&self, database: &str) -> Application<'_> {
        let kills = self.kills.load(Ordering::SeqCst);
        // The shell would end if it could not open the database, so that is attached later.
        let shell = Shell::open(Path::new(":memory:"));
        Application { victim: self, database: database.to_owned(), kills, shell }
    }
}

/// A process that uses a database.
struct Application<'a> {
    victim: &'a Victim,
    database: String,
    kills: u64,
    shell: Shell,
}

impl Application<'_> {
    fn connect(&mut self) -> Result<(), ()> {
        // Never created: while the agent is replaced there may be nothing but an empty directory.
        let path = self.victim.host.path(&self.database);
        // Writers do not queue for SQLite's lock, so on a slow disk one waits for several commits of the others. Nothing is
        // refused here, so nobody waits in vain.
        self.ask(".timeout 20000")?;
        self.ask(&format!("ATTACH 'file:{}?mode=rw' AS d;", path.display())).map(drop)
    }

    /// Runs SQL. An error is fine if the agent was killed since the application has begun, or is down, and if it is
    /// none that says the database is damaged.
    fn ask(&mut self, sql: &str) -> Result<String, ()> {
        let answer = self.shell.ask(sql);
        if !answer.contains("rror") {
            return Ok(answer);
        }
        let on = format!("{} on {}", self.database, self.victim.host.name());
        for never in ["malformed", "not a database", "constraint", "syntax"] {
            assert!(!answer.contains(never), "{sql:?} in {on}: {answer}");
        }
        let excused = self.kills % 2 == 1 || self.victim.kills.load(Ordering::SeqCst) != self.kills;
        assert!(excused, "an error although nobody was killed: {sql:?} in {on}: {answer}");
        Err(())
    }
}

/// Writes until it is told to stop, is killed itself now and then, and gives the number of its last acknowledged
/// transaction.
fn write(primary: &Victim, database: &str, synchronous: &str, id: u64, seed: u64, done: &AtomicBool) -> u64 {
    let mut random = Rng::with_seed(seed);
    let (mut tried, mut acknowledged) = (0, 0);
    let mut connected: Option<Application<'_>> = None;
    let mut tries_since = Instant::now();
    while !done.load(Ordering::Relaxed) {
        let Some(application) = &mut connected else {
            let mut application = primary.open(database);
            let setup = format!("PRAGMA d.synchronous={synchronous}; PRAGMA d.cache_size=20;");
            let last = format!("SELECT n FROM last WHERE w = {id};");
            let found = application
                .connect()
                .and_then(|()| application.ask(&setup))
                .and_then(|_| application.ask(&last));
            if let Ok(last) = found {
                let last: u64 = last.parse().expect("each writer has a number");
                assert!(
                    (acknowledged..=tried).contains(&last),
                    "{database}: writer {id} was told of {acknowledged}, had tried {tried}, and finds {last}"
                );
                tried = last;
                acknowledged = last;
                connected = Some(application);
                tries_since = Instant::now();
            } else {
                assert!(tries_since.elapsed() < PATIENCE, "writer {id} of {database} cannot connect");
                pause(&mut random, 1, 10);
            }
            continue;
        };
        // Housekeeping, which changes nothing that anyone sees.
        let housekeeping = match random.u64(..300) {
            0 => Some("VACUUM d;"),
            1 => Some("PRAGMA d.wal_checkpoint(TRUNCATE);"),
            2 => Some("PRAGMA d.wal_checkpoint(RESTART);"),
            _ => None,
        };
        if let Some(sql) = housekeeping {
            if application.ask(sql).is_err() {
                connected = None;
            }
            continue;
        }
        tried += 1;
        // Now and then a transaction does not fit into SQLite's cache, or into the agent's memory.
        let bytes = match random.u64(..200) {
            0 => 2_000_000,
            1..10 => 200_000,
            _ => random.u64(..3000),
        };
        let sql = format!(
            "BEGIN IMMEDIATE; INSERT INTO row VALUES ({id}, {tried}, randomblob({bytes})); \
             UPDATE last SET n = {tried} WHERE w = {id}; COMMIT;"
        );
        if random.u64(..60) == 0 {
            application.shell.send(&sql);
            if random.u64(..3) > 0 {
                pause(&mut random, 0, 4);
            }
            if let Some(application) = connected.take() {
                application.shell.kill();
            }
        } else if application.ask(&sql).is_ok() {
            acknowledged = tried;
        } else {
            connected = None;
        }
    }
    acknowledged
}

/// Reads until it is told to stop: every state must be whole, and none older than one seen before.
fn read(victim: &Victim, seed: u64, done: &AtomicBool) -> u64 {
    let mut random = Rng::with_seed(seed);
    let mut seen = [0; DATABASES.len()];
    let mut looks = 0;
    while !done.load(Ordering::Relaxed) {
        let i = random.usize(..DATABASES.len());
        let mut application = victim.open(DATABASES[i].0);
        if application.connect().is_err() {
            continue;
        }
        for _ in 0..random.u64(..20) + 1 {
            let sql = "SELECT (SELECT sum(n) FROM last), (SELECT count(*) FROM row), \
                       (SELECT total(m) FROM (SELECT max(n) AS m FROM row GROUP BY w));";
            let Ok(answer) = application.ask(sql) else { break };
            let numbers: Vec<f64> = answer.split('|').map(|n| n.parse().expect("a number")).collect();
            let (name, host) = (DATABASES[i].0, victim.host.name());
            assert!(
                numbers[0] == numbers[1] && numbers[1] == numbers[2],
                "{name} on {host} is a mixture of states: {answer}"
            );
            assert!(numbers[0] >= seen[i] as f64, "{name} on {host} went back from {} to {answer}", seen[i]);
            seen[i] = numbers[0] as u64;
            looks += 1;
        }
    }
    looks
}

fn round(seed: u64) {
    println!("torture with LITEFS_TORTURE_SEED={seed}");
    let mut random = Rng::with_seed(seed);
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for (name, mode, _) in DATABASES {
        primary.sql(
            name,
            &format!(
                "PRAGMA journal_mode={mode};\n\
                 CREATE TABLE row(w INTEGER, n INTEGER, body, PRIMARY KEY(w, n)) WITHOUT ROWID;\n\
                 CREATE TABLE last(w INTEGER PRIMARY KEY, n INTEGER);\n\
                 INSERT INTO last SELECT value, 0 FROM generate_series(0, {});",
                WRITERS_PER_DATABASE - 1
            ),
        );
        primary.wait_position_equal(&replica, name);
    }
    let (primary, replica) = (Victim::new(primary), Victim::new(replica));
    let done = AtomicBool::new(false);
    let acknowledged = std::thread::scope(|scope| {
        // Dropped in any case, so that nobody writes on after somebody has panicked.
        let stop = StopAtEnd(&done);
        let writers: Vec<_> = DATABASES
            .iter()
            .flat_map(|database| (0..WRITERS_PER_DATABASE).map(move |id| (database, id)))
            .map(|((name, _, synchronous), id)| {
                let (primary, done, seed) = (&primary, &done, random.u64(..));
                scope.spawn(move || write(primary, name, synchronous, id, seed, done))
            })
            .collect();
        let readers: Vec<_> = [&primary, &replica]
            .map(|victim| {
                let (done, seed) = (&done, random.u64(..));
                scope.spawn(move || read(victim, seed, done))
            })
            .into_iter()
            .collect();
        let end = Instant::now() + ROUND;
        while Instant::now() < end {
            pause(&mut random, 100, 900);
            if writers.iter().chain(&readers).any(|thread| thread.is_finished()) {
                break;
            }
            let victim = if random.u64(..2) == 0 { &primary } else { &replica };
            victim.kill_and_start(&mut random);
        }
        drop(stop);
        let acknowledged: Vec<u64> = writers.into_iter().map(|w| w.join().expect("a writer")).collect();
        for reader in readers {
            let looks = reader.join().expect("a reader");
            assert!(looks > 0, "a reader never saw anything");
        }
        acknowledged
    });
    let kills = |victim: &Victim| victim.kills.load(Ordering::SeqCst) / 2;
    println!(
        "killed the primary {} times, the replica {} times; acknowledged: {acknowledged:?}",
        kills(&primary),
        kills(&replica)
    );

    replica.host.wait_connected();
    for ((name, ..), acknowledged) in DATABASES.iter().zip(acknowledged.chunks(WRITERS_PER_DATABASE as usize))
    {
        assert_equal(&primary.host, &replica.host, name);
        for (id, acknowledged) in acknowledged.iter().enumerate() {
            assert!(*acknowledged > 0, "writer {id} of {name} was never told of a commit");
            let rows = format!(
                "SELECT (SELECT n FROM last WHERE w = {id}), count(*), max(n) FROM row WHERE w = {id}"
            );
            let found = replica.host.sql(name, &rows);
            let numbers: Vec<u64> = found.split('|').map(|n| n.parse().expect("a number")).collect();
            assert!(numbers.iter().all(|n| *n == numbers[0]), "{name}: writer {id} left {found}");
            assert!(numbers[0] >= *acknowledged, "{name}: writer {id} lost acknowledged rows: {found}");
        }
    }
    for victim in [&primary, &replica] {
        let diverged = victim.host.data().join("diverged");
        let kept: Vec<_> = fs::read_dir(diverged).expect("it is there").flatten().collect();
        assert!(kept.is_empty(), "{} had transactions that nobody else had: {kept:?}", victim.host.name());
    }
}

/// Tells all to stop when it is dropped.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn number(variable: &str) -> u64 {
    std::env::var(variable)
        .map_or(1, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

#[test]
fn whoever_is_killed_nothing_acknowledged_is_lost_and_replicas_stay_exact() {
    let seed = number("LITEFS_TORTURE_SEED");
    for i in 0..number("LITEFS_TORTURE_ROUNDS") {
        round(seed + i);
    }
}
