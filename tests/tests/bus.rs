//! The agent on a bus: a real `dbus-daemon` with the installed policy, `busctl`, and what happens without a bus.

use litefs_tests::{Bus, Fleet, Host, PATIENCE, exec, litefs, sqlite3, try_run, wait_for};
use std::collections::HashMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use zbus::{Variant, interface};

const NAME: &str = "io.litefs.LiteFS1.db";
const MANAGER: [&str; 3] = [NAME, "/io/litefs/LiteFS1", "io.litefs.LiteFS1.Manager"];
const APP: [&str; 3] = [NAME, "/io/litefs/LiteFS1/databases/app_2edb", "io.litefs.LiteFS1.Database"];

fn on_bus<'a>(host: &'a Host, bus: &Bus) -> &'a Host {
    host.set("dbus.bus=system").env("DBUS_SYSTEM_BUS_ADDRESS", &bus.address())
}

fn primary(fleet: &Fleet, bus: &Bus) -> Host {
    let host = fleet.host("a", litefs_tests::Role::Primary);
    on_bus(&host, bus).start();
    wait_for("the agent is on the bus", PATIENCE, || property(bus, MANAGER, "Role").ok());
    host
}

fn property(bus: &Bus, object: [&str; 3], name: &str) -> Result<String, String> {
    bus.busctl(&["get-property", object[0], object[1], object[2], name])
}

fn call(bus: &Bus, object: [&str; 3], method: &[&str]) -> Result<String, String> {
    bus.busctl(&[&["call"], &object[..], method].concat())
}

/// `busctl monitor` as JSON lines in a file.
struct Monitor {
    child: Child,
    file: std::path::PathBuf,
}

impl Monitor {
    fn start(bus: &Bus, fleet: &Fleet) -> Monitor {
        let file = fleet.scratch().join("monitor");
        let mut command = bus.busctl_command(&["monitor", "--json=short"]);
        let out = fs::File::create(&file).expect("it works");
        let errors = fleet.scratch().join("monitor.err");
        command.stdin(Stdio::null()).stdout(out).stderr(fs::File::create(&errors).expect("it works"));
        let child = command.spawn().expect("it works");
        wait_for("busctl monitors", PATIENCE, || {
            fs::read_to_string(&errors).expect("it works").contains("Monitoring").then_some(())
        });
        Monitor { child, file }
    }

    fn signals(&self, member: &str) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(&self.file).expect("it works");
        let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        messages.filter(|message| message["member"] == member).collect()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_halt_lock_is_told() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let host = primary(&fleet, &bus);
    let replica = fleet.replica("b", &host);
    host.sql("app.db", "CREATE TABLE t(x)");
    host.wait_position_equal(&replica, "app.db");
    wait_for("the object", PATIENCE, || property(&bus, APP, "Txid").ok());
    assert_eq!(property(&bus, APP, "HaltLock").unwrap(), "s \"\"");
    let monitor = Monitor::start(&bus, &fleet);
    let told = |holder: &str| {
        let is_told = |signal: &serde_json::Value| {
            signal["payload"]["data"][1]["HaltLock"]["data"].as_str() == Some(holder)
        };
        wait_for("the bus tells it", PATIENCE, || {
            monitor.signals("PropertiesChanged").iter().any(is_told).then_some(())
        });
    };
    let mut command = Command::new(litefs());
    command.arg("--socket").arg(replica.socket()).args(["run", "--with-halt-lock-on", "app.db", "--", "cat"]);
    let mut holding = command.stdin(Stdio::piped()).spawn().unwrap();
    told("b");
    assert_eq!(property(&bus, APP, "HaltLock").unwrap(), "s \"b\"");
    drop(holding.stdin.take());
    assert!(holding.wait().unwrap().success());
    told("");
}

#[test]
fn everything_can_be_seen_with_busctl() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let host = primary(&fleet, &bus);
    host.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    wait_for("the object", PATIENCE, || property(&bus, APP, "Txid").ok());
    let position = host.position("app.db").unwrap();
    wait_for("the position", PATIENCE, || {
        (property(&bus, APP, "Position").ok()? == format!("s \"{position}\"")).then_some(())
    });
    assert_eq!(property(&bus, MANAGER, "Role").unwrap(), "s \"primary\"");
    assert_eq!(property(&bus, MANAGER, "Primary").unwrap(), "s \"a\"");
    assert_eq!(property(&bus, MANAGER, "Health").unwrap(), "s \"ok\"");
    assert_eq!(property(&bus, APP, "Health").unwrap(), "s \"ok\"");
    assert!(bus.busctl(&["tree", NAME]).unwrap().contains("/io/litefs/LiteFS1/databases/app_2edb"));
    let members = bus.busctl(&["introspect", APP[0], APP[1]]).unwrap();
    for member in [".Checkpoint", ".Verify", ".Position", ".LagMillis"] {
        assert!(members.contains(member), "no {member} in\n{members}");
    }
    let objects = bus.busctl(&[
        "--json=short",
        "call",
        NAME,
        MANAGER[1],
        "org.freedesktop.DBus.ObjectManager",
        "GetManagedObjects",
    ]);
    let objects: serde_json::Value = serde_json::from_str(&objects.unwrap()).unwrap();
    let app = &objects["data"][0][APP[1]]["io.litefs.LiteFS1.Database"];
    assert_eq!(app["Name"]["data"], "app.db");
    assert_eq!(call(&bus, MANAGER, &["ListDatabases", "su", "", "0"]).unwrap(), "a(st) 1 \"app.db\" 2");
    host.sql("app.db", "DROP TABLE t");
    fs::remove_file(host.path("app.db")).unwrap();
    wait_for("the object goes with the database", PATIENCE, || property(&bus, APP, "Txid").err());
}

#[test]
fn commits_do_not_flood_the_bus_and_the_last_is_told() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let host = primary(&fleet, &bus);
    let monitor = Monitor::start(&bus, &fleet);
    let connection = host.open("app.db");
    exec(&connection, "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; CREATE TABLE t(x);");
    let begun = Instant::now();
    for number in 0..2000 {
        connection.execute("INSERT INTO t VALUES (?1)", [number]).unwrap();
    }
    let last = host.txid("app.db");
    let told = |signal: &serde_json::Value| signal["payload"]["data"][0][0][1].as_u64();
    wait_for("the last transaction is told", PATIENCE, || {
        monitor.signals("Changed").iter().any(|signal| told(signal) == Some(last)).then_some(())
    });
    let rounds = (begun.elapsed().as_millis() / 100 + 3) as usize;
    let (changed, properties) =
        (monitor.signals("Changed").len(), monitor.signals("PropertiesChanged").len());
    assert!(changed <= rounds, "{changed} signals Changed in {rounds} rounds");
    assert!(properties <= 2 * rounds, "{properties} signals PropertiesChanged in {rounds} rounds");
    assert!(last > 2000, "{last}");
}

#[test]
fn methods_do_what_they_say() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let host = primary(&fleet, &bus);
    let connection = host.open("app.db");
    exec(&connection, "PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=0; CREATE TABLE t(x);");
    exec(&connection, "INSERT INTO t VALUES (hex(randomblob(30000)));");
    wait_for("the object", PATIENCE, || property(&bus, APP, "Txid").ok());

    let moved = call(&bus, APP, &["Checkpoint"]).unwrap();
    let frames: Vec<u64> = moved.split(' ').skip(1).map(|number| number.parse().unwrap()).collect();
    assert!(frames[0] > 10 && frames[0] == frames[1], "{moved}");
    let plain = fleet.scratch().join("plain.db");
    fs::copy(host.data().join("files/app.db"), &plain).unwrap();
    assert_eq!(sqlite3(&plain, "SELECT length(x) FROM t"), "60000");
    // The WAL is still the application's.
    exec(&connection, "INSERT INTO t VALUES (2);");
    assert_eq!(host.sql("app.db", "PRAGMA integrity_check; SELECT count(*) FROM t"), "ok\n2");

    let position = host.position("app.db").unwrap();
    assert_eq!(call(&bus, APP, &["Verify"]).unwrap(), format!("s \"{position}\""));
    let snapshot = call(&bus, APP, &["Snapshot"]).unwrap();
    let words: Vec<&str> = snapshot.split('"').collect();
    assert_eq!(words[3], position);
    try_run(&mut host.litefs(&["ltx", "verify", words[1]])).unwrap();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (copy, at) = runtime.block_on(async {
        let bus = zbus::connection::Builder::address(bus.address().as_str()).build().await.unwrap();
        let answer = bus.call_method(Some(NAME), APP[1], Some(APP[2]), "Export", &()).await.unwrap();
        answer.body().deserialize::<(zbus::OwnedFd, String)>().unwrap()
    });
    let mut copy = fs::File::from(std::os::fd::OwnedFd::from(copy));
    let mut exported = fs::File::create(fleet.scratch().join("exported.db")).unwrap();
    std::io::copy(&mut copy, &mut exported).unwrap();
    assert_eq!(at, position);
    assert_eq!(
        sqlite3(&fleet.scratch().join("exported.db"), "PRAGMA integrity_check; SELECT count(*) FROM t"),
        "ok\n2"
    );

    for method in [&["Promote"] as &[&str], &["Demote"], &["Handoff", "s", "b"]] {
        let error = call(&bus, MANAGER, method).unwrap_err();
        assert!(error.contains("lease.type is \"static\""), "{method:?}: {error}");
    }
}

/// The agent checkpoints beside applications that write, read and checkpoint themselves.
#[test]
fn checkpoints_in_the_middle_of_writes_change_nothing() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let host = primary(&fleet, &bus);
    let replica = fleet.replica("b", &host);
    let connection = host.open("app.db");
    exec(&connection, "PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=50; CREATE TABLE t(x, y);");
    wait_for("the object", PATIENCE, || property(&bus, APP, "Txid").ok());
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let checkpoints = scope.spawn(|| {
            let mut moved = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                match call(&bus, APP, &["Checkpoint"]) {
                    Ok(_) => moved += 1,
                    Err(error) => assert!(error.contains("is busy"), "{error}"),
                }
            }
            moved
        });
        let reader = scope.spawn(|| {
            let connection = host.open("app.db");
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let sum: i64 = connection
                    .query_row("SELECT count(*) - coalesce(max(x), 0) FROM t", [], |row| row.get(0))
                    .unwrap();
                assert_eq!(sum, 0, "a reader saw half a transaction");
            }
        });
        for number in 1..=600 {
            connection.execute("INSERT INTO t VALUES (?1, randomblob(3000))", [number]).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(checkpoints.join().unwrap() > 5);
        reader.join().unwrap();
    });
    litefs_tests::assert_equal(&host, &replica, "app.db");
    call(&bus, APP, &["Verify"]).unwrap();
}

#[test]
fn a_reload_is_done_when_it_returns_and_mistakes_come_back() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let host = primary(&fleet, &bus);
    host.expect_error("the configuration was not taken over");
    host.configure("[replication]\napply-wait = \"5 apples\"\n");
    let error = call(&bus, MANAGER, &["Reload"]).unwrap_err();
    assert!(error.contains("replication.apply-wait must be a duration"), "{error}");
    let error = try_run(&mut host.litefs(&["reload"])).unwrap_err();
    assert!(error.contains("replication.apply-wait must be a duration") && error.contains("65"), "{error}");
    assert_eq!(host.sql("app.db", "CREATE TABLE t(x); SELECT 1"), "1", "the agent goes on");

    let other = fleet.host("c", litefs_tests::Role::Primary);
    host.set_role(litefs_tests::Role::ReplicaOf(&other));
    call(&bus, MANAGER, &["Reload"]).unwrap();
    assert_eq!(property(&bus, MANAGER, "Role").unwrap(), "s \"replica\"");
    assert_eq!(property(&bus, MANAGER, "UpstreamConnected").unwrap(), "b false");
    wait_for("it is degraded", PATIENCE, || {
        (property(&bus, MANAGER, "Health").ok()? == "s \"degraded\"").then_some(())
    });
}

/// `CheckAuthorization` of polkit: what it is asked, and what it answers.
#[derive(Default)]
struct Authority {
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// Kind of subject, action, database, flags.
type Asked = (String, String, String, u32);

#[interface(name = "org.freedesktop.PolicyKit1.Authority")]
impl Authority {
    fn check_authorization(
        &self,
        subject: (String, HashMap<String, Variant<'_>>),
        action_id: String,
        details: HashMap<String, String>,
        flags: u32,
        _cancellation_id: String,
    ) -> (bool, bool, HashMap<String, String>) {
        let database = details.get("database").cloned().unwrap_or_default();
        let allowed = action_id == "io.litefs.LiteFS1.verify";
        let challenge = action_id == "io.litefs.LiteFS1.reload" && flags == 0;
        self.asked.lock().expect("it works").push((subject.0, action_id, database, flags));
        (allowed, challenge, HashMap::new())
    }
}

#[test]
fn who_may_do_what() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let host = primary(&fleet, &bus);
    host.sql("app.db", "CREATE TABLE t(x)");
    wait_for("the object", PATIENCE, || property(&bus, APP, "Txid").ok());

    // Everybody may read; without polkit only root may do more.
    let read = bus.busctl_as_nobody(&["get-property", MANAGER[0], MANAGER[1], MANAGER[2], "Role"]);
    assert_eq!(read.unwrap(), "s \"primary\"");
    let denied = bus.busctl_as_nobody(&["call", APP[0], APP[1], APP[2], "Verify"]).unwrap_err();
    assert!(denied.contains("Access denied"), "{denied}");
    call(&bus, APP, &["Verify"]).unwrap();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let asked = Arc::default();
    let authority = Authority { asked: Arc::clone(&asked) };
    let _polkit = runtime.block_on(async {
        let builder = zbus::connection::Builder::address(bus.address().as_str());
        let builder = builder.serve_at("/org/freedesktop/PolicyKit1/Authority", authority);
        builder.name("org.freedesktop.PolicyKit1").build().await.unwrap()
    });
    bus.busctl_as_nobody(&["call", APP[0], APP[1], APP[2], "Verify"]).unwrap();
    let denied = bus.busctl_as_nobody(&["call", APP[0], APP[1], APP[2], "Export"]).unwrap_err();
    assert!(denied.contains("Access denied"), "{denied}");
    let no_questions = "--allow-interactive-authorization=no";
    let reload = ["call", MANAGER[0], MANAGER[1], MANAGER[2], "Reload"];
    let denied = bus.busctl_as_nobody(&[&[no_questions], &reload[..]].concat()).unwrap_err();
    assert!(denied.contains("needs a password") || denied.contains("nteractive"), "{denied}");
    let denied = bus.busctl_as_nobody(&reload).unwrap_err();
    assert!(denied.contains("Access denied"), "{denied}");
    // Root is not asked about.
    call(&bus, MANAGER, &["Reload"]).unwrap();
    let about = |action: &str, database: &str, flags| {
        ("system-bus-name".to_owned(), format!("io.litefs.LiteFS1.{action}"), database.to_owned(), flags)
    };
    let asked: Vec<_> = asked.lock().unwrap().clone();
    assert_eq!(
        asked,
        [
            about("verify", "app.db", 1),
            about("export", "app.db", 1),
            about("reload", "", 0),
            about("reload", "", 1)
        ]
    );
    drop(runtime);
}

#[test]
fn nobody_else_takes_the_name() {
    let (fleet, bus) = (Fleet::new(), Bus::new());
    let _first = primary(&fleet, &bus);
    let second = fleet.host("b", litefs_tests::Role::Primary);
    on_bus(&second, &bus).start();
    second.wait_for("it says why it is not on the bus", || {
        second.log().contains("the bus does not give the name io.litefs.LiteFS1.db")
    });
    assert_eq!(property(&bus, MANAGER, "NodeName").unwrap(), "s \"a\"");
    assert_eq!(second.sql("app.db", "CREATE TABLE t(x); SELECT 1"), "1");
}

#[test]
fn without_a_bus_the_agent_works_and_comes_back_to_it() {
    let (fleet, bus) = (Fleet::new(), Bus::not_running());
    let host = fleet.host("a", litefs_tests::Role::Primary);
    on_bus(&host, &bus).start();
    assert_eq!(host.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1); SELECT x FROM t"), "1");
    host.wait_for("it says so", || host.log().contains("the system bus cannot be reached"));
    bus.start();
    wait_for("it comes", PATIENCE, || property(&bus, APP, "Txid").ok());
    assert_eq!(host.log().matches("the system bus cannot be reached").count(), 1, "it says so once");

    bus.kill();
    host.wait_for("it notices", || host.log().contains("the agent works without"));
    host.sql("app.db", "INSERT INTO t VALUES (2)");
    bus.start();
    let position = host.position("app.db").unwrap();
    wait_for("it comes back with what happened meanwhile", PATIENCE, || {
        (property(&bus, APP, "Position").ok()? == format!("s \"{position}\"")).then_some(())
    });
    host.stop();
    assert!(property(&bus, MANAGER, "Role").is_err(), "a stopped agent has no name");
}
