//! Removing the oldest segments.

use super::commit_log::{CommitLog, Shared};
use super::error::LogError;
use super::format::index_file;
use super::record::Lsn;
use super::segments::{Sealed, Segment};
use std::sync::Arc;

/// What retention did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retained {
    /// Segments that were removed.
    pub removed: usize,
    /// Where the log begins now.
    pub oldest: Lsn,
    /// Bytes of all segments and external payloads that are left.
    pub bytes: u64,
    /// Whether something was removed, for its size, that a follower still needed: it will need a snapshot.
    pub followers_cut: bool,
}

impl CommitLog {
    /// Removes the oldest segments that are too old, or too much, by the options. `now_ms`: milliseconds since 1970.
    /// What starts at `needed` or later is never removed; what starts at `followers` or later is not removed for its
    /// age. The newest segment always stays. A database whose records are all removed is forgotten.
    pub fn enforce_retention(&self, now_ms: i64, needed: Lsn, followers: Lsn) -> Result<Retained, LogError> {
        self.shared.enforce_retention(now_ms, needed, followers)
    }

    /// Bytes that all segments and external payloads take on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.shared.disk_bytes()
    }
}

impl Shared {
    fn disk_bytes(&self) -> u64 {
        self.segments.all().iter().map(|segment| bytes_of(segment)).sum()
    }

    fn enforce_retention(&self, now_ms: i64, needed: Lsn, followers: Lsn) -> Result<Retained, LogError> {
        let _one_at_a_time = self.retention.lock();
        let age_ms = i64::try_from(self.options.retention_age.as_millis()).unwrap_or(i64::MAX);
        let mut bytes = self.disk_bytes();
        let (mut removed, mut followers_cut, mut failed) = (0, false, None);
        let segments = self.segments.all();
        let candidates = &segments[..segments.len().saturating_sub(1)];
        for segment in candidates {
            let Some(newest_ms) = segment.with_sealed(|sealed| sealed.newest_ms) else {
                break;
            };
            let too_much = bytes > self.options.retention_bytes;
            let too_old = newest_ms.saturating_add(age_ms) <= now_ms;
            let wanted = segment.end() > followers;
            if segment.end() > needed || !(too_much || too_old) || (wanted && !too_much) {
                break;
            }
            let freed = bytes_of(segment);
            if let Err(e) = self.remove_segment(segment) {
                failed = Some(e);
                break;
            }
            followers_cut |= wanted;
            removed += 1;
            bytes -= freed;
        }
        if removed > 0 {
            self.index.write().forget_before(self.oldest());
            let oldest = self.oldest();
            self.damaged.lock().retain(|damage| damage.lsn >= oldest);
        }
        match failed {
            Some(e) => Err(e),
            None => Ok(Retained { removed, oldest: self.oldest(), bytes, followers_cut }),
        }
    }

    /// Removes the oldest segment, durably: a newer one must not go before it, or the log would have a hole after
    /// a crash.
    fn remove_segment(&self, segment: &Arc<Segment>) -> Result<(), LogError> {
        let path = self.segments.path(segment.first);
        self.segments.remove(segment.first);
        let whole = segment.file_bytes() == self.options.segment_bytes;
        let spare = if whole { self.keeper.spare_name().map(|name| self.dir.join(name)) } else { None };
        let gone = match &spare {
            Some(spare) => self.storage.rename(&path, spare),
            None => self.storage.remove(&path),
        };
        if let Err(e) = gone {
            self.segments.add(segment.clone());
            return Err(LogError::io("remove", &path, e));
        }
        // Often there is none, and one without its segment is removed when the log is opened.
        let _ = self.storage.remove(&self.dir.join(index_file(segment.first)));
        self.storage.sync_dir(&self.dir).map_err(|e| LogError::io("sync", &self.dir, e))?;
        if let Some(spare) = spare {
            self.keeper.recycle(spare);
        }
        let externals = |sealed: &Sealed| sealed.externals.clone();
        for (database, file_name, _) in segment.with_sealed(externals).unwrap_or_default() {
            let path = self.external_dir(&database).join(file_name);
            if let Err(e) = self.storage.remove(&path) {
                tracing::warn!(file = %path.display(), error = %e, "cannot remove an LTX file that is too old");
            }
        }
        Ok(())
    }
}

fn bytes_of(segment: &Segment) -> u64 {
    let externals = |sealed: &Sealed| sealed.externals.iter().map(|(_, _, size)| size).sum::<u64>();
    segment.file_bytes() + segment.with_sealed(externals).unwrap_or(0)
}
