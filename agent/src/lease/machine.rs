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
//! not looked at.

use super::election::{Answer, Choice, choose};
use super::{Member, Outcome, Peer, Standing, Term, Time, View};
use crate::ship::engine::Epoch;
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
        /// How far this node is.
        own: Standing,
        /// Those that answered.
        answers: Vec<Answer>,
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
    Asking { round: u64 },
    Claiming { epoch: Epoch },
    Resuming { epoch: Epoch },
    Leading(Leading),
    Stopped,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Leading {
    epoch: Epoch,
    until: Option<Time>,
    /// `until` has passed.
    fenced: bool,
    renewing: bool,
    renew_at: Option<Time>,
    handing: Option<Handing>,
}

impl Leading {
    /// The record is about to change: a renewal would be in the way.
    fn is_giving(&self) -> bool {
        matches!(self.handing, Some(Handing::Waiting(_) | Handing::Giving(_)))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Handing {
    Preparing(Member),
    /// Prepared, but a renewal is on its way, which will change the version.
    Waiting(Member),
    Giving(Member),
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
                [l.until.filter(|_| !l.fenced), l.renew_at.filter(|_| !l.renewing && !l.is_giving())]
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
            Event::Heard { round, own, answers } => self.heard(now, round, own, &answers, &mut out),
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
                    self.give_up(epoch, &mut out);
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
                let giving = matches!(leading.handing, Some(Handing::Giving(_)));
                let mine = giving || self.current().is_none_or(|view| self.is_own(view));
                if !mine {
                    self.lost(now, "the lease is in another's name", out);
                } else {
                    self.renew_if_due(now, out);
                }
            }
            State::Following => self.follow_or_stand(now, out),
            State::Asking { .. } | State::Claiming { .. } | State::Resuming { .. } | State::Stopped => {}
        }
    }

    fn renew_if_due(&mut self, now: Time, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        if leading.renew_at.is_some_and(|at| now >= at) && !leading.renewing && !leading.is_giving() {
            leading.renewing = true;
            out.push(Action::Renew { epoch: leading.epoch });
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
            self.state = State::Resuming { epoch };
            self.prepared = None;
            out.push(Action::Renew { epoch });
            return;
        }
        let term = view.record.term.clone();
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
        self.state = State::Asking { round: self.round };
        let peers = self.candidates().into_iter().map(|member| member.peer).collect();
        out.push(Action::Ask { round: self.round, peers });
    }

    fn follow(&mut self, peer: Option<Peer>, out: &mut Vec<Action>) {
        self.waits = None;
        // A node does not follow itself: what is in its name but not held by it is nobody's.
        let peer = peer.filter(|p| p.node_id != self.own.node_id);
        if self.following != peer {
            self.following.clone_from(&peer);
            out.push(Action::Follow(peer));
        }
    }

    fn heard(&mut self, now: Time, round: u64, own: Standing, answers: &[Answer], out: &mut Vec<Action>) {
        if self.state != (State::Asking { round }) {
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
        if !self.is_free(now, view) {
            return self.look(now, out);
        }
        let last = record.term.as_ref().map(|term| term.standing);
        let choice = choose((self.own.node_id, own), last, answers);
        let stands = match &choice {
            Choice::Stand => true,
            Choice::Stale => self.forced,
            // The one that is further may be unable to; what the last primary had may never come back.
            Choice::LetGoFirst(_) | Choice::Behind => {
                let since = *self.behind_since.get_or_insert(now);
                self.forced || self.timing.ttl.is_none_or(|ttl| now >= since + ttl)
            }
        };
        if !stands {
            if self.waits.as_ref() != Some(&choice) {
                self.waits = Some(choice.clone());
                out.push(Action::Waits(choice));
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
            renewing: false,
            renew_at: self.timing.renew_every().map(|every| sent + every),
            handing: None,
        });
        (self.following, self.prepared, self.behind_since, self.waits) = (None, None, None, None);
        self.forced = false;
        self.retry_at = None;
        out.push(Action::Lead { epoch, until });
    }

    fn renewed(&mut self, now: Time, sent: Time, outcome: Option<Outcome>, out: &mut Vec<Action>) {
        let timing = self.timing;
        let State::Leading(leading) = &mut self.state else { return };
        leading.renewing = false;
        match outcome {
            Some(Some(version)) => {
                self.confirmed = self.confirmed.max(version);
                leading.until = timing.fence().map(|fence| sent + fence);
                leading.renew_at = timing.renew_every().map(|every| sent + every);
                let (epoch, until) = (leading.epoch, leading.until);
                if std::mem::take(&mut leading.fenced) {
                    out.push(Action::Lead { epoch, until });
                } else {
                    out.push(Action::Extend { until });
                }
                if self.stopping {
                    return self.stop(out);
                }
                if let Some(Handing::Waiting(to)) = leading.handing.clone() {
                    self.give(to, out);
                }
            }
            Some(None) => {
                self.distrust_view(out);
                return self.lost(now, "the store says that this node does not hold the lease", out);
            }
            None => {
                leading.renew_at = Some(now + timing.retry);
                if let Some(Handing::Waiting(_)) = leading.handing {
                    leading.handing = None;
                    out.push(Action::LetWritersGoOn);
                    out.push(Action::HandedOver(Err("the lease's store does not answer".into())));
                }
            }
        }
        self.look(now, out);
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
        if leading.renewing {
            leading.handing = Some(Handing::Waiting(to));
            return;
        }
        self.give(to, out);
    }

    fn give(&mut self, to: Member, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        leading.handing = Some(Handing::Giving(to.clone()));
        let epoch = Epoch(leading.epoch.0 + 1);
        out.push(Action::Give { version: self.confirmed, to, epoch });
    }

    fn given(&mut self, now: Time, outcome: Option<Outcome>, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        let Some(Handing::Giving(to)) = leading.handing.take() else { return };
        match outcome {
            Some(Some(version)) => {
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
            }
            Some(None) => {
                leading.handing = Some(Handing::Giving(to));
                self.distrust_view(out);
                self.lost(now, "the lease changed meanwhile", out);
            }
            None => {
                // It may have been given: nothing is written until a renewal says that it was not. The renewal changes
                // the version, so that a gift that is still on its way comes to nothing.
                leading.fenced = true;
                leading.renew_at = Some(now);
                out.push(Action::StopWrites);
                out.push(Action::LetWritersGoOn);
                out.push(Action::HandedOver(Err("the lease's store does not answer".into())));
                self.look(now, out);
            }
        }
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
    fn give_up(&mut self, epoch: Epoch, out: &mut Vec<Action>) {
        if let State::Leading(Leading { handing: Some(_), .. }) = self.state {
            out.push(Action::LetWritersGoOn);
            out.push(Action::HandedOver(Err("this node cannot lead".into())));
        }
        self.state = State::Following;
        self.following = None;
        out.push(Action::StopWrites);
        out.push(Action::Release { epoch });
        out.push(Action::Follow(None));
    }

    fn stop(&mut self, out: &mut Vec<Action>) {
        self.stopping = true;
        match &mut self.state {
            // Its end comes here again: given, or by way of a renewal.
            State::Leading(Leading { handing: Some(Handing::Giving(_)), .. }) => {}
            State::Leading(leading) => {
                let epoch = leading.epoch;
                out.push(Action::StopWrites);
                if leading.handing.take().is_some() {
                    out.push(Action::HandedOver(Err("the agent stops".into())));
                }
                out.push(Action::Release { epoch });
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
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "machine_simulation.rs"]
mod simulation;
