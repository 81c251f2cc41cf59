//! Step 2: what the WAL has.

use super::super::Database;
use super::{Recovered, RecoveryError, WAL_IS_FROM_THE_LOG, failed, open_if_there, remove_if_there};
use crate::log::RecordInfo;
use sqlite_file::wal::{FRAME_HEADER_BYTES, Scanner, WalError, frame_offset};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

/// Newest frames of committed pages that the log does not have.
pub(super) struct FramesAhead {
    newest: BTreeMap<u32, u32>,
    page_size: u32,
    page_count: u32,
}

impl Database {
    /// Step 2. `known_end` tells how far a WAL with these salts counts. Returns whether there was a WAL with frames.
    pub(in crate::database) fn recover_wal(
        &self,
        known_end: &dyn Fn((u32, u32)) -> u64,
        remove: bool,
        done: &mut Recovered,
    ) -> Result<bool, RecoveryError> {
        let Some(wal) = open_if_there(&self.paths.wal)? else { return Ok(false) };
        let mut had_frames = false;
        match Scanner::open(&wal) {
            Ok(Some(mut scan)) => {
                let page_size = scan.header().page_size;
                let end = known_end((scan.header().salts.first(), scan.header().salts.second()));
                let (mut newest, mut open, mut page_count) = (BTreeMap::new(), Vec::new(), 0);
                while let Some(frame) = scan.next_frame().map_err(failed)? {
                    had_frames = true;
                    open.push((frame.pgno, frame.number));
                    if frame.commit == 0 {
                        continue;
                    }
                    if frame_offset(frame.number + 1, page_size) <= end {
                        page_count = frame.commit;
                        newest.extend(open.drain(..));
                    } else {
                        done.dropped_frames += open.drain(..).count() as u64;
                    }
                }
                if page_count > 0
                    && let Some(database) = open_if_there(&self.paths.database)?
                {
                    let mut page = vec![0; page_size as usize];
                    for (pgno, number) in newest.into_iter().filter(|(pgno, _)| *pgno <= page_count) {
                        let offset = frame_offset(number, page_size) + FRAME_HEADER_BYTES as u64;
                        wal.read_exact_at(&mut page, offset).map_err(failed)?;
                        let at = u64::from(pgno - 1) * u64::from(page_size);
                        database.write_all_at(&page, at).map_err(failed)?;
                    }
                    database.set_len(u64::from(page_count) * u64::from(page_size)).map_err(failed)?;
                    database.sync_all().map_err(failed)?;
                }
            }
            Ok(None) | Err(WalError::Invalid(_) | WalError::Version(_)) => {}
            Err(WalError::Io(e)) => return Err(failed(e)),
        }
        if !remove {
            done.dropped_frames = 0;
        }
        if done.dropped_frames > 0 {
            tracing::warn!(
                database = %self.name,
                frames = done.dropped_frames,
                "the WAL had commits that never reached the log (written without a sync before the host died): dropped"
            );
            done.compare = true;
        }
        if remove {
            remove_if_there(&self.paths.wal)?;
        }
        Ok(had_frames)
    }

    /// Commits in the WAL that the log does not have although they were reported: the door did not see them written.
    pub(super) fn frames_ahead(
        &self,
        last: Option<&RecordInfo>,
        known_end: &dyn Fn((u32, u32)) -> u64,
    ) -> Result<Option<FramesAhead>, RecoveryError> {
        let applied = last.is_some_and(|r| r.wal == Some(WAL_IS_FROM_THE_LOG));
        if applied || !self.shared.wals_may_be_ahead() {
            return Ok(None);
        }
        let Some(wal) = open_if_there(&self.paths.wal)? else { return Ok(None) };
        let mut ahead = FramesAhead { newest: BTreeMap::new(), page_size: 0, page_count: 0 };
        match Scanner::open(&wal) {
            Ok(Some(mut scan)) => {
                ahead.page_size = scan.header().page_size;
                let end = known_end((scan.header().salts.first(), scan.header().salts.second()));
                let mut open = Vec::new();
                while let Some(frame) = scan.next_frame().map_err(failed)? {
                    open.push((frame.pgno, frame.number));
                    if frame.commit > 0 {
                        if frame_offset(frame.number + 1, ahead.page_size) > end {
                            ahead.page_count = frame.commit;
                            ahead.newest.extend(open.drain(..));
                        }
                        open.clear();
                    }
                }
            }
            Ok(None) | Err(WalError::Invalid(_) | WalError::Version(_)) => {}
            Err(WalError::Io(e)) => return Err(failed(e)),
        }
        Ok((ahead.page_count > 0).then_some(ahead))
    }

    /// Moves them to the file, which has all that the log has; then the WAL goes.
    pub(super) fn add_frames_ahead(&self, ahead: &FramesAhead) -> Result<(), RecoveryError> {
        let (Some(wal), Some(database)) =
            (open_if_there(&self.paths.wal)?, open_if_there(&self.paths.database)?)
        else {
            return Ok(());
        };
        tracing::warn!(
            database = %self.name,
            pages = ahead.newest.len(),
            "the WAL has commits that had not reached the log: they are kept"
        );
        let mut page = vec![0; ahead.page_size as usize];
        for (pgno, number) in ahead.newest.iter().filter(|(pgno, _)| **pgno <= ahead.page_count) {
            let offset = frame_offset(*number, ahead.page_size) + FRAME_HEADER_BYTES as u64;
            wal.read_exact_at(&mut page, offset).map_err(failed)?;
            let at = u64::from(pgno - 1) * u64::from(ahead.page_size);
            database.write_all_at(&page, at).map_err(failed)?;
        }
        database.set_len(u64::from(ahead.page_count) * u64::from(ahead.page_size)).map_err(failed)?;
        database.sync_all().map_err(failed)?;
        remove_if_there(&self.paths.wal)
    }
}

/// How far the log knows a WAL with these salts.
pub(in crate::database) fn known_wal_end(last: Option<&RecordInfo>) -> impl Fn((u32, u32)) -> u64 {
    let wal = last.and_then(|r| r.wal);
    move |salts| match wal {
        Some(end) if end == WAL_IS_FROM_THE_LOG => u64::MAX,
        Some(end) if (end.salt1, end.salt2) == salts => end.end_offset,
        _ => 0,
    }
}
