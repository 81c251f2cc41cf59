use super::*;
use crate::DatabaseName;
use crate::database::{Dirs, Shared};
use crate::log::{CommitLog, Options};
use crate::ship::engine::Epoch;
use ltx::{Pos, Txid};
use rusqlite::Connection;
use std::sync::Arc;

/// A database of three WAL transactions made by SQLite, and a primary that has seen none of them.
struct Case {
    dir: tempfile::TempDir,
    wal: Vec<u8>,
    page_size: u32,
}

impl Case {
    fn new(page_size: u32) -> Case {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made.db");
        let db = Connection::open(&path).unwrap();
        db.pragma_update(None, "page_size", page_size).unwrap();
        db.pragma_update(None, "journal_mode", "wal").unwrap();
        for sql in
            ["create table t(x)", "insert into t values(randomblob(9000))", "update t set x = zeroblob(70)"]
        {
            db.execute_batch(sql).unwrap();
        }
        let wal = std::fs::read(dir.path().join("made.db-wal")).unwrap();
        Case { dir, wal, page_size }
    }

    fn primary(&self) -> (Arc<Database>, File) {
        let dirs = Dirs::new(self.dir.path().join("data"), self.dir.path().join("mount"));
        for dir in [&dirs.files, &dirs.checksums, &dirs.staging] {
            std::fs::create_dir_all(dir).unwrap();
        }
        let db = Self::node(dirs);
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&db.paths().wal).unwrap();
        (db, file)
    }

    fn node(dirs: Dirs) -> Arc<Database> {
        let options = Options { segment_bytes: 1 << 20, inline_bytes_max: 1 << 18, ..Options::default() };
        let log = CommitLog::open(&dirs.log, options).unwrap();
        let shared = Shared::new(Arc::new(log), dirs, 1, Epoch(1));
        shared.begin_writes(Epoch(1));
        shared.database_or_new(&DatabaseName::new("a.db").unwrap())
    }

    /// What SQLite writes: the header, then each frame's header and page.
    fn calls(&self) -> Vec<(u64, &[u8])> {
        let frame = frame_bytes(self.page_size) as usize;
        let mut calls = vec![(0, &self.wal[..32])];
        for at in (32..self.wal.len()).step_by(frame) {
            calls.push((at as u64, &self.wal[at..at + 24]));
            calls.push((at as u64 + 24, &self.wal[at + 24..at + frame]));
        }
        calls
    }
}

/// Cuts a write where the kernel does: at multiples of its page size.
fn pieces(offset: u64, data: &[u8], at: u64) -> Vec<(u64, &[u8])> {
    let mut pieces = Vec::new();
    let (mut offset, mut data) = (offset, data);
    while !data.is_empty() {
        let len = ((offset / at + 1) * at - offset).min(data.len() as u64) as usize;
        pieces.push((offset, &data[..len]));
        offset += len as u64;
        data = &data[len..];
    }
    pieces
}

#[test]
fn every_commit_is_captured_however_its_frame_is_cut() {
    for page_size in [512, 1024, 4096, 65536] {
        for cut in [13, 24, 512, 4096, 1 << 20] {
            let case = Case::new(page_size);
            let (db, file) = case.primary();
            let mut captured = 0;
            for (offset, data) in case.calls() {
                for (offset, piece) in pieces(offset, data, if offset == 0 { 1 << 20 } else { cut }) {
                    let mut st = db.state();
                    captured += usize::from(written(&db, &mut st, &file, offset, piece).unwrap().is_some());
                }
            }
            assert_eq!(captured, 3, "page size {page_size}, cut at multiples of {cut}");
            assert_eq!(db.state().position.txid.0, 3);
            assert_eq!(std::fs::read(&db.paths().wal).unwrap(), case.wal, "page size {page_size}, cut {cut}");
        }
    }
}

#[test]
fn a_refused_commit_stays_refused_until_the_frame_is_written_anew() {
    let case = Case::new(4096);
    let (db, file) = case.primary();
    let calls = case.calls();
    let (last, before) = calls.split_last().unwrap();
    for (offset, data) in before {
        written(&db, &mut db.state(), &file, *offset, data).unwrap();
    }
    let position = db.state().position;
    let (offset, page) = *last;
    db.shared().end_writes(std::time::Duration::ZERO);
    assert!(written(&db, &mut db.state(), &file, offset, &page[..100]).is_err());
    db.shared().begin_writes(Epoch(1));
    // The first piece was taken by the kernel, so SQLite goes on with the rest.
    db.state().wal.refused = Some((offset - 24, libc::ENOSPC));
    let rest = written(&db, &mut db.state(), &file, offset + 100, &page[100..]);
    assert_eq!(rest.unwrap_err().errno(), libc::ENOSPC);
    assert_eq!(db.state().position, position);
    let (at, header) = before[before.len() - 1];
    written(&db, &mut db.state(), &file, at, header).unwrap();
    assert!(written(&db, &mut db.state(), &file, offset, page).unwrap().is_some());
    assert_eq!(db.state().position.txid.0, position.txid.0 + 1);
}

#[test]
fn a_kept_back_frame_is_seen_by_readers_and_no_frame_in_the_file() {
    let case = Case::new(4096);
    let (db, file) = case.primary();
    let calls = case.calls();
    let commit = calls.iter().position(|(_, d)| d.len() == 24 && d[4..8] != [0; 4]).unwrap();
    for (offset, data) in &calls[..=commit] {
        written(&db, &mut db.state(), &file, *offset, data).unwrap();
    }
    let (at, header) = calls[commit];
    let mut in_the_file = [0; 24];
    file.read_exact_at(&mut in_the_file, at).unwrap();
    assert_ne!(in_the_file[8..16], header[8..16], "with these salts it would be a frame");
    let st = db.state();
    assert_eq!(st.wal.visible_len(at), at + 24);
    let mut seen = [0; 40];
    st.wal.overlay(at - 8, &mut seen);
    assert_eq!(&seen[8..32], header);
}

#[test]
fn a_wal_that_was_copied_in_is_captured_from_the_file() {
    let case = Case::new(4096);
    let (db, file) = case.primary();
    std::fs::write(&db.paths().database, []).unwrap();
    for (offset, piece) in pieces(0, &case.wal, 8192) {
        written(&db, &mut db.state(), &file, offset, piece).unwrap();
    }
    capture_foreign(&db, &mut db.state(), &file).unwrap();
    let copied = db.state().position.checksum;
    drop((db, file));

    let followed = Case::new(4096);
    let followed = Case { dir: followed.dir, wal: case.wal.clone(), page_size: 4096 };
    let (db, file) = followed.primary();
    for (offset, data) in followed.calls() {
        written(&db, &mut db.state(), &file, offset, data).unwrap();
    }
    assert_eq!(copied, db.state().position.checksum);
}

/// A commit whose writer dies before it publishes it never happened for SQLite: the next transaction takes its place.
#[test]
fn a_transaction_in_the_place_of_an_unpublished_one_takes_it_back() {
    let made = tempfile::tempdir().unwrap();
    let (one, two) = (made.path().join("one.db"), made.path().join("two.db"));
    let suffixed = |path: &std::path::Path, suffix: &str| format!("{}{suffix}", path.display());
    let db = Connection::open(&one).unwrap();
    db.execute_batch(
        "pragma journal_mode=wal; create table a(x); create table b(x); create table c(x);
         insert into a values(1); insert into b values(1);",
    )
    .unwrap();
    for suffix in ["", "-wal"] {
        std::fs::copy(suffixed(&one, suffix), suffixed(&two, suffix)).unwrap();
    }
    let base = std::fs::read(suffixed(&one, "-wal")).unwrap();
    db.execute_batch("begin; update a set x = 2; insert into c values(zeroblob(20000)); commit").unwrap();
    let unpublished = std::fs::read(suffixed(&one, "-wal")).unwrap();
    let other = Connection::open(&two).unwrap();
    other.execute_batch("update b set x = 3").unwrap();
    let published = std::fs::read(suffixed(&two, "-wal")).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let case = Case { dir, wal: published.clone(), page_size: 4096 };
    let (primary, file) = case.primary();
    let feed = |wal: &[u8], from: usize| {
        let frame = frame_bytes(4096) as usize;
        if from == 0 {
            written(&primary, &mut primary.state(), &file, 0, &wal[..32]).unwrap();
        }
        for at in (from.max(32)..wal.len()).step_by(frame) {
            written(&primary, &mut primary.state(), &file, at as u64, &wal[at..at + 24]).unwrap();
            for (offset, piece) in pieces(at as u64 + 24, &wal[at + 24..at + frame], 4096) {
                written(&primary, &mut primary.state(), &file, offset, piece).unwrap();
            }
        }
    };
    std::fs::copy(&one, &primary.paths().database).unwrap();
    feed(&base, 0);
    feed(&unpublished, base.len());
    feed(&published, base.len());
    let taken_back = primary.state().position;
    drop((primary, file));

    // The same, with another agent after each of the writes that take the place.
    let frame = frame_bytes(4096) as usize;
    let replacing: Vec<(u64, &[u8])> = (base.len()..published.len())
        .step_by(frame)
        .flat_map(|at| {
            let page = pieces(at as u64 + 24, &published[at + 24..at + frame], 4096);
            std::iter::once((at as u64, &published[at..at + 24])).chain(page)
        })
        .collect();
    for died_at in 0..replacing.len() {
        let case = Case { dir: tempfile::tempdir().unwrap(), wal: published.clone(), page_size: 4096 };
        let (mut primary, mut file) = case.primary();
        std::fs::copy(&one, &primary.paths().database).unwrap();
        for (i, (offset, data)) in replacing.iter().enumerate() {
            if i == 0 {
                let before = Case { dir: tempfile::tempdir().unwrap(), wal: base.clone(), page_size: 4096 };
                let unpublished =
                    Case { dir: tempfile::tempdir().unwrap(), wal: unpublished.clone(), page_size: 4096 };
                let earlier = before
                    .calls()
                    .into_iter()
                    .chain(unpublished.calls().into_iter().skip(before.calls().len()));
                for (offset, data) in earlier {
                    written(&primary, &mut primary.state(), &file, offset, data).unwrap();
                }
            }
            written(&primary, &mut primary.state(), &file, *offset, data).unwrap();
            if i == died_at {
                (primary, file) = next_agent(&case, primary, file);
            }
        }
        assert_eq!(primary.state().position, taken_back, "write {died_at}");
    }

    other.execute_batch("pragma wal_checkpoint(truncate)").unwrap();
    let expected = std::fs::read(&two).unwrap();
    let sum = expected
        .chunks_exact(4096)
        .zip(1..)
        .fold(ltx::Checksum::EMPTY, |sum, (page, pgno)| sum.xor(ltx::page_checksum(pgno, page)));
    assert_eq!(taken_back.checksum, sum);
}

/// Another agent takes up the database; the applications have noticed nothing.
fn next_agent(case: &Case, db: Arc<Database>, file: File) -> (Arc<Database>, File) {
    let wal = db.paths().wal.clone();
    db.shared().log.close();
    drop((db, file));
    let db = Case::node(Dirs::new(case.dir.path().join("data"), case.dir.path().join("mount")));
    db.reattach().unwrap();
    (db, File::options().read(true).write(true).open(wal).unwrap())
}

/// A write whose answer the application never got.
fn ask_again(db: &Database, file: &File, offset: u64, data: &[u8]) {
    let mut st = db.state();
    if !already_written(&st, file, offset, data).unwrap() {
        written(db, &mut st, file, offset, data).unwrap();
    }
}

#[test]
fn an_agent_that_dies_at_any_write_is_followed_by_one_that_knows_what_it_knew() {
    for (page_size, cut) in [(512, 13), (4096, 4096), (4096, 1 << 20)] {
        let case = Case::new(page_size);
        let (db, file) = case.primary();
        std::fs::write(&db.paths().database, []).unwrap();
        let calls: Vec<(u64, &[u8])> = case
            .calls()
            .into_iter()
            .flat_map(|(offset, data)| pieces(offset, data, if offset == 0 { 1 << 20 } else { cut }))
            .collect();
        for (offset, data) in &calls {
            written(&db, &mut db.state(), &file, *offset, data).unwrap();
        }
        let expected = {
            let st = db.state();
            (st.position, st.page_count)
        };
        db.shared().log.close();
        drop((db, file));

        // Each write is the last one of an agent: answered, or done and not answered.
        let step = (calls.len() / 8).max(1) | 1;
        for died_at in (0..calls.len()).step_by(step) {
            for answered in [true, false] {
                let case = Case { dir: tempfile::tempdir().unwrap(), wal: case.wal.clone(), page_size };
                let (mut db, mut file) = case.primary();
                std::fs::write(&db.paths().database, []).unwrap();
                for (i, (offset, data)) in calls.iter().enumerate() {
                    written(&db, &mut db.state(), &file, *offset, data).unwrap();
                    if i == died_at {
                        (db, file) = next_agent(&case, db, file);
                        if !answered {
                            ask_again(&db, &file, *offset, data);
                        }
                    }
                }
                let what = format!("page size {page_size}, cut {cut}, write {died_at}, answered {answered}");
                assert_eq!(std::fs::read(&db.paths().wal).unwrap(), case.wal, "{what}");
                let st = db.state();
                assert_eq!((st.position, st.page_count), expected, "{what}");
                assert!(st.wal.reverted.is_empty(), "{what}");
            }
        }
    }
}

#[test]
fn an_agent_that_dies_after_it_logged_a_commit_and_before_it_wrote_the_frame_is_followed_by_one_that_writes_it()
 {
    let case = Case::new(4096);
    let (mut db, mut file) = case.primary();
    std::fs::write(&db.paths().database, []).unwrap();
    let calls = case.calls();
    for (offset, data) in &calls {
        written(&db, &mut db.state(), &file, *offset, data).unwrap();
    }
    let position = db.state().position;
    let (at, header) = calls[calls.len() - 2];
    let mut veiled = header.to_vec();
    veil(&mut veiled);
    file.write_all_at(&veiled, at).unwrap();
    (db, file) = next_agent(&case, db, file);
    assert_eq!(std::fs::read(&db.paths().wal).unwrap(), case.wal);
    let (offset, page) = calls[calls.len() - 1];
    ask_again(&db, &file, offset, page);
    assert_eq!(db.state().position, position);
    assert_eq!(std::fs::read(&db.paths().wal).unwrap(), case.wal);
}

#[test]
fn newest_records_are_for_followers_once_they_are_durable() {
    let case = Case::new(4096);
    let (db, file) = case.primary();
    for (offset, data) in case.calls() {
        written(&db, &mut db.state(), &file, offset, data).unwrap();
    }
    let newest = db.state().position;
    // Nobody waits for them: the flusher was asked all the same.
    while db.durable_position() != newest {
        std::thread::yield_now();
    }
    let found = |txid| db.recent_record(Txid(txid)).map(|record| record.post_apply);
    assert_eq!((found(3), found(4)), (Some(newest.checksum), None));
    db.set_durable_position(Pos { txid: Txid(2), ..newest });
    assert!(found(2).is_some());
    assert_eq!(found(3), None);
    db.set_durable_position(newest);
    let st = &mut db.state();
    st.marked = newest;
    db.close_idle(st);
    assert_eq!(found(3), None);
}
