//! The role machine: decides from what it is told, and tells what to do. It has no clock and no socket.
//!
//! ```text
//!                          the lease is free, this node may stand
//!          +-----------+ -------------------------------> +--------+  another goes first, or this node is stale
//!   start  |           |                                  | Asking | ----------------------+
//!  ------> | Following | <-------------------------------- +--------+                       |
//!          |           |                                      | nobody is further           |
//!          |           |   refused, or no answer              v                             |
//!          |           | <------------------------------ +----------+                       |
//!          |           |                                 | Claiming |                       |
//!          |           | <-----------------------------------------------------------------+
//!          |           |   in this node's name                | done
//!          |           | --------------> +----------+         |
//!          |           | <-------------- | Resuming | --------+-----> +---------+  renewed in time
//!          |           |    refused      +----------+   renewed       | Leading | ----+
//!          |           |                                              |         | <---+
//!          +-----------+ <------------------------------------------- +---------+
//!                  the lease is another's, given to another, or released   | ^
//!                                                     not renewed in time  v | renewed after all
//!                                                                      (fenced: no writes)
//! ```
//!
//! A handoff happens in `Leading`: the successor is prepared (writers wait, the successor has everything), and then the
//! lease is given to it in one step. It arrives there as [`Event::Granted`] from the old primary, or, should that be
//! lost, as a lease in its own name: `Resuming`.
//!
//! Views may be old when they arrive. Every successful change tells the version that it made, and views of before are
//! not looked at. Every change names the version it was decided on, so one that arrives late changes nothing. One whose
//! answer was lost may have made a version that this node does not know: the next one is refused then, and the record is
//! read again.

use super::election::{Answer, Choice, choose, proves_all_acknowledged};
use super::{Member, Outcome, Peer, Record, Term, Time, View};
use crate::ship::engine::Epoch;
use crate::sync::quorum::Promise;
use std::time::Duration;

/// How long things take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A holder that was not seen to renew for this long is gone; `None`: the lease never ends.
    pub ttl: Option<Duration>,
    /// Between asking other candidates again, and after an error of the store.
    pub retry: Duration,
}

impl Timing {
    /// A primary stops writing when it has not renewed for so long. The tenth of the TTL that is left is what clocks
    /// may differ in rate, and what stopping may take.
    pub fn fence(&self) -> Option<Duration> {
        self.ttl.map(|ttl| ttl / 10 * 9)
    }

    fn renew_every(&self) -> Option<Duration> {
        self.ttl.map(|ttl| ttl / 4)
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The lease was read.
    Seen(View),
    /// The lease could not be read.
    Unseen,
    /// A claim ended. `sent`: when it was sent.
    Claimed {
        /// Its term: an answer that comes late is no answer to a later question.
        epoch: Epoch,
        /// When it was sent.
        sent: Time,
        /// `None`: no answer.
        outcome: Option<Outcome>,
    },
    /// A renewal ended.
    Renewed {
        /// Its term: an answer that comes late is no answer to a later question.
        epoch: Epoch,
        /// When it was sent.
        sent: Time,
        /// `None`: no answer.
        outcome: Option<Outcome>,
    },
    /// The candidates that answered, for the question with this number; and this node.
    Heard {
        /// Which question.
        round: u64,
        /// What this node would answer.
        own: Answer,
        /// Those that answered.
        answers: Vec<Answer>,
        /// What this node promises as a primary.
        promises: Vec<Promise>,
    },
    /// The lease is to be given to this node.
    HandOver {
        /// Identity of the successor.
        to: u64,
    },
    /// Writers wait and the successor has everything, or why that could not be brought about.
    Prepared(Result<(), String>),
    /// Giving the lease away ended.
    Given {
        /// `None`: no answer.
        outcome: Option<Outcome>,
    },
    /// The primary that this node has agreed with (see [`RoleMachine::prepare`]) gave it the lease.
    Granted {
        /// Version of the record then.
        version: u64,
        /// The new term.
        epoch: Epoch,
    },
    /// This candidate may become primary although it is stale.
    Force,
    /// The node could not do what [`Action::Lead`] of this term said, and takes no writes.
    CannotLead {
        /// The term.
        epoch: Epoch,
    },
    /// The agent stops: let go of the lease.
    Stop,
    /// Letting go ended.
    Released,
    /// Time passed.
    Tick,
}

/// What to do. In this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Take writes in this term, once it is stored durably; until then at most. Follow nobody.
    Lead {
        /// The term.
        epoch: Epoch,
        /// When writing has to stop; `None`: never.
        until: Option<Time>,
    },
    /// The time until which writes are taken.
    Extend {
        /// When writing has to stop.
        until: Option<Time>,
    },
    /// Take no writes, now.
    StopWrites,
    /// Follow this node, or nobody.
    Follow(Option<Peer>),
    /// There is no primary. Get from this node what this candidate lacks; it is no primary either.
    CatchUp(Peer),
    /// The record is not what was seen: read it again.
    Read,
    /// Ask these how far they are; ends with [`Event::Heard`].
    Ask {
        /// Number of the question.
        round: u64,
        /// Whom.
        peers: Vec<Peer>,
    },
    /// [`super::Lease::claim`].
    Claim {
        /// Version of the record that this was decided on.
        version: u64,
        /// Session to take it from.
        from: Option<String>,
        /// The new term.
        epoch: Epoch,
    },
    /// [`super::Lease::renew`].
    Renew {
        /// Version of the record that this was decided on.
        version: u64,
        /// The term.
        epoch: Epoch,
    },
    /// Make writers wait and bring the successor to where this node is; ends with [`Event::Prepared`].
    Prepare {
        /// The successor.
        to: Member,
    },
    /// The handoff does not take place: writers go on.
    LetWritersGoOn,
    /// [`super::Lease::give`], then tell the successor.
    Give {
        /// Version of the record that this was decided on.
        version: u64,
        /// The successor.
        to: Member,
        /// Its term.
        epoch: Epoch,
    },
    /// [`super::Lease::release`].
    Release {
        /// Version of the record that this was decided on.
        version: u64,
        /// The term that ends.
        epoch: Epoch,
    },
    /// The handoff that was asked for has ended; why it failed, when it did.
    HandedOver(Result<(), String>),
    /// Why this candidate does not stand.
    Waits(Choice),
    /// This node has let go of the lease.
    Stopped,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Following,
    /// The others are asked about a record of this version: what they answer counts for no other.
    Asking {
        round: u64,
        version: u64,
    },
    Claiming {
        epoch: Epoch,
    },
    Resuming {
        epoch: Epoch,
    },
    Leading(Leading),
    Stopped,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Leading {
    epoch: Epoch,
    until: Option<Time>,
    /// `until` has passed.
    fenced: bool,
    /// The record's, if nobody else changed it; `None`: it has to be read again.
    version: Option<u64>,
    /// A renewal of this version is on its way.
    renewing: Option<u64>,
    renew_at: Option<Time>,
    handing: Option<Handing>,
    /// This node lets go as soon as the renewal that is on its way has ended: the two would name the same version.
    letting_go: bool,
}

impl Leading {
    /// The record is about to change: a renewal would be in the way.
    fn is_giving(&self) -> bool {
        matches!(self.handing, Some(Handing::Waiting(_) | Handing::Giving(..)))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Handing {
    Preparing(Member),
    /// Prepared, but a renewal is on its way, which will change the version.
    Waiting(Member),
    /// Of this version.
    Giving(Member, u64),
}

/// Decides the role of one node.
#[derive(Clone, Debug)]
pub struct RoleMachine {
    own: Peer,
    candidate: bool,
    timing: Timing,
    state: State,
    /// Newest epoch that this node knows.
    epoch: Epoch,
    view: Option<View>,
    /// The last attempt to read the lease failed.
    unseen: bool,
    /// The newest term that was seen, and when first: a renewal makes another one of it.
    seen: Option<(Time, Option<Term>)>,
    /// See [`View::resets`].
    resets: u64,
    /// Versions below are of before the last change that this node knows of.
    confirmed: u64,
    following: Option<Peer>,
    catching_up: Option<Peer>,
    round: u64,
    /// Nothing is tried before.
    retry_at: Option<Time>,
    /// Since when this candidate could have stood but was behind.
    behind_since: Option<Time>,
    waits: Option<Choice>,
    forced: bool,
    stopping: bool,
    /// When this node agreed to become the successor, and of whom.
    prepared: Option<(Time, u64)>,
}

impl RoleMachine {
    /// A node that knows nothing yet. `epoch`: the newest one it has stored.
    pub fn new(own: Peer, candidate: bool, epoch: Epoch, timing: Timing) -> Self {
        RoleMachine {
            own,
            candidate,
            timing,
            state: State::Following,
            epoch,
            view: None,
            unseen: false,
            seen: None,
            resets: 0,
            confirmed: 0,
            following: None,
            catching_up: None,
            round: 0,
            retry_at: None,
            behind_since: None,
            waits: None,
            forced: false,
            stopping: false,
            prepared: None,
        }
    }

    /// The node has adopted an epoch.
    pub fn see_epoch(&mut self, epoch: Epoch) {
        self.epoch = self.epoch.max(epoch);
    }

    /// The term in which this node takes writes at `now`.
    pub fn leads(&self, now: Time) -> Option<Epoch> {
        match &self.state {
            State::Leading(l) if !l.fenced && l.until.is_none_or(|until| now < until) => Some(l.epoch),
            _ => None,
        }
    }

    /// Until when this node takes writes, if it does.
    pub fn writes_until(&self) -> Option<Option<Time>> {
        match &self.state {
            State::Leading(leading) if !leading.fenced => Some(leading.until),
            _ => None,
        }
    }

    /// The node that holds the lease at `now`, as far as is known.
    pub fn holder(&self, now: Time) -> Option<&Peer> {
        let view = self.current().filter(|view| !self.is_free(now, view))?;
        view.record.term.as_ref().map(|term| &term.holder)
    }

    /// The term that this node holds, also when it is fenced.
    pub fn holds(&self) -> Option<Epoch> {
        match &self.state {
            State::Leading(l) => Some(l.epoch),
            _ => None,
        }
    }

    /// Whether this node could become primary: it is a candidate, and the store knows it and answers it.
    pub fn can_stand(&self) -> bool {
        let known = !self.unseen && self.view.as_ref().is_some_and(|view| view.session.is_some());
        let fenced = matches!(self.state, State::Leading(Leading { fenced: true, .. }) | State::Stopped);
        self.candidate && !self.stopping && known && !fenced
    }

    /// Whether the last primary promised something of commits.
    pub fn has_promises(&self) -> bool {
        self.current().and_then(|view| view.record.term.as_ref()).is_some_and(|term| !term.sync.is_empty())
    }

    /// Whether a handoff is under way.
    pub fn is_handing_over(&self) -> bool {
        matches!(self.state, State::Leading(Leading { handing: Some(_), .. }))
    }

    /// The view, unless it is older than what this node did since.
    fn current(&self) -> Option<&View> {
        self.view.as_ref().filter(|view| view.record.version >= self.confirmed)
    }

    /// Candidates that have a session, without this node.
    pub fn candidates(&self) -> Vec<Member> {
        let members = self.view.iter().flat_map(|view| &view.members);
        members.filter(|m| m.candidate && m.peer.node_id != self.own.node_id).cloned().collect()
    }

    /// Agrees to become the successor of `from`, which sends [`Event::Granted`] within the TTL. `false`: this node
    /// cannot, or does not know `from` as the holder.
    pub fn prepare(&mut self, now: Time, from: u64) -> bool {
        let agrees = self.can_stand()
            && self.state == State::Following
            && self.current().and_then(|v| v.record.term.as_ref()).is_some_and(|t| t.holder.node_id == from);
        self.prepared = agrees.then_some((now, from));
        agrees
    }

    /// When [`Event::Tick`] is due.
    pub fn wake_at(&self) -> Option<Time> {
        let own = match &self.state {
            State::Leading(l) => {
                let renews = l.renewing.is_none() && !l.is_giving() && !l.letting_go && l.version.is_some();
                [l.until.filter(|_| !l.fenced), l.renew_at.filter(|_| renews)]
            }
            // Nothing is done before the time of the retry.
            State::Following => [self.retry_at.or_else(|| self.expires_at()), None],
            _ => [None, None],
        };
        own.into_iter().flatten().min()
    }

    /// When the holder that is seen is over, if it is not already and is not this node.
    fn expires_at(&self) -> Option<Time> {
        let view = self.current()?;
        if !self.can_stand() || self.is_released(view) || self.is_own(view) {
            return None;
        }
        self.ends_at()
    }

    /// When what was seen of the lease is a TTL old.
    fn ends_at(&self) -> Option<Time> {
        let (since, _) = self.seen.as_ref()?;
        self.timing.ttl.map(|ttl| *since + ttl)
    }

    /// Nobody has to be waited for. That there is no record says so only to a node that has never known a primary: what
    /// the store had may be lost, and the primary does not know it yet.
    fn is_released(&self, view: &View) -> bool {
        view.record.term.as_ref().map_or(self.epoch == Epoch(0), |term| term.released)
    }

    fn is_free(&self, now: Time, view: &View) -> bool {
        self.is_released(view) || self.ends_at().is_some_and(|end| now >= end)
    }

    fn is_own(&self, view: &View) -> bool {
        let record = &view.record;
        record.session.is_some()
            && record.session == view.session
            && record.term.as_ref().is_some_and(|t| t.holder.node_id == self.own.node_id && !t.released)
    }

    /// Takes in what happened; says what to do.
    pub fn handle(&mut self, now: Time, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Seen(view) => {
                if view.resets != self.resets {
                    self.resets = view.resets;
                    self.confirmed = 0;
                }
                // A session that ended changes the version, but is no sign of life.
                if self.seen.as_ref().is_none_or(|(_, term)| *term != view.record.term) {
                    self.seen = Some((now, view.record.term.clone()));
                }
                self.view = Some(view);
                self.unseen = false;
                self.look(now, &mut out);
            }
            Event::Unseen => self.unseen = true,
            Event::Tick => self.look(now, &mut out),
            Event::Heard { round, own, answers, promises } => {
                self.heard(now, round, &own, &answers, promises, &mut out);
            }
            Event::Claimed { epoch, sent, outcome } => {
                if self.state == (State::Claiming { epoch }) {
                    self.taken(now, sent, epoch, outcome, &mut out);
                }
            }
            Event::Renewed { epoch, sent, outcome } => {
                if self.state == (State::Resuming { epoch }) {
                    self.taken(now, sent, epoch, outcome, &mut out);
                } else if self.holds() == Some(epoch) {
                    self.renewed(now, sent, outcome, &mut out);
                }
            }
            Event::HandOver { to } => self.hand_over(now, to, &mut out),
            Event::Prepared(ready) => self.successor_prepared(now, ready, &mut out),
            Event::Given { outcome } => self.given(now, outcome, &mut out),
            Event::Granted { version, epoch } => self.granted(now, version, epoch, &mut out),
            Event::Force => {
                self.forced = true;
                self.retry_at = None;
                self.look(now, &mut out);
            }
            Event::CannotLead { epoch } => {
                if self.holds() == Some(epoch) {
                    self.retry_at = Some(now + self.timing.retry);
                    self.give_up(&mut out);
                }
            }
            Event::Stop => self.stop(&mut out),
            Event::Released => {
                if self.stopping {
                    self.state = State::Stopped;
                    out.push(Action::Stopped);
                }
            }
        }
        out
    }

    /// Looks at the lease and the time.
    fn look(&mut self, now: Time, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Leading(leading) => {
                if leading.until.is_some_and(|until| now >= until) && !leading.fenced {
                    leading.fenced = true;
                    out.push(Action::StopWrites);
                    if leading.handing.take().is_some() {
                        out.push(Action::LetWritersGoOn);
                        out.push(Action::HandedOver(Err("the lease could not be renewed in time".into())));
                    }
                }
                // The gift may be seen before its success is told.
                let giving = matches!(leading.handing, Some(Handing::Giving(..)));
                let seen = self.current().map(|view| (view.record.version, self.is_own(view)));
                match seen {
                    Some((_, false)) if !giving => self.lost(now, "the lease is in another's name", out),
                    Some((version, true)) => self.renew_if_due(now, Some(version), out),
                    _ => self.renew_if_due(now, None, out),
                }
            }
            State::Following => self.follow_or_stand(now, out),
            State::Asking { .. } | State::Claiming { .. } | State::Resuming { .. } | State::Stopped => {}
        }
    }

    fn renew_if_due(&mut self, now: Time, seen: Option<u64>, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        leading.version = leading.version.max(seen);
        let due = leading.renew_at.is_some_and(|at| now >= at) && leading.renewing.is_none();
        if let Some(version) = leading.version.filter(|_| due && !leading.is_giving() && !leading.letting_go)
        {
            leading.renewing = Some(version);
            out.push(Action::Renew { version, epoch: leading.epoch });
        }
    }

    fn follow_or_stand(&mut self, now: Time, out: &mut Vec<Action>) {
        self.retry_at = self.retry_at.filter(|at| now < *at);
        if self.stopping {
            return;
        }
        let Some(view) = self.current() else { return };
        if self.is_own(view) {
            if self.retry_at.is_some_and(|at| now < at) {
                return;
            }
            let granted = view.record.term.as_ref().map_or(Epoch(0), |term| term.epoch);
            let epoch = granted.max(Epoch(self.epoch.0 + 1));
            let version = view.record.version;
            self.state = State::Resuming { epoch };
            self.prepared = None;
            out.push(Action::Renew { version, epoch });
            return;
        }
        let (version, term) = (view.record.version, view.record.term.clone());
        if !self.is_free(now, view) {
            self.behind_since = None;
            self.forced = false;
            self.follow(term.map(|term| term.holder), out);
            return;
        }
        self.prepared = None;
        if !self.can_stand() || self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        self.round += 1;
        self.state = State::Asking { round: self.round, version };
        let members = self.view.iter().flat_map(|view| &view.members);
        let others = members.filter(|member| member.peer.node_id != self.own.node_id);
        let peers = others.map(|member| member.peer.clone()).collect();
        out.push(Action::Ask { round: self.round, peers });
    }

    fn follow(&mut self, peer: Option<Peer>, out: &mut Vec<Action>) {
        self.waits = None;
        // A node does not follow itself: what is in its name but not held by it is nobody's.
        let peer = peer.filter(|p| p.node_id != self.own.node_id);
        if self.following != peer || self.catching_up.take().is_some() {
            self.following.clone_from(&peer);
            out.push(Action::Follow(peer));
        }
    }

    fn heard(
        &mut self,
        now: Time,
        round: u64,
        own: &Answer,
        answers: &[Answer],
        promises: Vec<Promise>,
        out: &mut Vec<Action>,
    ) {
        let State::Asking { round: asked, version } = self.state else { return };
        if asked != round {
            return;
        }
        self.state = State::Following;
        self.retry_at = Some(now + self.timing.retry);
        if self.stopping {
            self.state = State::Stopped;
            out.push(Action::Stopped);
            return;
        }
        let Some(view) = self.current() else { return };
        let record = view.record.clone();
        if record.version != version {
            // There may have been a term in between, of which they did not know.
            self.retry_at = None;
            return self.look(now, out);
        }
        if !self.is_free(now, view) {
            return self.look(now, out);
        }
        let choice = self.choose(now, &record, own, answers, promises);
        if choice != Choice::Stand && !self.forced {
            if self.waits.as_ref() != Some(&choice) {
                self.waits = Some(choice.clone());
                out.push(Action::Waits(choice.clone()));
            }
            if let Choice::CatchUp(peer) = choice
                && self.catching_up.as_ref() != Some(&peer)
            {
                self.following = None;
                self.catching_up = Some(peer.clone());
                out.push(Action::CatchUp(peer));
            }
            return;
        }
        let told = record.term.as_ref().map_or(Epoch(0), |term| term.epoch);
        let heard = answers.iter().map(|a| a.epoch).max().unwrap_or_default();
        let newest = told.max(heard).max(self.epoch).0.max(record.taken);
        let epoch = Epoch(newest + 1);
        self.state = State::Claiming { epoch };
        out.push(Action::Claim { version: record.version, from: record.session, epoch });
    }

    fn choose(
        &mut self,
        now: Time,
        record: &Record,
        own: &Answer,
        answers: &[Answer],
        promises: Vec<Promise>,
    ) -> Choice {
        let last = record.term.as_ref();
        let choice = choose((self.own.node_id, own.standing), last.map(|term| term.standing), answers);
        match choice {
            Choice::Stand => {}
            // The one that is further may be unable to; what the last primary had may never come back.
            Choice::LetGoFirst(_) | Choice::Behind => {
                let since = *self.behind_since.get_or_insert(now);
                if self.timing.ttl.is_some_and(|ttl| now < since + ttl) {
                    return choice;
                }
            }
            other => return other,
        }
        if last.is_none() && self.epoch == Epoch(0) && own.standing.is_empty() {
            // There has never been a primary that could have promised something.
            return Choice::Stand;
        }
        for promises in [promises, last.map(|term| term.sync.clone()).unwrap_or_default()] {
            if let Err(lacking) = proves_all_acknowledged(own, last, answers, &promises) {
                return lacking;
            }
        }
        Choice::Stand
    }

    /// A claim, or the first renewal of a lease in this node's name, ended.
    fn taken(
        &mut self,
        now: Time,
        sent: Time,
        epoch: Epoch,
        outcome: Option<Outcome>,
        out: &mut Vec<Action>,
    ) {
        match outcome {
            Some(Some(version)) => {
                self.lead(sent, version, epoch, out);
                if self.stopping {
                    self.stop(out);
                } else {
                    self.look(now, out);
                }
            }
            other => {
                self.state = State::Following;
                self.retry_at = Some(now + self.timing.retry);
                if other == Some(None) {
                    self.distrust_view(out);
                }
                if self.stopping {
                    out.push(Action::Stopped);
                    self.state = State::Stopped;
                } else {
                    self.look(now, out);
                }
            }
        }
    }

    /// The store says that the record, or this node's session, is not what the view says.
    fn distrust_view(&mut self, out: &mut Vec<Action>) {
        self.view = None;
        out.push(Action::Read);
    }

    fn lead(&mut self, sent: Time, version: u64, epoch: Epoch, out: &mut Vec<Action>) {
        self.confirmed = self.confirmed.max(version);
        self.epoch = self.epoch.max(epoch);
        let until = self.timing.fence().map(|fence| sent + fence);
        self.state = State::Leading(Leading {
            epoch,
            until,
            fenced: false,
            version: Some(version),
            renewing: None,
            renew_at: self.timing.renew_every().map(|every| sent + every),
            handing: None,
            letting_go: false,
        });
        (self.following, self.prepared, self.behind_since, self.waits) = (None, None, None, None);
        self.catching_up = None;
        self.forced = false;
        self.retry_at = None;
        out.push(Action::Lead { epoch, until });
    }

    fn renewed(&mut self, now: Time, sent: Time, outcome: Option<Outcome>, out: &mut Vec<Action>) {
        let timing = self.timing;
        let State::Leading(leading) = &mut self.state else { return };
        let renewed = leading.renewing.take();
        if let Some(Some(version)) = outcome {
            self.confirmed = self.confirmed.max(version);
            leading.version = leading.version.max(Some(version));
            leading.until = timing.fence().map(|fence| sent + fence);
            leading.renew_at = timing.renew_every().map(|every| sent + every);
        }
        if leading.letting_go {
            return self.let_go(out);
        }
        match outcome {
            Some(Some(_)) => {
                let (epoch, until) = (leading.epoch, leading.until);
                if !leading.fenced {
                    out.push(Action::Extend { until });
                } else if until.is_none_or(|until| now < until) {
                    leading.fenced = false;
                    out.push(Action::Lead { epoch, until });
                }
                if let Some(Handing::Waiting(to)) = leading.handing.clone() {
                    self.give(to, out);
                }
            }
            refused => {
                // Refused: an earlier renewal had its effect, though no answer came; or somebody else changed the
                // record, which nobody may before this node's time is over. The record tells which.
                let why = match refused {
                    Some(_) => "the lease changed meanwhile",
                    None => "the lease's store does not answer",
                };
                leading.renew_at = Some(if refused.is_some() { now } else { now + timing.retry });
                if let Some(Handing::Waiting(_)) = leading.handing {
                    leading.handing = None;
                    out.push(Action::LetWritersGoOn);
                    out.push(Action::HandedOver(Err(why.into())));
                }
                if let (Some(_), Some(version)) = (refused, renewed) {
                    self.read_beyond(version, out);
                }
            }
        }
        self.look(now, out);
    }

    /// The store says that this is not the record's version any more.
    fn read_beyond(&mut self, version: u64, out: &mut Vec<Action>) {
        self.confirmed = self.confirmed.max(version + 1);
        if let State::Leading(leading) = &mut self.state
            && leading.version <= Some(version)
        {
            leading.version = None;
            self.distrust_view(out);
        }
    }

    /// The lease is not this node's any more.
    fn lost(&mut self, now: Time, why: &str, out: &mut Vec<Action>) {
        if let State::Leading(leading) = &self.state {
            out.push(Action::StopWrites);
            if leading.handing.is_some() {
                out.push(Action::LetWritersGoOn);
                out.push(Action::HandedOver(Err(why.to_owned())));
            }
        }
        self.state = State::Following;
        self.following = None;
        out.push(Action::Follow(None));
        if self.stopping {
            self.state = State::Stopped;
            out.push(Action::Stopped);
        } else {
            self.look(now, out);
        }
    }

    fn hand_over(&mut self, now: Time, to: u64, out: &mut Vec<Action>) {
        let candidates = self.candidates();
        let refused = match &mut self.state {
            State::Leading(l) if l.fenced || l.until.is_some_and(|until| now >= until) => {
                Some("this node's lease has run out".to_owned())
            }
            State::Leading(l) if l.handing.is_some() => Some("a handoff is under way".to_owned()),
            State::Leading(leading) => match candidates.into_iter().find(|m| m.peer.node_id == to) {
                Some(member) => {
                    leading.handing = Some(Handing::Preparing(member.clone()));
                    out.push(Action::Prepare { to: member });
                    None
                }
                None => Some(format!("node {to:016x} is no candidate that takes part now")),
            },
            _ => Some("this node is not the primary".to_owned()),
        };
        if let Some(why) = refused {
            out.push(Action::HandedOver(Err(why)));
        }
    }

    fn successor_prepared(&mut self, now: Time, ready: Result<(), String>, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        let Some(Handing::Preparing(to)) = leading.handing.clone() else { return };
        if let Err(why) = ready {
            leading.handing = None;
            out.push(Action::LetWritersGoOn);
            out.push(Action::HandedOver(Err(why)));
            return self.look(now, out);
        }
        if leading.renewing.is_some() {
            leading.handing = Some(Handing::Waiting(to));
            return;
        }
        self.give(to, out);
    }

    fn give(&mut self, to: Member, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        let Some(version) = leading.version else {
            leading.handing = None;
            out.push(Action::LetWritersGoOn);
            out.push(Action::HandedOver(Err("the lease is being read again; try it once more".into())));
            return;
        };
        leading.handing = Some(Handing::Giving(to.clone(), version));
        let epoch = Epoch(leading.epoch.0 + 1);
        out.push(Action::Give { version, to, epoch });
    }

    fn given(&mut self, now: Time, outcome: Option<Outcome>, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        let Some(Handing::Giving(to, asked)) = leading.handing.take() else { return };
        if let Some(Some(version)) = outcome {
            self.confirmed = self.confirmed.max(version);
            self.state = State::Following;
            out.push(Action::StopWrites);
            self.following = None;
            self.follow(Some(to.peer), out);
            out.push(Action::HandedOver(Ok(())));
            if self.stopping {
                self.state = State::Stopped;
                out.push(Action::Stopped);
            }
            return;
        }
        // It may have been given, also when the store refuses: a question that was asked twice is refused the second
        // time. Nothing is written until a renewal says that it was not. The renewal changes the version, so that a gift
        // that is still on its way comes to nothing.
        leading.fenced = true;
        leading.renew_at = Some(now);
        out.push(Action::StopWrites);
        out.push(Action::LetWritersGoOn);
        let why = match outcome {
            Some(_) => "the lease changed meanwhile",
            None => "the lease's store does not answer",
        };
        out.push(Action::HandedOver(Err(why.into())));
        if self.stopping {
            return self.let_go(out);
        }
        if outcome.is_some() {
            self.read_beyond(asked, out);
        }
        self.look(now, out);
    }

    fn granted(&mut self, now: Time, version: u64, epoch: Epoch, out: &mut Vec<Action>) {
        let Some((agreed, _)) = self.prepared else { return };
        let fits = self.state == State::Following
            && version > self.confirmed
            && epoch > self.epoch
            && self.timing.fence().is_none_or(|fence| now < agreed + fence);
        if fits {
            // The lease was given after this node had agreed, so nobody counts its TTL from before.
            self.lead(agreed, version, epoch, out);
            self.look(now, out);
        }
    }

    /// Leads no more, so that another may.
    fn give_up(&mut self, out: &mut Vec<Action>) {
        if let State::Leading(leading) = &mut self.state {
            leading.letting_go = true;
            if leading.handing.take().is_some() {
                out.push(Action::LetWritersGoOn);
                out.push(Action::HandedOver(Err("this node cannot lead".into())));
            }
        }
        self.let_go(out);
    }

    fn stop(&mut self, out: &mut Vec<Action>) {
        self.stopping = true;
        match &mut self.state {
            // Its end comes here again.
            State::Leading(Leading { handing: Some(Handing::Giving(..)), .. }) => {}
            State::Leading(leading) => {
                if leading.handing.take().is_some() {
                    out.push(Action::HandedOver(Err("the agent stops".into())));
                }
                self.let_go(out);
            }
            State::Following => {
                self.state = State::Stopped;
                out.push(Action::Stopped);
            }
            // Their end comes here again.
            State::Asking { .. } | State::Claiming { .. } | State::Resuming { .. } => {}
            State::Stopped => out.push(Action::Stopped),
        }
    }

    /// Stops writing and releases the lease, once no renewal is on its way that would be in between.
    fn let_go(&mut self, out: &mut Vec<Action>) {
        let confirmed = self.confirmed;
        let State::Leading(leading) = &mut self.state else { return };
        leading.letting_go = true;
        leading.fenced = true;
        out.push(Action::StopWrites);
        if leading.renewing.is_some() {
            return;
        }
        let version = leading.version.unwrap_or(confirmed);
        out.push(Action::Release { version, epoch: leading.epoch });
        if !self.stopping {
            self.state = State::Following;
            self.following = None;
            out.push(Action::Follow(None));
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "machine_simulation.rs"]
mod simulation;
