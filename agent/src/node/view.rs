//! The node as operators, scripts and applications see it.

use super::Node;
use crate::DatabaseName;
use crate::database::import::ImportError;
use crate::database::{Database, Notice};
use crate::door::fuse::RoleView;
use crate::ship::engine::EngineError;
use crate::ship::http::Handler;
use crate::status::api::*;
use crate::status::changes::Happening;
use crate::status::events::{DivergenceData, Event, QuarantineData, SyncData, TxData};
use crate::status::{Export, Metrics, NodeView, RoleRequest, ViewError, handler};
use crate::sync::board::RuleView;
use crate::systemd::status::{Service, Summary};
use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use ltx::{Pos, Txid};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::broadcast;

/// Files that are not replicated, in a status at most.
const PLAIN_FILES_SHOWN: usize = 100;

/// Answers what is not shipping.
pub struct HttpHandler {
    /// The node.
    pub node: Arc<Node>,
}

impl Handler for HttpHandler {
    fn handle(
        &self,
        request: http::Request<Incoming>,
        privileged: bool,
    ) -> BoxFuture<'_, http::Response<crate::ship::body::Body>> {
        let node: Arc<dyn NodeView> = self.node.clone();
        Box::pin(handler::handle(request, privileged, node))
    }
}

impl RoleView for Node {
    fn primary_hostname(&self) -> Option<String> {
        self.role().upstream.filter(|u| u.connected).and_then(|u| u.hostname)
    }

    fn lag_ms(&self) -> Option<i64> {
        match self.role().name {
            RoleName::Primary => Some(0),
            _ if self.last_heard_unix_ms.load(Ordering::Relaxed) == 0 => None,
            _ => Some(self.lag().as_millis() as i64),
        }
    }
}

impl Node {
    /// How long some database has been behind, or how long the upstream has been silent.
    fn lag(&self) -> Duration {
        let connected = self.role().upstream.is_some_and(|u| u.connected);
        let heard = self.heard.lock();
        let behind = heard.values().filter_map(|h| h.behind_since).map(|since| since.elapsed()).max();
        drop(heard);
        let silence = if connected {
            Duration::ZERO
        } else {
            let last = self.last_heard_unix_ms.load(Ordering::Relaxed);
            Duration::from_millis((crate::capture::unix_ms() - last).max(0) as u64)
        };
        behind.unwrap_or_default().max(silence)
    }

    /// The role for status and events.
    pub(super) fn role_status(&self) -> RoleStatus {
        let role = self.role();
        let heard = self.last_heard_unix_ms.load(Ordering::Relaxed);
        RoleStatus {
            name: role.name,
            epoch: self.shared.epoch().0,
            since_unix_ms: role.since_unix_ms,
            upstream: role.upstream.map(|u| UpstreamStatus {
                url: u.url,
                hostname: u.hostname,
                connected: u.connected,
                last_heartbeat_unix_ms: (heard > 0).then_some(heard),
            }),
            waits: role.waits,
        }
    }

    /// Whether applications here can see all that the upstream has told of; a primary is.
    fn is_caught_up(&self) -> bool {
        let role = self.role();
        if role.name == RoleName::Primary {
            return true;
        }
        let connected = role.upstream.is_some_and(|upstream| upstream.connected);
        // A copy: a database's state must not be waited for while the stream tells positions.
        let heard: Vec<_> =
            self.heard.lock().iter().map(|(name, heard)| (name.clone(), heard.position.txid)).collect();
        connected
            && self.compared.load(Ordering::Acquire)
            && heard.iter().all(|(name, txid)| {
                self.shared.database(name).map_or(Txid(0), |db| db.visible_position().txid) >= *txid
            })
    }

    /// Connected followers.
    pub(super) fn follower_statuses(&self) -> Vec<FollowerStatus> {
        let followed = self.followed.lock().clone();
        let sessions = self.server.lock().as_ref().map(|s| s.followers()).unwrap_or_default();
        sessions
            .into_iter()
            .map(|info| FollowerStatus {
                node_id: NodeId(info.identity.node_id),
                name: info.identity.node_name.clone(),
                address: info.peer.clone(),
                connected_since_unix_ms: info
                    .since
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |d| d.as_millis() as i64),
                databases: followed
                    .iter()
                    .filter(|((follower, _), _)| *follower == info.identity.node_id)
                    .map(|((_, name), txid)| FollowerDatabase {
                        name: name.to_string(),
                        txid: *txid,
                        lag_transactions: self
                            .shared
                            .database(name)
                            .map_or(0, |db| db.durable_position().txid.0.saturating_sub(txid.0)),
                    })
                    .collect(),
            })
            .collect()
    }

    /// How commits fare that wait for followers.
    pub(super) fn sync_statuses(&self) -> Vec<SyncStatus> {
        if self.role().name != RoleName::Primary {
            return Vec::new();
        }
        let status = |rule: RuleView| SyncStatus {
            databases: patterns(rule.databases),
            acks: rule.policy.acks,
            members: rule.policy.members,
            connected: rule.connected,
            on_timeout: rule.policy.on_timeout.as_str().into(),
            timeout_ms: rule.policy.timeout.as_millis() as u64,
            state: rule.state,
            waiting: rule.waiting as u64,
            oldest_wait_ms: rule.oldest.map(|oldest| oldest.as_millis() as u64),
        };
        self.shared.gate.view().into_iter().map(status).collect()
    }

    pub(super) fn database_status(&self, db: &Database) -> DatabaseStatus {
        let is_primary = self.role().name == RoleName::Primary;
        let heard = self.heard.lock().get(db.name()).copied();
        let halt_lock = self.halt_lock_of(db.name());
        let st = db.glance();
        let lag = match heard {
            Some(heard) if !is_primary => {
                let transactions = heard.position.txid.0.saturating_sub(st.applied.position.txid.0);
                Some(Lag {
                    transactions,
                    bytes: (transactions == 0).then_some(0),
                    ms: heard.behind_since.map_or(0, |since| since.elapsed().as_millis() as u64),
                })
            }
            _ => None,
        };
        DatabaseStatus {
            name: db.name().to_string(),
            txid: st.applied.position.txid,
            checksum: st.applied.position.checksum,
            page_size: st.page_size,
            pages: st.page_count,
            size_bytes: u64::from(st.page_size) * u64::from(st.page_count),
            journal_mode: if st.wal_mode { "wal" } else { "rollback" }.into(),
            state: if st.quarantined.is_some() { DatabaseState::Quarantined } else { DatabaseState::Ok },
            reason: st.quarantined,
            lag,
            wal_frames: st.wal_frames,
            open_handles: u64::from(st.handles),
            halt_lock,
            last_change_unix_ms: (st.last_change_ms > 0).then_some(st.last_change_ms),
        }
    }

    /// Publishes what happens to databases.
    pub(super) fn publish_notices(self: &Arc<Self>) {
        let node = Arc::downgrade(self);
        let metrics = node.clone();
        self.shared.log.on_sync(Box::new(move |took| {
            if let Some(node) = metrics.upgrade() {
                node.metrics.fsynced(took);
            }
        }));
        let (told, waited) = (node.clone(), node.clone());
        self.shared.gate.tell(
            move |report| {
                let Some(node) = told.upgrade() else { return };
                node.feed.role();
                let data = SyncData {
                    databases: patterns(report.databases.clone()),
                    state: report.state,
                    acks: report.acks,
                    connected: report.connected,
                };
                node.events.publish(Event::Sync { data });
            },
            move |took| {
                if let Some(node) = waited.upgrade() {
                    node.metrics.acknowledged(took);
                }
            },
        );
        self.shared.on_notice(move |notice| {
            let Some(node) = node.upgrade() else { return };
            match &notice {
                Notice::Transactions(db, _) => node.feed.database(db.name()),
                Notice::Quarantined(db, reason) => {
                    let (database, reason) = (db.clone(), reason.clone());
                    node.feed.happened(&Happening::Quarantined { database, reason });
                    node.feed.database(db);
                    if let Some(lease) = node.lease.get() {
                        lease.heal(db.clone());
                    }
                }
                Notice::Diverged(db, kept) => {
                    let (database, kept) = (db.clone(), kept.clone());
                    node.feed.happened(&Happening::Diverged { database, kept });
                }
            }
            if let Notice::Transactions(db, count) = &notice {
                let counts = node.metrics.database(db.name());
                let counter = if node.shared.is_writable() { counts.commits } else { counts.applies };
                counter.add(*count);
            }
            if !node.events.has_readers() {
                return;
            }
            node.events.publish(match notice {
                Notice::Transactions(db, _) => {
                    let st = db.glance();
                    let data = TxData {
                        txid: st.applied.position.txid,
                        post_apply_checksum: st.applied.position.checksum,
                        page_size: st.applied.page_size,
                        commit: st.applied.page_count,
                        timestamp: st.last_change_ms,
                    };
                    Event::Tx { db: db.name().clone(), data }
                }
                Notice::Quarantined(db, reason) => Event::Quarantine { db, data: QuarantineData { reason } },
                Notice::Diverged(db, kept) => Event::Divergence { db, data: DivergenceData { kept } },
            });
        });
    }
}

/// Patterns of a rule, for others.
fn patterns(databases: Vec<String>) -> Vec<String> {
    if databases.is_empty() { vec!["**".into()] } else { databases }
}

impl Service for Node {
    fn summary(&self) -> Summary {
        let known = self.shared.known();
        // A large transaction holds the state of its database for long; one that is set aside has none.
        let is_quarantined =
            |db: &&Arc<Database>| db.try_state().is_some_and(|state| state.quarantine_reason().is_some());
        let quarantined = known.iter().filter(is_quarantined).count();
        let role = self.role_status();
        let lag = if role.name == RoleName::Replica { self.lag() } else { Duration::ZERO };
        let followers = self.server.lock().as_ref().map_or(0, |server| server.followers().len());
        Summary { role, databases: self.shared.databases().len(), quarantined, followers, lag }
    }

    fn probe(&self) {
        // The flusher calls this back from its thread, also when there is nothing to sync.
        let (sender, receiver) = std::sync::mpsc::channel();
        let log = &self.shared.log;
        log.on_durable(log.durable(), Box::new(move |_| sender.send(()).unwrap_or(())));
        let _ = receiver.recv();
        // The kernel asks the door for this file each time. What it answers does not matter.
        let _ = std::fs::read(self.shared.dirs.mount.join(".lag"));
    }
}

impl NodeView for Node {
    fn status(&self) -> Status {
        self.shared.catch_up();
        let config = self.config.read();
        let mut databases: Vec<DatabaseStatus> = self
            .shared
            .known()
            .iter()
            .filter(|db| db.glance().is_database())
            .map(|db| self.database_status(db))
            .collect();
        databases.sort_by(|a, b| a.name.cmp(&b.name));
        let followers = self.follower_statuses();
        let (door, passthrough) =
            self.door.lock().as_ref().map_or(("none", false), |door| (door.kind(), door.passes_through()));
        Status {
            cluster: config.cluster.clone(),
            node: NodeStatus {
                name: config.node.name.clone(),
                id: NodeId(self.shared.node_id),
                version: env!("CARGO_PKG_VERSION").into(),
            },
            caught_up: self.is_caught_up(),
            role: self.role_status(),
            mount: MountStatus { dir: config.mount.dir.clone(), door: door.into(), passthrough },
            databases,
            followers,
            sync: self.sync_statuses(),
            log: LogStatus {
                oldest_lsn: self.shared.log.oldest().0,
                durable_lsn: self.shared.log.durable().0,
                bytes: self.shared.log.disk_bytes(),
            },
            files_not_replicated: super::discovery::files_not_replicated(&self.shared, PLAIN_FILES_SHOWN),
        }
    }

    fn node_id(&self) -> u64 {
        self.shared.node_id
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn export(&self, name: &DatabaseName) -> Result<Export, ViewError> {
        self.shared.catch_up();
        let known = self.shared.database(name).filter(|db| db.glance().page_count > 0);
        let db = known.ok_or_else(|| ViewError::NoSuchDatabase(name.clone()))?;
        let failed = |e: std::io::Error| ViewError::Other(format!("cannot export {name}: {e}"));
        let copy = tempfile::Builder::new()
            .prefix("export-")
            .suffix(".db")
            .tempfile_in(&self.shared.dirs.staging)
            .map_err(failed)?
            .into_temp_path();
        let position = db.copy_consistently(&copy).map_err(|e| match e {
            EngineError::Quarantined { name, reason } => ViewError::Quarantined { name, reason },
            other => ViewError::Other(other.to_string()),
        })?;
        // The name goes with the path's guard, the content stays until the last reader is done.
        Ok(Export { file: File::open(&copy).map_err(failed)?, position })
    }

    fn import(&self, name: &DatabaseName, staged: &Path) -> Result<Pos, ViewError> {
        if !self.shared.is_writable() {
            return Err(ViewError::NotPrimary { primary: self.primary_hostname() });
        }
        if self.shared.database(name).is_some_and(|db| db.is_lent()) {
            return Err(ViewError::Busy(name.clone()));
        }
        self.shared.database_or_new(name).import(staged).map_err(|e| match e {
            ImportError::NotADatabase { .. } => ViewError::BadDatabase(e.to_string()),
            ImportError::Apply(crate::apply::ApplyError::Busy { .. }) => ViewError::Busy(name.clone()),
            e => ViewError::Other(e.to_string()),
        })
    }

    fn reload(&self) -> BoxFuture<'static, Result<(), ViewError>> {
        self.ask_reload()
    }

    fn request_role(self: Arc<Self>, request: RoleRequest) -> BoxFuture<'static, Result<(), ViewError>> {
        Box::pin(async move { self.change_role_on_request(request).await })
    }

    fn halt(self: Arc<Self>, name: DatabaseName) -> BoxFuture<'static, Result<super::HeldLock, ViewError>> {
        Box::pin(Node::halt(self, name))
    }

    fn import_dir(&self) -> PathBuf {
        self.shared.dirs.staging.clone()
    }
}
