//! Names in the directory of databases: what is removed, renamed, lies in a sub-directory, or is made up by the agent.

use litefs_tests::{
    Fleet, Host, JOURNAL_MODES, ask, assert_equal, exec, is_about_fuse, is_preload, set_journal_mode,
    sqlite3, try_run,
};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

#[test]
fn an_unlinked_database_is_dropped_and_a_new_one_continues_its_numbers() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        let create = format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES ('old');");
        primary.sql(&name, &create);
        primary.wait_position_equal(&replica, &name);
        let last = primary.txid(&name);
        let reader = replica.open(&name);
        assert_eq!(ask(&reader, "SELECT v FROM t"), "old");

        fs::remove_file(primary.path(&name)).unwrap();
        replica.wait_gone(&name);
        assert!(primary.database(&name).is_none(), "{mode}");
        let position = fs::read_to_string(primary.path(format!("{name}-pos"))).unwrap();
        assert_eq!(position, format!("{:016x}/8000000000000000\n", last + 1), "{mode}");
        let companions = ["-journal", "-wal", "-shm"].map(|suffix| format!("{name}{suffix}"));
        for companion in &companions {
            assert!(!replica.path(companion).exists(), "{companion} on the replica");
            let _ = fs::remove_file(primary.path(companion));
        }
        // Who has it open keeps the file that was removed, as on any file system.
        assert_eq!(ask(&reader, "SELECT v FROM t"), "old", "{mode}");
        drop(reader);

        primary.sql(&name, &create.replace("old", "new"));
        assert!(primary.txid(&name) > last + 1, "{mode}");
        assert_equal(&primary, &replica, &name);
        assert_eq!(replica.sql(&name, "SELECT v FROM t"), "new", "{mode}");
    }
}

#[test]
fn a_renamed_database_goes_on_under_its_new_name() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let (old, new) = (format!("{mode}-old.db"), format!("{mode}-new.db"));
        primary
            .sql(&old, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES (1);"));
        primary.wait_position_equal(&replica, &old);
        fs::rename(primary.path(&old), primary.path(&new)).unwrap_or_else(|e| panic!("{mode}: {e}"));
        assert!(!primary.path(&old).exists());
        primary.sql(&new, "INSERT INTO t VALUES (2)");
        assert_equal(&primary, &replica, &new);
        assert_eq!(replica.sql(&new, "SELECT count(*) FROM t"), "2", "{mode}");
        replica.wait_gone(&old);

        // Over another database, which thereby gets new content.
        primary
            .sql(&old, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(v); INSERT INTO t VALUES (7);"));
        let last = primary.txid(&new);
        fs::rename(primary.path(&old), primary.path(&new)).unwrap_or_else(|e| panic!("{mode}: {e}"));
        assert_equal(&primary, &replica, &new);
        assert!(primary.txid(&new) > last);
        assert_eq!(replica.sql(&new, "SELECT v FROM t"), "7", "{mode}");
        replica.wait_gone(&old);
    }
}

#[test]
fn a_database_in_use_is_not_renamed_and_loses_nothing_by_the_attempt() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in ["delete", "wal"] {
        let (old, new) = (format!("{mode}-old.db"), format!("{mode}-new.db"));
        let db = primary.open(&old);
        set_journal_mode(&db, mode);
        exec(&db, "CREATE TABLE t(v); INSERT INTO t VALUES (1);");
        let error = fs::rename(primary.path(&old), primary.path(&new)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{mode}: {error}");
        let mut mv = Command::new("mv");
        let error = try_run(mv.arg(primary.path(&old)).arg(primary.path(&new))).unwrap_err();
        assert!(error.contains("Device or resource busy"), "{error}");
        exec(&db, "INSERT INTO t VALUES (2)");
        // Nor is one replaced in this way: those who have it open would not notice.
        let file = fleet.scratch().join("x.db");
        sqlite3(&file, "CREATE TABLE IF NOT EXISTS u(v)");
        fs::copy(&file, primary.path("copy.db")).unwrap();
        let error = fs::rename(primary.path("copy.db"), primary.path(&old)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{mode}: {error}");
        assert_eq!(ask(&db, "SELECT count(*) FROM t"), "2");
        drop(db);
        assert!(!primary.path(&new).exists());
        assert_equal(&primary, &replica, &old);
        assert_equal(&primary, &replica, "copy.db");
    }
}

#[test]
fn databases_live_in_sub_directories() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    fs::create_dir_all(primary.path("app/deep")).unwrap();
    for name in ["app/a.db", "app/deep/b.db", "app/with space.db", "app/p%2Fq.db", "app/ümläut.db"] {
        primary.sql(name, "PRAGMA journal_mode=WAL; CREATE TABLE t(v); INSERT INTO t VALUES (1);");
        assert_equal(&primary, &replica, name);
    }
    let position = fs::read_to_string(replica.path("app/a.db-pos")).unwrap();
    assert_eq!(position.trim_end(), replica.position("app/a.db").unwrap());
    // Databases move with their directory.
    fs::rename(primary.path("app"), primary.path("other")).unwrap();
    for name in ["other/deep/b.db", "other/a.db"] {
        assert_equal(&primary, &replica, name);
    }
    replica.wait_gone("app/deep/b.db");
    assert_eq!(replica.sql("other/a.db", "SELECT v FROM t"), "1");
}

#[test]
fn the_special_files_say_what_they_say_in_litefs() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let read = |host: &Host, name: &str| fs::read_to_string(host.path(name));
    primary.sql("x.db", "CREATE TABLE t(v);");
    primary.wait_position_equal(&replica, "x.db");

    // Only a connected replica names its primary.
    assert_eq!(read(&primary, ".primary").unwrap_err().kind(), std::io::ErrorKind::NotFound);
    assert_eq!(read(&replica, ".primary").unwrap(), "a\n");

    assert_eq!(read(&primary, ".lag").unwrap(), "+000000000\n");
    replica.wait_for("the lag is 0", || read(&replica, ".lag").unwrap() == "+000000000\n");

    // The position, through a new descriptor and through one that is open all the time.
    let held = File::open(primary.path("x.db-pos")).unwrap();
    for _ in 0..3 {
        primary.sql("x.db", "INSERT INTO t VALUES (1)");
        let position = format!("{}\n", primary.position("x.db").unwrap());
        assert_eq!(position.len(), 34);
        assert_eq!(read(&primary, "x.db-pos").unwrap(), position);
        if !is_preload() {
            let mut again = [0; 40];
            let n = held.read_at(&mut again, 0).unwrap();
            assert_eq!(&again[..n], position.as_bytes());
            assert_eq!(fs::metadata(primary.path("x.db-pos")).unwrap().len(), 34);
        }
        replica.wait_for("the position is shown", || read(&replica, "x.db-pos").unwrap() == position);
    }

    if is_about_fuse(
        "in a plain directory there is nothing at their names: the library answers who opens them",
    ) {
        return;
    }
    let list = |host: &Host| {
        let mut names: Vec<_> = fs::read_dir(host.mount())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(list(&primary), [".lag", "x.db", "x.db-pos"]);
    assert_eq!(list(&replica), [".lag", ".primary", "x.db", "x.db-pos"]);

    // They are not anybody's to change.
    for name in [".lag", "x.db-pos"] {
        let path = primary.path(name);
        assert!(fs::write(&path, "x").is_err(), "{name}");
        // A position goes with its database, so removing it says yes (rm -r) and changes nothing.
        assert_eq!(fs::remove_file(&path).is_ok(), name != ".lag");
        assert!(path.exists(), "{name}");
        assert!(fs::rename(&path, primary.path("y")).is_err(), "{name}");
        assert!(fs::write(primary.path(format!("{name}-pos")), "x").is_ok() || name == ".lag");
    }

    // Without its primary a replica says how long it has heard nothing, and names nobody.
    primary.stop();
    replica.wait_for("the replica notices", || read(&replica, ".primary").is_err());
    replica.wait_for("the lag grows", || {
        let lag = read(&replica, ".lag").unwrap();
        assert!(lag.len() == 11 && lag.starts_with('+') && lag.ends_with('\n'), "{lag:?}");
        lag[1..10].parse::<u32>().unwrap() > 0
    });
}
