//! One task per database that moves: keeps its log stream open, gives the sink what comes, and stands back alone
//! when the database fails.

use super::connection::{FollowError, accepted};
use super::intake::{Intake, RecordFiles, Stop, memory_bytes, total_bytes};
use super::staging::{self, StagingError};
use super::{RECHECK, Session, Shared, Target, control, divergence, snapshot};
use crate::DatabaseName;
use crate::ship::engine::{EngineError, Epoch, ShippedRecord};
use crate::ship::frame::EndReason;
use crate::ship::jitter;
use crate::ship::peer::{RefusalCode, percent_encode};
use crate::ship::server::LOG_PATH;
use futures_util::future::BoxFuture;
use futures_util::stream::unfold;
use futures_util::{FutureExt, StreamExt};
use hyper::body::Incoming;
use ltx::{Pos, Txid};
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

/// Largest batch that is given to [`crate::ship::engine::Sink::receive`]; more waits in the stream's window.
pub(super) const BATCH_RECORDS: usize = 256;
/// Bytes of such a batch, records in files included.
pub(super) const BATCH_BYTES: u64 = 4 << 20;

/// Record bytes in memory over all databases, beyond one record each.
const PENDING_BYTES_MAX: usize = 64 << 20;

/// Time that a task has to save a snapshot half-way when the follower stops.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// A database that stays busy over this many attempts is reported.
const BUSY_REPORTED_AFTER: u32 = 10;

/// Why a database does not follow at the moment.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// The upstream, or the way to it.
    #[error("{0}")]
    Follow(#[from] FollowError),
    /// The database here.
    #[error("{0}")]
    Engine(#[from] EngineError),
    /// The snapshot that is being taken.
    #[error("{0}")]
    Staging(#[from] StagingError),
    /// A large record cannot be stored.
    #[error("cannot store a record of {name} in {}: {source}; free space or repair the file system", path.display())]
    Store { name: DatabaseName, path: PathBuf, source: io::Error },
    /// The upstream ended the stream of this database with a reason.
    #[error("the upstream ended the log of {name}: {message}")]
    Ended { name: DatabaseName, code: RefusalCode, message: String },
    /// The upstream's history is a beginning of the one here.
    #[error("the upstream is behind {name} ({there}, here {here}); waiting for it to catch up")]
    Behind { name: DatabaseName, there: Pos, here: Pos },
    /// A task failed.
    #[error("{0}")]
    Own(String),
}

impl Trouble {
    /// Kind of reason, for reporting changes only.
    fn kind(&self) -> &'static str {
        match self {
            Trouble::Follow(error) => match error.code() {
                Some(RefusalCode::NoSuchDatabase) => "unknown-upstream",
                Some(RefusalCode::Quarantined) => "quarantined-upstream",
                Some(_) => "refused",
                None => "stream",
            },
            Trouble::Engine(EngineError::OutOfSequence { .. }) => "out-of-sequence",
            Trouble::Engine(EngineError::OldEpoch { .. }) => "old-epoch",
            Trouble::Engine(EngineError::Quarantined { .. }) => "quarantined",
            Trouble::Engine(_) => "engine",
            Trouble::Staging(StagingError::Unusable { .. }) => "snapshot",
            Trouble::Staging(StagingError::Io { .. }) | Trouble::Store { .. } => "storage",
            Trouble::Ended { .. } => "ended",
            Trouble::Behind { .. } => "behind",
            Trouble::Own(_) => "internal",
        }
    }

    /// Whether asking again by position mends it at once, as a rule.
    fn is_mended_by_resuming(&self) -> bool {
        matches!(
            self,
            Trouble::Engine(EngineError::OutOfSequence { .. })
                | Trouble::Ended { .. }
                | Trouble::Follow(FollowError::Lost { .. })
                | Trouble::Staging(StagingError::Unusable { .. })
        )
    }
}

/// What asking for the log came to.
enum Step {
    /// Followed for a while.
    Followed,
    /// The log does not continue from here.
    Snapshot { common: Option<Txid> },
}

/// Follows one database until it has nothing more to do.
pub(super) async fn run(shared: Arc<Shared>, name: DatabaseName, target: watch::Receiver<Target>) {
    let cancel = shared.cancel.clone();
    let first = shared.options.database_retry.0;
    let mut worker = Worker {
        shared,
        name,
        target,
        pos: Pos::default(),
        confirmed: 0,
        settled: false,
        quick: true,
        delay: first,
        behind_since: None,
    };
    tokio::select! {
        () = worker.work() => {}
        // Connections are cut by now: what had begun saves what it has, and everything else has nothing to lose.
        () = async {
            cancel.cancelled().await;
            sleep(STOP_GRACE).await;
        } => {}
    }
}

/// The task of one database.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) name: DatabaseName,
    target: watch::Receiver<Target>,
    /// Where the database is here.
    pub(super) pos: Pos,
    /// Session in which the upstream continued the log from here.
    confirmed: u64,
    /// The upstream said that nothing is left, after the last news.
    settled: bool,
    /// There was progress since the last trouble: the next attempt needs no wait.
    quick: bool,
    delay: Duration,
    behind_since: Option<Instant>,
}

impl Worker {
    async fn work(&mut self) {
        self.reread().await;
        while !self.shared.cancel.is_cancelled() {
            if self.target.has_changed().unwrap_or(false) {
                let target = *self.target.borrow_and_update();
                self.settled = false;
                if target.session == RECHECK {
                    self.confirmed = 0;
                    self.reread().await;
                }
            }
            if !self.needs_work() {
                if self.leave() {
                    return;
                }
                continue;
            }
            let cancel = self.shared.cancel.clone();
            let session = tokio::select! {
                session = self.session() => session,
                () = cancel.cancelled() => return,
            };
            let step = tokio::select! {
                step = self.follow(&session) => step,
                () = cancel.cancelled() => return,
            };
            let done = match step {
                Ok(Step::Followed) => Ok(()),
                Ok(Step::Snapshot { common }) => snapshot::take(self, &session, common).await,
                Err(trouble) => Err(trouble),
            };
            if let Err(trouble) = done {
                self.stand_back(&session, trouble).await;
            }
        }
    }

    fn needs_work(&self) -> bool {
        let target = *self.target.borrow();
        let passed = self.confirmed == target.session && target.pos.txid <= self.pos.txid;
        !self.settled && target.pos != self.pos && !passed
    }

    /// Ends the task, unless there were news in the meantime.
    fn leave(&self) -> bool {
        let mut workers = self.shared.workers.lock();
        if self.target.has_changed().unwrap_or(false) {
            return false;
        }
        workers.remove(&self.name);
        self.shared.recovered(&self.name);
        true
    }

    async fn session(&self) -> Arc<Session> {
        let mut sessions = self.shared.session.subscribe();
        let connected =
            sessions.wait_for(|session| session.as_ref().is_some_and(|s| !s.cancel.is_cancelled()));
        let session = connected.await.expect("the sender lives in Shared").clone();
        session.expect("waited for a connected one")
    }

    /// Asks the sink where the database is.
    pub(super) async fn reread(&mut self) {
        let name = self.name.clone();
        match self.shared.with_database(move |sink| sink.position(&name)).await {
            Ok(pos) => self.pos = pos,
            Err(error) => tracing::error!(database = %self.name, "{error}"),
        }
    }

    /// There is a new durable position here.
    pub(super) fn advanced(&mut self, pos: Pos) {
        self.pos = pos;
        self.quick = true;
        self.behind_since = None;
        self.delay = self.shared.options.database_retry.0;
        self.shared.acks.put(self.name.clone(), pos);
        self.shared.recovered(&self.name);
    }

    /// Reports and waits. A lost session is no trouble of the database.
    async fn stand_back(&mut self, session: &Session, trouble: Trouble) {
        self.reread().await;
        if session.cancel.is_cancelled() {
            return;
        }
        if std::mem::take(&mut self.quick) && trouble.is_mended_by_resuming() {
            tracing::debug!(database = %self.name, "asking again: {trouble}");
            return;
        }
        if matches!(&trouble, Trouble::Follow(error) if error.code() == Some(RefusalCode::NoSuchDatabase)) {
            // The upstream tells the position when it has the database again.
            self.shared.unknown(self.name.clone());
            self.settled = true;
            return;
        }
        self.shared.failed(&self.name, trouble.kind(), trouble.to_string());
        let longest = match trouble {
            // Somebody else decides when this ends; the news of a moved position come on the control stream.
            Trouble::Behind { .. } => self.shared.options.database_retry.0,
            _ => self.shared.options.database_retry.1,
        };
        let wait = jitter(self.delay.min(longest));
        self.delay = (self.delay * 2).min(longest);
        tokio::select! {
            () = sleep(wait) => {}
            () = session.cancel.cancelled() => {}
        }
    }

    /// Asks for the log from here and follows it.
    async fn follow(&mut self, session: &Arc<Session>) -> Result<Step, Trouble> {
        let _permit = self.shared.stream_permit().await;
        let response = session.get(&log_path(&self.name, self.pos)).await?;
        let error = match accepted(&session.upstream, response).await {
            Ok(body) => {
                self.confirmed = session.number;
                self.unstage().await?;
                return self.stream(session, body).await;
            }
            Err(error) => error,
        };
        match error {
            FollowError::Refused { code: Some(RefusalCode::Gap), .. } => Ok(Step::Snapshot { common: None }),
            FollowError::Refused { code: Some(RefusalCode::Diverged), position, .. } => {
                let common = divergence::common(&self.shared, session, &self.name, position).await?;
                self.bear_with(session, position, common)?;
                Ok(Step::Snapshot { common })
            }
            other => Err(other.into()),
        }
    }

    /// An upstream that only has not got as far as this node is waited for, for a while: a replica that feeds others
    /// may lag behind them after they moved to it. A new term decides at once: its history is the shorter one.
    fn bear_with(
        &mut self,
        session: &Session,
        there: Option<Pos>,
        common: Option<Txid>,
    ) -> Result<(), Trouble> {
        let Some(there) = there.filter(|there| common == Some(there.txid) && there.txid < self.pos.txid)
        else {
            return Ok(());
        };
        let since = *self.behind_since.get_or_insert_with(Instant::now);
        if session.new_term || since.elapsed() >= self.shared.options.behind_grace {
            return Ok(());
        }
        Err(Trouble::Behind { name: self.name.clone(), there, here: self.pos })
    }

    /// Removes a staged snapshot that is no longer needed because the log continues.
    async fn unstage(&self) -> Result<(), Trouble> {
        if !self.shared.staged.lock().contains_key(&self.name) {
            return Ok(());
        }
        let name = self.name.clone();
        let discard = move |dir: PathBuf| staging::discard(&dir, &name);
        self.shared.with_database(move |sink| discard(sink.staging_dir())).await.map_err(Trouble::Own)??;
        control::staged(&self.shared, &self.name, None);
        Ok(())
    }

    /// Receives what the stream brings until it ends.
    async fn stream(&mut self, session: &Arc<Session>, body: Incoming) -> Result<Step, Trouble> {
        let dir = self.shared.staging_dir().await.map_err(Trouble::Own)?;
        let mut records = pin!(records(Intake::new(body, &dir)));
        let mut pending = Pending::new(&self.shared);
        let mut receiving: Option<BoxFuture<'static, Result<Pos, Trouble>>> = None;
        let mut stopped = None;
        let mut news = self.target.clone();
        loop {
            if receiving.is_none() && !pending.records.is_empty() {
                let batch = pending.take();
                receiving = Some(Box::pin(receive(
                    Arc::clone(&self.shared),
                    Arc::clone(session),
                    self.name.clone(),
                    batch,
                )));
            }
            if receiving.is_none()
                && let Some(stop) = stopped.take()
            {
                return self.ended(session, stop);
            }
            let idle = receiving.is_none();
            let caught_up = idle && self.target.borrow().pos.txid <= self.pos.txid;
            tokio::select! {
                next = records.next(), if stopped.is_none() && pending.has_room() => {
                    let mut next = next;
                    // Takes everything that is there already into the same batch.
                    while let Some(item) = next {
                        match item {
                            Ok(record) => pending.push(record),
                            Err(stop) => stopped = Some(stop),
                        }
                        if stopped.is_some() || !pending.has_room() {
                            break;
                        }
                        next = records.next().now_or_never().flatten();
                    }
                }
                result = async { receiving.as_mut().expect("checked in the condition").await }, if receiving.is_some() => {
                    receiving = None;
                    self.advanced(result?);
                }
                () = self.shared.room.notified(), if caught_up => return Ok(Step::Followed),
                changed = news.changed(), if idle => {
                    if changed.is_err() || news.borrow_and_update().session == RECHECK {
                        return Ok(Step::Followed);
                    }
                }
            }
        }
    }

    /// Judges why a stream ended.
    fn ended(&mut self, session: &Session, stop: Stop) -> Result<Step, Trouble> {
        let upstream = || session.upstream.to_string();
        match stop {
            Stop::End(EndReason::Idle) => {
                let target = *self.target.borrow();
                let news = self.target.has_changed().unwrap_or(false);
                self.settled = !news && (target.session < session.number || target.pos.txid <= self.pos.txid);
                Ok(Step::Followed)
            }
            Stop::End(_) => {
                Err(FollowError::Lost { upstream: upstream(), why: "it ended the log stream".into() }.into())
            }
            // The next record is lost there. Up to here the histories are one.
            Stop::Refused(RefusalCode::Gap, _) => Ok(Step::Snapshot { common: Some(self.pos.txid) }),
            Stop::Refused(code, message) => Err(Trouble::Ended { name: self.name.clone(), code, message }),
            Stop::Frame(error) => Err(FollowError::frame(&session.upstream, error).into()),
            Stop::Store(path, source) => Err(Trouble::Store { name: self.name.clone(), path, source }),
        }
    }
}

/// Path and query of a database's log after a position.
pub(super) fn log_path(name: &DatabaseName, after: Pos) -> String {
    format!(
        "{LOG_PATH}?name={}&txid={}&checksum={}",
        percent_encode(name.as_str()),
        after.txid,
        after.checksum
    )
}

/// The records of a stream; the last item says why there are no more. Polling for the next one can be given up and
/// taken up again without losing anything.
pub(super) fn records(intake: Intake) -> impl futures_util::Stream<Item = Result<ShippedRecord, Stop>> {
    unfold(Some(intake), |intake| async move {
        let mut intake = intake?;
        let next = intake.next().await;
        let more = next.is_ok().then_some(intake);
        Some((next, more))
    })
}

/// Records that have come and wait for the sink.
struct Pending {
    shared: Arc<Shared>,
    records: Vec<ShippedRecord>,
    files: RecordFiles,
    total: u64,
    memory: usize,
}

/// A batch on its way through the sink. Its memory is counted and its files live until it is dropped.
struct Batch {
    records: Vec<ShippedRecord>,
    _held: Pending,
}

impl Pending {
    fn new(shared: &Arc<Shared>) -> Self {
        let (records, files) = (Vec::new(), RecordFiles::default());
        Pending { shared: Arc::clone(shared), records, files, total: 0, memory: 0 }
    }

    /// One record always has room, so that every database gets on.
    fn has_room(&self) -> bool {
        self.records.is_empty()
            || (self.records.len() < BATCH_RECORDS
                && self.total < BATCH_BYTES
                && self.shared.pending_bytes.load(Ordering::Relaxed) < PENDING_BYTES_MAX)
    }

    fn push(&mut self, record: ShippedRecord) {
        self.total += total_bytes(&record);
        let memory = memory_bytes(&record);
        self.memory += memory;
        self.shared.pending_bytes.fetch_add(memory, Ordering::Relaxed);
        self.files.add(&record);
        self.records.push(record);
    }

    fn take(&mut self) -> Batch {
        let fresh = Pending::new(&self.shared);
        let mut held = std::mem::replace(self, fresh);
        Batch { records: std::mem::take(&mut held.records), _held: held }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.shared.pending_bytes.fetch_sub(self.memory, Ordering::Relaxed);
    }
}

/// Gives a batch to the sink, again and again while the database is busy.
async fn receive(
    shared: Arc<Shared>,
    session: Arc<Session>,
    name: DatabaseName,
    batch: Batch,
) -> Result<Pos, Trouble> {
    let newest = batch.records.iter().map(|record| record.epoch).max().unwrap_or_default();
    let new_epoch = (newest > session.epoch()).then_some(newest);
    let (mut wait, longest) = shared.options.busy_retry;
    let mut attempts = 0;
    loop {
        let received = {
            let (name, records, acks) = (name.clone(), batch.records.clone(), Arc::clone(&shared));
            let call = move |sink: &dyn crate::ship::engine::Sink| {
                if let Some(epoch) = new_epoch {
                    // The record came before the heartbeat that tells its epoch.
                    sink.observe_epoch(epoch)?;
                }
                let database = name.clone();
                sink.receive(&name, records, &mut |pos| acks.acks.put(database.clone(), pos))
            };
            shared.with_database(call).await.map_err(Trouble::Own)?
        };
        match received {
            Err(EngineError::Busy(_)) => {
                attempts += 1;
                if attempts == BUSY_REPORTED_AFTER {
                    let reason = format!("{} (trying again)", EngineError::Busy(name.clone()));
                    shared.failed(&name, "busy", reason);
                }
                sleep(jitter(wait)).await;
                wait = (wait * 2).min(longest);
            }
            Ok(pos) => {
                note_epoch(&session, newest);
                return Ok(pos);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn note_epoch(session: &Session, epoch: Epoch) {
    session.epoch.fetch_max(epoch.0, Ordering::Relaxed);
}
