//! What an operator does: looking at a node, copying databases out and in, stopping.

use litefs_tests::{
    Fleet, Host, PATIENCE, Role, Shell, assert_equal, insert_until_it_fails, integrity_check, is_preload,
    litefs, run, sqlite3, wait_for,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a command printed and how it ended.
#[derive(Debug)]
struct Outcome {
    code: i32,
    out: String,
    err: String,
}

fn outcome(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().expect("the program runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    let code = output.status.code().expect("it was not killed");
    Outcome { code, out: text(&output.stdout), err: text(&output.stderr) }
}

impl Outcome {
    #[track_caller]
    fn succeeds(self, says: &[&str]) -> Outcome {
        assert_eq!(self.code, 0, "{self:?}");
        for text in says {
            assert!(self.out.contains(text), "{text:?} is not in {self:?}");
        }
        self
    }

    #[track_caller]
    fn fails(self, code: i32, says: &[&str]) -> Outcome {
        assert_eq!(self.code, code, "{self:?}");
        for text in says {
            assert!(self.err.contains(text), "{text:?} is not in {self:?}");
        }
        self
    }
}

/// A command with a path at its end.
fn with_path(mut command: Command, path: &Path) -> Command {
    command.arg(path);
    command
}

fn is_txid(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.len() == 16 && u64::from_str_radix(text, 16).is_ok())
}

/// A database file of its own with `rows` rows, outside of all mounts.
fn source(dir: &Path, name: &str, rows: u32) -> PathBuf {
    let path = dir.join(name);
    sqlite3(
        &path,
        &format!(
            "CREATE TABLE t(x);\n\
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})\n\
             INSERT INTO t SELECT 'row ' || i FROM n;"
        )
        .replace(")\nINSERT", ") INSERT"),
    );
    path
}

/// One `GET` on the TCP port; the body.
fn http_get(host: &Host, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", host.port())).expect("the port is open");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("it is read");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it is answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    body.to_owned()
}

#[test]
fn status_and_list_show_roles_positions_and_followers() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    fs::write(primary.path("notes.txt"), "no database").unwrap();
    let position = assert_equal(&primary, &replica, "app.db");

    let shown = outcome(&mut primary.litefs(&["status"])).succeeds(&["node a: primary", "app.db", &position]);
    assert!(shown.out.contains("FOLLOWER") && shown.out.contains("notes.txt"), "{shown:?}");
    outcome(&mut replica.litefs(&["status"])).succeeds(&[
        "node b: replica",
        "upstream a",
        "connected",
        &position,
    ]);
    outcome(&mut replica.litefs(&["list"])).succeeds(&["app.db", &position, "8.00 KiB"]);

    let json = outcome(&mut primary.litefs(&["status", "--json"])).succeeds(&[]).out;
    let status: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(status["cluster"], "db");
    assert_eq!(status["node"]["name"], "a");
    assert_eq!(status["role"]["name"], "primary");
    assert_eq!(status["role"]["epoch"], 1);
    assert_eq!(status["role"]["upstream"], Value::Null);
    assert_eq!(status["mount"]["door"], if is_preload() { "preload" } else { "fuse" });
    assert_eq!(status["mount"]["dir"], primary.mount().to_str().unwrap());
    let db = &status["databases"][0];
    assert!(is_txid(&db["txid"]) && is_txid(&db["checksum"]), "{db}");
    assert_eq!(
        (&db["name"], &db["page_size"], &db["pages"], &db["journal_mode"], &db["state"], &db["lag"]),
        (&"app.db".into(), &4096.into(), &2.into(), &"wal".into(), &"ok".into(), &Value::Null)
    );
    assert_eq!(status["files_not_replicated"], serde_json::json!(["notes.txt"]));
    assert!(status["log"]["durable_lsn"].as_u64() > status["log"]["oldest_lsn"].as_u64(), "{status}");
    let follower = &status["followers"][0];
    assert_eq!((&follower["name"], &follower["databases"][0]["txid"]), (&"b".into(), &db["txid"]));
    assert_eq!(follower["databases"][0]["lag_transactions"], 0);

    let status = replica.status();
    assert_eq!(status["role"]["upstream"]["url"], primary.url());
    assert_eq!(status["role"]["upstream"]["hostname"], "a");
    assert_eq!(
        status["databases"][0]["lag"],
        serde_json::json!({ "transactions": 0, "bytes": 0, "ms": 0 }),
        "{status}"
    );

    // Exit codes: 1 when something is wrong, 3 when nobody answers.
    primary.stop();
    replica.wait_for("the upstream is seen to be gone", || {
        replica.status()["role"]["upstream"]["connected"] == false
    });
    let shown = outcome(&mut replica.litefs(&["status"]));
    assert!(shown.code == 1 && shown.out.contains("not connected to the upstream"), "{shown:?}");
    let shown = outcome(&mut replica.litefs(&["status", "--json"]));
    assert!(shown.code == 1 && serde_json::from_str::<Value>(&shown.out).is_ok(), "{shown:?}");
    let socket = primary.socket();
    outcome(&mut primary.litefs(&["status"])).fails(3, &[socket.to_str().unwrap(), "not running"]);
    outcome(&mut primary.litefs(&["list"])).fails(3, &["not running"]);
}

#[test]
fn an_export_is_exact_and_replaces_its_target_only_when_it_is_whole() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let dir = fleet.scratch();
    primary.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    primary.wait_position_equal(&replica, "app.db");
    // Rows that are only in the WAL are exported as well.
    let mut writer = Shell::open(&primary.path("app.db"));
    writer.run("INSERT INTO t VALUES (2);");
    let position = primary.wait_position_equal(&replica, "app.db");
    for host in [&primary, &replica] {
        let path = dir.join(host.name());
        fs::write(&path, "an older export").unwrap();
        outcome(&mut with_path(host.litefs(&["export", "app.db"]), &path)).succeeds(&[&position]);
        integrity_check(&path, "an export");
        assert_eq!(sqlite3(&path, "SELECT * FROM t"), "1\n2");
    }
    let out = dir.join("out.db");
    outcome(&mut with_path(primary.litefs(&["export", "none.db"]), &out)).fails(66, &["no database none.db"]);
    assert!(!out.exists());
    outcome(&mut with_path(primary.litefs(&["export", "../app.db"]), &out)).fails(64, &["../app.db"]);
    let nowhere = dir.join("nowhere/out.db");
    outcome(&mut with_path(primary.litefs(&["export", "app.db"]), &nowhere))
        .fails(73, &[nowhere.to_str().unwrap()]);
    // SQLite would take it for the WAL of the export.
    fs::write(&out, "somebody's database").unwrap();
    fs::write(dir.join("out.db-wal"), "its WAL").unwrap();
    outcome(&mut with_path(primary.litefs(&["export", "app.db"]), &out)).fails(73, &["out.db-wal"]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "somebody's database");
    let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "an export left something behind: {left:?}");
}

#[test]
fn an_import_makes_a_database_on_all_hosts() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let path = source(&fleet.scratch(), "source.db", 1000);
    let before = fs::read(&path).unwrap();
    for name in ["new.db", "below/a/directory.db"] {
        outcome(&mut with_path(primary.litefs(&["import", name]), &path))
            .succeeds(&[name, "0000000000000001/"]);
        assert_equal(&primary, &replica, name);
        assert_eq!(replica.sql(name, "SELECT count(*) FROM t"), "1000");
        assert_eq!(primary.txid(name), 1);
    }
    assert_eq!(fs::read(&path).unwrap(), before, "the imported file was changed");
}

#[test]
fn an_import_over_a_live_database_is_seen_by_open_connections() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let path = source(&fleet.scratch(), "source.db", 2000);
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        primary.sql(&name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE old(x);"));
        primary.wait_position_equal(&replica, &name);
        let mut connections: Vec<Shell> =
            [&primary, &replica].iter().map(|host| Shell::open(&host.path(&name))).collect();
        for connection in &mut connections {
            assert_eq!(connection.run("SELECT name FROM sqlite_schema;"), "old");
        }
        primary.import(&name, &path);
        primary.wait_position_equal(&replica, &name);
        for connection in &mut connections {
            assert_eq!(connection.run("SELECT name FROM sqlite_schema; SELECT count(*) FROM t;"), "t\n2000");
        }
        // It goes on as an ordinary database.
        assert_eq!(connections[0].ask("INSERT INTO t VALUES ('after'); SELECT count(*) FROM t;"), "2001");
        drop(connections);
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn an_import_that_cannot_be_right_is_refused_and_changes_nothing() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let dir = fleet.scratch();
    primary.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES ('kept');");
    let position = primary.wait_position_equal(&replica, "app.db");
    let import = |host: &Host, path: &Path| outcome(&mut with_path(host.litefs(&["import", "app.db"]), path));

    let good = source(&dir, "good.db", 10);
    import(&replica, &good).fails(69, &["not the primary", "run it on a"]);

    let hot = dir.join("hot.db");
    let mut user = Shell::open(&hot);
    user.run("PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    import(&primary, &hot).fails(65, &["hot.db-wal", "wal_checkpoint"]);
    drop(user);

    let text = dir.join("text.db");
    fs::write(&text, "This is no database. ".repeat(500)).unwrap();
    import(&primary, &text).fails(65, &["text.db", "not an SQLite database"]);
    let cut = dir.join("cut.db");
    fs::write(&cut, &fs::read(&good).unwrap()[..5000]).unwrap();
    import(&primary, &cut).fails(65, &["cut.db"]);
    let empty = dir.join("empty.db");
    fs::write(&empty, "").unwrap();
    import(&primary, &empty).fails(65, &["empty.db"]);
    import(&primary, &dir.join("missing.db")).fails(66, &["missing.db"]);

    // Over the network nobody may import, whatever he sends.
    let mut stream = TcpStream::connect(("127.0.0.1", primary.port())).unwrap();
    write!(stream, "POST /v1/import?name=app.db HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    assert!(line.contains("403"), "{line}");

    assert_eq!(assert_equal(&primary, &replica, "app.db"), position);
    assert_eq!(primary.sql("app.db", "SELECT * FROM t"), "kept");
    let staged = fs::read_dir(primary.data().join("staging")).unwrap().count();
    assert_eq!(staged, 0, "a refused import left files behind");
}

#[test]
fn transactions_in_files_of_their_own_are_listed_dumped_and_verified() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    // Larger than what goes into a segment of the log.
    primary.sql("big.db", "CREATE TABLE t(x);\nINSERT INTO t VALUES (randomblob(10000000));");
    let files = primary.data().join("ltx");
    let list = outcome(&mut with_path(primary.litefs(&["ltx", "list", "--json"]), &files)).succeeds(&[]);
    let list: Value = serde_json::from_str(&list.out).unwrap();
    let file = &list[0];
    assert_eq!((&file["ok"], &file["page_size"], &file["epoch"]), (&true.into(), &4096.into(), &1.into()));
    assert_eq!(
        (&file["min_txid"], &file["max_txid"]),
        (&"0000000000000002".into(), &"0000000000000002".into())
    );
    assert!(file["pages"].as_u64() > Some(2000), "{file}");
    let position = primary.position("big.db").unwrap();
    assert_eq!(position, format!("0000000000000002/{}", file["post_apply"].as_str().unwrap()));

    let path = PathBuf::from(file["path"].as_str().unwrap());
    outcome(&mut with_path(primary.litefs(&["ltx", "verify"]), &files)).succeeds(&["ok"]);
    outcome(&mut with_path(primary.litefs(&["ltx", "dump"]), &path)).succeeds(&["0000000000000002"]);
    outcome(&mut with_path(primary.litefs(&["ltx", "dump", "--page", "1"]), &path))
        .succeeds(&["53 51 4c 69 74 65"]);

    let damaged = fleet.scratch().join("damaged.ltx");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&damaged, bytes).unwrap();
    let verified = outcome(&mut with_path(primary.litefs(&["ltx", "verify"]), &damaged));
    verified.fails(65, &["damaged.ltx"]);
    outcome(&mut with_path(primary.litefs(&["ltx", "list"]), &fleet.scratch().join("none")))
        .fails(65, &["none"]);
}

/// `litefs` with the configuration file of the test.
fn configured(file: &Path, args: &[&str]) -> Outcome {
    outcome(Command::new(litefs()).args(args).arg("--config").arg(file))
}

#[test]
fn the_configuration_is_checked_shown_and_taken_over_while_running() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    primary.sql("app.db", "CREATE TABLE t(x);");
    let dir = fleet.scratch();
    let good = dir.join("good.toml");
    let socket = primary.socket();
    fs::write(&good, format!("[socket]\npath = {:?}\n[mount]\nthreads = 3\n", socket.to_str().unwrap()))
        .unwrap();
    configured(&good, &["config", "check"]).succeeds(&["good", "2 keys are set"]);
    let shown = configured(&good, &["config", "show"]).succeeds(&["threads = 3  # ", "good.toml"]).out;
    // What it shows is a configuration that means the same.
    let again = dir.join("again.toml");
    fs::write(&again, shown).unwrap();
    configured(&again, &["config", "check"]).succeeds(&["good"]);
    // The commands find the running agent through it.
    configured(&again, &["list"]).succeeds(&["app.db"]);

    let bad = dir.join("bad.toml");
    fs::write(&bad, "[mount]\nthread = 3\n[http]\nlisten = \"nowhere\"\n").unwrap();
    let said = ["2 problems", "bad.toml:2", "threads", "bad.toml:4", "nowhere"];
    configured(&bad, &["config", "check"]).fails(78, &said);
    configured(&bad, &["agent"]).fails(78, &["bad.toml:2", "bad.toml:4"]);

    // A running agent keeps what it has when its file becomes bad, and says so.
    primary.expect_error("the configuration was not taken over");
    let file = agent_file(&primary);
    let before = fs::read_to_string(&file).unwrap();
    fs::write(&file, "[lease]\nrole = \"king\"\n").unwrap();
    primary.reload();
    primary.wait_for("the bad file is reported", || primary.log().contains("king"));
    primary.assert_running();
    assert_eq!(primary.status()["role"]["name"], "primary");
    primary.sql("app.db", "INSERT INTO t VALUES (1);");
    fs::write(&file, before).unwrap();
}

/// The configuration file of a host.
fn agent_file(host: &Host) -> PathBuf {
    let command = host.agent_command();
    let mut args = command.get_args();
    args.find(|arg| *arg == "--config").expect("hosts have a configuration file");
    args.next().expect("a value").into()
}

#[test]
fn stopping_under_load_loses_nothing_and_leaves_nothing_to_replay() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let databases =
        [("wal-full.db", "WAL", "FULL"), ("wal-normal.db", "WAL", "NORMAL"), ("delete.db", "DELETE", "FULL")];
    for (name, mode, _) in databases {
        primary.sql(name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x INTEGER PRIMARY KEY);"));
    }
    let (acknowledged, done) = ([const { AtomicU64::new(0) }; 3], AtomicBool::new(false));
    let last = std::thread::scope(|scope| {
        let mut counters = acknowledged.iter();
        let writers = databases.map(|(name, _, synchronous)| {
            let (path, acknowledged, done) = (primary.path(name), counters.next().unwrap(), &done);
            scope.spawn(move || insert_until_it_fails(&path, synchronous, acknowledged, done))
        });
        // Each of them: on a busy machine one may have done hundreds before another begins.
        primary.wait_for("the writers are at work", || {
            writers.iter().any(|writer| writer.is_finished())
                || acknowledged.iter().all(|count| count.load(Ordering::Relaxed) > 100)
        });
        primary.stop();
        done.store(true, Ordering::Relaxed);
        writers.map(|writer| writer.join().expect("a writer"))
    });
    assert!(!primary.socket().exists(), "the socket was left behind");
    // What the primary had, the replica has now, while the primary is down.
    for ((name, ..), last) in databases.iter().zip(last) {
        assert!(last > 0, "nothing was written to {name}");
        // The stop waits until it is in the replica's log, from where it is applied a moment later.
        replica.wait_for(&format!("{last} rows of {name} are visible on the replica"), || {
            let rows = replica.sql(name, "SELECT count(*), max(x) FROM t");
            let (count, max) = rows.split_once('|').expect("two columns");
            assert_eq!(count, max, "{name}");
            max.parse::<u64>().unwrap() >= last
        });
    }
    let before = primary.log().len();
    primary.start();
    let log = primary.log()[before..].to_owned();
    for line in log.lines().filter(|line| line.contains("database recovered")) {
        assert!(line.contains("replayed: 0"), "a clean stop left something to replay: {line}");
    }
    replica.wait_connected();
    for ((name, ..), last) in databases.iter().zip(last) {
        assert_equal(&primary, &replica, name);
        let max: u64 = primary.sql(name, "SELECT max(x) FROM t").parse().unwrap();
        assert!(max >= last, "{name}: {last} was acknowledged, {max} is there");
    }
}

#[test]
fn a_stop_waits_for_a_follower_that_has_not_begun_with_a_new_database() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    replica.signal(Signal::SIGSTOP);
    primary.sql("new.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| primary.stop());
        primary.wait_for("it stops", || primary.log().contains("stopping"));
        replica.signal(Signal::SIGCONT);
        stopping.join().expect("the agent stops");
    });
    replica.wait_sql("new.db", "SELECT x FROM t", "1");
    primary.start();
    replica.wait_connected();
    assert_equal(&primary, &replica, "new.db");
}

#[test]
fn an_agent_that_stops_with_nobody_connected_starts_without_recovering_anything() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in ["WAL", "DELETE"] {
        primary.sql(&format!("{mode}.db"), &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x);"));
        primary.wait_position_equal(&replica, &format!("{mode}.db"));
    }
    for host in [&replica, &primary] {
        host.stop();
        let before = host.log().len();
        host.start();
        let log = host.log()[before..].to_owned();
        assert!(!log.contains("recovered"), "{log}");
        assert!(!log.contains("WARN"), "{log}");
    }
    replica.wait_connected();
    for mode in ["WAL", "DELETE"] {
        primary.sql(&format!("{mode}.db"), "INSERT INTO t VALUES (1);");
        assert_equal(&primary, &replica, &format!("{mode}.db"));
    }
}

#[test]
fn metrics_and_info_are_for_anyone_who_reaches_the_port() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x);");
    primary.sql("app.db", "INSERT INTO t VALUES (1);");
    primary.wait_position_equal(&replica, "app.db");
    let txid = primary.txid("app.db");

    let info: Value = serde_json::from_str(&http_get(&primary, "/info")).unwrap();
    assert_eq!((&info["isPrimary"], &info["path"]), (&true.into(), &primary.mount().to_str().into()));
    let info: Value = serde_json::from_str(&http_get(&replica, "/info")).unwrap();
    assert_eq!((&info["isPrimary"], &info["primary"]["hostname"]), (&false.into(), &"a".into()));

    let value = |text: &str, name: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let text = http_get(&primary, "/metrics");
    assert!(text.trim_end().ends_with("# EOF"), "not OpenMetrics: {text}");
    let db = "{db=\"app.db\"}";
    for (name, expected) in [
        ("litefs_is_primary".to_owned(), 1.0),
        ("litefs_epoch".to_owned(), 1.0),
        ("litefs_db_count".to_owned(), 1.0),
        ("litefs_db_quarantined_count".to_owned(), 0.0),
        ("litefs_subscriber_count".to_owned(), 1.0),
        (format!("litefs_db_txid{db}"), txid as f64),
        (format!("litefs_db_size_bytes{db}"), 8192.0),
    ] {
        assert_eq!(value(&text, &name), expected, "{name}");
    }
    assert!(value(&text, "litefs_log_fsync_seconds_count") > 0.0, "no fsync was measured");
    assert!(value(&text, "litefs_log_durable_lsn") > 8.0);
    let text = http_get(&replica, "/metrics");
    for (name, expected) in [
        ("litefs_is_primary".to_owned(), 0.0),
        ("litefs_upstream_connected".to_owned(), 1.0),
        (format!("litefs_db_txid{db}"), txid as f64),
        (format!("litefs_db_lag_transactions{db}"), 0.0),
    ] {
        assert_eq!(value(&text, &name), expected, "{name}");
    }
}

/// The event stream of a host.
struct Events(BufReader<TcpStream>);

impl Events {
    fn of(host: &Host) -> Events {
        let mut stream = TcpStream::connect(("127.0.0.1", host.port())).expect("the port is open");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        write!(stream, "GET /events HTTP/1.1\r\nHost: test\r\n\r\n").expect("it is read");
        let mut events = Events(BufReader::new(stream));
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            events.0.read_line(&mut line).expect("an answer");
        }
        events
    }

    /// The next event of a type.
    fn next(&mut self, kind: &str) -> Value {
        loop {
            let mut line = String::new();
            let read = self.0.read_line(&mut line).expect("an event");
            assert!(read > 0, "the stream ended before a {kind} event");
            // Between the events are the sizes of HTTP's chunks.
            let Ok(event @ Value::Object(_)) = serde_json::from_str::<Value>(&line) else { continue };
            if event["type"] == kind {
                return event;
            }
        }
    }
}

#[test]
fn events_tell_of_transactions_and_roles_on_both_hosts() {
    let fleet = Fleet::new();
    let (a, b) = fleet.pair();
    a.sql("app.db", "CREATE TABLE t(x);");
    a.wait_position_equal(&b, "app.db");
    let mut events = [&a, &b].map(Events::of);
    assert_eq!(events[0].next("init")["data"]["isPrimary"], true);
    let init = events[1].next("init");
    assert_eq!((&init["data"]["isPrimary"], &init["data"]["hostname"]), (&false.into(), &"a".into()));

    a.sql("app.db", "INSERT INTO t VALUES (1);");
    let position = a.wait_position_equal(&b, "app.db");
    for stream in &mut events {
        let event = stream.next("tx");
        let data = &event["data"];
        assert_eq!(event["db"], "app.db");
        let told =
            format!("{}/{}", data["txID"].as_str().unwrap(), data["postApplyChecksum"].as_str().unwrap());
        assert_eq!(told, position);
        assert_eq!((&data["pageSize"], &data["commit"]), (&4096.into(), &2.into()));
        assert!(data["timestamp"].as_str().is_some_and(|time| time.ends_with('Z')), "{event}");
    }

    a.set_role(Role::ReplicaOf(&b)).reload();
    assert_eq!(events[0].next("primaryChange")["data"]["isPrimary"], false);
    b.set_role(Role::Primary).reload();
    wait_for("b tells of its new role", PATIENCE, || {
        (events[1].next("primaryChange")["data"]["isPrimary"] == true).then_some(())
    });
}

#[test]
fn two_clusters_live_on_one_host() {
    let fleet = Fleet::new();
    let shop = fleet.host("shop", Role::Primary);
    shop.set("cluster=shop").start();
    let blog = fleet.host("blog", Role::Primary);
    blog.set("cluster=blog").start();
    for host in [&shop, &blog] {
        host.sql("app.db", &format!("CREATE TABLE t(x); INSERT INTO t VALUES ('{}');", host.name()));
    }
    for host in [&shop, &blog] {
        assert_eq!(host.sql("app.db", "SELECT x FROM t"), host.name());
        outcome(&mut host.litefs(&["status"])).succeeds(&[&format!("cluster {}", host.name()), "app.db"]);
        if is_preload() {
            assert!(
                fs::symlink_metadata(host.mount()).unwrap().is_symlink(),
                "the directory is a link to the files"
            );
            continue;
        }
        let mounted = run(Command::new("findmnt").args(["-no", "SOURCE,FSTYPE"]).arg(host.mount()));
        assert_eq!(mounted.split_whitespace().collect::<Vec<_>>(), [host.name(), "fuse.litefs"]);
    }
    shop.stop();
    blog.sql("app.db", "INSERT INTO t VALUES ('more');");
    assert_eq!(blog.status()["databases"][0]["state"], "ok");
}
