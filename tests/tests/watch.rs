//! `litefs watch` and `litefs wait`.

use litefs_tests::{Fleet, Host, PATIENCE, Role, litefs, run, try_run, wait_for};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

/// A running `litefs watch`.
struct Watch {
    child: Child,
    lines: Receiver<String>,
}

impl Watch {
    fn start(host: &Host, arguments: &[&str]) -> Watch {
        let mut command = host.litefs(&[&["watch"], arguments].concat());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it works");
        let (send, lines) = channel();
        let out = BufReader::new(child.stdout.take().expect("it works"));
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Watch { child, lines }
    }

    #[track_caller]
    fn next(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line")
    }

    /// The next line that is like this.
    #[track_caller]
    fn until(&self, wanted: impl Fn(&str) -> bool) -> String {
        loop {
            let line = self.next();
            if wanted(&line) {
                return line;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn watch_tells_what_is_and_what_changes_also_after_the_agent_was_away() {
    let fleet = Fleet::new();
    let host = fleet.primary("a");
    host.sql("app.db", "CREATE TABLE t(x)");
    let all = Watch::start(&host, &[]);
    let one = Watch::start(&host, &["--json", "conf*.db"]);
    assert_eq!(all.next(), "role primary");
    assert_eq!(all.next(), format!("position app.db {}", host.position("app.db").unwrap()));
    host.sql("app.db", "INSERT INTO t VALUES (1)");
    assert_eq!(all.next(), format!("position app.db {}", host.position("app.db").unwrap()));
    host.sql("conf1.db", "CREATE TABLE t(x)");
    let event: serde_json::Value = serde_json::from_str(&one.next()).unwrap();
    assert_eq!((&event["type"], &event["db"]), (&"tx".into(), &"conf1.db".into()));
    assert_eq!(event["data"]["txID"], "0000000000000001");

    host.stop();
    host.start();
    host.sql("app.db", "INSERT INTO t VALUES (2)");
    let newest = format!("position app.db {}", host.position("app.db").unwrap());
    all.until(|line| line == newest);
}

/// Nothing is lost by a reader that was too slow: the newest position comes.
#[test]
fn watch_makes_up_for_what_it_missed() {
    let fleet = Fleet::new();
    let host = fleet.primary("a");
    let connection = host.open("app.db");
    litefs_tests::exec(&connection, "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; CREATE TABLE t(x);");
    let watch = Watch::start(&host, &["app.db"]);
    watch.next();
    // Stopped, its socket's buffer fills, and the agent drops it.
    let pid = nix::unistd::Pid::from_raw(watch.child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    for number in 0..8000 {
        connection.execute("INSERT INTO t VALUES (?1)", [number]).unwrap();
    }
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    let newest = format!("position app.db {}", host.position("app.db").unwrap());
    watch.until(|line| line == newest);
}

#[test]
fn wait_ends_when_it_is_so_and_not_before() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    // It also waits for the agent.
    let mut early = primary.litefs(&["wait", "--role", "primary", "--position", "app.db=0000000000000002"]);
    let mut early = early.spawn().unwrap();
    primary.start();
    primary.sql("app.db", "CREATE TABLE t(x)");
    assert_eq!(early.try_wait().unwrap(), None);
    let error =
        try_run(&mut primary.litefs(&["wait", "--role", "replica", "--timeout", "100ms"])).unwrap_err();
    assert!(error.contains("not within 100ms: this host is the primary") && error.contains("75"), "{error}");
    primary.sql("app.db", "INSERT INTO t VALUES (1)");
    let ended = wait_for("it ends", PATIENCE, || early.try_wait().unwrap());
    assert!(ended.success());
    run(&mut primary.litefs(&["wait", "--caught-up", "--timeout", "30s"]));

    // A new replica is not caught up before it has what the primary had.
    for number in 0..20 {
        primary.sql(
            &format!("db{number}.db"),
            "CREATE TABLE t(x); INSERT INTO t VALUES (hex(randomblob(20000)))",
        );
    }
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.start_without_waiting();
    run(&mut replica.litefs(&["wait", "--caught-up", "--role", "replica", "--timeout", "60s"]));
    for number in 0..20 {
        let name = format!("db{number}.db");
        assert_eq!(replica.position(&name), primary.position(&name), "{name}");
    }
    primary.sql("app.db", "INSERT INTO t VALUES (2)");
    let position = format!("app.db={}", primary.position("app.db").unwrap());
    run(&mut replica.litefs(&["wait", "--position", &position, "--timeout", "60s"]));
    assert_eq!(replica.sql("app.db", "SELECT max(x) FROM t"), "2");
    primary.stop();
    let error = try_run(&mut replica.litefs(&["wait", "--caught-up", "--timeout", "100ms"]));
    // It may not have noticed yet; then it is caught up with all that it has heard.
    assert!(error.as_ref().is_ok() || error.unwrap_err().contains("not connected"));
}

#[test]
fn watch_tells_on_both_hosts_who_has_a_halt_lock() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql("app.db", "CREATE TABLE t(x)");
    primary.wait_position_equal(&replica, "app.db");
    let watches = [&primary, &replica].map(|host| Watch::start(host, &["app.db"]));
    for watch in &watches {
        watch.until(|line| line.starts_with("position app.db"));
    }
    let sql = "INSERT INTO t VALUES (1)";
    let path = replica.path("app.db").display().to_string();
    let halting = |program: &[&str]| {
        let mut command = Command::new(litefs());
        command.arg("--socket").arg(replica.socket());
        command.args(["run", "--with-halt-lock-on", "app.db", "--"]).args(program);
        command
    };
    run(&mut halting(&["sqlite3", &path, sql]));
    for watch in &watches {
        assert_eq!(watch.until(|line| line.starts_with("halt-lock")), "halt-lock app.db b");
        watch.until(|line| line.starts_with("position app.db"));
        assert_eq!(watch.until(|line| line.starts_with("halt-lock")), "halt-lock app.db");
    }
    // Whoever does not renew loses it, and both are told.
    let mut holding = halting(&["cat"]).stdin(Stdio::piped()).spawn().expect("it works");
    for watch in &watches {
        assert_eq!(watch.until(|line| line.starts_with("halt-lock")), "halt-lock app.db b");
    }
    primary.restart();
    assert_eq!(watches[1].until(|line| line.starts_with("halt-lock")), "halt-lock app.db");
    drop(holding.stdin.take());
    holding.wait().expect("it is our child");
}
