//! One host's agent: all its databases, its role and epoch, and the order in which everything starts and stops.
//!
//! ```text
//!   start: lock data directory -> log -> recover databases -> lease, first role -> compare -> door -> sockets -> follow
//!   stop:  lease let go, no more writes -> followers drained -> applying lets go -> door away -> sockets -> files marked -> log closed
//! ```

mod background;
mod bus;
mod candidate;
mod discovery;
mod forward;
mod halt;
mod handoff;
mod identity;
mod lease_driver;
mod lock_file;
mod role;
mod sink;
mod source;
mod takeover;
mod view;

pub use halt::HeldLock;
pub use identity::{Identity, IdentityError, LastStop};
pub use role::{Role, Upstream};

use crate::config::{Bus, Config, DoorKind, Hold, LeaseKind, Passthrough};
use crate::database::{Dirs, Shared};
use crate::door::{self, Door, fuse, preload};
use crate::hooks::Hooks;
use crate::log::{CommitLog, Options as LogOptions};
use crate::ship::follow::FollowOptions;
use crate::ship::http::access::Access;
use crate::ship::http::{HttpOptions, serve};
use crate::ship::server::{Server, ServerOptions};
use crate::status::changes::ChangeFeed;
use crate::status::events::{Event, EventBus, RoleData};
use crate::status::{Metrics, ViewError, api::RoleName, dbus, messages};
use crate::systemd::{self, listeners};
use anyhow::Context;
use discovery::Start;
use lease_driver::LeaseHandle;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use takeover::MountHold;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Followers get this long to take what they do not have yet when the agent stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How long an agent that is restarted waits for what is being applied.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);

/// How long the start waits for a lease to say who the primary is.
const FIRST_ROLE_PATIENCE: Duration = Duration::from_secs(2);

/// Newest position of an upstream's database, and when it was told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    position: ltx::Pos,
    at: std::time::Instant,
    /// Since when this node has not been there.
    behind_since: Option<std::time::Instant>,
}

/// One host's agent.
pub struct Node {
    pub(crate) config: RwLock<Config>,
    pub(crate) shared: Arc<Shared>,
    identity: Identity,
    /// Certificates and secret between this node and others.
    pub(crate) access: Arc<Access>,
    role: watch::Sender<Role>,
    write_gate: role::WriteGate,
    halt_locks: halt::Locks,
    forwarding: forward::Forwarding,
    lease: OnceLock<LeaseHandle>,
    /// What was found at the start and waits for the first role.
    discovered: Mutex<Option<discovery::Discovered>>,
    heard: Mutex<HashMap<crate::DatabaseName, Heard>>,
    last_heard_unix_ms: AtomicI64,
    /// The upstream has told all its positions since it was connected.
    compared: AtomicBool,
    /// What followers have: keyed by follower and database.
    followed: Mutex<HashMap<(u64, crate::DatabaseName), ltx::Txid>>,
    server: Mutex<Option<Arc<Server>>>,
    door: Mutex<Option<Door>>,
    hold: Arc<MountHold>,
    pub(crate) events: EventBus,
    pub(crate) feed: ChangeFeed,
    reloads: bus::Reloads,
    hooks: tokio::sync::Mutex<Option<Hooks>>,
    pub(crate) metrics: Metrics,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", &self.identity.node_id).field("role", &self.role()).finish()
    }
}

/// Runs the agent until it is told to stop.
pub fn run(config: Config) -> anyhow::Result<()> {
    let identity = Identity::open(&config.data.dir)?;
    let mut config = config;
    config.door = match config.door {
        DoorKind::Auto if door::has_fuse(&takeover::mounter(&config))? => DoorKind::Fuse,
        DoorKind::Auto => {
            tracing::info!("/dev/fuse cannot be opened: applications need the preload library (litefs exec)");
            DoorKind::Preload
        }
        chosen => chosen,
    };
    let (hold, guard) = MountHold::begin(&config, &identity)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    if let Some(guard) = &guard {
        runtime.spawn(crate::systemd::guard_scope::separate(guard.pid()));
    }
    let hold = Arc::new(hold);
    let result = runtime.block_on(serve_until_stopped(config, identity, hold.clone()));
    runtime.shutdown_timeout(Duration::from_secs(1));
    hold.end(guard);
    result
}

impl Node {
    /// Opens the data directory and recovers what is in it. Nothing is served yet.
    pub fn open(config: Config, identity: Identity, hold: Arc<MountHold>) -> anyhow::Result<Arc<Node>> {
        let access = Access::load(&config).context("cannot start with these secrets")?;
        let dirs = Dirs::new(config.data.dir.clone(), config.mount.dir.clone());
        for dir in [&dirs.files, &dirs.checksums, &dirs.staging, &dirs.orphans, &dirs.diverged, &dirs.log] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let options = LogOptions {
            segment_bytes: config.log.segment_size,
            retention_age: config.log.retention_age,
            retention_bytes: config.log.retention_size,
            // A payload must fit into a segment several times.
            inline_bytes_max: LogOptions::default().inline_bytes_max.min(config.log.segment_size / 4),
            ..LogOptions::default()
        };
        let log = CommitLog::open(&dirs.log, options).context("cannot open the commit log")?;
        for damage in log.damaged() {
            tracing::error!(
                MESSAGE_ID = messages::LOG_DAMAGED,
                %damage,
                "the commit log is damaged; databases that need this part are set aside"
            );
        }
        let epoch = identity.epoch;
        let shared = Shared::new(Arc::new(log), dirs, identity.node_id, epoch);
        let plain = identity.had_plain_files()?;
        if plain {
            shared.expect_wals_ahead();
        }
        let start = match identity.last_stop {
            _ if hold.is_taken_over() => Start::Live,
            LastStop::PowerFailed => Start::Alone(LastStop::PowerFailed),
            _ if plain => Start::Live,
            last_stop => Start::Alone(last_stop),
        };
        let found = discovery::discover(&shared, start).context("cannot read the data directory")?;
        background::remove_leftovers(&shared, start)?;
        tracing::info!(databases = found.databases, epoch = epoch.0, "databases are ready");
        Ok(Arc::new(Node {
            shared,
            identity,
            access,
            role: watch::Sender::new(Role::unknown(epoch)),
            write_gate: role::WriteGate::default(),
            halt_locks: halt::Locks::default(),
            forwarding: forward::Forwarding::default(),
            lease: OnceLock::new(),
            discovered: Mutex::new(Some(found)),
            heard: Mutex::default(),
            last_heard_unix_ms: AtomicI64::new(0),
            compared: AtomicBool::new(false),
            followed: Mutex::default(),
            server: Mutex::default(),
            door: Mutex::default(),
            hold,
            events: EventBus::default(),
            feed: ChangeFeed::default(),
            reloads: bus::Reloads::default(),
            hooks: tokio::sync::Mutex::default(),
            metrics: Metrics::default(),
            config: RwLock::new(config),
        }))
    }

    /// Lets applications in.
    pub fn open_door(self: &Arc<Self>) -> anyhow::Result<()> {
        let config = self.config.read().clone();
        let dir = &config.mount.dir;
        let runtime_dir = config.socket.path.parent().unwrap_or(dir).to_owned();
        let files = &self.shared.dirs.files;
        let locks = Arc::new(lock_file::LockFiles::of(self));
        let door = if config.door == DoorKind::Preload {
            let options = preload::Options {
                dir: dir.clone(),
                runtime_dir,
                mounter: takeover::mounter(&config),
                hold: match config.preload.hold {
                    Hold::Auto => config.lease.kind != LeaseKind::Static,
                    Hold::Always => true,
                    Hold::Never => false,
                },
            };
            if config.preload.forward_writes {
                self.forward_writes();
            }
            Door::Preload(preload::Door::open(self.shared.clone(), self.clone(), locks, &options)?)
        } else {
            if config.preload.forward_writes {
                tracing::warn!(
                    "preload.forward-writes has no effect behind the FUSE door: use litefs run --with-halt-lock-on"
                );
            }
            if !self.hold.is_taken_over() {
                if self.shared.wals_may_be_ahead()
                    && let Some(name) = preload::in_use(&self.shared)
                {
                    anyhow::bail!(
                        "applications still have {name} open through the preload library: stop them first, or keep \
                         door = \"preload\""
                    );
                }
                preload::Door::leave(dir, &runtime_dir, files)
                    .with_context(|| format!("cannot mount over {}", dir.display()))?;
            }
            // The last door may have been the other one.
            self.shared.write_protection.end(&self.shared);
            let connection = self.hold.connection()?;
            let options = fuse::Options {
                mount: dir.clone(),
                source: config.cluster.clone(),
                passthrough: config.mount.passthrough == Passthrough::Auto,
                threads: (config.mount.threads > 0).then_some(config.mount.threads),
            };
            Door::Fuse(fuse::Door::open(self.shared.clone(), self.clone(), locks, &options, connection)?)
        };
        self.identity.store_door(door.kind())?;
        if let Some(invalidator) = door.invalidator() {
            self.shared.set_invalidator(invalidator);
        }
        if self.hold.is_taken_over() {
            tracing::info!(mount = %dir.display(), "took over the mount of the last agent");
        }
        tracing::info!(dir = %dir.display(), door = door.kind(), passthrough = door.passes_through(), "applications may come");
        *self.door.lock() = Some(door);
        self.hold.is_served();
        if self.hold.is_taken_over() {
            self.finish_applying();
        } else if self.shared.wals_may_be_ahead() {
            // On plain files a dead journal is taken back with it: under EXCLUSIVE, since readers do so too.
            self.shared.known().iter().for_each(|db| db.apply_again_later());
        }
        if config.door != DoorKind::Preload {
            self.shared.expect_no_wals_ahead();
        }
        Ok(())
    }

    /// What the last agent was applying when it died. Through the mount, which is served now.
    fn finish_applying(&self) {
        for db in self.shared.known() {
            if let Err(error) = db.roll_back_dead_apply() {
                tracing::warn!(database = %db.name(), %error, "cannot take back what the last agent applied in part");
            }
            db.apply_again_later();
        }
    }

    /// Says which commits wait for followers.
    fn configure_sync(&self, config: &Config) -> anyhow::Result<()> {
        let configured = self.shared.gate.configure(&self.shared, &config.sync, &config.sync_rules);
        configured.context("cannot start the thread that holds commits for followers")?;
        self.shared.tell_door();
        Ok(())
    }

    /// Takes the mount away.
    pub fn close_door(&self) {
        if let Some(door) = self.door.lock().take()
            && let Err(error) = door.close()
        {
            tracing::error!(%error, "the mount could not be taken away");
        }
    }

    fn role_changed(&self) {
        self.feed.role();
        let status = self.role_status();
        self.events.publish(Event::PrimaryChange { data: RoleData::from(&status) });
    }

    fn follow_options(&self) -> FollowOptions {
        let config = self.config.read();
        let mut options = FollowOptions::new(config.node.name.clone(), config.cluster.clone());
        options.access = self.access.clone();
        options.timeout = config.replication.timeout;
        options.heartbeat = config.replication.heartbeat;
        options.retry = (config.replication.reconnect_min, config.replication.reconnect_max);
        options
    }
}

async fn serve_until_stopped(config: Config, identity: Identity, hold: Arc<MountHold>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut leave = signal(SignalKind::user_defined2())?;
    let opening = config.clone();
    let node = tokio::task::spawn_blocking(move || Node::open(opening, identity, hold)).await??;

    let stop = CancellationToken::new();
    let mut server_options = ServerOptions::new(config.node.name.clone(), config.cluster.clone());
    server_options.heartbeat = config.replication.heartbeat;
    server_options.timeout = config.replication.timeout;
    node.publish_notices();
    node.configure_sync(&config)?;
    let server = Server::new(node.clone(), server_options, stop.clone());
    *node.server.lock() = Some(server.clone());
    // Before the door: a port that is taken must not leave a mount behind.
    let tcp = listeners::http(config.http.listen).await?;
    if let Some(dir) = config.socket.path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    server.set_candidate(node.clone());
    server.set_halt_locks(Arc::new(halt::LendingNode(node.clone())));
    let handler = Arc::new(view::HttpHandler { node: node.clone() });
    // Others ask how far this node is before there is a primary.
    let options = HttpOptions { access: node.access.clone(), ..HttpOptions::default() };
    let tcp = tokio::spawn(serve(vec![tcp], server.clone(), handler.clone(), options, stop.clone()));
    let lease = lease_driver::start(&node, &stop)?;
    let lease = node.lease.get_or_init(|| lease);
    first_role(&node).await;
    let opening = node.clone();
    let opened = tokio::task::spawn_blocking(move || opening.open_door()).await?;
    let started = match opened {
        Ok(()) => listeners::control(&config.socket.path).await.map_err(anyhow::Error::from),
        Err(error) => Err(error),
    };
    let unix = match started {
        Ok(unix) => unix,
        Err(error) => {
            lease.stop().await;
            node.close_door();
            return Err(error);
        }
    };
    lease.door_is_open();
    let options = HttpOptions { access: node.access.clone(), ..HttpOptions::default() };
    let unix = tokio::spawn(serve(vec![unix], server.clone(), handler, options, stop.clone()));
    let background = background::spawn(node.clone(), stop.clone());
    let on_bus = (config.dbus.bus == Bus::System).then(|| dbus::spawn(node.clone(), stop.clone()));
    node.start_hooks(&config, &stop).await;
    let mut reloads = node.reloads.take()?;
    systemd::status::ready(node.as_ref());
    systemd::status::keep_informed(node.clone(), &config.cluster, node.roles(), stop.clone());
    tracing::info!(listen = %config.http.listen, socket = %config.socket.path.display(), "ready");

    let mut door_check = tokio::time::interval(Duration::from_millis(500));
    let outcome = loop {
        tokio::select! {
            _ = terminate.recv() => {
                if node.hold.can_be_left() && systemd::jobs::is_restarting().await {
                    leave_mount(&node);
                }
                break Ok(());
            }
            _ = leave.recv() => leave_mount(&node),
            _ = interrupt.recv() => break Ok(()),
            _ = hangup.recv() => {
                // What is wrong has been logged.
                let _ = reload(&node, lease, &stop).await;
            }
            Some(asked) = reloads.recv() => {
                let done = reload(&node, lease, &stop).await;
                // Whoever asked may have left.
                let _ = asked.send(done);
            }
            _ = door_check.tick() => {
                if node.door.lock().as_ref().is_some_and(Door::is_gone) {
                    break Err(anyhow::anyhow!("the mount at {} was taken away from outside", config.mount.dir.display()));
                }
            }
        }
    };

    tracing::info!("stopping");
    systemd::status::stopping();
    systemd::targets::stop(&config.cluster).await;
    node.stop_hooks().await;
    node.stop_forwarding();
    node.give_back_all().await;
    if config.lease.kind != LeaseKind::Static
        && node.role().name == RoleName::Primary
        && let Err(why) = node.hand_over_to_best().await
    {
        tracing::info!(why, "no other host takes the lease over");
    }
    lease.stop().await;
    node.drain_followers(DRAIN).await;
    {
        // Applying lets go through the mount.
        let node = node.clone();
        tokio::task::spawn_blocking(move || {
            node.detach_all();
            node.close_door();
        })
        .await?;
    }
    stop.cancel();
    server.stopped().await;
    let _ = tcp.await;
    let _ = unix.await;
    let _ = background.await;
    if let Some(on_bus) = on_bus {
        let _ = on_bus.await;
    }
    let stopping = node.clone();
    tokio::task::spawn_blocking(move || stopping.close_files()).await?;
    listeners::remove_control(&config.socket.path);
    outcome
}

/// Ends this process, whatever it is doing, and leaves everything to the next one, as after SIGKILL: what is acknowledged is
/// in the log, and what is not answered is asked again. Only what is being applied comes to its end: a thread that writes
/// through the mount may wait for an application's fsync, and the process could not end before that is answered.
fn leave_mount(node: &Node) -> ! {
    tracing::info!("leaving the mount to the next agent");
    let deadline = std::time::Instant::now() + LEAVE_PATIENCE;
    for db in node.shared.known() {
        // Nothing is applied from now on.
        std::mem::forget(db.apply.try_lock_until(deadline));
    }
    std::process::exit(0);
}

/// Waits until the node's role is known. A lease that does not answer does not keep readers away; applications that wait
/// for this agent already shall rather wait longer than get errors from a database that is read-only for a moment.
async fn first_role(node: &Arc<Node>) {
    let mut patience = FIRST_ROLE_PATIENCE;
    if node.hold.is_taken_over() {
        patience = patience.max(node.config.read().mount.takeover_wait);
    }
    let mut roles = node.roles();
    let known = roles.wait_for(|role| role.name != RoleName::None);
    if tokio::time::timeout(patience, known).await.is_err() {
        tracing::warn!("there is no primary yet: databases are read-only until there is one");
        let settling = node.clone();
        let _ = tokio::task::spawn_blocking(move || settling.settle(false)).await;
    }
}

/// SIGHUP: reads the configuration again and takes over what can change while running: role, upstream, log level.
async fn reload(node: &Arc<Node>, lease: &LeaseHandle, stop: &CancellationToken) -> Result<(), ViewError> {
    systemd::status::reloading();
    let loaded = node.config.read().reload().map_err(|error| error.to_string()).and_then(|new| {
        // Certificates and secret are replaced in their files before they end.
        node.access.reload(&new).map_err(|error| error.to_string())?;
        Ok(new)
    });
    let done = match loaded {
        Err(error) => {
            tracing::error!(
                MESSAGE_ID = messages::CONFIGURATION_REFUSED,
                error,
                "the configuration was not taken over"
            );
            Err(ViewError::BadConfiguration(error))
        }
        Ok(new) => {
            let old = node.config.read().clone();
            let restart_only = old.data != new.data
                || old.mount != new.mount
                || (old.http.listen, &old.http.advertise_url) != (new.http.listen, &new.http.advertise_url)
                || old.scheme() != new.scheme()
                || old.socket != new.socket
                || old.log != new.log
                || old.cluster != new.cluster
                || old.consul != new.consul
                || old.lease.kind != new.lease.kind
                || (old.lease.ttl, old.lease.candidate) != (new.lease.ttl, new.lease.candidate);
            if restart_only {
                tracing::warn!(
                    "[data], [mount], [socket], [log], [consul], http.listen, cluster, and lease.type, .ttl and .candidate take \
                     effect with the next start"
                );
            }
            crate::cli::logging::set_level(new.log_output.level);
            *node.config.write() = new.clone();
            if let Err(error) = node.configure_sync(&new) {
                tracing::error!(%error, "synchronous replication cannot begin");
            }
            lease.configure(node, &new).await;
            if old.on_change != new.on_change {
                node.start_hooks(&new, stop).await;
            }
            tracing::info!("the configuration was read again");
            Ok(())
        }
    };
    systemd::status::ready(node.as_ref());
    done
}

impl Node {
    /// Lets go of what applying holds, so that applications are the only writers.
    fn detach_all(&self) {
        self.detach_while(|| true);
    }

    fn detach_while(&self, go_on: impl Fn() -> bool) {
        for db in self.shared.known().into_iter().take_while(|_| go_on()) {
            if let Err(error) = db.detach() {
                tracing::warn!(database = %db.name(), %error, "applying could not let go of the database");
            }
        }
    }

    /// Waits until every follower has what is durable here, at most `limit`.
    async fn drain_followers(&self, limit: Duration) {
        let deadline = tokio::time::Instant::now() + limit;
        while !self.followers_have_all() {
            if tokio::time::Instant::now() > deadline {
                tracing::warn!("stopping although a follower has not acknowledged everything");
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Marks all databases durable; the next start has nothing to recover.
    fn close_files(&self) {
        let mut clean = true;
        for db in self.shared.known() {
            if let Err(error) = db.mark_durable() {
                tracing::warn!(database = %db.name(), %error, "cannot mark the database durable; the next start replays");
                clean = false;
            }
        }
        self.shared.log.close();
        if clean && let Err(error) = self.identity.stopped_cleanly() {
            tracing::warn!(%error, "cannot note the clean stop");
        }
    }

    pub(crate) fn note_heard(&self) {
        self.last_heard_unix_ms.store(crate::capture::unix_ms(), Ordering::Relaxed);
    }
}
