//! A restart, a crash, an upgrade and a stop of the service, under applications that write through both doors.

use fleet::{Fleet, Host};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

/// Commits row after row until it is told to stop, and ends with an error at the first error.
const WRITER: &str = r#"
import os, sqlite3, sys
cluster = sys.argv[1]
db = sqlite3.connect(f"/srv/litefs/{cluster}/app.db", timeout=60, isolation_level=None)
db.execute("PRAGMA journal_mode=wal")
db.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x)")
n = 0
while not os.path.exists("/tmp/stop"):
    n += 1
    db.execute("INSERT INTO t VALUES (?, randomblob(100))", (n,))
    with open(f"/tmp/{cluster}.new", "w") as f:
        f.write(str(n))
    os.rename(f"/tmp/{cluster}.new", f"/tmp/{cluster}.done")
assert db.execute("SELECT count(*) FROM t").fetchone() == (n,)
assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"#;

/// Kills the agent of a replica while a thread of it waits for the lock of the WAL, which an application has whose fsync no
/// agent answers any more: the threads that would are stopped one by one.
const KILLER: &str = r#"
import ctypes, os, signal, sqlite3, subprocess, threading, time
SEIZE, INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
db = sqlite3.connect("/srv/litefs/db/app.db")
# Its connection keeps the agent's: that one writes to a WAL that it has open already.
while db.execute("SELECT count(*) FROM t").fetchone()[0] < 2:
    time.sleep(0.01)
wal = os.open("/srv/litefs/db/app.db-wal", os.O_RDWR)
agent = int(subprocess.check_output(["systemctl", "show", "--value", "-p", "MainPID", "litefs@db"]))

def read(path):
    try:
        with open(path) as f:
            return f.read()
    except OSError:
        # The thread has ended.
        return ""

def threads():
    return [f"/proc/{agent}/task/{thread}" for thread in os.listdir(f"/proc/{agent}/task")]

def ptrace(request, thread):
    assert ctypes.CDLL(None).ptrace(ctypes.c_long(request), ctypes.c_long(thread), None, None) == 0

serving = [int(t.rsplit("/")[-1]) for t in threads() if read(t + "/comm").startswith("fuser-")]
assert serving
for thread in serving:
    ptrace(SEIZE, thread)
    ptrace(INTERRUPT, thread)
    os.waitpid(thread, WALL)
fsync = threading.Thread(target=os.fsync, args=(wal,))
fsync.start()
while read(f"/proc/self/task/{fsync.native_id}/wchan") != "request_wait_answer":
    time.sleep(0.01)
print("ready", flush=True)

def waits(thread):
    """Not for the disk, which takes less time."""
    for _ in range(30):
        if ") D " not in read(thread + "/stat"):
            return False
        time.sleep(0.01)
    return True

while not any(waits(thread) for thread in threads()):
    time.sleep(0.01)
os.kill(agent, signal.SIGKILL)
for thread in serving:
    os.waitpid(thread, WALL)
# Python asks again when it is interrupted.
fsync.join()
assert db.execute("SELECT count(*) FROM t").fetchone()[0] >= 2
"#;

/// An application, and the cluster that it writes to.
struct Writer<'a> {
    host: &'a Host,
    cluster: &'static str,
    process: Child,
}

impl Writer<'_> {
    fn rows(&self) -> u64 {
        self.host.wait_for(&format!("cat /tmp/{}.done", self.cluster)).trim().parse().expect("a number")
    }

    fn goes_on(&mut self, what: &str) {
        let before = self.rows();
        fleet::wait_for(&format!("the writer of {} goes on after: {what}", self.cluster), || {
            let ended = self.process.try_wait().expect("it is our child");
            assert!(ended.is_none(), "{}: after {what} an error\n{}", self.cluster, self.host.journal());
            (self.rows() > before + 20).then_some(())
        });
    }
}

fn primary_and_replica() -> Fleet {
    let fleet = Fleet::new(2);
    fleet.hosts().iter().for_each(Host::install_litefs);
    fleet[0].start_litefs(None);
    fleet[1].start_litefs(Some(&fleet[0]));
    fleet
}

#[test]
fn applications_go_on_while_the_service_is_restarted_killed_and_upgraded_and_the_mount_goes_with_a_stop() {
    let fleet = primary_and_replica();
    let (host, replica) = (&fleet[0], &fleet[1]);
    // A second cluster on this host, whose applications come through the preload library.
    host.apt_install("liblitefs");
    host.push("/etc/litefs/shop.toml", "door = \"preload\"\n[http]\nlisten = \"127.0.0.1:20203\"\n");
    host.run("systemctl enable --now litefs@shop && test -L /srv/litefs/shop");
    // Ready before anything happens: the upgrade itself then takes a moment.
    host.offer_packages(2);
    host.push("/tmp/writer.py", WRITER.as_bytes());
    let start = |command: &str, cluster| {
        let process = host.command(command).spawn().expect("the writer starts");
        Writer { host, cluster, process }
    };
    let mut writers = [
        start("python3 /tmp/writer.py db", "db"),
        start("litefs -c shop exec -- python3 /tmp/writer.py shop", "shop"),
    ];
    for writer in &mut writers {
        writer.goes_on("the start");
    }
    let mount = host.run("findmnt -no ID,SOURCE /srv/litefs/db");
    host.wait_for("systemctl is-active litefs-db-guard-$(pgrep -x litefs-guard).scope");
    let disturbances = [
        "systemctl restart litefs@db litefs@shop",
        "systemctl kill --kill-who=main -s KILL litefs@db litefs@shop",
        // The agents with all that is theirs, but for the guards, which let them go.
        "systemctl kill -s KILL litefs@db litefs@shop",
        "apt-get install -y -qq litefs",
        "systemctl kill --kill-who=main -s KILL litefs@db litefs@shop",
        "systemctl restart litefs@db litefs@shop",
    ];
    for disturbance in disturbances {
        let pids = host.run("systemctl show --value -p MainPID litefs@db litefs@shop");
        host.run(disturbance);
        for writer in &mut writers {
            writer.goes_on(disturbance);
        }
        host.wait_for("systemctl is-active litefs@db litefs@shop");
        let after = host.run("systemctl show --value -p MainPID litefs@db litefs@shop");
        assert!(
            pids.lines().zip(after.lines()).all(|(a, b)| a.is_empty() || a != b),
            "{disturbance}: {pids}{after}"
        );
        assert_eq!(host.run("findmnt -no ID,SOURCE /srv/litefs/db"), mount, "mounted anew by {disturbance}");
    }
    host.run("dpkg-query -W litefs | grep -- '-2$'");

    // What mounts keeps nothing: another one registers the files of the next database.
    host.run("systemctl kill -s KILL litefs-mount.service");
    host.run("sqlite3 /srv/litefs/db/next.db 'PRAGMA journal_mode=wal; CREATE TABLE t(x); INSERT INTO t VALUES (1)'");
    host.run("test $(sqlite3 /srv/litefs/db/next.db 'SELECT count(*) FROM t') = 1");
    host.run("! journalctl -u litefs@db | grep 'cannot register'");
    writers[0].goes_on("the death of what mounts");

    host.run("touch /tmp/stop");
    for writer in &mut writers {
        let ended = writer.process.wait().expect("the writer ends");
        assert!(ended.success(), "the writer of {} saw an error\n{}", writer.cluster, host.journal());
    }
    // Nothing is lost, here and on the replica.
    let [rows, shop] = [writers[0].rows(), writers[1].rows()];
    replica.wait_for(&format!("test $(sqlite3 /srv/litefs/db/app.db 'SELECT count(*) FROM t') = {rows}"));
    host.wait_for("litefs -c shop status");
    host.run(&format!("litefs -c shop export app.db /tmp/app.db && test $(sqlite3 /tmp/app.db 'SELECT count(*) FROM t') = {shop}"));
    host.run("systemctl stop litefs@db");
    host.run("! findmnt /srv/litefs/db");
    host.wait_for("! systemctl list-units --plain --no-legend 'litefs-*.scope' | grep .");
}

#[test]
fn an_agent_that_is_killed_while_it_waits_for_the_lock_of_an_applications_fsync_is_followed_by_another_one() {
    let fleet = primary_and_replica();
    let (host, replica) = (&fleet[0], &fleet[1]);
    let insert = || {
        host.run("sqlite3 /srv/litefs/db/app.db 'INSERT INTO t VALUES (1)'");
    };
    let has_rows = |rows| {
        replica.wait_for(&format!("test $(sqlite3 /srv/litefs/db/app.db 'SELECT count(*) FROM t') = {rows}"));
    };
    host.run("sqlite3 /srv/litefs/db/app.db 'PRAGMA journal_mode=wal; CREATE TABLE t(x)'");
    insert();
    has_rows(1);
    replica.push("/tmp/killer.py", KILLER.as_bytes());
    let mut command = replica.command("exec python3 /tmp/killer.py");
    let mut killer = command.stdout(Stdio::piped()).spawn().expect("the killer starts");
    let mount = replica.run("findmnt -no ID,SOURCE /srv/litefs/db");
    insert();
    let mut line = String::new();
    let stdout = killer.stdout.take().expect("it is piped");
    BufReader::new(stdout).read_line(&mut line).expect("it is text");
    assert_eq!(line, "ready\n");
    insert();
    let ended = killer.wait().expect("it is our child");
    assert!(ended.success(), "{ended}\n{}", replica.journal());
    has_rows(3);
    assert_eq!(replica.run("findmnt -no ID,SOURCE /srv/litefs/db"), mount, "mounted anew");
}
