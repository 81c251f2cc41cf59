//! While somebody else leads, or nobody: whom to follow, and when to stand.

use super::{Action, RoleMachine, State};
use crate::lease::election::{Answer, Choice, choose, proves_all_acknowledged};
use crate::lease::{Outcome, Peer, Record, Time};
use crate::ship::engine::Epoch;
use crate::sync::quorum::Promise;

impl RoleMachine {
    pub(super) fn follow_or_stand(&mut self, now: Time, out: &mut Vec<Action>) {
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

    pub(super) fn follow(&mut self, peer: Option<Peer>, out: &mut Vec<Action>) {
        let waited = self.waits.take().is_some();
        // A node does not follow itself: what is in its name but not held by it is nobody's.
        let peer = peer.filter(|p| p.node_id != self.own.node_id);
        if self.following != peer || self.catching_up.take().is_some() {
            self.following.clone_from(&peer);
            out.push(Action::Follow(peer));
        } else if waited {
            out.push(Action::WaitsNoMore);
        }
    }

    pub(super) fn heard(
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

    pub(super) fn choose(
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
    pub(super) fn taken(
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
}
