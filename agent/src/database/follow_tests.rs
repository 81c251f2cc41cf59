use super::*;
use crate::DatabaseName;
use crate::database::{Dirs, Shared};
use crate::log::{CommitLog, Options};
use crate::ship::engine::Epoch;
use rusqlite::Connection;
use std::time::Duration;

/// No wait for locks of others: they are held by this thread.
const AT_ONCE: Duration = Duration::ZERO;

/// A commit in pages that the primary's transactions do not have. It makes the file larger.
const ELSEWHERE: &str = "insert into other values(zeroblob(10000))";

/// A database of an agent with the preload door, which takes up what is in `dir`. It has no role yet.
pub(crate) fn node(dir: &std::path::Path) -> Arc<Database> {
    let dirs = Dirs::new(dir.join("data"), dir.join("mount"));
    for dir in [&dirs.files, &dirs.checksums, &dirs.staging] {
        std::fs::create_dir_all(dir).unwrap();
    }
    if !dirs.mount.exists() {
        std::os::unix::fs::symlink(&dirs.files, &dirs.mount).unwrap();
    }
    let log = CommitLog::open(&dirs.log, Options::default()).unwrap();
    let shared = Shared::new(Arc::new(log), dirs, 1, Epoch(1));
    shared.follow_wals(|_| {});
    shared.database_or_new(&DatabaseName::new("a.db").unwrap())
}

/// A primary behind the preload door, and an application whose library asks nothing by itself.
pub(crate) fn primary(dir: &std::path::Path) -> (Arc<Database>, Connection) {
    let db = node(dir);
    db.shared().begin_writes(Epoch(1));
    let application = Connection::open(&db.paths().database).unwrap();
    application
        .execute_batch(
            "pragma journal_mode = wal; pragma wal_autocheckpoint = 0; create table t(x);
             with n(i) as (select 1 union all select i + 1 from n limit 50)
             insert into t select randomblob(3000) from n; update t set x = randomblob(3000);",
        )
        .unwrap();
    db.follow_wal(&mut db.state()).unwrap();
    (db, application)
}

/// A primary, its application, and a replica that has what it has.
struct Site {
    dir: tempfile::TempDir,
    primary: Arc<Database>,
    writer: Connection,
    replica: Arc<Database>,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let primary = node(&dir.path().join("primary"));
        primary.shared().begin_writes(Epoch(1));
        let writer = Connection::open(&primary.paths().database).unwrap();
        writer.execute_batch("pragma journal_mode = wal; create table t(x); create table other(x); insert into t values(1)").unwrap();
        let replica = node(&dir.path().join("replica"));
        let site = Site { dir, primary, writer, replica };
        site.ship();
        // Through the WAL: the first was written in place.
        site.commit("insert into t values(0)");
        site.ship();
        site.assert_applied();
        site
    }

    fn commit(&self, sql: &str) {
        self.writer.execute_batch(sql).unwrap();
    }

    /// The replica receives what it lacks, and applies it if it can at once.
    fn ship(&self) {
        self.primary.follow_wal(&mut self.primary.state()).unwrap();
        let next = self.replica.state().position.txid.0 + 1..=self.primary.state().position.txid.0;
        let records = next.map(|txid| self.primary.recent.lock().get(ltx::Txid(txid)).unwrap().clone());
        let received = self.replica.receive(records.collect(), AT_ONCE, &mut |_| {});
        assert!(received.is_ok(), "{received:?}");
    }

    /// An application on the replica's host.
    fn application(&self) -> Connection {
        Connection::open(&self.replica.paths().database).unwrap()
    }

    /// The replica's agent dies, and another one takes up its files.
    fn restart_agent(&mut self) {
        let dir = self.dir.path().join("replica");
        // Its log has a lock.
        self.replica.shared().log.close();
        self.replica = node(&dir);
        self.replica.shared().expect_wals_ahead();
        self.replica.reattach().unwrap();
        self.replica.capture_left_in_wal().unwrap();
    }

    /// Somebody without the library commits, and is gone.
    fn commit_and_close(&self) {
        self.application().execute_batch(ELSEWHERE).unwrap();
    }

    /// The replica receives the newest transaction, and refuses it.
    fn refusal(&self) -> String {
        self.primary.follow_wal(&mut self.primary.state()).unwrap();
        let newest = self.primary.state().position.txid;
        let record = self.primary.recent.lock().get(newest).unwrap().clone();
        self.replica.receive(vec![record], AT_ONCE, &mut |_| {}).unwrap_err().to_string()
    }

    /// Why the replica is set aside.
    fn reason(&self) -> String {
        self.replica.state().quarantine_reason().map(str::to_owned).unwrap_or_default()
    }

    fn is_applied(&self) -> bool {
        let st = self.replica.state();
        st.applied.position == self.primary.state().position && st.quarantine_reason().is_none()
    }

    fn assert_applied(&self) {
        let st = self.replica.state();
        assert_eq!(st.quarantine_reason(), None);
        assert_eq!(st.applied.position, self.primary.state().position);
        drop(st);
        let rows = |db: &Connection| {
            let mut rows = db.prepare("select x from t order by x").unwrap();
            rows.query_map((), |row| row.get(0)).unwrap().map(Result::unwrap).collect::<Vec<i64>>()
        };
        assert_eq!(rows(&self.application()), rows(&self.writer));
    }
}

/// A replica to whose database somebody without the library has written, and that suspects so.
pub(crate) fn replica_with_foreign_write() -> (tempfile::TempDir, Arc<Database>) {
    let mut site = Site::new();
    assert!(site.replica.detach().unwrap());
    site.restart_agent();
    site.commit_and_close();
    site.replica.suspect_foreign_write();
    (site.dir, site.replica)
}

/// Under a halt lock the primary has taken a commit, and the agent dies before SQLite has published it.
#[test]
fn a_commit_that_is_published_after_a_restart_of_the_agent_is_the_log_s() {
    let mut site = Site::new();
    let application = site.application();
    application.execute_batch("begin immediate; insert into t values(2)").unwrap();
    site.commit("insert into t values(2)");
    site.ship();
    site.restart_agent();
    site.replica.apply_received(AT_ONCE);
    assert!(!site.is_applied(), "its writer has the lock");
    application.execute_batch("commit").unwrap();
    site.replica.apply_received(AT_ONCE);
    site.assert_applied();
}

#[test]
fn what_somebody_commits_between_two_tries_is_noticed() {
    let site = Site::new();
    let application = site.application();
    application.execute_batch("begin immediate; insert into t values(3)").unwrap();
    site.commit("insert into t values(2)");
    site.ship();
    assert!(!site.is_applied(), "its writer has the lock");
    application.execute_batch("commit").unwrap();
    site.replica.apply_received(AT_ONCE);
    assert!(site.reason().contains("somebody committed on this replica"));
}

#[test]
fn what_somebody_commits_after_a_restart_of_the_agent_is_noticed() {
    let mut site = Site::new();
    let application = site.application();
    site.restart_agent();
    application.execute_batch(ELSEWHERE).unwrap();
    site.commit("insert into t values(2)");
    assert!(site.refusal().contains("somebody committed on this replica"));

    let mut site = Site::new();
    assert!(site.replica.detach().unwrap());
    site.restart_agent();
    site.commit_and_close();
    site.commit("insert into t values(2)");
    assert!(site.refusal().contains("somebody wrote to it on this replica"));
}

/// The agent lets go of a database that nobody uses.
#[test]
fn what_somebody_commits_beside_a_detached_agent_is_noticed() {
    let site = Site::new();
    assert!(site.replica.detach().unwrap());
    let application = site.application();
    application.execute_batch(ELSEWHERE).unwrap();
    site.commit("insert into t values(2)");
    assert!(site.refusal().contains("somebody committed on this replica"));

    // The last to close moves it to the file. One with the library may have, who says so.
    let site = Site::new();
    assert!(site.replica.detach().unwrap());
    site.commit_and_close();
    site.replica.state().handles += 1;
    crate::door::preload::requests::let_go(&site.replica);
    site.commit("insert into t values(2)");
    assert!(site.refusal().contains("somebody wrote to it on this replica"));
}

#[test]
fn what_somebody_has_committed_before_the_agent_detaches_is_noticed() {
    let site = Site::new();
    site.commit_and_close();
    assert!(site.replica.detach().unwrap());
    site.commit("insert into t values(2)");
    assert!(site.refusal().contains("somebody wrote to it on this replica"));
}

#[test]
fn readers_beside_a_detached_agent_are_no_suspicion() {
    let site = Site::new();
    for row in [2, 3] {
        assert!(site.replica.detach().unwrap());
        // It finds no WAL, and makes an empty one.
        let reader = site.application();
        let _: i64 = reader.query_row("select count(*) from t", (), |row| row.get(0)).unwrap();
        let foreign = site.replica.foreign_use_of_wal(&mut site.replica.state()).unwrap();
        assert_eq!(foreign, ForeignUse::None);
        site.replica.look_for_foreign_writes(&mut site.replica.state());
        assert_eq!(site.replica.state().suspect, None);
        site.commit(&format!("insert into t values({row})"));
        site.ship();
        site.assert_applied();
    }
}

/// Between the agent's start and its term.
#[test]
fn what_somebody_commits_before_a_replica_becomes_primary_is_captured() {
    for is_detached in [false, true] {
        let site = Site::new();
        assert!(!is_detached || site.replica.detach().unwrap());
        site.commit_and_close();
        let before = site.replica.state().position.txid.0;
        site.replica.shared().begin_writes(Epoch(2));
        site.replica.suspect_commits_since_applied().unwrap();
        site.replica.read_applied_wal().unwrap();
        assert!(site.replica.is_suspect_in_wal_mode());
        crate::door::preload::requests::capture_suspect(&site.replica);
        let mut st = site.replica.state();
        assert_eq!((st.position.txid.0, st.suspect), (before + 1, None));
        assert!(site.replica.is_wal_as_logged(&mut st).unwrap());
    }
}
