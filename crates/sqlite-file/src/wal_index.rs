//! The wal-index (the `-shm` file): which frame of the WAL holds the newest version of a page, and what readers and
//! checkpointers are doing (walformat.html section 2). Words are in the byte order of the host.
//!
//! The file is shared with SQLite in other processes, so every access is an atomic load or store, and nothing read
//! from it is trusted to be in range. Which lock allows which call is said at each method; taking it is the
//! caller's business ([`crate::locks`]).

use crate::locks::WAL_READ_MARKS;
use crate::untimed::Untimed;
use crate::wal::{Salts, WalChecksum};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

/// The file grows and is mapped by blocks of this many bytes; each has a hash table.
pub const BLOCK_BYTES: usize = 32 * 1024;
/// Frames that a block other than the first indexes.
pub const FRAMES_PER_BLOCK: u32 = 4096;
/// Frames that the first block indexes: both headers and the checkpoint information take their place.
pub const FRAMES_IN_FIRST_BLOCK: u32 = FRAMES_PER_BLOCK - (INDEX_HEADER_BYTES / 4) as u32;
/// Value of a read mark that nobody uses.
pub const READ_MARK_UNUSED: u32 = u32::MAX;

/// Both copies of the header, checkpoint information, lock bytes.
const INDEX_HEADER_BYTES: usize = 136;
/// One copy of the header.
const HEADER_BYTES: usize = 48;
const HEADER_WORDS: usize = HEADER_BYTES / 4;
const BACKFILL_AT: usize = 96;
const READ_MARKS_AT: usize = 100;
const BACKFILL_ATTEMPTED_AT: usize = 128;
const HASH_AT: usize = FRAMES_PER_BLOCK as usize * 4;
const HASH_SLOTS: usize = FRAMES_PER_BLOCK as usize * 2;
const HASH_FACTOR: u32 = 383;
/// Operating system pages that SQLite allocates one by one when it extends the file.
const ALLOCATION_BYTES: usize = 4096;

/// The header of the wal-index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexHeader {
    /// Version of the format, [`crate::wal::WAL_VERSION`].
    pub version: u32,
    /// Counts transactions.
    pub change: u32,
    /// Whether the frames of the WAL have big-endian checksums.
    pub big_endian: bool,
    /// Bytes in a page (0 while the WAL never had a frame).
    pub page_size: u32,
    /// Last frame that counts.
    pub max_frame: u32,
    /// Size of the database in pages.
    pub page_count: u32,
    /// Checksum of the WAL up to `max_frame`.
    pub frame_checksum: WalChecksum,
    /// Salts of the WAL.
    pub salts: Salts,
}

impl IndexHeader {
    fn encode(&self) -> [u32; HEADER_WORDS] {
        // As the file format: the low bits of the 16-bit field hold bit 16 of the size.
        let size = (self.page_size & 0xff00) as u16 | (self.page_size >> 16) as u16;
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.version.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.change.to_ne_bytes());
        bytes[12] = 1;
        bytes[13] = u8::from(self.big_endian);
        bytes[14..16].copy_from_slice(&size.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.max_frame.to_ne_bytes());
        bytes[20..24].copy_from_slice(&self.page_count.to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.frame_checksum.0.to_ne_bytes());
        bytes[28..32].copy_from_slice(&self.frame_checksum.1.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.salts.0);
        let sum = WalChecksum::default().update(cfg!(target_endian = "big"), &bytes[..40]);
        bytes[40..44].copy_from_slice(&sum.0.to_ne_bytes());
        bytes[44..48].copy_from_slice(&sum.1.to_ne_bytes());
        let mut words = [0u32; HEADER_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        words
    }

    /// Reads the header without mapping the file, which SQLite may cut to nothing for a moment. `Ok(None)`: there is none,
    /// the copies differ, or the checksum is wrong; without the write lock that may only mean that somebody writes it.
    pub fn read(file: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0u8; 2 * HEADER_BYTES];
        match file.read_exact_at(&mut bytes, 0) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let (first, second) = bytes.split_at(HEADER_BYTES);
        if first != second {
            return Ok(None);
        }
        let mut words = [0u32; HEADER_WORDS];
        for (word, bytes) in words.iter_mut().zip(first.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Ok(IndexHeader::decode(&words))
    }

    fn decode(words: &[u32; HEADER_WORDS]) -> Option<Self> {
        let mut bytes = [0u8; HEADER_BYTES];
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        let sum = WalChecksum::default().update(cfg!(target_endian = "big"), &bytes[..40]);
        if bytes[12] == 0 || sum != WalChecksum(words[10], words[11]) {
            return None;
        }
        let size = u32::from(u16::from_ne_bytes([bytes[14], bytes[15]]));
        let mut salts = [0u8; 8];
        salts.copy_from_slice(&bytes[32..40]);
        Some(IndexHeader {
            version: words[0],
            change: words[2],
            big_endian: bytes[13] != 0,
            page_size: (size & 0xfe00) + ((size & 1) << 16),
            max_frame: words[4],
            page_count: words[5],
            frame_checksum: WalChecksum(words[6], words[7]),
            salts: Salts(salts),
        })
    }
}

/// Why the wal-index could not be used.
#[derive(Debug, thiserror::Error)]
pub enum WalIndexError {
    /// Extending or mapping the file failed.
    #[error("cannot extend or map the wal-index: {0}")]
    Io(#[from] io::Error),
    /// A hash table is full or leads nowhere: somebody wrote over it.
    #[error("the wal-index is corrupt: the hash table of block {block} has no end")]
    Corrupt {
        /// Number of the block, from 0.
        block: usize,
    },
}

/// Block that indexes `frame` (from 1), and the index of the frame's entry in it (from 1).
fn place(frame: u32) -> (usize, u32) {
    assert!(frame > 0, "frames are counted from 1");
    if frame <= FRAMES_IN_FIRST_BLOCK {
        return (0, frame);
    }
    let beyond = frame - FRAMES_IN_FIRST_BLOCK - 1;
    ((beyond / FRAMES_PER_BLOCK) as usize + 1, beyond % FRAMES_PER_BLOCK + 1)
}

/// Number of the frame before the first that `block` indexes.
fn frames_before(block: usize) -> u32 {
    match block {
        0 => 0,
        n => FRAMES_IN_FIRST_BLOCK + (n as u32 - 1) * FRAMES_PER_BLOCK,
    }
}

fn hash(pgno: u32) -> usize {
    pgno.wrapping_mul(HASH_FACTOR) as usize & (HASH_SLOTS - 1)
}

/// Page numbers and hash table of one block.
struct Block<'m> {
    pages: &'m [AtomicU32],
    slots: &'m [AtomicU16],
}

/// A mapped wal-index.
#[derive(Debug)]
pub struct WalIndex {
    file: Arc<File>,
    blocks: Vec<MmapRaw>,
}

impl WalIndex {
    /// Maps the first block, extending the file for it if needed: the caller holds the dead man's switch for
    /// reading, and the write lock if the file is shorter than a block (see [`WalIndex::is_allocated`]).
    pub fn map(file: Arc<File>) -> Result<Self, WalIndexError> {
        let mut index = WalIndex { file, blocks: Vec::new() };
        index.ensure_block(0)?;
        Ok(index)
    }

    /// Whether the file has its first block already.
    pub fn is_allocated(file: &File) -> io::Result<bool> {
        Ok(Untimed::of(file)?.size >= BLOCK_BYTES as u64)
    }

    /// Number of blocks mapped so far.
    pub fn mapped_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the file still has all that is mapped. Only the first to connect may cut it, so `false` means that
    /// somebody broke the rules, and the next access would be a SIGBUS.
    pub fn is_whole(&self) -> io::Result<bool> {
        Ok(Untimed::of(&self.file)?.size >= (self.blocks.len() * BLOCK_BYTES) as u64)
    }

    fn ensure_block(&mut self, block: usize) -> Result<(), WalIndexError> {
        while self.blocks.len() <= block {
            let start = self.blocks.len() * BLOCK_BYTES;
            let size = Untimed::of(&self.file)?.size as usize;
            // Like SQLite, write into every page so that a full disk is an error here and no SIGBUS later.
            let mut page = size.max(start) / ALLOCATION_BYTES * ALLOCATION_BYTES;
            while size < start + BLOCK_BYTES && page < start + BLOCK_BYTES {
                self.file.write_all_at(&[0], (page + ALLOCATION_BYTES - 1) as u64)?;
                page += ALLOCATION_BYTES;
            }
            let map = MmapOptions::new().offset(start as u64).len(BLOCK_BYTES).map_raw(&*self.file)?;
            self.blocks.push(map);
        }
        Ok(())
    }

    /// A 32-bit word of the first block.
    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at < BLOCK_BYTES);
        // SAFETY: in bounds of the mapping and aligned (asserted; mappings begin at a page), mapped for reading and
        // writing as long as `self`, and only accessed atomically from here.
        unsafe { AtomicU32::from_ptr(self.blocks[0].as_mut_ptr().add(at).cast()) }
    }

    fn block(&self, block: usize) -> Block<'_> {
        let base = self.blocks[block].as_mut_ptr();
        let skip = if block == 0 { INDEX_HEADER_BYTES } else { 0 };
        // SAFETY: HASH_AT bytes of page numbers are followed by HASH_SLOTS 16-bit slots, together BLOCK_BYTES, which
        // is what is mapped. AtomicU32 and AtomicU16 have the layout of their integers and allow shared writes.
        unsafe {
            Block {
                pages: std::slice::from_raw_parts(base.add(skip).cast(), (HASH_AT - skip) / 4),
                slots: std::slice::from_raw_parts(base.add(HASH_AT).cast(), HASH_SLOTS),
            }
        }
    }

    fn load_header(&self, copy: usize) -> [u32; HEADER_WORDS] {
        std::array::from_fn(|i| self.word(copy * HEADER_BYTES + i * 4).load(Ordering::Relaxed))
    }

    /// The header, if both copies agree and the checksum is right. Needs no lock; `None` without the write lock may
    /// only mean that somebody is writing it.
    pub fn read_header(&self) -> Option<IndexHeader> {
        let first = self.load_header(0);
        fence(Ordering::SeqCst);
        let second = self.load_header(1);
        if first != second {
            return None;
        }
        IndexHeader::decode(&first)
    }

    /// Publishes a header: from here on readers see the frames up to `max_frame`. Needs the write lock.
    pub fn write_header(&self, header: &IndexHeader) {
        let words = header.encode();
        // Everything stored before (hash tables) must be visible to whoever sees the header.
        fence(Ordering::SeqCst);
        for copy in [1, 0] {
            for (i, word) in words.iter().enumerate() {
                self.word(copy * HEADER_BYTES + i * 4).store(*word, Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
        }
    }

    /// Number of frames that have been copied into the database.
    pub fn backfill(&self) -> u32 {
        self.word(BACKFILL_AT).load(Ordering::SeqCst)
    }

    /// Sets [`WalIndex::backfill`]. Needs the checkpoint lock (or the write lock with all readers locked out, to
    /// restart).
    pub fn set_backfill(&self, frames: u32) {
        self.word(BACKFILL_AT).store(frames, Ordering::SeqCst);
    }

    /// Number of frames that a checkpoint has begun to copy.
    pub fn backfill_attempted(&self) -> u32 {
        self.word(BACKFILL_ATTEMPTED_AT).load(Ordering::SeqCst)
    }

    /// Sets [`WalIndex::backfill_attempted`]; same locks as [`WalIndex::set_backfill`].
    pub fn set_backfill_attempted(&self, frames: u32) {
        self.word(BACKFILL_ATTEMPTED_AT).store(frames, Ordering::SeqCst);
    }

    /// Last frame that readers at this mark look at, or [`READ_MARK_UNUSED`].
    pub fn read_mark(&self, mark: usize) -> u32 {
        assert!(mark < WAL_READ_MARKS);
        self.word(READ_MARKS_AT + mark * 4).load(Ordering::SeqCst)
    }

    /// Sets a mark. Needs the write lock on its byte ([`crate::locks::wal_read`]).
    pub fn set_read_mark(&self, mark: usize, frame: u32) {
        assert!(mark < WAL_READ_MARKS);
        self.word(READ_MARKS_AT + mark * 4).store(frame, Ordering::SeqCst);
    }

    /// Page that `frame` is a version of; `None` if the index has no entry there.
    pub fn page_of(&mut self, frame: u32) -> Result<Option<u32>, WalIndexError> {
        let (block, entry) = place(frame);
        self.ensure_block(block)?;
        let pgno = self.block(block).pages[entry as usize - 1].load(Ordering::Relaxed);
        Ok((pgno != 0).then_some(pgno))
    }

    /// Newest frame of a page within `min_frame..=max_frame`. Safe beside a writer for frames up to a published
    /// `max_frame`.
    pub fn lookup(
        &mut self,
        pgno: u32,
        min_frame: u32,
        max_frame: u32,
    ) -> Result<Option<u32>, WalIndexError> {
        let min_frame = min_frame.max(1);
        if max_frame < min_frame {
            return Ok(None);
        }
        let (last, _) = place(max_frame);
        let (first, _) = place(min_frame);
        for block in (first..=last).rev() {
            self.ensure_block(block)?;
            let Block { pages, slots } = self.block(block);
            let mut found = None;
            let mut key = hash(pgno);
            let mut left = HASH_SLOTS;
            loop {
                let entry = u32::from(slots[key].load(Ordering::SeqCst));
                if entry == 0 {
                    break;
                }
                let frame = frames_before(block).saturating_add(entry);
                let page = pages.get(entry as usize - 1).map(|p| p.load(Ordering::Relaxed));
                if (min_frame..=max_frame).contains(&frame) && page == Some(pgno) {
                    found = found.max(Some(frame));
                }
                left -= 1;
                if left == 0 {
                    return Err(WalIndexError::Corrupt { block });
                }
                key = (key + 1) % HASH_SLOTS;
            }
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Enters the frame that follows all entered before. What a dead writer left behind is removed. Needs the write
    /// lock; readers do not see it before [`WalIndex::write_header`].
    pub fn append(&mut self, frame: u32, pgno: u32) -> Result<(), WalIndexError> {
        let (block, entry) = place(frame);
        self.ensure_block(block)?;
        let Block { pages, slots } = self.block(block);
        if entry == 1 {
            // A block begins: older content is from before a restart or from a dead writer.
            pages.iter().for_each(|p| p.store(0, Ordering::Relaxed));
            slots.iter().for_each(|s| s.store(0, Ordering::Relaxed));
        } else if pages[entry as usize - 1].load(Ordering::Relaxed) != 0 {
            Self::remove_after(pages, slots, entry - 1);
        }
        let mut key = hash(pgno);
        let mut left = entry;
        while slots[key].load(Ordering::Relaxed) != 0 {
            if left == 0 {
                return Err(WalIndexError::Corrupt { block });
            }
            left -= 1;
            key = (key + 1) % HASH_SLOTS;
        }
        pages[entry as usize - 1].store(pgno, Ordering::Relaxed);
        slots[key].store(entry as u16, Ordering::SeqCst);
        Ok(())
    }

    /// Removes entries after `entry`; those before stay reachable because slots are only ever filled in order.
    fn remove_after(pages: &[AtomicU32], slots: &[AtomicU16], entry: u32) {
        for slot in slots {
            if u32::from(slot.load(Ordering::Relaxed)) > entry {
                slot.store(0, Ordering::Relaxed);
            }
        }
        pages[entry as usize..].iter().for_each(|p| p.store(0, Ordering::Relaxed));
    }

    /// Makes the index be about frames 1 to `frames.len()`, of these pages. Needs the write and rebuild locks.
    ///
    /// Only words that differ are stored, so that a reader that still uses correct entries is not disturbed.
    pub fn rebuild(&mut self, frames: &[u32]) -> Result<(), WalIndexError> {
        let mut rest = frames;
        let mut block = 0;
        loop {
            let capacity = if block == 0 { FRAMES_IN_FIRST_BLOCK } else { FRAMES_PER_BLOCK } as usize;
            let (now, later) = rest.split_at(rest.len().min(capacity));
            let mut slots_wanted = vec![0u16; HASH_SLOTS];
            for (i, pgno) in now.iter().enumerate() {
                let mut key = hash(*pgno);
                // Half of the slots stay free, so this ends.
                while slots_wanted[key] != 0 {
                    key = (key + 1) % HASH_SLOTS;
                }
                slots_wanted[key] = i as u16 + 1;
            }
            self.ensure_block(block)?;
            let Block { pages, slots } = self.block(block);
            for (i, page) in pages.iter().enumerate() {
                let wanted = now.get(i).copied().unwrap_or(0);
                if page.load(Ordering::Relaxed) != wanted {
                    page.store(wanted, Ordering::Relaxed);
                }
            }
            for (slot, wanted) in slots.iter().zip(slots_wanted) {
                if slot.load(Ordering::Relaxed) != wanted {
                    slot.store(wanted, Ordering::SeqCst);
                }
            }
            rest = later;
            block += 1;
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    /// Marks everything in the WAL as copied by nobody and read by nobody, with `mark1` for the first read mark.
    /// Needs the locks that [`WalIndex::set_backfill`] and [`WalIndex::set_read_mark`] name.
    pub fn reset_checkpoint_info(&self, backfill_attempted: u32, mark1: u32) {
        self.set_backfill(0);
        self.set_backfill_attempted(backfill_attempted);
        self.set_read_mark(0, 0);
        self.set_read_mark(1, mark1);
        for mark in 2..WAL_READ_MARKS {
            self.set_read_mark(mark, READ_MARK_UNUSED);
        }
    }
}

#[cfg(test)]
#[path = "wal_index_tests.rs"]
mod tests;
