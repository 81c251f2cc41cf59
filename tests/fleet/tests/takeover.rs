//! A restart, a crash and a stop of the service, under applications that write.

use fleet::Fleet;

/// Commits row after row until it is told to stop, and ends with an error at the first error.
const WRITER: &str = r#"
import os, sqlite3
db = sqlite3.connect("/srv/litefs/db/app.db", timeout=60, isolation_level=None)
db.execute("PRAGMA journal_mode=wal")
db.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, x)")
n = 0
while not os.path.exists("/tmp/stop"):
    n += 1
    db.execute("INSERT INTO t VALUES (?, randomblob(100))", (n,))
    with open("/tmp/done.new", "w") as f:
        f.write(str(n))
    os.rename("/tmp/done.new", "/tmp/done")
assert db.execute("SELECT count(*) FROM t").fetchone() == (n,)
assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"#;

#[test]
fn applications_go_on_while_the_service_is_restarted_and_killed_and_the_mount_goes_with_a_stop() {
    let fleet = Fleet::new(1);
    let host = &fleet.hosts()[0];
    host.install_litefs();
    host.start_litefs(None);
    host.push("/tmp/writer.py", WRITER.as_bytes());
    let mut writer = host.command("python3 /tmp/writer.py").spawn().expect("the writer starts");
    let goes_on = || {
        let done = host.wait_for("cat /tmp/done");
        host.wait_for(&format!("test $(cat /tmp/done) -gt $(({} + 20))", done.trim()));
    };
    goes_on();
    let mount = host.run("findmnt -no ID,SOURCE /srv/litefs/db");
    for command in ["systemctl restart litefs@db", "systemctl kill --kill-who=main -s KILL litefs@db"] {
        for _ in 0..3 {
            host.run(command);
            goes_on();
            host.wait_for("systemctl is-active litefs@db");
            assert_eq!(host.run("findmnt -no ID,SOURCE /srv/litefs/db"), mount, "mounted again by {command}");
        }
    }
    host.run("touch /tmp/stop");
    assert!(writer.wait().expect("the writer ends").success(), "the writer saw an error");
    host.run("systemctl stop litefs@db");
    host.run("! findmnt /srv/litefs/db");
}
