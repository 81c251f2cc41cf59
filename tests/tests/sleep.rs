//! A host that slept: its lease has run out meanwhile, whatever its agent has noticed. `CLOCK_BOOTTIME` says so.

use litefs_tests::library::with_library;
use litefs_tests::*;
use nix::sys::signal::Signal;
use std::time::Duration;

/// Longer than the TTL.
const SLEPT: Duration = Duration::from_secs(3600);

/// Inserts a row for each line of its input, and says what came of it.
const WRITER: &str = r#"
import sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=1)
c.execute("PRAGMA synchronous=NORMAL")
for line in sys.stdin:
    try:
        c.execute("INSERT INTO t DEFAULT VALUES")
        print("ok", flush=True)
    except sqlite3.Error as error:
        print(error, flush=True)
"#;

fn primary(fleet: &Fleet, consul: &Consul, door: &str) -> Host {
    let host = fleet.host("a", Role::Candidate(&consul.address()));
    host.set(&format!("door={door}"));
    host
}

fn start(host: &Host) {
    host.start();
    host.wait_for("it is primary", || host.is_primary());
}

#[test]
fn an_agent_that_slept_takes_no_commit_before_it_has_renewed_its_lease() {
    let (consul, fleet) = (Consul::start(), Fleet::new());
    let clocks = Clocks::new(&fleet.scratch());
    let host = primary(&fleet, &consul, "fuse");
    for (name, value) in clocks.environment() {
        host.env(name, &value);
    }
    start(&host);
    host.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x INTEGER PRIMARY KEY)");
    let epoch = host.epoch();
    // Nobody can tell it anything.
    consul.freeze();
    host.sql("app.db", "INSERT INTO t DEFAULT VALUES");
    clocks.sleep(SLEPT);
    let refused = host.try_sql("app.db", "INSERT INTO t DEFAULT VALUES");
    assert!(refused.is_err(), "a commit without a lease");
    assert_eq!(host.sql("app.db", "SELECT count(*) FROM t"), "1", "readers notice nothing");
    consul.thaw();
    host.wait_for("it leads again", || host.is_primary());
    host.wait_for("writes succeed", || host.try_sql("app.db", "INSERT INTO t DEFAULT VALUES").is_ok());
    assert!(host.epoch() >= epoch);
}

#[test]
fn an_application_behind_the_preload_library_that_slept_commits_nothing_before_the_agent_has_renewed_its_lease()
 {
    let (consul, fleet) = (Consul::start(), Fleet::new());
    let clocks = Clocks::new(&fleet.scratch());
    let host = primary(&fleet, &consul, "preload");
    // Commits do not wait for the agent: the library alone looks at the clock.
    host.set("preload.hold=never");
    start(&host);
    library::sql(&host, "app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x INTEGER PRIMARY KEY)");
    let mut command = with_library(&host, "python3");
    let [(_, moving), place] = clocks.environment();
    command.env("LD_PRELOAD", format!("{} {moving}", liblitefs().display())).envs([place]);
    let mut writer = Client::start(command.arg("-c").arg(WRITER).arg(host.path("app.db")));
    assert_eq!(writer.tell("go"), "ok");
    // What the agent has said last counts.
    host.signal(Signal::SIGSTOP);
    assert_eq!(writer.tell("go"), "ok");
    clocks.sleep(SLEPT);
    let refused = writer.tell("go");
    assert_ne!(refused, "ok", "a commit without a lease");
    host.signal(Signal::SIGCONT);
    clocks.sleep(Duration::ZERO);
    host.wait_for("it goes on", || writer.tell("go") == "ok");
}
