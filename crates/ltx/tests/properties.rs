//! What holds for any file that is written.

#![allow(clippy::unwrap_used, reason = "what is unexpected fails the test")]

use ltx::{
    Checksum, Decoder, Encoder, EncoderBuffers, Error, Format, Header, Owner, Trailer, Txid, lock_page,
    page_checksum,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

type Pages = BTreeMap<u32, Vec<u8>>;

#[derive(Clone, Debug)]
struct File {
    header: Header,
    pages: Pages,
    post_apply: Checksum,
}

/// Page content between all zero and all random.
fn content(page_size: u32) -> impl Strategy<Value = Vec<u8>> {
    (any::<u64>(), 0u32..=16).prop_map(move |(seed, density)| {
        let mut state = seed | 1;
        (0..page_size)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let random = (state >> 40) as u32;
                if random % 16 < density { (random >> 8) as u8 } else { 0 }
            })
            .collect()
    })
}

fn file() -> impl Strategy<Value = File> {
    let sizes = prop_oneof![6 => Just(512u32), 3 => Just(4096), 1 => Just(65536)];
    (sizes, any::<bool>(), 0u32..12, any::<[u64; 4]>(), any::<i64>(), any::<Option<(u32, u32, u16)>>())
        .prop_flat_map(|(page_size, snapshot, commit, numbers, timestamp_ms, owner)| {
            let pages = if snapshot {
                prop::collection::vec(content(page_size), commit as usize)
                    .prop_map(|pages| (1u32..).zip(pages).collect::<Pages>())
                    .boxed()
            } else if commit == 0 {
                Just(Pages::new()).boxed()
            } else {
                prop::collection::btree_map(1..=commit, content(page_size), 0..6).boxed()
            };
            pages.prop_map(move |pages| {
                let min = if snapshot { 1 } else { numbers[0].max(2) };
                let rolling = pages
                    .iter()
                    .fold(Checksum::EMPTY, |sum, (&pgno, data)| sum.xor(page_checksum(pgno, data)));
                let post_apply =
                    if snapshot || commit == 0 { rolling } else { Checksum(numbers[3] | 1 << 63) };
                File {
                    header: Header {
                        flags: 0,
                        page_size,
                        commit,
                        min_txid: Txid(min),
                        max_txid: Txid(min.saturating_add(numbers[1] % 3)),
                        timestamp_ms,
                        pre_apply: Checksum(if snapshot { 0 } else { numbers[2] | 1 << 63 }),
                        wal_offset: (numbers[1] >> 2) as i64 + 1,
                        wal_size: (numbers[2] >> 2) as i64,
                        wal_salt1: numbers[1] as u32,
                        wal_salt2: numbers[2] as u32,
                        node_id: numbers[3],
                        epoch: numbers[1],
                        owner: owner.map(|(uid, gid, mode)| Owner { uid, gid, mode }),
                    },
                    pages,
                    post_apply,
                }
            })
        })
}

fn write(file: &File) -> (Trailer, Vec<u8>) {
    let mut encoder = Encoder::new(Vec::new(), file.header.clone()).unwrap();
    for (&pgno, data) in &file.pages {
        encoder.encode_page(pgno, data).unwrap();
    }
    encoder.finish(file.post_apply).unwrap()
}

fn read(bytes: &[u8]) -> Result<(Header, Pages, Trailer), Error> {
    let mut decoder = Decoder::new(bytes)?;
    let mut pages = Pages::new();
    let mut buf = Vec::new();
    while let Some(pgno) = decoder.next_page(&mut buf)? {
        pages.insert(pgno, buf.clone());
    }
    assert_eq!(decoder.format(), Format::V3);
    let header = decoder.header().clone();
    Ok((header, pages, decoder.finish()?))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn what_is_written_is_read_again(file in file()) {
        let (trailer, bytes) = write(&file);
        let (header, pages, read_trailer) = read(&bytes).unwrap();
        prop_assert_eq!(header, file.header);
        prop_assert!(pages == file.pages, "pages differ");
        prop_assert_eq!(read_trailer, trailer);
        prop_assert_eq!(trailer.post_apply, file.post_apply);
    }

    #[test]
    fn a_cut_file_is_an_error(file in file(), cut in any::<prop::sample::Index>()) {
        let (_, bytes) = write(&file);
        prop_assert!(read(&bytes[..cut.index(bytes.len())]).is_err());
    }

    /// A bit in an LZ4 block may not matter to what it unpacks to; then the very same pages are read.
    #[test]
    fn a_flipped_bit_is_an_error_or_changes_nothing(file in file(), bits in prop::collection::vec(any::<prop::sample::Index>(), 32)) {
        let (trailer, bytes) = write(&file);
        for bit in bits {
            let bit = bit.index(bytes.len() * 8);
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // As Decoder::new, so that a flip into another format is an error too.
            let found = Decoder::new(&flipped[..]).and_then(Decoder::finish);
            if let Ok(found) = found {
                prop_assert_eq!(found, trailer);
                let (header, pages, _) = read(&flipped).unwrap();
                prop_assert!(header == file.header && pages == file.pages, "bit {} changed what is read", bit);
            }
        }
    }

    #[test]
    fn random_bytes_after_a_valid_header_are_an_error(file in file(), mut tail in prop::collection::vec(any::<u8>(), 0..2000), lz4 in any::<bool>(), magic in any::<bool>()) {
        let header = Header { flags: u32::from(lz4), ..file.header };
        if magic {
            tail.splice(0..0, [0x04, 0x22, 0x4d, 0x18, 0x64, 0x40, 0xa7]);
        }
        let bytes = [&header.encode()[..], &tail].concat();
        prop_assert!(Decoder::new(&bytes[..]).and_then(Decoder::finish).is_err());
        for format in [Format::V1, Format::V2, Format::V3] {
            prop_assert!(Decoder::with_format(&bytes[..], format).and_then(Decoder::finish).is_err());
        }
    }
}

fn snapshot_header(page_size: u32, commit: u32) -> Header {
    Header {
        flags: 0,
        page_size,
        commit,
        min_txid: Txid(1),
        max_txid: Txid(1),
        timestamp_ms: 0,
        pre_apply: Checksum(0),
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
        epoch: 0,
        owner: None,
    }
}

fn delta_header(page_size: u32, commit: u32) -> Header {
    let header = snapshot_header(page_size, commit);
    Header { min_txid: Txid(2), max_txid: Txid(2), pre_apply: Checksum::EMPTY, ..header }
}

#[test]
fn deletion_has_no_pages_and_the_empty_checksum() {
    for header in [snapshot_header(512, 0), delta_header(512, 0)] {
        let encoder = Encoder::new(Vec::new(), header.clone()).unwrap();
        assert!(matches!(encoder.finish(Checksum(1 << 63 | 1)), Err(Error::PostApply { .. })));
        let mut encoder = Encoder::new(Vec::new(), header.clone()).unwrap();
        assert!(matches!(encoder.encode_page(1, &[0; 512]), Err(Error::PageBeyondCommit { .. })));
        let (trailer, bytes) = encoder.finish(Checksum::EMPTY).unwrap();
        assert_eq!(read(&bytes).unwrap(), (header, Pages::new(), trailer));
    }
}

#[test]
fn misuse_of_the_encoder_is_an_error_and_leaves_the_file_whole() {
    let mut encoder = Encoder::new(Vec::new(), delta_header(65536, 20_000)).unwrap();
    let page = vec![7; 65536];
    encoder.encode_page(5, &page).unwrap();
    assert!(matches!(encoder.encode_page(5, &page), Err(Error::PageOrder { .. })));
    assert!(matches!(encoder.encode_page(0, &page), Err(Error::PageOrder { .. })));
    assert!(matches!(encoder.encode_page(20_001, &page), Err(Error::PageBeyondCommit { .. })));
    assert!(matches!(encoder.encode_page(lock_page(65536), &page), Err(Error::LockPage { .. })));
    assert!(matches!(encoder.encode_page(6, &page[1..]), Err(Error::PageLength { .. })));
    encoder.encode_page(20_000, &page).unwrap();
    let (_, bytes) = encoder.finish(Checksum(1 << 63 | 3)).unwrap();
    assert_eq!(read(&bytes).unwrap().1.keys().copied().collect::<Vec<_>>(), [5, 20_000]);

    let flags = Header { flags: 2, pre_apply: Checksum(0), ..delta_header(512, 1) };
    assert!(matches!(Encoder::new(Vec::new(), flags), Err(Error::Header { .. })));
    let encoder = Encoder::new(Vec::new(), delta_header(512, 1)).unwrap();
    assert!(matches!(encoder.finish(Checksum(3)), Err(Error::PostApply { .. })));
}

#[test]
fn incomplete_or_wrongly_summed_snapshot_is_refused() {
    let mut encoder = Encoder::new(Vec::new(), snapshot_header(512, 2)).unwrap();
    assert!(matches!(encoder.encode_page(2, &[1; 512]), Err(Error::SnapshotGap { missing: 1, .. })));
    encoder.encode_page(1, &[1; 512]).unwrap();
    let found = encoder.finish(Checksum::EMPTY);
    assert!(matches!(found, Err(Error::SnapshotGap { missing: 2, commit: 2, .. })), "{:?}", found.err());

    let mut encoder = Encoder::new(Vec::new(), snapshot_header(512, 1)).unwrap();
    encoder.encode_page(1, &[1; 512]).unwrap();
    assert!(matches!(encoder.finish(Checksum::EMPTY), Err(Error::SnapshotChecksum { .. })));
}

/// A file whose checksum is right but whose content breaks a rule, as a broken writer would make it.
#[test]
fn rules_are_checked_besides_the_file_checksum() {
    // Raw pages of version 1, so that files can be put together by hand.
    let seal = |header: &Header, pages: &[(u32, u8)], post_apply: u64| {
        let mut bytes = header.encode().to_vec();
        for &(pgno, fill) in pages {
            bytes.extend(pgno.to_be_bytes());
            bytes.extend(vec![fill; header.page_size as usize]);
        }
        bytes.extend([0; 4]);
        bytes.extend(post_apply.to_be_bytes());
        let crc = crc::Crc::<u64>::new(&crc::CRC_64_GO_ISO).checksum(&bytes) | 1 << 63;
        bytes.extend(crc.to_be_bytes());
        Decoder::with_format(&bytes[..], Format::V1).and_then(Decoder::finish)
    };
    let post = 1 << 63 | 9;
    let delta = delta_header(65536, 20_000);
    assert!(seal(&delta, &[(1, 1), (7, 7)], post).is_ok());
    assert!(matches!(seal(&delta, &[(7, 1), (1, 7)], post), Err(Error::PageOrder { .. })));
    assert!(matches!(seal(&delta, &[(7, 1), (7, 7)], post), Err(Error::PageOrder { .. })));
    assert!(matches!(seal(&delta, &[(20_001, 1)], post), Err(Error::PageBeyondCommit { .. })));
    assert!(matches!(seal(&delta, &[(16_385, 1)], post), Err(Error::LockPage { .. })));
    assert!(matches!(seal(&delta, &[(1, 1)], 9), Err(Error::PostApply { .. })));
    assert!(matches!(seal(&delta_header(512, 0), &[], post), Err(Error::PostApply { .. })));

    let snapshot = snapshot_header(512, 2);
    let sum = page_checksum(1, &[1; 512]).xor(page_checksum(2, &[2; 512]));
    assert!(seal(&snapshot, &[(1, 1), (2, 2)], sum.0).is_ok());
    assert!(matches!(seal(&snapshot, &[(1, 1)], sum.0), Err(Error::SnapshotGap { missing: 2, .. })));
    assert!(matches!(seal(&snapshot, &[(2, 2)], sum.0), Err(Error::SnapshotGap { missing: 1, .. })));
    assert!(matches!(seal(&snapshot, &[(1, 1), (2, 2)], post), Err(Error::SnapshotChecksum { .. })));

    // Litestream's files: no rolling checksums at all.
    let unchecked = Header { flags: ltx::FLAG_NO_CHECKSUM, pre_apply: Checksum(0), ..delta };
    assert!(seal(&unchecked, &[(3, 3)], 0).is_ok());
    assert!(matches!(seal(&unchecked, &[(3, 3)], post), Err(Error::PostApply { .. })));
}

#[test]
fn an_index_that_does_not_match_the_pages_is_an_error() {
    let page = [9; 512];
    let mut encoder = Encoder::new(Vec::new(), delta_header(512, 1)).unwrap();
    encoder.encode_page(1, &page).unwrap();
    let (_, bytes) = encoder.finish(Checksum::EMPTY).unwrap();
    let index = bytes.len() - 16 - 12;
    let block = 110..index - 6;
    for at in index..index + 12 {
        let mut wrong = bytes.clone();
        wrong[at] ^= 2;
        // With a file checksum that is right for it.
        let summed = [&wrong[..110], &page, &wrong[block.end..wrong.len() - 8]].concat();
        let crc = crc::Crc::<u64>::new(&crc::CRC_64_GO_ISO).checksum(&summed) | 1 << 63;
        let len = wrong.len();
        wrong[len - 8..].copy_from_slice(&crc.to_be_bytes());
        let found = read(&wrong);
        let expected = index as u64;
        assert!(matches!(found, Err(Error::Index { offset }) if offset == expected), "{at}: {found:?}");
    }
}

#[test]
fn claimed_sizes_do_not_allocate() {
    let mut bytes = delta_header(65536, u32::MAX).encode().to_vec();
    bytes.extend([0, 0, 0, 1, 0, 1, 0xff, 0xff, 0xff, 0xff]);
    bytes.extend([0; 64]);
    let found = Decoder::with_format(&bytes[..], Format::V3).and_then(Decoder::finish);
    assert!(matches!(found, Err(Error::BlockSize { size: u32::MAX, .. })), "{found:?}");
}

/// The Go library gives its LZ4 code a buffer of this size, and so may others.
#[test]
fn blocks_keep_to_the_bound_of_lz4() {
    for page_size in [512u32, 1024, 4096, 32768, 65536] {
        let mut state = 1u64;
        let page: Vec<u8> = (0..page_size)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        let mut encoder = Encoder::new(Vec::new(), delta_header(page_size, 1)).unwrap();
        encoder.encode_page(1, &page).unwrap();
        let (_, bytes) = encoder.finish(Checksum::EMPTY).unwrap();
        let size = u32::from_be_bytes(bytes[106..110].try_into().unwrap());
        assert!(size <= page_size + page_size / 255 + 16, "{page_size}: {size}");
        assert_eq!(read(&bytes).unwrap().1[&1], page);
    }
}

#[test]
fn reused_buffers_leave_no_trace() {
    let mut buffers = EncoderBuffers::default();
    for page_size in [65536, 512, 4096, 65536, 512] {
        let data = vec![page_size as u8 | 3; page_size as usize];
        let header = delta_header(page_size, 3);
        let mut encoder = Encoder::with_buffers(Vec::new(), header.clone(), buffers).unwrap();
        encoder.encode_page(3, &data).unwrap();
        let (_, bytes, returned) = encoder.finish_with_buffers(Checksum::EMPTY).unwrap();
        buffers = returned;
        let (found, pages, _) = read(&bytes).unwrap();
        assert_eq!((found, pages), (header, Pages::from([(3, data)])));
    }
}

/// Takes a number of bytes and then fails.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = buf.len().min(self.0);
        self.0 -= n;
        if n == 0 { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(n) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_failed_write_is_named_and_the_file_cannot_be_finished() {
    let mut encoder = Encoder::new(Full(105), delta_header(512, 1)).unwrap();
    assert!(matches!(encoder.encode_page(1, &[1; 512]), Err(Error::Io { offset: 100, .. })));
    assert!(matches!(encoder.encode_page(1, &[1; 512]), Err(Error::EncoderFailed { offset: 100 })));
    assert!(matches!(encoder.finish(Checksum::EMPTY), Err(Error::EncoderFailed { offset: 100 })));
    let mut encoder = Encoder::new(Full(150), delta_header(512, 1)).unwrap();
    encoder.encode_page(1, &[1; 512]).unwrap();
    assert!(matches!(encoder.finish(Checksum::EMPTY), Err(Error::Io { .. })));
}
