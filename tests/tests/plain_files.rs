//! The mount as a directory: `cp`, `mv`, `dd`, editors and backup tools, on databases and on files that are none.

use litefs_tests::{
    FILL, Fleet, Host, JOURNAL_MODES, Shell, ask, assert_equal, exec, integrity_check, run, set_journal_mode,
    sqlite3, try_run, wait_seen,
};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

const COUNT: &str = "SELECT count(*) FROM t";

/// A database outside of the mount with so many times 300 rows.
fn source(fleet: &Fleet, name: &str, mode: &str, fills: usize) -> PathBuf {
    let path = fleet.scratch().join(name);
    sqlite3(&path, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v);"));
    (0..fills).for_each(|_| drop(sqlite3(&path, FILL)));
    path
}

#[track_caller]
fn shell(script: &str, dir: &Path) -> Result<String, String> {
    try_run(Command::new("sh").args(["-euc", script]).current_dir(dir))
}

#[track_caller]
fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.expect_err("it is refused").raw_os_error().expect("by the system")
}

#[test]
fn a_database_that_is_copied_or_moved_in_becomes_one_transaction() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in ["delete", "wal"] {
        for (tool, name) in [("cp", "cp.db"), ("mv", "mv.db"), ("install", "install.db")] {
            let name = format!("{mode}-{name}");
            let file = source(&fleet, &name, mode, 2);
            run(Command::new(tool).arg(&file).arg(primary.path(&name)));
            assert_eq!(primary.txid(&name), 1, "{name}");
            assert_equal(&primary, &replica, &name);
            assert_eq!(replica.sql(&name, COUNT), "600");
            primary.sql(&name, "INSERT INTO t(v) VALUES (1)");
            assert_equal(&primary, &replica, &name);
        }
    }
    // A directory of them.
    let dir = fleet.scratch().join("dir");
    fs::create_dir_all(dir.join("sub")).unwrap();
    for name in ["a.db", "sub/b.db"] {
        sqlite3(&dir.join(name), "CREATE TABLE t(v); INSERT INTO t VALUES (1);");
    }
    fs::write(dir.join("sub/notes.txt"), "no database").unwrap();
    run(Command::new("cp").arg("-a").arg(&dir).arg(primary.mount()));
    assert_equal(&primary, &replica, "dir/a.db");
    assert_equal(&primary, &replica, "dir/sub/b.db");
    assert_eq!(primary.files_not_replicated(), ["dir/sub/notes.txt"]);
}

#[test]
fn a_copy_is_no_database_before_it_is_complete() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let content = fs::read(source(&fleet, "x.db", "delete", 2)).unwrap();
    let mut copy = File::create(primary.path("x.db")).unwrap();
    for part in content.chunks(content.len() / 4 + 1) {
        assert_eq!(primary.txid("x.db"), 0);
        copy.write_all(part).unwrap();
        copy.sync_all().unwrap();
        assert!(!replica.path("x.db").exists());
    }
    drop(copy);
    // The kernel waits for the answer to a close, so it is one now.
    assert_eq!(primary.txid("x.db"), 1);
    assert_equal(&primary, &replica, "x.db");
    assert_eq!(replica.sql("x.db", COUNT), "600");
}

#[test]
fn a_database_copied_in_with_its_wal_has_what_is_in_the_wal() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let file = source(&fleet, "x.db", "wal", 0);
    // The shell is killed, so its WAL stays.
    let mut owner = Shell::open(&file);
    owner.run("PRAGMA wal_autocheckpoint=0;");
    owner.run(FILL);
    owner.kill();
    assert!(fs::metadata(fleet.scratch().join("x.db-wal")).unwrap().len() > 100_000);
    for (i, order) in [["", "-wal"], ["-wal", ""]].into_iter().enumerate() {
        for suffix in order {
            let from = fleet.scratch().join(format!("x.db{suffix}"));
            fs::copy(from, primary.path(format!("{i}.db{suffix}"))).unwrap();
        }
        let name = format!("{i}.db");
        assert_eq!(primary.sql(&name, COUNT), "300", "{order:?}");
        primary.sql(&name, "INSERT INTO t(v) VALUES (1)");
        assert_equal(&primary, &replica, &name);
        assert_eq!(replica.sql(&name, COUNT), "301", "{order:?}");
    }
}

#[test]
fn a_copy_over_a_live_database_replaces_it_as_one_transaction() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        let db = primary.open(&name);
        set_journal_mode(&db, mode);
        exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES (1);");
        primary.wait_position_equal(&replica, &name);
        let reader = replica.open(&name);
        let mut other_process = Shell::open(&primary.path(&name));
        assert_eq!(other_process.run(&format!("{COUNT};")), "1");
        // Larger, then smaller.
        for fills in [3, 1] {
            let file = source(&fleet, &format!("{fills}-{name}"), mode, fills);
            let before = primary.txid(&name);
            run(Command::new("cp").arg(&file).arg(primary.path(&name)));
            assert_eq!(primary.txid(&name), before + 1, "{name}");
            let rows = (fills * 300).to_string();
            assert_eq!(ask(&db, COUNT), rows, "{name}: an open connection");
            assert_eq!(other_process.run(&format!("{COUNT};")), rows, "{name}: another process");
            wait_seen(&reader, COUNT, &rows);
            exec(&db, "UPDATE t SET v = 2 WHERE id = 1");
            assert_eq!(other_process.run("SELECT v FROM t WHERE id = 1;"), "2", "{name}");
            wait_seen(&reader, "SELECT count(*) FROM t WHERE v = 2", "1");
        }
        drop((db, reader, other_process));
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn a_shell_redirection_replaces_a_live_database() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    // The shell closes a duplicate of the descriptor before anything is written.
    primary.expect_error("the copy is empty");
    primary.sql("live.db", "CREATE TABLE t(v)");
    primary.wait_position_equal(&replica, "live.db");
    let reader = replica.open("live.db");
    for (fills, script) in [
        (1, "cat FILE > live.db"),
        (2, "dd if=FILE of=live.db bs=5000"),
        (3, "tee live.db < FILE > /dev/null"),
    ] {
        let file = source(&fleet, &format!("{fills}.db"), "delete", fills);
        let before = primary.txid("live.db");
        shell(&script.replace("FILE", &file.display().to_string()), &primary.mount()).unwrap();
        assert_eq!(primary.txid("live.db"), before + 1, "{script}");
        wait_seen(&reader, COUNT, &(fills * 300).to_string());
    }
    drop(reader);
    assert_equal(&primary, &replica, "live.db");
}

#[test]
fn what_is_no_database_does_not_replace_one() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.expect_error("refused");
    let name = "live.db";
    let db = primary.open(name);
    exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
    exec(&db, FILL);
    let position = primary.wait_position_equal(&replica, name);
    let whole = fs::read(source(&fleet, "whole.db", "delete", 2)).unwrap();

    let bad = fleet.scratch().join("bad");
    let half = &whole[..whole.len() / 2 / 4096 * 4096];
    let torn = &whole[..whole.len() - 1000];
    for (what, content) in [
        ("text", &b"all kinds of text, ".repeat(1000)[..]),
        ("half", half),
        ("torn", torn),
        ("nothing", b""),
        ("short", b"SQLite format 3\0"),
    ] {
        fs::write(&bad, content).unwrap();
        let error = try_run(Command::new("cp").arg(&bad).arg(primary.path(name))).unwrap_err();
        assert!(error.contains("Invalid argument"), "{what}: {error}");
    }
    // None of these programs writes as SQLite does.
    for (script, message) in [
        ("dd if=/dev/zero of=live.db bs=4096 count=1 conv=notrunc", "Operation not permitted"),
        ("echo more >> live.db", "Operation not permitted"),
        ("truncate -s 4096 live.db", "Operation not permitted"),
        ("truncate -s 0 live.db", "Operation not permitted"),
        ("dd if=/dev/zero of=live.db bs=4096 count=3", "Invalid argument"),
    ] {
        let error = shell(&format!("export LC_ALL=C; {script}"), &primary.mount()).unwrap_err();
        // dash names the reason in its own words.
        assert!(error.contains(message) || error.contains("cannot create"), "{script}: {error}");
    }
    // A shell does not look at the result of close(); still nothing happens.
    let _ = shell(": > live.db", &primary.mount());

    assert_eq!(primary.position(name).as_ref(), Some(&position));
    assert_eq!(ask(&db, COUNT), "300");
    exec(&db, "INSERT INTO t(v) VALUES (1)");
    drop(db);
    assert_equal(&primary, &replica, name);
    assert!(primary.log().contains("live.db"));
}

#[test]
fn a_copy_over_a_database_waits_for_its_writer_and_gives_up_cleanly() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    primary.expect_error("refused");
    for mode in ["delete", "wal"] {
        let name = format!("{mode}.db");
        let file = source(&fleet, &name, mode, 1);
        run(Command::new("cp").arg(&file).arg(primary.path(&name)));
        let mut writer = Shell::open(&primary.path(&name));
        writer.run("BEGIN IMMEDIATE; INSERT INTO t(v) VALUES ('mine');");
        let error = try_run(Command::new("cp").arg(&file).arg(primary.path(&name))).unwrap_err();
        assert!(error.contains("Device or resource busy"), "{error}");
        writer.run("COMMIT;");
        assert_eq!(primary.sql(&name, COUNT), "301", "{mode}");
        drop(writer);
        run(Command::new("cp").arg(&file).arg(primary.path(&name)));
        assert_eq!(primary.sql(&name, COUNT), "300", "{mode}");
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn a_database_is_copied_out_like_a_file() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in JOURNAL_MODES {
        let name = format!("{mode}.db");
        primary
            .sql(&name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v);"));
        primary.sql(&name, FILL);
        assert_equal(&primary, &replica, &name);
        // Nobody has it open: all of it is in the file, on both hosts.
        for host in [&primary, &replica] {
            let copy = fleet.scratch().join(format!("{}-{name}", host.name()));
            run(Command::new("cp").arg("-a").arg(host.path(&name)).arg(&copy));
            integrity_check(&copy, "the copy");
            if host.name() == "a" {
                assert_eq!(sqlite3(&copy, COUNT), "300", "{mode}");
            }
        }
    }
}

#[test]
fn the_tools_of_sqlite_write_databases_into_the_mount() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let file = source(&fleet, "source.db", "delete", 1);
    let path = |name: &str| primary.path(name).display().to_string();
    // A backup into a new database, and over one that is in use.
    sqlite3(&file, &format!(".backup '{}'", path("backup.db")));
    assert_equal(&primary, &replica, "backup.db");
    let reader = replica.open("backup.db");
    assert_eq!(ask(&reader, COUNT), "300");
    sqlite3(&file, "DELETE FROM t WHERE id > 100");
    sqlite3(&file, &format!(".backup '{}'", path("backup.db")));
    wait_seen(&reader, COUNT, "100");
    primary.sql("backup.db", &format!(".restore '{}'\nINSERT INTO t(v) VALUES (1)", file.display()));
    wait_seen(&reader, COUNT, "101");
    drop(reader);
    assert_equal(&primary, &replica, "backup.db");
    // Written without a journal: taken in when nobody writes any more.
    sqlite3(&file, &format!("VACUUM INTO '{}'", path("vacuum.db")));
    replica.wait_sql("vacuum.db", COUNT, "100");
    assert_equal(&primary, &replica, "vacuum.db");
    sqlite3(&file, &format!(".clone '{}'", path("clone.db")));
    replica.wait_sql("clone.db", COUNT, "100");
    assert_equal(&primary, &replica, "clone.db");
    // And out of it, from a replica.
    let out = fleet.scratch().join("out.db");
    replica.sql("backup.db", &format!("VACUUM INTO '{}'", out.display()));
    assert_eq!(sqlite3(&out, COUNT), "101");
}

#[test]
fn a_temporary_file_renamed_over_a_database_that_nobody_uses_replaces_it() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    for mode in ["delete", "wal"] {
        let name = format!("{mode}.db");
        let first = source(&fleet, &name, mode, 1);
        run(Command::new("cp").arg(&first).arg(primary.path(&name)));
        let before = primary.txid(&name);
        // As rsync does it, and everybody who replaces files atomically.
        let temporary = primary.path(format!(".{name}.Xq81z"));
        let second = source(&fleet, &format!("2-{name}"), mode, 2);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).unwrap();
        file.write_all(&fs::read(second).unwrap()).unwrap();
        file.sync_all().unwrap();
        drop(file);
        fs::rename(&temporary, primary.path(&name)).unwrap();
        assert!(!temporary.exists());
        assert_eq!(primary.sql(&name, COUNT), "600", "{mode}");
        assert_eq!(primary.txid(&name), before + 1, "{mode}");
        assert_equal(&primary, &replica, &name);
        replica.wait_gone(&format!(".{name}.Xq81z"));

        // What is no database does not get there in this way either.
        primary.expect_error("rename");
        fs::write(&temporary, "text").unwrap();
        let error = fs::rename(&temporary, primary.path(&name)).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIO)), "{error}");
        assert_eq!(primary.sql(&name, COUNT), "600", "{mode}");
        fs::remove_file(&temporary).unwrap();
        assert_equal(&primary, &replica, &name);
    }
}

#[test]
fn files_that_are_no_databases_work_as_on_any_directory() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    let at = |name: &str| primary.path(name);
    shell(
        "echo one > notes.txt; echo two >> notes.txt; mkdir -p conf/d; printf 'a=1' > conf/d/app.ini
         echo text > looks-like.db; : > empty; cp notes.txt conf/copy.txt; cat notes.txt conf/copy.txt > both.txt",
        &primary.mount(),
    )
    .unwrap();
    assert_eq!(fs::read_to_string(at("both.txt")).unwrap(), "one\ntwo\none\ntwo\n");
    let modes = "umask 002; mkdir shared; : > shared/file; stat -c %a shared shared/file; rm -r shared";
    assert_eq!(shell(modes, &primary.mount()).unwrap().trim(), "775\n664");
    let mut listed = primary.files_not_replicated();
    listed.sort();
    let all = ["both.txt", "conf/copy.txt", "conf/d/app.ini", "empty", "looks-like.db", "notes.txt"];
    assert_eq!(listed, all);
    assert!(run(&mut primary.litefs(&["status"])).contains("notes.txt"));

    // Seeking, overwriting, cutting, and a megabyte that comes back as it was.
    let random: Vec<u8> =
        (0..1_300_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(at("blob")).unwrap();
    file.write_all(&random).unwrap();
    file.seek(SeekFrom::Start(100_001)).unwrap();
    file.write_all(b"in the middle").unwrap();
    file.set_len(3_000_000).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut back = Vec::new();
    file.read_to_end(&mut back).unwrap();
    let mut expected = random[..3_000_000].to_vec();
    expected[100_001..100_014].copy_from_slice(b"in the middle");
    assert!(back == expected);
    drop(file);
    let script = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); m[5:9] = b'mmap'; m.flush()";
    run(Command::new("python3").args(["-c", script]).arg(at("blob")));
    expected[5..9].copy_from_slice(b"mmap");
    assert!(fs::read(at("blob")).unwrap() == expected);

    // Attributes.
    fs::set_permissions(at("notes.txt"), fs::Permissions::from_mode(0o640)).unwrap();
    run(Command::new("touch").args(["-d", "2001-02-03 04:05:06 UTC"]).arg(at("notes.txt")));
    run(Command::new("chown").arg("1234:5678").arg(at("notes.txt")));
    let meta = fs::metadata(at("notes.txt")).unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.mtime()),
        (0o640, 1234, 5678, 981_173_106)
    );
    assert!(run(Command::new("df").arg(primary.mount())).contains("db"));

    // What is open outlives its name.
    let mut open = File::open(at("both.txt")).unwrap();
    fs::remove_file(at("both.txt")).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 4);

    // Directories.
    assert_eq!(errno(fs::remove_dir(at("conf"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::create_dir(at("conf"))), libc::EEXIST);
    fs::rename(at("conf"), at("etc")).unwrap();
    assert_eq!(fs::read_to_string(at("etc/d/app.ini")).unwrap(), "a=1");
    run(Command::new("rm").arg("-r").arg(at("etc")));
    assert!(!at("etc").exists());

    // None of it is anybody else's business ...
    primary.sql("real.db", "CREATE TABLE t(v)");
    assert_equal(&primary, &replica, "real.db");
    assert!(!replica.path("notes.txt").exists() && replica.files_not_replicated().is_empty());
    assert_eq!(primary.status()["databases"].as_array().unwrap().len(), 1);
    // ... and all of it is there after a restart.
    primary.restart();
    assert_eq!(fs::read_to_string(at("notes.txt")).unwrap(), "one\ntwo\n");
    let mut listed = primary.files_not_replicated();
    listed.sort();
    assert_eq!(listed, ["blob", "empty", "looks-like.db", "notes.txt"]);
}

#[test]
fn editors_save_their_files() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let dir = primary.mount();
    for round in 0..3 {
        // vim: is the directory writable, backup by rename, new file, backup away.
        shell(
            &format!(": > 4913; rm 4913; [ ! -e f.txt ] || mv f.txt f.txt~; echo 'round {round}' > f.txt; sync f.txt; rm -f f.txt~"),
            &dir,
        )
        .unwrap();
        assert_eq!(fs::read_to_string(dir.join("f.txt")).unwrap(), format!("round {round}\n"));
        // Others: a temporary file over the old one.
        shell(&format!("echo 'again {round}' > .f.txt.swp; mv -f .f.txt.swp f.txt; cat f.txt"), &dir)
            .unwrap();
        assert_eq!(fs::read_to_string(dir.join("f.txt")).unwrap(), format!("again {round}\n"));
        run(Command::new("sed").args(["-i", "s/again/sed/"]).arg(dir.join("f.txt")));
        assert_eq!(fs::read_to_string(dir.join("f.txt")).unwrap(), format!("sed {round}\n"));
    }
    assert_eq!(primary.files_not_replicated(), ["f.txt"]);
}

#[test]
fn a_plain_file_may_become_a_database_and_a_dropped_database_a_plain_file() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    fs::write(primary.path("x.db"), "text").unwrap();
    assert_eq!(primary.files_not_replicated(), ["x.db"]);
    let file = source(&fleet, "x.db", "wal", 1);
    run(Command::new("cp").arg(&file).arg(primary.path("x.db")));
    assert!(primary.files_not_replicated().is_empty());
    assert_equal(&primary, &replica, "x.db");
    fs::remove_file(primary.path("x.db")).unwrap();
    replica.wait_gone("x.db");
    fs::write(primary.path("x.db"), "text again").unwrap();
    assert_eq!(fs::read_to_string(primary.path("x.db")).unwrap(), "text again");
    assert_eq!(primary.files_not_replicated(), ["x.db"]);
    // SQLite says of it what it says of such a file anywhere.
    let error = primary.try_sql("x.db", "SELECT * FROM sqlite_schema").unwrap_err();
    assert!(error.contains("file is not a database"), "{error}");
    fs::remove_file(primary.path("x.db")).unwrap();
    primary.sql("x.db", "CREATE TABLE t(v)");
    assert_equal(&primary, &replica, "x.db");
    // An empty file is an empty database to SQLite.
    File::create(primary.path("empty.db")).unwrap();
    primary.sql("empty.db", "CREATE TABLE t(v)");
    assert_equal(&primary, &replica, "empty.db");
}

#[test]
fn what_the_mount_has_not_is_refused_in_words_that_programs_know() {
    let fleet = Fleet::new();
    let primary = fleet.primary("a");
    let at = |name: &str| primary.path(name);
    fs::write(at("file"), "text").unwrap();
    primary.sql("x.db", "CREATE TABLE t(v)");
    // A second name for a database would be a second set of locks.
    for name in ["file", "x.db"] {
        assert!(
            matches!(errno(fs::hard_link(at(name), at("link"))), libc::EPERM | libc::EOPNOTSUPP),
            "{name}"
        );
        assert!(
            matches!(errno(std::os::unix::fs::symlink(name, at("symlink"))), libc::EPERM | libc::EOPNOTSUPP),
            "{name}"
        );
    }
    let mkfifo = try_run(Command::new("mkfifo").arg(at("fifo"))).unwrap_err();
    assert!(mkfifo.contains("not permitted") || mkfifo.contains("not supported"), "{mkfifo}");
    // Programs fall back on these.
    let fallocate = try_run(Command::new("fallocate").args(["-l", "100000"]).arg(at("file")));
    assert!(
        fallocate.as_ref().is_ok_and(String::is_empty)
            || fallocate.is_err_and(|e| e.contains("not supported"))
    );
    assert!(!primary.log().contains("Not Implemented"), "{}", primary.log());
    assert!(!at("link").exists() && !at("symlink").exists() && !at("fifo").exists());
}

#[test]
fn a_replica_takes_no_files() {
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    fs::create_dir(primary.path("dir")).unwrap();
    for name in ["x.db", "dir/y.db"] {
        primary.sql(name, "CREATE TABLE t(v); INSERT INTO t VALUES (1);");
        primary.wait_position_equal(&replica, name);
    }
    let at = |name: &str| replica.path(name);
    let file = source(&fleet, "new.db", "delete", 1);
    assert_eq!(errno(File::create(at("new.txt"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(at("new"))), libc::EROFS);
    assert_eq!(errno(fs::remove_file(at("x.db"))), libc::EROFS);
    assert_eq!(errno(fs::remove_dir(at("dir"))), libc::EROFS);
    assert_eq!(errno(fs::rename(at("x.db"), at("z.db"))), libc::EROFS);
    assert_eq!(errno(File::create(at("x.db"))), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().append(true).open(at("x.db"))), libc::EROFS);
    assert_eq!(errno(fs::set_permissions(at("x.db"), fs::Permissions::from_mode(0o600))), libc::EROFS);
    for script in
        ["cp NEW new.db", "cp NEW x.db", "mv NEW x.db", "truncate -s 0 x.db", "echo x > x.db-journal"]
    {
        let script = script.replace("NEW", &file.display().to_string());
        let error = shell(&format!("export LC_ALL=C; {script}"), &replica.mount()).unwrap_err();
        assert!(
            ["Read-only file system", "Permission denied", "cannot create"].iter().any(|m| error.contains(m)),
            "{script}: {error}"
        );
    }
    assert!(file.exists());
    let names = |host: &Host| {
        let mut names: Vec<_> = fs::read_dir(host.mount()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&replica), [".lag", ".primary", "dir", "x.db", "x.db-pos"]);
    primary.sql("x.db", "INSERT INTO t VALUES (2)");
    assert_equal(&primary, &replica, "x.db");
}
