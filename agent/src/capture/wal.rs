//! Where a commit is seen in WAL mode: the write of a frame whose header states the database size.
//!
//! SQLite writes a frame as two calls, 24 header bytes and the page (WAL file format, section 4 of "Database File
//! Format"); the kernel may cut each at the borders of its own pages, so a frame arrives in consecutive pieces. A
//! commit frame is kept back until all of it has arrived and the log has the transaction; then it is written. A refusal
//! or a crash in between leaves no valid commit in the WAL. Frame checksums are not looked at here: SQLite may rewrite
//! the headers of a spilled transaction after its commit frame, while the pages are final (walRewriteChecksums).

pub mod published;
mod reattach;

pub use reattach::{Known, Newest};

use super::{CaptureError, Commit, Logged, log_transaction};
use crate::database::checksums::Mark;
use crate::database::{Database, State};
use crate::log::WalEnd;
use ltx::page_checksum;
use sqlite_file::wal::{CommittedWal, WalError, WalHeader, frame_bytes, frame_offset};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;

const HEADER_BYTES: u64 = 32;
const FRAME_HEADER_BYTES: u64 = 24;

/// What is known of a database's WAL file.
#[derive(Debug, Default)]
pub struct WalCapture {
    /// Page size and salts of the running generation.
    generation: Option<Generation>,
    /// Frames after the last commit: offset of the frame header and its page.
    pending: BTreeMap<u64, u32>,
    /// Newest committed frame of each page.
    committed: HashMap<u32, u64>,
    /// Offset after the last commit frame.
    committed_end: u64,
    /// What `committed_end` was when the door let this generation end. It may go on nevertheless.
    ended_at: Option<u64>,
    /// The frame that is arriving.
    arriving: Option<Arriving>,
    stale: Stale,
    /// Offset and error number of a frame that was refused. The kernel reports a short write when the first piece of it
    /// had been taken, and SQLite then writes the rest: that must not succeed.
    refused: Option<(u64, i32)>,
    /// The last captured transaction. Its writer may die before it publishes it in the wal-index: then SQLite never had
    /// it, and its frames are written over or left behind.
    last: Option<LastCommit>,
    /// What the next transaction has to put back.
    reverted: Reverted,
    /// Header of a commit frame that is not in the file until followers have the transaction; `arriving` has the frame.
    withheld: Option<(u64, [u8; FRAME_HEADER_BYTES as usize])>,
}

/// Pages of transactions that were captured and never published, and of what somebody may have written: the next
/// transaction has to put them back.
#[derive(Debug, Default)]
struct Reverted {
    pages: BTreeSet<u32>,
    /// There are more of them, and only the log's last record says which.
    unknown: bool,
    /// What the log had before the first such transaction.
    after: Option<Mark>,
    /// There are some of which no transaction tells.
    untold: bool,
}

impl Reverted {
    fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// What is needed to take back the last captured transaction.
#[derive(Debug)]
struct LastCommit {
    /// Offset of its first frame.
    start: u64,
    /// Its pages, and where each had its newest committed frame before.
    before: Vec<(u32, Option<u64>)>,
    /// What the log had before.
    after: Mark,
}

/// Whether the fields above still say what is in the file.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Stale {
    #[default]
    No,
    /// The agent wrote to the file, from the log: read it again.
    FromLog,
    /// It was written in a way that was not followed: read it again and capture what was committed.
    Foreign,
}

/// A frame of which not all has arrived.
#[derive(Debug)]
struct Arriving {
    /// Offset of its header.
    at: u64,
    /// What arrived and is not in the file as it is: the start of a header, or everything of a commit frame. The file has
    /// it with the header veiled, for an agent that comes after this one.
    held: Vec<u8>,
    /// Bytes that arrived.
    filled: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Generation {
    page_size: u32,
    salt1: u32,
    salt2: u32,
}

impl Generation {
    /// Whether a frame header has the salts of this generation.
    fn owns(&self, header: &[u8; FRAME_HEADER_BYTES as usize]) -> bool {
        header[8..12] == self.salt1.to_be_bytes() && header[12..16] == self.salt2.to_be_bytes()
    }
}

/// Makes bytes of a frame header unrecognisable, or recognisable again: with other salts it is no frame for SQLite.
fn veil(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|b| *b = !*b);
}

impl WalCapture {
    /// Forgets the file, which is empty or gone; not the pages that the next transaction has to put back.
    pub fn reset(&mut self) {
        self.take_back_last();
        *self = self.with_put_back(WalCapture::default());
    }

    /// As another file is read, with the pages to put back of this one.
    fn with_put_back(&mut self, other: WalCapture) -> WalCapture {
        WalCapture { reverted: std::mem::take(&mut self.reverted), ..other }
    }

    /// The next transaction has to put the pages of the last one back. Gives what the log had before that one; `None`: there is
    /// none that may be unpublished.
    fn take_back_last(&mut self) -> Option<Mark> {
        let last = self.last.take()?;
        self.reverted.after.get_or_insert(last.after);
        for (pgno, before) in last.before {
            self.reverted.pages.insert(pgno);
            match before {
                Some(offset) => self.committed.insert(pgno, offset),
                None => self.committed.remove(&pgno),
            };
        }
        self.committed_end = last.start;
        Some(last.after)
    }

    /// A transaction has put all pages back.
    fn has_put_back(&mut self) {
        self.reverted = Reverted::default();
    }

    /// The agent wrote to the file what the log has.
    pub fn mark_written_from_log(&mut self) {
        if self.stale == Stale::No {
            self.stale = Stale::FromLog;
        }
    }

    /// It was, or is about to be, written in a way that is not followed.
    pub fn mark_written_by_others(&mut self) {
        self.stale = Stale::Foreign;
    }

    /// Whether the last write was a commit that must not be answered yet: see [`publish_held`].
    pub fn withholds_commit(&self) -> bool {
        self.withheld.is_some()
    }

    /// What is withheld is never published by its writer, whose write fails with this number; it comes from the log.
    pub fn abandon_held(&mut self, errno: i32) {
        if let Some((at, _)) = self.withheld.take() {
            self.arriving = None;
            self.refused = Some((at, errno));
        }
        self.mark_written_from_log();
    }

    /// All of this generation is in the log and in the database file: the next one may overwrite it. Until that has
    /// begun the file still has it, so it is not forgotten: it would be read again while it is overwritten.
    pub fn may_end(&mut self) {
        self.ended_at = Some(self.committed_end);
    }

    /// Whether nothing was captured since it may end.
    pub fn has_ended(&self) -> bool {
        self.ended_at == Some(self.committed_end)
    }

    /// Offset of the newest committed frame header of a page.
    pub fn frame_of(&self, pgno: u32) -> Option<u64> {
        self.committed.get(&pgno).copied()
    }

    /// Pages that have a committed frame.
    pub fn committed_pages(&self) -> impl Iterator<Item = u32> {
        self.committed.keys().copied()
    }

    /// Number of frames up to the last commit, while they count.
    pub fn committed_frames(&self) -> u64 {
        if self.has_ended() { 0 } else { self.frames() }
    }

    fn frames(&self) -> u64 {
        match self.generation {
            Some(g) if self.committed_end > HEADER_BYTES => {
                (self.committed_end - HEADER_BYTES) / frame_bytes(g.page_size)
            }
            _ => 0,
        }
    }

    /// Puts what is kept back over `data`, read from the file at `offset`: a reader must see what was written.
    pub fn overlay(&self, offset: u64, data: &mut [u8]) {
        let Some(Arriving { at, held, .. }) = &self.arriving else { return };
        let (from, to) = ((*at).max(offset), (at + held.len() as u64).min(offset + data.len() as u64));
        if from < to {
            let source = &held[(from - at) as usize..(to - at) as usize];
            data[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
        }
    }

    /// End of the file as applications must see it.
    pub fn visible_len(&self, len: u64) -> u64 {
        self.arriving.as_ref().map_or(len, |f| len.max(f.at + f.held.len() as u64))
    }

    /// End of what has arrived of the frames after the last commit.
    fn pending_end(&self, frame_bytes: u64) -> u64 {
        self.pending.last_key_value().map_or(self.committed_end, |(at, _)| at + frame_bytes)
    }

    fn frame_header_at(&self, offset: u64) -> bool {
        self.generation.is_some_and(|g| {
            offset >= HEADER_BYTES && (offset - HEADER_BYTES).is_multiple_of(frame_bytes(g.page_size))
        })
    }

    fn start_generation(&mut self, header: &WalHeader) {
        let generation = Generation {
            page_size: header.page_size,
            salt1: header.salts.first(),
            salt2: header.salts.second(),
        };
        *self = WalCapture { generation: Some(generation), committed_end: HEADER_BYTES, ..Self::default() };
    }

    /// Reads the file's committed frames again, if something was written that was not followed. Gives the size in
    /// pages at the last commit when it did.
    pub fn refresh(&mut self, file: &File) -> std::io::Result<Option<u32>> {
        if self.stale == Stale::No {
            return Ok(None);
        }
        let mut fresh = WalCapture::default();
        let mut page_count = None;
        match CommittedWal::read(file) {
            Ok(Some(wal)) => {
                fresh.start_generation(&wal.header);
                let offset = |(pgno, frame)| (pgno, frame_offset(frame, wal.header.page_size));
                fresh.committed = wal.newest.into_iter().map(offset).collect();
                fresh.committed_end = wal.end.offset;
                page_count = (wal.end.frames > 0).then_some(wal.end.commit);
            }
            Ok(None) | Err(WalError::Invalid(_) | WalError::Version(_)) => {}
            Err(WalError::Io(e)) => return Err(e),
        }
        self.take_back_last();
        *self = self.with_put_back(fresh);
        Ok(page_count)
    }
}

/// An application wrote to the WAL. `Ok(Some)`: this write committed a transaction.
pub fn written(
    db: &Database,
    st: &mut State,
    file: &File,
    offset: u64,
    data: &[u8],
) -> Result<Option<Logged>, CaptureError> {
    db.check_writable()?;
    st.check_health()?;
    let io = |source| db.wal_error(source);
    match st.wal.stale {
        Stale::No => {}
        Stale::FromLog => drop(st.wal.refresh(file).map_err(io)?),
        Stale::Foreign => drop(capture_foreign(db, st, file)?),
    }

    if offset == 0 && data.len() as u64 == HEADER_BYTES {
        let header: &[u8; 32] = data.try_into().map_err(|_| CaptureError::NotADatabase("WAL header"))?;
        let Ok((header, _)) = WalHeader::decode(header) else {
            return not_followed(db, st, file, offset, data);
        };
        settle_unpublished(db, st)?;
        file.write_all_at(data, 0).map_err(io)?;
        st.wal.start_generation(&header);
        return Ok(None);
    }
    let Some(generation) = st.wal.generation else { return not_followed(db, st, file, offset, data) };
    let frame_bytes = frame_bytes(generation.page_size);
    let end = offset + data.len() as u64;
    let starts_frame = st.wal.frame_header_at(offset) && data.len() as u64 <= FRAME_HEADER_BYTES;
    if let Some((at, errno)) = st.wal.refused {
        if !(starts_frame && offset <= at) {
            return Err(CaptureError::RefusedBefore { errno });
        }
        st.wal.refused = None;
    }

    if st.wal.arriving.as_ref().is_some_and(|f| offset == f.at + f.filled && end <= f.at + frame_bytes) {
        return continued(db, st, file, frame_bytes, data);
    }
    if starts_frame && offset >= st.wal.committed_end {
        // What had arrived of another frame was never completed: SQLite gave it up.
        st.wal.arriving = Some(Arriving { at: offset, held: Vec::new(), filled: 0 });
        return continued(db, st, file, frame_bytes, data);
    }
    if st
        .wal
        .last
        .as_ref()
        .is_some_and(|last| offset == last.start + FRAME_HEADER_BYTES && offset < st.wal.committed_end)
    {
        // Header rewrites have no page: this is another transaction in the place of the last one.
        take_back_last(st, file).map_err(io)?;
        return continued(db, st, file, frame_bytes, data);
    }
    if let Some(frame) = arrived_before(&st.wal, file, offset).map_err(io)? {
        if let Some(number) = frame.held.first_chunk::<4>().filter(|_| frame.filled >= FRAME_HEADER_BYTES) {
            st.wal.pending.split_off(&frame.at);
            st.wal.pending.insert(frame.at, u32::from_be_bytes(*number));
        }
        st.wal.arriving = Some(frame);
        return continued(db, st, file, frame_bytes, data);
    }
    // A rewrite of header checksums up to the last commit, or of pages that a spilled transaction changed again.
    let known = end <= st.wal.committed_end
        || offset >= st.wal.committed_end && end <= st.wal.pending_end(frame_bytes);
    if known {
        file.write_all_at(data, offset).map_err(io)?;
        return Ok(None);
    }
    not_followed(db, st, file, offset, data)
}

/// Whether a write ends the last commit.
pub fn ends_commit(st: &State, offset: u64, data: &[u8]) -> bool {
    offset + data.len() as u64 == st.wal.committed_end
}

/// Whether a write that is asked again was done before: the file has it, and it is committed.
pub fn already_written(st: &State, file: &File, offset: u64, data: &[u8]) -> std::io::Result<bool> {
    if offset + data.len() as u64 > st.wal.committed_end {
        return Ok(false);
    }
    let mut there = vec![0; data.len()];
    file.read_exact_at(&mut there, offset)?;
    Ok(there == data)
}

/// A frame after the last commit whose beginning arrived while another agent ran, if `offset` goes on with one that has to
/// be held.
fn arrived_before(wal: &WalCapture, file: &File, offset: u64) -> std::io::Result<Option<Arriving>> {
    let Some(generation) = wal.generation.filter(|_| offset > wal.committed_end) else { return Ok(None) };
    let filled = (offset - HEADER_BYTES) % frame_bytes(generation.page_size);
    let at = offset - filled;
    if filled == 0 || at < wal.committed_end || file.metadata()?.len() < offset {
        return Ok(None);
    }
    let mut held = vec![0; filled as usize];
    file.read_exact_at(&mut held, at)?;
    match held.first_chunk_mut::<{ FRAME_HEADER_BYTES as usize }>() {
        None => veil(&mut held),
        Some(header) => {
            if generation.owns(header) {
                if header[4..8] == [0; 4] || !wal.pending.contains_key(&at) {
                    return Ok(None);
                }
                // A commit in the place of an unpublished one, whose header was let through as a rewrite.
                let mut veiled = *header;
                veil(&mut veiled);
                file.write_all_at(&veiled, at)?;
            } else {
                veil(header);
                if !generation.owns(header) {
                    return Ok(None);
                }
            }
        }
    }
    Ok(Some(Arriving { at, held, filled }))
}

/// The last captured transaction was never published: its place is taken by one whose first header was written just
/// now, and whose page arrives.
fn take_back_last(st: &mut State, file: &File) -> std::io::Result<()> {
    if st.wal.take_back_last().is_none() {
        return Ok(());
    }
    let start = st.wal.committed_end;
    let mut header = vec![0; FRAME_HEADER_BYTES as usize];
    file.read_exact_at(&mut header, start)?;
    st.wal.pending.clear();
    st.wal.pending.insert(start, u32::from_be_bytes([header[0], header[1], header[2], header[3]]));
    let commits = header[4..8] != [0; 4];
    if commits {
        // Kept back like any commit frame.
        let mut veiled = header.clone();
        veil(&mut veiled);
        file.write_all_at(&veiled, start)?;
    } else {
        header.clear();
    }
    st.wal.arriving = Some(Arriving { at: start, held: header, filled: FRAME_HEADER_BYTES });
    Ok(())
}

/// The WAL starts anew or goes: everything published is in the database file. What was captured and is not there was
/// never published, and is taken back by a transaction of its own.
pub fn settle_unpublished(db: &Database, st: &mut State) -> Result<(), CaptureError> {
    if !db.may_write() {
        // They are applied again: see [`crate::database`].
        return Ok(());
    }
    let page_count = st.wal.take_back_last().map_or(st.page_count, |before| before.page_count);
    if st.wal.reverted.is_empty() || st.page_size == 0 {
        return Ok(());
    }
    let pages = st.wal.reverted.pages.clone();
    let file = st.database_file(db)?;
    let mut page = vec![0; st.page_size as usize];
    st.open_checksums(db)?;
    let mut published = true;
    for pgno in &pages {
        db.read_database_page(&file, *pgno, &mut page)?;
        let expected = st.checksums().get(*pgno);
        published &= expected.is_none_or(|sum| sum == page_checksum(*pgno, &page));
    }
    if !published {
        tracing::info!(database = %db.name, "a writer died before it published its transaction: taken back");
        let pages: Vec<u32> = pages.into_iter().filter(|pgno| *pgno <= page_count).collect();
        let commit =
            Commit { page_size: st.page_size, page_count, pages: &pages, wal: None, may_hold: false };
        log_transaction(db, st, &commit, &mut |pgno, buf| db.read_database_page(&file, pgno, buf))?;
    }
    st.wal.has_put_back();
    Ok(())
}

/// The next piece of the frame that is arriving. A frame that fails is refused as a whole.
fn continued(
    db: &Database,
    st: &mut State,
    file: &File,
    frame_bytes: u64,
    piece: &[u8],
) -> Result<Option<Logged>, CaptureError> {
    let at = st.wal.arriving.as_ref().map_or(st.wal.committed_end, |frame| frame.at);
    take_piece(db, st, file, frame_bytes, piece).inspect_err(|e| {
        st.wal.pending.split_off(&at);
        st.wal.refused = Some((at, e.errno()));
    })
}

fn take_piece(
    db: &Database,
    st: &mut State,
    file: &File,
    frame_bytes: u64,
    piece: &[u8],
) -> Result<Option<Logged>, CaptureError> {
    let io = |source| db.wal_error(source);
    let Some(mut frame) = st.wal.arriving.take() else { return Ok(None) };
    let before = frame.filled;
    frame.filled += piece.len() as u64;
    if before >= FRAME_HEADER_BYTES && frame.held.is_empty() {
        file.write_all_at(piece, frame.at + before).map_err(io)?;
    } else {
        // Now, so that afterwards a full disk cannot keep the frame out of the file.
        write_veiled(file, &frame, before, piece).map_err(io)?;
        frame.held.extend_from_slice(piece);
        if before < FRAME_HEADER_BYTES && frame.filled >= FRAME_HEADER_BYTES {
            let word = |at: usize| {
                u32::from_be_bytes([
                    frame.held[at],
                    frame.held[at + 1],
                    frame.held[at + 2],
                    frame.held[at + 3],
                ])
            };
            let (pgno, page_count) = (word(0), word(4));
            // Frames from here on belonged to a transaction, or a savepoint, that was rolled back.
            st.wal.pending.split_off(&frame.at);
            st.wal.pending.insert(frame.at, pgno);
            if page_count == 0 {
                file.write_all_at(&frame.held, frame.at).map_err(io)?;
                frame.held.clear();
            }
        }
        if frame.filled == frame_bytes && !frame.held.is_empty() {
            return commit(db, st, file, frame.at, &frame.held);
        }
    }
    if frame.filled < frame_bytes {
        st.wal.arriving = Some(frame);
    }
    Ok(None)
}

/// Writes a piece so that it is no valid frame, but can be read back.
fn write_veiled(file: &File, frame: &Arriving, before: u64, piece: &[u8]) -> std::io::Result<()> {
    let of_header = (FRAME_HEADER_BYTES.saturating_sub(before) as usize).min(piece.len());
    let (header, page) = piece.split_at(of_header);
    if !header.is_empty() {
        let mut veiled = header.to_vec();
        veil(&mut veiled);
        file.write_all_at(&veiled, frame.at + before)?;
    }
    if !page.is_empty() {
        file.write_all_at(page, frame.at + before + of_header as u64)?;
    }
    Ok(())
}

/// A write that is not how SQLite writes: the file is read instead, when the writer syncs, closes or writes again.
fn not_followed(
    db: &Database,
    st: &mut State,
    file: &File,
    offset: u64,
    data: &[u8],
) -> Result<Option<Logged>, CaptureError> {
    let io = |source| db.wal_error(source);
    if let Some(frame) = st.wal.arriving.take()
        && !frame.held.is_empty()
    {
        file.write_all_at(&frame.held, frame.at).map_err(io)?;
    }
    st.wal.stale = Stale::Foreign;
    file.write_all_at(data, offset).map_err(io)?;
    Ok(None)
}

/// All of a commit frame has arrived: captures the transaction, then writes the frame.
fn commit(
    db: &Database,
    st: &mut State,
    file: &File,
    at: u64,
    frame: &[u8],
) -> Result<Option<Logged>, CaptureError> {
    let Some(generation) = st.wal.generation else {
        return Err(CaptureError::NotADatabase("WAL frame without a WAL header"));
    };
    let page_count = u32::from_be_bytes([frame[4], frame[5], frame[6], frame[7]]);
    let page = &frame[FRAME_HEADER_BYTES as usize..];
    let end_offset = at + frame_bytes(generation.page_size);
    // Later frames of a page win.
    let newest: BTreeMap<u32, u64> = st.wal.pending.iter().map(|(offset, pgno)| (*pgno, *offset)).collect();
    let mut pages: Vec<u32> = newest.keys().copied().collect();
    let before = newest.keys().map(|pgno| (*pgno, st.wal.committed.get(pgno).copied())).collect();
    let last = LastCommit {
        start: st.wal.pending.first_key_value().map_or(at, |(offset, _)| *offset),
        before,
        after: st.logged_mark(),
    };
    if st.wal.reverted.pages.iter().any(|pgno| !newest.contains_key(pgno)) {
        pages.extend(st.wal.reverted.pages.iter().filter(|pgno| !newest.contains_key(pgno)));
        pages.sort_unstable();
    }
    let committed = std::mem::take(&mut st.wal.committed);
    let grown = st.page_count + 1..=page_count;
    if grown.clone().any(|pgno| !newest.contains_key(&pgno)) {
        pages.extend(grown.filter(|pgno| !newest.contains_key(pgno)));
        pages.sort_unstable();
    }
    let wal = WalEnd { salt1: generation.salt1, salt2: generation.salt2, end_offset };
    let commit =
        Commit { page_size: generation.page_size, page_count, pages: &pages, wal: Some(wal), may_hold: true };
    let database = if pages.len() > newest.len() { st.database_file(db).ok() } else { None };
    let mut read = |pgno: u32, buf: &mut [u8]| match newest.get(&pgno) {
        Some(offset) if *offset == at => {
            buf.copy_from_slice(page);
            Ok(())
        }
        Some(offset) => file.read_exact_at(buf, offset + FRAME_HEADER_BYTES).map_err(|e| db.wal_error(e)),
        // A page to put back, or one that was in the file before this history began: SQLite writes every page it
        // adds to the WAL.
        None if committed.contains_key(&pgno) => {
            file.read_exact_at(buf, committed[&pgno] + FRAME_HEADER_BYTES).map_err(|e| db.wal_error(e))
        }
        None => match &database {
            Some(database) => db.read_database_page(database, pgno, buf),
            None => {
                buf.fill(0);
                Ok(())
            }
        },
    };
    let logged = log_transaction(db, st, &commit, &mut read);
    st.wal.committed = committed;
    let logged = logged?;
    if db.hold_of(st, logged, false).is_some() {
        let mut header = [0; FRAME_HEADER_BYTES as usize];
        header.copy_from_slice(&frame[..FRAME_HEADER_BYTES as usize]);
        st.wal.withheld = Some((at, header));
        st.wal.arriving = Some(Arriving { at, held: frame.to_vec(), filled: frame.len() as u64 });
    } else {
        write_commit_header(db, st, file, at, &frame[..FRAME_HEADER_BYTES as usize])?;
    }
    st.wal.pending.clear();
    st.wal.committed.extend(newest);
    st.wal.committed_end = end_offset;
    st.wal.last = Some(last);
    st.wal.has_put_back();
    Ok(logged)
}

/// Makes a commit frame valid.
fn write_commit_header(
    db: &Database,
    st: &mut State,
    file: &File,
    at: u64,
    header: &[u8],
) -> Result<(), CaptureError> {
    // The log has the transaction. If this write fails the file lacks it until recovery puts it back, so the
    // database must not be used on.
    if let Err(e) = file.write_all_at(header, at) {
        let reason = format!(
            "{}: the logged transaction {} could not be written: {e}",
            db.paths.wal.display(),
            st.position.txid
        );
        st.quarantine(db, reason);
        return Err(db.wal_error(e));
    }
    Ok(())
}

/// Followers have the transaction of the frame that is withheld.
pub fn publish_held(db: &Database, st: &mut State, file: &File) -> Result<(), CaptureError> {
    let Some((at, header)) = st.wal.withheld.take() else { return Ok(()) };
    st.wal.arriving = None;
    write_commit_header(db, st, file, at, &header)
}

/// Follows a WAL that was written in another way than SQLite's (a copy of database and WAL put in place): captures
/// what has been committed in it since the last known commit.
pub fn capture_foreign(db: &Database, st: &mut State, file: &File) -> Result<Option<Logged>, CaptureError> {
    if st.wal.stale != Stale::Foreign {
        return Ok(None);
    }
    let io = |source| db.wal_error(source);
    let page_count = st.wal.refresh(file).map_err(io)?;
    let (Some(generation), Some(page_count)) = (st.wal.generation, page_count) else { return Ok(None) };
    let committed = std::mem::take(&mut st.wal.committed);
    let mut pages: Vec<u32> = committed.keys().copied().chain(st.page_count + 1..=page_count).collect();
    pages.sort_unstable();
    pages.dedup();
    let end_offset = st.wal.committed_end;
    let wal = WalEnd { salt1: generation.salt1, salt2: generation.salt2, end_offset };
    let commit = Commit {
        page_size: generation.page_size,
        page_count,
        pages: &pages,
        wal: Some(wal),
        may_hold: false,
    };
    let database = st.database_file(db)?;
    let mut read = |pgno: u32, buf: &mut [u8]| match committed.get(&pgno) {
        Some(offset) => file.read_exact_at(buf, offset + FRAME_HEADER_BYTES).map_err(io),
        None => db.read_database_page(&database, pgno, buf),
    };
    let result = log_transaction(db, st, &commit, &mut read);
    st.wal.committed = committed;
    result
}

#[cfg(test)]
#[path = "wal_tests.rs"]
mod tests;
