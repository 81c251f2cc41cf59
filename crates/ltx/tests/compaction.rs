//! A compacted file does what the files do that it was made of.

#![allow(clippy::unwrap_used, reason = "what is unexpected fails the test")]

use ltx::{Checksum, Decoder, Encoder, Error, Header, Owner, Trailer, Txid, compact, page_checksum};
use proptest::prelude::*;
use std::collections::BTreeSet;

const PAGE_SIZE: u32 = 512;

/// The content of a database: one byte stands for a page filled with it.
type Database = Vec<u8>;

fn page(fill: u8) -> Vec<u8> {
    vec![fill; PAGE_SIZE as usize]
}

fn checksum(database: &Database) -> Checksum {
    (1..).zip(database).fold(Checksum::EMPTY, |sum, (pgno, &fill)| sum.xor(page_checksum(pgno, &page(fill))))
}

/// Writes the file of transaction `txid` from `before` to `after`, with the given pages in it.
fn write(txid: u64, before: &Database, after: &Database, pages: &BTreeSet<u32>) -> Vec<u8> {
    let header = Header {
        flags: 0,
        page_size: PAGE_SIZE,
        commit: after.len() as u32,
        min_txid: Txid(txid),
        max_txid: Txid(txid),
        timestamp_ms: 1000 + txid as i64,
        pre_apply: if txid == 1 { Checksum(0) } else { checksum(before) },
        wal_offset: 32 * txid as i64,
        wal_size: 536,
        wal_salt1: 1,
        wal_salt2: 2,
        node_id: 3,
        epoch: 10 * txid,
        owner: Some(Owner { uid: txid as u32, gid: 5, mode: 0o600 }),
    };
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    for &pgno in pages {
        encoder.encode_page(pgno, &page(after[pgno as usize - 1])).unwrap();
    }
    encoder.finish(checksum(after)).unwrap().1
}

fn apply(database: &mut Database, file: &[u8]) -> Trailer {
    let mut decoder = Decoder::new(file).unwrap();
    let commit = decoder.header().commit as usize;
    // As with a file: what is cut off is gone, what is added is zero.
    database.resize(commit, 0);
    let mut buf = Vec::new();
    while let Some(pgno) = decoder.next_page(&mut buf).unwrap() {
        assert_eq!(buf, page(buf[0]));
        database[pgno as usize - 1] = buf[0];
    }
    decoder.finish().unwrap()
}

fn open(files: &[Vec<u8>]) -> Vec<Decoder<&[u8]>> {
    files.iter().map(|file| Decoder::new(&file[..]).unwrap()).collect()
}

/// Database states, the first empty, and the file that leads to each of the others.
#[derive(Clone, Debug)]
struct History {
    states: Vec<Database>,
    files: Vec<Vec<u8>>,
}

fn history() -> impl Strategy<Value = History> {
    let transaction = (prop_oneof![1 => Just(0usize), 9 => 1usize..12], any::<u8>(), any::<u16>());
    prop::collection::vec(transaction, 1..9).prop_map(|transactions| {
        let mut states = vec![Database::new()];
        let mut files = Vec::new();
        for (txid, (size, fill, touched)) in (1..).zip(transactions) {
            let before = &states[states.len() - 1];
            let mut after = before.clone();
            after.resize(size, fill);
            let mut pages: BTreeSet<u32> = (before.len() as u32 + 1..=size as u32).collect();
            for pgno in (1..=size as u32).filter(|pgno| txid == 1 || touched >> (pgno - 1) & 1 == 1) {
                after[pgno as usize - 1] = fill.wrapping_add(pgno as u8);
                pages.insert(pgno);
            }
            files.push(write(txid, before, &after, &pages));
            states.push(after);
        }
        History { states, files }
    })
}

proptest! {
    #[test]
    fn applying_the_compacted_file_equals_applying_all(history in history(), a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>()) {
        let (a, b) = (a.index(history.files.len()), b.index(history.files.len()));
        let (first, last) = (a.min(b), a.max(b));
        let range = &history.files[first..=last];
        let (header, trailer, file) = compact(open(range), Vec::new()).unwrap();

        let mut database = history.states[first].clone();
        let mut stepwise = database.clone();
        prop_assert_eq!(apply(&mut database, &file), trailer);
        for file in range {
            apply(&mut stepwise, file);
        }
        prop_assert_eq!(&database, &stepwise);
        prop_assert_eq!(&database, &history.states[last + 1]);
        prop_assert_eq!(trailer.post_apply, checksum(&database));

        let decoder = Decoder::new(&file[..]).unwrap();
        prop_assert_eq!(decoder.header(), &header);
        let txid = last as u64 + 1;
        let expected = Header {
            flags: 0,
            page_size: PAGE_SIZE,
            commit: database.len() as u32,
            min_txid: Txid(first as u64 + 1),
            max_txid: Txid(txid),
            timestamp_ms: 1000 + txid as i64,
            pre_apply: if first == 0 { Checksum(0) } else { checksum(&history.states[first]) },
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: 3,
            epoch: 10 * txid,
            owner: Some(Owner { uid: txid as u32, gid: 5, mode: 0o600 }),
        };
        prop_assert_eq!(header, expected);
    }

    #[test]
    fn compacting_in_rounds_equals_compacting_at_once(history in history(), split in any::<prop::sample::Index>()) {
        let (left, right) = history.files.split_at(split.index(history.files.len()));
        let at_once = compact(open(&history.files), Vec::new()).unwrap().2;
        let rounds: Vec<Vec<u8>> = [left, right]
            .into_iter()
            .filter(|files| !files.is_empty())
            .map(|files| compact(open(files), Vec::new()).unwrap().2)
            .collect();
        prop_assert_eq!(compact(open(&rounds), Vec::new()).unwrap().2, at_once);
    }

    #[test]
    fn a_damaged_input_is_named(history in history(), which in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>()) {
        let which = which.index(history.files.len());
        let mut files = history.files;
        let len = 100 + cut.index(files[which].len() - 100);
        files[which].truncate(len);
        match compact(open(&files), Vec::new()) {
            Err(Error::CompactInput { index, .. }) => prop_assert_eq!(index, which),
            other => prop_assert!(false, "{:?}", other.map(|(header, ..)| header)),
        }
    }
}

/// Four transactions: 3 pages, 1 page, 3 pages again (with both new pages), one change.
fn four_files() -> Vec<Vec<u8>> {
    let states: [Database; 5] = [vec![], vec![1, 2, 3], vec![4], vec![4, 5, 6], vec![4, 5, 7]];
    let pages: [&[u32]; 4] = [&[1, 2, 3], &[1], &[2, 3], &[3]];
    (0..4)
        .map(|i| write(i as u64 + 1, &states[i], &states[i + 1], &pages[i].iter().copied().collect()))
        .collect()
}

fn failure(files: &[Vec<u8>]) -> Error {
    compact(open(files), Vec::new()).map(|(header, ..)| header).unwrap_err()
}

#[test]
fn inputs_that_do_not_follow_each_other_are_refused() {
    let files = four_files();
    let pick = |order: &[usize]| order.iter().map(|&i| files[i].clone()).collect::<Vec<_>>();
    assert!(compact(open(&files), Vec::new()).is_ok());
    assert!(matches!(failure(&[]), Error::NothingToCompact));
    assert!(matches!(
        failure(&pick(&[0, 2])),
        Error::CompactGap { index: 1, expected: Txid(2), found: Txid(3) }
    ));
    assert!(matches!(failure(&pick(&[1, 0])), Error::CompactGap { index: 1, .. }));
    assert!(matches!(failure(&pick(&[1, 2, 2])), Error::CompactGap { index: 2, .. }));
}

#[test]
fn an_input_from_another_history_is_refused() {
    let mut files = four_files();
    files[2] = write(3, &vec![9], &vec![9, 5, 6], &BTreeSet::from([2, 3]));
    match failure(&files[..3]) {
        Error::CompactChain { index: 2, expected, found } => {
            assert_eq!((expected, found), (checksum(&vec![4]), checksum(&vec![9])));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn inputs_of_two_page_sizes_are_refused() {
    let mut files = four_files();
    let header = Decoder::new(&files[1][..]).unwrap().header().clone();
    let mut encoder = Encoder::new(Vec::new(), Header { page_size: 1024, ..header }).unwrap();
    encoder.encode_page(1, &[4; 1024]).unwrap();
    files[1] = encoder.finish(Checksum(1 << 63 | 4)).unwrap().1;
    assert!(matches!(failure(&files), Error::CompactPageSize { index: 1, expected: 512, found: 1024 }));
}

/// Transaction 3 has page 2 zero and does not hold it: applied after transaction 2 alone that is right, merged with it
/// onto the three pages of transaction 1 the old page 2 would stay.
#[test]
fn growth_that_no_input_holds_is_refused() {
    let mut files = four_files();
    for (pages, missing) in [(BTreeSet::from([3]), 2), (BTreeSet::from([2]), 3), (BTreeSet::new(), 2)] {
        files[2] = write(3, &vec![4], &vec![4, 0, 0], &pages);
        match failure(&files[1..3]) {
            Error::CompactMissingPage { pgno } => assert_eq!(pgno, missing),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn growth_across_the_lock_page_needs_no_lock_page() {
    let header = |txid: u64, commit, pre_apply| Header {
        flags: 0,
        page_size: 65536,
        commit,
        min_txid: Txid(txid),
        max_txid: Txid(txid),
        timestamp_ms: 0,
        pre_apply,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
        epoch: 0,
        owner: None,
    };
    let write = |header: Header, pages: &[u32], post_apply| {
        let mut encoder = Encoder::new(Vec::new(), header).unwrap();
        for &pgno in pages {
            encoder.encode_page(pgno, &[1; 65536]).unwrap();
        }
        encoder.finish(post_apply).unwrap().1
    };
    let sums = [Checksum(1 << 63 | 1), Checksum(1 << 63 | 2), Checksum(1 << 63 | 3)];
    for (commit, pages) in [(16_387, &[16_384, 16_386, 16_387][..]), (16_385, &[16_384])] {
        let files = [
            write(header(2, 16_383, sums[0]), &[1], sums[1]),
            write(header(3, commit, sums[1]), pages, sums[2]),
        ];
        let (_, _, file) = compact(open(&files), Vec::new()).unwrap();
        let mut decoder = Decoder::new(&file[..]).unwrap();
        let mut found = Vec::new();
        let mut buf = Vec::new();
        while let Some(pgno) = decoder.next_page(&mut buf).unwrap() {
            found.push(pgno);
        }
        assert_eq!(found, [&[1], pages].concat());
        decoder.finish().unwrap();
    }
}

#[test]
fn a_deletion_and_what_follows_it_compact() {
    let files =
        [write(5, &vec![1, 2], &vec![], &BTreeSet::new()), write(6, &vec![], &vec![7], &BTreeSet::from([1]))];
    let mut database = vec![1, 2];
    apply(&mut database, &compact(open(&files), Vec::new()).unwrap().2);
    assert_eq!(database, [7]);
    let (header, trailer, _) = compact(open(&files[..1]), Vec::new()).unwrap();
    assert_eq!((header.commit, trailer.post_apply), (0, Checksum::EMPTY));
}
