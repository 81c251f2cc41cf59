//! Applications as they are in use, through the preload door: a web application with several worker processes, and
//! tools. `cargo xtask setup` installs what they need: one that is missing fails its test.

use litefs_tests::*;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

/// What `cargo xtask setup` has installed from PyPI.
fn installed(program: &str) -> String {
    let path = format!("{}/../target/clients/python/bin/{program}", env!("CARGO_MANIFEST_DIR"));
    assert!(Path::new(&path).exists(), "{path} is missing: run `cargo xtask setup`");
    path
}

fn pair(fleet: &Fleet) -> (Host, Host) {
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").start();
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.set("door=preload").start();
    replica.wait_connected();
    (primary, replica)
}

/// A program with the library, as users start it.
fn exec(host: &Host, program: &str) -> Command {
    let mut command = host.litefs(&["exec"]);
    command.env("LITEFS_SHIM", liblitefs()).arg("--").arg(program);
    command
}

/// A server that is ended with its workers.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// One request; the body of its answer, `None` where nobody answers.
fn http(port: u16, method: &str, path: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {head}\n{body}");
    Some(body.to_owned())
}

fn number(json: &str, key: &str) -> u64 {
    let value: serde_json::Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{json}: {e}"));
    value[key].as_u64().unwrap_or_else(|| panic!("no {key} in {json}"))
}

/// A port that was free a moment ago.
fn port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("it is bound").port()
}

fn serve(host: &Host, database: &str, mode: &str) -> (Server, u16) {
    let port = port();
    let mut command = exec(host, &installed("gunicorn"));
    command.args(["--workers", "3", "--threads", "2", "--log-level", "error", "--bind"]);
    command.arg(format!("127.0.0.1:{port}")).arg("webapp:app");
    command.current_dir(format!("{}/clients", env!("CARGO_MANIFEST_DIR")));
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("DATABASE", host.path(database))
        .env("JOURNAL_MODE", mode);
    let server = Server(command.stdin(Stdio::null()).spawn().expect("litefs runs"));
    wait_for("the application answers", PATIENCE, || http(port, "GET", "/notes", ""));
    (server, port)
}

fn a_web_application(mode: &str) {
    const REQUESTS: u64 = 120;
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet);
    let table = "CREATE TABLE notes(id INTEGER PRIMARY KEY, worker INTEGER, text TEXT)";
    let mut create = exec(&primary, "sqlite3");
    run(create.arg(primary.path("app.db")).arg(format!("PRAGMA journal_mode={mode}; {table}")));
    primary.wait_position_equal(&replica, "app.db");

    let (server, port) = serve(&primary, "app.db", mode);
    let (next, workers) = (AtomicU64::new(0), std::sync::Mutex::new(std::collections::HashSet::new()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= REQUESTS {
                        break;
                    }
                    let answer = http(port, "POST", "/notes", &format!("note {n}")).expect("it is up");
                    workers.lock().expect("no thread panics").insert(number(&answer, "worker"));
                }
            });
        }
    });
    assert_eq!(number(&http(port, "GET", "/notes", "").expect("it is up"), "count"), REQUESTS);
    assert!(workers.lock().expect("no thread panics").len() > 1, "one worker did everything");

    // The agent goes and comes; the application does not notice.
    primary.kill().start();
    for n in 0..10 {
        http(port, "POST", "/notes", &format!("after {n}")).expect("it is up");
    }
    replica.wait_connected();
    // The same application reads on the replica.
    let (reader, reading) = serve(&replica, "app.db", mode);
    replica.wait_for("the application on the replica sees all notes", || {
        number(&http(reading, "GET", "/notes", "").expect("it is up"), "count") == REQUESTS + 10
    });
    drop((server, reader));
    assert_equal(&primary, &replica, "app.db");
    let distinct = "SELECT count(DISTINCT text) FROM notes";
    assert_eq!(run(exec(&replica, "sqlite3").arg(replica.path("app.db")).arg(distinct)), "130");
}

#[test]
fn a_web_application_with_several_workers_in_wal_mode() {
    a_web_application("wal");
}

#[test]
fn a_web_application_with_several_workers_in_delete_mode() {
    a_web_application("delete");
}

#[test]
fn tools_write_on_the_primary_and_serve_on_the_replica() {
    let fleet = Fleet::new();
    let (primary, replica) = pair(&fleet);
    let rows = fleet.scratch().join("rows.json");
    let list: Vec<_> =
        (0..500).map(|id| serde_json::json!({"id": id, "text": format!("row {id} of 500")})).collect();
    std::fs::write(&rows, serde_json::Value::from(list).to_string()).expect("the directory is writable");
    let tool = |arguments: &[&str]| {
        let mut command = exec(&primary, &installed("sqlite-utils"));
        command.arg(arguments[0]).arg(primary.path("tools.db")).args(&arguments[1..]);
        run(&mut command)
    };
    tool(&["insert", "t", rows.to_str().expect("paths of a test are UTF-8"), "--pk", "id"]);
    tool(&["enable-fts", "t", "text"]);
    tool(&["enable-wal"]);
    tool(&["transform", "t", "--rename", "text", "content"]);
    tool(&["create-index", "t", "content"]);
    tool(&["vacuum"]);
    assert_equal(&primary, &replica, "tools.db");

    let port = port();
    let mut command = exec(&replica, &installed("datasette"));
    command.arg("serve").arg(replica.path("tools.db")).args(["--port", &port.to_string()]);
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server(command.spawn().expect("litefs runs"));
    let ask = || http(port, "GET", "/tools.json?sql=select+count(*)+as+n+from+t&_shape=array", "");
    let answer = wait_for("datasette answers", PATIENCE, ask);
    assert!(answer.contains("500"), "{answer}");
    // It keeps its connections open, and sees what comes.
    tool(&["query", "DELETE FROM t WHERE id >= 100"]);
    replica
        .wait_for("datasette sees the change", || ask().is_some_and(|answer| answer.contains("\"n\": 100")));
    drop(server);
    assert_equal(&primary, &replica, "tools.db");
}
