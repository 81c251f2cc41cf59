//! Bad input and bad surroundings are an error with a name, never a panic, a hang, a wrong answer or a lost database,
//! and leave nothing behind.

use litefs_tests::data_files::segments;
use litefs_tests::{
    Fleet, Host, Mounted, PATIENCE, Role, Shell, assert_equal, assert_sane, try_run, wait_for,
};
use nix::mount::{MntFlags, umount2};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
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
    // Who asks at the moment in which it is given up is told so: ECONNABORTED.
    host.wait_for("nobody serves the mount", || {
        fs::read_dir(host.mount()).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
    });
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
