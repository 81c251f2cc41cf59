//! The page-checksum sidecar: 8 bytes a page in a memory-mapped file, so that a start needs no scan of databases.
//!
//! Layout (all integers little-endian): one 4096-byte header, then a `u64` per page, page 1 first; 0 means "no such
//! page" (page checksums always have bit 63 set, see the LTX specification). The header states a *mark*: a position
//! up to which the database files and these entries were made durable together. Entries may be newer than the mark
//! after a crash; replaying the log from the mark sets them right, because a record carries whole pages. The header also
//! has, for an agent that takes up databases in use, up to where a replica has applied; nothing makes that durable.

use crate::DatabaseName;
use crate::ship::engine::Epoch;
use ltx::{Checksum, Pos, Txid};
use memmap2::MmapMut;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"LFSSUMS1";
const HEADER_BYTES: u64 = 4096;
/// Growth step: 8,192 entries, 32 MiB of database at 4 KiB pages.
const STEP_BYTES: u64 = 64 * 1024;
/// Changed alone, so the header's CRC leaves it out.
const UNLOGGED_OFFSET: usize = 32;
/// Epoch of the newest record; it outlives the record, which retention removes.
const EPOCH_OFFSET: usize = 40;
const NAME_OFFSET: usize = 80;
const CRC_OFFSET: usize = HEADER_BYTES as usize - 4;
/// Two places for the applied position, used in turn, so that one is whole whenever its writer is killed. The header's
/// checksum takes them for zeros.
const APPLIED_OFFSETS: [usize; 2] = [3968, 4016];
/// Sequence number, TXID, checksum, page size and count, and the sum of these with a constant.
const APPLIED_BYTES: usize = 40;
const APPLIED_SALT: u64 = 0x6c66_735f_6170_706c;

/// What a sidecar is known to be durable up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Position made durable.
    pub position: Pos,
    /// Bytes in a page; 0 while the database is empty.
    pub page_size: u32,
    /// Pages in the database.
    pub page_count: u32,
}

/// Why a sidecar cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChecksumsError {
    /// The file system failed.
    #[error("page checksums {path}: {source}")]
    Io {
        /// The sidecar.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// Not a sidecar, or a damaged one; it can be rebuilt from the database.
    #[error("page checksums {path}: {reason}")]
    Damaged {
        /// The sidecar.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

/// An open sidecar.
#[derive(Debug)]
pub struct Checksums {
    path: PathBuf,
    file: File,
    map: MmapMut,
    mark: Mark,
    record_epoch: Epoch,
    /// No page after this one has a checksum.
    last: u32,
}

impl Checksums {
    /// Reads only the header: the name it belongs to, its mark, and the epoch of the database's newest record.
    pub fn read_mark(path: &Path) -> Result<(DatabaseName, Mark, Epoch), ChecksumsError> {
        let file = File::open(path).map_err(|e| io_error(path, e))?;
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, 0).map_err(|e| io_error(path, e))?;
        decode_header(path, &header)
    }

    /// Opens an existing sidecar.
    pub fn open(path: &Path) -> Result<Self, ChecksumsError> {
        let io = |e| io_error(path, e);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, 0).map_err(io)?;
        let (_, mark, record_epoch) = decode_header(path, &header)?;
        let len = file.metadata().map_err(io)?.len();
        if len < HEADER_BYTES + 8 * u64::from(mark.page_count) {
            return Err(ChecksumsError::Damaged {
                path: path.to_owned(),
                reason: "shorter than its page count",
            });
        }
        let map = map_file(&file, path)?;
        let used = map[HEADER_BYTES as usize..].iter().rposition(|b| *b != 0).map_or(0, |i| i / 8 + 1);
        Ok(Checksums { path: path.to_owned(), file, map, mark, record_epoch, last: used as u32 })
    }

    /// Creates an empty sidecar, replacing what is there.
    pub fn create(path: &Path, name: &DatabaseName) -> Result<Self, ChecksumsError> {
        let io = |e| io_error(path, e);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).map_err(io)?;
        reserve(&file, HEADER_BYTES).map_err(io)?;
        let mark = Mark::default();
        file.write_all_at(&encode_header(name, &mark, Epoch(0)), 0).map_err(io)?;
        let map = map_file(&file, path)?;
        Ok(Checksums { path: path.to_owned(), file, map, mark, record_epoch: Epoch(0), last: 0 })
    }

    /// The position up to which database and sidecar are durable.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// Epoch of the newest record that the database had at its mark; 0 when that is not known.
    pub fn record_epoch(&self) -> Epoch {
        self.record_epoch
    }

    /// The checksum of a page; `None` for a page the database does not have.
    pub fn get(&self, pgno: u32) -> Option<Checksum> {
        let at = entry_offset(pgno);
        let bytes = self.map.get(at..at + 8)?;
        match u64::from_le_bytes(bytes.try_into().ok()?) {
            0 => None,
            value => Some(Checksum(value)),
        }
    }

    /// Makes room for `page_count` pages; the space is allocated now, so that a full disk is an error here and
    /// not a fault when an entry is stored.
    pub fn reserve(&mut self, page_count: u32) -> Result<(), ChecksumsError> {
        let needed = HEADER_BYTES + 8 * u64::from(page_count);
        if needed > self.map.len() as u64 {
            let len = HEADER_BYTES + (needed - HEADER_BYTES).next_multiple_of(STEP_BYTES);
            reserve(&self.file, len).map_err(|e| io_error(&self.path, e))?;
            self.map = map_file(&self.file, &self.path)?;
        }
        Ok(())
    }

    /// Stores the checksum of a page (`None`: the page is gone). Room must have been reserved.
    pub fn set(&mut self, pgno: u32, checksum: Option<Checksum>) {
        let at = entry_offset(pgno);
        match self.map.get_mut(at..at + 8) {
            Some(entry) => {
                entry.copy_from_slice(&checksum.map_or(0, |c| c.0).to_le_bytes());
                self.last = self.last.max(pgno);
            }
            None => {
                assert!(checksum.is_none(), "page {pgno} has no room in the sidecar {}", self.path.display())
            }
        }
    }

    /// Forgets all pages after `page_count`.
    pub fn truncate(&mut self, page_count: u32) {
        if page_count < self.last {
            self.map[entry_offset(page_count + 1)..entry_offset(self.last) + 8].fill(0);
            self.last = page_count;
        }
    }

    /// The checksum of the whole database: the exclusive-or of all its pages' (LTX specification).
    pub fn fold(&self, page_count: u32) -> Checksum {
        (1..=page_count).filter_map(|pgno| self.get(pgno)).fold(Checksum::EMPTY, Checksum::xor)
    }

    /// Whether the database was written since the mark without a journal, or may have been: what of it is not in the
    /// log only the file can tell.
    pub fn may_have_unlogged_writes(&self) -> bool {
        self.map[UNLOGGED_OFFSET] != 0
    }

    /// Notes that it is. The note survives the process; with `durable` also the host.
    pub fn note_unlogged_writes(&mut self, durable: bool) -> Result<(), ChecksumsError> {
        if !self.may_have_unlogged_writes() {
            self.map[UNLOGGED_OFFSET] = 1;
            if durable {
                self.map.flush_range(0, HEADER_BYTES as usize).map_err(|e| io_error(&self.path, e))?;
            }
        }
        Ok(())
    }

    /// Makes the entries durable, then states `mark`. The database files must be durable up to it already.
    /// `all_logged`: whatever was written without a journal is in the log.
    pub fn persist(
        &mut self,
        name: &DatabaseName,
        mark: Mark,
        record_epoch: Epoch,
        all_logged: bool,
    ) -> Result<(), ChecksumsError> {
        let io = |e| io_error(&self.path, e);
        let applied = self.applied().unwrap_or(mark);
        self.map.flush().map_err(io)?;
        let mut header = encode_header(name, &mark, record_epoch);
        header[UNLOGGED_OFFSET] = if all_logged { 0 } else { self.map[UNLOGGED_OFFSET] };
        self.file.write_all_at(&header, 0).map_err(io)?;
        self.file.sync_data().map_err(io)?;
        (self.mark, self.record_epoch) = (mark, record_epoch);
        self.set_applied(applied);
        Ok(())
    }

    /// Notes how far the files are, for an agent that comes after this one while applications go on.
    pub fn set_applied(&mut self, applied: Mark) {
        let newest = self.applied_at().map_or(0, |(sequence, _)| sequence);
        let sequence = newest + 1;
        let shape = u64::from(applied.page_size) << 32 | u64::from(applied.page_count);
        let words = [sequence, applied.position.txid.0, applied.position.checksum.0, shape];
        let at = APPLIED_OFFSETS[(sequence % 2) as usize];
        let sum = words.iter().fold(APPLIED_SALT, |sum, word| sum.rotate_left(9) ^ word);
        for (i, word) in words.iter().chain([&sum]).enumerate() {
            self.map[at + 8 * i..at + 8 * i + 8].copy_from_slice(&word.to_le_bytes());
        }
    }

    /// How far the files were when that was last noted; `None` where it was not.
    pub fn applied(&self) -> Option<Mark> {
        self.applied_at().map(|(_, applied)| applied)
    }

    fn applied_at(&self) -> Option<(u64, Mark)> {
        let read = |at: usize| {
            let word = |i: usize| {
                let bytes = self.map[at + 8 * i..at + 8 * i + 8].try_into().ok()?;
                Some(u64::from_le_bytes(bytes))
            };
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let sum = words.iter().fold(APPLIED_SALT, |sum, word| sum.rotate_left(9) ^ word);
            let [sequence, txid, checksum, shape] = words;
            let position = Pos { txid: Txid(txid), checksum: Checksum(checksum) };
            let mark = Mark { position, page_size: (shape >> 32) as u32, page_count: shape as u32 };
            (word(4)? == sum && sequence > 0).then_some((sequence, mark))
        };
        APPLIED_OFFSETS.into_iter().filter_map(read).max_by_key(|(sequence, _)| *sequence)
    }
}

fn entry_offset(pgno: u32) -> usize {
    assert!(pgno != 0, "pages are numbered from 1");
    HEADER_BYTES as usize + 8 * (pgno as usize - 1)
}

fn io_error(path: &Path, source: io::Error) -> ChecksumsError {
    ChecksumsError::Io { path: path.to_owned(), source }
}

fn reserve(file: &File, len: u64) -> io::Result<()> {
    use nix::fcntl::{FallocateFlags, fallocate};
    match fallocate(file, FallocateFlags::empty(), 0, len as i64) {
        // A file system without fallocate cannot promise the space; the file still grows.
        Err(nix::errno::Errno::EOPNOTSUPP) => file.set_len(len),
        other => other.map_err(io::Error::from),
    }
}

fn map_file(file: &File, path: &Path) -> Result<MmapMut, ChecksumsError> {
    // SAFETY: the sidecar belongs to this agent alone (the data directory is locked), is only ever grown, and its
    // bytes are read as plain integers, so no other mapping can break an invariant of the slice.
    unsafe { MmapMut::map_mut(file) }.map_err(|e| io_error(path, e))
}

fn encode_header(name: &DatabaseName, mark: &Mark, record_epoch: Epoch) -> [u8; HEADER_BYTES as usize] {
    let mut h = [0; HEADER_BYTES as usize];
    h[0..8].copy_from_slice(&MAGIC);
    h[8..12].copy_from_slice(&mark.page_size.to_le_bytes());
    h[12..16].copy_from_slice(&mark.page_count.to_le_bytes());
    h[16..24].copy_from_slice(&mark.position.txid.0.to_le_bytes());
    h[24..32].copy_from_slice(&mark.position.checksum.0.to_le_bytes());
    h[EPOCH_OFFSET..EPOCH_OFFSET + 8].copy_from_slice(&record_epoch.0.to_le_bytes());
    let text = name.as_str().as_bytes();
    h[NAME_OFFSET - 4..NAME_OFFSET].copy_from_slice(&(text.len() as u32).to_le_bytes());
    h[NAME_OFFSET..NAME_OFFSET + text.len()].copy_from_slice(text);
    let crc = header_crc(&h);
    h[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
    h
}

fn header_crc(header: &[u8; HEADER_BYTES as usize]) -> u32 {
    let mut header = *header;
    header[UNLOGGED_OFFSET] = 0;
    for at in APPLIED_OFFSETS {
        header[at..at + APPLIED_BYTES].fill(0);
    }
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &header[..CRC_OFFSET]) as u32
}

fn decode_header(
    path: &Path,
    h: &[u8; HEADER_BYTES as usize],
) -> Result<(DatabaseName, Mark, Epoch), ChecksumsError> {
    let damaged = |reason| ChecksumsError::Damaged { path: path.to_owned(), reason };
    let u32_at = |at: usize| u32::from_le_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if h[0..8] != MAGIC {
        return Err(damaged("not a page-checksum sidecar of this version"));
    }
    if u32_at(CRC_OFFSET) != header_crc(h) {
        return Err(damaged("header checksum is wrong"));
    }
    let text = h.get(NAME_OFFSET..NAME_OFFSET + u32_at(NAME_OFFSET - 4) as usize);
    let name = text
        .and_then(|t| std::str::from_utf8(t).ok())
        .and_then(|t| DatabaseName::new(t).ok())
        .ok_or_else(|| damaged("names no database"))?;
    let position = Pos { txid: Txid(u64_at(16)), checksum: Checksum(u64_at(24)) };
    let mark = Mark { position, page_size: u32_at(8), page_count: u32_at(12) };
    Ok((name, mark, Epoch(u64_at(EPOCH_OFFSET))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(n: u64) -> Checksum {
        Checksum(1 << 63 | n)
    }

    #[test]
    fn entries_and_mark_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a%2Fb.sum");
        let name = DatabaseName::new("a/b").unwrap();
        let mut sums = Checksums::create(&path, &name).unwrap();
        sums.reserve(20_000).unwrap();
        sums.set(1, Some(sum(5)));
        sums.set(20_000, Some(sum(6)));
        let mark =
            Mark { position: Pos { txid: Txid(7), checksum: sum(3) }, page_size: 512, page_count: 20_000 };
        sums.note_unlogged_writes(true).unwrap();
        sums.persist(&name, mark, Epoch(4), false).unwrap();
        drop(sums);
        let mut sums = Checksums::open(&path).unwrap();
        assert!(sums.may_have_unlogged_writes(), "noted before the mark, and not all of it in the log");
        sums.persist(&name, mark, Epoch(5), true).unwrap();
        assert!(!sums.may_have_unlogged_writes());
        drop(sums);
        assert_eq!(Checksums::read_mark(&path).unwrap(), (name, mark, Epoch(5)));
        let mut sums = Checksums::open(&path).unwrap();
        assert_eq!(sums.record_epoch(), Epoch(5));
        assert_eq!((sums.get(1), sums.get(2), sums.get(20_000)), (Some(sum(5)), None, Some(sum(6))));
        assert_eq!(sums.fold(20_000), sum(5 ^ 6));
        sums.truncate(1);
        assert_eq!((sums.get(1), sums.get(20_000)), (Some(sum(5)), None));
        assert_eq!(sums.get(u32::MAX), None);
    }

    #[test]
    fn the_applied_position_is_the_last_one_that_was_noted_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sum");
        let name = DatabaseName::new("x").unwrap();
        let mut sums = Checksums::create(&path, &name).unwrap();
        sums.reserve(7).unwrap();
        assert_eq!(sums.applied(), None);
        let at =
            |n| Mark { position: Pos { txid: Txid(n), checksum: sum(n) }, page_size: 512, page_count: 7 };
        sums.persist(&name, at(3), Epoch(1), true).unwrap();
        for n in [9, 4, 5] {
            sums.set_applied(at(n));
        }
        drop(sums);
        let mut sums = Checksums::open(&path).unwrap();
        assert_eq!((sums.mark(), sums.applied()), (at(3), Some(at(5))));
        let (newest, _) = sums.applied_at().unwrap();
        sums.map[APPLIED_OFFSETS[(newest % 2) as usize] + 20] ^= 1;
        assert_eq!(sums.applied(), Some(at(4)), "the one before");
    }

    #[test]
    fn a_damaged_header_is_named_and_never_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sum");
        let name = DatabaseName::new("x").unwrap();
        drop(Checksums::create(&path, &name).unwrap());
        let good = std::fs::read(&path).unwrap();
        for at in [0, 9, 30, 77, 81, 4095] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert!(matches!(Checksums::open(&path), Err(ChecksumsError::Damaged { .. })), "byte {at}");
        }
        std::fs::write(&path, &good[..100]).unwrap();
        assert!(matches!(Checksums::open(&path), Err(ChecksumsError::Io { .. })));
    }
}
