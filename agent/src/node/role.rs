//! The node's role: one value that everything else reads, and the steps from one role to the next.

use super::Node;
use super::discovery;
use crate::DatabaseName;
use crate::lease::{Peer, Time};
use crate::ship::engine::Epoch;
use crate::ship::follow::{Follower, FollowerHandle};
use crate::status::api::RoleName;
use crate::status::messages;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// How long a new primary waits for readers that hold up what it has received but not yet applied.
const APPLY_PATIENCE: Duration = Duration::from_secs(5);

/// What a node follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Its address.
    pub url: String,
    /// Its name, once known.
    pub hostname: Option<String>,
    /// Whether there is a stream from it.
    pub connected: bool,
}

/// The role of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// What it is.
    pub name: RoleName,
    /// Epoch of the newest term that the node knows of.
    pub epoch: Epoch,
    /// Since when, milliseconds since 1970.
    pub since_unix_ms: i64,
    /// Whom it follows.
    pub upstream: Option<Upstream>,
    /// Why a node without a primary does not become one, when it knows.
    pub waits: Option<String>,
}

impl Role {
    /// Before anything is known.
    pub(super) fn unknown(epoch: Epoch) -> Role {
        Role {
            name: RoleName::None,
            epoch,
            since_unix_ms: crate::capture::unix_ms(),
            upstream: None,
            waits: None,
        }
    }
}

/// A change of role that takes some steps, or what else concerns whom this node follows.
#[derive(Debug)]
pub(super) enum Transition {
    /// Become primary.
    Lead { epoch: Epoch, number: u64 },
    /// Follow, or nobody.
    Follow(Option<Peer>),
    /// Get what this node lacks from another one that is no primary either.
    CatchUp(Peer),
    /// The role stays: a database was set aside, and a snapshot of whom this node follows heals it.
    Heal(DatabaseName),
    /// Let go of everything.
    Stop,
}

/// Counts decisions to lead or to stop writing: a transition that was overtaken must not allow writes.
#[derive(Debug, Default)]
pub(super) struct WriteGate(parking_lot::Mutex<u64>);

impl Node {
    /// What this node is now. A copy: who has it borrowed and borrows again, or waits for who does, waits for a change that
    /// waits for the first one.
    pub fn role(&self) -> Role {
        self.role.borrow().clone()
    }

    /// What this node is, and every change of it.
    pub fn roles(&self) -> watch::Receiver<Role> {
        self.role.subscribe()
    }

    /// Gives the lease to the candidate with this identity, which then is primary; this node follows it.
    ///
    /// # Errors
    /// Why it did not happen; this node is what it was.
    pub async fn hand_over(&self, to: u64) -> Result<(), String> {
        match self.lease.get() {
            Some(lease) => lease.hand_over(to).await,
            None => Err("the agent is starting".into()),
        }
    }

    /// The primary `from` wants to give its lease to this node: whether it agrees.
    pub async fn prepare_to_succeed(&self, from: u64) -> bool {
        match self.lease.get() {
            Some(lease) => lease.prepare(from).await,
            None => false,
        }
    }

    /// Publishes a change of the role, if it is one.
    pub(super) fn change_role(&self, change: impl FnOnce(&mut Role)) {
        let changed = self.role.send_if_modified(|role| {
            let before = role.clone();
            change(role);
            if role.name != before.name {
                role.since_unix_ms = crate::capture::unix_ms();
            }
            *role != before
        });
        if changed {
            self.role_changed();
        }
    }

    /// From now on writes are refused, whatever is under way.
    /// Commits that are held have at most `patience` to be acknowledged.
    pub(super) fn stop_writes(&self, patience: Duration) {
        let mut decision = self.write_gate.0.lock();
        *decision += 1;
        self.shared.end_writes(patience);
    }

    /// A decision to lead; its number is given to [`Transition::Lead`].
    pub(super) fn will_lead(&self, until: Option<Time>) -> u64 {
        let mut decision = self.write_gate.0.lock();
        *decision += 1;
        self.shared.set_write_limit(until);
        *decision
    }

    fn allow_writes(&self, epoch: Epoch, number: u64) -> bool {
        let decision = self.write_gate.0.lock();
        let current = *decision == number;
        if current {
            self.shared.begin_writes(epoch);
        }
        current
    }

    /// Compares databases with their checksums after a crash, once it is known what to do with a difference.
    pub(super) fn settle(&self, writable: bool) {
        if let Some(found) = self.discovered.lock().take() {
            discovery::settle(&found, writable);
        }
    }

    /// Becomes primary. Nothing is applied any more when this is called.
    fn lead(&self, epoch: Epoch, number: u64) -> anyhow::Result<bool> {
        // Each term is stored before anything is written in it. A fenced primary goes on in its term.
        if epoch > self.shared.epoch() {
            self.identity.store_epoch(epoch)?;
        }
        self.shared.known().iter().for_each(|db| db.confirm());
        if self.shared.wals_may_be_ahead() {
            // On plain files writers may be there before this agent's door is open.
            self.shared.known().iter().for_each(|db| db.apply_again_later());
        }
        self.apply_all_received();
        if !self.allow_writes(epoch, number) {
            return Ok(false);
        }
        self.shared.known().iter().filter(|db| db.may_write()).for_each(|db| db.let_writers_in());
        self.settle(true);
        Ok(true)
    }

    /// What this node has acknowledged becomes visible before anybody writes on top of it.
    fn apply_all_received(&self) {
        let deadline = Instant::now() + APPLY_PATIENCE;
        let bound = self.config.read().replication.apply_wait;
        loop {
            let waiting = self.shared.take_pending();
            if waiting.is_empty() {
                return;
            }
            for name in &waiting {
                if let Some(db) = self.shared.database(name) {
                    db.apply_received(bound);
                }
            }
            if Instant::now() > deadline {
                tracing::warn!(
                    databases = ?waiting,
                    "readers hold up the newest transactions; these databases take no commit until they let go"
                );
                return;
            }
        }
    }
}

/// Carries out transitions, one after the other. The agent follows only while `door_is_open`.
pub(super) async fn transitions(
    node: Arc<Node>,
    mut queue: mpsc::UnboundedReceiver<Transition>,
    mut door_is_open: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    let mut follower: Option<FollowerHandle> = None;
    while let Some(transition) = queue.recv().await {
        match transition {
            Transition::Lead { epoch, number } => {
                stop_following(&node, &mut follower).await;
                let leading = node.clone();
                let led = tokio::task::spawn_blocking(move || leading.lead(epoch, number)).await;
                match led.map_err(anyhow::Error::from).and_then(|led| led) {
                    Ok(true) => {
                        let goes_on = node.role().name == RoleName::Primary;
                        node.change_role(|role| {
                            (role.name, role.epoch) = (RoleName::Primary, epoch);
                            (role.upstream, role.waits) = (None, None);
                        });
                        if goes_on {
                            // A handoff that did not take place.
                            continue;
                        }
                        tracing::info!(
                            MESSAGE_ID = messages::ROLE_CHANGED,
                            role = "primary",
                            epoch = epoch.0,
                            "role changed"
                        );
                        // Not what others wait for; ends early when the next role comes.
                        let detaching = node.clone();
                        tokio::task::spawn_blocking(move || {
                            let leads = || detaching.shared.is_writable();
                            detaching.detach_while(leads);
                        });
                    }
                    Ok(false) => {}
                    Err(error) => {
                        tracing::error!(%error, epoch = epoch.0, "this node cannot become primary");
                        if let Some(lease) = node.lease.get() {
                            lease.cannot_lead(epoch);
                        }
                    }
                }
            }
            Transition::Follow(peer) => {
                stop_following(&node, &mut follower).await;
                settle_as_replica(&node).await;
                let epoch = node.shared.epoch();
                node.change_role(|role| {
                    role.name = if peer.is_some() { RoleName::Replica } else { RoleName::None };
                    (role.epoch, role.waits) = (epoch, None);
                    role.upstream = peer.as_ref().map(|peer| Upstream {
                        url: peer.url.clone(),
                        hostname: None,
                        connected: false,
                    });
                });
                tracing::info!(
                    MESSAGE_ID = messages::ROLE_CHANGED,
                    role = node.role().name.as_str(),
                    upstream = peer.as_ref().map(|p| p.url.as_str()),
                    epoch = epoch.0,
                    "role changed"
                );
                let Some(peer) = peer else { continue };
                if door_is_open.wait_for(|open| *open).await.is_err() {
                    return;
                }
                follower = follow(&node, &peer, &stop);
                // Also those that an earlier agent let in.
                let keeping = node.clone();
                tokio::task::spawn_blocking(move || keeping.keep_writers_out());
            }
            Transition::CatchUp(peer) => {
                stop_following(&node, &mut follower).await;
                settle_as_replica(&node).await;
                node.change_role(|role| (role.name, role.upstream) = (RoleName::None, None));
                if door_is_open.wait_for(|open| *open).await.is_err() {
                    return;
                }
                follower = follow(&node, &peer, &stop);
            }
            Transition::Heal(name) => {
                if let Some(follower) = &follower {
                    follower.recheck(name);
                }
            }
            Transition::Stop => {
                stop_following(&node, &mut follower).await;
                return;
            }
        }
    }
}

/// Before transactions of a primary are applied.
async fn settle_as_replica(node: &Arc<Node>) {
    let node = node.clone();
    let settled = tokio::task::spawn_blocking(move || {
        node.settle(false);
        node.shared.known().iter().for_each(|db| db.apply_unpublished_again());
    });
    // It panicked, which is logged.
    let _ = settled.await;
}

fn follow(node: &Arc<Node>, peer: &Peer, stop: &CancellationToken) -> Option<FollowerHandle> {
    match peer.url.parse() {
        Ok(upstream) => {
            Some(Follower::spawn(upstream, node.clone(), node.follow_options(), stop.child_token()))
        }
        Err(error) => {
            tracing::error!(%error, url = peer.url, "this node follows nobody");
            None
        }
    }
}

async fn stop_following(node: &Node, follower: &mut Option<FollowerHandle>) {
    if let Some(follower) = follower.take() {
        follower.stop().await;
    }
    node.heard.lock().clear();
}
