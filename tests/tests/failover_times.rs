//! How long a change of the primary takes for writers: `cargo test -p litefs-tests --test failover_times -- --ignored --nocapture`.

use litefs_tests::*;
use nix::sys::signal::Signal;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Tries to write on one host, again and again, without SQLite's own pauses.
struct Writer {
    database: PathBuf,
    connection: Option<Connection>,
}

impl Writer {
    fn new(host: &Host) -> Writer {
        Writer { database: host.path("app.db"), connection: None }
    }

    /// `false`: this host takes no writes now.
    fn write(&mut self) -> Result<bool, String> {
        if self.connection.is_none() {
            let Ok(connection) =
                Connection::open_with_flags(&self.database, OpenFlags::SQLITE_OPEN_READ_WRITE)
            else {
                return Ok(false);
            };
            connection.busy_timeout(Duration::ZERO).map_err(|error| error.to_string())?;
            self.connection = Some(connection);
        }
        let Some(connection) = &self.connection else { return Ok(false) };
        match connection.execute("INSERT INTO t DEFAULT VALUES", []) {
            Ok(_) => Ok(true),
            Err(error) => match error.sqlite_error_code() {
                Some(ErrorCode::DatabaseBusy) => Ok(false),
                Some(ErrorCode::ReadOnly) => {
                    self.connection = None;
                    Ok(false)
                }
                _ => {
                    self.connection = None;
                    Err(error.to_string())
                }
            },
        }
    }
}

/// When a write succeeded last, and what failed otherwise than by being made to wait.
#[derive(Default)]
struct Seen {
    writes: Mutex<Vec<Instant>>,
    errors: Mutex<Vec<String>>,
}

impl Seen {
    fn write_until(&self, host: &Host, ends: &AtomicBool) {
        let mut writer = Writer::new(host);
        while !ends.load(Ordering::Relaxed) {
            match writer.write() {
                Ok(true) => self.writes.lock().expect("no panic").push(Instant::now()),
                Ok(false) => std::thread::sleep(Duration::from_micros(300)),
                Err(error) => self.errors.lock().expect("no panic").push(error),
            }
        }
    }

    fn count(&self) -> usize {
        self.writes.lock().expect("no panic").len()
    }

    /// The longest time without a write since `from`.
    fn stalled_since(&self, from: Instant) -> Duration {
        let mut all = self.writes.lock().expect("no panic").clone();
        all.sort();
        let begin = all.iter().rposition(|at| *at < from).unwrap_or(0);
        all[begin..].windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }
}

fn pair(ttl: &str) -> (Fleet, Consul, Host, Host) {
    let (fleet, consul) = (Fleet::new(), Consul::start());
    let address = consul.address();
    let host = |name| {
        let host = fleet.host(name, Role::Candidate(&address));
        host.set(&format!("lease.ttl={ttl}")).start();
        host
    };
    let a = host("a");
    a.wait_for("the first host is primary", || a.is_primary());
    let b = host("b");
    b.wait_for("it follows", || b.follows(&a));
    a.sql(
        "app.db",
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; CREATE TABLE t(x INTEGER PRIMARY KEY)",
    );
    a.wait_position_equal(&b, "app.db");
    (fleet, consul, a, b)
}

/// Until a write succeeds there.
fn writable(database: &Path, since: Instant) -> Duration {
    let mut writer = Writer { database: database.to_owned(), connection: None };
    wait_for("the host takes writes", PATIENCE, || writer.write().unwrap_or(false).then(|| since.elapsed()))
}

fn show(row: &str, mut times: Vec<Duration>, note: &str) {
    times.sort();
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
    println!(
        "| {row} | {:.1} ms | {:.1} ms | {:.1} ms | {} | {note} |",
        at(50).as_secs_f64() * 1e3,
        at(99).as_secs_f64() * 1e3,
        at(100).as_secs_f64() * 1e3,
        times.len()
    );
}

#[test]
#[ignore = "a measurement, not a test"]
fn how_long_writers_wait() {
    println!("| what | median | p99 | longest | times | |\n|---|---:|---:|---:|---:|---|");
    let (_fleet, _consul, a, b) = pair("10s");
    let (seen, ends) = (Seen::default(), AtomicBool::new(false));
    let mut stalls = Vec::new();
    std::thread::scope(|scope| {
        for host in [&a, &b] {
            let (seen, ends) = (&seen, &ends);
            scope.spawn(move || seen.write_until(host, ends));
        }
        for round in 0..100 {
            let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
            let before = seen.count();
            wait_for("writes go on", PATIENCE, || (seen.count() > before + 20).then_some(()));
            let begun = Instant::now();
            run(&mut from.litefs(&["handoff", "--to", to.name()]));
            let before = seen.count();
            wait_for("writes go on", PATIENCE, || (seen.count() > before + 20).then_some(()));
            to.wait_for("it leads", || to.is_primary());
            from.wait_for("it follows", || from.follows(to));
            stalls.push(seen.stalled_since(begun));
        }
        ends.store(true, Ordering::Relaxed);
    });
    let errors = seen.errors.lock().expect("no panic").clone();
    let rows: usize = a.sql("app.db", "SELECT count(*) FROM t").parse().expect("a number");
    assert_eq!(rows, seen.count(), "every acknowledged write is there");
    show("planned handoff, writers stalled", stalls, &format!("{} errors, nothing lost", errors.len()));
    drop((a, b));

    let (_fleet, _consul, a, b) = pair("10s");
    let mut times = Vec::new();
    for round in 0..10 {
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let begun = Instant::now();
        from.signal(Signal::SIGTERM);
        times.push(writable(&to.path("app.db"), begun));
        assert!(from.wait_ended().success());
        from.start();
        from.wait_for("it follows", || from.follows(to));
    }
    show("service stop, other host writable", times, "");

    let mut times = Vec::new();
    for _ in 0..10 {
        let begun = Instant::now();
        a.kill().start();
        times.push(writable(&a.path("app.db"), begun));
        b.wait_for("it follows", || b.follows(&a));
    }
    show("agent crash, same host writable again (started at once, without systemd)", times, "");

    let killed = |rounds: usize, then: &dyn Fn(&Host)| -> Vec<_> {
        let round = |round| {
            let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
            from.wait_position_equal(to, "app.db");
            let begun = Instant::now();
            from.kill();
            then(from);
            let time = writable(&to.path("app.db"), begun);
            from.start();
            from.wait_for("it follows", || from.follows(to));
            time
        };
        (0..rounds).map(round).collect()
    };
    let times = killed(10, &|from| {
        // What systemd does when it gives an agent up.
        let agent = from.agent_command();
        let mut release = Command::new(agent.get_program());
        release.arg("release-lease").args(agent.get_args().filter(|word| *word != "agent"));
        run(&mut release);
    });
    show("agent crash that stays down, other host writable", times, "");

    let times = killed(3, &|_| ());
    show("host death, other host writable", times, "lease.ttl 10 s");
}
