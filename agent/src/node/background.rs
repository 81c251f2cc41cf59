//! What runs beside the doors and the streams: marks, retention, waiting applies, databases written without a journal,
//! and letting go of what is idle.

use super::Node;
use super::discovery::Start;
use crate::DatabaseName;
use crate::capture::unix_ms;
use crate::database::{Database, Shared};
use crate::log::Lsn;
use crate::status::messages;
use anyhow::Context;
use sqlite_file::locks::{self, LockGuard, LockKind};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Between marks: how much log a recovery replays at most, in time.
const MARK_EVERY: Duration = Duration::from_secs(5);
/// Between looks at retention and at idle databases.
const TIDY_EVERY: Duration = Duration::from_secs(10);
/// Between tries of what readers hold up.
const RETRY_EVERY: Duration = Duration::from_millis(20);
/// Between looks for databases that were written without a journal.
const SWEEP_EVERY: Duration = Duration::from_millis(200);
/// Frames of applied transactions in the WAL before they are moved to the file: SQLite's own default is the same.
const CHECKPOINT_FRAMES: usize = 1000;

/// Removes what a crash left in the staging directory. Recovery has used the staged snapshots it needs; those of a
/// database that is set aside stay.
pub fn remove_leftovers(shared: &Shared, start: Start) -> anyhow::Result<()> {
    if start != Start::Live {
        for entry in std::fs::read_dir(&shared.dirs.orphans)? {
            let path = entry?.path();
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    for entry in std::fs::read_dir(&shared.dirs.staging)? {
        let entry = entry?;
        let name = entry.file_name();
        let temporary = ["transaction-", "copy-", "rename-", "import-", "export-"];
        // Programs that copy a database in go on.
        let temporary = temporary.into_iter().filter(|t| start != Start::Live || *t != "copy-");
        let done_with = |snapshot: &str| {
            // Without a TXID it is one that a follower is still receiving.
            let Some((name, _)) = snapshot.rsplit_once('@') else { return false };
            let db = DatabaseName::from_escaped(name).ok().and_then(|name| shared.database(&name));
            db.is_none_or(|db| db.state().quarantine_reason().is_none())
        };
        let left = |n: &str| {
            temporary.clone().any(|t| n.starts_with(t)) || n.strip_suffix(".snapshot").is_some_and(done_with)
        };
        if name.to_str().is_some_and(left) {
            std::fs::remove_file(entry.path())
                .with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Starts the background work; it ends after `stop`.
pub fn spawn(node: Arc<Node>, stop: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(async move {
        let every = |period, work: fn(&Node)| {
            let (node, stop) = (node.clone(), stop.clone());
            tokio::spawn(async move {
                let mut ticks = tokio::time::interval(period);
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                loop {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        _ = ticks.tick() => {}
                    }
                    let node = node.clone();
                    if tokio::task::spawn_blocking(move || work(&node)).await.is_err() {
                        tracing::error!("background work panicked");
                    }
                }
            })
        };
        let tasks = [
            every(MARK_EVERY, mark),
            every(TIDY_EVERY, tidy),
            every(RETRY_EVERY, retry),
            every(SWEEP_EVERY, sweep),
        ];
        for task in tasks {
            let _ = task.await;
        }
    })
}

fn mark(node: &Node) {
    for name in node.shared.take_unmarked() {
        let Some(db) = node.shared.database(&name) else { continue };
        if db.is_waiting_elsewhere() {
            // Other databases get their marks meanwhile.
            node.shared.mark_later(&name);
            continue;
        }
        if let Err(error) = db.settle_applied() {
            tracing::debug!(database = %name, %error, "checkpoint waits");
        }
        if let Err(error) = db.mark_durable() {
            tracing::warn!(database = %name, %error, "cannot make the database durable; trying again");
            node.shared.mark_later(&name);
        }
    }
}

fn tidy(node: &Node) {
    for db in node.shared.known() {
        let (idle, handles) = {
            let st = db.state();
            (unix_ms() - st.last_change_ms > TIDY_EVERY.as_millis() as i64, st.handles)
        };
        if !idle {
            continue;
        }
        if handles == 0
            && let Err(error) = db.detach()
        {
            tracing::debug!(database = %db.name(), %error, "cannot let go of an idle database yet");
        }
        db.close_idle(&mut db.state());
    }
    let retained = node.shared.log.enforce_retention(unix_ms(), node.log_needed(), node.followers_need());
    match retained {
        Ok(retained) if retained.followers_cut => {
            tracing::warn!(
                MESSAGE_ID = messages::RETENTION_CUT,
                oldest = %retained.oldest,
                "the log is larger than [log] retention-size: records that a connected follower has not taken yet \
                 were removed, it gets a snapshot"
            );
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "retention could not remove old segments"),
    }
}

fn retry(node: &Node) {
    node.end_halt_locks();
    let bound = node.config.read().replication.apply_wait;
    for name in node.shared.take_pending() {
        if let Some(db) = node.shared.database(&name) {
            db.retry_pending(bound);
        }
    }
    for name in node.shared.applying() {
        if let Some(db) = node.shared.database(&name)
            && db.apply.try_lock().is_some_and(|side| side.applier.wal_frames() > CHECKPOINT_FRAMES)
            && let Err(error) = db.settle_applied()
        {
            tracing::debug!(database = %name, %error, "checkpoint waits");
        }
    }
}

/// journal_mode=OFF and MEMORY give no event at their commit. What was written is captured as soon as nobody is in a
/// write transaction.
fn sweep(node: &Node) {
    if !node.shared.is_writable() {
        return;
    }
    for db in node.shared.known().into_iter().filter(|db| !db.is_lent()) {
        if node.shared.is_writable()
            && let Err(error) = db.end_dead_transaction()
        {
            tracing::warn!(database = %db.name(), %error, "cannot take back the transaction of a dead application");
        }
        let look = {
            let mut st = db.state();
            let mut unseen = st.passthrough_handles > 0 && st.stamp_changed(&db).unwrap_or(false);
            if unseen && st.wal.committed_frames() == 0 {
                // Nobody tells when a connection leaves WAL mode without a journal.
                st.forget_journal_mode();
                unseen = !db.load_journal_mode(&mut st);
                if !unseen {
                    let _ = st.remember_stamp(&db);
                }
            }
            st.copiers == 0
                && !st.wal_mode
                && !st.rollback.journal_active
                && (st.rollback.is_dirty() || unseen)
        };
        if look && let Err(error) = sweep_one(&db) {
            tracing::warn!(database = %db.name(), %error, "cannot capture what was written without a journal");
        }
    }
}

fn sweep_one(db: &Arc<Database>) -> anyhow::Result<()> {
    let path = db.shared().dirs.mount.join(db.name());
    let file = match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && db.state().page_count == 0 => {
            // A plain file that was moved away.
            db.state().rollback = Default::default();
            return Ok(());
        }
        file => Arc::new(file?),
    };
    // As an SQLite reader: not while a writer has or wants the file.
    let Some(pending) = LockGuard::try_acquire(&file, LockKind::Read, locks::PENDING)? else { return Ok(()) };
    let Some(_shared) = LockGuard::try_acquire(&file, LockKind::Read, locks::SHARED)? else { return Ok(()) };
    drop(pending);
    // What is in the file is taken back by the next connection: a transaction that was refused, or whose writer died.
    if let Ok(journal) = File::open(&db.paths().journal)
        && sqlite_file::journal::is_hot(&journal)?
    {
        return Ok(());
    }
    let mut st = db.state();
    if st.wal_mode || st.rollback.journal_active {
        return Ok(());
    }
    if !st.rollback.is_dirty() {
        st.rollback.mark_unknown();
    }
    match db.capture_rollback(&mut st) {
        Err(crate::capture::CaptureError::NotADatabase(_)) if st.page_count == 0 => {
            // A plain file that is being written: looked at again when it changes.
            st.rollback = Default::default();
            Ok(())
        }
        other => Ok(other.map(|_| ())?),
    }
}

impl Node {
    /// First record that some database's files still need.
    fn log_needed(&self) -> Lsn {
        let log = &self.shared.log;
        let unmarked = self.shared.known().into_iter().filter_map(|db| {
            let marked = {
                let st = db.state();
                if st.marked == st.position {
                    return None;
                }
                st.marked
            };
            let first = log.find(db.name(), ltx::Txid(marked.txid.0 + 1)).ok().flatten();
            Some(first.map_or(Lsn(0), |r| r.lsn))
        });
        unmarked.min().unwrap_or_else(|| log.durable())
    }

    /// First record that a connected follower has not acknowledged.
    fn followers_need(&self) -> Lsn {
        let log = &self.shared.log;
        let followed = self.followed.lock().clone();
        let needs = followed.iter().filter_map(|((_, name), txid)| {
            let next = log.find(name, ltx::Txid(txid.0 + 1)).ok().flatten()?;
            Some(next.lsn)
        });
        needs.min().unwrap_or_else(|| log.durable())
    }
}
