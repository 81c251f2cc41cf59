//! Commits that SQLite has published in the wal-index, where nobody saw the writes: behind the preload door frames go
//! to the file directly, and the agent reads them afterwards. A commit that is held ([`capture_held`]) is captured before
//! SQLite publishes it.
//!
//! The wal-index says how far the WAL counts (walformat.html, section 2.1); what lies between that and the last captured
//! commit is captured. A generation of the WAL ends only when the door says that all of it is in the log.

use super::{FRAME_HEADER_BYTES, Generation, HEADER_BYTES, LastCommit, Stale, WalCapture};
use crate::apply::WalFrames;
use crate::capture::{CaptureError, Commit, Logged, log_transaction};
use crate::database::checksums::Mark;
use crate::database::{Database, State};
use crate::log::WalEnd;
use sqlite_file::wal::{FrameHeader, Salts, frame_bytes, frame_offset};
use sqlite_file::wal_index::IndexHeader;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// So many commits that wait together become a transaction each; more become one, so that the agent catches up with a
/// fast writer.
const COMMITS_APART_MAX: usize = 2;

/// A commit frame whose header is not in the file yet. Its page is.
#[derive(Debug, Clone, Copy)]
pub struct HeldCommit {
    /// Offset of the frame.
    pub offset: u64,
    /// The header's bytes.
    pub header: [u8; FRAME_HEADER_BYTES as usize],
}

/// Newest frames of the pages of one or more commits.
#[derive(Debug, Default)]
struct Frames {
    newest: BTreeMap<u32, u64>,
    page_count: u32,
    end: u64,
}

/// Captures what the wal-index publishes and the log does not have. `Ok(None)`: nothing new.
pub fn capture_published(
    db: &Database,
    st: &mut State,
    file: &File,
    index: &IndexHeader,
) -> Result<Option<Logged>, CaptureError> {
    // Read from its start, as after a restart of the agent, a WAL has commits that the log has too: apart they would take
    // pages back to what they were, and forth again.
    // So are pages that are compared wherever they are: the file may have them of the newest commit.
    let apart = st.wal.generation.is_some() && st.wal.reverted.is_empty();
    let apart_max = if apart { COMMITS_APART_MAX } else { 1 };
    if !take_up(db, st, file, index)? {
        return Ok(None);
    }
    let published = frame_offset(index.max_frame + 1, index.page_size);
    if st.wal.last.as_ref().is_some_and(|last| published > last.start) {
        settle_last(db, st, file, published)?;
    }
    if published <= st.wal.committed_end {
        return Ok(None);
    }
    let mut commits = Vec::new();
    let mut frames = Frames::default();
    let mut at = st.wal.committed_end;
    while at < published {
        let header = frame_header(db, st, file, at)?;
        frames.newest.insert(header.pgno, at);
        at += frame_bytes(index.page_size);
        if header.commit > 0 {
            frames.page_count = header.commit;
            frames.end = at;
            commits.push(std::mem::take(&mut frames));
        }
    }
    if commits.len() > apart_max {
        let together = commits.into_iter().reduce(|mut all, next| {
            all.newest.extend(next.newest);
            Frames { newest: all.newest, page_count: next.page_count, end: next.end }
        });
        commits = together.into_iter().collect();
    }
    let mut logged = None;
    for commit in commits {
        logged = capture(db, st, file, commit, false)?.or(logged);
    }
    Ok(logged)
}

impl WalCapture {
    /// The next transaction compares these pages, and has those that are not what the log has.
    pub fn put_back(&mut self, pages: BTreeSet<u32>) {
        self.reverted.untold |= !pages.is_empty();
        self.reverted.pages.extend(pages);
    }

    /// As [`WalCapture::put_back`], with those that had to be put back before.
    pub fn put_back_of(&mut self, before: WalCapture) {
        let before = before.reverted;
        self.reverted.pages.extend(before.pages);
        self.reverted.unknown |= before.unknown;
        self.reverted.untold |= before.untold;
        self.reverted.after = before.after.or(self.reverted.after);
    }

    /// Pages are in the files as the log has them.
    pub fn forget_put_back(&mut self) {
        self.last = None;
        self.has_put_back();
    }

    /// SQLite has published all that was captured.
    pub fn note_published(&mut self) {
        self.last = None;
    }

    /// Whether some of the pages that the next transaction puts back are of no transaction in the log.
    pub fn puts_untold_pages_back(&self) -> bool {
        self.reverted.untold
    }

    /// Whether something was captured that may not be published.
    pub fn may_be_unpublished(&self) -> bool {
        self.last.is_some() || !self.reverted.is_empty()
    }

    /// What the log had before the oldest transaction that may not be published. `None`: there is none, or no record tells.
    pub fn published_to(&self) -> Option<Mark> {
        match (self.reverted.is_empty(), &self.last) {
            (false, _) => self.reverted.after.filter(|_| !self.reverted.untold),
            (true, Some(last)) => Some(last.after),
            (true, None) => None,
        }
    }

    /// Whether the next transaction has pages that are not in its frames. Those that the WAL does not have are read from
    /// the database file, so nobody may move newer ones there.
    pub fn puts_pages_back(&self) -> bool {
        !self.reverted.is_empty()
    }

    /// Salts, and number of frames up to the last captured commit; `None` where the file says it better.
    pub fn captured_frames(&self) -> Option<WalFrames> {
        let generation = self.generation.filter(|_| self.stale == Stale::No)?;
        let mut salts = [0; 8];
        salts[..4].copy_from_slice(&generation.salt1.to_be_bytes());
        salts[4..].copy_from_slice(&generation.salt2.to_be_bytes());
        Some((Salts(salts), u32::try_from(self.frames()).ok()?))
    }
}

/// Captures a commit before SQLite can publish it. Its writer has the write lock, so its frames begin where the wal-index
/// ends.
pub fn capture_held(
    db: &Database,
    st: &mut State,
    file: &File,
    index: Option<&IndexHeader>,
    held: &HeldCommit,
) -> Result<Option<Logged>, CaptureError> {
    db.check_writable()?;
    if let Some(index) = index {
        capture_published(db, st, file, index)?;
    }
    // A captured commit that still is not published never will be.
    st.wal.take_back_last();
    let generation = generation_of(db, file)?;
    if st.wal.generation != Some(generation) {
        // The first commit of a WAL: the wal-index does not have its salts yet.
        start(st, generation);
    }
    let header = FrameHeader::decode(&held.header);
    let bytes = frame_bytes(generation.page_size);
    let begin = st.wal.committed_end;
    let mut newest = BTreeMap::new();
    let mut at = begin;
    while at < held.offset {
        // Frames of a transaction that spilled may have neither salts nor checksum yet (walEncodeFrame).
        newest.insert(read_header(db, file, at)?.pgno, at);
        at += bytes;
    }
    if at != held.offset {
        return Err(CaptureError::NotADatabase("a WAL frame is not where frames are"));
    }
    newest.insert(header.pgno, held.offset);
    let before = newest.keys().map(|pgno| (*pgno, st.wal.committed.get(pgno).copied())).collect();
    let last = LastCommit { start: begin, before, after: st.logged_mark() };
    let frames = Frames { newest, page_count: header.commit, end: held.offset + bytes };
    let logged = capture(db, st, file, frames, true)?;
    st.wal.last = Some(last);
    Ok(logged)
}

/// Takes up the generation of the wal-index. `false`: it publishes nothing.
fn take_up(db: &Database, st: &mut State, file: &File, index: &IndexHeader) -> Result<bool, CaptureError> {
    if st.wal.stale == Stale::FromLog {
        st.wal.refresh(file).map_err(|e| db.wal_error(e))?;
    }
    if index.max_frame == 0 || index.page_size == 0 {
        return Ok(false);
    }
    let published =
        Generation { page_size: index.page_size, salt1: index.salts.first(), salt2: index.salts.second() };
    if st.wal.generation != Some(published) {
        if generation_of(db, file)? != published {
            // The WAL begins anew at this moment: the next look sees both.
            return Ok(false);
        }
        // Whoever ended the last one has not asked whether the log has all of it: any page may have changed.
        let unannounced = st.wal.generation.is_some() && !st.wal.has_ended();
        start(st, published);
        if unannounced && st.page_count > 0 {
            st.wal.put_back((1..=st.page_count).collect());
            // Read again without checkpoints beside it.
            return Ok(false);
        }
    }
    Ok(true)
}

fn start(st: &mut State, generation: Generation) {
    st.wal.take_back_last();
    st.wal = st.wal.with_put_back(WalCapture {
        generation: Some(generation),
        committed_end: HEADER_BYTES,
        ..WalCapture::default()
    });
}

fn generation_of(db: &Database, file: &File) -> Result<Generation, CaptureError> {
    let mut bytes = [0; HEADER_BYTES as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|e| db.wal_error(e))?;
    let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Ok(Generation { page_size: word(8), salt1: word(16), salt2: word(20) })
}

/// Something is published after the last held commit began: that commit, or another in its place if its writer died.
fn settle_last(db: &Database, st: &mut State, file: &File, published: u64) -> Result<(), CaptureError> {
    let Some(last) = &st.wal.last else { return Ok(()) };
    let before: Vec<u32> = last.before.iter().map(|(pgno, _)| *pgno).collect();
    let mut same = published >= st.wal.committed_end;
    let mut page = vec![0; st.page_size as usize];
    st.open_checksums(db)?;
    for pgno in before {
        let Some(offset) = st.wal.frame_of(pgno).filter(|_| same) else { continue };
        file.read_exact_at(&mut page, offset + FRAME_HEADER_BYTES).map_err(|e| db.wal_error(e))?;
        same &= st.checksums().get(pgno) == Some(ltx::page_checksum(pgno, &page));
    }
    if same {
        st.wal.note_published();
    } else {
        st.wal.take_back_last();
    }
    Ok(())
}

/// The WAL may end: a captured commit that was never published goes, and with it what others like it have left.
pub fn take_back_unpublished(db: &Database, st: &mut State, file: &File) -> Result<(), CaptureError> {
    let page_count = st.wal.take_back_last().map_or(st.page_count, |before| before.page_count);
    if capture_put_back(db, st, file, page_count)?.is_some() {
        tracing::info!(
            database = %db.name,
            "a writer died before it published its transaction, or somebody wrote without the preload library: a \
             transaction of its own has what counts"
        );
    }
    Ok(())
}

/// Pages that the next transaction would have, and that no commit has to wait for.
pub fn capture_put_back(
    db: &Database,
    st: &mut State,
    file: &File,
    page_count: u32,
) -> Result<Option<Logged>, CaptureError> {
    if st.wal.reverted.is_empty() {
        return Ok(None);
    }
    let frames = Frames { newest: BTreeMap::new(), page_count, end: st.wal.committed_end };
    capture(db, st, file, frames, false)
}

fn read_header(db: &Database, file: &File, at: u64) -> Result<FrameHeader, CaptureError> {
    let mut bytes = [0; FRAME_HEADER_BYTES as usize];
    file.read_exact_at(&mut bytes, at).map_err(|e| db.wal_error(e))?;
    Ok(FrameHeader::decode(&bytes))
}

/// Header of a frame that counts.
fn frame_header(db: &Database, st: &State, file: &File, at: u64) -> Result<FrameHeader, CaptureError> {
    let header = read_header(db, file, at)?;
    let ours = st
        .wal
        .generation
        .is_some_and(|g| (g.salt1, g.salt2) == (header.salts.first(), header.salts.second()));
    if header.pgno == 0 || !ours {
        return Err(CaptureError::NotADatabase("its wal-index counts frames that the WAL does not have"));
    }
    Ok(header)
}

/// Whether the frame at an offset still is one of this generation. A WAL that has been let go may begin anew at any time,
/// with frames that nobody has published: all that it had is in the database file then.
fn is_frame_of(
    db: &Database,
    file: &File,
    at: u64,
    generation: Generation,
    pgno: u32,
) -> Result<bool, CaptureError> {
    let mut header = [0; FRAME_HEADER_BYTES as usize];
    match file.read_exact_at(&mut header, at) {
        Ok(()) => Ok(generation.owns(&header) && header[..4] == pgno.to_be_bytes()),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(db.wal_error(e)),
    }
}

/// Logs the pages of committed frames.
fn capture(
    db: &Database,
    st: &mut State,
    file: &File,
    frames: Frames,
    may_hold: bool,
) -> Result<Option<Logged>, CaptureError> {
    let Some(generation) = st.wal.generation else { return Ok(None) };
    let Frames { newest, page_count, end } = frames;
    // Also pages to put back, and those that the file grew over.
    let mut pages: Vec<u32> = newest.keys().copied().collect();
    let others = st.wal.reverted.pages.iter().copied().chain(st.page_count + 1..=page_count);
    pages.extend(others.filter(|pgno| !newest.contains_key(pgno)));
    if pages.len() > newest.len() {
        pages.sort_unstable();
        pages.dedup();
    }
    let wal = WalEnd { salt1: generation.salt1, salt2: generation.salt2, end_offset: end };
    let commit =
        Commit { page_size: generation.page_size, page_count, pages: &pages, wal: Some(wal), may_hold };
    let committed = std::mem::take(&mut st.wal.committed);
    let database = if pages.len() > newest.len() { st.database_file(db).ok() } else { None };
    let mut read = |pgno: u32, buf: &mut [u8]| {
        let mut offset = newest.get(&pgno).copied();
        if offset.is_none()
            && let Some(at) = committed.get(&pgno)
            && is_frame_of(db, file, *at, generation, pgno)?
        {
            offset = Some(*at);
        }
        match (offset, &database) {
            (Some(at), _) => file.read_exact_at(buf, at + FRAME_HEADER_BYTES).map_err(|e| db.wal_error(e)),
            (None, Some(database)) => db.read_database_page(database, pgno, buf),
            (None, None) => {
                buf.fill(0);
                Ok(())
            }
        }
    };
    let logged = log_transaction(db, st, &commit, &mut read);
    st.wal.committed = committed;
    let logged = logged?;
    st.wal.committed.extend(newest);
    st.wal.committed_end = end;
    st.wal.has_put_back();
    Ok(logged)
}

#[cfg(test)]
mod tests {
    use crate::database::Database;
    use crate::database::follow::tests::primary;

    /// It is suspected that somebody has written to the file, while the WAL has nothing that counts; then the WAL ends.
    fn suspect(db: &Database, meanwhile: impl FnOnce()) {
        db.capture_file_under_wal(&mut db.state()).unwrap();
        assert!(db.state().wal.puts_pages_back());
        meanwhile();
        db.end_wal(&mut db.state()).unwrap();
    }

    #[test]
    fn what_a_wal_that_has_ended_had_is_read_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (db, application) = primary(dir.path());
        let position = db.state().position;
        application.execute_batch("pragma wal_checkpoint(restart)").unwrap();
        db.end_wal(&mut db.state()).unwrap();
        // Frames of a transaction that is never committed take the place of those that were.
        application.execute_batch("pragma cache_size = 1; begin; update t set x = randomblob(3000)").unwrap();
        suspect(&db, || application.execute_batch("rollback").unwrap());
        assert_eq!(db.state().position, position, "nothing has changed");

        application.execute_batch("pragma wal_checkpoint(truncate)").unwrap();
        suspect(&db, || {});
        assert_eq!(db.state().position, position, "nothing has changed");
        application.execute_batch("update t set x = randomblob(3000)").unwrap();
        db.follow_wal(&mut db.state()).unwrap();
        assert_ne!(db.state().position, position);
    }
}
