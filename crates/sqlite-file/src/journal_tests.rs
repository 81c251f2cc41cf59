use super::*;
use rusqlite::Connection;
use std::collections::BTreeSet;
use std::path::Path;

fn journal_of(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}-journal", path.display()))
}

fn open_rw(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// A database with rows, and a transaction in it that has spilled to the file and is still open.
fn in_transaction(path: &Path, page_size: u32, synchronous: &str, mode: &str) -> Connection {
    let db = Connection::open(path).unwrap();
    db.pragma_update(None, "page_size", page_size).unwrap();
    db.pragma_update(None, "journal_mode", mode).unwrap();
    db.pragma_update(None, "synchronous", synchronous).unwrap();
    db.execute_batch(
        "create table t(a integer primary key, b);
         with recursive n(i) as (select 1 union all select i+1 from n where i<400)
         insert into t select i, randomblob(1500) from n;
         pragma cache_size=10; pragma cache_spill=on; begin;
         update t set b = randomblob(1400) where a % 2;",
    )
    .unwrap();
    // The second update journals more pages after the first were synced: that makes another segment.
    db.execute_batch(
        "update t set b = randomblob(1450) where a % 2 = 0;
         delete from t where a > 300;
         with recursive n(i) as (select 1000 union all select i+1 from n where i<1500)
         insert into t select i, randomblob(1500) from n;",
    )
    .unwrap();
    db
}

#[test]
fn our_rollback_of_a_hot_journal_leaves_the_bytes_that_sqlite_leaves() {
    for shift in 9..=16 {
        for synchronous in ["off", "full"] {
            for mode in ["delete", "persist"] {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("a.db");
                let db = in_transaction(&path, 1 << shift, synchronous, mode);
                let (ours, theirs) = (dir.path().join("ours.db"), dir.path().join("theirs.db"));
                for copy in [&ours, &theirs] {
                    std::fs::copy(&path, copy).unwrap();
                    std::fs::copy(journal_of(&path), journal_of(copy)).unwrap();
                }
                let journal = File::open(journal_of(&ours)).unwrap();
                assert!(is_hot(&journal).unwrap());
                let before = std::fs::read(&ours).unwrap();
                let outcome = rollback(&journal, &open_rw(&ours)).unwrap().unwrap();
                assert_eq!(outcome.page_size, 1 << shift);
                assert!(outcome.pages > 0);

                let other = Connection::open(&theirs).unwrap();
                let rows: u32 = other.query_row("select count(*) from t", [], |r| r.get(0)).unwrap();
                assert_eq!(rows, 400);
                drop(other);
                let result = std::fs::read(&theirs).unwrap();
                assert_ne!(before, result);
                assert!(std::fs::read(&ours).unwrap() == result, "{shift} {synchronous} {mode}");
                drop(db);
            }
        }
    }
}

#[test]
fn segments_follow_each_other_and_name_every_changed_page() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let original = dir.path().join("original.db");
    let db = in_transaction(&path, 1024, "full", "delete");
    let file = File::open(journal_of(&path)).unwrap();
    let journal = Journal::open(&file, None).unwrap().unwrap();
    let bytes = std::fs::read(journal_of(&path)).unwrap();
    let sector = journal.header().sector_size as usize;
    let segments = bytes.chunks(sector).filter(|c| c.starts_with(&JOURNAL_MAGIC)).count();
    assert!(segments > 2, "the transaction made {segments} segments");
    let numbers = journal.page_numbers().unwrap();
    assert!(journal.records().all(|r| r.unwrap().checksum_ok));
    assert!(numbers.len() as u64 <= (bytes.len() / 1032) as u64);

    // Take the transaction back on a copy to know the pages before it, and compare with those of the commit.
    std::fs::copy(&path, &original).unwrap();
    rollback(&file, &open_rw(&original)).unwrap().unwrap();
    let numbers_at_commit = {
        db.execute_batch("pragma cache_spill=off; update t set b = 1 where a = 2;").unwrap();
        // A commit deletes the journal; a hard link keeps it readable as it was at that moment.
        let link = dir.path().join("link");
        std::fs::hard_link(journal_of(&path), &link).unwrap();
        db.execute_batch("commit").unwrap();
        let file = File::open(link).unwrap();
        let journal = Journal::open(&file, None).unwrap().unwrap();
        assert_eq!(journal.header().initial_pages as usize, std::fs::read(&original).unwrap().len() / 1024);
        journal.page_numbers().unwrap().into_iter().collect::<BTreeSet<u32>>()
    };
    let (before, after) = (std::fs::read(&original).unwrap(), std::fs::read(&path).unwrap());
    for (i, (a, b)) in before.chunks(1024).zip(after.chunks(1024)).enumerate() {
        assert!(a == b || numbers_at_commit.contains(&(i as u32 + 1)), "page {} changed", i + 1);
    }
}

#[test]
fn playback_stops_at_the_first_bad_checksum_as_in_sqlite() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let _db = in_transaction(&path, 4096, "full", "delete");
    let (ours, theirs) = (dir.path().join("ours.db"), dir.path().join("theirs.db"));
    let bytes = std::fs::read(journal_of(&path)).unwrap();
    // Damage in a page that the checksum covers, at several depths; and a cut in the middle of a record.
    let sector = 512;
    for damage in [3usize, 17, 40] {
        for cut in [false, true] {
            let mut bad = bytes.clone();
            let record = sector + damage * 4104;
            if cut {
                bad.truncate(record + 1000);
            } else {
                bad[record + 4 + 4096 - 200] ^= 0xff;
            }
            for copy in [&ours, &theirs] {
                std::fs::copy(&path, copy).unwrap();
                std::fs::write(journal_of(copy), &bad).unwrap();
            }
            let journal = File::open(journal_of(&ours)).unwrap();
            rollback(&journal, &open_rw(&ours)).unwrap().unwrap();
            let other = Connection::open(&theirs).unwrap();
            // The file may well be malformed now, but the playback has happened.
            let _ = other.query_row("select count(*) from sqlite_schema", [], |_| Ok(()));
            drop(other);
            assert!(!journal_of(&theirs).exists());
            assert!(std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap(), "{damage} {cut}");
        }
    }
}

#[test]
fn finished_and_torn_journals_are_not_hot() {
    let dir = tempfile::tempdir().unwrap();
    for mode in ["truncate", "persist"] {
        let path = dir.path().join(format!("{mode}.db"));
        let db = in_transaction(&path, 4096, "full", mode);
        assert!(is_hot(&File::open(journal_of(&path)).unwrap()).unwrap());
        db.execute_batch("commit").unwrap();
        let file = File::open(journal_of(&path)).unwrap();
        assert!(!is_hot(&file).unwrap());
        assert!(Journal::open(&file, None).unwrap().is_none());
        let before = std::fs::read(&path).unwrap();
        assert_eq!(rollback(&file, &open_rw(&path)).unwrap(), None);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
    let torn = dir.path().join("torn");
    let mut header = [0u8; 512];
    header[..28].copy_from_slice(
        &JournalHeader { records: 1, nonce: 1, initial_pages: 1, sector_size: 512, page_size: 4096 }.encode(),
    );
    for (at, value) in [(22, 1u8), (26, 1), (0, 0)] {
        let mut bad = header;
        bad[at] ^= value | 1;
        std::fs::write(&torn, bad).unwrap();
        assert!(Journal::open(&File::open(&torn).unwrap(), None).unwrap().is_none(), "{at}");
    }
    std::fs::write(&torn, header).unwrap();
    let file = File::open(&torn).unwrap();
    assert_eq!(Journal::open(&file, None).unwrap().unwrap().records().count(), 0);
}

#[test]
fn the_super_journal_of_an_attached_commit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("ä.db"), dir.path().join("b.db"));
    let db = Connection::open(&a).unwrap();
    db.execute("attach ? as b", [b.to_str().unwrap()]).unwrap();
    db.execute_batch(
        "create table main.t(a); create table b.t(a); insert into main.t values(1); insert into b.t values(1);
         begin; update main.t set a=2; update b.t set a=2;",
    )
    .unwrap();
    // The commit deletes the journals; hard links keep them as they were at that moment.
    let links = [dir.path().join("link-a"), dir.path().join("link-b")];
    for (path, link) in [&a, &b].into_iter().zip(&links) {
        std::fs::hard_link(journal_of(path), link).unwrap();
        assert_eq!(super_journal(&File::open(link).unwrap()).unwrap(), None);
    }
    db.execute_batch("commit").unwrap();
    for link in &links {
        let file = File::open(link).unwrap();
        let name = Journal::open(&file, None).unwrap().unwrap().super_journal().unwrap().unwrap();
        assert!(name.to_str().unwrap().starts_with(&format!("{}-mj", a.display())), "{name:?}");
        assert_eq!(Journal::open(&file, None).unwrap().unwrap().page_numbers().unwrap(), [2, 1]);
    }
    let plain = dir.path().join("plain");
    std::fs::write(&plain, [7u8; 4096]).unwrap();
    assert_eq!(super_journal(&File::open(&plain).unwrap()).unwrap(), None);
}
