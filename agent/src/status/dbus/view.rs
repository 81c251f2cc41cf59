//! What the D-Bus service needs of the node.

use crate::DatabaseName;
use crate::status::api::{DatabaseStatus, FollowerStatus, RoleStatus, SyncStatus};
use crate::status::changes::ChangeFeed;
use crate::status::{NodeView, ViewError};
use ltx::Pos;
use std::path::PathBuf;

/// What never changes while the agent runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constants {
    /// Name of the cluster.
    pub cluster: String,
    /// This host's name in the configuration.
    pub node_name: String,
    /// Where applications find the databases.
    pub mount: PathBuf,
}

/// Frames of a WAL after a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checkpointed {
    /// In the WAL.
    pub frames: u64,
    /// Of those, in the database file too.
    pub moved: u64,
}

/// What the D-Bus service needs of the node. Methods that are not async may block, on the disk too: they are called
/// off the async threads.
pub trait BusView: NodeView {
    /// What never changes. Does not block.
    fn constants(&self) -> Constants;

    /// The role now. Blocks for a moment at most.
    fn role(&self) -> RoleStatus;

    /// Milliseconds that some database is behind; nothing when unknown. Blocks for a moment at most.
    fn lag_ms(&self) -> Option<u64>;

    /// Connected followers and how far they are.
    fn followers(&self) -> Vec<FollowerStatus>;

    /// How commits fare that wait for followers. Blocks for a moment at most.
    fn sync(&self) -> Vec<SyncStatus>;

    /// Names of connected followers. Blocks for a moment at most.
    fn follower_names(&self) -> Vec<String>;

    /// Names of all databases, in order.
    fn names(&self) -> Vec<DatabaseName>;

    /// One database, if it is there.
    fn database(&self, name: &DatabaseName) -> Option<DatabaseStatus>;

    /// Where changes are told. Does not block.
    fn feed(&self) -> &ChangeFeed;

    /// Moves the WAL into the database file as far as readers allow, and makes the files durable.
    ///
    /// # Errors
    /// There is no such database, it stands aside, others hold its locks, or the disk fails.
    fn checkpoint(&self, name: &DatabaseName) -> Result<Checkpointed, ViewError>;

    /// Writes one consistent state as an LTX file that stays in the data directory.
    ///
    /// # Errors
    /// There is no such database, it stands aside, or the disk fails.
    fn snapshot(&self, name: &DatabaseName) -> Result<(PathBuf, Pos), ViewError>;

    /// Reads every page and compares with the checksum of the position that it returns.
    ///
    /// # Errors
    /// There is no such database, it stands aside, a page is not what was committed, or the disk fails.
    fn verify(&self, name: &DatabaseName) -> Result<Pos, ViewError>;
}
