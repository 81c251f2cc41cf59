//! Transactions appended to the WAL, as an SQLite writer does: readers keep their snapshots.

use super::connection::WalConnection;
use super::files::{Files, Patience};
use super::{
    ApplyError, DatabaseShape, Durability, TransactionHeader, TransactionSource, WalFrames, WalLeft,
    has_frames_beyond,
};
use crate::write_out;
use sqlite_file::header::lock_page;
use sqlite_file::untimed::Untimed;
use sqlite_file::wal::{
    FRAME_HEADER_BYTES, FrameHeader, Salts, WAL_HEADER_BYTES, WalChecksum, WalHeader, frame_offset,
};
use sqlite_file::wal_index::{IndexHeader, WalIndex};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Frames are written in batches of about this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// Frames on their way to the WAL and the wal-index.
struct FrameWriter<'c> {
    files: &'c Files,
    wal: &'c File,
    index: &'c mut WalIndex,
    header: WalHeader,
    /// Frames in the WAL and in the batch.
    frames: u32,
    checksum: WalChecksum,
    batch: Vec<u8>,
    /// Pages of the frames in the batch.
    pages: Vec<u32>,
}

impl FrameWriter<'_> {
    fn push(&mut self, pgno: u32, commit: u32, page: &[u8]) -> Result<(), ApplyError> {
        let frame = FrameHeader::new(&self.header, self.checksum, pgno, commit, page);
        self.checksum = frame.checksum;
        self.frames = self
            .frames
            .checked_add(1)
            .ok_or_else(|| self.files.invalid("the WAL has 2^32 frames already"))?;
        self.batch.extend_from_slice(&frame.encode());
        self.batch.extend_from_slice(page);
        self.pages.push(pgno);
        if self.batch.len() >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }

    /// Writes the batch, then makes it known to the wal-index, where readers ignore it until the header says so.
    fn flush(&mut self) -> Result<(), ApplyError> {
        let Ok(count) = u32::try_from(self.pages.len()) else { unreachable!("a batch is small") };
        if count == 0 {
            return Ok(());
        }
        let first = self.frames - count + 1;
        let (offset, bytes) = (frame_offset(first, self.header.page_size), self.batch.len() as u64);
        // In a mount, the door starts it.
        self.wal
            .write_all_at(&self.batch, offset)
            .and_then(|()| write_out::begin_full_pieces(self.wal, offset, bytes))
            .map_err(self.files.io("write", &self.files.wal))?;
        for (frame, pgno) in (first..).zip(&self.pages) {
            self.index.append(frame, *pgno).map_err(|e| self.files.index_error(e))?;
        }
        self.batch.clear();
        self.pages.clear();
        Ok(())
    }
}

impl WalConnection {
    /// Appends transactions up to one that needs another way, which is returned; publishes all of them at once.
    /// After an error nothing is published. `None`: the page size changes and the WAL cannot begin anew, because
    /// somebody reads what is in it; nothing was read.
    ///
    /// `known`: what the WAL has before, if nobody else has committed in it. `left`: what it has when the write lock is let
    /// go, if that was had.
    pub fn append(
        &mut self,
        known: Option<WalFrames>,
        first: TransactionHeader,
        source: &mut dyn TransactionSource,
        shape: DatabaseShape,
        patience: &Patience,
        left: &mut WalLeft,
    ) -> Result<Option<(DatabaseShape, Option<TransactionHeader>)>, ApplyError> {
        let resizes = shape.page_size != first.page_size;
        if resizes {
            // The frames of a WAL have one size.
            self.checkpoint(Durability::Wal)?;
        }
        let _writer = self.write_lock(patience)?;
        let appended = self.append_locked(known, first, source, shape, patience);
        if !matches!(appended, Err(ApplyError::ForeignCommit { .. }))
            && let Some(IndexHeader { salts, max_frame, .. }) = self.index.read_header()
        {
            *left = WalLeft::Published((salts, max_frame));
        }
        appended
    }

    /// The caller holds the write lock.
    fn append_locked(
        &mut self,
        known: Option<WalFrames>,
        first: TransactionHeader,
        source: &mut dyn TransactionSource,
        shape: DatabaseShape,
        patience: &Patience,
    ) -> Result<Option<(DatabaseShape, Option<TransactionHeader>)>, ApplyError> {
        let resizes = shape.page_size != first.page_size;
        let published = self.header_for_writing(patience)?;
        if known.is_some_and(|known| has_frames_beyond(known, (published.salts, published.max_frame))) {
            let (database, path) = (self.files.name.clone(), self.files.wal.clone());
            return Err(ApplyError::ForeignCommit { database, path });
        }
        self.cut_tail(&published)?;
        let published = self.restart_if_possible(published)?;
        if published.max_frame > 0 && (resizes || published.page_size != first.page_size) {
            return Ok(None);
        }
        let result = self.append_after(published, first, source, shape);
        if result.is_err() {
            // Commit frames that were never published must not come back with the next recovery.
            self.tail_is_clean = false;
            self.cut_tail(&published)?;
        }
        result.map(Some)
    }

    /// Removes what a dead writer left after the published frames. Frames from before a restart do no harm (they
    /// have other salts) but nothing tells them apart cheaply, so this is done once and not for each append.
    fn cut_tail(&mut self, published: &IndexHeader) -> Result<(), ApplyError> {
        if self.tail_is_clean {
            return Ok(());
        }
        let files = &self.files;
        let end = match published.max_frame {
            0 => 0,
            last => {
                frame_offset(last, published.page_size)
                    + FRAME_HEADER_BYTES as u64
                    + u64::from(published.page_size)
            }
        };
        if Untimed::of(&self.wal).map_err(files.io("inspect", &files.wal))?.size > end {
            self.wal.set_len(end).map_err(files.io("truncate", &files.wal))?;
        }
        self.tail_is_clean = true;
        Ok(())
    }

    fn append_after(
        &mut self,
        published: IndexHeader,
        first: TransactionHeader,
        source: &mut dyn TransactionSource,
        mut shape: DatabaseShape,
    ) -> Result<(DatabaseShape, Option<TransactionHeader>), ApplyError> {
        let (header, checksum) = match published.max_frame {
            0 => self.begin_wal(&published, first.page_size)?,
            _ => {
                let IndexHeader { big_endian, page_size, salts, frame_checksum, .. } = published;
                (WalHeader { big_endian, page_size, sequence: 0, salts }, frame_checksum)
            }
        };
        let files = &*self.files;
        let mut writer = FrameWriter {
            files,
            wal: &self.wal,
            index: &mut self.index,
            header,
            frames: published.max_frame,
            checksum,
            batch: Vec::new(),
            pages: Vec::new(),
        };
        let mut next = Some(first);
        let mut must_be_whole = shape.page_size != first.page_size;
        // The last page of a transaction carries the commit, so each page waits until the next one is there.
        let (mut waiting, mut page) = (Vec::new(), Vec::new());
        while let Some(transaction) = next {
            if transaction.commit == 0 || transaction.page_size != first.page_size {
                break;
            }
            let (mut last, mut count) = (0, 0);
            while let Some(pgno) = files.next_page(source, &transaction, last, &mut page)? {
                if pgno == 1 {
                    shape.wal_mode = super::is_wal(&page);
                }
                if last > 0 {
                    writer.push(last, 0, &waiting)?;
                }
                std::mem::swap(&mut waiting, &mut page);
                last = pgno;
                count += 1;
            }
            if std::mem::take(&mut must_be_whole) {
                files.check_whole(&transaction, count)?;
                // A connection that meets another page size first takes the number of pages from the file's size.
                let bytes = u64::from(transaction.commit) * u64::from(transaction.page_size);
                let now = Untimed::of(&self.database).map_err(files.io("inspect", &files.database))?.size;
                self.database.set_len(bytes.max(now)).map_err(files.io("extend", &files.database))?;
                shape.page_size = transaction.page_size;
            }
            if last == 0 && transaction.commit != shape.page_count {
                // Only the size changes, and a commit needs a frame: page 1 as it is.
                writer.flush()?;
                waiting = read_page(files, &self.database, &mut writer, 1)?;
                last = 1;
            }
            if last > 0 {
                writer.push(last, transaction.commit, &waiting)?;
            }
            shape.page_count = transaction.commit;
            next = files.next_transaction(source)?;
        }
        writer.flush()?;
        let (frames, frame_checksum) = (writer.frames, writer.checksum);
        if frames > published.max_frame {
            self.index.write_header(&IndexHeader {
                change: published.change.wrapping_add(1),
                big_endian: header.big_endian,
                page_size: header.page_size,
                max_frame: frames,
                page_count: shape.page_count,
                frame_checksum,
                salts: header.salts,
                ..published
            });
        }
        Ok((shape, next))
    }

    /// Writes the header of a WAL that has no frames.
    fn begin_wal(
        &mut self,
        published: &IndexHeader,
        page_size: u32,
    ) -> Result<(WalHeader, WalChecksum), ApplyError> {
        let files = &self.files;
        let mut old = [0u8; WAL_HEADER_BYTES];
        let old = self.wal.read_exact_at(&mut old, 0).ok().and_then(|()| WalHeader::decode(&old).ok());
        let sequence = old.map_or(0, |(header, _)| header.sequence.wrapping_add(1));
        // Never the salts of before, so that no older frame can be taken for a new one.
        let salts =
            if published.salts == Salts::default() { Salts::random() } else { published.salts.next() };
        let salts = salts.map_err(files.io("make salts for", &files.wal))?;
        let header = WalHeader::new(page_size, sequence, salts);
        let (bytes, checksum) = header.encode();
        self.wal.write_all_at(&bytes, 0).map_err(files.io("write", &files.wal))?;
        // If new frames reached the disk before this header, the old header would make a part of the old frames
        // valid again, over a database that is newer (https://sqlite.org/src/info/ff5be73dee).
        self.wal.sync_data().map_err(files.io("sync", &files.wal))?;
        Ok((header, checksum))
    }
}

/// A page as the frames written so far leave it.
fn read_page(
    files: &Files,
    database: &File,
    writer: &mut FrameWriter<'_>,
    pgno: u32,
) -> Result<Vec<u8>, ApplyError> {
    let page_size = writer.header.page_size;
    assert_ne!(pgno, lock_page(page_size));
    let mut page = vec![0; page_size as usize];
    let frame = writer.index.lookup(pgno, 1, writer.frames).map_err(|e| files.index_error(e))?;
    match frame {
        Some(frame) => writer
            .wal
            .read_exact_at(&mut page, frame_offset(frame, page_size) + FRAME_HEADER_BYTES as u64)
            .map_err(files.io("read", &files.wal))?,
        None => database
            .read_exact_at(&mut page, u64::from(pgno - 1) * u64::from(page_size))
            .map_err(files.io("read", &files.database))?,
    }
    Ok(page)
}
