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
//! | module        | what it does                                                     |
//! |---------------|------------------------------------------------------------------|
//! | `event`       | what it is told                                                  |
//! | `action`      | what it says                                                     |
//! | `candidacy`   | `Following`, `Asking`, `Claiming`: whom to follow, when to stand |
//! | `term`        | `Leading`: its beginning, its renewals, its end                  |
//! | `handoff`     | `Leading` until the lease is another's, and the other side of it |
//!
//! A handoff happens in `Leading`: the successor is prepared (writers wait, the successor has everything), and then the
//! lease is given to it in one step. It arrives there as [`Event::Granted`] from the old primary, or, should that be
//! lost, as a lease in its own name: `Resuming`.
//!
//! Views may be old when they arrive. Every successful change tells the version that it made, and views of before are
//! not looked at. Every change names the version it was decided on, so one that arrives late changes nothing. One whose
//! answer was lost may have made a version that this node does not know: the next one is refused then, and the record is
//! read again.

mod action;
mod candidacy;
mod event;
mod handoff;
mod term;

pub use action::Action;
pub use event::Event;

use super::election::Choice;
use super::{Member, Peer, Term, Time, View};
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
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
