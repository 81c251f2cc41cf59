//! Bytes from anywhere are an answer or an error, never a panic, a hang or a huge allocation.

use proptest::prelude::*;
use sqlite_file::header::DatabaseHeader;
use sqlite_file::journal::{self, Journal, JournalHeader};
use sqlite_file::wal::{CommittedWal, FrameHeader, Salts, Scanner, WalHeader};
use sqlite_file::wal_index::WalIndex;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(bytes).expect("room for it");
    file
}

/// A journal with a right first header, any fields that a right one may have, and any records.
fn journal_bytes() -> impl Strategy<Value = Vec<u8>> {
    let header = (any::<u32>(), any::<u32>(), any::<u32>(), 5..=16u32, 9..=16u32);
    (header, prop::collection::vec(any::<u8>(), 0..40_000)).prop_map(|(header, mut rest)| {
        let (records, nonce, initial_pages, sector, page) = header;
        let header =
            JournalHeader { records, nonce, initial_pages, sector_size: 1 << sector, page_size: 1 << page };
        let mut bytes = header.encode().to_vec();
        bytes.append(&mut rest);
        bytes
    })
}

proptest! {
    #[test]
    fn any_journal_is_read(bytes in journal_bytes()) {
        let file = file(&bytes);
        journal::is_hot(&file).unwrap();
        journal::super_journal(&file).unwrap();
        if let Some(journal) = Journal::open(&file, None).unwrap() {
            let valid = journal.records().take_while(|r| r.as_ref().unwrap().checksum_ok).count();
            prop_assert!(journal.page_numbers().unwrap().len() <= journal.records().count());
            prop_assert!(valid <= bytes.len() / 520);
        }
    }

    #[test]
    fn a_wal_of_right_frames_is_read_up_to_the_damage(
        pages in prop::collection::vec((1u32..50, any::<bool>(), any::<u8>()), 1..20),
        big_endian: bool,
        damage in any::<prop::sample::Index>(),
        bit in 0..8u8,
    ) {
        let header = WalHeader { big_endian, page_size: 512, sequence: 3, salts: Salts([9; 8]) };
        let (start, mut checksum) = header.encode();
        let mut bytes = start.to_vec();
        let mut expected = Vec::new();
        for (pgno, commit, fill) in &pages {
            let page = [*fill; 512];
            let frame = FrameHeader::new(&header, checksum, *pgno, if *commit { 60 } else { 0 }, &page);
            prop_assert_eq!(FrameHeader::decode(&frame.encode()), frame);
            checksum = frame.checksum;
            bytes.extend(frame.encode());
            bytes.extend(page);
            expected.push((*pgno, frame.commit));
        }
        let whole = file(&bytes);
        let mut scanner = Scanner::open(&whole).unwrap().unwrap();
        let mut found = Vec::new();
        while let Some(frame) = scanner.next_frame().unwrap() {
            found.push((frame.pgno, frame.commit));
        }
        prop_assert_eq!(&found, &expected);
        let last_commit = pages.iter().rposition(|(_, commit, _)| *commit).map_or(0, |i| i + 1);
        prop_assert_eq!(CommittedWal::read(&whole).unwrap().unwrap().end.frames as usize, last_commit);

        let at = damage.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let damaged = file(&bytes);
        match CommittedWal::read(&damaged) {
            Ok(Some(committed)) => {
                let intact = at.saturating_sub(32) / 536;
                let commits = pages[..intact].iter().rposition(|(_, commit, _)| *commit).map_or(0, |i| i + 1);
                prop_assert!(at >= 32);
                prop_assert_eq!(committed.end.frames as usize, commits);
            }
            other => prop_assert!(at < 32, "{:?}", other),
        }
    }

    #[test]
    fn any_header_is_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = DatabaseHeader::parse(&bytes);
        let _ = CommittedWal::read(&file(&bytes));
    }

    #[test]
    fn any_wal_index_is_searched(seed: u64, pgno: u32, max_frame in 0u32..9000) {
        // Too large to generate byte by byte.
        let mut state = seed | 1;
        let bytes: Vec<u8> = (0..65536)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8 & (seed >> 8) as u8
            })
            .collect();
        let mut index = WalIndex::map(Arc::new(file(&bytes))).unwrap();
        let _ = index.read_header();
        if let Ok(Some(frame)) = index.lookup(pgno, 1, max_frame) {
            prop_assert!(frame <= max_frame);
            prop_assert_eq!(index.page_of(frame).unwrap(), Some(pgno));
        }
        let _ = index.append(max_frame + 1, pgno.max(1));
    }
}
