use super::*;
use crate::wal::{CommittedWal, Scanner, WAL_VERSION};
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::path::Path;

fn open(path: &Path) -> Arc<File> {
    Arc::new(File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap())
}

fn shm(path: &Path) -> std::path::PathBuf {
    path.with_extension("db-shm")
}

/// Page of every valid frame.
fn frames(path: &Path) -> Vec<u32> {
    let file = File::open(path.with_extension("db-wal")).unwrap();
    let mut scanner = Scanner::open(&file).unwrap().unwrap();
    let mut pages = Vec::new();
    while let Some(frame) = scanner.next_frame().unwrap() {
        pages.push(frame.pgno);
    }
    pages
}

fn database(path: &Path, page_size: u32) -> Connection {
    let db = Connection::open(path).unwrap();
    db.pragma_update(None, "page_size", page_size).unwrap();
    db.execute_batch(
        "pragma journal_mode=wal; pragma wal_autocheckpoint=0; create table t(a integer primary key, b);",
    )
    .unwrap();
    db
}

fn insert(db: &Connection, rows: u32) {
    db.execute_batch(&format!(
        "with recursive n(i) as (select 1 union all select i+1 from n where i<{rows})
         insert into t(b) select randomblob(400) from n;"
    ))
    .unwrap();
}

#[test]
fn reads_what_sqlite_wrote_for_every_page_size() {
    for shift in 9..=16 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = database(&path, 1 << shift);
        insert(&db, 200);
        let mut index = WalIndex::map(open(&shm(&path))).unwrap();
        let header = index.read_header().unwrap();
        let file = File::open(path.with_extension("db-wal")).unwrap();
        let committed = CommittedWal::read(&file).unwrap().unwrap();
        assert_eq!(header.version, WAL_VERSION);
        assert_eq!(header.page_size, 1 << shift);
        assert_eq!(header.max_frame, committed.end.frames);
        assert_eq!(header.page_count, committed.end.commit);
        assert_eq!(header.frame_checksum, committed.end.checksum);
        assert_eq!(header.salts, committed.header.salts);
        assert_eq!(header.big_endian, committed.header.big_endian);
        assert_eq!(IndexHeader::decode(&header.encode()), Some(header));
        for pgno in 1..=header.page_count + 3 {
            let found = index.lookup(pgno, 1, header.max_frame).unwrap();
            assert_eq!(found, committed.newest.get(&pgno).copied());
        }
        assert_eq!(index.backfill(), 0);
        db.execute_batch("pragma wal_checkpoint").unwrap();
        assert_eq!(index.backfill(), header.max_frame);
        assert_eq!(index.backfill_attempted(), header.max_frame);
        db.execute_batch("begin; select * from t").unwrap();
        assert_eq!(index.read_mark(0), 0);
    }
}

#[test]
fn several_blocks_are_built_bit_for_bit_as_by_sqlite() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = database(&path, 512);
    for round in 0..30 {
        insert(&db, 400);
        db.execute_batch(&format!("update t set b = randomblob(401) where a % 7 = {}", round % 7)).unwrap();
    }
    let pages = frames(&path);
    assert!(pages.len() > 3 * FRAMES_PER_BLOCK as usize, "{} frames", pages.len());
    let theirs = std::fs::read(shm(&path)).unwrap();
    let mut original = WalIndex::map(open(&shm(&path))).unwrap();
    let header = original.read_header().unwrap();

    // By appending; by rebuilding from nothing; by rebuilding over garbage.
    for way in ["append", "rebuild", "over garbage"] {
        let copy = dir.path().join(way);
        if way == "over garbage" {
            std::fs::write(&copy, vec![0xa5u8; theirs.len()]).unwrap();
        }
        let mut ours = WalIndex::map(open(&copy)).unwrap();
        if way == "append" {
            for (i, pgno) in pages.iter().enumerate() {
                ours.append(i as u32 + 1, *pgno).unwrap();
            }
        } else {
            ours.rebuild(&pages).unwrap();
        }
        ours.write_header(&header);
        assert_eq!(ours.read_header(), Some(header));
        let ours = std::fs::read(&copy).unwrap();
        assert!(ours[..96] == theirs[..96], "{way}: headers");
        // Slots of colliding pages may be in another order only if entries were removed; none were.
        assert!(ours[INDEX_HEADER_BYTES..] == theirs[INDEX_HEADER_BYTES..], "{way}");
    }

    let mut newest: BTreeMap<u32, u32> = BTreeMap::new();
    for (i, pgno) in pages.iter().enumerate() {
        newest.insert(*pgno, i as u32 + 1);
        assert_eq!(original.page_of(i as u32 + 1).unwrap(), Some(*pgno));
    }
    for (pgno, frame) in newest {
        assert_eq!(original.lookup(pgno, 1, header.max_frame).unwrap(), Some(frame));
        let older = pages[..frame as usize - 1].iter().rposition(|p| *p == pgno).map(|i| i as u32 + 1);
        assert_eq!(original.lookup(pgno, 1, frame - 1).unwrap(), older);
        assert_eq!(original.lookup(pgno, frame + 1, header.max_frame).unwrap(), None);
    }
}

#[test]
fn entries_of_a_dead_writer_are_removed_before_new_ones() {
    let dir = tempfile::tempdir().unwrap();
    let count = FRAMES_IN_FIRST_BLOCK + 2 * FRAMES_PER_BLOCK;
    let page = |frame: u32, salt: u32| (frame.wrapping_mul(2_654_435_761) ^ salt) % 900 + 1;
    for keep in
        [1, 5, FRAMES_IN_FIRST_BLOCK - 1, FRAMES_IN_FIRST_BLOCK, FRAMES_IN_FIRST_BLOCK + 1, count - 10]
    {
        let path = dir.path().join(format!("{keep}"));
        let mut index = WalIndex::map(open(&path)).unwrap();
        (1..=count).for_each(|f| index.append(f, page(f, 1)).unwrap());
        // The writer got to `count` but only `keep` were committed; another writer goes on from there.
        (keep + 1..=count).for_each(|f| index.append(f, page(f, 2)).unwrap());
        let mut newest = BTreeMap::new();
        for f in 1..=count {
            newest.insert(page(f, if f <= keep { 1 } else { 2 }), f);
        }
        for pgno in 1..=901 {
            assert_eq!(index.lookup(pgno, 1, count).unwrap(), newest.get(&pgno).copied());
        }
    }
}

#[test]
fn a_half_written_header_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let index = WalIndex::map(open(&dir.path().join("shm"))).unwrap();
    assert_eq!(index.read_header(), None);
    let header = IndexHeader { version: WAL_VERSION, page_size: 65536, max_frame: 9, ..Default::default() };
    index.write_header(&header);
    assert_eq!(index.read_header(), Some(header));
    for byte in 0..2 * HEADER_BYTES {
        let word = index.word(byte / 4 * 4);
        let before = word.load(Ordering::Relaxed);
        word.store(before ^ (1 << (byte % 4 * 8)), Ordering::Relaxed);
        assert_eq!(index.read_header(), None, "byte {byte}");
        word.store(before, Ordering::Relaxed);
    }
    assert_eq!(index.read_header(), Some(header));
}

#[test]
fn garbage_in_the_tables_is_an_error_and_never_a_loop_or_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    for fill in [0xffu8, 0x01, 0x7f, 0x10] {
        let path = dir.path().join(format!("{fill}"));
        std::fs::write(&path, vec![fill; 2 * BLOCK_BYTES]).unwrap();
        let mut index = WalIndex::map(open(&path)).unwrap();
        assert_eq!(index.read_header(), None);
        assert!(matches!(index.lookup(7, 1, 8000), Err(WalIndexError::Corrupt { block: 1 })));
        assert!(index.append(FRAMES_IN_FIRST_BLOCK + 1, 3).is_ok());
    }
}

#[test]
fn sqlite_reads_through_an_index_that_was_rebuilt_here() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let db = database(&path, 1024);
    insert(&db, 3000);
    let sum = |db: &Connection| -> (u32, i64) {
        db.query_row("select count(*), sum(length(b) + a) from t", [], |r| Ok((r.get(0)?, r.get(1)?)))
            .unwrap()
    };
    let expected = sum(&db);
    let mut index = WalIndex::map(open(&shm(&path))).unwrap();
    let header = index.read_header().unwrap();
    // Wipe the tables in the running database, then build them again: the next statement goes through them.
    for block in 0..index.mapped_blocks() {
        index.block(block).slots.iter().for_each(|s| s.store(0, Ordering::SeqCst));
    }
    index.rebuild(&frames(&path)).unwrap();
    index.write_header(&IndexHeader { change: header.change + 1, ..header });
    assert_eq!(sum(&db), expected);
    let check: String = db.query_row("pragma integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(check, "ok");
}

#[test]
fn a_file_that_was_cut_is_noticed_before_it_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let file = open(&dir.path().join("shm"));
    let mut index = WalIndex::map(Arc::clone(&file)).unwrap();
    index.append(1, 1).unwrap();
    assert!(index.is_whole().unwrap());
    file.set_len(BLOCK_BYTES as u64 - 1).unwrap();
    assert!(!index.is_whole().unwrap());
}
