//! The side that follows: one control stream to the upstream, and one task per database that moves.

mod ask;
mod connection;
mod control;
mod database;
mod divergence;
pub mod halt;
mod intake;
mod latest;
mod snapshot;
mod staging;

pub use ask::ask;
pub use connection::{DEFAULT_PORT, FollowError, Upstream, UpstreamError};

use crate::DatabaseName;
use crate::ship::engine::{Epoch, Sink};
use crate::ship::http::access::Access;
use crate::ship::peer::Identity;
use connection::{Connection, check_epoch};
use http::{Method, Response};
use hyper::body::Incoming;
use latest::Latest;
use ltx::{Pos, Txid};
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Who the follower is, how patient, and its bounds.
#[derive(Clone, Debug)]
pub struct FollowOptions {
    /// Host name told to the upstream.
    pub node_name: String,
    /// Cluster; an upstream of another one is refused.
    pub cluster: String,
    /// What this node shows to the upstream, and what the upstream has to show.
    pub access: Arc<Access>,
    /// Time between this side's heartbeats.
    pub heartbeat: Duration,
    /// An upstream that is silent for this long is given up.
    pub timeout: Duration,
    /// First and longest wait before the upstream is tried again; doubled each time, jittered.
    pub retry: (Duration, Duration),
    /// First and longest wait before a database that failed is tried again; doubled each time, jittered.
    pub database_retry: (Duration, Duration),
    /// First and longest wait before a batch is given again to a database that was busy.
    pub busy_retry: (Duration, Duration),
    /// How long an upstream of the same term may be behind before it is believed to be a shorter history.
    pub behind_grace: Duration,
    /// Log and snapshot streams that are open at once; idle ones make room.
    pub streams_max: usize,
    /// Calls of [`Sink::receive`] and other blocking work for databases at once.
    pub receives_max: usize,
    /// Snapshots that are taken at once.
    pub snapshots_max: usize,
}

impl FollowOptions {
    /// The defaults for a node.
    pub fn new(node_name: impl Into<String>, cluster: impl Into<String>) -> Self {
        FollowOptions {
            node_name: node_name.into(),
            cluster: cluster.into(),
            access: Arc::default(),
            heartbeat: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            retry: (Duration::from_millis(100), Duration::from_secs(5)),
            database_retry: (Duration::from_millis(500), Duration::from_secs(30)),
            busy_retry: (Duration::from_millis(10), Duration::from_millis(500)),
            behind_grace: Duration::from_secs(10),
            streams_max: 1024,
            receives_max: 64,
            snapshots_max: 4,
        }
    }
}

/// How following goes, for status.
#[derive(Clone, Debug, Default)]
pub struct FollowStatus {
    /// The upstream, while it is connected.
    pub upstream: Option<UpstreamInfo>,
    /// The upstream has answered this node's list: positions that differ are known.
    pub compared: bool,
    /// Why there is no connection.
    pub last_error: Option<String>,
    /// Databases that cannot follow, with the reason.
    pub failing: Vec<(DatabaseName, String)>,
    /// Databases that are here and unknown to the upstream; they are left alone.
    pub unknown_upstream: Vec<DatabaseName>,
    /// Databases with a task: those that moved lately, or fail.
    pub active: usize,
}

/// A connected upstream.
#[derive(Clone, Debug)]
pub struct UpstreamInfo {
    /// Who it is, with its newest epoch.
    pub identity: Identity,
    /// Since when.
    pub since: SystemTime,
    /// Its clock when it was last heard, milliseconds since 1970.
    pub heard_unix_ms: i64,
}

/// Follows one upstream.
pub struct Follower;

impl Follower {
    /// Starts to follow `upstream` until `cancel`, or until the handle is stopped. Call within a tokio runtime.
    pub fn spawn(
        upstream: Upstream,
        sink: Arc<dyn Sink>,
        options: FollowOptions,
        cancel: CancellationToken,
    ) -> FollowerHandle {
        let shared = Arc::new(Shared {
            streams: Arc::new(Semaphore::new(options.streams_max)),
            receives: Semaphore::new(options.receives_max),
            snapshots: Semaphore::new(options.snapshots_max),
            staging_dir: OnceLock::new(),
            sink,
            options,
            upstream: Arc::new(upstream),
            cancel: cancel.child_token(),
            tracker: TaskTracker::new(),
            session: watch::Sender::new(None),
            workers: Mutex::default(),
            acks: Latest::default(),
            reports: Latest::default(),
            room: Notify::new(),
            pending_bytes: AtomicUsize::new(0),
            staged: Mutex::default(),
            state: Mutex::default(),
        });
        shared.tracker.spawn(control::run(Arc::clone(&shared)));
        shared.tracker.spawn(control::report(Arc::clone(&shared)));
        FollowerHandle { shared }
    }
}

/// A running follower. Dropping the handle does not stop it.
pub struct FollowerHandle {
    shared: Arc<Shared>,
}

impl FollowerHandle {
    /// Stops and waits until nothing is given to the sink any more.
    pub async fn stop(&self) {
        self.shared.cancel.cancel();
        self.stopped().await;
    }

    /// Waits until the follower has stopped.
    pub async fn stopped(&self) {
        self.shared.cancel.cancelled().await;
        self.shared.tracker.close();
        self.shared.tracker.wait().await;
    }

    /// Compares one database with the upstream again, although it did not move there: the node calls this when it has
    /// set a database aside, so that a snapshot heals it without waiting for the next transaction.
    pub fn recheck(&self, name: DatabaseName) {
        self.shared.moved(name, Target { pos: Pos::default(), session: RECHECK });
    }

    /// How it goes now.
    pub fn status(&self) -> FollowStatus {
        let session = self.shared.session.borrow().clone();
        let state = self.shared.state.lock();
        let mut failing: Vec<_> =
            state.failing.iter().map(|(name, f)| (name.clone(), f.reason.clone())).collect();
        failing.sort();
        FollowStatus {
            upstream: session.map(|session| UpstreamInfo {
                identity: Identity { epoch: session.epoch(), ..session.peer.clone() },
                since: session.since,
                heard_unix_ms: state.heard_unix_ms,
            }),
            compared: state.compared,
            last_error: state.last_error.clone(),
            failing,
            unknown_upstream: state.unknown_upstream.iter().cloned().collect(),
            active: self.shared.workers.lock().len(),
        }
    }
}

/// No session has this number: the task asks for the log from wherever the database is now.
const RECHECK: u64 = u64::MAX;

/// Where the upstream is with a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    pos: Pos,
    /// The session that told it.
    session: u64,
}

/// A database that fails.
struct Failure {
    /// Kind of reason: a change of it is reported.
    kind: &'static str,
    reason: String,
}

/// What is shown in the status.
#[derive(Default)]
struct State {
    compared: bool,
    last_error: Option<String>,
    heard_unix_ms: i64,
    failing: HashMap<DatabaseName, Failure>,
    unknown_upstream: BTreeSet<DatabaseName>,
}

/// What all tasks of a follower share.
struct Shared {
    sink: Arc<dyn Sink>,
    options: FollowOptions,
    upstream: Arc<Upstream>,
    cancel: CancellationToken,
    tracker: TaskTracker,
    /// The connected upstream.
    session: watch::Sender<Option<Arc<Session>>>,
    /// One entry per database with a task.
    workers: Mutex<HashMap<DatabaseName, watch::Sender<Target>>>,
    /// Positions to acknowledge.
    acks: Latest<Pos>,
    /// Positions of the upstream, with its clock, on their way to the sink.
    reports: Latest<(Pos, i64)>,
    streams: Arc<Semaphore>,
    receives: Semaphore,
    snapshots: Semaphore,
    /// [`Sink::staging_dir`], once it was asked for.
    staging_dir: OnceLock<PathBuf>,
    /// Asks one idle stream to make room.
    room: Notify,
    /// Record bytes in memory over all databases.
    pending_bytes: AtomicUsize,
    /// Snapshots in the staging directory, with the transaction after which they need records.
    staged: Mutex<HashMap<DatabaseName, Txid>>,
    state: Mutex<State>,
}

impl Shared {
    /// Runs a call of the sink off the async threads.
    async fn with_sink<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Sink) -> T + Send + 'static,
    ) -> Result<T, String> {
        let sink = Arc::clone(&self.sink);
        self.tracker
            .spawn_blocking(move || call(&*sink))
            .await
            .map_err(|e| format!("a call of the engine failed: {e}"))
    }

    /// As [`Shared::with_sink`], for work on one database: as many at once as [`FollowOptions::receives_max`] says,
    /// which bounds the threads.
    async fn with_database<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Sink) -> T + Send + 'static,
    ) -> Result<T, String> {
        let _permit = self.receives.acquire().await.expect("never closed");
        self.with_sink(call).await
    }

    async fn staging_dir(&self) -> Result<PathBuf, String> {
        match self.staging_dir.get() {
            Some(dir) => Ok(dir.clone()),
            None => self.with_sink(|sink| sink.staging_dir()).await,
        }
    }

    /// The upstream's position of a database: wakes or starts its task.
    fn moved(self: &Arc<Self>, name: DatabaseName, target: Target) {
        let mut workers = self.workers.lock();
        if let Some(worker) = workers.get(&name) {
            worker.send_replace(target);
            return;
        }
        let (sender, receiver) = watch::channel(target);
        workers.insert(name.clone(), sender);
        drop(workers);
        self.tracker.spawn(database::run(Arc::clone(self), name, receiver));
    }

    /// Room for one more stream. When there is none, idle streams are asked to close.
    async fn stream_permit(&self) -> OwnedSemaphorePermit {
        let mut waiting = pin!(Arc::clone(&self.streams).acquire_owned());
        loop {
            tokio::select! {
                biased;
                permit = &mut waiting => return permit.expect("never closed"),
                () = async {
                    self.room.notify_one();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                } => {}
            }
        }
    }

    fn failed(&self, name: &DatabaseName, kind: &'static str, reason: String) {
        let mut state = self.state.lock();
        let known = state.failing.get(name).is_some_and(|failure| failure.kind == kind);
        if known {
            tracing::debug!(database = %name, "still cannot follow: {reason}");
        } else {
            tracing::warn!(database = %name, upstream = %self.upstream, "cannot follow: {reason}");
        }
        state.failing.insert(name.clone(), Failure { kind, reason });
    }

    /// The upstream does not know a database.
    fn unknown(&self, name: DatabaseName) {
        tracing::warn!(
            database = %name, upstream = %self.upstream,
            "this database is unknown to the upstream; it is left alone here"
        );
        self.state.lock().unknown_upstream.insert(name);
    }

    fn recovered(&self, name: &DatabaseName) {
        let mut state = self.state.lock();
        state.unknown_upstream.remove(name);
        if state.failing.remove(name).is_some() {
            tracing::info!(database = %name, upstream = %self.upstream, "follows again");
        }
    }
}

/// One connection to the upstream, from its answer to the control stream until that stream ends.
struct Session {
    /// Grows by one with each session.
    number: u64,
    upstream: Arc<Upstream>,
    options: FollowOptions,
    /// This node.
    own: Identity,
    /// The upstream, as it said at first.
    peer: Identity,
    since: SystemTime,
    /// The upstream brought a newer epoch than this node had seen: a new term began.
    new_term: bool,
    /// Newest epoch of the upstream.
    epoch: AtomicU64,
    /// Ends everything that goes over this session.
    cancel: CancellationToken,
    /// Carries log streams and small questions.
    records: tokio::sync::Mutex<Option<Connection>>,
    /// Carries snapshots, so that they do not delay records and heartbeats in the same socket.
    pages: tokio::sync::Mutex<Option<Connection>>,
}

impl Session {
    fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Relaxed))
    }

    /// Asks for `path_and_query` over the connection for records.
    async fn get(&self, path_and_query: &str) -> Result<Response<Incoming>, FollowError> {
        self.get_over(&self.records, path_and_query).await
    }

    async fn get_over(
        &self,
        slot: &tokio::sync::Mutex<Option<Connection>>,
        path_and_query: &str,
    ) -> Result<Response<Incoming>, FollowError> {
        let mut connection = {
            let mut slot = slot.lock().await;
            match &*slot {
                Some(connection) if !connection.is_closed() => connection.clone(),
                _ => {
                    let opened =
                        Connection::open(&self.upstream, &self.options, self.cancel.child_token()).await?;
                    slot.insert(opened).clone()
                }
            }
        };
        let own = Identity { epoch: self.epoch(), ..self.own.clone() };
        let body = crate::ship::body::full("");
        let (response, peer) = connection.send(Method::GET, path_and_query, body, &own).await?;
        check_epoch(&self.upstream, peer.epoch, self.epoch())?;
        if peer.node_id != self.peer.node_id {
            let why = format!("{peer} answers there now instead of {}", self.peer);
            return Err(FollowError::Lost { upstream: self.upstream.to_string(), why });
        }
        Ok(response)
    }
}
