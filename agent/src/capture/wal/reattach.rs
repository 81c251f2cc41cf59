//! What is known of a WAL whose writers have outlived the agent, from the file and from the log.
//!
//! The last record captured from this generation says up to where frames are committed; frame checksums say nothing,
//! since SQLite may be about to rewrite them. A commit frame that was held lies in the file with its header veiled
//! ([`super::veil`]): it is unveiled if the log has its transaction, otherwise its writer, who got no answer, is still
//! waiting and its write is asked again.

use super::{Arriving, FRAME_HEADER_BYTES, HEADER_BYTES, LastCommit, Stale, WalCapture, veil};
use crate::database::checksums::Mark;
use crate::log::WalEnd;
use ltx::{Checksum, page_checksum};
use sqlite_file::wal::{WalError, WalHeader, frame_bytes};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What the log knows of a WAL.
#[derive(Debug, Clone, Copy)]
pub enum Known {
    /// Nothing of this generation, or of any.
    Nothing,
    /// Up to here it has been captured; where the database's last record is another one, the transaction that ends
    /// here is settled.
    CapturedTo {
        /// End of the last captured transaction.
        end: WalEnd,
        /// Set if it is the database's last record: its writer may have died before it published it.
        newest: Option<Newest>,
    },
    /// The agent wrote it.
    FromLog,
}

/// The database's last transaction, captured from a WAL.
#[derive(Debug, Clone, Copy)]
pub struct Newest {
    /// Offset of its first frame, where the log says it.
    pub start: Option<u64>,
    /// What the log had before it.
    pub after: Mark,
}

struct FrameStart {
    pgno: u32,
    commit: u32,
    veiled: bool,
}

impl WalCapture {
    /// Takes up a WAL in use. `checksum` gives the checksum of a page at the newest transaction of the log.
    pub fn reattach(
        &mut self,
        file: &File,
        known: Known,
        checksum: &dyn Fn(u32) -> Option<Checksum>,
    ) -> io::Result<()> {
        self.reset();
        let mut bytes = [0; HEADER_BYTES as usize];
        let len = file.metadata()?.len();
        if len < HEADER_BYTES {
            return Ok(());
        }
        file.read_exact_at(&mut bytes, 0)?;
        match WalHeader::decode(&bytes) {
            Ok((header, _)) => self.start_generation(&header),
            Err(WalError::Io(e)) => return Err(e),
            Err(WalError::Invalid(_) | WalError::Version(_)) => return Ok(()),
        }
        match known {
            Known::Nothing => {}
            Known::FromLog => {
                self.stale = Stale::FromLog;
                self.refresh(file)?;
            }
            Known::CapturedTo { end, newest } => {
                let ours = self.generation.is_some_and(|g| (g.salt1, g.salt2) == (end.salt1, end.salt2));
                if ours {
                    self.take_committed(file, end.end_offset, newest, checksum)?;
                }
            }
        }
        self.take_pending(file)
    }

    /// The frames up to `end` are committed, unless the last transaction is being written over.
    fn take_committed(
        &mut self,
        file: &File,
        end: u64,
        newest: Option<Newest>,
        checksum: &dyn Fn(u32) -> Option<Checksum>,
    ) -> io::Result<()> {
        let Some(generation) = self.generation else { return Ok(()) };
        let step = frame_bytes(generation.page_size);
        // Frames of the last transaction so far, in order.
        let mut open: Vec<(u64, u32)> = Vec::new();
        let mut start = HEADER_BYTES;
        let mut at = HEADER_BYTES;
        while at + step <= end {
            let frame = self.frame_start(file, at)?;
            match &frame {
                Some(frame) => open.push((at, frame.pgno)),
                None if newest.is_some() => break,
                None => {}
            }
            at += step;
            let ends = match newest.and_then(|newest| newest.start) {
                Some(start) => at <= start,
                None => at < end && frame.is_some_and(|f| f.commit != 0 && !f.veiled),
            };
            if ends {
                self.committed.extend(open.drain(..).map(|(offset, pgno)| (pgno, offset)));
                start = at;
            }
        }
        self.committed_end = end;
        let Some(Newest { after, .. }) = newest else {
            self.committed.extend(open.into_iter().map(|(offset, pgno)| (pgno, offset)));
            return Ok(());
        };
        let newest: BTreeMap<u32, u64> = open.iter().map(|(offset, pgno)| (*pgno, *offset)).collect();
        let mut page = vec![0; generation.page_size as usize];
        let mut intact = at >= end;
        for (pgno, offset) in &newest {
            file.read_exact_at(&mut page, offset + FRAME_HEADER_BYTES)?;
            intact &= checksum(*pgno).is_some_and(|sum| sum == page_checksum(*pgno, &page));
        }
        if intact {
            self.unveil(file, end - step)?;
            let before = newest.keys().map(|pgno| (*pgno, self.committed.get(pgno).copied())).collect();
            self.committed.extend(newest);
            self.last = Some(LastCommit { start, before, after });
        } else {
            // Its writer died before it published it, and another one has begun in its place. Which pages have to be
            // put back its frames do not say any more.
            self.committed_end = start;
            (self.reverted.unknown, self.reverted.after) = (true, Some(after));
        }
        Ok(())
    }

    /// Frames after the last commit belong to a transaction that is being written, or to one that was rolled back and
    /// whose place the next one takes.
    fn take_pending(&mut self, file: &File) -> io::Result<()> {
        let Some(generation) = self.generation else { return Ok(()) };
        let step = frame_bytes(generation.page_size);
        let mut at = self.committed_end.max(HEADER_BYTES);
        while let Some(frame) = self.frame_start(file, at)? {
            if frame.veiled {
                // Readers must see the header that was written.
                let mut held = vec![0; FRAME_HEADER_BYTES as usize];
                file.read_exact_at(&mut held, at)?;
                veil(&mut held);
                self.pending.insert(at, frame.pgno);
                self.arriving = Some(Arriving { at, held, filled: FRAME_HEADER_BYTES });
                break;
            }
            self.pending.insert(at, frame.pgno);
            at += step;
        }
        Ok(())
    }

    /// The header of the frame at `at`, if it is one of this generation.
    fn frame_start(&self, file: &File, at: u64) -> io::Result<Option<FrameStart>> {
        let Some(generation) = self.generation else { return Ok(None) };
        let mut bytes = [0; FRAME_HEADER_BYTES as usize];
        match file.read_exact_at(&mut bytes, at) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let mut veiled = false;
        if !generation.owns(&bytes) {
            veil(&mut bytes);
            veiled = true;
            if !generation.owns(&bytes) {
                return Ok(None);
            }
        }
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(Some(FrameStart { pgno: word(0), commit: word(4), veiled }))
    }

    /// The log has the transaction of this commit frame: now it counts in the file too.
    fn unveil(&self, file: &File, at: u64) -> io::Result<()> {
        if self.frame_start(file, at)?.is_some_and(|frame| frame.veiled) {
            let mut bytes = [0; FRAME_HEADER_BYTES as usize];
            file.read_exact_at(&mut bytes, at)?;
            veil(&mut bytes);
            file.write_all_at(&bytes, at)?;
        }
        Ok(())
    }

    /// Pages of a transaction that was taken back, where only the log still knows them.
    pub fn put_back_later(&mut self, pages: BTreeSet<u32>) {
        if std::mem::take(&mut self.reverted.unknown) {
            self.reverted.pages.extend(pages);
        }
    }
}
