//! A handoff: the successor is prepared, and the lease is given to it in one step.

use super::{Action, Handing, RoleMachine, State};
use crate::lease::{Member, Outcome, Time};
use crate::ship::engine::Epoch;

impl RoleMachine {
    /// Agrees to become the successor of `from`, which sends [`super::Event::Granted`] within the TTL. `false`: this node
    /// cannot, or does not know `from` as the holder.
    pub fn prepare(&mut self, now: Time, from: u64) -> bool {
        let agrees = self.can_stand()
            && self.state == State::Following
            && self.current().and_then(|v| v.record.term.as_ref()).is_some_and(|t| t.holder.node_id == from);
        self.prepared = agrees.then_some((now, from));
        agrees
    }

    pub(super) fn hand_over(&mut self, now: Time, to: u64, out: &mut Vec<Action>) {
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

    pub(super) fn successor_prepared(&mut self, now: Time, ready: Result<(), String>, out: &mut Vec<Action>) {
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

    pub(super) fn give(&mut self, to: Member, out: &mut Vec<Action>) {
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

    pub(super) fn given(&mut self, now: Time, outcome: Option<Outcome>, out: &mut Vec<Action>) {
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

    pub(super) fn granted(&mut self, now: Time, version: u64, epoch: Epoch, out: &mut Vec<Action>) {
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
}
