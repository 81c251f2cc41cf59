//! A halt lock (decision 34): the primary lends a database to another node, which then is its only writer. The lender's
//! writers wait meanwhile; what the borrower commits goes to the lender first, and only then into the borrower's log.

use super::follow::ForeignUse;
use super::receive::{ApplySide, other};
use super::{Database, State};
use crate::apply::{Applier, WalFrames, WriterHold};
use crate::capture::CaptureError;
use crate::ship::engine::{EngineError, ShippedRecord};
use crate::sync::Hold;
use ltx::Pos;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Who may write a database, where that does not follow from the node's role alone.
#[derive(Debug)]
pub(super) enum Loan {
    /// Another node.
    Lent,
    /// This node, although another one is the primary.
    Borrowed(Arc<dyn Lender>),
}

/// The bytes of a transaction that is about to be logged.
#[derive(Debug, Clone)]
pub enum Transaction {
    /// In memory.
    Bytes(bytes::Bytes),
    /// A complete LTX file.
    File(PathBuf),
}

/// The primary, as the node sees it that has borrowed a database.
pub trait Lender: Send + Sync + Debug {
    /// Whether the lock is held, by this node's clock and epoch.
    fn is_held(&self) -> bool;

    /// Has the primary commit a transaction. When this returns it is durable there; after an error it may be.
    ///
    /// # Errors
    /// Why it is not known to be. The lock is lost then.
    fn commit(&self, transaction: Transaction) -> Result<(), String>;
}

impl Database {
    /// Whether applications on this host may write this database.
    pub fn may_write(&self) -> bool {
        match &*self.loan.read() {
            None => self.shared.is_writable(),
            Some(Loan::Lent) => false,
            Some(Loan::Borrowed(lender)) => lender.is_held(),
        }
    }

    pub(crate) fn check_writable(&self) -> Result<(), CaptureError> {
        if self.may_write() { Ok(()) } else { Err(CaptureError::NotPrimary) }
    }

    /// Whether another node has the database.
    pub fn is_lent(&self) -> bool {
        matches!(&*self.loan.read(), Some(Loan::Lent))
    }

    /// Whether a halt lock of this node is about to end.
    pub(crate) fn is_loan_ending(&self) -> bool {
        self.loan_ends.load(Ordering::Acquire)
    }

    /// Where commits go first.
    pub(crate) fn lender(&self) -> Option<Arc<dyn Lender>> {
        match &*self.loan.read() {
            Some(Loan::Borrowed(lender)) => Some(lender.clone()),
            _ => None,
        }
    }

    /// Makes this node's writers wait and says where the database is, durably. From then on only [`Database::take_lent`]
    /// changes it. The result has to be kept until the database is taken back.
    ///
    /// # Errors
    /// Others hold its locks for longer than `bound`, or what they wrote cannot be captured.
    pub fn lend(&self, bound: Duration) -> Result<(Pos, Option<WriterHold>), EngineError> {
        let no_database = || EngineError::NoSuchDatabase(self.name.clone());
        let hold = self.hold_writers(bound)?.ok_or_else(no_database)?;
        let published = hold.published();
        let (position, end) = {
            let mut st = self.state();
            if !self.shared.follows_wals() && self.shared.wals_may_be_ahead() {
                // What this host's applications have committed is not captured before its door is open.
                return Err(EngineError::Busy(self.name.clone()));
            }
            let settled = self.settle_unpublished(&mut st, published);
            if let Some(reason) = st.quarantine_reason() {
                return Err(EngineError::Quarantined { name: self.name.clone(), reason: reason.to_owned() });
            }
            match settled {
                Ok(()) if st.applied.position == st.position => {}
                Ok(()) | Err(CaptureError::NotAllApplied | CaptureError::InUse) => {
                    return Err(EngineError::Busy(self.name.clone()));
                }
                Err(error) => return Err(other(error)),
            }
            *self.loan.write() = Some(Loan::Lent);
            (st.position, st.logged_end)
        };
        if let Err(error) = self.shared.log.wait_durable(end) {
            *self.loan.write() = None;
            return Err(other(error));
        }
        let mut kept = None;
        keep_out(&mut self.apply.lock().applier, hold, &mut kept);
        self.shared.tell_door();
        Ok((position, kept))
    }

    /// The lock has ended.
    pub fn take_back(&self) {
        {
            let mut side = self.apply.lock();
            *self.loan.write() = None;
            self.let_writers_in_again(&mut side);
        }
        self.shared.tell_door();
    }

    /// Applications' writers may go on, after transactions of another node: what they add is told from these. Where not
    /// all of these are applied yet, they go on when they are.
    pub(super) fn let_writers_in_again(&self, side: &mut ApplySide) {
        if !self.may_write() {
            return;
        }
        if self.shared.follows_wals() {
            let position = {
                let st = self.state();
                (st.applied.position, st.position)
            };
            if position.0 != position.1 || !side.pending.is_empty() {
                return self.shared.pending_again(&self.name);
            }
            if let Err(error) = self.read_applied_wal() {
                tracing::warn!(database = %self.name, %error, "its WAL cannot be read yet: writers wait");
                return self.shared.pending_again(&self.name);
            }
            self.put_back_suspect(&mut self.state());
        }
        side.applier.let_writers_in();
    }

    /// Logs and applies a transaction of the node that has the database. `hold` is what [`Database::lend`] gave. What has to
    /// be acknowledged is applied, and answered, when it is.
    ///
    /// # Errors
    /// It does not follow the database's position, this node's term has ended, or the log failed: nothing is logged then.
    /// Or the term ended before it was acknowledged: the next primary may or may not have it.
    pub fn take_lent(
        self: &Arc<Self>,
        record: ShippedRecord,
        hold: &mut Option<WriterHold>,
        bound: Duration,
    ) -> Result<Pos, EngineError> {
        let term = self.shared.term();
        let mut side = self.apply.lock();
        self.queue_unapplied(&mut side)?;
        if !self.is_lent() {
            return Err(other(format_args!("{} is not lent any more", self.name)));
        }
        let synchronous = self.admit_held().map_err(other)?;
        self.log_received(&mut side, record, Some(&term))?;
        let (position, end) = {
            let mut st = self.state();
            if synchronous {
                st.held = Some(st.position);
            }
            (st.position, st.logged_end)
        };
        self.shared.log.wait_durable(end).map_err(other)?;
        self.set_durable_position(position);
        self.shared.changed(&self.name);
        if synchronous {
            // Whoever applies next finds it in the log, if it is not held any more.
            side.pending.clear();
            drop(side);
            self.wait_acknowledged(Hold { position, end, durable: true })?;
            side = self.apply.lock();
        }
        // In rollback modes applying takes the locks itself.
        *hold = None;
        self.apply_pending(&mut side, bound);
        if !side.applier.keeps_writers_out() {
            match side.applier.hold_writers(bound) {
                Ok(Some(again)) => keep_out(&mut side.applier, again, hold),
                Ok(None) => {}
                Err(error) => tracing::debug!(
                    database = %self.name,
                    %error,
                    "writers get an error until the halt lock ends, instead of waiting"
                ),
            }
        }
        Ok(position)
    }

    /// This node's applications may write from now on, though it is a replica: what they commit goes to `lender` first.
    ///
    /// # Errors
    /// What is in its files may not be what the log has.
    pub fn borrow(&self, lender: Arc<dyn Lender>) -> Result<(), EngineError> {
        {
            let mut side = self.apply.lock();
            if self.shared.follows_wals() {
                self.check_borrowable()?;
                self.read_applied_wal().map_err(other)?;
            }
            *self.loan.write() = Some(Loan::Borrowed(lender));
            side.applier.let_writers_in();
        }
        self.shared.tell_door();
        Ok(())
    }

    /// Behind the preload door somebody without the library may have written to it: that must not go to the primary as part
    /// of the next transaction.
    fn check_borrowable(&self) -> Result<(), EngineError> {
        let mut st = self.state();
        if st.applied.position != st.position {
            return Err(EngineError::Busy(self.name.clone()));
        }
        self.look_for_foreign_writes(&mut st);
        let foreign = self.foreign_use_of_wal(&mut st).map_err(other)?;
        if st.suspect.is_some() {
            self.check_applied(&mut st);
        }
        if let (ForeignUse::Restarted(salts), None, Ok(())) = (foreign, st.suspect, st.check_health()) {
            st.applied_frames = Some((salts, 0));
        }
        if st.suspect.is_some() || foreign == ForeignUse::Committed {
            return Err(other(format_args!(
                "somebody has written to {} on this replica without the preload library: the next transaction of the \
                 primary heals it",
                self.name
            )));
        }
        match st.quarantine_reason() {
            Some(reason) => {
                Err(EngineError::Quarantined { name: self.name.clone(), reason: reason.to_owned() })
            }
            None => Ok(()),
        }
    }

    /// This node has a database no longer. Where it is not known that the newest commit was published, it is applied again
    /// from the log: its application may have died after the primary had taken it.
    fn settle_borrowed(&self, st: &mut State, is_held: bool, published: Option<WalFrames>) {
        let Some(before) = st.lent_before.take() else { return };
        let published = match is_held {
            false => false,
            true if self.load_journal_mode(st) => {
                published.is_some() && st.wal.captured_frames() == published
            }
            true => !self.has_hot_journal(),
        };
        if published {
            st.wal.note_published();
            let applied = st.applied;
            st.checksums_mut().set_applied(applied);
        } else if st.applied.position == st.position {
            st.applied = before;
            st.wal.forget_put_back();
            st.wal.mark_written_from_log();
        }
    }

    /// Transactions of a primary are about to be added to what this node has committed itself under a halt lock.
    pub(super) fn settle_before_apply(&self, side: &mut ApplySide) {
        if side.pending.is_empty() && self.lender().is_some() {
            return;
        }
        let mut st = self.state();
        let Some(before) = st.lent_before.take() else { return };
        st.applied = before;
        st.wal.forget_put_back();
        st.wal.mark_written_from_log();
        // They are found in the log, with the one to apply again.
        side.pending.clear();
    }

    /// This node is a replica like any other again. The running transaction gets at most `bound` to end first.
    pub fn give_back(&self, bound: Duration) {
        if self.lender().is_none() {
            return;
        }
        self.loan_ends.store(true, Ordering::Release);
        self.shared.tell_door();
        let hold = if self.may_write() {
            // The transaction of an application that died; it is seen the second time.
            for _ in 0..2 {
                if let Err(error) = self.end_dead_transaction() {
                    tracing::warn!(database = %self.name, %error, "cannot take back the transaction of a dead application");
                }
            }
            self.hold_writers(bound).unwrap_or_else(|error| {
                tracing::warn!(database = %self.name, %error, "a transaction outlasts its halt lock, and fails");
                None
            })
        } else {
            None
        };
        {
            // Through the mount, so without the state.
            let published = hold.as_ref().and_then(WriterHold::published);
            let mut st = self.state();
            if hold.is_some()
                && !self.load_journal_mode(&mut st)
                && st.rollback.is_dirty()
                && let Err(error) = self.capture_rollback(&mut st)
            {
                tracing::warn!(database = %self.name, %error, "what was written without a journal is not captured");
            }
            self.settle_borrowed(&mut st, hold.is_some(), published);
            *self.loan.write() = None;
        }
        self.loan_ends.store(false, Ordering::Release);
        self.shared.tell_door();
        if let Some(hold) = hold {
            self.keep_writers_out(hold);
        }
        self.shared.pending_again(&self.name);
    }
}

/// In WAL mode the applier keeps the lock; in rollback modes `kept` does.
fn keep_out(applier: &mut Applier, hold: WriterHold, kept: &mut Option<WriterHold>) {
    if hold.is_of_wal() {
        applier.keep_writers_out(hold);
    } else {
        *kept = Some(hold);
    }
}
