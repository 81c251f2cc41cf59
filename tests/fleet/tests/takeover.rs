//! A restart, a crash, an upgrade and a stop of the service, under applications that write.

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
fn applications_go_on_while_the_service_is_restarted_killed_and_upgraded_and_the_mount_goes_with_a_stop() {
    let fleet = Fleet::new(2);
    let (host, replica) = (&fleet[0], &fleet[1]);
    for host in fleet.hosts() {
        host.install_litefs();
    }
    host.start_litefs(None);
    replica.start_litefs(Some(host));
    // Ready before anything happens: the upgrade itself then takes a moment.
    host.offer_packages(2);
    host.push("/tmp/writer.py", WRITER.as_bytes());
    let mut writer = host.command("python3 /tmp/writer.py").spawn().expect("the writer starts");
    let done = || host.wait_for("cat /tmp/done").trim().parse::<u64>().expect("a number");
    let mut goes_on = |what: &str| {
        let before = done();
        fleet::wait_for(&format!("the writer goes on after: {what}"), || {
            let ended = writer.try_wait().expect("it is our child");
            assert!(ended.is_none(), "after {what} the writer saw an error\n{}", host.journal());
            (done() > before + 20).then_some(())
        });
    };
    goes_on("the start");
    let mount = host.run("findmnt -no ID,SOURCE /srv/litefs/db");
    let disturbances = [
        "systemctl restart litefs@db",
        "systemctl kill --kill-who=main -s KILL litefs@db",
        "apt-get install -y -qq litefs",
        "systemctl kill --kill-who=main -s KILL litefs@db",
        "systemctl restart litefs@db",
    ];
    for disturbance in disturbances {
        let pid = host.run("systemctl show --value -p MainPID litefs@db");
        host.run(disturbance);
        goes_on(disturbance);
        host.wait_for("systemctl is-active litefs@db");
        assert_ne!(host.run("systemctl show --value -p MainPID litefs@db"), pid, "{disturbance}");
        assert_eq!(host.run("findmnt -no ID,SOURCE /srv/litefs/db"), mount, "mounted anew by {disturbance}");
    }
    host.run("dpkg-query -W litefs | grep -- '-2$'");
    host.run("touch /tmp/stop");
    assert!(writer.wait().expect("the writer ends").success(), "the writer saw an error\n{}", host.journal());
    // Nothing is lost, here and on the replica.
    let rows = done();
    replica.wait_for(&format!("test $(sqlite3 /srv/litefs/db/app.db 'SELECT count(*) FROM t') = {rows}"));
    host.run("systemctl stop litefs@db");
    host.run("! findmnt /srv/litefs/db");
}
