//! The write-ahead log: header, frames, cumulative checksum, and a scanner (fileformat2.html section 4).

use crate::header::is_page_size;
use crate::{be32, read_up_to};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;

/// Length of the WAL header in bytes.
pub const WAL_HEADER_BYTES: usize = 32;
/// Length of a frame header in bytes; the page follows.
pub const FRAME_HEADER_BYTES: usize = 24;
/// Magic of a WAL whose checksums read words as little-endian; the lowest bit set means big-endian.
pub const WAL_MAGIC: u32 = 0x377f_0682;
/// The only version of the WAL format.
pub const WAL_VERSION: u32 = 3_007_000;

/// How much a [`Scanner`] reads at once, unless one frame is larger.
const READ_AHEAD_BYTES: usize = 256 * 1024;

/// Both words of the cumulative checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WalChecksum(pub u32, pub u32);

impl WalChecksum {
    /// Continues the checksum over `data`, whose length must be a multiple of 8.
    pub fn update(self, big_endian: bool, data: &[u8]) -> Self {
        assert!(data.len().is_multiple_of(8), "WAL checksums cover whole pairs of words");
        let (mut a, mut b) = (self.0, self.1);
        // Two loops so that the byte order is decided once, not per word.
        if big_endian {
            for pair in data.chunks_exact(8) {
                a = a.wrapping_add(be32(pair, 0)).wrapping_add(b);
                b = b.wrapping_add(be32(pair, 4)).wrapping_add(a);
            }
        } else {
            for pair in data.chunks_exact(8) {
                a = a.wrapping_add(u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]])).wrapping_add(b);
                b = b.wrapping_add(u32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]])).wrapping_add(a);
            }
        }
        WalChecksum(a, b)
    }
}

/// Both salts, which change with every restart of the WAL. Kept as the eight bytes that are in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Salts(pub [u8; 8]);

impl Salts {
    /// Random salts for a WAL that starts from nothing.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0u8; 8];
        random_bytes(&mut bytes)?;
        Ok(Salts(bytes))
    }

    /// Salts for the WAL that follows one with these: the first counts, the second is random.
    pub fn next(self) -> io::Result<Self> {
        let mut bytes = Salts::random()?.0;
        bytes[..4].copy_from_slice(&self.first().wrapping_add(1).to_be_bytes());
        Ok(Salts(bytes))
    }

    /// The first salt as a number.
    pub fn first(self) -> u32 {
        be32(&self.0, 0)
    }

    /// The second salt as a number.
    pub fn second(self) -> u32 {
        be32(&self.0, 4)
    }
}

/// Random bytes from the kernel, for salts and journal nonces.
pub fn random_bytes(buf: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buf.len() {
        let rest = &mut buf[filled..];
        // SAFETY: the pointer and length describe `rest`, which is writable for the duration of the call.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => filled += n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Why a WAL holds nothing that can be read.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// Reading failed.
    #[error("cannot read the WAL: {0}")]
    Io(#[from] io::Error),
    /// The header is not that of a WAL (SQLite then treats the file as empty).
    #[error("the WAL header is not valid: {0}")]
    Invalid(&'static str),
    /// A version that this code does not know (SQLite refuses to open the database).
    #[error("WAL version {0} is not supported (only {WAL_VERSION} is)")]
    Version(u32),
}

/// The header of a WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalHeader {
    /// Whether checksums read words as big-endian.
    pub big_endian: bool,
    /// Bytes in a page.
    pub page_size: u32,
    /// Counts restarts of the WAL.
    pub sequence: u32,
    /// Salts that every frame must repeat.
    pub salts: Salts,
}

impl WalHeader {
    /// A header for a WAL that this host begins: checksums in its own byte order, as SQLite does.
    pub fn new(page_size: u32, sequence: u32, salts: Salts) -> Self {
        WalHeader { big_endian: cfg!(target_endian = "big"), page_size, sequence, salts }
    }

    /// The 32 bytes, and the checksum that the first frame continues.
    pub fn encode(&self) -> ([u8; WAL_HEADER_BYTES], WalChecksum) {
        let mut bytes = [0u8; WAL_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&(WAL_MAGIC | u32::from(self.big_endian)).to_be_bytes());
        bytes[4..8].copy_from_slice(&WAL_VERSION.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.page_size.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.salts.0);
        let checksum = WalChecksum::default().update(self.big_endian, &bytes[..24]);
        bytes[24..28].copy_from_slice(&checksum.0.to_be_bytes());
        bytes[28..32].copy_from_slice(&checksum.1.to_be_bytes());
        (bytes, checksum)
    }

    /// Reads and checks a header; also gives the checksum that the first frame continues.
    pub fn decode(bytes: &[u8; WAL_HEADER_BYTES]) -> Result<(Self, WalChecksum), WalError> {
        let magic = be32(bytes, 0);
        if magic & !1 != WAL_MAGIC {
            return Err(WalError::Invalid("wrong magic"));
        }
        let page_size = be32(bytes, 8);
        if !is_page_size(page_size) {
            return Err(WalError::Invalid("page size is not a power of two from 512 to 65536"));
        }
        let big_endian = magic & 1 == 1;
        let checksum = WalChecksum::default().update(big_endian, &bytes[..24]);
        if checksum != WalChecksum(be32(bytes, 24), be32(bytes, 28)) {
            return Err(WalError::Invalid("wrong checksum"));
        }
        if be32(bytes, 4) != WAL_VERSION {
            return Err(WalError::Version(be32(bytes, 4)));
        }
        let mut salts = [0u8; 8];
        salts.copy_from_slice(&bytes[16..24]);
        let header = WalHeader { big_endian, page_size, sequence: be32(bytes, 12), salts: Salts(salts) };
        Ok((header, checksum))
    }

    /// Bytes in a frame: its header and a page.
    pub fn frame_bytes(&self) -> u64 {
        frame_bytes(self.page_size)
    }
}

/// Bytes in a frame of pages of `page_size` bytes.
pub fn frame_bytes(page_size: u32) -> u64 {
    FRAME_HEADER_BYTES as u64 + u64::from(page_size)
}

/// Offset in the WAL of frame `frame` (the first is 1). The page is [`FRAME_HEADER_BYTES`] further on.
pub fn frame_offset(frame: u32, page_size: u32) -> u64 {
    assert!(frame > 0, "frames are counted from 1");
    WAL_HEADER_BYTES as u64 + u64::from(frame - 1) * frame_bytes(page_size)
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Page that the frame is a version of.
    pub pgno: u32,
    /// In the last frame of a transaction the size of the database in pages, otherwise 0.
    pub commit: u32,
    /// Salts of the WAL it belongs to.
    pub salts: Salts,
    /// Checksum of the WAL up to and including this frame.
    pub checksum: WalChecksum,
}

impl FrameHeader {
    /// Makes the header for `page`, which continues the checksum `before`.
    pub fn new(wal: &WalHeader, before: WalChecksum, pgno: u32, commit: u32, page: &[u8]) -> Self {
        let mut start = [0u8; 8];
        start[..4].copy_from_slice(&pgno.to_be_bytes());
        start[4..].copy_from_slice(&commit.to_be_bytes());
        let checksum = before.update(wal.big_endian, &start).update(wal.big_endian, page);
        FrameHeader { pgno, commit, salts: wal.salts, checksum }
    }

    /// The 24 bytes.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0u8; FRAME_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.pgno.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.commit.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.salts.0);
        bytes[16..20].copy_from_slice(&self.checksum.0.to_be_bytes());
        bytes[20..24].copy_from_slice(&self.checksum.1.to_be_bytes());
        bytes
    }

    /// Reads a header; [`FrameHeader::is_valid`] says whether it belongs.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Self {
        let mut salts = [0u8; 8];
        salts.copy_from_slice(&bytes[8..16]);
        FrameHeader {
            pgno: be32(bytes, 0),
            commit: be32(bytes, 4),
            salts: Salts(salts),
            checksum: WalChecksum(be32(bytes, 16), be32(bytes, 20)),
        }
    }

    /// Whether this is the next frame of `wal` after checksum `before`, with this page.
    pub fn is_valid(&self, wal: &WalHeader, before: WalChecksum, page: &[u8]) -> bool {
        self.pgno > 0
            && self.salts == wal.salts
            && FrameHeader::new(wal, before, self.pgno, self.commit, page).checksum == self.checksum
    }
}

/// A valid frame that a [`Scanner`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its number, from 1.
    pub number: u32,
    /// Page that it is a version of.
    pub pgno: u32,
    /// In the last frame of a transaction the size of the database in pages, otherwise 0.
    pub commit: u32,
}

/// The end of a valid part of a WAL, from where reading or writing goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalEnd {
    /// Number of frames before.
    pub frames: u32,
    /// Offset of the next frame.
    pub offset: u64,
    /// Checksum so far.
    pub checksum: WalChecksum,
    /// Size of the database in pages at the last commit before (0 if there is none).
    pub commit: u32,
}

/// Reads valid frames one after the other.
pub struct Scanner<'f> {
    file: &'f File,
    header: WalHeader,
    end: WalEnd,
    committed: WalEnd,
    buffer: Vec<u8>,
    /// Range of `buffer` that holds file content not yet handed out; it begins at `end.offset`.
    filled: std::ops::Range<usize>,
    /// Range of `buffer` with the page of the last frame.
    page: std::ops::Range<usize>,
}

impl<'f> Scanner<'f> {
    /// Begins with the first frame. `None`: the file is empty, or what is there is no valid WAL header, so that
    /// SQLite takes it as empty.
    pub fn open(file: &'f File) -> Result<Option<Self>, WalError> {
        let mut bytes = [0u8; WAL_HEADER_BYTES];
        if read_up_to(file, &mut bytes, 0)? < WAL_HEADER_BYTES {
            return Ok(None);
        }
        match WalHeader::decode(&bytes) {
            Ok((header, checksum)) => {
                let end = WalEnd { frames: 0, offset: WAL_HEADER_BYTES as u64, checksum, commit: 0 };
                Ok(Some(Self::resume(file, header, end)))
            }
            Err(WalError::Invalid(_)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Goes on from a known end. The caller knows that the WAL still has this header.
    pub fn resume(file: &'f File, header: WalHeader, end: WalEnd) -> Self {
        let frame = header.frame_bytes() as usize;
        let capacity = frame * (READ_AHEAD_BYTES / frame).max(1);
        Scanner { file, header, end, committed: end, buffer: vec![0; capacity], filled: 0..0, page: 0..0 }
    }

    /// Header of the WAL.
    pub fn header(&self) -> &WalHeader {
        &self.header
    }

    /// Where the valid frames read so far end.
    pub fn end(&self) -> WalEnd {
        self.end
    }

    /// Where the last commit frame read so far ends (or where the scan began).
    pub fn committed(&self) -> WalEnd {
        self.committed
    }

    /// Page of the frame that [`Scanner::next_frame`] returned last.
    pub fn page(&self) -> &[u8] {
        &self.buffer[self.page.clone()]
    }

    /// The next frame; `None` when what follows is missing, incomplete or not valid. May be asked again when the
    /// WAL has grown.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame>> {
        let frame_bytes = self.header.frame_bytes() as usize;
        if self.filled.len() < frame_bytes {
            let n = read_up_to(self.file, &mut self.buffer, self.end.offset)?;
            self.filled = 0..n;
        }
        let at = self.filled.start;
        let valid = (self.filled.len() >= frame_bytes).then(|| {
            let mut bytes = [0u8; FRAME_HEADER_BYTES];
            bytes.copy_from_slice(&self.buffer[at..at + FRAME_HEADER_BYTES]);
            FrameHeader::decode(&bytes)
        });
        let page = at + FRAME_HEADER_BYTES..at + frame_bytes;
        let Some(frame) =
            valid.filter(|f| f.is_valid(&self.header, self.end.checksum, &self.buffer[page.clone()]))
        else {
            self.filled = 0..0;
            return Ok(None);
        };
        self.filled.start += frame_bytes;
        self.page = page;
        self.end.frames += 1;
        self.end.offset += frame_bytes as u64;
        self.end.checksum = frame.checksum;
        if frame.commit > 0 {
            self.end.commit = frame.commit;
            self.committed = self.end;
        }
        Ok(Some(Frame { number: self.end.frames, pgno: frame.pgno, commit: frame.commit }))
    }
}

/// The transactions in a WAL that count: all frames up to the last valid commit frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedWal {
    /// Header of the WAL.
    pub header: WalHeader,
    /// Where the last commit ends.
    pub end: WalEnd,
    /// For each page of the database that is in the WAL the number of its newest frame.
    pub newest: BTreeMap<u32, u32>,
}

impl CommittedWal {
    /// Reads a whole WAL. `None`: there is no valid header; a WAL without a commit gives `end.frames == 0`.
    pub fn read(file: &File) -> Result<Option<Self>, WalError> {
        let Some(mut scanner) = Scanner::open(file)? else { return Ok(None) };
        let mut newest = BTreeMap::new();
        let mut open_transaction = Vec::new();
        while let Some(frame) = scanner.next_frame()? {
            open_transaction.push((frame.pgno, frame.number));
            if frame.commit > 0 {
                newest.extend(open_transaction.drain(..));
            }
        }
        let end = scanner.committed();
        newest.retain(|pgno, _| *pgno <= end.commit);
        Ok(Some(CommittedWal { header: *scanner.header(), end, newest }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;
    use std::path::Path;

    fn fill(db: &Connection, rows: u32, bytes: u32) {
        db.execute_batch(&format!(
            "with recursive n(i) as (select 1 union all select i+1 from n where i<{rows})
             insert into t select randomblob({bytes}) from n;"
        ))
        .unwrap();
    }

    /// The database file with the committed frames of its WAL laid over, which is what SQLite reads.
    fn logical(path: &Path) -> Vec<u8> {
        let mut bytes = std::fs::read(path).unwrap();
        let wal = std::fs::read(path.with_extension("db-wal")).unwrap();
        let file = File::open(path.with_extension("db-wal")).unwrap();
        let committed = CommittedWal::read(&file).unwrap().unwrap();
        let size = committed.header.page_size;
        bytes.resize(committed.end.commit as usize * size as usize, 0);
        for (pgno, frame) in committed.newest {
            let from = frame_offset(frame, size) as usize + FRAME_HEADER_BYTES;
            let to = (pgno as usize - 1) * size as usize;
            bytes[to..to + size as usize].copy_from_slice(&wal[from..from + size as usize]);
        }
        bytes
    }

    #[test]
    fn the_committed_prefix_is_what_sqlite_checkpoints() {
        for shift in 9..=16 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            let db = Connection::open(&path).unwrap();
            db.pragma_update(None, "page_size", 1u32 << shift).unwrap();
            db.pragma_update(None, "journal_mode", "wal").unwrap();
            db.execute_batch("pragma wal_autocheckpoint=0; create table t(a); pragma cache_size=5;").unwrap();
            fill(&db, 50, 700);
            // A restart leaves older frames behind the new ones.
            db.execute_batch("pragma wal_checkpoint;").unwrap();
            // Spilled pages are rewritten in place and get new frame headers at the commit.
            db.execute_batch("begin").unwrap();
            fill(&db, 300, 900);
            db.execute_batch("update t set a = randomblob(10) where rowid % 3 = 0; commit;").unwrap();
            db.execute_batch("delete from t where rowid % 2").unwrap();
            let ours = logical(&path);
            // An uncommitted tail does not count.
            db.execute_batch("begin").unwrap();
            fill(&db, 300, 900);
            assert_eq!(logical(&path), ours);
            db.execute_batch("rollback; pragma wal_checkpoint(truncate);").unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), ours);
            assert!(Scanner::open(&File::open(path.with_extension("db-wal")).unwrap()).unwrap().is_none());
        }
    }

    #[test]
    fn a_scan_resumes_where_another_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Connection::open(&path).unwrap();
        db.execute_batch("pragma journal_mode=wal; create table t(a);").unwrap();
        let file = File::open(path.with_extension("db-wal")).unwrap();
        let mut first = Scanner::open(&file).unwrap().unwrap();
        while first.next_frame().unwrap().is_some() {}
        let (header, end) = (*first.header(), first.committed());
        assert_eq!(end.offset, std::fs::metadata(path.with_extension("db-wal")).unwrap().len());
        fill(&db, 20, 1000);
        let mut second = Scanner::resume(&file, header, end);
        let mut frames = 0;
        while let Some(frame) = second.next_frame().unwrap() {
            assert_eq!(Some(frame), first.next_frame().unwrap());
            assert_eq!(first.page(), second.page());
            frames += 1;
        }
        assert!(frames > 5);
        assert_eq!(first.committed(), second.committed());
        assert_eq!(CommittedWal::read(&file).unwrap().unwrap().end, second.committed());
    }

    #[test]
    fn frames_encoded_here_are_those_of_sqlite_in_both_byte_orders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Connection::open(&path).unwrap();
        db.execute_batch("pragma journal_mode=wal; create table t(a);").unwrap();
        fill(&db, 20, 1000);
        let wal_path = path.with_extension("db-wal");
        let original = std::fs::read(&wal_path).unwrap();
        for big_endian in [cfg!(target_endian = "big"), cfg!(target_endian = "little")] {
            let file = File::open(&wal_path).unwrap();
            let mut scanner = Scanner::open(&file).unwrap().unwrap();
            let header = WalHeader { big_endian, ..*scanner.header() };
            let (mut bytes, mut checksum) = (Vec::new(), WalChecksum::default());
            while let Some(frame) = scanner.next_frame().unwrap() {
                if frame.number == 1 {
                    let (encoded, start) = header.encode();
                    bytes.extend(encoded);
                    checksum = start;
                }
                let out = FrameHeader::new(&header, checksum, frame.pgno, frame.commit, scanner.page());
                checksum = out.checksum;
                bytes.extend(out.encode());
                bytes.extend(scanner.page());
            }
            if big_endian == cfg!(target_endian = "big") {
                assert_eq!(bytes, original);
            } else {
                // SQLite itself must read the other byte order: give it a copy of the pair.
                let copy = dir.path().join("b.db");
                std::fs::copy(&path, &copy).unwrap();
                std::fs::write(copy.with_extension("db-wal"), &bytes).unwrap();
                let rows: u32 = Connection::open(&copy)
                    .unwrap()
                    .query_row("select count(*) from t", [], |r| r.get(0))
                    .unwrap();
                assert_eq!(rows, 20);
            }
        }
    }

    #[test]
    fn a_flipped_bit_ends_the_valid_prefix_at_its_frame() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Connection::open(&path).unwrap();
        db.execute_batch("pragma journal_mode=wal; create table t(a);").unwrap();
        fill(&db, 20, 1000);
        let good = std::fs::read(path.with_extension("db-wal")).unwrap();
        let copy = dir.path().join("copy");
        let frame = 4096 + FRAME_HEADER_BYTES;
        for at in (0..good.len()).step_by(97) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&copy, &bad).unwrap();
            let file = File::open(&copy).unwrap();
            if at < WAL_HEADER_BYTES {
                assert!(Scanner::open(&file).unwrap().is_none());
                continue;
            }
            let mut scanner = Scanner::open(&file).unwrap().unwrap();
            while scanner.next_frame().unwrap().is_some() {}
            assert_eq!(scanner.end().frames as usize, (at - WAL_HEADER_BYTES) / frame);
        }
        for cut in [0, 1, 31, 32, 33, 55, 56, 32 + frame - 1, 32 + frame] {
            std::fs::write(&copy, &good[..cut]).unwrap();
            let committed = CommittedWal::read(&File::open(&copy).unwrap()).unwrap();
            assert_eq!(committed.is_some(), cut >= 32);
        }
    }

    #[test]
    fn another_version_is_an_error_and_not_an_empty_wal() {
        let (mut bytes, _) = WalHeader::new(4096, 0, Salts::random().unwrap()).encode();
        bytes[7] ^= 1;
        let checksum = WalChecksum::default().update(cfg!(target_endian = "big"), &bytes[..24]);
        bytes[24..28].copy_from_slice(&checksum.0.to_be_bytes());
        bytes[28..32].copy_from_slice(&checksum.1.to_be_bytes());
        assert!(matches!(WalHeader::decode(&bytes), Err(WalError::Version(3_007_001))));
    }

    #[test]
    fn salts_count_and_change() {
        let salts = Salts([0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4]);
        let next = salts.next().unwrap();
        assert_eq!((next.first(), salts.second()), (0, 0x0102_0304));
        assert_ne!(Salts::random().unwrap(), Salts::random().unwrap());
    }
}
