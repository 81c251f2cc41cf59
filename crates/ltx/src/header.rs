//! The header and the trailer of an LTX file.

use crate::checksum::{CHECKSUM_FLAG, is_page_size};
use crate::error::Error;
use crate::position::{Checksum, Txid};
use zerocopy::byteorder::big_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header, in every version of the format.
pub const HEADER_SIZE: usize = 100;

/// Bytes of a trailer, in every version of the format.
pub const TRAILER_SIZE: usize = 16;

/// Header flag of version 1: all pages are in one LZ4 frame. Never written here.
pub const FLAG_LZ4_FRAME: u32 = 1 << 0;

/// Header flag: the file carries no rolling checksums (Litestream's files). Never written here.
pub const FLAG_NO_CHECKSUM: u32 = 1 << 1;

const MAGIC: [u8; 4] = *b"LTX1";

/// "LF" in the last reserved bytes: the owner before it is meant.
const OWNER_MARKER: u16 = 0x4c46;

/// What an LTX file says about itself before its pages.
///
/// The first 80 bytes are LTX's; of the 20 that LTX reserves, LiteFS uses: epoch u64 (80..88), owner uid u32 (88..92),
/// gid u32 (92..96), mode u16 (96..98), and 0x4c46 as u16 (98..100) if there is an owner. Integers are big-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// [`FLAG_LZ4_FRAME`] and [`FLAG_NO_CHECKSUM`]; 0 in what we write.
    pub flags: u32,
    /// Page size of the database in bytes.
    pub page_size: u32,
    /// Size of the database in pages after the transaction; 0: the database was deleted (or is empty).
    pub commit: u32,
    /// First transaction in the file; 1 makes it a snapshot.
    pub min_txid: Txid,
    /// Last transaction in the file.
    pub max_txid: Txid,
    /// When the transaction was captured, in milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
    /// Rolling checksum of the database that the file applies to; 0 in a snapshot.
    pub pre_apply: Checksum,
    /// Byte offset in the WAL that the transaction came from; 0 if it did not come from a WAL.
    pub wal_offset: i64,
    /// Bytes of the WAL that the transaction came from.
    pub wal_size: i64,
    /// First salt of that WAL.
    pub wal_salt1: u32,
    /// Second salt of that WAL.
    pub wal_salt2: u32,
    /// The node that captured the transaction, 0 if unknown.
    pub node_id: u64,
    /// Epoch of the primary that captured the transaction, 0 if unknown.
    pub epoch: u64,
    /// Owner and mode of the database file, where known.
    pub owner: Option<Owner>,
}

/// Owner and permissions of a database file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits (`st_mode & 0o7777`).
    pub mode: u16,
}

/// What an LTX file says about itself after its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Rolling checksum of the database after the transaction; [`Checksum::EMPTY`] for a deleted one.
    pub post_apply: Checksum,
    /// CRC-64/GO-ISO of the file (of its uncompressed pages), bit 63 set.
    pub file_checksum: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    flags: U32,
    page_size: U32,
    commit: U32,
    min_txid: U64,
    max_txid: U64,
    timestamp: I64,
    pre_apply: U64,
    wal_offset: I64,
    wal_size: I64,
    wal_salt1: U32,
    wal_salt2: U32,
    node_id: U64,
    epoch: U64,
    uid: U32,
    gid: U32,
    mode: U16,
    marker: U16,
}

impl Header {
    /// The bytes of the header. They are valid if the header is, see [`Header::validate`].
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let owner = self.owner.unwrap_or(Owner { uid: 0, gid: 0, mode: 0 });
        let raw = RawHeader {
            magic: MAGIC,
            flags: self.flags.into(),
            page_size: self.page_size.into(),
            commit: self.commit.into(),
            min_txid: self.min_txid.0.into(),
            max_txid: self.max_txid.0.into(),
            timestamp: self.timestamp_ms.into(),
            pre_apply: self.pre_apply.0.into(),
            wal_offset: self.wal_offset.into(),
            wal_size: self.wal_size.into(),
            wal_salt1: self.wal_salt1.into(),
            wal_salt2: self.wal_salt2.into(),
            node_id: self.node_id.into(),
            epoch: self.epoch.into(),
            uid: owner.uid.into(),
            gid: owner.gid.into(),
            mode: owner.mode.into(),
            marker: if self.owner.is_some() { OWNER_MARKER.into() } else { 0.into() },
        };
        zerocopy::transmute!(raw)
    }

    /// Reads a header and checks it.
    ///
    /// # Errors
    /// [`Error::Magic`] if it is not LTX, [`Error::Header`] if a field breaks the rules of the format.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Header, Error> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(Error::Magic { found: raw.magic });
        }
        let owner = Owner { uid: raw.uid.get(), gid: raw.gid.get(), mode: raw.mode.get() };
        let owner = match raw.marker.get() {
            OWNER_MARKER => Some(owner),
            0 if owner == (Owner { uid: 0, gid: 0, mode: 0 }) => None,
            _ => return Err(invalid(format!("reserved bytes 88..100 are {:02x?}", &bytes[88..]))),
        };
        let header = Header {
            flags: raw.flags.get(),
            page_size: raw.page_size.get(),
            commit: raw.commit.get(),
            min_txid: Txid(raw.min_txid.get()),
            max_txid: Txid(raw.max_txid.get()),
            timestamp_ms: raw.timestamp.get(),
            pre_apply: Checksum(raw.pre_apply.get()),
            wal_offset: raw.wal_offset.get(),
            wal_size: raw.wal_size.get(),
            wal_salt1: raw.wal_salt1.get(),
            wal_salt2: raw.wal_salt2.get(),
            node_id: raw.node_id.get(),
            epoch: raw.epoch.get(),
            owner,
        };
        header.validate()?;
        Ok(header)
    }

    /// Checks the rules that every header keeps.
    ///
    /// # Errors
    /// [`Error::Header`] names the field.
    pub fn validate(&self) -> Result<(), Error> {
        if self.flags & !(FLAG_LZ4_FRAME | FLAG_NO_CHECKSUM) != 0 {
            return Err(invalid(format!("unknown flags {:#010x}", self.flags)));
        }
        if !is_page_size(self.page_size) {
            return Err(invalid(format!(
                "page size {} is not a power of two from 512 to 65536",
                self.page_size
            )));
        }
        if self.min_txid.0 == 0 || self.max_txid < self.min_txid {
            return Err(invalid(format!(
                "transactions {} to {} are not a range that starts at 1 or later",
                self.min_txid, self.max_txid
            )));
        }
        if self.wal_offset < 0 || self.wal_size < 0 {
            return Err(invalid(format!(
                "WAL offset {} or size {} is negative",
                self.wal_offset, self.wal_size
            )));
        }
        let from_wal = self.wal_size != 0 || self.wal_salt1 != 0 || self.wal_salt2 != 0;
        if from_wal && self.wal_offset == 0 {
            return Err(invalid("WAL size or salt without a WAL offset".to_owned()));
        }
        let none_expected = self.is_snapshot() || !self.has_checksums();
        if none_expected && self.pre_apply.0 != 0 {
            return Err(invalid(format!(
                "checksum before the transaction is {} where there can be none",
                self.pre_apply
            )));
        }
        if !none_expected && self.pre_apply.0 & CHECKSUM_FLAG == 0 {
            return Err(invalid(format!(
                "checksum before the transaction is {}, which lacks bit 63",
                self.pre_apply
            )));
        }
        Ok(())
    }

    /// True if the file holds every page of the database: its first transaction is 1.
    pub fn is_snapshot(&self) -> bool {
        self.min_txid.0 == 1
    }

    /// False for files without rolling checksums ([`FLAG_NO_CHECKSUM`]).
    pub(crate) fn has_checksums(&self) -> bool {
        self.flags & FLAG_NO_CHECKSUM == 0
    }

    /// Checks a rolling checksum that is to follow this header's transaction.
    pub(crate) fn check_post_apply(&self, post: Checksum) -> Result<(), Error> {
        let problem = if !self.has_checksums() {
            if post.0 == 0 {
                return Ok(());
            }
            "the header says that there are no checksums"
        } else if post.0 & CHECKSUM_FLAG == 0 {
            "bit 63 is not set"
        } else if self.commit == 0 && post != Checksum::EMPTY {
            "a database without pages has 8000000000000000"
        } else {
            return Ok(());
        };
        Err(Error::PostApply { found: post, problem })
    }
}

impl Trailer {
    /// The bytes of the trailer.
    pub fn encode(&self) -> [u8; TRAILER_SIZE] {
        let mut bytes = [0; TRAILER_SIZE];
        bytes[..8].copy_from_slice(&self.post_apply.0.to_be_bytes());
        bytes[8..].copy_from_slice(&self.file_checksum.to_be_bytes());
        bytes
    }

    /// Reads a trailer; only reading the whole file can check it.
    pub fn decode(bytes: &[u8; TRAILER_SIZE]) -> Trailer {
        let [post_apply, file_checksum]: [U64; 2] = zerocopy::transmute!(*bytes);
        Trailer { post_apply: Checksum(post_apply.get()), file_checksum: file_checksum.get() }
    }
}

fn invalid(problem: String) -> Error {
    Error::Header { problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            flags: 0,
            page_size: 4096,
            commit: 7,
            min_txid: Txid(5),
            max_txid: Txid(9),
            timestamp_ms: -3,
            pre_apply: Checksum(CHECKSUM_FLAG | 77),
            wal_offset: 32,
            wal_size: 4120,
            wal_salt1: 11,
            wal_salt2: 12,
            node_id: u64::MAX,
            epoch: 13,
            owner: Some(Owner { uid: 1000, gid: 100, mode: 0o640 }),
        }
    }

    #[test]
    fn header_round_trips_with_and_without_owner() {
        for owner in [None, Some(Owner { uid: 0, gid: 0, mode: 0 }), header().owner] {
            let header = Header { owner, ..header() };
            assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }
    }

    #[test]
    fn reserved_bytes_are_laid_out_as_documented() {
        let bytes = header().encode();
        assert_eq!(bytes[80..88], 13u64.to_be_bytes());
        assert_eq!(bytes[88..92], 1000u32.to_be_bytes());
        assert_eq!(bytes[92..96], 100u32.to_be_bytes());
        assert_eq!(bytes[96..98], 0o640u16.to_be_bytes());
        assert_eq!(bytes[98..], *b"LF");
    }

    #[test]
    fn each_broken_rule_is_an_error() {
        let broken = [
            Header { flags: 4, ..header() },
            Header { page_size: 1000, ..header() },
            Header { page_size: 256, ..header() },
            Header { page_size: 131_072, ..header() },
            Header { min_txid: Txid(0), ..header() },
            Header { max_txid: Txid(4), ..header() },
            Header { wal_offset: -1, ..header() },
            Header { wal_size: -1, ..header() },
            Header { wal_offset: 0, ..header() },
            Header { wal_offset: 0, wal_size: 0, ..header() },
            Header { pre_apply: Checksum(77), ..header() },
            Header { min_txid: Txid(1), ..header() },
            Header { flags: FLAG_NO_CHECKSUM, ..header() },
        ];
        for header in broken {
            let found = Header::decode(&header.encode());
            assert!(matches!(found, Err(Error::Header { .. })), "{header:?} gave {found:?}");
        }
        let mut bytes = header().encode();
        bytes[99] = 0;
        assert!(matches!(Header::decode(&bytes), Err(Error::Header { .. })));
        bytes[0] = b'M';
        assert!(matches!(Header::decode(&bytes), Err(Error::Magic { found: [b'M', b'T', b'X', b'1'] })));
    }
}
