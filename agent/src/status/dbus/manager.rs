//! The manager's object: the agent itself.

use super::authority::{Action, authorize};
use super::database::off_thread;
use super::error::BusError;
use super::names::object_path;
use super::objects::Objects;
use super::view::{BusView, Constants};
use crate::DatabaseName;
use crate::status::RoleRequest;
use crate::status::api::{NodeId, RoleName, RoleStatus, SyncStatus, troubles};
use crate::sync::RuleState;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, ObjectPath, OwnedObjectPath, interface};

/// Properties that change without a signal.
pub const HOT: [&str; 2] = ["DatabaseCount", "LagMillis"];

/// Names of a page of `ListDatabases` at most.
const PAGE_MAX: u32 = 10_000;

/// Databases that stand aside, and why.
pub type Quarantined = Arc<Mutex<BTreeMap<DatabaseName, String>>>;

/// The agent on the bus.
pub struct ManagerObject {
    view: Arc<dyn BusView>,
    constants: Constants,
    objects: Arc<Objects>,
    quarantined: Quarantined,
}

/// Name of the primary: this host's own, the connected upstream's, or empty when unknown.
pub(super) fn primary_of(role: &RoleStatus, own: &str) -> String {
    match role.name {
        RoleName::Primary => own.to_owned(),
        _ => {
            let upstream = role.upstream.as_ref().filter(|upstream| upstream.connected);
            upstream.and_then(|upstream| upstream.hostname.clone()).unwrap_or_default()
        }
    }
}

impl ManagerObject {
    /// The object of a running agent.
    pub fn new(view: Arc<dyn BusView>, objects: Arc<Objects>, quarantined: Quarantined) -> ManagerObject {
        ManagerObject { constants: view.constants(), view, objects, quarantined }
    }

    fn troubles_now(&self) -> Vec<String> {
        let quarantined = self.quarantined.lock();
        let databases = quarantined.iter().map(|(name, reason)| (name.as_str(), Some(reason.as_str())));
        let mut troubles = troubles(&self.view.role(), databases);
        troubles.extend(self.view.sync().iter().filter_map(SyncStatus::trouble));
        troubles
    }

    async fn role_request(
        &self,
        connection: &Connection,
        header: &Header<'_>,
        action: Action,
        request: RoleRequest,
    ) -> Result<(), BusError> {
        authorize(connection, header, action, HashMap::new()).await?;
        Ok(self.view.clone().request_role(request).await?)
    }
}

/// The agent of one cluster on this host.
#[interface(name = "io.litefs.LiteFS1.Manager")]
impl ManagerObject {
    /// Makes this host the primary. Refused (`StaticLease`) where the configuration names the primary.
    async fn promote(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), BusError> {
        self.role_request(connection, &header, Action::Promote, RoleRequest::Promote).await
    }

    /// Hands the lease over to another host, which becomes the primary; `node` is its name, or empty for the one that
    /// is farthest. Refused (`StaticLease`) where the configuration names the primary.
    async fn handoff(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
        node: String,
    ) -> Result<(), BusError> {
        let to = Some(node).filter(|node| !node.is_empty());
        self.role_request(connection, &header, Action::Handoff, RoleRequest::Handoff(to)).await
    }

    /// Ends this host's time as the primary. Refused (`StaticLease`) where the configuration names the primary.
    async fn demote(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), BusError> {
        self.role_request(connection, &header, Action::Demote, RoleRequest::Demote).await
    }

    /// Reads the configuration again and takes over what can change while running. Returns when that is done; a
    /// configuration with mistakes is an error (`BadConfiguration`) and changes nothing.
    async fn reload(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), BusError> {
        authorize(connection, &header, Action::Reload, HashMap::new()).await?;
        Ok(self.view.reload().await?)
    }

    /// The object of a database. Where there are more than 1,000 databases not each has its object from the start:
    /// this makes it.
    #[zbus(out_args("database"))]
    async fn get_database(
        &self,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<OwnedObjectPath, BusError> {
        let name = DatabaseName::new(&name).map_err(BusError::invalid)?;
        self.objects.on_request(connection, &name).await?;
        let path = ObjectPath::try_from(object_path(&name)).map_err(BusError::failed)?;
        Ok(path.into())
    }

    /// Names and last transactions of databases, in the order of their names: those after `after` (empty: from the
    /// first), at most `max` (0: as many as one answer may have, 10,000).
    #[zbus(out_args("databases"))]
    async fn list_databases(&self, after: String, max: u32) -> Result<Vec<(String, u64)>, BusError> {
        let max = if max == 0 { PAGE_MAX } else { max.min(PAGE_MAX) } as usize;
        off_thread(&self.view, move |view| {
            let mut names = view.names();
            let first = names.partition_point(|name| name.as_str() <= after.as_str());
            names.drain(..first);
            names.truncate(max);
            let listed =
                names.iter().filter_map(|name| Some((name.to_string(), view.database(name)?.txid.0)));
            Ok(listed.collect())
        })
        .await
    }

    /// Connected followers: name, node id, address, microseconds since 1970 when it connected, and how many
    /// transactions it has not acknowledged, over all databases.
    #[zbus(out_args("followers"))]
    async fn list_followers(&self) -> Result<Vec<(String, String, String, u64, u64)>, BusError> {
        off_thread(&self.view, |view| {
            let followers = view.followers().into_iter().map(|follower| {
                let since = u64::try_from(follower.connected_since_unix_ms).unwrap_or_default();
                let behind = follower.databases.iter().map(|db| db.lag_transactions).sum();
                let id = follower.node_id.to_string();
                (follower.name, id, follower.address, since.saturating_mul(1000), behind)
            });
            Ok(followers.collect())
        })
        .await
    }

    /// The role, the epoch or the primary changed.
    #[zbus(signal, name = "RoleChanged")]
    pub async fn role_is_another(
        emitter: &SignalEmitter<'_>,
        role: &str,
        epoch: u64,
        primary: &str,
    ) -> zbus::Result<()>;

    /// Databases have new transactions on this host: name, last transaction, and checksum after it in 16 hexadecimal
    /// digits. At most ten times a second; each database that changed in between is in it once, with its newest state.
    #[zbus(signal)]
    pub async fn changed(
        emitter: &SignalEmitter<'_>,
        databases: &[(String, u64, String)],
    ) -> zbus::Result<()>;

    /// A database cannot be trusted any more and stands aside; all others go on.
    #[zbus(signal)]
    pub async fn quarantined(emitter: &SignalEmitter<'_>, database: &str, reason: &str) -> zbus::Result<()>;

    /// This host had transactions that the primary does not have. They are kept as files in the directory `kept`, and
    /// the database follows the primary.
    #[zbus(signal)]
    pub async fn diverged(emitter: &SignalEmitter<'_>, database: &str, kept: &str) -> zbus::Result<()>;

    /// Version of the agent.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    /// Name of the cluster.
    #[zbus(property(emits_changed_signal = "const"))]
    fn cluster(&self) -> &str {
        &self.constants.cluster
    }

    /// Name of this host in the configuration.
    #[zbus(property(emits_changed_signal = "const"))]
    fn node_name(&self) -> &str {
        &self.constants.node_name
    }

    /// Identity of this node, 16 hexadecimal digits.
    #[zbus(property(emits_changed_signal = "const"))]
    fn node_id(&self) -> String {
        NodeId(self.view.node_id()).to_string()
    }

    /// Where applications find the databases.
    #[zbus(property(emits_changed_signal = "const"))]
    fn mount_directory(&self) -> String {
        self.constants.mount.to_string_lossy().into_owned()
    }

    /// `primary`, `replica` or `none`.
    #[zbus(property)]
    fn role(&self) -> &str {
        self.view.role().name.as_str()
    }

    /// Number of the primary's term, the newest that this host knows.
    #[zbus(property)]
    fn epoch(&self) -> u64 {
        self.view.role().epoch
    }

    /// Since when the role is what it is, in microseconds since 1970.
    #[zbus(property)]
    fn role_since(&self) -> u64 {
        u64::try_from(self.view.role().since_unix_ms).unwrap_or_default().saturating_mul(1000)
    }

    /// Name of the primary, or of the replica that this one follows; empty while none is known.
    #[zbus(property)]
    fn primary(&self) -> String {
        primary_of(&self.view.role(), &self.constants.node_name)
    }

    /// Address of the host that this one follows; empty on the primary.
    #[zbus(property)]
    fn upstream(&self) -> String {
        self.view.role().upstream.map(|upstream| upstream.url).unwrap_or_default()
    }

    /// Whether the upstream's stream is up; false on the primary, which has none.
    #[zbus(property)]
    fn upstream_connected(&self) -> bool {
        self.view.role().upstream.is_some_and(|upstream| upstream.connected)
    }

    /// Names of the hosts that follow this one now; `ListFollowers` tells more.
    #[zbus(property)]
    fn followers(&self) -> Vec<String> {
        let mut names = self.view.follower_names();
        names.sort();
        names
    }

    /// How commits fare that wait for followers: `synchronous`, `waiting`, `degraded` or `refusing`, the worst of all
    /// rules; empty where none wait, and on a replica.
    #[zbus(property)]
    fn sync_state(&self) -> &'static str {
        self.view.sync().iter().map(|rule| rule.state).max().map_or("", RuleState::as_str)
    }

    /// `ok`, or `degraded`: see `Troubles`.
    #[zbus(property)]
    fn health(&self) -> &str {
        if self.troubles_now().is_empty() { "ok" } else { "degraded" }
    }

    /// What is wrong, one sentence each.
    #[zbus(property)]
    fn troubles(&self) -> Vec<String> {
        self.troubles_now()
    }

    /// Milliseconds that some database is behind, or that the upstream has been silent; 0 on the primary, and the
    /// largest number while nothing has been heard yet.
    #[zbus(property(emits_changed_signal = "false"))]
    fn lag_millis(&self) -> u64 {
        self.view.lag_ms().unwrap_or(u64::MAX)
    }

    /// Databases on this host.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn database_count(&self) -> u64 {
        let view = self.view.clone();
        tokio::task::spawn_blocking(move || view.names().len() as u64).await.unwrap_or_default()
    }
}
