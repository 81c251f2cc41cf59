//! The side that is followed: answers the requests of the replication protocol out of a [`Source`].

mod changes;
mod log_stream;
mod session;
mod snapshot_stream;

pub use session::FollowerInfo;

use crate::DatabaseName;
use crate::lease::peers::{self, Candidate};
use crate::ship::body::{self, Body};
use crate::ship::engine::{EngineError, Epoch, Source};
use crate::ship::halt::{self, HaltLocks};
use crate::ship::http::PeerAddr;
use crate::ship::peer::{Identity, IdentityError, PROTOCOL, Refusal, RefusalCode, query_value};
use changes::Changes;
use http::{Method, Request, Response, Version};
use hyper::body::Incoming;
use ltx::{Checksum, Pos, Txid};
use session::Sessions;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Below this are the streams of single databases.
pub const DATABASES_PREFIX: &str = "/v1/databases/";
/// Path of the control stream.
pub const FOLLOW_PATH: &str = "/v1/follow";
/// Path of a database's log.
pub const LOG_PATH: &str = "/v1/databases/log";
/// Path of a database's snapshot.
pub const SNAPSHOT_PATH: &str = "/v1/databases/snapshot";
/// Path of a transaction's checksum.
pub const CHECKSUM_PATH: &str = "/v1/databases/checksum";

/// Who the server is and how patient.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Host name told to followers.
    pub node_name: String,
    /// Cluster; followers of another one are refused.
    pub cluster: String,
    /// Time between heartbeats on control streams.
    pub heartbeat: Duration,
    /// A follower that is silent for this long is dropped.
    pub timeout: Duration,
    /// A log stream on which nothing moved for this long is closed.
    pub idle_stream: Duration,
    /// Positions of databases whose log stream is open are told this often (their records tell them first).
    pub position_interval: Duration,
    /// Reads of the log and of pages at once.
    pub reads_max: usize,
}

impl ServerOptions {
    /// The defaults for a node.
    pub fn new(node_name: impl Into<String>, cluster: impl Into<String>) -> Self {
        ServerOptions {
            node_name: node_name.into(),
            cluster: cluster.into(),
            heartbeat: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            idle_stream: Duration::from_secs(60),
            position_interval: Duration::from_millis(100),
            reads_max: 64,
        }
    }
}

/// Answers followers. One per node.
pub struct Server {
    source: Arc<dyn Source>,
    options: ServerOptions,
    changes: Arc<Changes>,
    /// Bounds the threads that read for followers.
    reads: Semaphore,
    sessions: Sessions,
    /// Answers questions about the lease.
    candidate: OnceLock<Arc<dyn Candidate>>,
    /// Lends databases.
    halt_locks: OnceLock<Arc<dyn HaltLocks>>,
    cancel: CancellationToken,
    tracker: TaskTracker,
}

impl Server {
    /// A server over `source`; its streams end when `cancel` does. Call within a tokio runtime.
    pub fn new(source: Arc<dyn Source>, options: ServerOptions, cancel: CancellationToken) -> Arc<Self> {
        let changes = Arc::new(Changes::default());
        let tracker = TaskTracker::new();
        tracker.spawn(changes::dispatch(source.changes(), Arc::clone(&changes), cancel.clone()));
        let reads = Semaphore::new(options.reads_max);
        Arc::new(Server {
            source,
            options,
            changes,
            reads,
            sessions: Sessions::default(),
            candidate: OnceLock::new(),
            halt_locks: OnceLock::new(),
            cancel,
            tracker,
        })
    }

    /// Who answers other nodes that ask about the lease; once.
    pub fn set_candidate(&self, candidate: Arc<dyn Candidate>) {
        let _ = self.candidate.set(candidate);
    }

    /// Who lends databases to other nodes; once.
    pub fn set_halt_locks(&self, halt_locks: Arc<dyn HaltLocks>) {
        let _ = self.halt_locks.set(halt_locks);
    }

    /// Followers that are connected now.
    pub fn followers(&self) -> Vec<FollowerInfo> {
        self.sessions.list()
    }

    /// Names of followers that are connected now.
    pub fn follower_names(&self) -> Vec<String> {
        self.sessions.names()
    }

    /// Waits until all streams have ended, after the cancellation.
    pub async fn stopped(&self) {
        self.cancel.cancelled().await;
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Answers one request of the replication protocol.
    pub async fn handle(self: &Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let peer = address_of(&request);
        let path = request.uri().path().to_owned();
        match self.answer(&peer, request).await {
            Ok(response) => self.signed(response),
            Err(refusal) => self.refused(&peer, &path, &refusal),
        }
    }

    /// Answers a request with a refusal that was decided before the request was looked at.
    pub fn refuse(&self, request: &Request<Incoming>, refusal: &Refusal) -> Response<Body> {
        self.refused(&address_of(request), request.uri().path(), refusal)
    }

    fn refused(&self, peer: &str, path: &str, refusal: &Refusal) -> Response<Body> {
        match refusal.code {
            // Part of normal life; the follower decides what to do.
            RefusalCode::Gap | RefusalCode::Diverged | RefusalCode::NotKept | RefusalCode::HaltLock => {
                tracing::debug!(peer, path, "{refusal}");
            }
            _ => tracing::warn!(peer, path, "refused: {refusal}"),
        }
        self.signed(refusal.response())
    }

    fn signed(&self, mut response: Response<Body>) -> Response<Body> {
        self.identity().write(response.headers_mut());
        response
    }

    async fn answer(
        self: &Arc<Self>,
        peer: &str,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        if let Some(candidate) = self.candidate.get()
            && request.uri().path().starts_with(peers::PREFIX)
        {
            let asks = self.admit(peer, &request)?.node_id;
            let (method, uri) = (request.method(), request.uri());
            return peers::serve(&**candidate, asks, method, uri.path(), uri.query()).await;
        }
        if let Some(halt_locks) = self.halt_locks.get()
            && request.uri().path().starts_with(halt::PREFIX)
        {
            let asks = self.admit(peer, &request)?;
            return halt::serve(&**halt_locks, &asks, request).await;
        }
        let method = match request.uri().path() {
            FOLLOW_PATH => Method::POST,
            LOG_PATH | SNAPSHOT_PATH | CHECKSUM_PATH => Method::GET,
            other => {
                return Err(Refusal::new(
                    RefusalCode::BadRequest,
                    format!("there is nothing at {other} (this node speaks replication protocol {PROTOCOL})"),
                ));
            }
        };
        if request.method() != method {
            let message = format!("{} wants {method}, not {}", request.uri().path(), request.method());
            return Err(Refusal::new(RefusalCode::BadRequest, message));
        }
        if self.cancel.is_cancelled() {
            return Err(Refusal::new(RefusalCode::Stopping, "this node is stopping: try another or wait"));
        }
        let follower = self.admit(peer, &request)?;
        match request.uri().path() {
            FOLLOW_PATH if request.version() != Version::HTTP_2 => {
                let message = "the control stream needs HTTP/2 (cleartext, with prior knowledge)";
                Err(Refusal::new(RefusalCode::BadRequest, message))
            }
            FOLLOW_PATH => session::open(self, follower, peer, request.into_body()).await,
            LOG_PATH => log_stream::open(self, follower, &request).await,
            SNAPSHOT_PATH => snapshot_stream::open(self, follower, &request).await,
            _ => self.checksum(&request).await,
        }
    }

    /// Checks who asks; that it may ask at all was checked before.
    fn admit(&self, peer: &str, request: &Request<Incoming>) -> Result<Identity, Refusal> {
        let follower = Identity::read(request.headers()).map_err(|error| {
            let code = match &error {
                IdentityError::NotLitefs | IdentityError::Header(_) => RefusalCode::BadRequest,
                IdentityError::Protocol(_) => RefusalCode::Protocol,
            };
            Refusal::new(code, format!("cannot serve the peer at {peer}: {error}"))
        })?;
        let own = self.identity();
        if follower.cluster != own.cluster {
            let message = format!(
                "{follower} at {peer} belongs to cluster {:?}, this node {own} to cluster {:?}: correct its upstream or its cluster name",
                follower.cluster, own.cluster
            );
            return Err(Refusal::new(RefusalCode::Cluster, message));
        }
        if follower.node_id == own.node_id {
            let message = format!(
                "the peer at {peer} has the id of this node, {own}: its upstream is itself, or its data directory is a copy"
            );
            return Err(Refusal::new(RefusalCode::SameNode, message));
        }
        self.not_stale(&follower, follower.epoch)?;
        Ok(follower)
    }

    /// Refuses to serve a follower that has seen a newer epoch than this node.
    fn not_stale(&self, follower: &Identity, theirs: Epoch) -> Result<(), Refusal> {
        let own = self.source.epoch();
        if theirs <= own {
            return Ok(());
        }
        let message = format!(
            "this node {} is stale: it serves epoch {}, but {follower} has seen epoch {}; follow the current primary",
            self.identity(),
            own.0,
            theirs.0
        );
        Err(Refusal::new(RefusalCode::Stale, message))
    }

    fn identity(&self) -> Identity {
        Identity {
            node_id: self.source.node_id(),
            node_name: self.options.node_name.clone(),
            cluster: self.options.cluster.clone(),
            epoch: self.source.epoch(),
        }
    }

    /// Durable position of a database that has transactions. One that has none yet is not told of: it must never
    /// look like an emptied one to a follower that has data under its name.
    fn position(&self, name: &DatabaseName) -> Option<Pos> {
        self.source.position(name).filter(|pos| pos.txid.0 > 0)
    }

    /// `GET /v1/databases/checksum`: the post-apply checksum of a transaction as 16 hex digits.
    async fn checksum(&self, request: &Request<Incoming>) -> Result<Response<Body>, Refusal> {
        let (name, txid) = (database(request)?, parameter::<Txid>(request, "txid")?);
        let of = name.clone();
        let known = self.blocking(move |source| source.checksum_at(&of, txid)).await?;
        let position = self.position(&name);
        match known {
            Some(checksum) => Ok(Response::new(body::full(checksum.to_string()))),
            None => Err(Refusal {
                position,
                ..Refusal::new(
                    RefusalCode::NotKept,
                    format!("no record of transaction {txid} of {name} is kept here"),
                )
            }),
        }
    }

    /// Runs a call that may wait for the disk.
    async fn blocking<T, F>(&self, call: F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Source) -> Result<T, EngineError> + Send + 'static,
    {
        let _permit = self.reads.acquire().await.expect("never closed");
        let source = Arc::clone(&self.source);
        match tokio::task::spawn_blocking(move || call(&*source)).await {
            Ok(result) => Ok(result?),
            Err(e) => Err(Refusal::new(RefusalCode::Engine, format!("reading the database failed: {e}"))),
        }
    }
}

/// Where a request comes from, for people.
fn address_of(request: &Request<Incoming>) -> String {
    request.extensions().get::<PeerAddr>().map_or("an unknown address", |peer| &*peer.0).to_owned()
}

/// The database that a request names.
fn database(request: &Request<Incoming>) -> Result<DatabaseName, Refusal> {
    let bad = |why: String| Refusal::new(RefusalCode::BadRequest, why);
    let text = query_value(request.uri().query(), "name")
        .ok_or_else(|| bad("the query has no (properly percent-encoded) name=".into()))?;
    DatabaseName::new(&text).map_err(|e| bad(e.to_string()))
}

/// A required parameter of the query.
fn parameter<T: FromStr>(request: &Request<Incoming>, key: &str) -> Result<T, Refusal> {
    query_value(request.uri().query(), key)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Refusal::new(RefusalCode::BadRequest, format!("the query has no valid {key}=")))
}

/// A position out of the query.
fn position(request: &Request<Incoming>, txid: &str, checksum: &str) -> Result<Pos, Refusal> {
    Ok(Pos { txid: parameter::<Txid>(request, txid)?, checksum: parameter::<Checksum>(request, checksum)? })
}
