//! Checksums of pages and files, and the page numbers and sizes that SQLite allows.

use crate::position::Checksum;
use crc_fast::{CrcAlgorithm, Digest};

/// Set in every checksum, so that 0 can stand for "none".
pub(crate) const CHECKSUM_FLAG: u64 = 1 << 63;

/// SQLite locks bytes from this offset on; the page that holds it is never stored.
/// Source: `PENDING_BYTE` in SQLite's os.h.
const LOCK_BYTE_OFFSET: u32 = 0x4000_0000;

/// The checksum of one page: CRC-64/GO-ISO over the page number (u32 big-endian) and its content, bit 63 set.
pub fn page_checksum(pgno: u32, data: &[u8]) -> Checksum {
    let mut digest = FileDigest::new();
    digest.update(&pgno.to_be_bytes());
    digest.update(data);
    Checksum(digest.value())
}

/// The number of the page that holds SQLite's lock bytes, for a page size in bytes that [`is_page_size`] accepts.
/// That page has no content and is in no LTX file.
pub fn lock_page(page_size: u32) -> u32 {
    LOCK_BYTE_OFFSET / page_size + 1
}

/// True for the page sizes of SQLite: powers of two from 512 to 65536 bytes.
pub fn is_page_size(page_size: u32) -> bool {
    page_size.is_power_of_two() && (512..=65536).contains(&page_size)
}

/// A running CRC-64/GO-ISO (Go's `crc64.ISO`).
pub(crate) struct FileDigest(Digest);

impl FileDigest {
    pub(crate) fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc64GoIso))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum so far, bit 63 set.
    pub(crate) fn value(&self) -> u64 {
        CHECKSUM_FLAG | self.0.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ORACLE: crc::Crc<u64> = crc::Crc::<u64>::new(&crc::CRC_64_GO_ISO);

    #[test]
    fn page_checksums_match_the_go_library() {
        assert_eq!(page_checksum(1, &[1; 512]).0, 0xe4e4_aaa1_0237_7eee);
        assert_eq!(page_checksum(2, &[2; 512]).0, 0xc9c9_5542_3104_4ddd);
        assert_eq!(page_checksum(1, &[5; 512]).0, 0x99b1_d11a_b98c_c555);
        // The database {page 1 = 03.., page 2 = 02..}.
        let database = page_checksum(1, &[3; 512]).xor(page_checksum(2, &[2; 512]));
        assert_eq!(database, Checksum(0x8b87_423e_eeee_eeee));
    }

    #[test]
    fn lock_page_is_where_sqlite_has_it() {
        for (page_size, pgno) in
            [(512, 2_097_153), (1024, 1_048_577), (4096, 262_145), (8192, 131_073), (65536, 16_385)]
        {
            assert_eq!(lock_page(page_size), pgno);
        }
    }

    #[test]
    fn page_sizes_are_those_of_sqlite() {
        let valid: Vec<u32> = (0..=70_000).chain([1 << 17, 1 << 31]).filter(|&n| is_page_size(n)).collect();
        assert_eq!(valid, [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]);
    }

    proptest! {
        #[test]
        fn digest_in_pieces_equals_the_reference_crc(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..8)) {
            let mut digest = FileDigest::new();
            for piece in &pieces {
                digest.update(piece);
            }
            prop_assert_eq!(digest.0.finalize(), ORACLE.checksum(&pieces.concat()));
        }

        #[test]
        fn page_checksum_equals_the_reference_crc(pgno in any::<u32>(), exponent in 9u32..=16, seed in any::<u64>()) {
            let mut state = seed | 1;
            let data: Vec<u8> = (0..1usize << exponent)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 56) as u8
                })
                .collect();
            let bytes = [&pgno.to_be_bytes()[..], &data].concat();
            prop_assert_eq!(page_checksum(pgno, &data).0, ORACLE.checksum(&bytes) | 1 << 63);
        }
    }
}
