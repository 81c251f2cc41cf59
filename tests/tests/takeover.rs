//! The agent is killed, left and replaced while applications work in its mount: they see a pause, never an error.
//!
//! The applications are processes of their own: whoever starts an agent must not have files of its mount open, since the
//! new process closes them before it is the agent.

use litefs_tests::{Fleet, Host, Role, assert_equal, is_about_fuse};
use rusqlite::Connection;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// How often an agent is killed in a test.
const KILLS: usize = 10;

/// Applications wait so long for the next agent.
const KEEP: &str = "mount.takeover-wait=60s";

const WORK: &str = "TAKEOVER_TEST_WORK";
const DATABASE: &str = "TAKEOVER_TEST_DATABASE";
const MODE: &str = "TAKEOVER_TEST_MODE";
const PROGRESS: &str = "TAKEOVER_TEST_PROGRESS";

/// An application: this test program again, which then runs `application` alone.
struct Application {
    what: String,
    process: Child,
    progress: PathBuf,
}

impl Application {
    fn start(fleet: &Fleet, host: &Host, database: &str, work: &str, mode: &str) -> Application {
        let what = format!("{work} {database} on {}", host.name());
        let progress = fleet.scratch().join(what.replace([' ', '.'], "-"));
        fs::write(&progress, [0; 8]).expect("the scratch directory is writable");
        // A file: an error that a test waits for must not look like that of a test.
        let output = File::create(progress.with_extension("out")).expect("the scratch directory is writable");
        let process = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "application", "--nocapture"])
            .env(WORK, work)
            .env(DATABASE, host.path(database))
            .env(MODE, mode)
            .env(PROGRESS, &progress)
            .stdout(output.try_clone().expect("a second descriptor"))
            .stderr(output)
            .spawn()
            .expect("this program runs");
        Application { what, process, progress }
    }

    /// What it has printed.
    fn output(&self) -> String {
        fs::read_to_string(self.progress.with_extension("out")).expect("its output is text")
    }

    /// How many commits, or reads, it has done.
    fn done(&self) -> i64 {
        let mut bytes = [0; 8];
        let read = File::open(&self.progress).and_then(|file| file.read_exact_at(&mut bytes, 0));
        read.map_or(0, |()| i64::from_le_bytes(bytes))
    }

    #[track_caller]
    fn wait_for_more(&mut self, host: &Host, more: i64) {
        let before = self.done();
        host.wait_for(&format!("{} goes on", self.what), || {
            let ended = self.process.try_wait().expect("it is our child");
            assert!(
                ended.is_none(),
                "{} ended with {ended:?}: it saw an error\n{}",
                self.what,
                self.output()
            );
            self.done() >= before + more
        });
    }

    /// Ends it; gives how much it has done.
    #[track_caller]
    fn stop(mut self) -> i64 {
        fs::write(self.progress.with_extension("stop"), []).expect("the scratch directory is writable");
        let status = self.process.wait().expect("it is our child");
        assert!(status.success(), "{} ended with {status}: it saw an error\n{}", self.what, self.output());
        self.done()
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        let _ = self.process.kill();
    }
}

/// What the processes of [`Application`] run; on its own it does nothing.
#[test]
fn application() {
    if is_about_fuse("there is no mount to take over") {
        return;
    }
    let Ok(work) = std::env::var(WORK) else { return };
    let var = |name| std::env::var(name).expect("set by the test");
    let path = PathBuf::from(var(PROGRESS));
    let progress = File::options().write(true).open(&path).expect("the progress file");
    let stop = path.with_extension("stop");
    let db = Connection::open(var(DATABASE)).expect("the database opens");
    db.busy_timeout(Duration::from_secs(60)).expect("a timeout");
    let step: &mut dyn FnMut(i64) = match work.as_str() {
        "writer" => {
            let mode = var(MODE);
            let set = db.pragma_update_and_check(None, "journal_mode", &mode, |row| row.get::<_, String>(0));
            assert_eq!(set.expect("a mode").to_uppercase(), mode);
            db.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x)").expect("a table");
            &mut |n| {
                // Now and then a transaction of many pages.
                let bytes = if n % 50 == 0 { 60_000 } else { 100 };
                db.execute("INSERT INTO t VALUES (?1, randomblob(?2))", (n, bytes)).expect("a commit");
            }
        }
        "reader" => {
            let mut seen = 0;
            let db = &db;
            &mut move |_| {
                let sql = "SELECT count(*), coalesce(max(id), 0) FROM t";
                let (rows, newest) = db
                    .query_row(sql, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))
                    .expect("a read");
                assert_eq!(rows, newest, "a state that was never committed");
                assert!(rows >= seen, "{rows} rows after {seen}");
                seen = rows;
            }
        }
        other => panic!("no such work: {other}"),
    };
    let mut done = 0;
    while !stop.exists() {
        done += 1;
        step(done);
        progress.write_all_at(&i64::to_le_bytes(done), 0).expect("progress is written");
    }
    if work == "writer" {
        let check = db.query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0));
        assert_eq!(check.expect("a check"), "ok");
    }
}

fn rows(host: &Host, database: &str) -> i64 {
    host.sql(database, "SELECT count(*) FROM t").parse().expect("a number")
}

#[track_caller]
fn assert_taken_over(host: &Host, times: usize) {
    let log = host.log();
    assert_eq!(log.matches("took over the mount").count(), times, "{log}");
}

/// Databases of the tests and their journal modes.
const DATABASES: [(&str, &str); 2] = [("wal.db", "WAL"), ("delete.db", "DELETE")];

#[test]
fn applications_on_the_primary_go_on_while_its_agent_is_killed_again_and_again() {
    if is_about_fuse("there is no mount to take over") {
        return;
    }
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set(KEEP).start();
    let replica = fleet.replica("b", &primary);
    let mut writers =
        DATABASES.map(|(name, mode)| Application::start(&fleet, &primary, name, "writer", mode));
    writers.iter_mut().for_each(|w| w.wait_for_more(&primary, 1));
    let mut readers = DATABASES.map(|(name, _)| Application::start(&fleet, &primary, name, "reader", ""));
    for kill in 1..=KILLS {
        writers.iter_mut().for_each(|w| w.wait_for_more(&primary, 20));
        readers.iter_mut().for_each(|r| r.wait_for_more(&primary, 2));
        primary.kill();
        primary.start();
        assert_taken_over(&primary, kill);
    }
    writers.iter_mut().for_each(|w| w.wait_for_more(&primary, 20));
    readers.into_iter().for_each(|reader| {
        reader.stop();
    });
    let acknowledged = writers.map(Application::stop);
    for ((name, _), acknowledged) in DATABASES.iter().zip(acknowledged) {
        assert_eq!(rows(&primary, name), acknowledged, "{name}");
        assert_equal(&primary, &replica, name);
    }
    primary.stop();
}

#[test]
fn readers_on_a_replica_go_on_while_its_agent_is_killed_while_it_applies() {
    if is_about_fuse("there is no mount to take over") {
        return;
    }
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.set(KEEP).start();
    replica.wait_connected();
    let mut writers =
        DATABASES.map(|(name, mode)| Application::start(&fleet, &primary, name, "writer", mode));
    writers.iter_mut().for_each(|w| w.wait_for_more(&primary, 1));
    for (name, _) in DATABASES {
        // The first transaction may be the change of the journal mode alone.
        replica.wait_for(&format!("{name} has its table there"), || {
            replica.try_sql(name, "SELECT count(*) FROM t").is_ok()
        });
    }
    let mut readers = DATABASES.map(|(name, _)| Application::start(&fleet, &replica, name, "reader", ""));
    for kill in 1..=KILLS {
        writers.iter_mut().for_each(|w| w.wait_for_more(&primary, 20));
        readers.iter_mut().for_each(|r| r.wait_for_more(&replica, 2));
        // The harness fails if the dead process does not go away by itself.
        replica.kill();
        replica.start();
        assert_taken_over(&replica, kill);
    }
    let acknowledged = writers.map(Application::stop);
    for (((name, _), acknowledged), reader) in DATABASES.iter().zip(acknowledged).zip(readers) {
        assert_eq!(rows(&primary, name), acknowledged, "{name}");
        assert_equal(&primary, &replica, name);
        reader.stop();
    }
    replica.stop();
}

#[test]
fn a_mount_that_nobody_takes_over_is_aborted_after_the_wait() {
    if is_about_fuse("there is no mount to take over") {
        return;
    }
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("mount.takeover-wait=200ms").start();
    let mut writer = Application::start(&fleet, &primary, "app.db", "writer", "WAL");
    writer.wait_for_more(&primary, 5);
    primary.kill();
    primary.wait_for("the application gets an error", || {
        writer.process.try_wait().expect("our child").is_some()
    });
    let output = writer.output();
    assert!(output.contains("disk I/O error"), "{output}");
    primary.start();
    assert_taken_over(&primary, 0);
    assert!(rows(&primary, "app.db") >= writer.done());
}

/// The agent's binary under another name, as after an upgrade.
fn upgraded(dir: &Path, times: usize) -> PathBuf {
    let path = dir.join(format!("litefs-{times}"));
    // By another process: a descriptor for writing that a test beside this one inherits would keep it from being run.
    let copied = Command::new("cp").arg(litefs_tests::litefs()).arg(&path).status();
    assert!(copied.expect("cp runs").success(), "the binary can be copied");
    path
}

#[test]
fn an_agent_that_is_told_to_leave_its_mount_is_followed_by_another_binary() {
    if is_about_fuse("there is no mount to take over") {
        return;
    }
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set(KEEP).start();
    let replica = fleet.replica("b", &primary);
    let mut writers =
        DATABASES.map(|(name, mode)| Application::start(&fleet, &primary, name, "writer", mode));
    for times in 1..=3 {
        writers.iter_mut().for_each(|w| w.wait_for_more(&primary, 20));
        primary.leave();
        primary.use_binary(&upgraded(&fleet.scratch(), times));
        primary.start();
        assert_taken_over(&primary, times);
    }
    writers.iter_mut().for_each(|w| w.wait_for_more(&primary, 20));
    let acknowledged = writers.map(Application::stop);
    for ((name, _), acknowledged) in DATABASES.iter().zip(acknowledged) {
        assert_eq!(rows(&primary, name), acknowledged, "{name}");
        assert_equal(&primary, &replica, name);
    }
    primary.stop();
}
