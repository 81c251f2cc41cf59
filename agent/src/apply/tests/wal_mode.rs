//! Databases in WAL mode, with readers in other processes.

use super::*;
use sqlite_file::wal_index::{FRAMES_IN_FIRST_BLOCK, FRAMES_PER_BLOCK};

/// A primary in WAL mode and its replica, with some rows in both.
fn pair(page_size: u32) -> (Primary, Replica) {
    let mut primary = Primary::new(page_size, "wal");
    let mut replica = Replica::new();
    let files = [primary.exec(CREATE), primary.insert(50, 300)];
    replica.apply(&files);
    replica.assert_equals(&primary.image);
    (primary, replica)
}

#[test]
fn an_open_reader_keeps_its_snapshot_and_sees_the_next_transaction_after_it() {
    for page_size in [512, 4096, 65536] {
        let (mut primary, mut replica) = pair(page_size);
        let mut long = Sqlite::open(&replica.path);
        let mut short = Sqlite::open(&replica.path);
        let before = long.ask(&format!("begin; {DIGEST}"));
        assert_eq!(short.digest(), before);
        for round in 0..20 {
            let file = primary.exec(&format!(
                "begin; {} update t set b = randomblob(200) where a % 5 = {};
                 delete from t where a % 11 = {}; commit;",
                insert_sql(20, 400),
                round % 5,
                round % 11
            ));
            replica.apply(&[file]);
            assert_eq!(short.digest(), digest_of(&primary.db));
            assert_eq!(long.digest(), before);
            replica.assert_equals(&primary.image);
        }
        assert_eq!(long.ask("commit; pragma integrity_check;"), "ok");
        assert_eq!(long.digest(), digest_of(&primary.db));
        drop((long, short));
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn several_transactions_become_visible_at_once_and_each_has_its_commit() {
    let (mut primary, mut replica) = pair(1024);
    let mut reader = Sqlite::open(&replica.path);
    reader.digest();
    let files: Vec<_> = (0..30).map(|_| primary.insert(5, 500)).collect();
    replica.apply(&files);
    assert_eq!(reader.digest(), digest_of(&primary.db));
    let wal = File::open(replica.file("-wal")).unwrap();
    let mut scanner = sqlite_file::wal::Scanner::open(&wal).unwrap().unwrap();
    let mut commits = 0;
    while let Some(frame) = scanner.next_frame().unwrap() {
        commits += usize::from(frame.commit > 0);
    }
    assert!(commits >= 30, "{commits} commits");
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn the_wal_index_grows_over_several_blocks() {
    let (mut primary, mut replica) = pair(512);
    let mut reader = Sqlite::open(&replica.path);
    reader.digest();
    let two_blocks = (FRAMES_IN_FIRST_BLOCK + FRAMES_PER_BLOCK) as usize;
    while replica.applier.wal_frames() < two_blocks + 500 {
        let file = primary.insert(600, 450);
        replica.apply(&[file]);
        assert_eq!(reader.digest(), digest_of(&primary.db));
    }
    // A batch that crosses a block in one go, and a transaction larger than a batch.
    let files = [primary.insert(3000, 450), primary.exec("update t set b = randomblob(10) where a % 3 = 0")];
    replica.apply(&files);
    assert_eq!(reader.digest(), digest_of(&primary.db));
    assert_eq!(reader.ask("pragma integrity_check;"), "ok");
    replica.assert_equals(&primary.image);
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn the_wal_restarts_when_all_is_backfilled_and_no_reader_needs_it() {
    let (mut primary, mut replica) = pair(4096);
    let mut reader = Sqlite::open(&replica.path);
    let mut sizes = Vec::new();
    for _ in 0..30 {
        let file = primary.insert(20, 700);
        replica.apply(&[file]);
        assert_eq!(reader.digest(), digest_of(&primary.db));
        let outcome = replica.applier.checkpoint(Durability::Log).unwrap();
        assert_eq!(outcome.frames, outcome.backfilled);
        assert_eq!(replica.applier.wal_frames(), 0);
        sizes.push(std::fs::metadata(replica.file("-wal")).unwrap().len());
        replica.assert_equals(&primary.image);
    }
    assert!(sizes.iter().max() < Some(&(60 * 4120)), "the WAL did not restart: {sizes:?}");
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_reader_at_an_old_mark_holds_the_checkpoint_back_and_loses_nothing() {
    let (mut primary, mut replica) = pair(1024);
    let mut old = Sqlite::open(&replica.path);
    replica.apply(&[primary.insert(100, 500)]);
    let before = old.ask(&format!("begin; {DIGEST}"));
    let pinned = replica.applier.wal_frames();
    for _ in 0..5 {
        replica.apply(&[primary.insert(100, 500), primary.exec("delete from t where a % 7 = 3")]);
        let outcome = replica.applier.checkpoint(Durability::Log).unwrap();
        assert_eq!(outcome.backfilled as usize, pinned);
        assert!(outcome.frames > outcome.backfilled);
        assert_eq!(old.digest(), before);
        assert_eq!(Sqlite::open(&replica.path).digest(), digest_of(&primary.db));
        replica.assert_equals(&primary.image);
    }
    // A restart is not possible while the reader is there: the WAL only grows.
    let frames = replica.applier.checkpoint(Durability::Log).unwrap().frames;
    old.ask("commit;");
    let outcome = replica.applier.checkpoint(Durability::Log).unwrap();
    assert_eq!((outcome.frames, outcome.backfilled), (frames, frames));
    assert_eq!(old.digest(), digest_of(&primary.db));
    drop(old);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn frames_that_a_reader_uses_are_not_overwritten_although_all_are_backfilled() {
    let (mut primary, mut replica) = pair(1024);
    let mut reader = Sqlite::open(&replica.path);
    reader.ask("pragma cache_size=1;");
    replica.apply(&[primary.insert(200, 500)]);
    // The reader is at the newest frame: it holds no checkpoint back, but the restart that would follow it.
    let before = reader.ask(&format!("begin; {DIGEST}"));
    let frames = replica.applier.checkpoint(Durability::Log).unwrap().frames;
    assert_eq!(replica.applier.wal_frames(), 0);
    replica.apply(&[primary.exec("update t set b = randomblob(500)")]);
    assert_eq!(reader.digest(), before);
    assert!(replica.applier.checkpoint(Durability::Log).unwrap().frames > frames);
    reader.ask("commit;");
    assert_eq!(reader.digest(), digest_of(&primary.db));
    // Now nobody does, and the WAL begins anew.
    replica.applier.checkpoint(Durability::Log).unwrap();
    replica.apply(&[primary.insert(1, 1)]);
    assert!(replica.applier.checkpoint(Durability::Log).unwrap().frames < frames);
    assert_eq!(reader.digest(), digest_of(&primary.db));
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn checkpoints_by_applications_and_ours_go_together() {
    let (mut primary, mut replica) = pair(2048);
    let mut app = Sqlite::open(&replica.path);
    for (i, kind) in ["passive", "full", "restart", "truncate"].iter().cycle().take(24).enumerate() {
        replica.apply(&[primary.insert(30, 900), primary.exec("update t set b = 'x' || a where a % 4 = 1")]);
        let answer = app.ask(&format!("pragma wal_checkpoint({kind});"));
        assert!(answer.starts_with("0|"), "{kind}: {answer}");
        assert_eq!(app.digest(), digest_of(&primary.db));
        if i % 5 == 0 {
            replica.applier.checkpoint(Durability::Log).unwrap();
        }
        replica.assert_equals(&primary.image);
    }
    drop(app);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn applications_that_come_and_go_leave_the_wal_alone_until_the_applier_detaches() {
    let (mut primary, mut replica) = pair(4096);
    for _ in 0..5 {
        replica.apply(&[primary.insert(3, 3)]);
        let mut app = Sqlite::open(&replica.path);
        assert_eq!(app.digest(), digest_of(&primary.db));
        // Leaving WAL mode needs to be alone.
        app.ask("pragma journal_mode=delete;");
        assert_eq!(app.ask("pragma journal_mode;"), "wal");
        drop(app);
        assert!(replica.file("-wal").exists() && replica.file("-shm").exists());
    }
    let mut app = Sqlite::open(&replica.path);
    app.digest();
    assert!(!replica.applier.detach().unwrap());
    assert!(replica.applier.is_attached());
    drop(app);
    assert!(replica.applier.detach().unwrap());
    assert!(!replica.applier.is_attached());
    assert!(!replica.file("-wal").exists() && !replica.file("-shm").exists());
    replica.assert_file_equals(&primary.image);
    replica.apply(&[primary.insert(3, 3)]);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_database_grows_and_shrinks_under_readers() {
    let mut primary = Primary::new(1024, "wal");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec("pragma auto_vacuum=full; vacuum;"), primary.exec(CREATE)]);
    let mut reader = Sqlite::open(&replica.path);
    for round in 0..6 {
        replica.apply(&[primary.insert(2000, 300)]);
        assert_eq!(reader.digest(), digest_of(&primary.db));
        replica.apply(&[primary.exec("delete from t where a % 20"), primary.exec("vacuum")]);
        assert_eq!(reader.digest(), digest_of(&primary.db));
        replica.assert_equals(&primary.image);
        if round % 2 == 0 {
            replica.applier.checkpoint(Durability::Log).unwrap();
            assert_eq!(std::fs::metadata(&replica.path).unwrap().len(), primary.image.bytes.len() as u64);
        }
        assert_eq!(reader.ask("pragma integrity_check;"), "ok");
    }
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn sqlite_writes_to_the_replica_as_if_sqlite_had_written_it() {
    // What happens when the replica becomes primary, also while the applier is still connected.
    let (mut primary, mut replica) = pair(4096);
    replica.apply(&[primary.insert(300, 300)]);
    for attached in [true, false] {
        let mut app = Sqlite::open(&replica.path);
        for _ in 0..10 {
            app.ask(&insert_sql(50, 500));
            app.ask("update t set b = randomblob(30) where a % 3 = 1;");
        }
        assert_eq!(app.ask("pragma integrity_check;"), "ok");
        drop(app);
        // And back: what was written there becomes the state to go on from.
        let image = Image::read(&replica.path);
        replica.shape = image.shape();
        assert_eq!(replica.applier.is_attached(), attached);
        let next = {
            let copy = Replica::new();
            std::fs::write(&copy.path, &image.bytes).unwrap();
            let db = Connection::open(&copy.path).unwrap();
            db.execute_batch("delete from t where a % 2").unwrap();
            drop(db);
            let after = Image::read(&copy.path);
            replica.apply(&[after.transaction_after(&image, 9)]);
            after
        };
        replica.assert_file_equals(&next);
    }
}

#[test]
fn a_wal_left_by_a_crashed_application_is_kept_and_built_upon() {
    for damage_index in [false, true] {
        let (mut primary, mut replica) = pair(1024);
        replica.apply(&[primary.insert(200, 200)]);
        let mut app = Sqlite::open(&replica.path);
        app.digest();
        // The agent dies (its files are closed without cleaning up), then the application.
        replica.applier.connection = None;
        app.kill();
        assert!(replica.file("-wal").exists());
        if damage_index {
            std::fs::write(replica.file("-shm"), vec![0x5a; 32768]).unwrap();
        }
        replica.assert_equals(&primary.image);
        replica.apply(&[primary.insert(10, 200)]);
        assert_eq!(Sqlite::open(&replica.path).digest(), digest_of(&primary.db));
        replica.assert_equals(&primary.image);
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn a_wal_index_whose_writer_died_is_rebuilt_under_readers() {
    let (mut primary, mut replica) = pair(512);
    replica.apply(&[primary.insert(3000, 300)]);
    let mut reader = Sqlite::open(&replica.path);
    let before = reader.ask(&format!("begin; {DIGEST}"));
    // One copy of the header differs from the other: what a writer that dies between them leaves.
    {
        use std::os::unix::fs::FileExt;
        let shm = File::options().write(true).open(replica.file("-shm")).unwrap();
        shm.write_all_at(&[0xff; 4], 16).unwrap();
    }
    replica.apply(&[primary.insert(30, 300)]);
    assert_eq!(reader.digest(), before);
    reader.ask("commit;");
    assert_eq!(reader.digest(), digest_of(&primary.db));
    assert_eq!(reader.ask("pragma integrity_check;"), "ok");
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_dead_writers_uncommitted_frames_are_overwritten() {
    let (mut primary, mut replica) = pair(1024);
    replica.apply(&[primary.insert(100, 300)]);
    let mut app = Sqlite::open(&replica.path);
    app.ask(&format!("pragma cache_size=5; begin; {}", insert_sql(2000, 300)));
    app.kill();
    replica.applier.connection = None;
    replica.apply(&[primary.insert(100, 300)]);
    assert_eq!(Sqlite::open(&replica.path).digest(), digest_of(&primary.db));
    replica.assert_file_equals(&primary.image);
}

#[test]
fn unused_databases_are_written_in_place_if_asked() {
    let (mut primary, mut replica) = pair(4096);
    assert!(replica.applier.detach().unwrap());
    replica.applier.set_in_place_when_unused(true);
    replica.apply(&[primary.insert(30, 300)]);
    assert!(!replica.applier.is_attached() && !replica.file("-wal").exists());
    assert_eq!(std::fs::read(&replica.path).unwrap(), primary.image.bytes);
    let mut reader = Sqlite::open(&replica.path);
    let before = reader.ask(&format!("begin; {DIGEST}"));
    replica.apply(&[primary.insert(30, 300)]);
    assert!(replica.applier.is_attached());
    assert_eq!(reader.digest(), before);
    drop(reader);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_transaction_without_pages_may_change_the_size_only() {
    let (_primary, mut replica) = pair(4096);
    let image = Image::read(&replica.path);
    struct SizeOnly(Vec<TransactionHeader>);
    impl TransactionSource for SizeOnly {
        fn next_transaction(&mut self) -> Result<Option<TransactionHeader>, ltx::Error> {
            Ok(self.0.pop())
        }
        fn next_page(&mut self, _: &mut Vec<u8>) -> Result<Option<u32>, ltx::Error> {
            Ok(None)
        }
    }
    let to = |pages| TransactionHeader { page_size: 4096, commit: pages, owner: None };
    let pages = image.page_count();
    let mut source = SizeOnly(vec![to(pages - 1), to(pages), to(pages)]);
    let frames = replica.applier.wal_frames();
    replica.shape = replica.applier.apply(replica.shape, &mut source, LONG).unwrap();
    assert_eq!(replica.applier.wal_frames(), frames + 1);
    let cut = Image { bytes: image.bytes[..image.bytes.len() - 4096].to_vec(), ..image };
    replica.assert_equals(&cut);
}

#[test]
fn an_empty_wal_states_the_number_of_pages_and_everything_goes_on() {
    for page_size in [512, 4096, 65536] {
        let (mut primary, mut replica) = pair(page_size);
        replica.assert_file_equals(&primary.image);
        assert!(
            !replica.applier.state_page_count(|| {}).unwrap(),
            "nobody needs it, and no WAL is made for it"
        );
        let mut reader = Sqlite::open(&replica.path);
        let digest = reader.digest();
        let shm = replica.file("-shm");
        let header = || {
            let shm = File::open(&shm).unwrap();
            sqlite_file::wal_index::IndexHeader::read(&shm).unwrap().unwrap()
        };
        assert!(is_page_count_missing(&header()));
        let mut writer = Sqlite::open(&replica.path);
        writer.ask("begin immediate;");
        assert!(!replica.applier.state_page_count(|| {}).unwrap(), "a writer is not waited for");
        writer.ask("rollback; begin; select count(*) from t;");
        assert!(!replica.applier.state_page_count(|| {}).unwrap(), "a reader may go on to write");
        writer.ask("create table became_a_writer(x); rollback;");
        assert!(replica.applier.state_page_count(|| {}).unwrap());
        assert!(!replica.applier.state_page_count(|| {}).unwrap(), "once is enough");
        assert_eq!((header().max_frame, header().page_count), (0, primary.image.page_count()));
        assert_eq!(reader.digest(), digest);
        assert_eq!(reader.ask("pragma page_count;"), primary.image.page_count().to_string());
        // A new connection, one that writes, and the applier all go on from there.
        assert_eq!(Sqlite::open(&replica.path).ask("pragma integrity_check;"), "ok");
        assert_eq!(writer.ask("pragma wal_checkpoint(truncate);"), "0|0|0");
        let file = primary.insert(200, 300);
        replica.apply(&[file]);
        assert_eq!(reader.digest(), digest_of(&primary.db));
        assert_eq!(reader.ask("pragma integrity_check;"), "ok");
        writer.ask("delete from t where a > 60; vacuum;");
        assert_eq!(reader.ask("select max(a) from t; pragma integrity_check;"), "60\nok");
        // The number ends with the wal-index: what rollback mode does to the file later is seen.
        drop(reader);
        assert!(!replica.applier.detach().unwrap(), "the writer is connected");
        let Replica { dir: _dir, path, applier, .. } = replica;
        drop(applier);
        assert_eq!(writer.ask("pragma journal_mode=delete;"), "delete");
        writer.ask(&insert_sql(500, 300));
        let rows = writer.ask("select count(*) from t;");
        assert_eq!(writer.ask("pragma journal_mode=wal;"), "wal");
        assert_eq!(
            Sqlite::open(&path).ask("select count(*) from t; pragma integrity_check;"),
            format!("{rows}\nok")
        );
    }
}

#[test]
fn nothing_is_appended_to_what_somebody_else_has_committed() {
    let mut primary = Primary::new(1024, "wal");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE)]);
    replica.apply(&[primary.insert(3, 3)]);
    let WalLeft::Published(known) = replica.applier.wal_left() else { panic!("it was appended") };
    let mut app = Sqlite::open(&replica.path);
    app.ask("insert into t(b) values('mine');");
    let next = [primary.insert(3, 3)];
    let mut source = LtxTransactions::new(next.iter().map(|f| &f[..]));
    let refused = replica.applier.apply_after(Some(known), replica.shape, &mut source, LONG);
    assert!(matches!(refused, Err(ApplyError::ForeignCommit { .. })), "{refused:?}");
    assert_eq!(replica.applier.wal_left(), WalLeft::Untouched);
    assert_eq!(app.ask("select count(*), count(b) filter (where b = 'mine') from t;"), "4|1");
}
