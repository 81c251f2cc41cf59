//! The lease as a key of Consul.
//!
//! | key                    | holds                                                                          |
//! |------------------------|--------------------------------------------------------------------------------|
//! | `<prefix>/primary`     | the [`Term`] in JSON, locked by the session of the primary                     |
//! | `<prefix>/nodes/<id>`  | a node's address and whether it is a candidate, locked by its session          |
//!
//! The lock says whose the lease is; the value says in which term, and how far the holder was. Each renewal writes the
//! value, so all nodes see it with the blocking query that each has open on the prefix. Time is counted by the nodes
//! themselves, from these changes (see [`super`]): Consul ends a session that is not renewed only after 10 s or more,
//! and up to twice its TTL. What a session is good for here: only its owner can renew, and whoever may become primary
//! is seen to be there.
//!
//! Every change is one transaction that names the version it was decided on, and the session that must have the lock.

mod api;
mod client;
mod release;
mod session;

pub use client::{Options, Tls, Token};
pub use release::{ReleaseError, Released, release_of_dead_agent};

use super::{Claim, Gift, Lease, LeaseError, Member, Outcome, Peer, Record, Term, View};
use api::{KeyValue, Transaction};
use client::Client;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use session::Keeper;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The keys of one cluster.
#[derive(Debug)]
struct Keys {
    prefix: String,
    primary: String,
}

impl Keys {
    fn below(prefix: &str) -> Self {
        Keys { prefix: prefix.to_owned(), primary: format!("{prefix}/primary") }
    }

    fn node(&self, id: u64) -> String {
        format!("{}/nodes/{id:016x}", self.prefix)
    }
}

/// What a node's key holds.
#[derive(Debug, Serialize, Deserialize)]
struct MemberRecord {
    #[serde(flatten)]
    peer: Peer,
    candidate: bool,
}

/// This node at Consul.
#[derive(Clone, Debug)]
pub struct ConsulNode {
    /// How Consul is reached.
    pub options: Options,
    /// The keys are below this one, which has no slash at its end.
    pub key: String,
    /// Who this is.
    pub own: Peer,
    /// Whether it may become primary.
    pub candidate: bool,
    /// The lease's.
    pub ttl: Duration,
    /// Where the session is remembered.
    pub data_dir: PathBuf,
}

/// What was read last.
#[derive(Debug, Default)]
struct Read {
    /// No answer may be older than this.
    floor: u64,
    /// How often Consul has begun anew.
    resets: u64,
    /// This node's session then.
    session: Option<String>,
}

/// The lease at Consul.
#[derive(Debug)]
pub struct ConsulLease {
    client: Arc<Client>,
    keys: Arc<Keys>,
    node_id: u64,
    ttl: Duration,
    data_dir: PathBuf,
    session: watch::Receiver<Option<String>>,
    read: Mutex<Read>,
    keeper: JoinHandle<()>,
}

impl Drop for ConsulLease {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl ConsulLease {
    /// Begins to get a session. Call within a tokio runtime.
    ///
    /// # Errors
    /// The certificates for Consul cannot be used.
    pub fn start(node: ConsulNode) -> Result<Self, LeaseError> {
        let client = Arc::new(Client::new(node.options)?);
        let keys = Arc::new(Keys::below(&node.key));
        let (sender, session) = watch::channel(None);
        let keeper = Keeper {
            client: client.clone(),
            keys: keys.clone(),
            own: node.own.clone(),
            candidate: node.candidate,
            ttl: node.ttl,
            data_dir: node.data_dir.clone(),
            session: sender,
        };
        Ok(ConsulLease {
            client,
            keys,
            node_id: node.own.node_id,
            ttl: node.ttl,
            data_dir: node.data_dir,
            session,
            read: Mutex::default(),
            keeper: tokio::spawn(keeper.run()),
        })
    }

    fn own_session(&self) -> Result<String, LeaseError> {
        self.session.borrow().clone().ok_or_else(|| LeaseError("this node has no session at Consul".into()))
    }

    /// A change that succeeded is seen by whatever is read after it.
    fn made(&self, outcome: Outcome) -> Outcome {
        if let Some(version) = outcome {
            let mut read = self.read.lock();
            read.floor = read.floor.max(version);
        }
        outcome
    }

    async fn look(&self, after: Option<u64>) -> Result<View, LeaseError> {
        let mut sessions = self.session.clone();
        loop {
            let session = sessions.borrow_and_update().clone();
            let (floor, after) = {
                let read = self.read.lock();
                (read.floor, after.filter(|_| read.session == session))
            };
            // The primary changes its key several times in a TTL: nothing for that long is worth a look.
            let tree = format!("{}/", self.keys.prefix);
            let reading = api::read_tree(&self.client, &tree, after, self.ttl);
            let (keys, index) = tokio::select! {
                read = reading => read?,
                changed = sessions.changed() => {
                    changed.map_err(|error| LeaseError(error.to_string()))?;
                    continue;
                }
            };
            let resets = {
                let mut read = self.read.lock();
                if index < floor {
                    // Answers are never older than what was done before, so this is another history.
                    tracing::warn!(
                        index,
                        floor,
                        "Consul has lost its data, or is another one: beginning anew"
                    );
                    read.resets += 1;
                    read.floor = index;
                }
                read.floor = read.floor.max(index);
                read.session.clone_from(&session);
                read.resets
            };
            return Ok(View { index, resets, session, ..self.view_of(&keys)? });
        }
    }

    fn view_of(&self, keys: &[KeyValue]) -> Result<View, LeaseError> {
        let mut view = View::default();
        let nodes = format!("{}/nodes/", self.keys.prefix);
        for key in keys {
            if key.key == self.keys.primary {
                view.record = record_of(key)?;
            } else if key.key.starts_with(&nodes)
                && let Some(session) = &key.session
            {
                let MemberRecord { peer, candidate } = key.json()?;
                view.members.push(Member { peer, candidate, session: session.clone() });
            }
        }
        Ok(view)
    }
}

fn record_of(key: &KeyValue) -> Result<Record, LeaseError> {
    Ok(Record {
        version: key.modify_index,
        taken: key.lock_index,
        session: key.session.clone(),
        term: Some(key.json()?),
    })
}

fn json(term: &Term) -> Result<String, LeaseError> {
    serde_json::to_string(term).map_err(|error| LeaseError(error.to_string()))
}

impl Lease for ConsulLease {
    fn view(&self, after: Option<u64>) -> BoxFuture<'_, Result<View, LeaseError>> {
        Box::pin(self.look(after))
    }

    fn claim(&self, claim: Claim) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        Box::pin(async move {
            let (session, value) = (self.own_session()?, json(&claim.term)?);
            let mut transaction = Transaction::on(&self.keys.primary).if_version(claim.version);
            if let Some(from) = claim.from.as_deref().filter(|from| *from != session) {
                transaction = transaction.unlock(from, &value);
            }
            transaction.lock(&session, &value).commit(&self.client).await.map(|done| self.made(done))
        })
    }

    fn renew(&self, version: u64, term: Term) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        Box::pin(async move {
            let (session, value) = (self.own_session()?, json(&term)?);
            let transaction = Transaction::on(&self.keys.primary).if_version(version).if_locked_by(&session);
            transaction.lock(&session, &value).commit(&self.client).await.map(|done| self.made(done))
        })
    }

    fn give(&self, gift: Gift) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        Box::pin(async move {
            let (session, value) = (self.own_session()?, json(&gift.term)?);
            let transaction = Transaction::on(&self.keys.primary).if_version(gift.version);
            let transaction = transaction.if_locked_by(&session).unlock(&session, &value);
            transaction.lock(&gift.session, &value).commit(&self.client).await.map(|done| self.made(done))
        })
    }

    fn release(&self, version: u64, term: Term) -> BoxFuture<'_, Result<Outcome, LeaseError>> {
        Box::pin(async move {
            let (session, value) = (self.own_session()?, json(&term)?);
            let transaction = Transaction::on(&self.keys.primary).if_version(version).if_locked_by(&session);
            transaction.unlock(&session, &value).commit(&self.client).await.map(|done| self.made(done))
        })
    }

    fn leave(&self) -> BoxFuture<'_, Result<(), LeaseError>> {
        Box::pin(async move {
            self.keeper.abort();
            let Ok(session) = self.own_session() else { return Ok(()) };
            let node = self.keys.node(self.node_id);
            Transaction::on(&node).if_locked_by(&session).delete().commit(&self.client).await?;
            api::destroy_session(&self.client, &session).await?;
            // The next agent finds out that it is no session any more.
            let _ = std::fs::remove_file(session::path(&self.data_dir));
            Ok(())
        })
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
