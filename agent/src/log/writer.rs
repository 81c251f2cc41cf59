//! Appending: one record at a time goes to the page cache, at the end of the newest segment.

use super::commit_log::Shared;
use super::error::LogError;
use super::format::{self, BLOCK_BYTES, NewPayload, Place, Position, SEGMENT_HEADER_BYTES, SegmentKey};
use super::record::{Lsn, NewRecord, RecordKind};
use super::segments::Segment;
use super::storage::StorageFile;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A buffer that grew beyond this for one record is given back.
const BUFFER_KEPT_BYTES: usize = 1 << 20;

/// The segment that takes records.
struct Active {
    segment: Arc<Segment>,
    file: Arc<dyn StorageFile>,
    key: SegmentKey,
    /// Size of the file: nothing is written beyond it.
    file_bytes: u64,
    /// Whether it is in [`Writer::to_sync`].
    dirty: bool,
}

/// A file with records that may not be durable.
pub struct ToSync {
    /// The file.
    pub file: Arc<dyn StorageFile>,
    /// LSN it starts at, for messages.
    pub first: Lsn,
    /// Whether its name is not durable either.
    pub name_too: bool,
}

/// The end of the log.
pub struct Writer {
    active: Option<Active>,
    next: Lsn,
    /// Where the last record really ended: before `next` after an unclean stop.
    last_end: Lsn,
    to_sync: Vec<ToSync>,
    /// Full segments, to be summed up once they are durable.
    to_seal: Vec<Lsn>,
    buffer: Vec<u8>,
    /// Whether a mark since the last record tells that it is durable.
    marked: bool,
    closed: bool,
    /// Bytes of files that the active segment's records refer to: retention removes them with the segment, so it must
    /// not go on for long.
    external_bytes: u64,
}

/// What the flusher has to do.
pub struct FlushWork {
    /// Files to sync, in the order of the log.
    pub files: Vec<ToSync>,
    /// Up to where the log is durable then.
    pub target: Lsn,
    /// Segments that can be summed up then.
    pub to_seal: Vec<Lsn>,
}

impl Writer {
    /// Goes on at `next`, in a new segment; the log's last record ends at `last_end`.
    pub fn new(next: Lsn, last_end: Lsn) -> Self {
        Writer {
            active: None,
            next,
            last_end,
            to_sync: Vec::new(),
            to_seal: Vec::new(),
            buffer: Vec::new(),
            marked: true,
            closed: false,
            external_bytes: 0,
        }
    }

    /// Takes no more records, and lets go of the segment that took them.
    pub fn close(&mut self) -> (Option<Arc<Segment>>, Lsn) {
        self.closed = true;
        (self.active.take().map(|active| active.segment), self.next)
    }

    /// Takes what is to be flushed.
    pub fn take_work(&mut self) -> FlushWork {
        if let Some(active) = &mut self.active {
            active.dirty = false;
        }
        FlushWork {
            files: std::mem::take(&mut self.to_sync),
            target: self.next,
            to_seal: std::mem::take(&mut self.to_seal),
        }
    }

    fn offset(&self, active: &Active) -> u64 {
        format::offset_in_segment(active.segment.first, self.next)
    }

    fn has_room(&self, len: u64) -> bool {
        self.active.as_ref().is_some_and(|active| self.offset(active) + len <= active.file_bytes)
    }

    /// Writes the record in the buffer at the end of the log. After an error the log is as it was.
    fn write(&mut self) -> std::io::Result<()> {
        let len = self.buffer.len() as u64;
        let active = self.active.as_mut().expect("there is room, so there is a segment");
        let offset = format::offset_in_segment(active.segment.first, self.next);
        // A page of a recycled segment that is not in memory would have to be read before a part of it is
        // overwritten, so the last page is always written whole.
        let block_end = (offset + len).next_multiple_of(BLOCK_BYTES);
        if offset.next_multiple_of(BLOCK_BYTES) < block_end {
            self.buffer.resize((block_end - offset) as usize, 0);
        }
        active.file.write_at(&self.buffer, offset)?;
        if !active.dirty {
            active.dirty = true;
            let (file, first) = (active.file.clone(), active.segment.first);
            self.to_sync.push(ToSync { file, first, name_too: false });
        }
        self.next.0 += len;
        self.last_end = self.next;
        if self.buffer.capacity() > BUFFER_KEPT_BYTES {
            self.buffer = Vec::new();
        }
        Ok(())
    }
}

impl Shared {
    /// Errors when the log takes no more.
    pub(super) fn check_usable(&self, closed: bool) -> Result<(), LogError> {
        match self.flush.failure() {
            Some(error) => Err(error),
            None if closed => Err(LogError::Closed(self.dir.clone())),
            None => Ok(()),
        }
    }

    /// Errors when the record cannot be the next one of its database.
    pub(super) fn check_sequence(&self, record: &NewRecord<'_>) -> Result<(), LogError> {
        let (database, min_txid, max_txid) = (record.database, record.min_txid, record.max_txid);
        if min_txid > max_txid {
            let reason = "it ends before it begins";
            return Err(LogError::BadRecord { database: database.clone(), min_txid, max_txid, reason });
        }
        let index = self.index.read();
        let Some(last) = index.get(database).map(|entry| &entry.last) else {
            return Ok(());
        };
        if record.kind == RecordKind::Reset {
            return Ok(());
        }
        if record.epoch < last.epoch {
            let (epoch, last) = (record.epoch.0, last.epoch.0);
            return Err(LogError::OldEpoch { database: database.clone(), min_txid, epoch, last });
        }
        if last.max_txid.0.checked_add(1) != Some(min_txid.0) || last.post_apply != record.pre_apply {
            return Err(LogError::OutOfSequence {
                database: database.clone(),
                min_txid,
                max_txid,
                pre_apply: record.pre_apply,
                last_txid: last.max_txid,
                last_checksum: last.post_apply,
            });
        }
        Ok(())
    }

    /// Appends a record whose payload is at hand or in its final file.
    pub(super) fn append_record(
        &self,
        record: &NewRecord<'_>,
        payload: NewPayload<'_>,
    ) -> Result<Lsn, LogError> {
        let len = format::record_bytes(record.database, &payload);
        assert!(
            SEGMENT_HEADER_BYTES + len <= self.options.segment_bytes,
            "options leave room for every record"
        );
        loop {
            let mut writer = self.writer.lock();
            self.check_usable(writer.closed)?;
            let unflushed = writer.next.0 - self.durable().0;
            if unflushed > format::UNFLUSHED_BYTES_MAX {
                let wait_for = Lsn(writer.next.0 - format::UNFLUSHED_BYTES_MAX);
                drop(writer);
                self.wait_durable(wait_for)?;
                continue;
            }
            self.check_sequence(record)?;
            if record.fence.is_some_and(|fence| !fence.is_open()) {
                return Err(LogError::Fenced {
                    database: record.database.clone(),
                    min_txid: record.min_txid,
                });
            }
            let ended = writer.external_bytes >= self.options.segment_bytes;
            if (ended || !writer.has_room(len)) && !self.next_segment(&mut writer)? {
                drop(writer);
                self.wait_for_spare()?;
                continue;
            }
            return self.write_record(&mut writer, record, payload);
        }
    }

    fn write_record(
        &self,
        writer: &mut Writer,
        record: &NewRecord<'_>,
        payload: NewPayload<'_>,
    ) -> Result<Lsn, LogError> {
        let prev = self.index.read().get(record.database).map(|entry| entry.last.lsn);
        let at = Position { lsn: writer.next, prev, durable: self.durable() };
        let active = writer.active.as_ref().expect("there is room, so there is a segment");
        let (key, first) = (active.key, active.segment.first);
        let info = format::encode_record(&mut writer.buffer, key, at, record, payload);
        let end = info.end();
        writer.write().map_err(|e| LogError::io("append to", &self.segments.path(first), e))?;
        writer.marked = false;
        if let super::PayloadPlace::External { size, .. } = &info.payload {
            writer.external_bytes += size;
        }
        self.index.write().append(info);
        self.publish_appended(writer);
        Ok(end)
    }

    /// See [`super::CommitLog::ensure_room`].
    pub(super) fn ensure_room(&self, bytes: u64) -> Result<(), LogError> {
        if self.has_room(bytes) { Ok(()) } else { self.wait_for_spare() }
    }

    /// See [`super::CommitLog::has_room`].
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        bytes <= self.room.load(Ordering::Relaxed) || self.keeper.has_spare()
    }

    fn publish_appended(&self, writer: &Writer) {
        let end = writer.active.as_ref().map(|active| (active.file_bytes, writer.offset(active)));
        let room = end.map_or(0, |(file_bytes, offset)| file_bytes.saturating_sub(offset));
        self.room.store(room, Ordering::Relaxed);
        self.appended.store(writer.next.0, Ordering::SeqCst);
    }

    /// Appends a mark when the last record has none: a later bit flip in that record is then known from a write
    /// that never reached the disk. Does nothing when there is no room; the next segment's records tell as well.
    pub(super) fn append_mark(&self) {
        let mut writer = self.writer.lock();
        let len = format::RECORD_HEADER_BYTES as u64;
        let nothing_to_say = writer.marked || writer.closed || self.durable() < writer.next;
        if nothing_to_say || self.check_usable(false).is_err() || !writer.has_room(len) {
            return;
        }
        let Some(key) = writer.active.as_ref().map(|active| active.key) else {
            return;
        };
        let lsn = writer.next;
        format::encode_mark(&mut writer.buffer, key, lsn, lsn);
        // Once is enough, also when it fails: it only adds to what is safe already.
        writer.marked = true;
        match writer.write() {
            Ok(()) => self.publish_appended(&writer),
            Err(e) => tracing::debug!(error = %e, "cannot mark the end of the commit log"),
        }
    }

    /// Goes on in the spare segment. `false`: there is none ready.
    fn next_segment(&self, writer: &mut Writer) -> Result<bool, LogError> {
        let Some(spare) = self.keeper.take_spare() else {
            return Ok(false);
        };
        let place = Place { first: writer.next, previous_end: writer.last_end };
        let path = self.segments.path(place.first);
        let (at, bytes) = format::encode_place(spare.key, place);
        // The first segment of a run is durable before an LSN in it is given out: after a crash it tells that there
        // was such a run, whose LSNs may have been seen. Its place goes first; later ones follow from their names.
        writer.external_bytes = 0;
        let first_of_run = writer.active.is_none();
        let mut placed = spare.file.write_at(&bytes, at);
        if placed.is_ok() && first_of_run {
            spare.file.sync_data().map_err(|e| self.fail(e))?;
        }
        placed = placed.and_then(|()| self.storage.rename(&spare.path, &path));
        if let Err(e) = placed {
            self.keeper.return_spare(spare);
            return Err(LogError::io("begin", &path, e));
        }
        if first_of_run {
            self.storage.sync_dir(&self.dir).map_err(|e| self.fail(e))?;
        }
        let file_bytes = self.options.segment_bytes;
        let segment = Arc::new(Segment::active(place.first, spare.key, place.previous_end, file_bytes));
        self.segments.add(segment.clone());
        if let Some(full) = writer.active.take() {
            full.segment.set_end(writer.next);
            writer.to_seal.push(full.segment.first);
        }
        writer.to_sync.push(ToSync { file: spare.file.clone(), first: place.first, name_too: true });
        writer.active = Some(Active { segment, file: spare.file, key: spare.key, file_bytes, dirty: true });
        Ok(true)
    }
}
