//! One connection's service: exports the objects and tells what changes.

use super::manager::{HOT, ManagerObject, Quarantined, primary_of};
use super::names::{MANAGER_INTERFACE, MANAGER_PATH};
use super::objects::{Objects, Told, is_gone, tell, values};
use super::view::BusView;
use crate::DatabaseName;
use crate::status::api::{DatabaseState, DatabaseStatus, RoleStatus};
use crate::status::changes::{ChangeSet, Happening, Subscription};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use zbus::Connection;
use zbus::fdo::ObjectManager;
use zbus::object_server::InterfaceRef;

/// Between two rounds of signals.
const ROUND: Duration = Duration::from_millis(100);

/// Objects whose properties are told in one round; the others wait for the next.
const OBJECTS_PER_ROUND: usize = 100;

/// Databases in one `Changed` signal.
const CHANGED_PER_SIGNAL: usize = 1000;

/// Between looks at what nobody tells: followers.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The objects on one connection.
pub struct Service {
    connection: Connection,
    view: Arc<dyn BusView>,
    changes: Arc<Subscription>,
    objects: Arc<Objects>,
    quarantined: Quarantined,
    manager: InterfaceRef<ManagerObject>,
    told: Told,
    role: RoleStatus,
    /// Databases whose properties are to be told, those that have waited longest first, ...
    waiting: VecDeque<DatabaseName>,
    /// ... and the same as a set.
    waits: HashSet<DatabaseName>,
}

impl Service {
    /// Exports everything; nothing is told yet.
    pub async fn start(connection: &Connection, view: Arc<dyn BusView>) -> zbus::Result<Service> {
        // Subscribed first: what changes while the objects are made is told afterwards.
        let changes = view.feed().subscribe();
        let objects = Arc::new(Objects::new(view.clone()));
        let quarantined = Quarantined::default();
        let looking = view.clone();
        let aside = tokio::task::spawn_blocking(move || {
            let names = looking.names().into_iter();
            names.filter_map(|name| Some((reason(&looking.database(&name)?)?, name))).collect::<Vec<_>>()
        });
        let aside = aside.await.map_err(|error| zbus::Error::Failure(error.to_string()))?;
        quarantined.lock().extend(aside.into_iter().map(|(reason, name)| (name, reason)));
        let manager = ManagerObject::new(view.clone(), objects.clone(), quarantined.clone());
        let server = connection.object_server();
        server.at(MANAGER_PATH, manager).await?;
        objects.export_first(connection).await?;
        server.at(MANAGER_PATH, ObjectManager).await?;
        let manager = server.interface::<_, ManagerObject>(MANAGER_PATH).await?;
        let told = values(connection, &manager).await?;
        let (connection, role) = (connection.clone(), view.role());
        Ok(Service {
            connection,
            view,
            changes,
            objects,
            quarantined,
            manager,
            told,
            role,
            waiting: VecDeque::new(),
            waits: HashSet::new(),
        })
    }

    /// Tells what changes, until the connection fails.
    pub async fn run(&mut self) -> zbus::Result<()> {
        let changes = self.changes.clone();
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let set = if self.waiting.is_empty() {
                tokio::select! {
                    set = changes.next() => set,
                    _ = looks.tick() => ChangeSet::default(),
                }
            } else {
                // There is something to tell already: whatever has come by now goes along.
                tokio::select! { biased; set = changes.next() => set, () = std::future::ready(()) => ChangeSet::default() }
            };
            self.round(set).await?;
            tokio::time::sleep(ROUND).await;
        }
    }

    /// Tells one set of changes.
    pub(super) async fn round(&mut self, set: ChangeSet) -> zbus::Result<()> {
        let statuses = self.read(set.databases).await?;
        for (name, status) in &statuses {
            let mut quarantined = self.quarantined.lock();
            match reason(status) {
                Some(reason) => quarantined.insert(name.clone(), reason),
                None => quarantined.remove(name),
            };
        }
        let emitter = self.manager.signal_emitter();
        for happening in &set.happenings {
            match happening {
                Happening::Quarantined { database, reason } => {
                    ManagerObject::quarantined(emitter, database.as_str(), reason).await?;
                }
                Happening::Diverged { database, kept } => {
                    ManagerObject::diverged(emitter, database.as_str(), &kept.to_string_lossy()).await?;
                }
            }
        }
        let changed: Vec<(String, u64, String)> = statuses
            .iter()
            .map(|(name, status)| (name.to_string(), status.txid.0, status.checksum.to_string()))
            .collect();
        for some in changed.chunks(CHANGED_PER_SIGNAL) {
            ManagerObject::changed(emitter, some).await?;
        }
        let own = self.view.constants().node_name;
        let role = self.view.role();
        let shown = |role: &RoleStatus| (role.name, role.epoch, primary_of(role, &own));
        if shown(&role) != shown(&self.role) {
            let primary = primary_of(&role, &own);
            ManagerObject::role_is_another(emitter, role.name.as_str(), role.epoch, &primary).await?;
        }
        self.role = role;
        tell(&self.connection, &self.manager, &mut self.told, MANAGER_INTERFACE, &HOT).await?;

        self.tell_objects(statuses).await
    }

    /// Tells the properties of those that have waited longest. They may have changed again since they were read.
    async fn tell_objects(&mut self, statuses: Vec<(DatabaseName, DatabaseStatus)>) -> zbus::Result<()> {
        let (gone, there): (Vec<_>, Vec<_>) = statuses.into_iter().partition(|(_, status)| is_gone(status));
        for (name, status) in gone {
            self.objects.update(&self.connection, &name, status).await?;
        }
        for name in self.objects.concerned(there.iter().map(|(name, _)| name)).await {
            if self.waits.insert(name.clone()) {
                self.waiting.push_back(name);
            }
        }
        let now = self.waiting.len().min(OBJECTS_PER_ROUND);
        let now: BTreeSet<DatabaseName> = self.waiting.drain(..now).collect();
        self.waits.retain(|name| !now.contains(name));
        let mut there: HashMap<DatabaseName, DatabaseStatus> = there.into_iter().collect();
        let (known, unknown): (Vec<_>, Vec<_>) = now.into_iter().partition(|name| there.contains_key(name));
        let read = self.read(unknown.into_iter().collect()).await?;
        let known = known.into_iter().filter_map(|name| there.remove_entry(&name));
        for (name, status) in known.chain(read) {
            self.objects.update(&self.connection, &name, status).await?;
        }
        Ok(())
    }

    async fn read(&self, names: BTreeSet<DatabaseName>) -> zbus::Result<Vec<(DatabaseName, DatabaseStatus)>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let view = self.view.clone();
        let read = tokio::task::spawn_blocking(move || {
            names.into_iter().filter_map(|name| Some((name.clone(), view.database(&name)?))).collect()
        });
        read.await.map_err(|error| zbus::Error::Failure(error.to_string()))
    }
}

/// Why a database stands aside, if it does.
fn reason(status: &DatabaseStatus) -> Option<String> {
    (status.state == DatabaseState::Quarantined).then(|| status.reason.clone().unwrap_or_default())
}
