//! Bad input and bad surroundings are an error with a name, never a panic, a hang, a wrong answer or a lost database,
//! and leave nothing behind.

use litefs_tests::{
    Fleet, Host, PATIENCE, Role, Shell, assert_equal, assert_sane, litefs, run, sqlite3, try_run, wait_for,
};
use nix::mount::{MntFlags, umount2};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code: the agent failed.
const SOFTWARE: i32 = 70;
/// Exit code: the configuration is wrong.
const CONFIG: i32 = 78;

/// File systems mounted at a directory, the top one last.
fn mounted_at(dir: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("there is a mount table");
    let at = |line: &str| {
        let (mount, rest) = line.split_once(" - ")?;
        let here = Path::new(mount.split(' ').nth(4)?) == dir;
        here.then(|| rest.split(' ').next().unwrap_or_default().to_owned())
    };
    table.lines().filter_map(at).collect()
}

/// Ends a program when the test panics.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs an agent that must not start: it ends with the code, says all of `says` in its error, and leaves neither mount
/// nor socket behind. Returns the error.
#[track_caller]
fn refuses_to_start(host: &Host, mut command: Command, code: i32, says: &[&str]) -> String {
    let (mounts, socket) = (mounted_at(&host.mount()), fs::symlink_metadata(host.socket()).is_ok());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut agent = Running(command.spawn().expect("the agent can be run"));
    let mut stderr = agent.0.stderr.take().expect("stderr is a pipe");
    let reader = std::thread::spawn(move || {
        let mut said = String::new();
        stderr.read_to_string(&mut said).map(|_| said).expect("the agent writes UTF-8")
    });
    let status =
        wait_for("an agent that cannot start ends", PATIENCE, || agent.0.try_wait().expect("our child"));
    drop(agent);
    let said = reader.join().expect("the reader");
    assert_eq!(status.code(), Some(code), "{said}");
    let error = said.split_once("litefs: ").map_or("", |(_, error)| error).trim();
    for text in says {
        assert!(error.contains(text), "{text:?} is not in the error: {said}");
    }
    // Each reason once.
    for reason in error.split(": ").filter(|reason| reason.contains("os error")) {
        assert_eq!(error.matches(reason).count(), 1, "said twice: {error}");
    }
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(mounted_at(&host.mount()), mounts, "a mount was left behind or taken away: {said}");
    assert_eq!(fs::symlink_metadata(host.socket()).is_ok(), socket, "the socket was left behind: {said}");
    error.to_owned()
}

/// A mount that the test made; taken away at its end. Declared before the hosts that use it.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(dir: &Path, size: &str) -> Mounted {
        fs::create_dir_all(dir).expect("the temporary directory is writable");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(dir));
        Mounted(dir.to_owned())
    }

    fn read_only(dir: &Path) -> Mounted {
        fs::create_dir_all(dir).expect("the temporary directory is writable");
        run(Command::new("mount").arg("--bind").arg(dir).arg(dir));
        let mounted = Mounted(dir.to_owned());
        run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(dir));
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_second_agent_on_a_data_directory_is_refused_and_the_first_goes_on() {
    let fleet = Fleet::new();
    let first = fleet.primary("a");
    first.sql("app.db", "CREATE TABLE t(x);");
    let second = fleet.host("b", Role::Primary);
    let data = first.data().display().to_string();
    second.set(&format!("data.dir={data}"));
    refuses_to_start(&second, second.agent_command(), SOFTWARE, &[&data, "in use by another agent"]);
    first.sql("app.db", "INSERT INTO t VALUES (1);");
    assert_sane(&first, "app.db");
}

#[test]
fn a_port_or_a_socket_in_use_is_named_and_its_owner_goes_on() {
    let fleet = Fleet::new();
    let first = fleet.primary("a");
    let second = fleet.host("b", Role::Primary);
    let listen = format!("127.0.0.1:{}", first.port());
    let mut command = second.agent_command();
    command.args(["--set", &format!("http.listen={listen}")]);
    refuses_to_start(&second, command, SOFTWARE, &[&listen, "in use"]);

    let socket = first.socket().display().to_string();
    let mut command = second.agent_command();
    command.args(["--set", &format!("socket.path={socket}")]);
    refuses_to_start(&second, command, SOFTWARE, &[&socket, "in use"]);
    first.sql("app.db", "CREATE TABLE t(x);");

    // A file that is no socket is never removed.
    let file = second.socket();
    fs::write(&file, "precious").unwrap();
    refuses_to_start(&second, second.agent_command(), SOFTWARE, &[file.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    fs::remove_file(&file).unwrap();

    // The socket of an agent that was killed is in nobody's way.
    second.start().kill();
    assert!(second.socket().exists());
    second.start();
}

#[test]
fn a_mount_point_that_cannot_be_used_is_named_and_left_alone() {
    let fleet = Fleet::new();
    let host = fleet.host("a", Role::Primary);
    let mount = host.mount().display().to_string();
    let refused = |says: &str| refuses_to_start(&host, host.agent_command(), SOFTWARE, &[&mount, says]);

    fs::write(&mount, "a file").unwrap();
    refused("directory");
    fs::remove_file(&mount).unwrap();
    fs::create_dir(&mount).unwrap();
    let file = host.path("somebody's.db");
    fs::write(&file, "somebody's data").unwrap();
    refused("not empty");
    assert_eq!(fs::read_to_string(&file).unwrap(), "somebody's data");
    fs::remove_file(&file).unwrap();
    {
        let _other = Mounted::tmpfs(&host.mount(), "1m");
        refused("tmpfs");
        assert_eq!(mounted_at(&host.mount()), ["tmpfs"]);
    }
    // The mount of another agent is in use, also when that one is just slow.
    let other = fleet.primary("b");
    let mut command = host.agent_command();
    let theirs = other.mount().display().to_string();
    command.args(["--set", &format!("mount.dir={theirs}")]);
    refuses_to_start(&host, command, SOFTWARE, &[&theirs, "another agent"]);
    assert_eq!(mounted_at(&other.mount()), ["fuse.litefs"]);
    other.sql("app.db", "CREATE TABLE t(x);");

    host.start();
    host.sql("app.db", "CREATE TABLE t(x);");
}

#[test]
fn the_mount_of_a_killed_agent_is_replaced() {
    let fleet = Fleet::new();
    let host = fleet.primary("a");
    host.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    host.kill();
    assert_eq!(mounted_at(&host.mount()), ["fuse.litefs"]);
    let error = fs::read_dir(host.mount()).expect_err("nobody serves it");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    host.start();
    assert_eq!(mounted_at(&host.mount()), ["fuse.litefs"]);
    assert_eq!(host.sql("app.db", "SELECT x FROM t"), "1");
    host.stop();
    assert_eq!(mounted_at(&host.mount()), [""; 0]);
}

#[test]
fn an_agent_whose_mount_is_taken_away_ends_with_an_error() {
    for busy in [false, true] {
        let fleet = Fleet::new();
        let host = fleet.primary("a");
        host.sql("app.db", "CREATE TABLE t(x);");
        let user = busy.then(|| Shell::open(&host.path("app.db")));
        if let Some(mut user) = user {
            user.run("SELECT * FROM t;");
        }
        umount2(&host.mount(), if busy { MntFlags::MNT_DETACH } else { MntFlags::empty() }).unwrap();
        let status = host.wait_ended();
        assert_eq!(status.code(), Some(SOFTWARE));
        let log = host.log();
        let mount = host.mount().display().to_string();
        assert!(log.contains(&format!("the mount at {mount} was taken away")), "{log}");
        assert!(!host.socket().exists());
        host.start();
        host.sql("app.db", "INSERT INTO t VALUES (1);");
    }
}

#[test]
fn a_host_without_dev_fuse_says_so() {
    let fleet = Fleet::new();
    let host = fleet.host("a", Role::Primary);
    host.set("door=fuse");
    // A mount namespace of its own, in which /dev has nothing but what other parts of the agent need.
    let script = "cd \"$0\" && touch urandom null && mount --bind /dev/urandom urandom && \
                  mount --bind /dev/null null && mount --rbind . /dev && cd / && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(fleet.scratch());
    let agent = host.agent_command();
    command.arg(agent.get_program()).args(agent.get_args());
    refuses_to_start(&host, command, SOFTWARE, &["/dev/fuse", "No such file"]);
    host.start();
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named() {
    let fleet = Fleet::new();
    let host = fleet.host("a", Role::Primary);
    let data = host.data();
    let named = data.display().to_string();
    let refused = |says: &str| refuses_to_start(&host, host.agent_command(), SOFTWARE, &[&named, says]);
    fs::write(&data, "a file").unwrap();
    refused("directory");
    fs::remove_file(&data).unwrap();
    {
        let _read_only = Mounted::read_only(&data);
        refused("Read-only file system");
    }
    host.start();
    host.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    host.stop();
    {
        let _read_only = Mounted::read_only(&data);
        refused("Read-only file system");
    }
    // What a node knows of itself is not guessed when it cannot be read.
    let epoch = data.join("epoch");
    let before = fs::read_to_string(&epoch).unwrap();
    fs::write(&epoch, "soon").unwrap();
    refused("epoch");
    fs::write(&epoch, before).unwrap();
    host.start();
    assert_eq!(host.sql("app.db", "SELECT x FROM t"), "1");
}

/// Sends bytes to a port and reads until the other end closes, or a second has passed.
fn send(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the port is open");
    stream.set_read_timeout(Some(std::time::Duration::from_secs(1))).expect("a timeout can be set");
    // The other end may close before it has read all.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// Bytes that mean nothing, the same in each run.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state: u64 = 0x2545_f491_4f6c_dd1d;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(bytes)
    .collect()
}

#[test]
fn garbage_on_the_port_disturbs_nobody_who_follows() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x);");
    primary.wait_position_equal(&replica, "app.db");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let after = |head: &[u8], tail: &[u8]| [head, tail].concat();
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let inputs = [
        noise(100_000),
        after(preface, &noise(100_000)),
        // A SETTINGS frame of 16 MB that never comes.
        after(preface, &[0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0]),
        preface[..10].to_vec(),
        Vec::new(),
        vec![0; 10_000],
        long.into_bytes(),
        b"GET /v1/follow HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"POST /v1/follow HTTP/1.1\r\nHost: x\r\nlitefs-protocol: banana\r\nContent-Length: 5\r\n\r\nhello"
            .to_vec(),
        b"GET /v1/db/..%2f..%2fetc%2fpasswd/log HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"GET /v1/export?name=../epoch HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
    ];
    for host in [&primary, &replica] {
        // Half-open connections stay while everything else goes on.
        let _silent: Vec<_> = (0..50)
            .map(|_| TcpStream::connect(("127.0.0.1", host.port())).expect("the port is open"))
            .collect();
        std::thread::scope(|scope| {
            for input in &inputs {
                scope.spawn(|| {
                    let answer = send(host.port(), input);
                    let answer = String::from_utf8_lossy(&answer);
                    assert!(!answer.contains("HTTP/1.1 200") && !answer.contains("root:"), "{answer}");
                });
            }
            primary.sql("app.db", "INSERT INTO t VALUES (1);");
        });
        primary.wait_position_equal(&replica, "app.db");
        host.assert_running();
    }
    let status = replica.status();
    assert_eq!(status["role"]["upstream"]["connected"], true);
    assert!(!replica.log().contains("lost upstream"), "{}", replica.log());
    assert_equal(&primary, &replica, "app.db");
}

#[test]
fn a_node_of_another_cluster_or_another_protocol_is_refused_by_name() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    primary.sql("app.db", "CREATE TABLE t(x);");
    let stranger = fleet.host("b", Role::ReplicaOf(&primary));
    stranger.set("cluster=other").start();
    stranger.wait_for("the stranger is refused", || {
        let log = stranger.log();
        let refused = log.lines().find(|line| line.contains("WARN") && line.contains(&primary.url()));
        refused.is_some_and(|line| line.contains("cluster") && line.contains("other") && line.contains("db"))
    });
    let shown = try_run(&mut stranger.litefs(&["status"]));
    assert!(shown.is_err(), "not connected, and status says that all is well: {shown:?}");
    assert_eq!(stranger.database("app.db"), None);

    // Nobody follows himself.
    let narcissus = fleet.host("c", Role::Primary);
    narcissus.set_role(Role::ReplicaOf(&narcissus));
    refuses_to_start(&narcissus, narcissus.agent_command(), CONFIG, &["primary-url", &narcissus.url()]);

    // An older protocol over HTTP/1: the version is looked at first.
    let ask = |version: &str| {
        let request = format!(
            "POST /v1/follow HTTP/1.1\r\nHost: x\r\nlitefs-protocol: {version}\r\nlitefs-node: 0123456789abcdef\r\n\
             litefs-name: old\r\nlitefs-cluster: db\r\nlitefs-epoch: 1\r\nContent-Length: 0\r\n\r\n"
        );
        String::from_utf8_lossy(&send(primary.port(), request.as_bytes())).into_owned()
    };
    let answer = ask("0.9");
    assert!(answer.starts_with("HTTP/1.1 426 ") && answer.contains("litefs-refusal: protocol"), "{answer}");
    assert!(answer.contains("speaks replication protocol 0.9"), "{answer}");
    assert!(!ask("1.0").starts_with("HTTP/1.1 426 "), "its own version is refused");
    primary.sql("app.db", "INSERT INTO t VALUES (1);");
}

#[test]
fn an_upstream_that_is_no_litefs_is_named_and_tried_again() {
    let fleet = Fleet::new();
    // What listens there says something else each time.
    let greetings: [&[u8]; 4] = [
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"",
        &[0, 0, 0, 4, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 1, 4, 0, 0, 0, 1, 0x88],
    ];
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    let (done, all_said) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (i, stream) in server.incoming().enumerate() {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(mut stream) = stream {
                    let _ = stream.write_all(greetings[i % greetings.len()]);
                }
                all_said.store(i > 2 * greetings.len(), Ordering::Relaxed);
            }
        });
        let primary = fleet.primary("a");
        primary.sql("app.db", "CREATE TABLE t(x);");
        let replica = fleet.host("b", Role::ReplicaOf(&primary));
        replica.set(&format!("lease.primary-url={url}")).start();
        replica.wait_for("all is said", || all_said.load(Ordering::Relaxed));
        done.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(server.local_addr().unwrap());
        replica.assert_running();
        let log = replica.log();
        assert!(log.lines().any(|line| line.contains("WARN") && line.contains(&url)), "{log}");
        assert_eq!(replica.status()["role"]["upstream"]["connected"], false);
    });
}

/// Number of bytes of a segment that are in use.
fn used(segment: &Path) -> u64 {
    let bytes = fs::read(segment).expect("the segment is there");
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)
}

/// The segments of a log, oldest first.
fn segments(host: &Host) -> Vec<PathBuf> {
    let files = fs::read_dir(host.data().join("log")).expect("there is a log");
    let mut segments: Vec<PathBuf> = files
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .filter(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("spare")))
        .collect();
    segments.sort();
    segments
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("the file is there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("the file reaches there");
    file.write_all_at(&[byte[0] ^ 0x40], offset).expect("the file can be written");
}

/// Flips a bit in the payload of the last record of a database.
fn damage_last_record(segment: &Path, database: &str) {
    let bytes = fs::read(segment).expect("the segment is there");
    // The name comes after the 136 bytes of the header, the payload after the name, at a multiple of 8 bytes.
    let name = (136..bytes.len() - database.len())
        .rev()
        .find(|at| bytes[*at..].starts_with(database.as_bytes()) && bytes[at - 136..].starts_with(b"LFR1"));
    let name = name.unwrap_or_else(|| panic!("{} has no record of {database}", segment.display()));
    flip(segment, (name + database.len()).next_multiple_of(8) as u64 + 120);
}

/// TXID of the mark in a sidecar: up to there the files are durable, and recovery does not replay the log.
fn mark(host: &Host, database: &str) -> u64 {
    let mut txid = [0; 8];
    let path = host.data().join("checksums").join(format!("{database}.sum"));
    let file = File::open(path).expect("there is a sidecar");
    file.read_exact_at(&mut txid, 16).expect("it has a header");
    u64::from_le_bytes(txid)
}

/// A database that is set aside, and why.
#[track_caller]
fn quarantine_reason(host: &Host, database: &str) -> String {
    let db = host.database(database).unwrap_or_else(|| panic!("{database} is not in the status"));
    assert_eq!(db["state"], "quarantined", "{db}");
    db["reason"].as_str().expect("there is a reason").to_owned()
}

#[test]
fn a_flipped_bit_in_the_log_sets_one_database_aside_and_a_replica_heals_itself() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for name in ["good.db", "bad.db"] {
        primary.sql(name, "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
        primary.wait_position_equal(&replica, name);
    }
    for host in [&replica, &primary] {
        loop {
            primary.sql("bad.db", "INSERT INTO t VALUES (randomblob(3000));");
            // A record after it proves that the damaged one once was whole.
            primary.sql("good.db", "INSERT INTO t VALUES (2);");
            for name in ["good.db", "bad.db"] {
                primary.wait_position_equal(&replica, name);
            }
            let needed = host.txid("bad.db");
            host.kill();
            // Otherwise nobody needs the record any more.
            if mark(host, "bad.db") < needed {
                break;
            }
            host.start();
            replica.wait_connected();
        }
        let segment = segments(host).pop().expect("there is a segment");
        damage_last_record(&segment, "bad.db");
        host.expect_error("log is damaged").expect_error("database is quarantined");
        let before = host.log().len();
        host.start();
        let named = segment.display().to_string();
        let log = host.log()[before..].to_owned();
        assert!(log.contains(&format!("{named} is damaged at offset")) && log.contains("bad.db"), "{log}");
        if host.name() == "b" {
            // The primary is still there and has the database.
            host.wait_connected();
            // A snapshot heals it.
            host.wait_database("bad.db", "ok");
            assert_equal(&primary, host, "bad.db");
            continue;
        }
        let reason = quarantine_reason(host, "bad.db");
        assert!(reason.contains(&named) && reason.contains("bad.db"), "{reason}");
        assert!(host.try_sql("bad.db", "SELECT * FROM t").is_err(), "a quarantined database was opened");
        let shown = host.litefs(&["status"]).output().expect("it runs");
        assert_eq!(shown.status.code(), Some(1));
        let export = try_run(host.litefs(&["export", "bad.db"]).arg(fleet.scratch().join("bad.db")));
        assert!(export.is_err_and(|error| error.contains("quarantined")));
    }
    // All others go on.
    primary.sql("good.db", "INSERT INTO t VALUES ('after');");
    replica.wait_connected();
    assert_equal(&primary, &replica, "good.db");
    let rows = replica.sql("bad.db", "SELECT count(*) FROM t");
    assert!(
        rows.parse::<u64>().expect("a number") >= 3,
        "the replica lost what the primary cannot read: {rows}"
    );
}

/// Two databases and a log, of which the newest segment is then damaged. Whatever is served afterwards is whole, can be
/// written and reaches the replica; what is not is quarantined; and an ERROR line says that the log is damaged.
fn nothing_disappears_without_a_word(orderly: bool, damage: fn(&Path)) {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for i in 0..10 {
        for name in ["a.db", "b.db"] {
            primary.sql(name, "PRAGMA journal_mode=WAL; CREATE TABLE IF NOT EXISTS t(x);");
            primary
                .sql(name, &format!("INSERT INTO t VALUES ({i}); INSERT INTO t VALUES (randomblob(2000));"));
        }
    }
    for name in ["a.db", "b.db"] {
        primary.wait_position_equal(&replica, name);
    }
    if orderly {
        primary.stop()
    } else {
        primary.kill()
    };
    damage(&segments(&primary).pop().expect("there is a segment"));
    primary.expect_error("damaged").expect_error("quarantined").expect_error("lost");
    let before = primary.log().len();
    primary.start();
    let said = primary.log()[before..].to_owned();
    let reported = said.lines().any(|line| line.contains("ERROR") && line.contains("log"));
    assert!(reported, "the log is damaged, and nobody is told: {said}");
    for name in ["a.db", "b.db"] {
        let db = primary.database(name).unwrap_or_else(|| panic!("{name} is not in the status"));
        if db["state"] == "quarantined" {
            continue;
        }
        assert_eq!(primary.sql(name, "SELECT count(*) FROM t WHERE typeof(x) = 'integer'"), "10", "{name}");
        primary.sql(name, "INSERT INTO t VALUES ('after');");
        replica.wait_connected();
        assert_equal(&primary, &replica, name);
    }
}

fn cut_in_half(segment: &Path) {
    let half = used(segment) / 2;
    let file = File::options().write(true).open(segment).expect("the segment is there");
    file.set_len(half).expect("it can be cut");
}

#[test]
fn a_segment_cut_in_half_after_an_orderly_stop_is_reported() {
    nothing_disappears_without_a_word(true, cut_in_half);
}

#[test]
fn a_segment_cut_in_half_after_a_crash_is_reported() {
    nothing_disappears_without_a_word(false, cut_in_half);
}

#[test]
fn a_segment_with_a_damaged_header_costs_the_history_and_not_the_databases() {
    // After an orderly stop the index beside the segment says the same.
    nothing_disappears_without_a_word(false, |segment| flip(segment, 40));
}

#[test]
fn a_file_in_the_log_that_is_no_segment_stops_the_start_with_its_name() {
    let fleet = Fleet::new();
    let host = fleet.primary("a");
    host.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    host.stop();
    let foreign = host.data().join("log/7fffffffffffffff.log");
    fs::write(&foreign, noise(10_000)).unwrap();
    let named = foreign.display().to_string();
    refuses_to_start(&host, host.agent_command(), SOFTWARE, &[&named, "not a segment", "move it"]);
    assert_eq!(fs::read(&foreign).unwrap(), noise(10_000), "the file was changed");
    fs::remove_file(&foreign).unwrap();

    // A segment of another version must not be read as this one.
    let segment = segments(&host).pop().expect("there is a segment");
    let before = fs::read(&segment).unwrap();
    File::options().write(true).open(&segment).unwrap().write_all_at(&[0, 0, 0, 9], 8).unwrap();
    let named = segment.display().to_string();
    refuses_to_start(&host, host.agent_command(), SOFTWARE, &[&named, "version 9"]);
    fs::write(&segment, before).unwrap();
    host.start();
    assert_eq!(host.sql("app.db", "SELECT x FROM t"), "1");
}

/// The file of a transaction of 10 MB in `big.db`, which is in no segment of the log.
fn large_transaction(host: &Host) -> PathBuf {
    host.sql("good.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1);");
    host.sql(
        "big.db",
        "PRAGMA journal_mode=WAL; CREATE TABLE t(x);\nINSERT INTO t VALUES (randomblob(10000000));",
    );
    let file = fs::read_dir(host.data().join("ltx/big.db")).expect("it is in a file of its own");
    file.map(|entry| entry.expect("it can be listed").path()).next().expect("one file")
}

fn flip_in_the_middle(file: &Path) {
    flip(file, fs::metadata(file).expect("it is there").len() / 2);
}

#[test]
fn a_damaged_file_of_a_large_transaction_is_not_sent() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let file = large_transaction(&primary);
    flip_in_the_middle(&file);
    let verified = try_run(Command::new(litefs()).args(["ltx", "verify"]).arg(&file));
    assert!(verified.is_err_and(|error| error.contains(file.to_str().unwrap())));

    // A replica gets the database in another way, or not at all, but never wrong.
    primary.expect_error("damaged");
    let replica = fleet.replica("b", &primary);
    primary.wait_position_equal(&replica, "good.db");
    assert_equal(&primary, &replica, "big.db");
}

#[test]
fn a_damaged_file_of_a_large_transaction_is_not_replayed() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let file = large_transaction(&primary);
    // Before the database itself is durable, 5 s after the start: recovery needs the file.
    primary.kill();
    flip_in_the_middle(&file);
    // The database is set aside under its name, the other runs.
    primary.expect_error("damaged").expect_error("quarantined");
    primary.start();
    let reason = quarantine_reason(&primary, "big.db");
    assert!(reason.contains(file.to_str().unwrap()), "{reason}");
    primary.sql("good.db", "INSERT INTO t VALUES (2);");
    let replica = fleet.replica("b", &primary);
    primary.wait_position_equal(&replica, "good.db");
    assert_equal(&primary, &replica, "good.db");
}

#[test]
fn files_that_disappeared_or_shrank_while_the_agent_was_stopped_are_not_served() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for name in ["gone.db", "short.db", "good.db"] {
        primary.sql(
            name,
            "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (randomblob(20000));",
        );
        primary.wait_position_equal(&replica, name);
    }
    // First on the replica, which can get everything again, then on the primary.
    for host in [&replica, &primary] {
        host.stop();
        let files = host.data().join("files");
        fs::remove_file(files.join("gone.db")).unwrap();
        File::options().write(true).open(files.join("short.db")).unwrap().set_len(8192).unwrap();
        host.expect_error("database is quarantined");
        host.start();
        if host.name() == "b" {
            host.wait_connected();
            for name in ["gone.db", "short.db"] {
                // A snapshot heals it.
                host.wait_database(name, "ok");
                assert_equal(&primary, host, name);
            }
        } else {
            for name in ["gone.db", "short.db"] {
                let reason = quarantine_reason(host, name);
                assert!(reason.contains(files.join(name).to_str().unwrap()), "{reason}");
                let opened = host.try_sql(name, "SELECT count(*) FROM t");
                assert!(opened.is_err(), "{name} is served: {opened:?}");
                let opened = host.try_sql(name, "CREATE TABLE another(x)");
                assert!(opened.is_err(), "{name} is made anew: {opened:?}");
            }
        }
    }
    primary.sql("good.db", "INSERT INTO t VALUES (1);");
    replica.wait_connected();
    assert_equal(&primary, &replica, "good.db");
    assert_eq!(replica.sql("gone.db", "SELECT length(x) FROM t"), "20000");
}

/// A host whose data directory is on a small file system, and what takes that away at the end.
fn small_host<'a>(fleet: &'a Fleet, name: &str, role: Role<'a>, size: &str) -> (Mounted, Host) {
    let host = fleet.host(name, role);
    let disk = Mounted::tmpfs(&host.data(), size);
    // Small segments, so that the log takes no more than it has.
    host.set("log.segment-size=1MiB").set("log.retention-size=2MiB").set("log.retention-age=0s");
    host.expect_error("No space left on device");
    (disk, host)
}

/// Leaves no byte free in a directory's file system.
fn fill_up(dir: &Path) -> PathBuf {
    let ballast = dir.join("ballast");
    let mut file = File::options().create(true).append(true).open(&ballast).expect("it can be made");
    for bytes in [1 << 20, 1 << 16, 1 << 12] {
        while file.write_all(&vec![1; bytes]).is_ok() {}
    }
    ballast
}

/// Whether SQLite says that the disk is full.
fn is_full(answer: &str) -> bool {
    answer.contains("database or disk is full")
}

/// Commits until the disk is full; gives the number of acknowledged rows. The error must be SQLite's for a full disk.
#[track_caller]
fn insert_until_full(shell: &mut Shell, from: u64, bytes: u64) -> u64 {
    for n in from.. {
        let answer = shell.ask(&format!("INSERT INTO t VALUES ({n}, randomblob({bytes}));"));
        if !answer.is_empty() {
            assert!(is_full(&answer), "{answer}");
            return n - 1;
        }
        assert!(n < 100_000, "the disk does not become full");
    }
    unreachable!()
}

#[test]
fn a_full_disk_fails_the_commit_and_nothing_else() {
    for mode in ["WAL", "DELETE"] {
        for synchronous in ["FULL", "OFF"] {
            let fleet = Fleet::new();
            let (_disk, primary) = small_host(&fleet, "a", Role::Primary, "24m");
            primary.start();
            let replica = fleet.replica("b", &primary);
            for name in ["app.db", "other.db"] {
                primary.sql(
                    name,
                    &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(n INTEGER PRIMARY KEY, x);"),
                );
            }
            let [mut shell, mut other] = ["app.db", "other.db"].map(|name| Shell::open(&primary.path(name)));
            for shell in [&mut shell, &mut other] {
                shell.run(&format!("PRAGMA synchronous={synchronous};"));
            }
            assert_eq!(other.ask("INSERT INTO t VALUES (1, 'x');"), "");
            let mut rows = insert_until_full(&mut shell, 1, 15_000);
            // The very last byte, in small steps.
            fill_up(&primary.data());
            rows = insert_until_full(&mut shell, rows + 1, 10);
            // Again and again: the error stays the same, a rolled-back transaction is no damage, reading works.
            let spilled = "PRAGMA cache_size=5; BEGIN; UPDATE t SET x = randomblob(1500); COMMIT;";
            for sql in [spilled, "ROLLBACK;", "UPDATE t SET x = randomblob(1500) WHERE n = 1;"] {
                let answer = shell.ask(sql);
                let expected = answer.is_empty() || answer.contains("no transaction is active");
                assert!(expected || is_full(&answer), "{answer}");
            }
            assert_eq!(shell.run("SELECT count(*), max(n) FROM t;"), format!("{rows}|{rows}"));
            let mut others = 1;
            for n in 2..6 {
                let answer = other.ask(&format!("INSERT INTO t VALUES ({n}, randomblob(5000));"));
                assert!(answer.is_empty() || is_full(&answer), "{answer}");
                others += u64::from(answer.is_empty());
            }
            for name in ["app.db", "other.db"] {
                let db = primary.database(name).expect("it is there");
                assert_eq!(db["state"], "ok", "{mode}, {synchronous}: {db}");
            }
            // With space it works again, without a restart.
            fs::remove_file(primary.data().join("ballast")).unwrap();
            run(Command::new("mount").args(["-o", "remount,size=64m"]).arg(primary.data()));
            primary.wait_for("commits work again", || {
                let answer = shell.ask(&format!("INSERT INTO t VALUES ({}, randomblob(15000));", rows + 1));
                answer.is_empty()
            });
            rows += 1;
            assert_eq!(other.ask("INSERT INTO t(x) VALUES (randomblob(5000));"), "");
            others += 1;
            drop((shell, other));
            for (name, rows) in [("app.db", rows), ("other.db", others)] {
                assert_equal(&primary, &replica, name);
                assert_eq!(replica.sql(name, "SELECT count(*) FROM t"), rows.to_string(), "{name}, {mode}");
            }
            primary.kill();
            primary.start();
            replica.wait_connected();
            assert_equal(&primary, &replica, "app.db");
        }
    }
}

#[test]
fn a_commit_for_which_the_log_has_no_space_is_never_acknowledged() {
    for synchronous in ["FULL", "OFF"] {
        let fleet = Fleet::new();
        let (_disk, primary) = small_host(&fleet, "a", Role::Primary, "24m");
        primary.start();
        primary.sql(
            "app.db",
            "PRAGMA journal_mode=WAL;\nCREATE TABLE t(id INTEGER PRIMARY KEY, n, x);\n\
             WITH RECURSIVE i(v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM i WHERE v < 20) \
             INSERT INTO t SELECT v, 0, randomblob(3000) FROM i;",
        );
        let mut shell = Shell::open(&primary.path("app.db"));
        shell.run(&format!("PRAGMA synchronous={synchronous}; PRAGMA wal_autocheckpoint=100;"));
        // The WAL is as large as it will be and is written from its beginning again: only the log still grows.
        let (mut tried, mut acknowledged, mut refused) = (0, 0, 0);
        let mut update = |shell: &mut Shell| {
            tried += 1;
            let answer = shell.ask(&format!("UPDATE t SET n = {tried}, x = randomblob(3000);"));
            assert!(answer.is_empty() || answer.contains("full"), "{answer}");
            if answer.is_empty() {
                acknowledged = tried;
            }
            (acknowledged, answer.is_empty())
        };
        for _ in 0..20 {
            assert!(update(&mut shell).1);
        }
        fill_up(&primary.data());
        while refused < 10 {
            let (acknowledged, told) = update(&mut shell);
            refused += u32::from(!told);
            assert!(acknowledged < 1000, "the log does not become full");
            let seen = shell.run("SELECT DISTINCT n FROM t;");
            assert_eq!(seen, acknowledged.to_string(), "a refused update is there, or half of it");
        }
        fs::remove_file(primary.data().join("ballast")).unwrap();
        primary.wait_for("commits work again", || update(&mut shell).1);
        let (acknowledged, _) = update(&mut shell);
        drop(shell);
        assert_sane(&primary, "app.db");
        primary.kill();
        primary.start();
        assert_eq!(primary.sql("app.db", "SELECT DISTINCT n FROM t"), acknowledged.to_string());
        assert_sane(&primary, "app.db");
    }
}

#[test]
fn a_replica_whose_disk_is_full_waits_and_then_has_everything() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let (_disk, replica) = small_host(&fleet, "b", Role::ReplicaOf(&primary), "16m");
    replica.start();
    replica.wait_connected();
    for mode in ["WAL", "DELETE"] {
        primary.sql(&format!("{mode}.db"), &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x);"));
        primary.wait_position_equal(&replica, &format!("{mode}.db"));
    }
    // Connected already: a new connection to a database in WAL mode needs space, with or without an agent.
    let mut readers = ["WAL.db", "DELETE.db"].map(|name| Shell::open(&replica.path(name)));
    for reader in &mut readers {
        assert_eq!(reader.run("SELECT count(*) FROM t;"), "0");
    }
    fill_up(&replica.data());
    for _ in 0..40 {
        for mode in ["WAL", "DELETE"] {
            primary.sql(&format!("{mode}.db"), "INSERT INTO t VALUES (randomblob(100000));");
        }
    }
    replica.wait_for("the replica says that its disk is full", || replica.log().contains("No space left"));
    replica.assert_running();
    // What it has can be read.
    for reader in &mut readers {
        let rows = reader.run("SELECT count(*) FROM t;");
        assert!(rows.parse::<u64>().is_ok_and(|rows| rows < 40), "{rows}");
    }
    for name in ["WAL.db", "DELETE.db"] {
        assert_eq!(replica.database(name).expect("it is there")["state"], "ok");
    }
    run(Command::new("mount").args(["-o", "remount,size=96m"]).arg(replica.data()));
    for (name, reader) in ["WAL.db", "DELETE.db"].iter().zip(&mut readers) {
        assert_equal(&primary, &replica, name);
        assert_eq!(reader.run("SELECT count(*) FROM t;"), "40");
    }
}

#[test]
fn an_import_for_which_there_is_no_space_changes_nothing() {
    let fleet = Fleet::new();
    let (_disk, primary) = small_host(&fleet, "a", Role::Primary, "24m");
    primary.start();
    primary.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES ('kept');");
    let source = fleet.scratch().join("source.db");
    sqlite3(&source, "CREATE TABLE t(x);\nINSERT INTO t VALUES (randomblob(30000000));");
    for name in ["app.db", "new.db"] {
        let error = primary.try_import(name, &source).expect_err("it does not fit");
        assert!(error.contains("No space left"), "{error}");
    }
    assert_eq!(primary.database("new.db"), None);
    let staged = fs::read_dir(primary.data().join("staging")).unwrap().count();
    assert_eq!(staged, 0, "the import was left in the staging directory");
    assert_eq!(primary.sql("app.db", "SELECT x FROM t"), "kept");
    primary.sql("app.db", "INSERT INTO t VALUES (2);");
    assert_sane(&primary, "app.db");
}
