//! The bytes of segments and records. `docs/on-disk-format.md` draws them; all integers are big-endian.

use super::record::{Lsn, NewRecord, PayloadPlace, RecordInfo, RecordKind, WalEnd};
use crate::DatabaseName;
use crate::name::ESCAPED_BYTES_MAX;
use crate::ship::engine::Epoch;
use bytes::{Buf, BufMut};
use crc_fast::{CrcAlgorithm, Digest};
use ltx::{Checksum, Txid};
use std::hash::{BuildHasher, Hasher};

/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"LITEFSLG";
/// Version of the segment, record and index formats.
pub const VERSION: u32 = 1;
/// The segment header takes a whole block, so that appending never touches it.
pub const SEGMENT_HEADER_BYTES: u64 = 4096;
/// Unit in which segments are written: the page cache need not read a page that is overwritten whole.
pub const BLOCK_BYTES: u64 = 4096;
/// Where the log begins: 0 stands for "no record".
pub const FIRST_LSN: Lsn = Lsn(8);
/// How far the LSN jumps at the first open after an unclean stop, so that LSNs of lost records are not given
/// out again. More than can be appended and not yet durable ([`UNFLUSHED_BYTES_MAX`] plus one record).
pub const UNCLEAN_GAP_BYTES: u64 = 1 << 32;
/// Appending waits for the disk when this much is not durable yet.
pub const UNFLUSHED_BYTES_MAX: u64 = 1 << 30;
/// Records start at multiples of this.
pub const ALIGN_BYTES: u64 = 8;
/// First bytes of a record.
const RECORD_MAGIC: u32 = 0x4c46_5231; // "LFR1"
/// Size of the fixed part of a record.
pub const RECORD_HEADER_BYTES: usize = 136;
/// Where in it the CRC of the header is.
const RECORD_CRC_AT: usize = 128;
/// Longest file name of an external payload: two TXIDs, a number, `.ltx`.
const FILE_NAME_BYTES_MAX: usize = 64;
/// No record header with its names is longer.
pub const RECORD_HEADER_BYTES_MAX: usize = RECORD_HEADER_BYTES + ESCAPED_BYTES_MAX + FILE_NAME_BYTES_MAX;
/// An external payload is recognised by this many last bytes: the LTX trailer, which holds the checksum of the
/// whole file.
pub const EXTERNAL_TAIL_BYTES: u64 = 16;
/// Where in the segment header its place in the log is written: another sector than the header's first part,
/// which is durable before the segment is used.
const PLACE_AT: usize = 512;
/// Where its end is written, before the file is cut there.
const END_AT: usize = 1024;
const END_BYTES: usize = 16;
const SEGMENT_CRC_AT: usize = 56;
const PLACE_BYTES: usize = 24;

const KIND_TRANSACTION: u8 = 1;
const KIND_RESET: u8 = 2;
const KIND_MARK: u8 = 3;
const FLAG_EXTERNAL: u8 = 1;
const FLAG_WAL: u8 = 2;

/// What every CRC in a segment is salted with, so that a record that an earlier use of the file left behind
/// is not taken for one of this segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentKey {
    /// Random number of the log.
    pub log_id: u64,
    /// Random number of this use of the file.
    pub segment_id: u64,
}

impl SegmentKey {
    fn crc(&self, parts: &[&[u8]]) -> u64 {
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        let mut salt = [0; 16];
        salt[..8].copy_from_slice(&self.log_id.to_be_bytes());
        salt[8..].copy_from_slice(&self.segment_id.to_be_bytes());
        digest.update(&salt);
        parts.iter().for_each(|part| digest.update(part));
        digest.finalize()
    }
}

/// CRC of a payload.
pub fn crc(data: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, data)
}

/// A number that no other segment or log has: the standard library keys its hashers from the system's
/// random source.
pub fn random_id() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// Name of a segment file.
pub fn segment_file(first: Lsn) -> String {
    format!("{first}.log")
}

/// Name of the index of a sealed segment.
pub fn index_file(first: Lsn) -> String {
    format!("{first}.idx")
}

/// The LSN in a file name with this extension.
pub fn parse_file_name(name: &str, extension: &str) -> Option<Lsn> {
    let digits = name.strip_suffix(extension)?.strip_suffix('.')?;
    let plain = digits.len() == 16 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    plain.then(|| u64::from_str_radix(digits, 16).ok().map(Lsn))?
}

/// Rounds up to where a record may start.
pub fn align(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGN_BYTES)
}

/// The header block of a segment of this size that has no place in the log yet.
pub fn encode_segment_header(key: SegmentKey, file_bytes: u64) -> Vec<u8> {
    let mut block = Vec::with_capacity(SEGMENT_HEADER_BYTES as usize);
    block.put_slice(&SEGMENT_MAGIC);
    block.put_u32(VERSION);
    block.put_u32(SEGMENT_HEADER_BYTES as u32);
    block.put_u64(key.log_id);
    block.put_u64(key.segment_id);
    block.put_u64(file_bytes);
    block.resize(SEGMENT_CRC_AT, 0);
    block.put_u64(crc(&block));
    block.resize(SEGMENT_HEADER_BYTES as usize, 0);
    block
}

/// Where a segment is in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// LSN of its first record.
    pub first: Lsn,
    /// Where the segment before it ends; less than `first` after an unclean stop.
    pub previous_end: Lsn,
}

/// Bytes of a [`Place`] and their offset in the segment.
pub fn encode_place(key: SegmentKey, place: Place) -> (u64, Vec<u8>) {
    let mut bytes = Vec::with_capacity(PLACE_BYTES);
    bytes.put_u64(place.first.0);
    bytes.put_u64(place.previous_end.0);
    bytes.put_u64(key.crc(&[&bytes]));
    (PLACE_AT as u64, bytes)
}

/// Bytes that say where a segment ends, and their offset in it.
pub fn encode_end(key: SegmentKey, end: Lsn) -> (u64, Vec<u8>) {
    let mut bytes = Vec::with_capacity(END_BYTES);
    bytes.put_u64(end.0);
    bytes.put_u64(key.crc(&[&bytes]));
    (END_AT as u64, bytes)
}

/// What a segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentFacts {
    /// Salt of its CRCs.
    pub key: SegmentKey,
    /// Size of the file unless it was cut; 0: not stated.
    pub file_bytes: u64,
    /// `None` when it is not readable: it is not durable before the first record is.
    pub place: Option<Place>,
    /// Where it ends, when it was cut there.
    pub end: Option<Lsn>,
}

/// What the header block of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentHeader {
    /// A segment.
    Good(SegmentFacts),
    /// A segment, but the header is damaged or cut off.
    Damaged,
    /// A segment of another format version.
    Version(u32),
    /// No segment at all.
    Foreign,
}

/// Reads a header block; shorter when the file is.
pub fn decode_segment_header(block: &[u8]) -> SegmentHeader {
    if block.len() < SEGMENT_HEADER_BYTES as usize {
        return SegmentHeader::Damaged;
    }
    if block[..8] != SEGMENT_MAGIC {
        return SegmentHeader::Foreign;
    }
    let mut rest = &block[8..];
    let version = rest.get_u32();
    if version != VERSION {
        return SegmentHeader::Version(version);
    }
    let header_bytes = rest.get_u32();
    let key = SegmentKey { log_id: rest.get_u64(), segment_id: rest.get_u64() };
    let file_bytes = rest.get_u64();
    let stored = (&block[SEGMENT_CRC_AT..]).get_u64();
    if stored != crc(&block[..SEGMENT_CRC_AT]) || header_bytes != SEGMENT_HEADER_BYTES as u32 {
        return SegmentHeader::Damaged;
    }
    let place = &block[PLACE_AT..PLACE_AT + PLACE_BYTES];
    let mut rest = place;
    let (first, previous_end, stored) = (rest.get_u64(), rest.get_u64(), rest.get_u64());
    let good = stored == key.crc(&[&place[..16]]);
    let place = good.then_some(Place { first: Lsn(first), previous_end: Lsn(previous_end) });
    let mut rest = &block[END_AT..];
    let (end, stored) = (rest.get_u64(), rest.get_u64());
    let end = (stored == key.crc(&[&block[END_AT..END_AT + 8]])).then_some(Lsn(end));
    SegmentHeader::Good(SegmentFacts { key, file_bytes, place, end })
}

/// Payload of a record to be written.
#[derive(Clone, Copy, Debug)]
pub enum NewPayload<'a> {
    /// Goes into the log.
    Inline(&'a [u8]),
    /// Is in a file.
    External { file_name: &'a str, size: u64, tail_crc: u64 },
}

/// What the log itself adds to a record.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// Where the record is.
    pub lsn: Lsn,
    /// The previous record of the database.
    pub prev: Option<Lsn>,
    /// Up to where the log was durable when the record was appended.
    pub durable: Lsn,
}

/// Writes a record to `buffer` and returns what a reader will see of it.
pub fn encode_record(
    buffer: &mut Vec<u8>,
    key: SegmentKey,
    at: Position,
    record: &NewRecord<'_>,
    payload: NewPayload<'_>,
) -> RecordInfo {
    let (place, payload_crc, data) = match payload {
        NewPayload::Inline(data) => (PayloadPlace::Inline { len: data.len() as u64 }, crc(data), data),
        NewPayload::External { file_name, size, tail_crc } => {
            assert!(file_name.len() <= FILE_NAME_BYTES_MAX);
            (PayloadPlace::External { file_name: file_name.into(), size }, tail_crc, &[][..])
        }
    };
    let info = RecordInfo {
        lsn: at.lsn,
        len: record_bytes(record.database, &payload),
        database: record.database.clone(),
        kind: record.kind,
        epoch: record.epoch,
        min_txid: record.min_txid,
        max_txid: record.max_txid,
        pre_apply: record.pre_apply,
        post_apply: record.post_apply,
        page_size: record.page_size,
        commit: record.commit,
        timestamp_ms: record.timestamp_ms,
        wal: record.wal,
        prev: at.prev,
        payload: place,
        payload_crc,
    };
    encode_header(buffer, key, at.durable, &info);
    buffer.put_slice(data);
    buffer.resize(info.len as usize, 0);
    info
}

/// Bytes a record will take.
pub fn record_bytes(database: &DatabaseName, payload: &NewPayload<'_>) -> u64 {
    let (file_name, data) = match payload {
        NewPayload::Inline(data) => (0, data.len()),
        NewPayload::External { file_name, .. } => (file_name.len(), 0),
    };
    header_bytes(database.as_str().len(), file_name) + align(data as u64)
}

/// Bytes of a record before its inline payload.
pub fn header_bytes(name: usize, file_name: usize) -> u64 {
    align((RECORD_HEADER_BYTES + name + file_name) as u64)
}

/// Writes the part of a record before its payload. `buffer` is emptied first.
pub fn encode_header(buffer: &mut Vec<u8>, key: SegmentKey, durable: Lsn, info: &RecordInfo) {
    let name = info.database.as_str();
    let (external, file_name, payload_bytes) = match &info.payload {
        PayloadPlace::Inline { len } => (0, "", *len),
        PayloadPlace::External { file_name, size } => (FLAG_EXTERNAL, file_name.as_str(), *size),
    };
    let wal = info.wal.unwrap_or(WalEnd { salt1: 0, salt2: 0, end_offset: 0 });
    buffer.clear();
    buffer.put_u32(RECORD_MAGIC);
    buffer.put_u8(match info.kind {
        RecordKind::Transaction => KIND_TRANSACTION,
        RecordKind::Reset => KIND_RESET,
    });
    buffer.put_u8(external | if info.wal.is_some() { FLAG_WAL } else { 0 });
    buffer.put_u16(name.len() as u16);
    buffer.put_u32(info.len as u32);
    buffer.put_u32(file_name.len() as u32);
    buffer.put_u64(info.lsn.0);
    buffer.put_u64(info.prev.map_or(0, |lsn| lsn.0));
    buffer.put_u64(durable.0);
    buffer.put_u64(info.epoch.0);
    buffer.put_u64(info.min_txid.0);
    buffer.put_u64(info.max_txid.0);
    buffer.put_u64(info.pre_apply.0);
    buffer.put_u64(info.post_apply.0);
    buffer.put_i64(info.timestamp_ms);
    buffer.put_u32(info.page_size);
    buffer.put_u32(info.commit);
    buffer.put_u32(wal.salt1);
    buffer.put_u32(wal.salt2);
    buffer.put_u64(wal.end_offset);
    buffer.put_u64(payload_bytes);
    buffer.put_u64(info.payload_crc);
    debug_assert_eq!(buffer.len(), RECORD_CRC_AT);
    let crc = key.crc(&[buffer, name.as_bytes(), file_name.as_bytes()]);
    buffer.put_u64(crc);
    buffer.put_slice(name.as_bytes());
    buffer.put_slice(file_name.as_bytes());
    buffer.resize(header_bytes(name.len(), file_name.len()) as usize, 0);
}

/// Writes a mark: a record of no database that only says how far the log is durable.
pub fn encode_mark(buffer: &mut Vec<u8>, key: SegmentKey, lsn: Lsn, durable: Lsn) {
    buffer.clear();
    buffer.put_u32(RECORD_MAGIC);
    buffer.put_u8(KIND_MARK);
    buffer.put_u8(0);
    buffer.put_u16(0);
    buffer.put_u32(RECORD_HEADER_BYTES as u32);
    buffer.put_u32(0);
    buffer.put_u64(lsn.0);
    buffer.put_u64(0);
    buffer.put_u64(durable.0);
    buffer.resize(RECORD_CRC_AT, 0);
    let crc = key.crc(&[buffer]);
    buffer.put_u64(crc);
}

/// A readable record header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    /// A record of a database.
    Record(RecordInfo),
    /// A mark, with its length.
    Mark(u64),
}

/// Whether a record could start with these bytes.
pub fn has_record_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&RECORD_MAGIC.to_be_bytes())
}

/// Reads the header of the record at `lsn`, and up to where the log was durable when it was written. `bytes` may
/// go on beyond the header; [`RECORD_HEADER_BYTES_MAX`] are always enough. `Err` says what is wrong.
pub fn decode_header(bytes: &[u8], key: SegmentKey, lsn: Lsn) -> Result<(Header, Lsn), &'static str> {
    if !has_record_magic(bytes) {
        return Err("no record begins here");
    }
    if bytes.len() < RECORD_HEADER_BYTES {
        return Err("the record is cut off");
    }
    let mut rest = &bytes[4..];
    let (kind, flags, name_len) = (rest.get_u8(), rest.get_u8(), usize::from(rest.get_u16()));
    let (len, file_name_len) = (u64::from(rest.get_u32()), rest.get_u32() as usize);
    if name_len > ESCAPED_BYTES_MAX || file_name_len > FILE_NAME_BYTES_MAX {
        return Err("the record header is damaged");
    }
    let names_end = RECORD_HEADER_BYTES + name_len + file_name_len;
    let Some(names) = bytes.get(RECORD_HEADER_BYTES..names_end) else {
        return Err("the record is cut off");
    };
    let stored = (&bytes[RECORD_CRC_AT..]).get_u64();
    if stored != key.crc(&[&bytes[..RECORD_CRC_AT], names]) {
        return Err("the record header is damaged");
    }
    let (stored_lsn, prev, durable) = (rest.get_u64(), rest.get_u64(), Lsn(rest.get_u64()));
    if stored_lsn != lsn.0 || durable > lsn {
        return Err("the record belongs elsewhere");
    }
    if kind == KIND_MARK {
        let whole = len == RECORD_HEADER_BYTES as u64;
        return if whole { Ok((Header::Mark(len), durable)) } else { Err("the record has a bad length") };
    }
    let kind = match kind {
        KIND_TRANSACTION => RecordKind::Transaction,
        KIND_RESET => RecordKind::Reset,
        _ => return Err("the record is of an unknown kind"),
    };
    let (name, file_name) = names.split_at(name_len);
    let epoch = Epoch(rest.get_u64());
    let (min_txid, max_txid) = (Txid(rest.get_u64()), Txid(rest.get_u64()));
    let (pre_apply, post_apply) = (Checksum(rest.get_u64()), Checksum(rest.get_u64()));
    let timestamp_ms = rest.get_i64();
    let (page_size, commit) = (rest.get_u32(), rest.get_u32());
    let wal = WalEnd { salt1: rest.get_u32(), salt2: rest.get_u32(), end_offset: rest.get_u64() };
    let (payload_bytes, payload_crc) = (rest.get_u64(), rest.get_u64());
    let (Some(database), Ok(file_name)) = (decode_name(name), std::str::from_utf8(file_name)) else {
        return Err("the record has a bad name");
    };
    if file_name.contains('/') {
        return Err("the record has a bad file name");
    }
    let external = flags & FLAG_EXTERNAL != 0;
    let payload_in_log = if external { 0 } else { payload_bytes };
    if header_bytes(name_len, file_name_len).checked_add(align(payload_in_log.min(u64::MAX / 2))) != Some(len)
    {
        return Err("the record has a bad length");
    }
    let payload = if external {
        PayloadPlace::External { file_name: file_name.into(), size: payload_bytes }
    } else {
        PayloadPlace::Inline { len: payload_bytes }
    };
    let info = RecordInfo {
        lsn,
        len,
        database,
        kind,
        epoch,
        min_txid,
        max_txid,
        pre_apply,
        post_apply,
        page_size,
        commit,
        timestamp_ms,
        wal: (flags & FLAG_WAL != 0).then_some(wal),
        prev: (prev != 0).then_some(Lsn(prev)),
        payload,
        payload_crc,
    };
    Ok((Header::Record(info), durable))
}

/// The database that a damaged header seems to name. Only worth something when such a database is known.
pub fn guess_database(bytes: &[u8]) -> Option<DatabaseName> {
    let name_len = usize::from(bytes.get(6..8)?.get_u16());
    decode_name(bytes.get(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + name_len)?)
}

fn decode_name(name: &[u8]) -> Option<DatabaseName> {
    DatabaseName::new(std::str::from_utf8(name).ok()?).ok()
}

/// LSN after the last one that fits into a file of this size.
pub fn end_of_file(first: Lsn, file_bytes: u64) -> Lsn {
    Lsn(first.0 + (file_bytes.saturating_sub(SEGMENT_HEADER_BYTES) & !(ALIGN_BYTES - 1)))
}

/// Offset in its file of the record at `lsn`.
pub fn offset_in_segment(first: Lsn, lsn: Lsn) -> u64 {
    assert!(first <= lsn, "the record is not in the segment");
    SEGMENT_HEADER_BYTES + (lsn.0 - first.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SegmentKey = SegmentKey { log_id: 7, segment_id: 9 };

    fn sample(wal: Option<WalEnd>, payload: NewPayload<'_>) -> (Vec<u8>, RecordInfo) {
        let database = DatabaseName::new("app/a.db").unwrap();
        let record = NewRecord {
            database: &database,
            kind: RecordKind::Transaction,
            epoch: Epoch(3),
            min_txid: Txid(4),
            max_txid: Txid(5),
            pre_apply: Checksum(6),
            post_apply: Checksum(7),
            page_size: 512,
            commit: 8,
            timestamp_ms: -1,
            wal,
            fence: None,
        };
        let mut buffer = Vec::new();
        let at = Position { lsn: Lsn(4096), prev: Some(Lsn(64)), durable: Lsn(128) };
        let info = encode_record(&mut buffer, KEY, at, &record, payload);
        (buffer, info)
    }

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let wal = Some(WalEnd { salt1: 1, salt2: 2, end_offset: 3 });
        for payload in [
            NewPayload::Inline(b"hello"),
            NewPayload::External { file_name: "x.ltx", size: 1 << 40, tail_crc: 5 },
        ] {
            for wal in [None, wal] {
                let (bytes, info) = sample(wal, payload);
                assert_eq!(bytes.len() as u64, info.len);
                assert_eq!(info.len % ALIGN_BYTES, 0);
                let read = decode_header(&bytes, KEY, Lsn(4096)).unwrap();
                assert_eq!(read, (Header::Record(info), Lsn(128)));
            }
        }
    }

    #[test]
    fn no_bit_of_a_header_can_flip_unnoticed() {
        let (bytes, _) = sample(None, NewPayload::External { file_name: "x.ltx", size: 9, tail_crc: 5 });
        let names_end = RECORD_HEADER_BYTES + "app/a.db".len() + "x.ltx".len();
        for bit in 0..names_end * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_header(&bad, KEY, Lsn(4096)).is_err(), "bit {bit}");
        }
        for len in 0..names_end {
            assert!(decode_header(&bytes[..len], KEY, Lsn(4096)).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn a_record_is_valid_only_in_its_segment_and_at_its_place() {
        let (bytes, _) = sample(None, NewPayload::Inline(b"x"));
        assert!(decode_header(&bytes, KEY, Lsn(4104)).is_err());
        assert!(decode_header(&bytes, SegmentKey { segment_id: 10, ..KEY }, Lsn(4096)).is_err());
        assert!(decode_header(&bytes, SegmentKey { log_id: 8, ..KEY }, Lsn(4096)).is_err());
    }

    #[test]
    fn a_mark_reads_back() {
        let mut bytes = Vec::new();
        encode_mark(&mut bytes, KEY, Lsn(800), Lsn(792));
        let read = decode_header(&bytes, KEY, Lsn(800)).unwrap();
        assert_eq!(read, (Header::Mark(RECORD_HEADER_BYTES as u64), Lsn(792)));
    }

    #[test]
    fn a_segment_header_tells_damage_from_a_foreign_file() {
        let mut block = encode_segment_header(KEY, 1 << 20);
        let mut facts = SegmentFacts { key: KEY, file_bytes: 1 << 20, place: None, end: None };
        assert_eq!(decode_segment_header(&block), SegmentHeader::Good(facts));
        let place = Place { first: Lsn(1 << 33), previous_end: Lsn(80) };
        for (at, bytes) in [encode_place(KEY, place), encode_end(KEY, Lsn(1 << 34))] {
            block[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        (facts.place, facts.end) = (Some(place), Some(Lsn(1 << 34)));
        assert_eq!(decode_segment_header(&block), SegmentHeader::Good(facts));
        // An end that is damaged, or of an earlier use of the file, is none.
        block[END_AT + 7] ^= 1;
        facts.end = None;
        assert_eq!(decode_segment_header(&block), SegmentHeader::Good(facts));
        for bit in 0..64 * 8 {
            let mut bad = block.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match decode_segment_header(&bad) {
                SegmentHeader::Foreign => assert!(bit < 64),
                SegmentHeader::Version(_) => assert!((64..96).contains(&bit)),
                SegmentHeader::Damaged => assert!(bit >= 96),
                SegmentHeader::Good(..) => panic!("bit {bit}"),
            }
        }
        assert_eq!(decode_segment_header(&block[..100]), SegmentHeader::Damaged);
    }

    #[test]
    fn only_sixteen_lower_hex_digits_name_a_segment() {
        assert_eq!(parse_file_name(&segment_file(Lsn(0xab)), "log"), Some(Lsn(0xab)));
        for bad in ["ab.log", "00000000000000AB.log", "+0000000000000ab.log", "00000000000000ab.idx", ".log"]
        {
            assert_eq!(parse_file_name(bad, "log"), None, "{bad}");
        }
    }
}
