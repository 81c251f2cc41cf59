//! Files that the agent makes up: a process with the library that opens one gets its content as it is at that moment.

use super::requests;
use crate::DatabaseName;
use crate::database::Shared;
use crate::door::fuse::{RoleView, Special};
use crate::door::lock_file::{self, LOCK_SUFFIX};
use std::sync::Arc;

/// Their contents.
pub struct SpecialFiles {
    shared: Arc<Shared>,
    view: Arc<dyn RoleView>,
}

impl std::fmt::Debug for SpecialFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpecialFiles").finish_non_exhaustive()
    }
}

impl SpecialFiles {
    /// Of this node.
    pub fn new(shared: Arc<Shared>, view: Arc<dyn RoleView>) -> Self {
        SpecialFiles { shared, view }
    }

    /// Content of the file with this path below the managed directory; `None`: it is not there now.
    pub fn content(&self, path: &str) -> Option<Vec<u8>> {
        let special = match path {
            ".primary" => Special::Primary,
            ".lag" => Special::Lag,
            path if path.ends_with(LOCK_SUFFIX) => Special::Lock(lock_file::database_of(&self.shared, path)?),
            path => {
                let name = DatabaseName::new(path.strip_suffix("-pos")?).ok()?;
                let db = self.shared.database(&name).filter(|db| db.is_tracked())?;
                // What was committed before the file was opened counts.
                requests::follow(&db);
                Special::Position(db)
            }
        };
        special.content(&*self.view)
    }
}
