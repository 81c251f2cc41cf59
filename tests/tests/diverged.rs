//! What an old primary had alone is kept, and `litefs diverged` shows it and gives it back.

use litefs_tests::*;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// A pair whose old primary had two transactions of its own in each database.
fn diverged(fleet: &Fleet, names: &[(&str, &str)]) -> (Host, Host) {
    let (old, new) = fleet.pair();
    fs::create_dir(old.path("shop")).expect("the mount is writable");
    for (name, mode) in names {
        old.sql(
            name,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x); INSERT INTO t VALUES ('shared')"),
        );
        old.wait_position_equal(&new, name);
    }
    new.kill();
    for (name, _) in names {
        old.sql(name, "INSERT INTO t VALUES ('alone')");
        old.sql(name, "INSERT INTO t VALUES ('too')");
    }
    old.kill();
    new.set_role(Role::Primary).start();
    for (name, _) in names {
        new.sql(name, "INSERT INTO t VALUES ('after')");
    }
    old.set_role(Role::ReplicaOf(&new)).start();
    for (name, _) in names {
        assert_equal(&new, &old, name);
    }
    (old, new)
}

/// `litefs diverged`, which reads the configuration.
fn command(host: &Host, args: &[&str]) -> std::process::Command {
    let mut command = host.litefs(&["diverged"]);
    command.args(args).arg("--set").arg(format!("data.dir={}", host.data().display()));
    command
}

fn json(host: &Host, args: &[&str]) -> Value {
    serde_json::from_str(&run(&mut command(host, args))).expect("it is JSON")
}

fn fails_with(host: &Host, args: &[&str], code: i32) -> String {
    let output = command(host, args).output().expect("litefs runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    said
}

#[test]
fn what_only_the_old_primary_had_is_listed_shown_and_given_back() {
    let fleet = Fleet::new();
    let (old, new) = diverged(&fleet, &[("wal.db", "WAL"), ("shop/delete.db", "DELETE")]);
    // It reads files: no agent is needed.
    old.stop();
    let list = json(&old, &["list", "--json"]);
    let list = list.as_array().expect("a list");
    assert_eq!(list.len(), 2, "{list:?}");
    for one in list {
        assert_eq!(one["transactions"], 2, "{one}");
        assert!(one["pages"].as_u64().is_some_and(|pages| pages > 0), "{one}");
        assert!(one["epoch"].as_u64() < one["upstream_epoch"].as_u64(), "{one}");
        assert!(one["common_txid"].as_str() < one["txid"].as_str(), "{one}");
        assert_eq!((&one["copy"], &one["damage"]), (&Value::from("consistent"), &Value::Null), "{one}");
    }
    let text = run(&mut command(&old, &["list", "shop/delete.db"]));
    assert!(text.contains("shop/delete.db") && !text.contains("wal.db"), "{text}");
    let shown = run(&mut command(&old, &["show", "wal.db"]));
    let files = json(&old, &["show", "wal.db", "--json"])[0]["files"].clone();
    for file in files.as_array().expect("a list") {
        assert!(shown.contains(file["min_txid"].as_str().expect("a TXID")), "{shown}");
    }
    for name in ["wal.db", "shop/delete.db"] {
        let out = fleet.scratch().join("out.db");
        let path = out.to_str().expect("a path");
        run(&mut command(&old, &["export", name, path]));
        integrity_check(&out, name);
        assert_eq!(sqlite3(&out, "SELECT group_concat(x) FROM t"), "shared,alone,too");
        fs::remove_file(&out).expect("it is there");
        let dir = fleet.scratch().join("transactions").join(name);
        let said = run(&mut command(&old, &["export", "--ltx", name, dir.to_str().expect("a path")]));
        assert!(said.starts_with("exported 2 transactions"), "{said}");
        run(&mut old.litefs(&["ltx", "verify", dir.to_str().expect("a path")]));
    }
    assert_eq!(run(&mut command(&new, &["list", "--json"])).trim(), "[]");
}

#[test]
fn one_state_of_several_is_named_by_its_position() {
    let fleet = Fleet::new();
    let (old, new) = diverged(&fleet, &[("app.db", "WAL")]);
    // The same the other way round.
    old.wait_connected();
    old.kill();
    new.sql("app.db", "INSERT INTO t VALUES ('again')");
    let position = new.position("app.db").expect("it is there");
    new.kill();
    old.set_role(Role::Primary).start();
    new.set_role(Role::ReplicaOf(&old)).start();
    assert_equal(&old, &new, "app.db");
    assert_eq!(json(&new, &["list", "--json"]).as_array().map(Vec::len), Some(1));
    // Both states below one directory, as on a host that lost its term twice.
    let name =
        |dir: PathBuf| fs::read_dir(dir).expect("it is there").next().expect("one").expect("it can be read");
    let kept = name(new.data().join("diverged/app.db"));
    fs::rename(kept.path(), old.data().join("diverged/app.db").join(kept.file_name())).expect("one disk");
    let out = fleet.scratch().join("out.db");
    let out = out.to_str().expect("a path");
    let said = fails_with(&old, &["export", "app.db", out], 64);
    assert!(said.contains("--at"), "{said}");
    run(&mut command(&old, &["export", "app.db", out, "--at", &position]));
    assert_eq!(sqlite3(out.as_ref(), "SELECT group_concat(x) FROM t"), "shared,after,again");
    let short = position.trim_start_matches('0');
    let shown = run(&mut command(&old, &["show", "app.db", "--at", short]));
    assert!(shown.contains(&position), "{shown}");
    fails_with(&old, &["show", "app.db", "--at", "ffff"], 66);
    fails_with(&old, &["show", "other.db"], 66);
}

#[test]
fn damage_is_told_and_never_exported() {
    let fleet = Fleet::new();
    let (old, _new) = diverged(&fleet, &[("app.db", "WAL")]);
    let list = json(&old, &["list", "--json"]);
    let dir = PathBuf::from(list[0]["directory"].as_str().expect("a path"));
    let out = fleet.scratch().join("out.db");
    let path = out.to_str().expect("a path");
    let spoil = |file: &str| {
        let file = dir.join(file);
        let good = fs::read(&file).expect("it is there");
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 0xff;
        fs::write(&file, bad).expect("it can be written");
        (file, good)
    };
    let (file, good) = spoil("database.db");
    let said = fails_with(&old, &["export", "app.db", path], 65);
    assert!(said.contains("database.db: is damaged") && !out.exists(), "{said}");
    fs::write(file, good).expect("it can be written");
    let of_last = format!("{0}-{0}.ltx", list[0]["txid"].as_str().expect("a TXID"));
    spoil(&of_last);
    let output = command(&old, &["list"]).output().expect("litefs runs");
    assert_eq!(output.status.code(), Some(65));
    assert!(String::from_utf8_lossy(&output.stdout).contains("damaged"));
    fails_with(&old, &["export", "--ltx", "app.db", path], 65);
    assert!(!out.exists());
    // A database that was set aside is kept as it was found, and not given out as if it were whole.
    fs::write(dir.join("database.db-wal"), b"frames").expect("it can be written");
    let said = fails_with(&old, &["export", "app.db", path], 65);
    assert!(said.contains("as it was found") && !out.exists(), "{said}");
    // An agent that died before everything was kept.
    fs::remove_file(dir.join("kept.json")).expect("it is there");
    let output = command(&old, &["show", "app.db"]).output().expect("litefs runs");
    assert_eq!(output.status.code(), Some(65));
    assert!(String::from_utf8_lossy(&output.stdout).contains("incomplete"));
}
