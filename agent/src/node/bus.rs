//! The node as the system bus sees it.

use super::Node;
use crate::DatabaseName;
use crate::config::Config;
use crate::database::Database;
use crate::door::fuse::RoleView;
use crate::hooks::{HookDirs, Hooks};
use crate::ship::engine::EngineError;
use crate::status::api::{DatabaseStatus, FollowerStatus, RoleStatus, SyncStatus};
use crate::status::changes::ChangeFeed;
use crate::status::dbus::view::{BusView, Checkpointed, Constants};
use crate::status::{NodeView, ViewError};
use futures_util::future::BoxFuture;
use ltx::Pos;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Asks the main loop to read the configuration again.
pub(super) type ReloadRequest = oneshot::Sender<Result<(), ViewError>>;

/// Where reloads are asked for, and where the main loop takes them.
#[derive(Debug)]
pub(super) struct Reloads {
    requests: mpsc::UnboundedSender<ReloadRequest>,
    taken: parking_lot::Mutex<Option<mpsc::UnboundedReceiver<ReloadRequest>>>,
}

impl Default for Reloads {
    fn default() -> Self {
        let (requests, taken) = mpsc::unbounded_channel();
        Reloads { requests, taken: parking_lot::Mutex::new(Some(taken)) }
    }
}

impl Reloads {
    /// The main loop's end, once.
    pub(super) fn take(&self) -> anyhow::Result<mpsc::UnboundedReceiver<ReloadRequest>> {
        self.taken.lock().take().ok_or_else(|| anyhow::anyhow!("the node is served twice"))
    }
}

impl From<EngineError> for ViewError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::NoSuchDatabase(name) => ViewError::NoSuchDatabase(name),
            EngineError::Quarantined { name, reason } => ViewError::Quarantined { name, reason },
            EngineError::Busy(name) => ViewError::Busy(name),
            EngineError::ChecksumMismatch(what) => ViewError::Damaged(what),
            error => ViewError::Other(error.to_string()),
        }
    }
}

impl Node {
    fn known_database(&self, name: &DatabaseName) -> Result<Arc<Database>, ViewError> {
        let known = self.shared.database(name);
        known.filter(|db| db.glance().is_database()).ok_or_else(|| ViewError::NoSuchDatabase(name.clone()))
    }

    /// See [`NodeView::reload`].
    pub(super) fn ask_reload(&self) -> BoxFuture<'static, Result<(), ViewError>> {
        let (answer, answered) = oneshot::channel();
        let sent = self.reloads.requests.send(answer);
        Box::pin(async move {
            let stopping = || ViewError::Other("the agent is stopping".into());
            sent.map_err(|_| stopping())?;
            answered.await.map_err(|_| stopping())?
        })
    }

    /// Starts the hooks of a configuration, in place of those of the last one.
    pub(super) async fn start_hooks(self: &Arc<Self>, config: &Config, stop: &CancellationToken) {
        let mut hooks = self.hooks.lock().await;
        if let Some(old) = hooks.take() {
            old.stop().await;
        }
        let run = config.socket.path.parent().unwrap_or(Path::new("/"));
        let dirs = HookDirs { memory: config.data.dir.join("hooks"), environment: run.join("hooks") };
        if !config.on_change.is_empty() {
            *hooks = Some(Hooks::spawn(self.clone(), &config.on_change, &dirs, stop));
        }
    }

    /// Ends the hooks.
    pub(super) async fn stop_hooks(&self) {
        if let Some(hooks) = self.hooks.lock().await.take() {
            hooks.stop().await;
        }
    }
}

impl BusView for Node {
    fn constants(&self) -> Constants {
        let config = self.config.read();
        Constants {
            cluster: config.cluster.clone(),
            node_name: config.node.name.clone(),
            mount: config.mount.dir.clone(),
        }
    }

    fn role(&self) -> RoleStatus {
        self.role_status()
    }

    fn lag_ms(&self) -> Option<u64> {
        RoleView::lag_ms(self).map(|ms| u64::try_from(ms).unwrap_or_default())
    }

    fn followers(&self) -> Vec<FollowerStatus> {
        self.follower_statuses()
    }

    fn sync(&self) -> Vec<SyncStatus> {
        self.sync_statuses()
    }

    fn follower_names(&self) -> Vec<String> {
        self.server.lock().as_ref().map(|server| server.follower_names()).unwrap_or_default()
    }

    fn names(&self) -> Vec<DatabaseName> {
        // In order: the map that they come from is sorted.
        let known = self.shared.known();
        let there = known.iter().filter(|db| db.glance().is_database());
        there.map(|db| db.name().clone()).collect()
    }

    fn database(&self, name: &DatabaseName) -> Option<DatabaseStatus> {
        let db = self.shared.database(name)?;
        let status = self.database_status(&db);
        let known = status.txid.0 > 0 || status.reason.is_some();
        known.then_some(status)
    }

    fn feed(&self) -> &ChangeFeed {
        &self.feed
    }

    fn checkpoint(&self, name: &DatabaseName) -> Result<Checkpointed, ViewError> {
        let db = self.known_database(name)?;
        if let Some(reason) = db.glance().quarantined {
            return Err(ViewError::Quarantined { name: name.clone(), reason });
        }
        let outcome = db.checkpoint(self.config.read().replication.apply_wait)?;
        db.mark_durable().map_err(|error| ViewError::Other(error.to_string()))?;
        Ok(Checkpointed { frames: u64::from(outcome.frames), moved: u64::from(outcome.backfilled) })
    }

    fn snapshot(&self, name: &DatabaseName) -> Result<(PathBuf, Pos), ViewError> {
        let dir = self.shared.dirs.data.join("snapshots");
        Ok(self.known_database(name)?.write_snapshot(&dir)?)
    }

    fn verify(&self, name: &DatabaseName) -> Result<Pos, ViewError> {
        // A copy is checked page by page against its position; it is gone with the descriptor.
        Ok(NodeView::export(self, name)?.position)
    }
}
