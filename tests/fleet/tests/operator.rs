//! What an operator does, with the packages, on hosts that boot.

use fleet::{Fleet, Host};

const DB: &str = "/srv/litefs/db/app.db";

/// Two hosts: a primary and its replica, with a table `t`.
fn pair() -> Fleet {
    let fleet = Fleet::new(2);
    for host in fleet.hosts() {
        host.install_litefs();
    }
    fleet[0].start_litefs(None);
    fleet[1].start_litefs(Some(&fleet[0]));
    sql(&fleet[0], "PRAGMA journal_mode=WAL; CREATE TABLE t(x)");
    fleet
}

#[track_caller]
fn sql(host: &Host, sql: &str) -> String {
    host.run(&format!("sqlite3 -cmd '.timeout 10000' {DB} \"{sql}\""))
}

/// Waits until the host shows this result.
#[track_caller]
fn wait_sql(host: &Host, sql: &str, expected: &str) {
    host.wait_for(&format!("test \"$(sqlite3 -cmd '.timeout 10000' {DB} '{sql}')\" = '{expected}'"));
}

fn property(host: &Host, unit: &str, property: &str) -> String {
    host.run(&format!("systemctl show --value -p {property} {unit}")).trim().to_owned()
}

fn fails(host: &Host, script: &str) -> String {
    let outcome = host.try_run(script).expect("the host is on");
    assert!(!outcome.success(), "succeeded: {script}\n{}", outcome.stdout);
    outcome.stderr
}

#[test]
fn install_enable_write_read() {
    let fleet = pair();
    let (a, b) = (&fleet[0], &fleet[1]);
    sql(a, "INSERT INTO t VALUES (1)");
    wait_sql(b, "SELECT count(*) FROM t", "1");
    assert!(fails(b, &format!("sqlite3 {DB} 'INSERT INTO t VALUES (2)'")).contains("readonly"));

    // What the operator looks at.
    a.wait_for("systemctl status litefs@db | grep 'Status: \"primary, epoch 1; 1 database, 1 follower\"'");
    b.wait_for(
        "systemctl status litefs@db | grep 'Status: \"replica of host-a, epoch 1, .* ms behind; 1 database'",
    );
    a.run("journalctl -u litefs@db LITEFS_CLUSTER=db | grep 'applications may come'");
    a.run("litefs status && litefs list");
    b.run("litefs status");

    a.wait_for("systemctl is-active litefs-primary@db.target");
    b.wait_for("systemctl is-active litefs-replica@db.target");
    fails(b, "systemctl is-active litefs-primary@db.target");
    // What docs/decisions/0024 says.
    a.run("systemd-analyze security --no-pager --threshold=24 litefs@db");

    // The plug is pulled: both come back with what they had, and go on.
    b.power_off();
    sql(a, "INSERT INTO t VALUES (2)");
    assert_eq!(b.boot(), "running");
    wait_sql(b, "SELECT count(*) FROM t", "2");
    a.power_off();
    assert_eq!(a.boot(), "running");
    sql(a, "INSERT INTO t VALUES (3)");
    wait_sql(b, "SELECT count(*) FROM t", "3");

    // The roles are exchanged by a reload of both.
    let configure = |host: &Host, lease: &str| {
        host.push("/etc/litefs/db.toml", format!("[http]\nlisten = \"0.0.0.0:20202\"\n[lease]\n{lease}"));
        host.run("systemctl reload litefs@db");
    };
    configure(a, "role = \"replica\"\nprimary-url = \"http://host-b:20202\"\n");
    configure(b, "role = \"primary\"\n");
    sql(b, "INSERT INTO t VALUES (4)");
    wait_sql(a, "SELECT count(*) FROM t", "4");
    a.wait_for("systemctl is-active litefs-replica@db.target");
    b.wait_for("systemctl is-active litefs-primary@db.target");
    fails(a, "systemctl is-active litefs-primary@db.target");

    // A host that has lost its FUSE: the same path, through the preload library, by its name.
    b.apt_install("liblitefs");
    b.power_off();
    b.remove_fuse();
    assert_eq!(b.boot(), "running");
    b.run("test -L /srv/litefs/db");
    b.run(&format!("litefs exec -- sqlite3 {DB} 'INSERT INTO t VALUES (5)'"));
    b.run(&format!("LD_PRELOAD=liblitefs.so sqlite3 {DB} 'INSERT INTO t VALUES (6)'"));
    wait_sql(a, "SELECT count(*) FROM t", "6");

    // Purging leaves the databases, and nothing else.
    a.run("apt-get purge -y -qq litefs");
    a.run("test -f /var/lib/litefs/db/files/app.db && ! test -e /run/litefs && ! pgrep -x litefs");
}

#[test]
fn a_host_of_its_own() {
    let fleet = Fleet::new(1);
    let host = &fleet[0];
    host.install_litefs();
    // No configuration at all.
    host.run("systemctl enable --now litefs@db");
    assert_eq!(property(host, "litefs@db", "LoadState"), "loaded");
    sql(host, "CREATE TABLE t(x); INSERT INTO t VALUES (1)");

    // A user without privileges has databases in a directory of its own, and may look at the status with the group.
    host.run("useradd --system app && install -d -o app -g app /srv/litefs/db/app");
    host.run(
        "runuser -u app -- sqlite3 /srv/litefs/db/app/own.db 'PRAGMA journal_mode=WAL; CREATE TABLE t(x)'",
    );
    host.run("runuser -u app -- sqlite3 /srv/litefs/db/app/own.db 'INSERT INTO t VALUES (1)'");
    fails(host, &format!("runuser -u app -- sqlite3 {DB} 'INSERT INTO t VALUES (2)'"));
    fails(host, "runuser -u app -- litefs status");
    host.run("usermod --append --groups litefs app && runuser -u app -- litefs status");
    fails(host, "runuser -u app -- ls /var/lib/litefs/db");

    // Two clusters on one host.
    host.push("/etc/litefs/shop.toml", "[http]\nlisten = \"127.0.0.1:20203\"\n");
    host.run("systemctl enable --now litefs@shop && sqlite3 /srv/litefs/shop/app.db 'CREATE TABLE s(x)'");
    host.run("litefs -c shop list | grep app.db && systemctl is-active litefs@db");

    // Both ways of registering files for passthrough: the helper's, and the agent's own where it may.
    let registers = |asks: &str| {
        let agent = property(host, "litefs@shop", "MainPID");
        host.run(&format!("grep -q CapEff.*{asks} /proc/{agent}/status"));
        host.run("sqlite3 /srv/litefs/shop/app.db 'PRAGMA journal_mode=WAL; INSERT INTO s VALUES (0)'");
        host.run("journalctl -u litefs@shop | grep passthrough=true");
        host.run("! journalctl -u litefs@shop | grep 'cannot register'");
    };
    registers("000000000000001f");
    host.push(
        "/etc/systemd/system/litefs@shop.service.d/own.conf",
        "[Service]\nCapabilityBoundingSet=CAP_SYS_ADMIN\n",
    );
    host.run("systemctl daemon-reload && systemctl restart litefs@shop");
    registers("000000000020001f");

    // Without a takeover the mount of a dead agent ends with it, which its guard asks for, and there is a new one.
    host.push(
        "/etc/litefs/shop.toml",
        "[http]\nlisten = \"127.0.0.1:20203\"\n[mount]\ntakeover-wait = \"0s\"\n",
    );
    host.run("systemctl restart litefs@shop");
    let mount = host.run("findmnt -no ID /srv/litefs/shop");
    host.run("systemctl kill --kill-who=main -s KILL litefs@shop");
    host.wait_for("sqlite3 'file:/srv/litefs/shop/app.db?mode=rw' 'INSERT INTO s VALUES (1)'");
    assert_ne!(host.run("findmnt -no ID /srv/litefs/shop"), mount);

    host.run("systemctl stop litefs@shop && systemctl is-active litefs@db");

    // A mistake in the configuration is said once, not tried again.
    host.push("/etc/litefs/shop.toml", "[http]\nlisten = \"127.0.0.1\"\n");
    fails(host, "systemctl start litefs@shop");
    host.wait_for("test $(systemctl show --value -p ActiveState litefs@shop) = failed");
    assert_eq!(property(host, "litefs@shop", "NRestarts"), "0");
    host.run("journalctl -u litefs@shop | grep 'http.listen'");

    // Socket units: systemd owns the sockets, and the first command starts the agent.
    host.push("/etc/litefs/lazy.toml", "[http]\nlisten = \"127.0.0.1:20204\"\n");
    host.run("systemctl start litefs-control@lazy.socket && ! systemctl is-active litefs@lazy");
    host.run("litefs -c lazy status && systemctl is-active litefs@lazy");
    assert_eq!(host.run("stat -c '%U:%G %a' /run/litefs/lazy/control.sock"), "root:litefs 660\n");
    host.run("systemctl restart litefs@lazy && systemctl is-active litefs-control@lazy.socket");
    host.run("systemctl kill --signal=KILL litefs@lazy; litefs -c lazy status");
    host.run(
        "systemctl stop litefs-control@lazy.socket litefs@lazy && ! test -e /run/litefs/lazy/control.sock",
    );

    // A full disk: writes fail, reads and the agent go on, and with room everything does.
    host.push(
        "/etc/litefs/small.toml",
        "[http]\nlisten = \"127.0.0.1:20205\"\n[log]\nsegment-size = \"1MiB\"\nretention-size = \"4MiB\"\n",
    );
    host.run("mkdir -p /var/lib/litefs/small && mount -t tmpfs -o size=24m tmpfs /var/lib/litefs/small");
    host.run("systemctl start litefs@small");
    let small = "sqlite3 -cmd '.timeout 10000' /srv/litefs/small/app.db";
    host.run(&format!("{small} 'CREATE TABLE t(x)'"));
    let full = fails(
        host,
        &format!("set -e; while :; do {small} 'INSERT INTO t VALUES (randomblob(500000))'; done"),
    );
    assert!(full.contains("full") || full.contains("disk I/O error"), "{full}");
    host.run(&format!(
        "{small} 'SELECT count(*) FROM t' && litefs -c small status && systemctl is-active litefs@small"
    ));
    host.run("mount -o remount,size=200m /var/lib/litefs/small");
    host.wait_for(&format!("{small} 'INSERT INTO t VALUES (1)'"));
    assert_eq!(host.run(&format!("{small} 'PRAGMA integrity_check'")), "ok\n");
    host.run("systemctl stop litefs@small && umount /var/lib/litefs/small");

    // Removing stops the agents and keeps the databases; installing again brings them back.
    host.run("apt-get remove -y -qq litefs");
    fails(host, "mountpoint /srv/litefs/db");
    fails(host, "pgrep -x litefs");
    host.run("test -f /var/lib/litefs/db/files/app.db");
    host.apt_install("litefs");
    host.run("systemctl start litefs@db");
    assert_eq!(sql(host, "SELECT count(*) FROM t"), "1\n");
}
