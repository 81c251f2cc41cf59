//! Holds commits until followers have them: the board, and the thread that settles it.

use super::board::{Board, Hold, Members, OnDecided, Refused, Report, RuleState, RuleView, World};
use crate::DatabaseName;
use crate::config::{SyncPolicy, SyncRule};
use crate::database::Shared;
use crate::log::Lsn;
use crate::status::messages;
use ltx::{Pos, Txid};
use parking_lot::{Condvar, Mutex};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

type OnReport = Box<dyn Fn(&Report) + Send + Sync>;
type OnWaited = Box<dyn Fn(Duration) + Send + Sync>;

/// Holds commits of synchronous databases. Costs nothing where there are none.
#[derive(Default)]
pub struct Gate {
    inner: Mutex<Inner>,
    /// There is something to settle.
    work: Condvar,
    /// Nothing waits any more.
    idle: Condvar,
    used: AtomicBool,
    told: OnceLock<(OnReport, OnWaited)>,
}

#[derive(Debug, Default)]
struct Inner {
    board: Board,
    again: bool,
    runs: bool,
    stop: bool,
    /// Commits that are being let go.
    deciding: bool,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// The node behind a gate.
struct Node<'a>(&'a Shared);

impl World for Node<'_> {
    fn durable(&self) -> Lsn {
        self.0.log.durable()
    }

    fn may_publish(&self) -> bool {
        self.0.is_within_write_limit()
    }

    fn in_history(&self, name: &DatabaseName, position: Pos) -> bool {
        let newest = self.0.database(name).map(|db| db.durable_position());
        newest.is_some_and(|newest| {
            newest == position
                || newest.txid > position.txid
                    && self.0.log.find(name, Txid(position.txid.0)).ok().flatten().is_some_and(|record| {
                        record.max_txid == position.txid && record.post_apply == position.checksum
                    })
        })
    }
}

impl Gate {
    /// Takes over a configuration; the first one that asks for acknowledgements starts the thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn configure(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        general: &SyncPolicy,
        rules: &[SyncRule],
    ) -> io::Result<()> {
        let mut inner = self.inner.lock();
        inner.board.configure(general, rules);
        let used = inner.board.is_used();
        if used && !inner.runs {
            let (gate, shared) = (self.clone(), Arc::downgrade(shared));
            std::thread::Builder::new().name("sync-commits".into()).spawn(move || gate.run(&shared))?;
            inner.runs = true;
        }
        self.used.store(used, Ordering::Release);
        self.settle_again(&mut inner);
        Ok(())
    }

    /// Says whom to tell of states of rules, and how long each commit waited for followers; once.
    pub fn tell(
        &self,
        on_report: impl Fn(&Report) + Send + Sync + 'static,
        on_waited: impl Fn(Duration) + Send + Sync + 'static,
    ) {
        let _ = self.told.set((Box::new(on_report), Box::new(on_waited)));
    }

    /// Whether commits of some database are held.
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    /// A commit begins: `true` if it has to be held.
    ///
    /// # Errors
    /// It must not begin now.
    pub fn admit(&self, name: &DatabaseName) -> Result<bool, Refused> {
        if self.is_used() { self.inner.lock().board.admit(name) } else { Ok(false) }
    }

    /// Who has to acknowledge commits of a database; `None`: nobody.
    pub fn members_of(&self, name: &DatabaseName) -> Option<Members> {
        if self.is_used() { self.inner.lock().board.members_of(name) } else { None }
    }

    /// Has `then` called, on the gate's thread, when the commit may be published or must not be.
    pub fn wait(&self, name: DatabaseName, hold: Hold, then: OnDecided) {
        let since = Instant::now();
        let mut inner = self.inner.lock();
        inner.board.wait(name, hold, since, then);
        self.settle_again(&mut inner);
    }

    /// A follower is connected.
    pub fn joined(&self, node: u64, name: &str) {
        let mut inner = self.inner.lock();
        inner.board.joined(node, name);
        self.settle_again(&mut inner);
    }

    /// A follower has the database durably in its log up to here.
    pub fn acknowledged(&self, node: u64, name: &DatabaseName, position: Pos) {
        let mut inner = self.inner.lock();
        inner.board.acknowledged(node, name, position);
        if inner.board.cares_for_acknowledgements() {
            self.settle_again(&mut inner);
        }
    }

    /// A follower is gone.
    pub fn left(&self, node: u64) {
        let mut inner = self.inner.lock();
        inner.board.left(node);
        self.settle_again(&mut inner);
    }

    /// More is durable here.
    pub fn look_again(&self) {
        self.settle_again(&mut self.inner.lock());
    }

    /// A term begins.
    pub fn begin_term(&self) {
        self.inner.lock().board.fence(false);
    }

    /// Waits until no commit is held; `false`: that takes longer.
    pub fn wait_idle(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut inner = self.inner.lock();
        while inner.runs && (!inner.board.is_idle() || inner.deciding) {
            if self.idle.wait_until(&mut inner, deadline).timed_out() {
                return false;
            }
        }
        true
    }

    /// The term ends: waits at most `patience` for commits that are held, then fails them. When this returns, nothing of
    /// this term is published any more.
    pub fn end_term(&self, patience: Duration) {
        let mut inner = self.inner.lock();
        if !inner.runs {
            return;
        }
        let deadline = Instant::now() + patience;
        while !inner.board.is_idle() || inner.deciding {
            if self.idle.wait_until(&mut inner, deadline).timed_out() {
                break;
            }
        }
        inner.board.fence(true);
        self.settle_again(&mut inner);
        while !inner.board.is_idle() || inner.deciding {
            self.idle.wait(&mut inner);
        }
    }

    /// All rules that ask for acknowledgements.
    pub fn view(&self) -> Vec<RuleView> {
        if self.is_used() { self.inner.lock().board.view(Instant::now()) } else { Vec::new() }
    }

    /// A commit may be published after this time.
    pub(crate) fn waited(&self, time: Duration) {
        if let Some((_, on_waited)) = self.told.get() {
            on_waited(time);
        }
    }

    fn settle_again(&self, inner: &mut Inner) {
        if inner.runs {
            inner.again = true;
            self.work.notify_one();
        }
    }

    /// Ends the thread. What waits then is never answered: the process ends.
    pub fn stop(&self) {
        self.inner.lock().stop = true;
        self.work.notify_one();
    }

    fn run(&self, shared: &Weak<Shared>) {
        let mut inner = self.inner.lock();
        while !inner.stop {
            let Some(shared) = shared.upgrade() else { return };
            inner.again = false;
            let now = Instant::now();
            let (decided, reports) = inner.board.settle(now, &Node(&shared));
            if !decided.is_empty() || !reports.is_empty() {
                inner.deciding = true;
                drop(inner);
                for (then, result) in decided {
                    then(result);
                }
                for report in reports {
                    self.report(&report);
                }
                inner = self.inner.lock();
                inner.deciding = false;
            }
            if inner.board.is_idle() {
                self.idle.notify_all();
            }
            drop(shared);
            if inner.again || inner.stop {
                continue;
            }
            match inner.board.next_look(Instant::now()) {
                Some(left) => drop(self.work.wait_for(&mut inner, left)),
                None => self.work.wait(&mut inner),
            }
        }
    }

    fn report(&self, report: &Report) {
        let Report { databases, state, acks, connected } = report;
        let rule = if databases.is_empty() { "[sync]".to_owned() } else { databases.join(", ") };
        match state {
            RuleState::Synchronous => tracing::info!(
                MESSAGE_ID = messages::SYNC_STATE,
                rule,
                state = state.as_str(),
                "commits are acknowledged by {acks} members again"
            ),
            RuleState::Waiting => tracing::warn!(
                MESSAGE_ID = messages::SYNC_STATE,
                rule,
                state = state.as_str(),
                "commits wait: {acks} members have to acknowledge them, {connected} are connected"
            ),
            RuleState::Degraded => tracing::warn!(
                MESSAGE_ID = messages::SYNC_STATE,
                rule,
                state = state.as_str(),
                "commits succeed WITHOUT acknowledgement: {acks} members did not answer in time, {connected} are connected"
            ),
            RuleState::Refusing => tracing::warn!(
                MESSAGE_ID = messages::SYNC_STATE,
                rule,
                state = state.as_str(),
                "commits are refused: {acks} members did not answer in time, {connected} are connected"
            ),
        }
        if let Some((on_report, _)) = self.told.get() {
            on_report(report);
        }
    }
}
