//! The node as other nodes ask it about the lease.

use super::Node;
use crate::lease::peers::Candidate;
use crate::lease::{Answer, Event, Peer};
use crate::ship::engine::Epoch;
use futures_util::future::BoxFuture;

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

impl Candidate for Node {
    fn standing(&self) -> BoxFuture<'_, Result<Answer, String>> {
        Box::pin(async move {
            let lease = self.lease.get().ok_or("the agent is starting")?;
            let can_stand = lease.look(|machine| machine.can_stand()).await.unwrap_or(false);
            Ok(Answer {
                peer: self.own_peer(),
                can_stand,
                epoch: self.shared.epoch(),
                standing: Node::standing(self),
            })
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
