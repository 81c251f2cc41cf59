//! Records and files that are not as they should be.

use super::*;

fn ready(mode: &str) -> (Primary, Replica) {
    let mut primary = Primary::new(1024, mode);
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE), primary.insert(100, 300)]);
    (primary, replica)
}

#[test]
fn a_corrupt_record_changes_nothing_and_the_right_one_can_follow() {
    for mode in ["wal", "delete"] {
        let (mut primary, mut replica) = ready(mode);
        let before = primary.image.clone();
        let digest = digest_of(&primary.db);
        let good = [primary.insert(100, 300), primary.exec("update t set b = randomblob(300)")];
        let mut reader = Sqlite::open(&replica.path);
        assert_eq!(reader.digest(), digest);
        let length = good[1].len();
        for at in [3, 20, 110, length / 2, length - 20, length - 3] {
            let mut bad = good.clone();
            bad[1][at] ^= 0x10;
            let error = replica.try_apply(&bad, LONG).unwrap_err();
            assert!(error.to_string().contains("replica.db"), "{error}");
            replica.assert_equals(&before);
            assert_eq!(reader.digest(), digest);
            let mut cut = good.clone();
            cut[1].truncate(at);
            assert!(matches!(replica.try_apply(&cut, LONG), Err(ApplyError::Record { .. })));
            replica.assert_equals(&before);
            assert!(!replica.file("-journal").exists());
        }
        replica.apply(&good);
        assert_eq!(reader.digest(), digest_of(&primary.db));
        replica.assert_equals(&primary.image);
        drop(reader);
        replica.assert_file_equals(&primary.image);
    }
}

/// One transaction with these pages, whatever they are.
struct Pages(Option<TransactionHeader>, Vec<(u32, usize)>);

impl TransactionSource for Pages {
    fn next_transaction(&mut self) -> Result<Option<TransactionHeader>, ltx::Error> {
        Ok(self.0.take())
    }
    fn next_page(&mut self, page: &mut Vec<u8>) -> Result<Option<u32>, ltx::Error> {
        let Some((pgno, length)) = (!self.1.is_empty()).then(|| self.1.remove(0)) else { return Ok(None) };
        page.clear();
        page.resize(length, 7);
        Ok(Some(pgno))
    }
}

#[test]
fn pages_that_no_database_has_are_refused() {
    for mode in ["wal", "delete"] {
        let (primary, mut replica) = ready(mode);
        let header = TransactionHeader { page_size: 1024, commit: 50, owner: None };
        let lock = lock_page(1024);
        for (header, pages) in [
            (header, vec![(0, 1024)]),
            (header, vec![(2, 1024), (2, 1024)]),
            (header, vec![(3, 1024), (2, 1024)]),
            (header, vec![(51, 1024)]),
            (header, vec![(5, 1023)]),
            (header, vec![(5, 4096)]),
            (TransactionHeader { commit: lock + 9, ..header }, vec![(4, 1024), (lock, 1024)]),
            (TransactionHeader { page_size: 1000, ..header }, vec![(4, 1000)]),
        ] {
            let error =
                replica.applier.apply(replica.shape, &mut Pages(Some(header), pages), LONG).unwrap_err();
            assert!(matches!(error, ApplyError::InvalidTransaction { .. }), "{error}");
            replica.assert_equals(&primary.image);
        }
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn a_new_database_must_be_whole() {
    let mut primary = Primary::new(1024, "wal");
    let files = [primary.exec(CREATE), primary.insert(10, 10)];
    let mut replica = Replica::new();
    // Without the first transaction, which had all pages.
    let error = replica.try_apply(&files[1..], LONG).unwrap_err();
    assert!(error.to_string().contains("pages of a new database; fetch a snapshot"), "{error}");
    for suffix in ["", "-journal", "-wal"] {
        assert!(!replica.file(suffix).exists(), "{suffix}");
    }
    replica.apply(&files);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_wal_index_that_somebody_cuts_is_built_anew() {
    let (mut primary, mut replica) = ready("wal");
    replica.apply(&[primary.insert(100, 300)]);
    for length in [0, 100, 5000] {
        File::options().write(true).open(replica.file("-shm")).unwrap().set_len(length).unwrap();
        replica.apply(&[primary.insert(100, 300)]);
        assert_eq!(Sqlite::open(&replica.path).digest(), digest_of(&primary.db));
        replica.assert_equals(&primary.image);
    }
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_file_that_is_no_database_is_replaced_by_a_snapshot() {
    let mut primary = Primary::new(1024, "wal");
    primary.db.execute_batch(CREATE).unwrap();
    let snapshot = primary.insert(10, 10);
    for garbage in [Vec::new(), vec![7u8; 10], vec![9u8; 100_000]] {
        let mut replica = Replica::new();
        std::fs::write(&replica.path, garbage).unwrap();
        std::fs::write(replica.file("-wal"), b"an old WAL").unwrap();
        replica.apply(std::slice::from_ref(&snapshot));
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn a_database_that_was_replaced_by_another_file_is_opened_anew() {
    let (mut primary, mut replica) = ready("wal");
    replica.apply(&[primary.insert(1, 1)]);
    assert!(replica.applier.is_attached());
    let copy = replica.dir.path().join("copy");
    std::fs::write(&copy, &primary.image.bytes).unwrap();
    for suffix in ["-wal", "-shm"] {
        std::fs::remove_file(replica.file(suffix)).unwrap();
    }
    std::fs::rename(&copy, &replica.path).unwrap();
    replica.apply(&[primary.insert(1, 1)]);
    replica.assert_file_equals(&primary.image);
}

#[test]
fn a_full_disk_is_an_error_that_leaves_the_database_as_it_was() {
    use std::os::unix::fs::MetadataExt;
    for mode in ["wal", "delete"] {
        let (mut primary, mut replica) = ready(mode);
        let before = primary.image.clone();
        let file = primary.insert(3000, 900);
        // A limit on the size of files stands in for a full disk (EFBIG instead of ENOSPC), in a process of its own.
        let record = replica.dir.path().join("record");
        std::fs::write(&record, &file).unwrap();
        replica.applier.connection = None;
        let limit = std::fs::metadata(&replica.path).unwrap().size() + 200_000;
        let output =
            super::kill::child("limit", &replica.path, &record, limit, replica.shape).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        replica.assert_equals(&before);
        replica.apply(&[file]);
        replica.assert_file_equals(&primary.image);
    }
}

#[test]
fn a_directory_that_refuses_files_is_an_error_with_the_path() {
    let mut primary = Primary::new(1024, "delete");
    let name = DatabaseName::new("no/such.db").unwrap();
    let mut applier = Applier::new(PathBuf::from("/nonexistent/such.db"), name);
    let file = primary.exec(CREATE);
    let mut source = LtxTransactions::new([&file[..]]);
    let error = applier.apply(DatabaseShape::default(), &mut source, LONG).unwrap_err();
    assert_eq!(
        error.to_string(),
        "database no/such.db: cannot create /nonexistent/such.db: No such file or directory (os error 2)"
    );
}
