//! What is remembered of a segment that takes no more records: the summary that the index in memory is fed from,
//! and the index file it is kept in so that opening a log need not read the segments.

use super::error::LogError;
use super::format::{self, Header, RECORD_HEADER_BYTES_MAX, SegmentKey, decode_header};
use super::index::SAMPLE_EVERY;
use super::record::{Lsn, PayloadPlace, RecordInfo, RecordKind};
use super::scan::{Found, Scanner};
use super::storage::{Storage, StorageFile};
use crate::DatabaseName;
use bytes::{Buf, BufMut};
use ltx::Txid;
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

const MAGIC: [u8; 8] = *b"LITEFSIX";
const FIXED_BYTES: usize = 80;
const FLAG_CLEAN: u32 = 1;

/// One database in one segment; only what follows the last reset in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseSummary {
    /// Its last record.
    pub last: RecordInfo,
    /// First transaction and record.
    pub first: (Txid, Lsn),
    /// Whether the first record is a reset: what earlier segments have of the database does not count.
    pub reset: bool,
    /// Last transaction and LSN of every [`SAMPLE_EVERY`]th record.
    pub samples: Vec<(Txid, Lsn)>,
    /// Records after the last sample.
    pub since_sample: u32,
}

/// Everything that is remembered of a sealed segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Key of the segment.
    pub key: SegmentKey,
    /// LSN of its first record.
    pub first: Lsn,
    /// Where the segment before it ends.
    pub previous_end: Lsn,
    /// Where it ends itself.
    pub end: Lsn,
    /// Newest time of a record in it, in milliseconds since 1970; the lowest number when it is empty.
    pub newest_ms: i64,
    /// Whether the log was closed in order at its end.
    pub clean: bool,
    /// Its databases.
    pub databases: HashMap<DatabaseName, DatabaseSummary>,
    /// Files that its records refer to: database, name, size.
    pub externals: Vec<(DatabaseName, String, u64)>,
}

impl Summary {
    /// A summary without records.
    pub fn new(key: SegmentKey, first: Lsn, previous_end: Lsn, end: Lsn) -> Self {
        Summary {
            key,
            first,
            previous_end,
            end,
            newest_ms: i64::MIN,
            clean: false,
            databases: HashMap::new(),
            externals: Vec::new(),
        }
    }

    /// Takes in the next record.
    pub fn add(&mut self, info: RecordInfo) {
        self.newest_ms = self.newest_ms.max(info.timestamp_ms);
        if let PayloadPlace::External { file_name, size } = &info.payload {
            self.externals.push((info.database.clone(), file_name.clone(), *size));
        }
        let reset = info.kind == RecordKind::Reset;
        let fresh = |info: RecordInfo| DatabaseSummary {
            first: (info.first_txid(), info.lsn),
            last: info,
            reset,
            samples: Vec::new(),
            since_sample: 1,
        };
        match self.databases.get_mut(&info.database) {
            Some(known) if reset => *known = fresh(info),
            Some(known) => {
                known.since_sample += 1;
                if known.since_sample == SAMPLE_EVERY {
                    known.samples.push((info.max_txid, info.lsn));
                    known.since_sample = 0;
                }
                known.last = info;
            }
            None => {
                self.databases.insert(info.database.clone(), fresh(info));
            }
        }
    }

    /// Sums up the records of a segment, and returns what could not be read too.
    pub fn scan(mut self, file: Arc<dyn StorageFile>) -> (Self, Vec<Found>) {
        let mut bad = Vec::new();
        for found in Scanner::new(file, self.key, self.first, self.first, self.end) {
            match found {
                Found::Record { info, .. } => self.add(info),
                Found::Mark { .. } => {}
                found @ Found::Bad { .. } => bad.push(found),
            }
        }
        (self, bad)
    }

    /// Bytes of the index file.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let mut header = Vec::new();
        for database in self.databases.values() {
            body.put_u64(database.first.0.0);
            body.put_u64(database.first.1.0);
            body.put_u32(u32::from(database.reset));
            body.put_u32(database.since_sample);
            body.put_u32(database.samples.len() as u32);
            format::encode_header(&mut header, self.key, Lsn(0), &database.last);
            body.put_u32(header.len() as u32);
            body.put_u64(database.last.lsn.0);
            body.put_slice(&header);
            for (txid, lsn) in &database.samples {
                body.put_u64(txid.0);
                body.put_u64(lsn.0);
            }
        }
        for (database, file_name, size) in &self.externals {
            body.put_u16(database.as_str().len() as u16);
            body.put_u16(file_name.len() as u16);
            body.put_u64(*size);
            body.put_slice(database.as_str().as_bytes());
            body.put_slice(file_name.as_bytes());
        }
        let mut bytes = Vec::with_capacity(FIXED_BYTES + body.len() + 8);
        bytes.put_slice(&MAGIC);
        bytes.put_u32(format::VERSION);
        bytes.put_u32(if self.clean { FLAG_CLEAN } else { 0 });
        bytes.put_u64(self.key.log_id);
        bytes.put_u64(self.key.segment_id);
        bytes.put_u64(self.first.0);
        bytes.put_u64(self.previous_end.0);
        bytes.put_u64(self.end.0);
        bytes.put_i64(self.newest_ms);
        bytes.put_u32(self.databases.len() as u32);
        bytes.put_u32(self.externals.len() as u32);
        bytes.put_u64(body.len() as u64);
        debug_assert_eq!(bytes.len(), FIXED_BYTES);
        bytes.put_slice(&body);
        bytes.put_u64(format::crc(&bytes));
        bytes
    }

    /// Reads an index file; `None` when it is anything but what [`Summary::encode`] made.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let facts = IndexFacts::decode(bytes)?;
        let mut summary = Summary::new(facts.key, facts.first, facts.previous_end, facts.end);
        summary.clean = facts.clean;
        let mut body = &bytes[FIXED_BYTES - 24..bytes.len() - 8];
        summary.newest_ms = body.get_i64();
        let (databases, externals) = (body.get_u32(), body.get_u32());
        if body.get_u64() != body.len() as u64 {
            return None;
        }
        for _ in 0..databases {
            let (name, database) = decode_database(&mut body, facts.key)?;
            summary.databases.insert(name, database);
        }
        for _ in 0..externals {
            let (name, file_name) = (body.try_get_u16().ok()?, body.try_get_u16().ok()?);
            let size = body.try_get_u64().ok()?;
            let name = std::str::from_utf8(take(&mut body, usize::from(name))?).ok()?;
            let file_name = std::str::from_utf8(take(&mut body, usize::from(file_name))?).ok()?;
            summary.externals.push((DatabaseName::new(name).ok()?, file_name.into(), size));
        }
        body.is_empty().then_some(summary)
    }

    /// Writes the index file of the segment, durably.
    pub fn write(&self, storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
        let path = dir.join(format::index_file(self.first));
        let temporary = path.with_extension("tmp");
        let attempt = || -> io::Result<()> {
            let file = storage.open(&temporary, true)?;
            file.set_len(0)?;
            file.write_at(&self.encode(), 0)?;
            file.sync_data()?;
            storage.rename(&temporary, &path)?;
            storage.sync_dir(dir)
        };
        attempt().map_err(|e| {
            let _ = storage.remove(&temporary);
            LogError::io("write", &path, e)
        })
    }

    /// Reads the index file of the segment that starts at `first`; `None` when it is missing or no use.
    pub fn read(storage: &dyn Storage, dir: &Path, first: Lsn) -> Option<Self> {
        Summary::decode(&read_file(storage, dir, first)?).filter(|summary| summary.first == first)
    }
}

/// What an index file says of its segment as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexFacts {
    /// Key of the segment.
    pub key: SegmentKey,
    /// LSN of its first record.
    pub first: Lsn,
    /// Where the segment before it ends.
    pub previous_end: Lsn,
    /// Where it ends itself.
    pub end: Lsn,
    /// Whether the log was closed in order at its end.
    pub clean: bool,
}

impl IndexFacts {
    /// Reads an index file, which must be whole, and only its first part.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (checked, stored) = bytes.split_at_checked(bytes.len().checked_sub(8)?)?;
        let mut fixed = checked.get(..FIXED_BYTES)?;
        if fixed[..8] != MAGIC || (&stored[..]).get_u64() != format::crc(checked) {
            return None;
        }
        fixed.advance(8);
        if fixed.get_u32() != format::VERSION {
            return None;
        }
        let clean = fixed.get_u32() & FLAG_CLEAN != 0;
        let key = SegmentKey { log_id: fixed.get_u64(), segment_id: fixed.get_u64() };
        let (first, previous_end, end) = (Lsn(fixed.get_u64()), Lsn(fixed.get_u64()), Lsn(fixed.get_u64()));
        (first <= end).then_some(IndexFacts { key, first, previous_end, end, clean })
    }

    /// Reads the index file of the segment that starts at `first`; `None` when it is missing or no use.
    pub fn read(storage: &dyn Storage, dir: &Path, first: Lsn) -> Option<Self> {
        IndexFacts::decode(&read_file(storage, dir, first)?).filter(|facts| facts.first == first)
    }
}

fn read_file(storage: &dyn Storage, dir: &Path, first: Lsn) -> Option<Vec<u8>> {
    let file = storage.open(&dir.join(format::index_file(first)), false).ok()?;
    let mut bytes = vec![0; usize::try_from(file.len().ok()?).ok()?];
    let n = file.read_at(&mut bytes, 0).ok()?;
    bytes.truncate(n);
    Some(bytes)
}

fn decode_database(body: &mut &[u8], key: SegmentKey) -> Option<(DatabaseName, DatabaseSummary)> {
    let first = (Txid(body.try_get_u64().ok()?), Lsn(body.try_get_u64().ok()?));
    let reset = body.try_get_u32().ok()? != 0;
    let since_sample = body.try_get_u32().ok()?;
    let samples = body.try_get_u32().ok()? as usize;
    let header_len = body.try_get_u32().ok()? as usize;
    let lsn = Lsn(body.try_get_u64().ok()?);
    if header_len > format::align(RECORD_HEADER_BYTES_MAX as u64) as usize {
        return None;
    }
    let (Header::Record(last), _) = decode_header(take(body, header_len)?, key, lsn).ok()? else {
        return None;
    };
    let mut sample_bytes = take(body, samples.checked_mul(16)?)?;
    let samples = (0..samples).map(|_| (Txid(sample_bytes.get_u64()), Lsn(sample_bytes.get_u64()))).collect();
    Some((last.database.clone(), DatabaseSummary { last, first, reset, samples, since_sample }))
}

fn take<'a>(body: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (taken, rest) = body.split_at_checked(n)?;
    *body = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ship::engine::Epoch;
    use ltx::Checksum;

    fn summary() -> Summary {
        let key = SegmentKey { log_id: 1, segment_id: 2 };
        let mut summary = Summary::new(key, Lsn(8), Lsn(8), Lsn(100_000));
        summary.clean = true;
        for i in 0..200u64 {
            let database = DatabaseName::new(format!("d/{}.db", i % 3)).unwrap();
            let external = PayloadPlace::External { file_name: format!("{i}.ltx"), size: i };
            let payload = if i % 50 == 7 { external } else { PayloadPlace::Inline { len: 8 } };
            let file_name =
                if let PayloadPlace::External { file_name, .. } = &payload { file_name.len() } else { 0 };
            let inline = if file_name == 0 { 8 } else { 0 };
            summary.add(RecordInfo {
                lsn: Lsn(8 + i * 400),
                len: format::header_bytes(database.as_str().len(), file_name) + inline,
                database,
                kind: if i == 100 { RecordKind::Reset } else { RecordKind::Transaction },
                epoch: Epoch(1),
                min_txid: Txid(i),
                max_txid: Txid(i),
                pre_apply: Checksum(i),
                post_apply: Checksum(i + 1),
                page_size: 4096,
                commit: 1,
                timestamp_ms: 1000 - i as i64,
                wal: None,
                prev: None,
                payload,
                payload_crc: i,
            });
        }
        summary
    }

    #[test]
    fn an_index_file_reads_back_as_it_was_written() {
        let summary = summary();
        assert_eq!(summary.databases[&DatabaseName::new("d/1.db").unwrap()].first, (Txid(100), Lsn(40_008)));
        assert_eq!((summary.externals.len(), summary.newest_ms), (4, 1000));
        assert_eq!(Summary::decode(&summary.encode()).unwrap(), summary);
    }

    #[test]
    fn a_damaged_index_file_is_no_index_file() {
        let bytes = summary().encode();
        for len in 0..bytes.len() {
            assert_eq!(Summary::decode(&bytes[..len]), None, "{len} bytes");
        }
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 0x10;
            assert_eq!(Summary::decode(&bad), None, "byte {i}");
        }
    }
}
