//! Looking at a segment file from outside, whether its agent runs or not: nothing is changed.

use super::error::LogError;
use super::format::{self, SEGMENT_HEADER_BYTES, SegmentHeader, VERSION};
use super::record::{Lsn, PayloadPlace, RecordInfo};
use super::scan::{Found, Scanner};
use super::sealed::IndexFacts;
use super::storage::{DiskStorage, StorageFile};
use crate::DatabaseName;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// What is found in a segment.
#[derive(Debug)]
pub enum Inspected {
    /// A record.
    Record {
        /// All but its payload.
        info: RecordInfo,
        /// Its payload, an LTX file, when it is in the log itself; `Err`: not what was written.
        payload: Option<Result<Vec<u8>, &'static str>>,
    },
    /// No readable record.
    Damaged {
        /// Where, in the log.
        lsn: Lsn,
        /// Bytes of it.
        len: u64,
        /// Database of the record, if that can still be read.
        database: Option<DatabaseName>,
        /// What is wrong.
        reason: &'static str,
    },
}

/// LSN that the segment at `path` starts at; `None`: segments have other names.
fn first_lsn(path: &Path) -> Option<Lsn> {
    format::parse_file_name(path.file_name()?.to_str()?, "log")
}

/// Whether a file is named like a segment of the commit log.
pub fn is_segment_name(path: &Path) -> bool {
    first_lsn(path).is_some()
}

/// Reads a segment of the commit log, in the order of its records; `None`: the file is none by name and content. A segment
/// that is being written, or was when its agent died, ends with its last whole record: what follows may be what an
/// earlier use of the file left behind.
///
/// # Errors
/// If it cannot be read, its header is damaged, or another version wrote it.
pub fn inspect_segment(path: &Path) -> Result<Option<Vec<Inspected>>, LogError> {
    let Some(first) = first_lsn(path) else { return Ok(None) };
    let io = |e| LogError::io("read", path, e);
    let file: Arc<dyn StorageFile> = Arc::new(File::open(path).map_err(io)?);
    let mut block = vec![0; SEGMENT_HEADER_BYTES as usize];
    let n = file.read_at(&mut block, 0).map_err(io)?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let index = IndexFacts::read(&DiskStorage, dir, first);
    let facts = match format::decode_segment_header(&block[..n]) {
        SegmentHeader::Good(facts) => Some(facts),
        SegmentHeader::Damaged => None,
        SegmentHeader::Version(found) => {
            return Err(LogError::Version { path: path.to_owned(), found, known: VERSION });
        }
        SegmentHeader::Foreign => return Ok(None),
    };
    let Some(key) = facts.map(|facts| facts.key).or(index.map(|index| index.key)) else {
        return Err(LogError::NotASegment { path: path.to_owned(), reason: "its header is damaged".into() });
    };
    let file_end = format::end_of_file(first, file.len().map_err(io)?);
    let told = index.map(|index| index.end).or(facts.and_then(|facts| facts.end));
    let told = told.filter(|end| (first..=file_end).contains(end));
    let mut found = Vec::new();
    for item in Scanner::new(file.clone(), key, first, first, told.unwrap_or(file_end)).verify_payloads() {
        match item {
            Found::Record { info, bad_payload, .. } => {
                let payload = match info.payload {
                    PayloadPlace::Inline { .. } if bad_payload => {
                        Some(Err("the payload is not what was written"))
                    }
                    PayloadPlace::Inline { len } => {
                        let header = format::header_bytes(info.database.as_str().len(), 0);
                        let mut payload = vec![0; len as usize];
                        let offset = format::offset_in_segment(first, info.lsn) + header;
                        file.read_at(&mut payload, offset).map_err(io)?;
                        Some(Ok(payload))
                    }
                    PayloadPlace::External { .. } => None,
                };
                found.push(Inspected::Record { info, payload });
            }
            Found::Mark { .. } => {}
            // Nobody knows the end: it is here.
            Found::Bad { end, .. } if told.is_none() && end == file_end => {}
            Found::Bad { lsn, end, database, reason } => {
                found.push(Inspected::Damaged { lsn, len: end.0 - lsn.0, database, reason });
            }
        }
    }
    Ok(Some(found))
}
