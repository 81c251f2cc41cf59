//! Hooks on real hosts: what they see, what they make up for, and that they do not hold anybody up.

use litefs_tests::{Fleet, Host, PATIENCE, Role, exec, wait_for};
use std::fs;
use std::path::{Path, PathBuf};

/// A hook that appends what it was told, and the row that it sees, to a file.
fn recorder(fleet: &Fleet, name: &str) -> (String, PathBuf) {
    let (script, record) =
        (fleet.scratch().join(format!("{name}.sh")), fleet.scratch().join(format!("{name}.record")));
    let text = format!(
        "#!/bin/sh\nset -e\nseen=$(sqlite3 -init /dev/null \"$LITEFS_PATH\" 'SELECT max(x) FROM t')\n\
         echo \"$LITEFS_DATABASE $LITEFS_TXID $LITEFS_ROLE $seen\" >> {}\n",
        record.display()
    );
    fs::write(&script, text).expect("it is writable");
    let toml = format!(
        "\n[[on-change]]\nname = \"{name}\"\ndatabases = [\"app.db\", \"conf/*.db\"]\n\
         command = [\"/bin/sh\", \"{}\"]\ndebounce = \"20ms\"\n",
        script.display()
    );
    (toml, record)
}

fn records(record: &Path) -> Vec<Vec<String>> {
    let text = fs::read_to_string(record).unwrap_or_default();
    text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

fn wait_record(record: &Path, what: &str, wanted: impl Fn(&[String]) -> bool) {
    wait_for(what, PATIENCE, || records(record).iter().any(|line| wanted(line)).then_some(()));
}

fn with_hook(fleet: &Fleet, name: &str, role: Role<'_>) -> (Host, PathBuf) {
    let host = fleet.host(name, role);
    let (toml, record) = recorder(fleet, name);
    host.configure(&toml);
    host.start();
    (host, record)
}

#[test]
fn a_hook_sees_what_it_runs_for_on_the_primary_and_on_the_replica() {
    let fleet = Fleet::new();
    let (primary, on_primary) = with_hook(&fleet, "a", Role::Primary);
    let (replica, on_replica) = with_hook(&fleet, "b", Role::ReplicaOf(&primary));
    replica.wait_connected();
    let connection = primary.open("app.db");
    exec(&connection, "PRAGMA journal_mode=WAL; CREATE TABLE t(x);");
    for number in 1..=200 {
        connection.execute("INSERT INTO t VALUES (?1)", [number]).unwrap();
    }
    for (record, role) in [(&on_primary, "primary"), (&on_replica, "replica")] {
        wait_record(record, "a run that sees the last row", |line| line[0] == "app.db" && line[3] == "200");
        let lines = records(record);
        assert!(lines.len() < 100, "{} runs for 200 commits", lines.len());
        for line in &lines {
            assert_eq!(line[2], role);
            // Transaction 1 sets the journal mode, or makes the table; row N is in transaction N + 1 or later.
            let txid = u64::from_str_radix(&line[1], 16).unwrap();
            let seen: u64 = line[3].parse().unwrap_or(0);
            assert!(seen + 2 >= txid, "told {txid}, saw row {seen}");
        }
    }
    // A database that no pattern names, and one in a directory.
    primary.sql("other.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    fs::create_dir(primary.path("conf")).unwrap();
    primary.sql("conf/c.db", "CREATE TABLE t(x); INSERT INTO t VALUES (7)");
    wait_record(&on_replica, "a run for conf/c.db", |line| line[0] == "conf/c.db" && line[3] == "7");
    assert!(records(&on_replica).iter().all(|line| line[0] != "other.db"));
}

#[test]
fn a_start_runs_for_what_moved_while_the_agent_was_down_and_for_nothing_else() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let (replica, record) = with_hook(&fleet, "b", Role::ReplicaOf(&primary));
    primary.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    wait_record(&record, "the first run", |line| line[3] == "1");
    let remembered = |host: &Host| fs::read_to_string(host.data().join("hooks/b/app.db")).unwrap_or_default();
    let settled = |host: &Host| {
        wait_for("the run is remembered", PATIENCE, || {
            (host.position("app.db")? == remembered(host).trim_end()).then_some(())
        });
    };
    settled(&replica);
    let before = records(&record).len();

    // Nothing moved: the hook of another database shows that it has looked.
    replica.stop();
    primary.sql("app2.db", "CREATE TABLE t(x)");
    replica.start();
    replica.wait_connected();
    primary.wait_position_equal(&replica, "app2.db");
    fs::create_dir(primary.path("conf")).unwrap();
    primary.sql("conf/c.db", "CREATE TABLE t(x); INSERT INTO t VALUES (5)");
    wait_record(&record, "a run for conf/c.db", |line| line[0] == "conf/c.db" && line[3] == "5");
    assert_eq!(records(&record).iter().filter(|line| line[0] == "app.db").count(), before);

    // It moved, and was applied at the start or afterwards; also after a kill.
    replica.kill();
    primary.sql("app.db", "INSERT INTO t VALUES (2)");
    replica.start();
    wait_record(&record, "the run that makes up for it", |line| line[0] == "app.db" && line[3] == "2");
    settled(&replica);
}

#[test]
fn hooks_change_with_a_reload_and_a_broken_one_holds_nobody_up() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    primary.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    let flag = fleet.scratch().join("flag");
    let toml = format!(
        "\n[[on-change]]\nname = \"broken\"\ndatabases = \"**\"\ncommand = [\"/bin/sh\", \"-c\", \"test -e {}\"]\n\
         [[on-change]]\nname = \"missing\"\ndatabases = \"**\"\ncommand = [\"/nonexistent/program\"]\n\
         [[on-change]]\nname = \"slow\"\ndatabases = \"**\"\ncommand = [\"/bin/sleep\", \"1000\"]\ntimeout = \"200ms\"\n",
        flag.display()
    );
    primary.configure(&toml);
    litefs_tests::run(&mut primary.litefs(&["reload"]));
    for text in
        ["ended with exit status: 1", "cannot run /nonexistent/program", "took longer than its timeout"]
    {
        primary.wait_for(text, || primary.log().contains(text));
    }
    primary.sql("app.db", "INSERT INTO t VALUES (2)");
    fs::write(&flag, "").unwrap();
    primary.wait_for("it is tried again", || {
        primary.log().contains("hook=\"broken\"") && {
            let metrics = String::from_utf8(primary.get("/metrics").unwrap()).unwrap();
            metrics.contains("litefs_hook_run_count{hook=\"broken\",result=\"success\"}")
        }
    });
    primary.stop();
}
