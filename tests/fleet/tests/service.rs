//! What systemd does with and for the agent: units of a role, applications that start after it, the watchdog, and the
//! lease of an agent that stays down.

use fleet::{Fleet, Host};
use std::path::PathBuf;

const DB: &str = "/srv/litefs/db/app.db";

/// No other host may get the lease because of time.
const CONFIG: &str = "\
[http]
listen = \"0.0.0.0:20202\"
[lease]
type = \"consul\"
ttl = \"600s\"
[consul]
address = \"http://host-b:8500\"
";

/// Runs on the primary only.
const BACKUP: &str = "\
[Unit]
PartOf=litefs-primary@db.target
After=litefs-primary@db.target
[Service]
ExecStart=/bin/sleep infinity
[Install]
WantedBy=litefs-primary@db.target
";

/// An application that needs its database at the first moment.
const APP: &str = "\
[Unit]
Wants=litefs@db.service
After=litefs@db.service
AssertPathIsMountPoint=/srv/litefs/db
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/sqlite3 -cmd '.timeout 60000' /srv/litefs/db/app.db 'INSERT INTO t DEFAULT VALUES'
[Install]
WantedBy=multi-user.target
";

fn consul() -> PathBuf {
    let installed =
        || concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/tools/consul/usr/bin/consul").into();
    std::env::var_os("LITEFS_CONSUL").map_or_else(installed, PathBuf::from)
}

fn property(host: &Host, unit: &str, property: &str) -> String {
    host.run(&format!("systemctl show --value -p {property} {unit}")).trim().to_owned()
}

#[test]
fn units_follow_the_role_and_a_dead_agent_gives_the_lease_away() {
    let fleet = Fleet::new(2);
    let (a, b) = (&fleet[0], &fleet[1]);
    let program = std::fs::read(consul()).expect("`cargo xtask setup` installs Consul below target/tools");
    b.push("/opt/consul", program);
    b.run("chmod +x /opt/consul && systemd-run --unit=consul /opt/consul agent -dev -client 0.0.0.0");
    b.wait_for("python3 -c 'import urllib.request as u; assert len(u.urlopen(\"http://localhost:8500/v1/status/leader\").read()) > 2'");
    for (host, role) in [(a, "primary"), (b, "replica")] {
        host.install_litefs();
        host.push("/etc/litefs/db.toml", CONFIG);
        host.push("/etc/systemd/system/backup.service", BACKUP);
        host.run("systemctl daemon-reload && systemctl enable -q backup.service");
        host.run(&format!("systemctl enable --now litefs@db && litefs wait --role {role} --timeout 60s"));
    }
    a.run(&format!("sqlite3 {DB} 'PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY)'"));
    a.wait_for("systemctl is-active backup.service");
    b.wait_for("systemctl is-active litefs-replica@db.target");
    b.run("! systemctl is-active backup.service");

    // A boot: the application finds its mount, and the primary its lease.
    a.push("/etc/systemd/system/app.service", APP);
    a.run("systemctl daemon-reload && systemctl enable app.service");
    a.power_off();
    assert_eq!(a.boot(), "running");
    assert_eq!(property(a, "app.service", "Result"), "success");
    assert_eq!(a.run(&format!("sqlite3 {DB} 'SELECT count(*) FROM t'")), "1\n");
    a.wait_for("systemctl is-active backup.service");

    // An agent that hangs is started again, and its applications do not notice. It keeps the lease.
    a.push("/etc/systemd/system/litefs@.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n");
    a.run("systemctl daemon-reload && systemctl restart litefs@db");
    let hung = property(a, "litefs@db", "MainPID");
    a.run(&format!("kill -STOP {hung} && sqlite3 -cmd '.timeout 60000' {DB} 'INSERT INTO t DEFAULT VALUES'"));
    assert_ne!(property(a, "litefs@db", "MainPID"), hung);
    a.run("journalctl -u litefs@db | grep 'Watchdog timeout'");
    a.run("litefs wait --role primary --timeout 60s && systemctl is-active backup.service");
    b.wait_for(&format!("test $(sqlite3 {DB} 'SELECT count(*) FROM t') = 2"));

    // An agent that dies and cannot be started: systemd gives up, and the other host leads.
    a.push(
        "/etc/systemd/system/litefs@.service.d/broken.conf",
        "[Service]\nExecStart=\nExecStart=/bin/false\n",
    );
    a.run("systemctl daemon-reload && systemctl kill --kill-who=main -s KILL litefs@db");
    b.run("litefs wait --role primary --timeout 60s");
    assert_eq!(property(a, "litefs@db", "ActiveState"), "failed");
    a.run("journalctl -u litefs-release-lease@db | grep 'the lease is free'");
    b.wait_for("systemctl is-active backup.service");
    b.run(&format!("sqlite3 {DB} 'INSERT INTO t DEFAULT VALUES'"));

    // Repaired, it comes back as a replica.
    a.run("rm /etc/systemd/system/litefs@.service.d/broken.conf && systemctl daemon-reload");
    a.run("systemctl reset-failed litefs@db && systemctl start litefs@db");
    a.wait_for(&format!("test $(sqlite3 {DB} 'SELECT count(*) FROM t') = 3"));
}
