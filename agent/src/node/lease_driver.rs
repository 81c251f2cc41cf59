//! Runs the role machine: gives it what happens, and does what it says.

use super::Node;
use super::handoff::Held;
use super::role::{self, Transition};
use crate::DatabaseName;
use crate::config::{Config, LeaseKind, LeaseRole};
use crate::lease::consul::{ConsulLease, ConsulNode};
use crate::lease::election::Choice;
use crate::lease::fixed::StaticLease;
use crate::lease::{
    Action, Claim, Event, Gift, Lease, LeaseError, Member, Peer, RoleMachine, Term, Time, Timing, clock,
};
use crate::ship::engine::Epoch;
use crate::status::api::RoleName;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// After an error of the store, and between looks at other candidates.
const RETRY: Duration = Duration::from_millis(300);

/// How long a reload waits for the new role.
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);

/// How long the end of a term waits for followers to acknowledge commits that are held.
const HELD_PATIENCE: Duration = Duration::from_millis(100);
/// The same for an end that somebody asked for. The gate looks at the end of the lease itself.
const PLANNED_PATIENCE: Duration = Duration::from_secs(2);

/// Something for the machine, from outside of the driver.
pub(super) enum Input {
    /// Something happened.
    Event(Event),
    /// The successor has everything and writers wait, or why not.
    Prepared(Result<Vec<Held>, String>),
    /// Somebody wants to know what the machine knows.
    Look(Box<dyn FnOnce(&RoleMachine) + Send>),
    /// Another node wants to make this one its successor.
    Prepare { from: u64, reply: oneshot::Sender<bool> },
    /// The lease is to go to another node; the reply says whether it did.
    HandOver { to: u64, reply: oneshot::Sender<Result<(), String>> },
    /// Let go of the lease, and end.
    Stop { reply: oneshot::Sender<()> },
}

/// The running lease of a node.
pub(super) struct LeaseHandle {
    inputs: mpsc::UnboundedSender<Input>,
    lease: Arc<dyn Lease>,
    fixed: Option<Arc<StaticLease>>,
    door_is_open: watch::Sender<bool>,
    transitions: mpsc::UnboundedSender<Transition>,
    tasks: parking_lot::Mutex<Vec<JoinHandle<()>>>,
}

impl LeaseHandle {
    /// The mount is there: the node may follow.
    pub fn door_is_open(&self) {
        self.door_is_open.send_replace(true);
    }

    /// The configuration has changed; returns when the node has the role that it says.
    pub async fn configure(&self, node: &Node, config: &Config) {
        let Some(fixed) = &self.fixed else { return };
        let primary_url = primary_url(config);
        fixed.configure(primary_url.clone());
        let mut roles = node.roles();
        let taken = roles.wait_for(|role| match &primary_url {
            None => role.name == RoleName::Primary,
            url => role.upstream.as_ref().map(|upstream| &upstream.url) == url.as_ref(),
        });
        if tokio::time::timeout(CHANGE_PATIENCE, taken).await.is_err() {
            tracing::warn!("the role is still being changed");
        }
    }

    /// Gives the lease to another candidate; returns when that is done, or why it was not.
    pub async fn hand_over(&self, to: u64) -> Result<(), String> {
        let (reply, done) = oneshot::channel();
        let _ = self.inputs.send(Input::HandOver { to, reply });
        done.await.unwrap_or_else(|_| Err("the agent stops".into()))
    }

    /// A database was set aside here.
    pub fn heal(&self, database: DatabaseName) {
        let _ = self.transitions.send(Transition::Heal(database));
    }

    /// The node could not begin this term.
    pub fn cannot_lead(&self, epoch: Epoch) {
        self.tell(Event::CannotLead { epoch });
    }

    /// This candidate may become primary although it lacks data.
    pub fn force(&self) {
        self.tell(Event::Force);
    }

    /// Something happened.
    pub fn tell(&self, event: Event) {
        let _ = self.inputs.send(Input::Event(event));
    }

    /// What the machine knows now; `None`: it has ended.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&RoleMachine) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, seen) = oneshot::channel();
        let look = move |machine: &RoleMachine| {
            let _ = reply.send(look(machine));
        };
        let _ = self.inputs.send(Input::Look(Box::new(look)));
        seen.await.ok()
    }

    /// Agrees to take over from the primary `from`, or not.
    pub async fn prepare(&self, from: u64) -> bool {
        let (reply, agreed) = oneshot::channel();
        let _ = self.inputs.send(Input::Prepare { from, reply });
        agreed.await.unwrap_or(false)
    }

    /// Lets go of the lease and stops following.
    pub async fn stop(&self) {
        let (reply, stopped) = oneshot::channel();
        if self.inputs.send(Input::Stop { reply }).is_ok() {
            let _ = stopped.await;
        }
        if let Err(error) = self.lease.leave().await {
            tracing::warn!(%error, "cannot say at the lease's store that this node leaves; it is forgotten there in time");
        }
        let _ = self.transitions.send(Transition::Stop);
        // A transition may wait for a door that never opens.
        self.door_is_open.send_replace(true);
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            let _ = task.await;
        }
    }
}

/// Whom a static configuration makes this host follow.
fn primary_url(config: &Config) -> Option<String> {
    match config.lease.role {
        LeaseRole::Primary => None,
        LeaseRole::Replica => config.lease.primary_url.clone(),
    }
}

/// Starts the lease of a node.
pub(super) fn start(node: &Arc<Node>, stop: &CancellationToken) -> Result<LeaseHandle, LeaseError> {
    let config = node.config.read().clone();
    let own = node.own_peer();
    let (lease, fixed, timing): (Arc<dyn Lease>, _, _) = match config.lease.kind {
        LeaseKind::Static => {
            let fixed = Arc::new(StaticLease::new(own.clone(), primary_url(&config)));
            (fixed.clone(), Some(fixed), Timing { ttl: None, retry: RETRY })
        }
        LeaseKind::Consul => {
            let ttl = config.lease.ttl;
            let consul = ConsulLease::start(ConsulNode {
                options: config.consul.options(),
                key: config.consul.key.clone(),
                own: own.clone(),
                candidate: config.lease.candidate,
                ttl,
                data_dir: config.data.dir.clone(),
            })?;
            (Arc::new(consul), None, Timing { ttl: Some(ttl), retry: RETRY })
        }
    };
    let machine = RoleMachine::new(own.clone(), config.lease.candidate, node.shared.epoch(), timing);
    let read_again = Arc::new(Notify::new());
    let (inputs, queue) = mpsc::unbounded_channel();
    let (transitions, transition_queue) = mpsc::unbounded_channel();
    let (door_is_open, door) = watch::channel(false);
    let driver = Driver {
        node: node.clone(),
        own,
        lease: lease.clone(),
        machine,
        alarm: clock::Alarm::new()
            .map_err(|e| LeaseError(format!("no timer for the lease can be had: {e}")))?,
        read_again: read_again.clone(),
        timing,
        beat: 0,
        preparing: false,
        held: Vec::new(),
        inputs: inputs.clone(),
        transitions: transitions.clone(),
        handing_over: None,
        stopping: None,
    };
    let tasks = vec![
        tokio::spawn(role::transitions(node.clone(), transition_queue, door, stop.clone())),
        tokio::spawn(driver.run(queue)),
        tokio::spawn(watch_lease(node.clone(), lease.clone(), inputs.clone(), read_again, stop.clone())),
    ];
    let tasks = parking_lot::Mutex::new(tasks);
    Ok(LeaseHandle { inputs, lease, fixed, door_is_open, transitions, tasks })
}

/// Tells the machine what the lease is, whenever it changes.
async fn watch_lease(
    node: Arc<Node>,
    lease: Arc<dyn Lease>,
    inputs: mpsc::UnboundedSender<Input>,
    read_again: Arc<Notify>,
    stop: CancellationToken,
) {
    let mut after = None;
    let mut failing: Option<String> = None;
    loop {
        let view = tokio::select! {
            view = lease.view(after) => view,
            () = read_again.notified() => {
                after = None;
                continue;
            }
            () = inputs.closed() => return,
            () = stop.cancelled() => return,
        };
        match view {
            Ok(view) => {
                if let Some(why) = failing.take() {
                    tracing::info!("the lease's store answers again");
                    node.change_role(|role| {
                        role.waits.take_if(|waits| *waits == why);
                    });
                }
                after = Some(view.index);
                if inputs.send(Input::Event(Event::Seen(view))).is_err() {
                    return;
                }
            }
            Err(error) => {
                if failing.is_none() {
                    tracing::warn!(%error, "cannot read the lease; trying again");
                }
                // Not only the first: of a connection that Consul has cut the reason is not always known.
                let why = format!("the lease cannot be read: {error}");
                let before = failing.replace(why.clone());
                if before.as_ref() != Some(&why) {
                    node.change_role(|role| {
                        if role.name == RoleName::None {
                            role.waits.take_if(|waits| Some(&*waits) == before.as_ref());
                            role.waits.get_or_insert(why);
                        }
                    });
                }
                after = None;
                if inputs.send(Input::Event(Event::Unseen)).is_err() {
                    return;
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

struct Driver {
    node: Arc<Node>,
    own: Peer,
    lease: Arc<dyn Lease>,
    machine: RoleMachine,
    alarm: clock::Alarm,
    read_again: Arc<Notify>,
    timing: Timing,
    /// See [`Term::beat`].
    beat: u64,
    /// A preparation is under way, also of a handoff that was called off.
    preparing: bool,
    /// Writers that wait for the end of a handoff.
    held: Vec<Held>,
    inputs: mpsc::UnboundedSender<Input>,
    transitions: mpsc::UnboundedSender<Transition>,
    handing_over: Option<oneshot::Sender<Result<(), String>>>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Driver {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Input>) {
        loop {
            let input = match self.machine.wake_at() {
                None => queue.recv().await,
                Some(at) => tokio::select! {
                    input = queue.recv() => input,
                    rung = self.alarm.until(at) => {
                        if let Err(error) = rung {
                            tracing::error!(%error, "the lease's timer fails; looking again");
                            tokio::time::sleep(RETRY).await;
                        }
                        Some(Input::Event(Event::Tick))
                    }
                },
            };
            let Some(input) = input else { return };
            let now = clock::now();
            self.machine.see_epoch(self.node.shared.epoch());
            let actions = match input {
                Input::Event(event) => self.machine.handle(now, event),
                Input::Look(look) => {
                    look(&self.machine);
                    continue;
                }
                Input::Prepared(prepared) => self.prepared(now, prepared),
                Input::Prepare { from, reply } => {
                    let _ = reply.send(self.machine.prepare(now, from));
                    Vec::new()
                }
                Input::HandOver { reply, .. } if self.preparing => {
                    let _ = reply.send(Err("a handoff is under way".into()));
                    continue;
                }
                Input::HandOver { to, reply } => {
                    let actions = self.machine.handle(now, Event::HandOver { to });
                    if actions.iter().any(|action| matches!(action, Action::Prepare { .. })) {
                        self.handing_over = Some(reply);
                    } else if let Some(Action::HandedOver(result)) = actions.last() {
                        // Not the one that is under way.
                        let _ = reply.send(result.clone());
                        continue;
                    }
                    actions
                }
                Input::Stop { reply } => {
                    self.stopping = Some(reply);
                    self.machine.handle(now, Event::Stop)
                }
            };
            for action in actions {
                if !self.execute(action) {
                    return;
                }
            }
            if !self.machine.is_handing_over() {
                self.let_go_of_writers();
            }
            if self.machine.holds().is_some() && self.machine.leads(now).is_none() && self.stopping.is_none()
            {
                self.node.change_role(|role| {
                    role.name = RoleName::None;
                    role.waits = Some("the lease could not be renewed: writes are refused".into());
                });
            }
        }
    }

    /// `false`: this was the last one.
    fn execute(&mut self, action: Action) -> bool {
        match action {
            Action::Lead { epoch, until } => {
                let number = self.node.will_lead(until);
                let _ = self.transitions.send(Transition::Lead { epoch, number });
            }
            Action::Extend { until } => self.node.shared.set_write_limit(until),
            Action::StopWrites => {
                let planned = self.stopping.is_some();
                self.node.stop_writes(if planned { PLANNED_PATIENCE } else { HELD_PATIENCE });
                if !planned && self.held.is_empty() {
                    let node = self.node.clone();
                    tokio::task::spawn_blocking(move || node.keep_writers_out());
                }
            }
            Action::Follow(peer) => {
                let _ = self.transitions.send(Transition::Follow(peer));
            }
            Action::CatchUp(peer) => {
                let _ = self.transitions.send(Transition::CatchUp(peer));
            }
            Action::Read => self.read_again.notify_one(),
            Action::Ask { round, peers } => self.ask(round, peers),
            Action::Claim { version, from, epoch } => {
                self.spawn_write(
                    move |lease, term| {
                        Box::pin(async move {
                            let sent = clock::now();
                            let claim = Claim { version, from, term };
                            Event::Claimed { epoch, sent, outcome: told("claim", lease.claim(claim).await) }
                        })
                    },
                    epoch,
                );
            }
            Action::Renew { version, epoch } => {
                self.spawn_write(
                    move |lease, term| {
                        Box::pin(async move {
                            let sent = clock::now();
                            Event::Renewed {
                                epoch,
                                sent,
                                outcome: told("renew", lease.renew(version, term).await),
                            }
                        })
                    },
                    epoch,
                );
            }
            Action::Prepare { to } => {
                self.preparing = true;
                let (node, inputs) = (self.node.clone(), self.inputs.clone());
                tokio::spawn(async move {
                    let prepared = node.prepare_handoff(to.peer).await;
                    let _ = inputs.send(Input::Prepared(prepared));
                });
            }
            Action::LetWritersGoOn => self.let_writers_go_on(),
            Action::Give { version, to, epoch } => {
                self.give(version, to, epoch);
            }
            Action::Release { version, epoch } => {
                self.spawn_write(
                    move |lease, mut term| {
                        Box::pin(async move {
                            term.released = true;
                            let _ = told("release", lease.release(version, term).await);
                            Event::Released
                        })
                    },
                    epoch,
                );
            }
            Action::HandedOver(result) => {
                if let Some(reply) = self.handing_over.take() {
                    let _ = reply.send(result);
                }
            }
            Action::Waits(choice) => self.waits(&choice),
            Action::WaitsNoMore => self.node.change_role(|role| role.waits = None),
            Action::Stopped => {
                if let Some(reply) = self.stopping.take() {
                    let _ = reply.send(());
                }
                return false;
            }
        }
        true
    }

    fn term(&mut self, epoch: Epoch) -> Term {
        self.beat += 1;
        let standing = self.node.standing();
        let sync = self.node.promises();
        Term { holder: self.own.clone(), epoch, standing, released: false, beat: self.beat, sync }
    }

    fn prepared(&mut self, now: Time, prepared: Result<Vec<Held>, String>) -> Vec<Action> {
        self.preparing = false;
        let handing = self.machine.is_handing_over();
        let prepared = prepared.map(|held| self.held = held);
        if !handing {
            // It was called off meanwhile.
            self.let_writers_go_on();
        }
        self.machine.handle(now, Event::Prepared(prepared))
    }

    /// Undoes what the preparation of a handoff did, if this node still leads.
    fn let_writers_go_on(&mut self) {
        self.let_go_of_writers();
        if let (Some(epoch), Some(until)) = (self.machine.holds(), self.machine.writes_until()) {
            let number = self.node.will_lead(until);
            let _ = self.transitions.send(Transition::Lead { epoch, number });
        }
    }

    /// The handoff is over: writers go on, or wait until this node is primary again.
    fn let_go_of_writers(&mut self) {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            return;
        }
        let leads = self.machine.holds().is_some();
        // Closing goes through the mount.
        tokio::task::spawn_blocking(move || {
            for (db, hold) in held {
                if leads { drop(hold) } else { db.keep_writers_out(hold) }
            }
        });
    }

    fn give(&mut self, version: u64, to: Member, epoch: Epoch) {
        let term = Term { holder: to.peer.clone(), ..self.term(epoch) };
        let gift = Gift { version, session: to.session, term };
        let (lease, inputs, asking) = (self.lease.clone(), self.inputs.clone(), self.node.asking());
        let limit = self.answer_limit();
        tokio::spawn(async move {
            let outcome = told("give", lease.give(gift).await);
            let _ = inputs.send(Input::Event(Event::Given { outcome }));
            // Where this does not arrive it sees the lease in its name a moment later.
            if let Some(Some(version)) = outcome
                && let Err(error) = asking.grant(&to.peer, version, epoch, limit).await
            {
                tracing::debug!(%error, "the successor was not told");
            }
        });
    }

    /// How long others may take to answer: elections must not take long, and whoever is gone never answers.
    fn answer_limit(&self) -> Duration {
        self.timing.ttl.map_or(Duration::from_secs(1), |ttl| (ttl / 8).min(Duration::from_secs(1)))
    }

    /// Writes to the lease's store, off this task.
    fn spawn_write<F>(&mut self, write: F, epoch: Epoch)
    where
        F: FnOnce(Arc<dyn Lease>, Term) -> futures_util::future::BoxFuture<'static, Event>,
    {
        let inputs = self.inputs.clone();
        let writing = write(self.lease.clone(), self.term(epoch));
        tokio::spawn(async move {
            let _ = inputs.send(Input::Event(writing.await));
        });
    }

    fn ask(&self, round: u64, peers: Vec<Peer>) {
        let (node, inputs, limit) = (self.node.clone(), self.inputs.clone(), self.answer_limit());
        let can_stand = self.machine.can_stand();
        let promises = node.promises();
        let all = !promises.is_empty() || self.machine.has_promises();
        tokio::spawn(async move {
            let asking = node.asking();
            let asked = peers.iter().map(|peer| {
                let asking = asking.clone();
                async move {
                    let answer = asking.standing(peer, all, limit).await;
                    let answer = answer.inspect_err(|error| {
                        tracing::debug!(peer = peer.name, %error, "a candidate does not answer");
                    });
                    answer.ok().filter(|answer| answer.peer.node_id == peer.node_id)
                }
            });
            let answers = futures_util::future::join_all(asked).await.into_iter().flatten().collect();
            let own = node.election_answer(can_stand, all).await;
            let _ = inputs.send(Input::Event(Event::Heard { round, own, answers, promises }));
        });
    }

    fn waits(&self, choice: &Choice) {
        let why = match choice {
            Choice::Stand => return,
            Choice::LetGoFirst(peer) => format!("{} has more and goes first", peer.name),
            Choice::Behind => "it lacks transactions of the last primary; another candidate may have them".into(),
            Choice::Stale => {
                "it has none of the last term's data and must not become primary by itself: start a host that has, \
                 or run `litefs promote --force` here to go on without that data"
                    .to_owned()
            }
            Choice::CatchUp(peer) => format!("{} has commits that it lacks, and gives them to it first", peer.name),
            Choice::Unheard { members, needed } => format!(
                "commits that were acknowledged by members of [sync] may be unknown to it: {needed} more of {} must be \
                 heard. Start one of these, or run `litefs promote --force` here to go on without what only they have",
                members.join(", ")
            ),
            Choice::Lacks { database, with } => format!(
                "{} has acknowledged commits of {database} that it lacks, and lacks others that it has: start a host \
                 that has all, or run `litefs promote --force` on the one whose data shall count",
                with.name
            ),
        };
        tracing::warn!("the lease is free, but this node waits: {why}");
        self.node.change_role(|role| role.waits = Some(why));
    }
}

/// An answer of the store; its errors are told here.
fn told<T>(what: &str, result: Result<T, LeaseError>) -> Option<T> {
    result.inspect_err(|error| tracing::warn!(%error, "cannot {what} the lease")).ok()
}
