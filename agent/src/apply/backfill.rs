//! Frames of the WAL copied into the database.

use super::connection::WalConnection;
use super::files::Files;
use super::{ApplyError, CheckpointOutcome, WalFrames};
use sqlite_file::locks::{LockKind, WAL_CHECKPOINT, WAL_READ_MARKS, wal_read};
use sqlite_file::untimed::Untimed;
use sqlite_file::wal::{CommittedWal, FRAME_HEADER_BYTES, frame_offset};
use sqlite_file::wal_index::READ_MARK_UNUSED;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Pages are written in batches of at most about this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// Where the frames are durable that a checkpoint copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// In the WAL, which is synced first.
    Wal,
    /// In the log, or in the WAL since the last mark. After a power failure the log is rolled forward over what was
    /// copied only in part. A sync of a whole WAL would hold up those of the log.
    Log,
}

impl WalConnection {
    /// Copies what no reader is in the way of, like SQLite's passive checkpoint.
    pub fn checkpoint(&mut self, durability: Durability) -> Result<CheckpointOutcome, ApplyError> {
        let files = std::sync::Arc::clone(&self.files);
        let nothing = CheckpointOutcome { frames: 0, backfilled: 0 };
        // Somebody else is at it; or a header is being written: the next checkpoint will see.
        let Some(_checkpointer) = self.try_lock(LockKind::Write, WAL_CHECKPOINT)? else {
            return Ok(self.outcome().unwrap_or(nothing));
        };
        let Some(header) = self.index.read_header() else { return Ok(nothing) };
        let before = self.index.backfill();
        if before >= header.max_frame {
            return Ok(CheckpointOutcome { frames: header.max_frame, backfilled: header.max_frame });
        }
        // A reader needs the database as of its mark for every page that is not in the frames up to the mark.
        let mut safe = header.max_frame;
        for mark in 1..WAL_READ_MARKS {
            let frame = self.index.read_mark(mark);
            if frame >= safe {
                continue;
            }
            match self.try_lock(LockKind::Write, wal_read(mark))? {
                Some(_unused) => {
                    self.index.set_read_mark(mark, if mark == 1 { safe } else { READ_MARK_UNUSED })
                }
                None => safe = frame,
            }
        }
        let partly = CheckpointOutcome { frames: header.max_frame, backfilled: before };
        if before >= safe {
            return Ok(partly);
        }
        // Readers at mark 0 read nothing but the database.
        let Some(_database_readers) = self.try_lock(LockKind::Write, wal_read(0))? else { return Ok(partly) };
        if self.index.read_header().is_none_or(|now| now.salts != header.salts) {
            return Ok(nothing);
        }
        let mut newest = BTreeMap::new();
        for frame in before + 1..=safe {
            let pgno = self.index.page_of(frame).map_err(|e| files.index_error(e))?;
            if let Some(pgno) = pgno.filter(|pgno| *pgno <= header.page_count) {
                newest.insert(pgno, frame);
            }
        }
        self.index.set_backfill_attempted(safe);
        if durability == Durability::Wal {
            self.wal.sync_data().map_err(files.io("sync", &files.wal))?;
        }
        copy_frames(&files, &self.wal, &self.database, header.page_size, &newest)?;
        if self.index.read_header().is_some_and(|now| now.max_frame == safe) {
            // Also where the log has them: a mark may count on frames that the WAL now loses.
            finish_database(&files, &self.database, header.page_size, header.page_count)?;
        }
        self.index.set_backfill(safe);
        Ok(CheckpointOutcome { frames: header.max_frame, backfilled: safe })
    }

    /// Frames in the WAL and how many of them are in the database.
    pub fn outcome(&self) -> Option<CheckpointOutcome> {
        let header = self.index.read_header()?;
        let backfilled = self.index.backfill().min(header.max_frame);
        Some(CheckpointOutcome { frames: header.max_frame, backfilled })
    }
}

/// Copies all transactions of a WAL that nobody has open into the database, and removes the WAL and the wal-index.
/// The caller holds EXCLUSIVE. Says which frames counted.
pub(super) fn fold_wal(files: &Files, database: &File) -> Result<Option<WalFrames>, ApplyError> {
    let wal = match File::open(&files.wal) {
        Ok(wal) => wal,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(files.io("open", &files.wal)(e)),
    };
    let mut folded = None;
    // The WAL of a database that is empty belongs to an older one of that name; SQLite deletes it as well.
    let empty = Untimed::of(database).map_err(files.io("inspect", &files.database))?.size == 0;
    if !empty
        && let Some(committed) = CommittedWal::read(&wal).map_err(|e| files.wal_error(e))?
        && committed.end.frames > 0
    {
        wal.sync_data().map_err(files.io("sync", &files.wal))?;
        let page_size = committed.header.page_size;
        copy_frames(files, &wal, database, page_size, &committed.newest)?;
        finish_database(files, database, page_size, committed.end.commit)?;
        folded = Some((committed.header.salts, committed.end.frames));
    }
    remove_wal(files)?;
    Ok(folded)
}

/// Removes a WAL whose frames are all in the database, and the wal-index. The caller holds EXCLUSIVE.
pub(super) fn remove_wal(files: &Files) -> Result<(), ApplyError> {
    files.remove(&files.wal)?;
    files.remove(&files.shm)
}

/// Gives the database its size and makes it durable, so that the WAL may go.
fn finish_database(files: &Files, database: &File, page_size: u32, pages: u32) -> Result<(), ApplyError> {
    let bytes = u64::from(pages) * u64::from(page_size);
    database.set_len(bytes).map_err(files.io("resize", &files.database))?;
    database.sync_all().map_err(files.io("sync", &files.database))
}

/// Copies for each page the given frame; neighbours are written together.
fn copy_frames(
    files: &Files,
    wal: &File,
    database: &File,
    page_size: u32,
    newest: &BTreeMap<u32, u32>,
) -> Result<(), ApplyError> {
    let size = page_size as usize;
    let mut run: Vec<u8> = Vec::new();
    let mut begin = 0;
    let write = |run: &mut Vec<u8>, begin: u32| {
        let written = database.write_all_at(run, u64::from(begin - 1) * u64::from(page_size));
        run.clear();
        written.map_err(files.io("write", &files.database))
    };
    for (pgno, frame) in newest {
        let continues = *pgno == begin + (run.len() / size) as u32;
        if !run.is_empty() && (!continues || run.len() >= BATCH_BYTES) {
            write(&mut run, begin)?;
        }
        if run.is_empty() {
            begin = *pgno;
        }
        let at = run.len();
        run.resize(at + size, 0);
        wal.read_exact_at(&mut run[at..], frame_offset(*frame, page_size) + FRAME_HEADER_BYTES as u64)
            .map_err(files.io("read", &files.wal))?;
    }
    if run.is_empty() { Ok(()) } else { write(&mut run, begin) }
}
