//! What the agent of the cluster says, and what the configuration says without it.

use crate::cli::Global;
use crate::cli::failure::Failure;
use crate::config::Config;
use crate::status::Status;
use std::path::{Path, PathBuf};

/// The cluster that a question is about.
pub struct World {
    /// Where applications find its databases.
    pub directory: PathBuf,
    /// Where its agent meets others on this host.
    pub runtime_dir: PathBuf,
    /// What its agent says, or why it says nothing.
    pub agent: Result<Status, Failure>,
}

impl World {
    /// Asks the agent, which has a few seconds to answer.
    pub async fn look(global: &Global) -> World {
        let client = global.client();
        let runtime_dir = client.socket().parent().unwrap_or(Path::new("/")).to_owned();
        let agent = client.status().await;
        let directory = match (&agent, Config::load(&global.source())) {
            (Ok(status), _) => status.mount.dir.clone(),
            (Err(_), Ok(config)) => config.mount.dir,
            (Err(_), Err(_)) => {
                let cluster = global.cluster.as_deref().unwrap_or(crate::config::DEFAULT_CLUSTER);
                PathBuf::from(format!("/srv/litefs/{cluster}"))
            }
        };
        World { directory, runtime_dir, agent }
    }

    /// Whether applications have to be started with the shim.
    pub fn uses_preload(&self) -> bool {
        self.agent.as_ref().is_ok_and(|status| status.mount.door == "preload")
    }
}
