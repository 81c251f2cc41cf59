//! What an operator sees: status, metrics and events, and the commands of the control socket.
//!
//! [`handler::handle`] answers requests over a [`NodeView`], which the node implements. The same requests
//! arrive on the control socket (privileged) and on the agent's HTTP port (not privileged).

pub mod api;
pub mod changes;
pub mod database_file;
pub mod dbus;
pub mod events;
pub mod handler;
pub mod messages;
pub mod metrics;
mod staging;

#[cfg(test)]
pub(crate) mod fake;

pub use api::Status;
pub use events::{Event, EventBus};
pub use handler::handle;
pub use metrics::Metrics;

use crate::DatabaseName;
use futures_util::future::BoxFuture;
use ltx::Pos;
use std::fs::File;
use std::path::{Path, PathBuf};
use tokio::sync::broadcast;

/// What the status surface needs of the node. Methods may block for a short time on the node's locks, `export`
/// and `import` on the disk: all are called off the async threads.
pub trait NodeView: Send + Sync + 'static {
    /// Everything there is to see now.
    fn status(&self) -> Status;

    /// This node's identity, as in the `Litefs-Id` header. Does not block.
    fn node_id(&self) -> u64;

    /// What happens from now on. Does not block.
    fn events(&self) -> broadcast::Receiver<Event>;

    /// Counters that the node keeps. Does not block.
    fn metrics(&self) -> &Metrics;

    /// One consistent state of a database.
    ///
    /// # Errors
    /// There is no such database, or it cannot be read.
    fn export(&self, name: &DatabaseName) -> Result<Export, ViewError>;

    /// Replaces a database (or creates it) by a complete, fsynced SQLite file in [`NodeView::import_dir`], as
    /// one transaction. The file may be renamed away; if it is not, the caller removes it.
    ///
    /// # Errors
    /// This node takes no writes, or the database cannot be replaced.
    fn import(&self, name: &DatabaseName, staged: &Path) -> Result<Pos, ViewError>;

    /// Reads the configuration again and takes over what can change while running; ends when that is done.
    fn reload(&self) -> BoxFuture<'static, Result<(), ViewError>>;

    /// Changes the role; ends when that is done.
    fn request_role(
        self: std::sync::Arc<Self>,
        request: RoleRequest,
    ) -> BoxFuture<'static, Result<(), ViewError>>;

    /// Lets applications on this host write a database, wherever the primary is, until the result is dropped.
    fn halt(
        self: std::sync::Arc<Self>,
        name: DatabaseName,
    ) -> BoxFuture<'static, Result<crate::node::HeldLock, ViewError>>;

    /// Where files for [`NodeView::import`] are staged; on the file system of the databases. Does not block.
    fn import_dir(&self) -> PathBuf;
}

/// A change of the role that an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RoleRequest {
    /// Become the primary.
    Promote,
    /// Become the primary also where there is none to take over from, with the data that is here.
    Force,
    /// Stop being the primary.
    Demote,
    /// Give the lease to this node (its name), or to the best one.
    Handoff(Option<String>),
}

/// One consistent state of a database.
#[derive(Debug)]
pub struct Export {
    /// The database file, at its start; nobody else changes it. Unlinked when it is a temporary copy.
    pub file: File,
    /// The position that it is exactly at.
    pub position: Pos,
}

/// Why the node did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// No such database.
    #[error("no database {0} on this node; `litefs list` shows all")]
    NoSuchDatabase(DatabaseName),
    /// Only the primary takes writes.
    #[error("this node is not the primary{}", .primary.as_ref().map(|name| format!("; {name} is")).unwrap_or_default())]
    NotPrimary {
        /// Host name of the primary, when known.
        primary: Option<String>,
    },
    /// The database cannot be trusted and stands aside.
    #[error("database {name} is quarantined: {reason}")]
    Quarantined {
        /// Database.
        name: DatabaseName,
        /// Why.
        reason: String,
    },
    /// Someone held the database's locks for too long; nothing was changed.
    #[error("database {0} is busy: its locks were held for too long; try again")]
    Busy(DatabaseName),
    /// The file is no database that can be replicated.
    #[error("{0}")]
    BadDatabase(String),
    /// The configuration decides the role, and nothing else.
    #[error("{0}")]
    StaticLease(String),
    /// The primary is who it was.
    #[error("{0}")]
    Handoff(String),
    /// This host may not write the database of another primary.
    #[error("no halt lock: {0}")]
    HaltLock(String),
    /// What is on disk is not what was committed.
    #[error("{0}")]
    Damaged(String),
    /// The configuration has mistakes: all of them.
    #[error("{0}")]
    BadConfiguration(String),
    /// Anything else, with its context.
    #[error("{0}")]
    Other(String),
}
