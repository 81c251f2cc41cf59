//! Changes of the primary that somebody asks for: the lease goes from hand to hand, and no transaction is lost.
//!
//! The old primary waits until the successor has nearly everything, takes the write locks of all databases in use (the
//! running transactions end, the next ones wait), refuses what is not behind such a lock, and waits for the last
//! acknowledgements. Then one write at the lease's store makes the successor the holder, and it is told so. If any of
//! this fails before that write, the writers go on as if nothing had been.

use super::Node;
use crate::apply::WriterHold;
use crate::capture::CaptureError;
use crate::config::LeaseKind;
use crate::database::Database;
use crate::lease::peers::Asking;
use crate::lease::{Answer, Member, Peer, Standing, clock};
use crate::status::api::RoleName;
use crate::status::{RoleRequest, ViewError};
use ltx::Pos;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a successor may take to get what it lacks, before any writer waits.
const CATCH_UP: Duration = Duration::from_secs(5);
/// How long the running transactions may take to end.
const HOLD: Duration = Duration::from_secs(3);
/// How long writers wait for the last acknowledgements.
const DRAIN: Duration = Duration::from_secs(1);
/// How long another node may take to answer a question.
const ANSWER: Duration = Duration::from_secs(1);
/// How long a whole handoff may take.
const HANDOFF: Duration = Duration::from_secs(16);

/// A database whose writers wait.
pub(super) type Held = (Arc<Database>, WriterHold);

fn is_in_use(db: &Database) -> bool {
    let st = db.state();
    st.handles > 0 && st.page_count > 0
}

/// The successor has what the log has; so nothing else may be in WAL and file.
fn settle_unpublished(held: &[Held]) -> Result<(), String> {
    held.iter().try_for_each(|(db, hold)| {
        let published = hold.published();
        let mut st = db.state();
        if st.quarantine_reason().is_some() {
            // The next primary may heal it.
            return Ok(());
        }
        match db.settle_unpublished(&mut st, published) {
            Ok(()) => Ok(()),
            // Nothing was committed on top of what is not applied.
            Err(CaptureError::NotAllApplied) if !st.wal.puts_pages_back() => Ok(()),
            Err(error) => Err(format!("what {} has cannot be captured now: {error}", db.name())),
        }
    })
}

impl Node {
    /// Asks other nodes about the lease.
    pub(super) fn asking(&self) -> Asking {
        Asking { options: self.follow_options(), node_id: self.shared.node_id }
    }

    /// Brings the successor to where this node is, with writers waiting. Ends with no writes taken, also when it fails
    /// half-way: the caller lets them go on.
    pub(super) async fn prepare_handoff(self: Arc<Self>, to: Peer) -> Result<Vec<Held>, String> {
        let name = &to.name;
        let durable = |db: &Database| db.durable_position();
        if !self.wait_for_follower(to.node_id, CATCH_UP, durable).await {
            return Err(format!("{name} does not follow this node, or is too far behind"));
        }
        if !self.asking().prepare(&to, ANSWER).await? {
            return Err(format!("{name} cannot become primary now; its status says why"));
        }
        let holding = self.clone();
        let held = tokio::task::spawn_blocking(move || holding.hold_writers()).await;
        let held = held.map_err(|error| error.to_string())??;
        let ending = self.clone();
        let logged = tokio::task::spawn_blocking(move || {
            let log = &ending.shared.log;
            if !ending.shared.gate.wait_idle(HOLD) {
                return Err(format!(
                    "commits wait for acknowledgements longer than {HOLD:?}: see [sync] and `litefs status`"
                ));
            }
            settle_unpublished(&held)?;
            ending.stop_writes(DRAIN);
            log.wait_durable(log.appended()).map_err(|error| error.to_string()).map(|()| held)
        });
        let held = logged.await.map_err(|error| error.to_string())??;
        // Not the durable position, which is told some time after the log is durable.
        let logged = |db: &Database| db.state().position;
        if !self.wait_for_follower(to.node_id, DRAIN, logged).await {
            return Err(format!("{name} did not acknowledge the last transactions within {DRAIN:?}"));
        }
        Ok(held)
    }

    fn hold_writers(&self) -> Result<Vec<Held>, String> {
        let begun = Instant::now();
        let mut held = Vec::new();
        if let Some(lent) = self.shared.known().into_iter().find(|db| db.is_lent()) {
            return Err(format!(
                "another host has a halt lock on {}: try again when it has let go",
                lent.name()
            ));
        }
        let known = self.shared.known().into_iter();
        for db in known.filter(|db| is_in_use(db) || db.may_be_unpublished()) {
            let left = HOLD.saturating_sub(begun.elapsed());
            let hold = db.hold_writers(left);
            let hold = hold.map_err(|error| format!("a writer of {} does not end: {error}", db.name()))?;
            held.extend(hold.map(|hold| (db, hold)));
        }
        Ok(held)
    }

    /// Has applications that opened databases on a primary wait with their next write, until this node is primary again:
    /// what they would get otherwise is an I/O error. A transaction that runs now ends with that error first.
    pub(super) fn keep_writers_out(&self) {
        let begun = Instant::now();
        for db in self.shared.known().into_iter().filter(|db| is_in_use(db)) {
            if self.shared.is_writable() {
                return;
            }
            if db.may_write() {
                continue;
            }
            if db.keeps_writers_out() {
                continue;
            }
            match db.hold_writers(HOLD.saturating_sub(begun.elapsed())) {
                Ok(Some(hold)) => db.keep_writers_out(hold),
                Ok(None) => {}
                Err(error) => tracing::debug!(
                    database = %db.name(),
                    %error,
                    "applications that opened it on the primary get an I/O error for their next write"
                ),
            }
        }
    }

    async fn wait_for_follower(
        &self,
        follower: u64,
        limit: Duration,
        end: impl Fn(&Database) -> Pos + Copy + Send,
    ) -> bool {
        let deadline = Instant::now() + limit;
        while !self.follower_has_all(follower, end) {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        true
    }

    /// Whether it is connected, and has acknowledged everything up to `end` of each database.
    fn follower_has_all(&self, follower: u64, end: impl Fn(&Database) -> Pos) -> bool {
        let connected = self.server.lock().as_ref().is_some_and(|server| {
            server.followers().iter().any(|connected| connected.identity.node_id == follower)
        });
        connected && self.has_acknowledged(follower, end)
    }

    /// Whether a follower has acknowledged everything up to `end` of each database.
    pub(super) fn has_acknowledged(&self, follower: u64, end: impl Fn(&Database) -> Pos) -> bool {
        // Not under the lock of what followers have: a state may be held for long.
        let ends = self.shared.known().into_iter().map(|db| (end(&db).txid, db));
        let ends: Vec<_> = ends.filter(|(txid, _)| txid.0 > 0).collect();
        let followed = self.followed.lock();
        ends.iter().all(|(txid, db)| {
            followed.get(&(follower, db.name().clone())).is_some_and(|acknowledged| acknowledged >= txid)
        })
    }

    /// Candidates that could be the successor of this node, the most advanced one first.
    async fn successors(&self) -> Result<Vec<Member>, String> {
        let Some(lease) = self.lease.get() else { return Err("the agent is starting".into()) };
        let members = lease.look(|machine| machine.candidates()).await.unwrap_or_default();
        let asking = self.asking();
        let asked = members.into_iter().map(|member| {
            let asking = asking.clone();
            async move {
                let answer = asking.standing(&member.peer, false, ANSWER).await;
                answer.ok().filter(|a: &Answer| a.can_stand).map(|answer| (answer.standing, member))
            }
        });
        let mut able: Vec<(Standing, Member)> =
            futures_util::future::join_all(asked).await.into_iter().flatten().collect();
        able.sort_by_key(|(standing, _)| std::cmp::Reverse(*standing));
        Ok(able.into_iter().map(|(_, member)| member).collect())
    }

    /// Hands the lease to the most advanced candidate that takes it.
    ///
    /// # Errors
    /// Why no candidate took it.
    pub async fn hand_over_to_best(&self) -> Result<(), String> {
        let mut why = "no other candidate takes part: start one, or see `litefs status` there".to_owned();
        for member in self.successors().await? {
            match self.hand_over(member.peer.node_id).await {
                Ok(()) => return Ok(()),
                Err(error) => why = format!("{}: {error}", member.peer.name),
            }
        }
        Err(why)
    }

    async fn hand_over_to_name(&self, name: &str) -> Result<(), String> {
        let Some(lease) = self.lease.get() else { return Err("the agent is starting".into()) };
        let members = lease.look(|machine| machine.candidates()).await.unwrap_or_default();
        match members.iter().find(|member| member.peer.name == name) {
            Some(member) => self.hand_over(member.peer.node_id).await,
            None => {
                let names: Vec<&str> = members.iter().map(|member| &*member.peer.name).collect();
                Err(format!("{name:?} is no candidate that takes part now; these are: {}", names.join(", ")))
            }
        }
    }

    /// See [`crate::status::NodeView::request_role`].
    pub(super) async fn change_role_on_request(&self, request: RoleRequest) -> Result<(), ViewError> {
        if self.config.read().lease.kind == LeaseKind::Static {
            let what = match request {
                RoleRequest::Promote | RoleRequest::Force => "promoted",
                RoleRequest::Demote => "demoted",
                RoleRequest::Handoff(_) => "asked to hand over",
            };
            return Err(ViewError::StaticLease(format!(
                "lease.type is \"static\": the configuration names the primary, so this host cannot be {what}; change \
                 lease.role on both hosts and reload them"
            )));
        }
        let is_primary = self.role().name == RoleName::Primary;
        let asked = match request {
            RoleRequest::Promote | RoleRequest::Force if is_primary => return Ok(()),
            RoleRequest::Promote => self.ask_for_lease().await,
            RoleRequest::Force => self.force().await,
            RoleRequest::Demote | RoleRequest::Handoff(_) if !is_primary => {
                let upstream = self.role().upstream;
                return Err(ViewError::NotPrimary {
                    primary: upstream.and_then(|upstream| upstream.hostname),
                });
            }
            RoleRequest::Demote | RoleRequest::Handoff(None) => self.hand_over_to_best().await,
            RoleRequest::Handoff(Some(name)) => self.hand_over_to_name(&name).await,
        };
        asked.map_err(ViewError::Handoff)
    }

    async fn ask_for_lease(&self) -> Result<(), String> {
        let Some(lease) = self.lease.get() else { return Err("the agent is starting".into()) };
        if !self.config.read().lease.candidate {
            return Err("lease.candidate is false: this host must not become primary".into());
        }
        match lease.look(|machine| machine.holder(clock::now()).cloned()).await.flatten() {
            Some(holder) => self.asking().want(&holder, HANDOFF).await?,
            None => {
                let waits = self.role().waits.unwrap_or_else(|| "it is being decided".into());
                return Err(format!(
                    "there is no primary to take over from ({waits}); `litefs promote --force` makes this host primary \
                     with the data that it has"
                ));
            }
        }
        self.wait_to_lead(ANSWER * 5).await
    }

    async fn force(&self) -> Result<(), String> {
        let Some(lease) = self.lease.get() else { return Err("the agent is starting".into()) };
        if let Some(holder) = lease.look(|machine| machine.holder(clock::now()).cloned()).await.flatten()
            && holder.node_id != self.shared.node_id
            && self.asking().want(&holder, HANDOFF).await.is_ok()
        {
            return self.wait_to_lead(ANSWER * 5).await;
        }
        lease.force();
        let limit = self.config.read().lease.ttl + HANDOFF;
        self.wait_to_lead(limit).await
    }

    async fn wait_to_lead(&self, limit: Duration) -> Result<(), String> {
        let mut roles = self.roles();
        let leads = roles.wait_for(|role| role.name == RoleName::Primary);
        match tokio::time::timeout(limit, leads).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(format!("this host did not become primary within {limit:?}; see its log")),
        }
    }
}
