use super::*;
use crate::capture::wal::published::HeldCommit;
use crate::database::follow::tests::primary;
use rusqlite::Connection;
use sqlite_file::wal::{FRAME_HEADER_BYTES, frame_offset};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// No wait for locks of others: they are held by this thread.
const AT_ONCE: Duration = Duration::ZERO;

/// A primary behind the preload door, and an application whose library asks nothing by itself.
struct Site {
    _dir: tempfile::TempDir,
    db: Arc<Database>,
    application: Connection,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let (db, application) = primary(dir.path());
        Site { _dir: dir, db, application }
    }

    fn commit(&self) {
        self.application.execute_batch("update t set x = randomblob(3000) where rowid = 30").unwrap();
        self.db.follow_wal(&mut self.db.state()).unwrap();
    }

    /// A commit of an application that was held, and that died when the log had it.
    fn commit_unpublished(&self) {
        let wal = File::options().write(true).open(&self.db.paths().wal).unwrap();
        let index = IndexHeader::read(&File::open(&self.db.paths().shm).unwrap()).unwrap().unwrap();
        let offset = frame_offset(index.max_frame + 1, index.page_size);
        let mut header = [0; FRAME_HEADER_BYTES];
        header[..4].copy_from_slice(&5u32.to_be_bytes());
        header[4..8].copy_from_slice(&index.page_count.to_be_bytes());
        header[8..16].copy_from_slice(&index.salts.0);
        let page = vec![0x5a; index.page_size as usize];
        wal.write_all_at(&page, offset + FRAME_HEADER_BYTES as u64).unwrap();
        let mut st = self.db.state();
        let logged = self.db.capture_held_commit(&mut st, &HeldCommit { offset, header }).unwrap();
        assert_eq!(logged.unwrap().pages, 1);
    }

    fn txid(&self) -> u64 {
        self.db.state().position.txid.0
    }

    /// Before it is lent, one transaction brings the log to what SQLite has.
    #[track_caller]
    fn assert_lending_commits(&self) {
        let before = self.txid();
        let (position, hold) = self.db.lend(AT_ONCE).unwrap();
        assert_eq!(position.txid.0, before + 1);
        drop(hold);
        self.db.take_back();
        self.assert_as_logged();
    }

    /// What SQLite reads is what the log has.
    #[track_caller]
    fn assert_as_logged(&self) {
        let mut st = self.db.state();
        assert_eq!((st.quarantine_reason(), st.applied.position), (None, st.position));
        assert!(self.db.is_wal_as_logged(&mut st).unwrap());
    }
}

#[test]
fn what_was_never_published_is_taken_back_before_the_database_is_lent() {
    let site = Site::new();
    site.commit_unpublished();
    site.assert_lending_commits();

    // Nothing is left to take back.
    let before = site.txid();
    let (position, _hold) = site.db.lend(AT_ONCE).unwrap();
    assert_eq!(position.txid.0, before);
}

#[test]
fn what_somebody_is_suspected_to_have_written_is_captured_before_the_database_is_lent() {
    let site = Site::new();
    site.application.execute_batch("pragma wal_checkpoint(truncate)").unwrap();
    site.db.end_wal(&mut site.db.state()).unwrap();
    let file = File::options().write(true).open(&site.db.paths().database).unwrap();
    file.write_all_at(&[0x5a; 100], 5 * 4096).unwrap();
    site.db.suspect_foreign_write();
    site.assert_lending_commits();

    // The same with a WAL that has something.
    site.commit();
    file.write_all_at(&[0xa5; 100], 5 * 4096).unwrap();
    site.db.suspect_foreign_write();
    site.assert_lending_commits();
}

#[test]
fn what_was_never_published_is_put_back_also_when_the_wal_has_been_read_again() {
    let site = Site::new();
    site.commit_unpublished();
    site.db.state().wal.mark_written_from_log();
    site.db.read_applied_wal().unwrap();
    site.commit();
    site.assert_as_logged();

    site.commit_unpublished();
    site.db.follow_from_the_start();
    site.commit();
    site.assert_as_logged();
}

#[test]
fn what_was_never_published_is_applied_when_the_term_has_ended() {
    let site = Site::new();
    site.commit();
    site.commit_unpublished();
    let position = site.db.state().position;
    site.db.shared().end_writes(Duration::ZERO);
    site.db.apply_unpublished_again();
    assert_eq!(site.db.state().applied.position.txid.0, position.txid.0 - 1);
    site.db.apply_received(AT_ONCE);
    site.assert_as_logged();
    assert_eq!(site.db.state().position, position);
}

/// As a commit that nobody acknowledged before the term ended.
#[test]
fn a_mark_has_what_was_abandoned_when_it_is_applied() {
    let site = Site::new();
    site.commit();
    let before = site.db.state().applied;
    site.commit_unpublished();
    {
        let mut st = site.db.state();
        st.applied = before;
        st.wal.abandon_held(libc::EIO);
    }
    site.db.shared().end_writes(Duration::ZERO);
    site.db.apply_unpublished_again();
    site.db.apply_received(AT_ONCE);
    site.db.mark_durable().unwrap();
    let marked = site.db.state().marked;
    assert_eq!(marked, site.db.state().position);
    site.db.apply_unpublished_again();
    site.assert_as_logged();
}

#[test]
fn a_suspicion_outlives_the_term_in_which_it_was_not_captured() {
    let site = Site::new();
    site.db.suspect_foreign_write();
    site.db.put_back_suspect(&mut site.db.state());
    site.db.shared().end_writes(Duration::ZERO);
    site.db.apply_unpublished_again();
    assert_eq!(site.db.state().suspect, Some(Suspicion::ForeignWrite));
}

#[test]
fn what_was_published_is_not_applied_again() {
    let site = Site::new();
    site.commit_unpublished();
    site.commit();
    let position = site.db.state().position;
    site.db.shared().end_writes(Duration::ZERO);
    site.db.apply_unpublished_again();
    assert_eq!(site.db.state().applied.position, position);
    site.assert_as_logged();
}

#[test]
fn a_mark_leaves_out_what_was_never_published() {
    let site = Site::new();
    site.commit();
    site.commit_unpublished();
    site.db.mark_durable().unwrap();
    let marked = || site.db.state().marked.txid.0;
    assert_eq!(marked() + 1, site.txid());
    site.commit();
    site.db.mark_durable().unwrap();
    assert_eq!(marked(), site.txid());
}
