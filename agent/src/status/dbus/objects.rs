//! Which databases have an object on the bus.
//!
//! An object costs about 14 KB and is part of every `GetManagedObjects`, so that not each of 100,000 databases can have
//! one. The first [`AUTOMATIC_MAX`] have theirs from the start; others get one when somebody asks for it, and of those
//! the [`REQUESTED_MAX`] newest are kept.

use super::database::{DatabaseObject, HOT};
use super::error::BusError;
use super::names::{DATABASE_INTERFACE, object_path};
use super::view::BusView;
use crate::DatabaseName;
use crate::status::ViewError;
use crate::status::api::{DatabaseState, DatabaseStatus};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use tokio::sync::Mutex;
use zbus::object_server::{Interface, InterfaceRef, SignalEmitter};
use zbus::{Connection, OwnedVariant, Variant};

/// Databases that have an object without being asked for.
pub const AUTOMATIC_MAX: usize = 1000;

/// Objects that exist because somebody asked for them.
pub const REQUESTED_MAX: usize = 1000;

/// Values of an object's properties as they were last told.
pub type Told = HashMap<String, OwnedVariant>;

#[derive(Default)]
struct Exported {
    objects: HashMap<DatabaseName, (InterfaceRef<DatabaseObject>, Told)>,
    requested: VecDeque<DatabaseName>,
}

/// The objects of databases.
pub struct Objects {
    view: Arc<dyn BusView>,
    exported: Mutex<Exported>,
}

/// A database that was dropped is known by its position only.
pub(super) fn is_gone(status: &DatabaseStatus) -> bool {
    status.pages == 0 && status.state == DatabaseState::Ok
}

impl Objects {
    /// None yet.
    pub fn new(view: Arc<dyn BusView>) -> Objects {
        Objects { view, exported: Mutex::default() }
    }

    /// Makes the first objects.
    pub async fn export_first(&self, connection: &Connection) -> zbus::Result<()> {
        let view = self.view.clone();
        let first = tokio::task::spawn_blocking(move || {
            let names = view.names();
            let first = names.into_iter().take(AUTOMATIC_MAX);
            first.filter_map(|name| Some((name.clone(), view.database(&name)?))).collect::<Vec<_>>()
        });
        let first = first.await.map_err(|error| zbus::Error::Failure(error.to_string()))?;
        let mut exported = self.exported.lock().await;
        for (name, status) in first.into_iter().filter(|(_, status)| !is_gone(status)) {
            exported.add(connection, &self.view, name, status).await?;
        }
        Ok(())
    }

    /// Makes an object for whoever asked for it.
    pub async fn on_request(&self, connection: &Connection, name: &DatabaseName) -> Result<(), BusError> {
        let mut exported = self.exported.lock().await;
        if let Some(at) = exported.requested.iter().position(|requested| requested == name) {
            // Asked for again: the newest.
            exported.requested.remove(at);
            exported.requested.push_back(name.clone());
        }
        if exported.objects.contains_key(name) {
            return Ok(());
        }
        let (view, of) = (self.view.clone(), name.clone());
        let status =
            tokio::task::spawn_blocking(move || view.database(&of)).await.map_err(BusError::failed)?;
        let status = status
            .filter(|status| !is_gone(status))
            .ok_or_else(|| BusError::from(ViewError::NoSuchDatabase(name.clone())))?;
        if exported.requested.len() == REQUESTED_MAX
            && let Some(oldest) = exported.requested.pop_front()
        {
            exported.remove(connection, &oldest).await?;
        }
        exported.add(connection, &self.view, name.clone(), status).await?;
        exported.requested.push_back(name.clone());
        Ok(())
    }

    /// A database changed: tells its properties, or makes or removes its object.
    pub async fn update(
        &self,
        connection: &Connection,
        name: &DatabaseName,
        status: DatabaseStatus,
    ) -> zbus::Result<()> {
        let mut exported = self.exported.lock().await;
        if is_gone(&status) {
            exported.requested.retain(|requested| requested != name);
            return exported.remove(connection, name).await;
        }
        if let Some((object, told)) = exported.objects.get_mut(name) {
            object.get().await.refresh(status).await;
            return tell(connection, object, told, DATABASE_INTERFACE, &HOT).await;
        }
        if exported.objects.len() - exported.requested.len() < AUTOMATIC_MAX {
            exported.add(connection, &self.view, name.clone(), status).await?;
        }
        Ok(())
    }

    /// Those of the databases that have an object, or would get one.
    pub async fn concerned<'a>(
        &self,
        names: impl Iterator<Item = &'a DatabaseName> + Send,
    ) -> Vec<DatabaseName> {
        let exported = self.exported.lock().await;
        let room = exported.objects.len() - exported.requested.len() < AUTOMATIC_MAX;
        names.filter(|name| room || exported.objects.contains_key(*name)).cloned().collect()
    }
}

impl Exported {
    async fn add(
        &mut self,
        connection: &Connection,
        view: &Arc<dyn BusView>,
        name: DatabaseName,
        status: DatabaseStatus,
    ) -> zbus::Result<()> {
        let path = object_path(&name);
        let server = connection.object_server();
        server.at(path.as_str(), DatabaseObject::new(view.clone(), name.clone(), status)).await?;
        let object = server.interface::<_, DatabaseObject>(path.as_str()).await?;
        // The object's first values were told by InterfacesAdded.
        let told = values(connection, &object).await?;
        self.objects.insert(name, (object, told));
        Ok(())
    }

    async fn remove(&mut self, connection: &Connection, name: &DatabaseName) -> zbus::Result<()> {
        if self.objects.remove(name).is_some() {
            connection.object_server().remove::<DatabaseObject, _>(object_path(name)).await?;
        }
        Ok(())
    }
}

/// All properties of an object.
pub(super) async fn values<I: Interface>(
    connection: &Connection,
    object: &InterfaceRef<I>,
) -> zbus::Result<Told> {
    let emitter: &SignalEmitter<'_> = object.signal_emitter();
    let interface = object.get().await;
    let values = interface.get_all(connection.object_server(), connection, None, emitter).await;
    values.map_err(|error| zbus::Error::Failure(error.to_string()))
}

/// Tells in one signal which properties are not what was last told. Those that are `hot` are not even read.
pub(super) async fn tell<I: Interface>(
    connection: &Connection,
    object: &InterfaceRef<I>,
    told: &mut Told,
    interface: &'static str,
    hot: &[&str],
) -> zbus::Result<()> {
    let emitter: &SignalEmitter<'_> = object.signal_emitter();
    let mut news = Told::new();
    {
        let reading = object.get().await;
        for (property, before) in told.iter().filter(|(property, _)| !hot.contains(&property.as_str())) {
            let now = reading.get(property, connection.object_server(), connection, None, emitter).await;
            if let Some(Ok(now)) = now
                && now != *before
            {
                news.insert(property.clone(), now);
            }
        }
    }
    if news.is_empty() {
        return Ok(());
    }
    let changed = news.iter().map(|(property, value)| Ok((property.as_str(), Variant::try_from(value)?)));
    let changed: HashMap<&str, Variant<'_>> = changed.collect::<zbus::Result<_>>()?;
    let interface = zbus::names::InterfaceName::from_static_str(interface)?;
    zbus::fdo::Properties::properties_changed(emitter, interface, changed, (&[]).into()).await?;
    told.extend(news);
    Ok(())
}
