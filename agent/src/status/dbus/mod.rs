//! The agent on the system bus: `io.litefs.LiteFS1.<cluster>`.
//!
//! ```text
//!   /io/litefs/LiteFS1                      ObjectManager, io.litefs.LiteFS1.Manager
//!   /io/litefs/LiteFS1/databases/<escaped>  io.litefs.LiteFS1.Database
//! ```
//!
//! The bus is a convenience: without it the agent does all its work, says once that it is missing, and tries again.
//! Everybody may read; methods that change something ask polkit ([`authority`]). Changes are told in rounds, at most
//! ten a second ([`service`]), so that commits never flood the bus. The interfaces' XML and the polkit actions that packages
//! install are kept in step with this code by its tests ([`introspection`]).

pub mod authority;
mod database;
pub mod error;
pub mod introspection;
mod manager;
pub mod names;
mod objects;
mod service;
#[cfg(test)]
mod tests;
pub mod view;

pub use view::BusView;

use futures_util::StreamExt;
use service::Service;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use zbus::Connection;
use zbus::fdo::{DBusProxy, RequestNameFlags};

/// Between tries to reach the bus.
const RETRY: Duration = Duration::from_secs(5);

/// Why there is no service now.
#[derive(Debug, thiserror::Error)]
enum Absent {
    #[error("the system bus cannot be reached: {0}")]
    NoBus(zbus::Error),
    #[error("the bus does not give the name {name}: {error}")]
    NoName { name: String, error: zbus::Error },
    #[error("the connection to the bus failed: {0}")]
    Failed(#[from] zbus::Error),
    #[error("the connection to the bus ended")]
    Ended,
    #[error("the name {0} was taken away")]
    NameLost(String),
}

/// Serves the bus until `stop`; ends soon after it.
pub fn spawn(view: Arc<dyn BusView>, stop: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(async move {
        let name = names::bus_name(&view.constants().cluster);
        let mut said = String::new();
        loop {
            let absent = tokio::select! {
                () = stop.cancelled() => return,
                absent = serve(&view, &name, &mut said) => absent,
            };
            let text = absent.to_string();
            if text != said {
                tracing::warn!(
                    "{text}; the agent works without, and tries again every {} s",
                    RETRY.as_secs()
                );
                said = text;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    })
}

async fn serve(view: &Arc<dyn BusView>, name: &str, said: &mut String) -> Absent {
    match connected(view, name, said).await {
        Ok(never) => match never {},
        Err(absent) => absent,
    }
}

async fn connected(
    view: &Arc<dyn BusView>,
    name: &str,
    said: &mut String,
) -> Result<std::convert::Infallible, Absent> {
    let connection = zbus::connection::Builder::system().build().await.map_err(Absent::NoBus)?;
    let bus = DBusProxy::new(&connection).await?;
    let mut lost = bus.receive_name_lost().await?;
    let mut service = Service::start(&connection, view.clone()).await?;
    request_name(&connection, name).await?;
    tracing::info!(name, "on the system bus");
    said.clear();
    tokio::select! {
        ended = service.run() => Err(ended.map_or_else(Absent::Failed, |()| Absent::Ended)),
        absent = async {
            while let Some(signal) = lost.next().await {
                if signal.args().is_ok_and(|args| args.name() == name) {
                    return Absent::NameLost(name.to_owned());
                }
            }
            Absent::Ended
        } => Err(absent),
    }
}

async fn request_name(connection: &Connection, name: &str) -> Result<(), Absent> {
    let requested = connection.request_name_with_flags(name.to_owned(), RequestNameFlags::DO_NOT_QUEUE).await;
    requested.map(|_| ()).map_err(|error| Absent::NoName { name: name.to_owned(), error })
}
