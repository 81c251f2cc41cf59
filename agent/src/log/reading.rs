//! Finding and reading records.

use super::commit_log::{CommitLog, Shared};
use super::error::{Damage, LogError};
use super::external;
use super::format::{self, Header, RECORD_HEADER_BYTES_MAX, offset_in_segment};
use super::record::{Lsn, Payload, PayloadPlace, RecordInfo, RecordKind};
use super::scan::{Found, Scanner};
use super::segments::Segment;
use super::storage::StorageFile;
use crate::DatabaseName;
use crate::ship::engine::Epoch;
use bytes::Bytes;
use ltx::Txid;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What [`CommitLog::records_from`] shows.
#[derive(Clone, Copy, Debug)]
pub enum Visit<'a> {
    /// A record. Its payload can be read with [`CommitLog::read`].
    Record(&'a RecordInfo),
    /// A part that cannot be read and is passed over.
    Damaged(&'a Damage),
}

impl CommitLog {
    /// Where the log begins.
    pub fn oldest(&self) -> Lsn {
        self.shared.oldest()
    }

    /// First and last transaction the log can tell about since the last reset (that of the reset included), while
    /// any record is kept. Damage may hide some in between, or older ones.
    pub fn kept(&self, database: &DatabaseName) -> Result<Option<(Txid, Txid)>, LogError> {
        self.shared.kept(database)
    }

    /// Newest epoch of any record that is the last one of its database.
    pub fn newest_epoch(&self) -> Epoch {
        self.shared.index.read().newest_epoch()
    }

    /// The record that tells about a transaction: the last reset jumped to it, or it is in a record after that.
    pub fn find(&self, database: &DatabaseName, txid: Txid) -> Result<Option<RecordInfo>, LogError> {
        self.shared.find(database, txid)
    }

    /// The payload of a record, checked.
    pub fn read(&self, record: &RecordInfo) -> Result<Payload, LogError> {
        match &record.payload {
            PayloadPlace::Inline { len } => self.shared.read_inline(record, *len),
            PayloadPlace::External { file_name, size } => self.shared.read_external(record, file_name, *size),
        }
    }

    /// Shows the records that start at `from` or later, in the order of the log, up to what has been appended when
    /// it is called, or until the visitor breaks off. Resets do not hide what was before them.
    pub fn records_from<B>(
        &self,
        from: Lsn,
        mut visitor: impl FnMut(Visit<'_>) -> ControlFlow<B>,
    ) -> Result<Option<B>, LogError> {
        let end = self.appended();
        for segment in self.shared.segments.all() {
            let end = segment.end().min(end);
            if end <= from || segment.first >= end {
                continue;
            }
            if let ControlFlow::Break(result) =
                self.shared.visit_segment(&segment, from, end, &mut visitor)?
            {
                return Ok(Some(result));
            }
        }
        Ok(None)
    }
}

impl Shared {
    pub(super) fn oldest(&self) -> Lsn {
        self.segments.oldest().unwrap_or_else(|| Lsn(self.appended.load(Ordering::SeqCst)))
    }

    fn damage(&self, segment: &Segment, record: &RecordInfo, reason: &str) -> Damage {
        Damage {
            segment: self.segments.path(segment.first),
            offset: offset_in_segment(segment.first, record.lsn),
            lsn: record.lsn,
            end: record.end(),
            database: Some(record.database.clone()),
            reason: reason.into(),
        }
    }

    /// The segment with the record at `lsn`.
    fn segment(&self, lsn: Lsn) -> Result<Arc<Segment>, LogError> {
        self.segments.containing(lsn).ok_or_else(|| LogError::Gone { lsn, oldest: self.oldest() })
    }

    /// Retention may have taken a segment away while it was read: that is not damage.
    fn damaged_unless_gone(&self, damage: Damage) -> LogError {
        let oldest = self.oldest();
        if damage.lsn < oldest {
            return LogError::Gone { lsn: damage.lsn, oldest };
        }
        self.report(damage.clone());
        LogError::Damaged(damage)
    }

    /// The record of `database` at `lsn`.
    fn record_at(&self, database: &DatabaseName, lsn: Lsn) -> Result<RecordInfo, LogError> {
        let segment = self.segment(lsn)?;
        let offset = offset_in_segment(segment.first, lsn);
        let damage = |reason: &str| Damage {
            segment: self.segments.path(segment.first),
            offset,
            lsn,
            end: lsn,
            database: Some(database.clone()),
            reason: reason.into(),
        };
        let Some(key) = segment.key else {
            return Err(self.damaged_unless_gone(damage("the header of the segment is lost")));
        };
        let mut buffer = [0; RECORD_HEADER_BYTES_MAX];
        let read = self.segments.file(&segment).map(|file| file.read_at(&mut buffer, offset));
        let n = match read {
            Ok(Ok(n)) => n,
            Ok(Err(e)) => return Err(self.damaged_unless_gone(damage(&e.to_string()))),
            Err(_) if lsn < self.oldest() => return Err(LogError::Gone { lsn, oldest: self.oldest() }),
            Err(e) => return Err(e),
        };
        match format::decode_header(&buffer[..n], key, lsn) {
            Ok((Header::Record(info), _)) if info.database == *database => Ok(info),
            Ok(_) => Err(self.damaged_unless_gone(damage("another record is here"))),
            Err(reason) => Err(self.damaged_unless_gone(damage(reason))),
        }
    }

    fn kept(&self, database: &DatabaseName) -> Result<Option<(Txid, Txid)>, LogError> {
        let oldest = self.oldest();
        let (mut first, last, start) = {
            let index = self.index.read();
            let Some(entry) = index.get(database).filter(|entry| entry.last.lsn >= oldest) else {
                return Ok(None);
            };
            if entry.first.1 >= oldest {
                return Ok(Some((entry.first.0, entry.last.max_txid)));
            }
            let start = entry.samples.iter().map(|sample| sample.1).find(|lsn| *lsn >= oldest);
            ((entry.last.first_txid(), entry.last.lsn), entry.last.max_txid, start.unwrap_or(entry.last.lsn))
        };
        // Retention cut the history: go back along the links to what is left.
        let mut next = Some(start);
        while let Some(lsn) = next.filter(|lsn| *lsn >= oldest) {
            match self.record_at(database, lsn) {
                Ok(info) => {
                    first = (info.first_txid(), info.lsn);
                    next = info.prev.filter(|_| info.kind != RecordKind::Reset);
                }
                Err(LogError::Gone { .. } | LogError::Damaged(_)) => break,
                Err(e) => return Err(e),
            }
        }
        self.index.write().set_first(database, first);
        Ok(Some((first.0, last)))
    }

    fn find(&self, database: &DatabaseName, txid: Txid) -> Result<Option<RecordInfo>, LogError> {
        let (start, below) = {
            let index = self.index.read();
            let Some(entry) = index.get(database).filter(|entry| txid <= entry.last.max_txid) else {
                return Ok(None);
            };
            if entry.last.covers(txid) {
                return Ok(Some(entry.last.clone()));
            }
            if txid < entry.first.0 {
                return Ok(None);
            }
            (entry.at_or_above(txid), entry.below(txid))
        };
        let mut next = Some(start);
        while let Some(lsn) = next {
            let info = match self.record_at(database, lsn) {
                Ok(info) => info,
                Err(LogError::Gone { .. }) => return Ok(None),
                Err(LogError::Damaged(damage)) => {
                    // The links are cut here; what was asked for may still be readable before it.
                    return match self.find_between(database, txid, below, lsn)? {
                        Some(info) => Ok(Some(info)),
                        None => Err(LogError::Damaged(damage)),
                    };
                }
                Err(e) => return Err(e),
            };
            if info.covers(txid) {
                return Ok(Some(info));
            }
            let more = info.kind != RecordKind::Reset && info.max_txid > txid;
            next = info.prev.filter(|_| more);
        }
        Ok(None)
    }

    /// Looks for the record that covers `txid` by reading everything from `from` to `to`.
    fn find_between(
        &self,
        database: &DatabaseName,
        txid: Txid,
        from: Lsn,
        to: Lsn,
    ) -> Result<Option<RecordInfo>, LogError> {
        let mut last = None;
        for segment in self.segments.all() {
            let end = segment.end().min(to);
            if end <= from || segment.first >= end {
                continue;
            }
            let flow = self.visit_segment(&segment, from, end, &mut |visit| match visit {
                Visit::Record(info) if info.database == *database && info.covers(txid) => {
                    last = Some(info.clone());
                    ControlFlow::<()>::Continue(())
                }
                _ => ControlFlow::Continue(()),
            })?;
            debug_assert!(flow.is_continue());
        }
        Ok(last)
    }

    /// Shows the records of a segment from `from` (anywhere before, in, or between records) to `end`.
    fn visit_segment<B>(
        &self,
        segment: &Segment,
        from: Lsn,
        end: Lsn,
        visitor: &mut dyn FnMut(Visit<'_>) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>, LogError> {
        let path = self.segments.path(segment.first);
        let Some(key) = segment.key else {
            let known = self.damaged.lock().iter().find(|damage| damage.segment == path).cloned();
            return Ok(known.map_or(ControlFlow::Continue(()), |damage| visitor(Visit::Damaged(&damage))));
        };
        let file = match self.segments.file(segment) {
            Err(_) if segment.first < self.oldest() => return Ok(ControlFlow::Continue(())),
            other => other?,
        };
        let start = if from > segment.first && self.is_record_start(&*file, segment, key, from) {
            from
        } else {
            segment.first
        };
        for found in Scanner::new(file, key, segment.first, start, end) {
            let flow = match found {
                Found::Record { info, .. } if info.lsn >= from => visitor(Visit::Record(&info)),
                Found::Record { .. } | Found::Mark { .. } => ControlFlow::Continue(()),
                // Retention took the segment away.
                Found::Bad { .. } if segment.first < self.oldest() => break,
                Found::Bad { lsn, end, database, reason } => {
                    let offset = offset_in_segment(segment.first, lsn);
                    let database = database.filter(|name| self.index.read().get(name).is_some());
                    let damage =
                        Damage { segment: path.clone(), offset, lsn, end, database, reason: reason.into() };
                    self.report(damage.clone());
                    if end > from { visitor(Visit::Damaged(&damage)) } else { ControlFlow::Continue(()) }
                }
            };
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn is_record_start(
        &self,
        file: &dyn StorageFile,
        segment: &Segment,
        key: format::SegmentKey,
        lsn: Lsn,
    ) -> bool {
        let mut buffer = [0; RECORD_HEADER_BYTES_MAX];
        let read = file.read_at(&mut buffer, offset_in_segment(segment.first, lsn));
        read.is_ok_and(|n| format::decode_header(&buffer[..n], key, lsn).is_ok())
    }

    fn read_inline(&self, record: &RecordInfo, len: u64) -> Result<Payload, LogError> {
        let segment = self.segment(record.lsn)?;
        let damaged = |reason: &str| Err(self.damaged_unless_gone(self.damage(&segment, record, reason)));
        let Some(key) = segment.key else {
            return damaged("the header of the segment is lost");
        };
        let file = match self.segments.file(&segment) {
            Err(_) if record.lsn < self.oldest() => return damaged("removed by retention"),
            other => other?,
        };
        // `record` came from a header that was checked, so its length is what was appended once.
        let mut buffer = vec![0; record.len as usize];
        match file.read_at(&mut buffer, offset_in_segment(segment.first, record.lsn)) {
            Ok(n) => buffer.truncate(n),
            Err(e) => return damaged(&e.to_string()),
        }
        match format::decode_header(&buffer, key, record.lsn) {
            Ok((Header::Record(found), _)) if found == *record => {}
            Ok(_) => return damaged("another record is here"),
            Err(reason) => return damaged(reason),
        }
        let start = format::header_bytes(record.database.as_str().len(), 0) as usize;
        let payload = Bytes::from(buffer);
        if payload.len() < start + len as usize {
            return damaged("the record is cut off");
        }
        let payload = payload.slice(start..start + len as usize);
        if format::crc(&payload) != record.payload_crc {
            return damaged("the payload is damaged");
        }
        Ok(Payload::Bytes(payload))
    }

    fn read_external(&self, record: &RecordInfo, file_name: &str, size: u64) -> Result<Payload, LogError> {
        let path: PathBuf = self.external_dir(&record.database).join(file_name);
        let looked = self.storage.open(&path, false).and_then(|file| external::look_at(&*file));
        let reason = match looked {
            Ok(found) if found == (size, record.payload_crc) => return Ok(Payload::File { path, size }),
            Ok((found, _)) if found != size => format!("it has {found} bytes instead of {size}"),
            Ok(_) => "it ends in other bytes than it had".into(),
            Err(e) => e.to_string(),
        };
        let database = Some(record.database.clone());
        let damage =
            Damage { segment: path, offset: 0, lsn: record.lsn, end: record.end(), database, reason };
        Err(self.damaged_unless_gone(damage))
    }
}
