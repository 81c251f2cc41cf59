//! Lets go of the lease of an agent that died (`litefs release-lease`).

use super::api::{self, Transaction};
use super::client::{Client, Options};
use super::{Keys, json, record_of, session};
use crate::lease::LeaseError;
use crate::node::Identity;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The lease was this node's, and is free now.
    Lease,
    /// It was another's, or free already; the session of this node has ended.
    Session,
    /// There was nothing to do.
    Nothing,
}

/// Why the lease was not released.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// Its agent lives.
    #[error("an agent has {0}: its lease is its own (`litefs demote` makes it let go)")]
    Alive(PathBuf),
    /// Consul could not be asked.
    #[error(transparent)]
    Consul(#[from] LeaseError),
}

/// Ends the session that the last agent on `data_dir` left, and releases the lease if it has it. Refused while an agent
/// lives there.
pub async fn release_of_dead_agent(
    options: Options,
    key: &str,
    data_dir: &Path,
) -> Result<Released, ReleaseError> {
    let Some(session) = session::stored(data_dir) else { return Ok(Released::Nothing) };
    if Identity::is_in_use(data_dir) {
        return Err(ReleaseError::Alive(data_dir.to_owned()));
    }
    let client = Client::new(options)?;
    let keys = Keys::below(key);
    let (tree, _) = api::read_tree(&client, &keys.primary, None, Duration::ZERO).await?;
    let mut released = Released::Session;
    if let Some(key) =
        tree.iter().find(|key| key.key == keys.primary && key.session.as_ref() == Some(&session))
    {
        let record = record_of(key)?;
        if let Some(mut term) = record.term {
            term.released = true;
            let transaction =
                Transaction::on(&keys.primary).if_version(key.modify_index).if_locked_by(&session);
            let done = transaction.unlock(&session, &json(&term)?).commit(&client).await?;
            if done.is_some() {
                released = Released::Lease;
            }
        }
    }
    api::destroy_session(&client, &session).await?;
    let _ = std::fs::remove_file(session::path(data_dir));
    Ok(released)
}
