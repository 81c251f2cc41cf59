//! The node as other nodes ask it about the lease.

use super::Node;
use crate::database::Database;
use crate::lease::election::{Databases, Progress};
use crate::lease::peers::Candidate;
use crate::lease::{Answer, Event, Peer, Standing};
use crate::ship::engine::Epoch;
use crate::sync::quorum::Promise;
use futures_util::future::BoxFuture;
use std::sync::Arc;

impl Node {
    /// How others reach this node.
    pub(super) fn own_peer(&self) -> Peer {
        let config = self.config.read();
        Peer {
            node_id: self.shared.node_id,
            name: config.node.name.clone(),
            url: config.http.advertise_url.clone(),
        }
    }
}

impl Node {
    /// How far this node is.
    pub(super) fn standing(&self) -> Standing {
        Standing {
            record_epoch: self.shared.newest_record_epoch(),
            transactions: self.shared.databases().iter().map(|db| db.durable_position().txid.0).sum(),
        }
    }

    /// How far this node is with each database. What is told counts, so it is durable first.
    async fn progress(&self) -> Databases {
        let shared = self.shared.clone();
        let progress = move || {
            let of = |db: Arc<Database>| {
                let known = db.glance();
                // A log that failed has what was durable before.
                let _ = shared.log.wait_durable(known.logged_end);
                (db.name().clone(), Progress { epoch: known.record_epoch, position: db.durable_position() })
            };
            shared.databases().into_iter().map(of).collect()
        };
        tokio::task::spawn_blocking(progress).await.unwrap_or_default()
    }

    /// What this node says to others, and to itself, in an election.
    pub(super) async fn election_answer(&self, can_stand: bool, databases: bool) -> Answer {
        Answer {
            peer: self.own_peer(),
            can_stand,
            epoch: self.shared.epoch(),
            standing: Node::standing(self),
            databases: if databases { Some(self.progress().await) } else { None },
        }
    }

    /// What this node promises of commits while it is the primary.
    pub(super) fn promises(&self) -> Vec<Promise> {
        let config = self.config.read();
        Promise::all_of(&config.sync, &config.sync_rules)
    }
}

impl Candidate for Node {
    fn standing(&self, databases: bool) -> BoxFuture<'_, Result<Answer, String>> {
        Box::pin(async move {
            let lease = self.lease.get().ok_or("the agent is starting")?;
            let can_stand = lease.look(|machine| machine.can_stand()).await.unwrap_or(false);
            Ok(self.election_answer(can_stand, databases).await)
        })
    }

    fn prepare(&self, from: u64) -> BoxFuture<'_, bool> {
        Box::pin(self.prepare_to_succeed(from))
    }

    fn grant(&self, version: u64, epoch: Epoch) {
        if let Some(lease) = self.lease.get() {
            lease.tell(Event::Granted { version, epoch });
        }
    }

    fn hand_over_to(&self, to: u64) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(self.hand_over(to))
    }
}
