//! Walks the records of one segment in order, and past what is damaged in it.

use super::format::{
    self, ALIGN_BYTES, BLOCK_BYTES, Header, RECORD_HEADER_BYTES_MAX, SegmentKey, decode_header,
    has_record_magic, offset_in_segment,
};
use super::record::{Lsn, PayloadPlace, RecordInfo};
use super::storage::StorageFile;
use crate::DatabaseName;
use std::sync::Arc;

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 << 10;

/// One step of a scan.
#[derive(Clone, Debug)]
pub enum Found {
    /// A record. `bad_payload`: its payload is not what was written (looked at only when asked to).
    Record { info: RecordInfo, durable: Lsn, bad_payload: bool },
    /// A mark.
    Mark { durable: Lsn },
    /// No readable record from `lsn` to `end`, where the next one begins or the scan ends.
    Bad { lsn: Lsn, end: Lsn, database: Option<DatabaseName>, reason: &'static str },
}

/// See the module's documentation.
pub struct Scanner {
    file: Arc<dyn StorageFile>,
    key: SegmentKey,
    first: Lsn,
    at: Lsn,
    limit: Lsn,
    verify_payloads: bool,
    /// Bytes of the file from `window_at` on.
    window: Vec<u8>,
    window_at: u64,
    /// Whether the file ends where the window does.
    window_is_last: bool,
    /// Whether the disk refused to give some of the bytes; they count as zeros.
    unreadable: bool,
}

impl Scanner {
    /// Walks from `from`, which must be where a record starts, to `limit`, in the segment that starts at `first`.
    pub fn new(file: Arc<dyn StorageFile>, key: SegmentKey, first: Lsn, from: Lsn, limit: Lsn) -> Self {
        assert!(first <= from);
        Scanner {
            file,
            key,
            first,
            at: from,
            limit,
            verify_payloads: false,
            window: Vec::new(),
            window_at: 0,
            window_is_last: false,
            unreadable: false,
        }
    }

    /// Reads and checks payloads too.
    pub fn verify_payloads(mut self) -> Self {
        self.verify_payloads = true;
        self
    }

    /// Whether the disk refused some of what was scanned so far.
    pub fn unreadable(&self) -> bool {
        self.unreadable
    }

    /// Up to `len` bytes from `offset` of the file on; fewer at the limit or at the end of the file.
    fn bytes(&mut self, offset: u64, len: usize) -> &[u8] {
        let limit = offset_in_segment(self.first, self.limit);
        let len = len.min(limit.saturating_sub(offset) as usize);
        let end = self.window_at + self.window.len() as u64;
        if offset < self.window_at || (offset + len as u64 > end && !self.window_is_last) {
            self.window_at = offset;
            let wanted = (len.max(CHUNK_BYTES) as u64).min(limit.saturating_sub(offset));
            self.window.resize(wanted as usize, 0);
            match self.file.read_at(&mut self.window, offset) {
                Ok(n) => {
                    self.window_is_last = n < self.window.len();
                    self.window.truncate(n);
                }
                Err(_) => self.read_blocks(offset),
            }
        }
        let from = (offset - self.window_at).min(self.window.len() as u64) as usize;
        let to = (from + len).min(self.window.len());
        &self.window[from..to]
    }

    /// Reads what can be read around a bad block; zeros stand for the rest.
    fn read_blocks(&mut self, offset: u64) {
        self.unreadable = true;
        self.window_is_last = false;
        for (i, block) in self.window.chunks_mut(BLOCK_BYTES as usize).enumerate() {
            match self.file.read_at(block, offset + i as u64 * BLOCK_BYTES) {
                Ok(n) => block[n..].fill(0),
                Err(_) => block.fill(0),
            }
        }
    }

    /// The record at `lsn`, if a whole one is there.
    fn header_at(&mut self, lsn: Lsn) -> Result<(Header, Lsn), &'static str> {
        let (key, limit) = (self.key, self.limit);
        let offset = offset_in_segment(self.first, lsn);
        let decoded = decode_header(self.bytes(offset, RECORD_HEADER_BYTES_MAX), key, lsn)?;
        let len = match &decoded.0 {
            Header::Record(info) => info.len,
            Header::Mark(len) => *len,
        };
        if len > limit.0 - lsn.0 { Err("the record is cut off") } else { Ok(decoded) }
    }

    /// Whether the payload is what was written. External ones are not looked at.
    fn payload_is_good(&mut self, info: &RecordInfo) -> bool {
        let PayloadPlace::Inline { len } = info.payload else {
            return true;
        };
        let header = format::header_bytes(info.database.as_str().len(), 0);
        let offset = offset_in_segment(self.first, info.lsn) + header;
        let data = self.bytes(offset, len as usize);
        data.len() as u64 == len && format::crc(data) == info.payload_crc
    }

    /// Where the next readable record after `at` starts, or the limit.
    fn resync(&mut self) -> Lsn {
        let mut lsn = Lsn(self.at.0 + ALIGN_BYTES);
        while lsn < self.limit {
            let left = (self.limit.0 - lsn.0).min(CHUNK_BYTES as u64) as usize;
            let bytes = self.bytes(offset_in_segment(self.first, lsn), left);
            if bytes.is_empty() {
                break;
            }
            let skip = bytes.chunks(ALIGN_BYTES as usize).position(has_record_magic);
            let skipped = skip.unwrap_or(bytes.len().div_ceil(ALIGN_BYTES as usize)) as u64 * ALIGN_BYTES;
            lsn.0 += skipped;
            if skip.is_some() {
                if lsn < self.limit && self.header_at(lsn).is_ok() {
                    return lsn;
                }
                lsn.0 += ALIGN_BYTES;
            }
        }
        self.limit
    }
}

impl Iterator for Scanner {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        if self.at >= self.limit {
            return None;
        }
        let lsn = self.at;
        Some(match self.header_at(lsn) {
            Ok((Header::Record(info), durable)) => {
                let bad_payload = self.verify_payloads && !self.payload_is_good(&info);
                self.at = info.end();
                Found::Record { info, durable, bad_payload }
            }
            Ok((Header::Mark(len), durable)) => {
                self.at.0 += len;
                Found::Mark { durable }
            }
            Err(reason) => {
                let offset = offset_in_segment(self.first, lsn);
                let database = format::guess_database(self.bytes(offset, RECORD_HEADER_BYTES_MAX));
                self.at = self.resync();
                Found::Bad { lsn, end: self.at, database, reason }
            }
        })
    }
}
