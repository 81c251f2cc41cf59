//! Readers of a database that nobody has written since it was opened: the agent states in the wal-index how many pages it
//! has, and nobody notices.

use litefs_tests::{
    FILL, Fleet, Host, PATIENCE, Shell, ask, assert_equal, exec, is_about_fuse, set_journal_mode, wait_for,
};
use sqlite_file::wal_index::IndexHeader;
use std::fs::File;

/// Frames and pages that the wal-index states. Read from the backing file: closing the mount's would drop this process's
/// locks on it.
fn stated(host: &Host, name: &str) -> (u32, u32) {
    let index =
        File::open(host.data().join("files").join(format!("{name}-shm"))).expect("the wal-index is there");
    let header = IndexHeader::read(&index).ok().flatten().expect("a header");
    (header.max_frame, header.page_count)
}

/// A database in WAL mode that both hosts have and nobody has open.
fn filled(primary: &Host, replica: &Host) {
    let db = primary.open("x.db");
    set_journal_mode(&db, "wal");
    exec(&db, "CREATE TABLE t(id INTEGER PRIMARY KEY, v);");
    exec(&db, FILL);
    drop(db);
    assert_equal(primary, replica, "x.db");
}

#[test]
fn readers_of_an_empty_wal_stop_asking_for_the_size_and_see_every_commit() {
    if is_about_fuse("a plain directory does not make the kernel forget the size of a WAL") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    filled(&primary, &replica);
    let reader = primary.open("x.db");
    // What SQLite keeps in memory it need not read, and only after a read has the kernel forgotten the size.
    exec(&reader, "PRAGMA cache_size=1;");
    let pages: u32 = ask(&reader, "PRAGMA page_count").parse().unwrap();
    assert_eq!(stated(&primary, "x.db"), (0, 0));
    wait_for("the wal-index states the number of pages", PATIENCE, || {
        assert_eq!(ask(&reader, "SELECT count(*) FROM t"), "300");
        (stated(&primary, "x.db") == (0, pages)).then_some(())
    });
    assert_eq!(ask(&reader, "PRAGMA page_count"), pages.to_string());
    let mut writer = Shell::open(&primary.path("x.db"));
    for rows in 1..=50 {
        writer.run("INSERT INTO t(v) VALUES (randomblob(3000));");
        assert_eq!(ask(&reader, "SELECT count(*) FROM t"), (300 + rows).to_string());
    }
    assert_eq!(ask(&reader, "PRAGMA integrity_check"), "ok");
    drop((reader, writer));
    assert_equal(&primary, &replica, "x.db");
}

#[test]
fn a_reader_that_becomes_a_writer_never_meets_the_lock() {
    if is_about_fuse("a plain directory does not make the kernel forget the size of a WAL") {
        return;
    }
    let fleet = Fleet::new();
    let (primary, replica) = fleet.pair();
    filled(&primary, &replica);
    for round in 0..20 {
        let db = primary.open("x.db");
        exec(&db, "PRAGMA busy_timeout=0; PRAGMA cache_size=1;");
        for read in 0..70 {
            assert_eq!(ask(&db, "SELECT count(*) FROM t"), (300 + round).to_string(), "read {read}");
        }
        exec(&db, "INSERT INTO t(v) VALUES (1)");
        // In turns from the start of a run and from its middle.
        if round % 2 == 0 {
            // Here the agent may still be another connection.
            db.busy_timeout(PATIENCE).expect("a timeout can be set");
            set_journal_mode(&db, "delete");
            exec(&db, "VACUUM");
            set_journal_mode(&db, "wal");
        }
    }
    assert_equal(&primary, &replica, "x.db");
    assert_eq!(replica.sql("x.db", "PRAGMA integrity_check"), "ok");
}
