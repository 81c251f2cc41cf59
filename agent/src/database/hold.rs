//! Commits that are held until followers have them (see [`crate::sync`]): in the log, not yet in the files as SQLite counts
//! them. `applied` stays behind `position` meanwhile, so marks, positions and events tell of what can be seen.

use super::receive::ApplySide;
use super::recovery::RecoveryError;
use super::{Database, State};
use crate::capture::{CaptureError, Logged};
use crate::ship::engine::EngineError;
use crate::sync::Hold;
use ltx::Pos;
use std::sync::Arc;
use std::time::Instant;

impl Database {
    /// Whether a commit that can be held has to be. Asked before it is logged.
    pub(crate) fn admit_held(&self) -> Result<bool, CaptureError> {
        Ok(self.shared.gate.admit(&self.name)?)
    }

    /// What a door that holds a commit waits for. `None`: nothing.
    pub fn hold_of(&self, st: &State, logged: Option<Logged>, durable: bool) -> Option<Hold> {
        // After a restart a commit is asked again that the log has, and that nobody may have acknowledged.
        let asked_again = logged.is_none() && st.asked_again && self.shared.gate.is_used();
        let held = logged.is_some_and(|logged| logged.held) || asked_again;
        held.then_some(Hold { position: st.position, end: st.logged_end, durable })
    }

    /// Publishes a held commit once it may be, and answers the application: both on the gate's thread. `publish` does what
    /// the door held back.
    pub fn when_acknowledged(
        self: &Arc<Self>,
        hold: Hold,
        publish: impl FnOnce(&Database) -> Result<(), i32> + Send + 'static,
        answer: impl FnOnce(Result<(), i32>) + Send + 'static,
    ) {
        let (db, begun) = (self.clone(), Instant::now());
        let decided = Box::new(move |decided: Result<(), crate::sync::board::Fenced>| {
            if decided.is_err() {
                tracing::warn!(
                    database = %db.name,
                    position = %hold.position,
                    "a commit was not acknowledged before this node's term ended: the application gets an error, and \
                     the next primary may or may not have it"
                );
                db.abandon(hold);
                return answer(Err(libc::EIO));
            }
            db.shared.gate.waited(begun.elapsed());
            let published = publish(&db);
            if published.is_ok() {
                db.show(hold);
            }
            answer(published);
        });
        self.shared.gate.wait(self.name.clone(), hold, decided);
        if hold.durable && self.shared.log.durable() < hold.end {
            let shared = Arc::downgrade(&self.shared);
            let look = move |_| {
                if let Some(shared) = shared.upgrade() {
                    shared.gate.look_again();
                }
            };
            self.shared.log.on_durable(hold.end, Box::new(look));
        }
    }

    /// Waits until a commit of the node that has the database by a halt lock may be applied here. It is the caller that
    /// waits, on a thread that may.
    ///
    /// # Errors
    /// The term ended first.
    pub(super) fn wait_acknowledged(self: &Arc<Self>, hold: Hold) -> Result<(), EngineError> {
        let (db, begun) = (self.clone(), Instant::now());
        let (tell, decision) = std::sync::mpsc::sync_channel(1);
        let decided = Box::new(move |decided: Result<(), crate::sync::board::Fenced>| {
            {
                let mut st = db.state();
                if st.held == Some(hold.position) {
                    st.held = None;
                    if decided.is_err() {
                        *db.unconfirmed.lock() = Some(hold.position);
                    }
                }
            }
            db.shared.pending_again(&db.name);
            // Who asked waits for it.
            let _ = tell.send(decided);
        });
        self.shared.gate.wait(self.name.clone(), hold, decided);
        if !matches!(decision.recv(), Ok(Ok(()))) {
            return Err(EngineError::Other(format!(
                "a commit of {} was not acknowledged before the primary's term ended: the next primary may or may not have it",
                self.name
            )));
        }
        self.shared.gate.waited(begun.elapsed());
        Ok(())
    }

    /// A held commit is published.
    fn show(&self, hold: Hold) {
        {
            let mut st = self.state();
            st.asked_again = false;
            if st.held == Some(hold.position) {
                st.held = None;
                st.applied = st.logged_mark();
            }
        }
        self.shared.visible(self, 1);
    }

    /// A held commit is not published by whoever made it: it comes from the log, or goes with a snapshot of the next
    /// primary. Until it is known which, readers here must not see it: the next primary may not have it.
    fn abandon(&self, hold: Hold) {
        let mut st = self.state();
        if st.held == Some(hold.position) {
            *self.unconfirmed.lock() = Some(hold.position);
            st.held = None;
            st.wal.abandon_held(libc::EIO);
            // In rollback modes the journal is still there, and its application cannot play it back any more.
            st.rollback.journal_active = !self.load_journal_mode(&mut st);
            drop(st);
            self.shared.pending_again(&self.name);
        }
    }

    /// What is in the file of a commit that may not count is taken back, for its readers.
    pub(super) fn take_back_unconfirmed(&self, side: &ApplySide) {
        if !self.has_journal_of_dead_apply() {
            return;
        }
        match side.applier.roll_back_under_readers() {
            Ok(true) => self.state().rollback.played_back(),
            // Its application still has the lock.
            Ok(false) => self.shared.pending_again(&self.name),
            Err(error) => {
                tracing::warn!(database = %self.name, %error, "cannot take back a commit that nobody acknowledged");
                self.shared.pending_again(&self.name);
            }
        }
    }

    /// What the log has counts: this node leads with it, or follows one that has it too.
    pub(crate) fn confirm(&self) {
        if self.unconfirmed.lock().take().is_some() {
            self.shared.pending_again(&self.name);
        }
    }

    /// The primary that this node follows has the database at `position`; `None`: where it is here.
    pub(crate) fn upstream_has(&self, position: Option<Pos>) {
        let mut unconfirmed = self.unconfirmed.lock();
        if unconfirmed.is_some_and(|own| position.is_none_or(|theirs| theirs == own)) {
            *unconfirmed = None;
            drop(unconfirmed);
            self.shared.pending_again(&self.name);
        }
    }

    /// Whether there is a commit that may not count.
    pub(super) fn is_unconfirmed(&self) -> bool {
        self.unconfirmed.lock().is_some()
    }

    /// What the log has, the files do not, and nobody is about to publish waits to be applied.
    pub(super) fn queue_unapplied(&self, side: &mut ApplySide) -> Result<(), RecoveryError> {
        if !side.pending.is_empty() {
            return Ok(());
        }
        if self.is_unconfirmed() {
            return Ok(());
        }
        let applied = {
            let st = self.state();
            if st.held.is_some() || st.applied.position == st.position {
                return Ok(());
            }
            st.applied
        };
        let last = self.shared.log.last(&self.name);
        let waiting = self.records_after(applied, &last)?;
        side.pending = waiting.into_iter().map(|record| (record, None)).collect();
        Ok(())
    }
}
