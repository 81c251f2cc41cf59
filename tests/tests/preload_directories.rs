//! The directories that `liblitefs.so` keeps open while databases in them are: what is beside a database is found as it is now.

use litefs_tests::library::*;
use litefs_tests::*;

/// What the scripts begin with: `connect`, a command without the library, the descriptors of directories that are kept, and
/// whether a journal and a WAL are seen in a directory.
const BEGIN: &str = r#"
import os, sqlite3, subprocess, sys
here = os.path.realpath(sys.argv[1])

def connect(path):
    c = sqlite3.connect(path, isolation_level=None)
    c.execute("CREATE TABLE IF NOT EXISTS t(v)")
    c.execute("INSERT INTO t VALUES(1)")
    return c

def outside(*command):
    subprocess.run(command, check=True, env={"PATH": os.environ["PATH"]})

def kept():
    high = [int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) >= 700]
    return [fd for fd in high if os.path.isdir(f"/proc/self/fd/{fd}")]

def assert_seen(dir):
    for name in ("other.db-journal", "other.db-wal"):
        path = dir + "/" + name
        assert not os.path.exists(path), path
        outside("touch", path)
        assert os.path.getsize(path) == 0
        outside("rm", path)
        assert not os.path.exists(path), path
"#;

/// Runs a script on a primary behind the preload door; gives it and its replica.
fn run_on_primary(fleet: &Fleet, script: &str) -> (Host, Host) {
    let (primary, replica) = hosts(fleet, ("preload", "preload"));
    run(&mut python(&primary, &format!("{BEGIN}{script}"), &[]));
    primary.assert_no_errors();
    (primary, replica)
}

#[test]
fn a_journal_or_a_wal_is_seen_when_it_comes_and_goes() {
    run_on_primary(
        &Fleet::new(),
        r#"
assert kept() == []
a = connect(here + "/a.db")
b = connect(here + "/b.db")
(fd,) = kept()
assert os.path.samefile(f"/proc/self/fd/{fd}", here)
assert_seen(here)
# The application does not close it, with others or by itself.
os.closerange(700, 70000)
try:
    os.close(fd)
except OSError as error:
    assert error.errno == 9, error
else:
    raise RuntimeError("it was closed")
assert kept() == [fd]
a.close()
assert_seen(here)
child = os.fork()
if child == 0:
    assert kept() == [fd]
    assert_seen(here)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
b.close()
assert kept() == []
assert_seen(here)
"#,
    );
}

#[test]
fn an_application_that_takes_the_descriptor_or_has_few_of_them_loses_nothing() {
    run_on_primary(
        &Fleet::new(),
        r#"
import resource
a = connect(here + "/a.db")
(fd,) = kept()
empty = here + "-empty"
os.mkdir(empty)
elsewhere = os.open(empty, os.O_RDONLY)
os.dup2(elsewhere, fd)
assert_seen(here)
a.execute("INSERT INTO t VALUES(2)")
a.close()
assert os.path.samefile(f"/proc/self/fd/{fd}", empty), "it is the application's"
os.close(fd)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
a = connect(here + "/a.db")
assert kept() == []
assert_seen(here)
assert a.execute("SELECT count(*) FROM t").fetchone() == (3,)
"#,
    );
}

#[test]
fn a_directory_that_was_made_anew_is_another_one() {
    let fleet = Fleet::new();
    let (primary, replica) = run_on_primary(
        &fleet,
        r#"
sub = here + "/sub"
os.mkdir(sub)
old = connect(sub + "/x.db")
os.unlink(sub + "/x.db")
os.rmdir(sub)
os.mkdir(sub)
new = connect(sub + "/x.db")
assert_seen(sub)
y = connect(sub + "/y.db")
assert_seen(sub)
old.close()
assert_seen(sub)
for c in (new, y):
    assert c.execute("SELECT count(*) FROM t").fetchone() == (1,)
    c.close()
assert kept() == []
"#,
    );
    assert_follows(&primary, &replica, "sub/x.db", 1);
    assert_follows(&primary, &replica, "sub/y.db", 1);
    primary.assert_no_errors();
}

#[test]
fn a_reader_takes_back_the_transaction_of_a_writer_that_died() {
    run_on_primary(
        &Fleet::new(),
        r#"
reader = connect(here + "/a.db")
(fd,) = kept()
writer = '''
import os, sqlite3, sys
c = sqlite3.connect(sys.argv[1] + "/a.db", isolation_level=None)
c.execute("PRAGMA cache_size=1")
c.execute("PRAGMA cache_spill=1")
c.execute("BEGIN")
for i in range(200):
    c.execute("INSERT INTO t VALUES(randomblob(3000))")
os.kill(os.getpid(), 9)
'''
died = subprocess.run([sys.executable, "-c", writer, here])
assert died.returncode == -9, died
assert os.path.getsize(here + "/a.db-journal") > 0
assert os.path.getsize(here + "/a.db") > 100_000, "it has spilled"
assert reader.execute("SELECT count(*) FROM t").fetchone() == (1,)
assert not os.path.exists(here + "/a.db-journal")
assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"#,
    );
}

#[test]
fn descriptors_that_are_closed_unseen_are_not_taken_for_others() {
    run_on_primary(
        &Fleet::new(),
        r#"
import ctypes
os.mkdir(here + "/sub")
a = connect(here + "/a.db")
CLOSE_RANGE = 436
(fd,) = kept()
assert ctypes.CDLL(None).syscall(CLOSE_RANGE, fd, fd, 0) == 0
assert kept() == []
b = connect(here + "/sub/b.db")
assert kept() == [fd]
assert os.path.samefile(f"/proc/self/fd/{fd}", here + "/sub")
assert_seen(here)
assert_seen(here + "/sub")
a.execute("INSERT INTO t VALUES(2)")
a.close()
assert kept() == [fd]
assert_seen(here + "/sub")
assert ctypes.CDLL(None).syscall(CLOSE_RANGE, 700, 0xffffffff, 0) == 0
import fcntl
mine = fcntl.fcntl(os.open(here, os.O_RDONLY), fcntl.F_DUPFD_CLOEXEC, fd)
assert mine == fd
assert_seen(here + "/sub")
b.close()
os.fstat(mine)
os.close(mine)
"#,
    );
}

#[test]
fn a_path_that_leads_somewhere_else_is_not_looked_up_where_it_led() {
    let fleet = Fleet::new();
    let primary = fleet.host("a", Role::Primary);
    primary.set("door=preload").start();
    let script = format!(
        "{BEGIN}{}",
        r#"
a = connect(here + "/a.db")
input()
print("open", flush=True)
input()
os.rename(here, here + ".old")
os.mkdir(here)
b = connect(here + "/b.db")
assert_seen(here)
print("seen", flush=True)
"#
    );
    let mut client = Client::start(&mut python(&primary, &script, &[]));
    assert_eq!(client.tell(""), "open");
    // Its directory goes.
    primary.stop();
    assert_eq!(client.tell(""), "seen");
}
