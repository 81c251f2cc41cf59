//! Keeps this node's session at Consul alive, and the key that shows the node to others.

use super::super::{LeaseError, Peer};
use super::api::{self, Transaction};
use super::client::Client;
use super::{Keys, MemberRecord};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Consul takes no shorter one (`session_ttl_min`).
const SESSION_TTL_MIN: Duration = Duration::from_secs(10);

/// Between attempts to get a session.
const RETRY: Duration = Duration::from_millis(300);

/// The session's file in the data directory: the next agent goes on with it, and `litefs release-lease` ends it.
pub(super) fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("consul-session")
}

/// The session of the agent that had this data directory last.
pub(super) fn stored(data_dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path(data_dir)).ok()?;
    let id = text.trim();
    // It goes into the path of a request.
    let plain = !id.is_empty() && id.len() <= 64 && id.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    plain.then(|| id.to_owned())
}

/// What a session needs.
pub(super) struct Keeper {
    pub client: Arc<Client>,
    pub keys: Arc<Keys>,
    pub own: Peer,
    pub candidate: bool,
    pub ttl: Duration,
    pub data_dir: PathBuf,
    pub session: watch::Sender<Option<String>>,
}

impl Keeper {
    /// Gets a session, keeps it, gets another one when it is lost; for ever.
    pub async fn run(self) {
        let ttl = self.ttl.max(SESSION_TTL_MIN);
        let mut known = stored(&self.data_dir);
        let mut failing = false;
        loop {
            let pause = match self.renew_or_create(known.clone(), ttl).await {
                Ok(id) => {
                    if std::mem::take(&mut failing) {
                        tracing::info!("this node has a session at Consul again");
                    }
                    self.session.send_if_modified(|session| {
                        let changed = session.as_deref() != Some(&*id);
                        *session = Some(id.clone());
                        changed
                    });
                    known = Some(id);
                    ttl / 3
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot keep this node's session at Consul; trying again");
                    }
                    RETRY
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn renew_or_create(&self, known: Option<String>, ttl: Duration) -> Result<String, LeaseError> {
        let alive = match &known {
            Some(id) => api::renew_session(&self.client, id).await?,
            None => false,
        };
        if let Some(id) = known.filter(|_| alive) {
            if self.session.borrow().is_none() {
                self.show(&id).await?;
            }
            return Ok(id);
        }
        self.session.send_replace(None);
        let name = format!("litefs {} on {}", self.keys.prefix, self.own.name);
        let id = api::create_session(&self.client, &name, ttl).await?;
        // Before it is used: whoever holds the lease can be found by it.
        let file = path(&self.data_dir);
        std::fs::write(&file, format!("{id}\n"))
            .map_err(|error| LeaseError(format!("cannot write {}: {error}", file.display())))?;
        self.show(&id).await?;
        Ok(id)
    }

    /// Writes the key that shows this node to others, as long as the session lives.
    async fn show(&self, id: &str) -> Result<(), LeaseError> {
        let member = MemberRecord { peer: self.own.clone(), candidate: self.candidate };
        let value = serde_json::to_string(&member).map_err(|error| LeaseError(error.to_string()))?;
        let key = self.keys.node(self.own.node_id);
        // The lock of an earlier session of this node goes with the key.
        Transaction::on(&key).delete().lock(id, &value).commit(&self.client).await?;
        Ok(())
    }
}
