//! A term of this node: its beginning, its renewals and its end.

use super::{Action, Handing, Leading, RoleMachine, State};
use crate::lease::{Outcome, Time};
use crate::ship::engine::Epoch;

impl RoleMachine {
    pub(super) fn lead(&mut self, sent: Time, version: u64, epoch: Epoch, out: &mut Vec<Action>) {
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

    pub(super) fn renew_if_due(&mut self, now: Time, seen: Option<u64>, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        leading.version = leading.version.max(seen);
        let due = leading.renew_at.is_some_and(|at| now >= at) && leading.renewing.is_none();
        if let Some(version) = leading.version.filter(|_| due && !leading.is_giving() && !leading.letting_go)
        {
            leading.renewing = Some(version);
            out.push(Action::Renew { version, epoch: leading.epoch });
        }
    }

    pub(super) fn renewed(&mut self, now: Time, sent: Time, outcome: Option<Outcome>, out: &mut Vec<Action>) {
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

    /// The store says that the record, or this node's session, is not what the view says.
    pub(super) fn distrust_view(&mut self, out: &mut Vec<Action>) {
        self.view = None;
        out.push(Action::Read);
    }

    /// The store says that this is not the record's version any more.
    pub(super) fn read_beyond(&mut self, version: u64, out: &mut Vec<Action>) {
        self.confirmed = self.confirmed.max(version + 1);
        if let State::Leading(leading) = &mut self.state
            && leading.version <= Some(version)
        {
            leading.version = None;
            self.distrust_view(out);
        }
    }

    /// The lease is not this node's any more.
    pub(super) fn lost(&mut self, now: Time, why: &str, out: &mut Vec<Action>) {
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

    /// Leads no more, so that another may.
    pub(super) fn give_up(&mut self, out: &mut Vec<Action>) {
        if let State::Leading(leading) = &mut self.state {
            leading.letting_go = true;
            if leading.handing.take().is_some() {
                out.push(Action::LetWritersGoOn);
                out.push(Action::HandedOver(Err("this node cannot lead".into())));
            }
        }
        self.let_go(out);
    }

    pub(super) fn stop(&mut self, out: &mut Vec<Action>) {
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
    pub(super) fn let_go(&mut self, out: &mut Vec<Action>) {
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
