//! The segments that make up the log, and open files of some of them.

use super::error::LogError;
use super::format::{SegmentKey, segment_file};
use super::record::Lsn;
use super::storage::{Storage, StorageFile};
use crate::DatabaseName;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Open files that are kept for readers.
const OPEN_FILES_MAX: usize = 16;

/// What retention wants to know of a sealed segment.
#[derive(Debug)]
pub struct Sealed {
    /// Newest time of a record in it, in milliseconds since 1970.
    pub newest_ms: i64,
    /// Files that its records refer to: database, name, size.
    pub externals: Vec<(DatabaseName, String, u64)>,
}

/// One segment.
#[derive(Debug)]
pub struct Segment {
    /// LSN of its first record.
    pub first: Lsn,
    /// Salt of its CRCs. `None`: its header is lost and nothing in it can be read.
    pub key: Option<SegmentKey>,
    /// Where the segment before it ends.
    pub previous_end: Lsn,
    /// Where it ends; `u64::MAX` while it takes records.
    end: AtomicU64,
    /// Size of the file.
    file_bytes: AtomicU64,
    sealed: Mutex<Option<Sealed>>,
}

impl Segment {
    /// A segment that takes records.
    pub fn active(first: Lsn, key: SegmentKey, previous_end: Lsn, file_bytes: u64) -> Self {
        Segment {
            first,
            key: Some(key),
            previous_end,
            end: AtomicU64::new(u64::MAX),
            file_bytes: AtomicU64::new(file_bytes),
            sealed: Mutex::new(None),
        }
    }

    /// A segment that was found when the log was opened.
    pub fn found(
        first: Lsn,
        key: Option<SegmentKey>,
        previous_end: Lsn,
        end: Lsn,
        file_bytes: u64,
        sealed: Sealed,
    ) -> Self {
        Segment {
            first,
            key,
            previous_end,
            end: AtomicU64::new(end.0),
            file_bytes: AtomicU64::new(file_bytes),
            sealed: Mutex::new(Some(sealed)),
        }
    }

    /// Where it ends; far away while it takes records.
    pub fn end(&self) -> Lsn {
        Lsn(self.end.load(Ordering::Acquire))
    }

    /// Says that it takes no more records.
    pub fn set_end(&self, end: Lsn) {
        self.end.store(end.0, Ordering::Release);
    }

    /// Size of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes.load(Ordering::Relaxed)
    }

    /// Says that the file was cut.
    pub fn set_file_bytes(&self, bytes: u64) {
        self.file_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Says that it has been summed up.
    pub fn set_sealed(&self, sealed: Sealed) {
        *self.sealed.lock() = Some(sealed);
    }

    /// What retention wants to know; `None` until it has been summed up.
    pub fn with_sealed<T>(&self, look: impl FnOnce(&Sealed) -> T) -> Option<T> {
        self.sealed.lock().as_ref().map(look)
    }
}

/// All segments, oldest first, and where their files are.
pub struct SegmentSet {
    dir: PathBuf,
    storage: Arc<dyn Storage>,
    segments: RwLock<BTreeMap<Lsn, Arc<Segment>>>,
    /// Most recently used last.
    open_files: Mutex<Vec<(Lsn, Arc<dyn StorageFile>)>>,
}

impl SegmentSet {
    /// The segments in `dir`.
    pub fn new(storage: Arc<dyn Storage>, dir: &Path, segments: Vec<Segment>) -> Self {
        let segments = segments.into_iter().map(|segment| (segment.first, Arc::new(segment))).collect();
        SegmentSet { dir: dir.into(), storage, segments: RwLock::new(segments), open_files: Mutex::default() }
    }

    /// Path of the segment that starts at `first`.
    pub fn path(&self, first: Lsn) -> PathBuf {
        self.dir.join(segment_file(first))
    }

    /// Adds the newest one.
    pub fn add(&self, segment: Arc<Segment>) {
        self.segments.write().insert(segment.first, segment);
    }

    /// Takes one out.
    pub fn remove(&self, first: Lsn) {
        self.segments.write().remove(&first);
        self.open_files.lock().retain(|(open, _)| *open != first);
    }

    /// The segment with the record at `lsn`.
    pub fn containing(&self, lsn: Lsn) -> Option<Arc<Segment>> {
        let segments = self.segments.read();
        let (_, segment) = segments.range(..=lsn).next_back()?;
        (lsn < segment.end()).then(|| segment.clone())
    }

    /// The segment that starts at `first`.
    pub fn get(&self, first: Lsn) -> Option<Arc<Segment>> {
        self.segments.read().get(&first).cloned()
    }

    /// All of them, oldest first.
    pub fn all(&self) -> Vec<Arc<Segment>> {
        self.segments.read().values().cloned().collect()
    }

    /// Where the oldest one starts.
    pub fn oldest(&self) -> Option<Lsn> {
        self.segments.read().keys().next().copied()
    }

    /// An open file of the segment.
    pub fn file(&self, segment: &Segment) -> Result<Arc<dyn StorageFile>, LogError> {
        let mut open = self.open_files.lock();
        if let Some(i) = open.iter().rposition(|(first, _)| *first == segment.first) {
            let entry = open.remove(i);
            let file = entry.1.clone();
            open.push(entry);
            return Ok(file);
        }
        let path = self.path(segment.first);
        let file = self.storage.open(&path, false).map_err(|e| LogError::io("open", &path, e))?;
        if open.len() == OPEN_FILES_MAX {
            open.remove(0);
        }
        open.push((segment.first, file.clone()));
        Ok(file)
    }
}
