//! What all databases of a node share: the log, the role, the directories, the counters.

use super::Database;
use super::write_protection::WriteProtection;
use crate::DatabaseName;
use crate::door::fuse::NameInvalidator;
use crate::lease;
use crate::log::{CommitLog, Fence};
use crate::ship::engine::Epoch;
use crate::sync::Gate;
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::broadcast;

/// Change notices kept for a slow receiver; one that lags reads all positions again.
const CHANGES_BACKLOG: usize = 4096;

/// Directories of a node.
#[derive(Debug, Clone)]
pub struct Dirs {
    /// The data directory.
    pub data: PathBuf,
    /// Backing files of what applications see.
    pub files: PathBuf,
    /// Page-checksum sidecars.
    pub checksums: PathBuf,
    /// Files on their way: snapshots, imports, large transactions.
    pub staging: PathBuf,
    /// Names of files that were removed while they were open.
    pub orphans: PathBuf,
    /// What this node had alone when it was made to follow.
    pub diverged: PathBuf,
    /// The commit log.
    pub log: PathBuf,
    /// Where applications find their databases.
    pub mount: PathBuf,
}

impl Dirs {
    /// The layout below a data directory.
    pub fn new(data: PathBuf, mount: PathBuf) -> Self {
        Dirs {
            files: data.join("files"),
            checksums: data.join("checksums"),
            staging: data.join("staging"),
            orphans: data.join("orphans"),
            diverged: data.join("diverged"),
            log: data.join("log"),
            data,
            mount,
        }
    }

    /// The name of a file that was removed while it was open, by its inode.
    pub fn orphan(&self, inode: u64) -> PathBuf {
        self.orphans.join(inode.to_string())
    }
}

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Transactions captured here.
    pub commits: AtomicU64,
    /// Transactions applied here.
    pub applies: AtomicU64,
    /// Databases set aside.
    pub quarantines: AtomicU64,
}

/// A step of a change of role, for a door that has to tell applications, or a question for a door that looks at commits
/// afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoleStep {
    /// Somebody asks how far databases are: what has been committed until now counts.
    Asked,
    /// Writes end now; those that are complete are still taken.
    WritesEnd,
    /// Whether applications may write, or until when, has changed.
    Changed,
}

/// Something that happened to a database, for events.
#[derive(Debug, Clone)]
pub enum Notice {
    /// So many transactions are durable here, and visible.
    Transactions(Arc<Database>, u64),
    /// It was set aside, for this reason.
    Quarantined(DatabaseName, String),
    /// It had transactions of its own, which are kept in this directory.
    Diverged(DatabaseName, PathBuf),
}

/// A term as commits see it: none is appended to the log after its end (see [`Fence`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunningTerm<'a> {
    shared: &'a Shared,
    /// Its number.
    pub epoch: Epoch,
}

impl Fence for RunningTerm<'_> {
    fn is_open(&self) -> bool {
        self.shared.is_writable() && self.shared.epoch() == self.epoch
    }
}

type RoleHook = Box<dyn Fn(RoleStep) + Send + Sync>;
type WantedHook = Box<dyn Fn(Arc<Database>) + Send + Sync>;
type NoticeHook = Box<dyn Fn(Notice) + Send + Sync>;

/// Shared by all databases of a node.
pub struct Shared {
    /// The commit log.
    pub log: Arc<CommitLog>,
    /// Directories.
    pub dirs: Dirs,
    /// This node.
    pub node_id: u64,
    /// Counts.
    pub counters: Counters,
    /// Holds commits until followers have them.
    pub gate: Arc<Gate>,
    /// Of database files on a replica.
    pub write_protection: WriteProtection,
    epoch: AtomicU64,
    /// Newest epoch of a record that any database has had at the start of this agent.
    record_epoch: AtomicU64,
    writable: AtomicBool,
    /// Writes to WALs are not seen by the door.
    follows_wals: AtomicBool,
    /// The last agent's door was such a one: WALs may have commits that the log does not.
    wals_may_be_ahead: AtomicBool,
    /// Nanoseconds of the lease's clock at which writing has to stop.
    write_until: AtomicU64,
    changes: broadcast::Sender<DatabaseName>,
    databases: RwLock<BTreeMap<DatabaseName, Arc<Database>>>,
    /// Databases with changes that are in the log but not marked durable in their files.
    unmarked: Mutex<HashSet<DatabaseName>>,
    /// Databases with records that wait to be applied.
    pending: Mutex<HashSet<DatabaseName>>,
    invalidator: OnceLock<Arc<dyn NameInvalidator>>,
    notice: OnceLock<NoticeHook>,
    role_hook: OnceLock<RoleHook>,
    wanted_hook: OnceLock<WantedHook>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("node_id", &self.node_id).field("epoch", &self.epoch()).finish()
    }
}

impl Shared {
    /// Nothing is read; see [`super::recovery`].
    pub fn new(log: Arc<CommitLog>, dirs: Dirs, node_id: u64, epoch: Epoch) -> Arc<Self> {
        Arc::new(Shared {
            log,
            dirs,
            node_id,
            counters: Counters::default(),
            gate: Arc::default(),
            write_protection: WriteProtection::default(),
            epoch: AtomicU64::new(epoch.0),
            record_epoch: AtomicU64::new(0),
            writable: AtomicBool::new(false),
            follows_wals: AtomicBool::new(false),
            wals_may_be_ahead: AtomicBool::new(false),
            role_hook: OnceLock::new(),
            wanted_hook: OnceLock::new(),
            write_until: AtomicU64::new(u64::MAX),
            changes: broadcast::channel(CHANGES_BACKLOG).0,
            databases: RwLock::default(),
            unmarked: Mutex::default(),
            pending: Mutex::default(),
            invalidator: OnceLock::new(),
            notice: OnceLock::new(),
        })
    }

    /// Epoch of the running term.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// A database has had a record of this epoch, which the log may have no longer.
    pub(crate) fn note_record_epoch(&self, epoch: Epoch) {
        self.record_epoch.fetch_max(epoch.0, Ordering::Relaxed);
    }

    /// Epoch of the newest record that this node has had.
    pub(crate) fn newest_record_epoch(&self) -> Epoch {
        let noted = Epoch(self.record_epoch.load(Ordering::Relaxed));
        let logged = self.log.newest_epoch();
        self.note_record_epoch(logged);
        noted.max(logged)
    }

    /// The term that runs, or would.
    pub(crate) fn term(&self) -> RunningTerm<'_> {
        RunningTerm { shared: self, epoch: self.epoch() }
    }

    /// Writes are taken from now on, in this epoch. The doors look at it for every write.
    pub fn begin_writes(&self, epoch: Epoch) {
        if !self.writable.load(Ordering::Acquire) {
            self.gate.begin_term();
        }
        self.epoch.store(epoch.0, Ordering::Release);
        self.writable.store(true, Ordering::Release);
        self.role_step(RoleStep::Changed);
    }

    /// No writes are taken from now on. When this returns nothing more of this term comes into the log, and nothing is
    /// published; commits that are held have at most `patience` to be acknowledged by followers.
    pub fn end_writes(&self, patience: Duration) {
        let was_writable = self.writable.load(Ordering::Acquire);
        if was_writable {
            self.role_step(RoleStep::WritesEnd);
        }
        self.writable.store(false, Ordering::Release);
        if was_writable {
            self.log.let_appends_end();
            self.gate.end_term(patience);
        }
        self.role_step(RoleStep::Changed);
    }

    /// The door is one that follows WALs: what applications write to them is looked at afterwards.
    pub fn follow_wals(&self, hook: impl Fn(RoleStep) + Send + Sync + 'static) {
        self.follows_wals.store(true, Ordering::Release);
        let _ = self.role_hook.set(Box::new(hook));
    }

    /// Writers on this replica are waited for, not refused: `hook` gets the database for them. Once, before the door is open.
    pub fn borrow_on_demand(&self, hook: impl Fn(Arc<Database>) + Send + Sync + 'static) {
        let _ = self.wanted_hook.set(Box::new(hook));
    }

    /// Whether writers on this replica get databases from the primary by asking.
    pub fn borrows_on_demand(&self) -> bool {
        self.wanted_hook.get().is_some()
    }

    /// A writer on this host waits for a database.
    pub(crate) fn wanted(&self, db: &Arc<Database>) {
        if let Some(hook) = self.wanted_hook.get() {
            hook(db.clone());
        }
    }

    /// The last agent followed WALs: what they have and the log does not was committed nevertheless.
    pub fn expect_wals_ahead(&self) {
        self.wals_may_be_ahead.store(true, Ordering::Release);
    }

    /// The door that is open now sees each write.
    pub fn expect_no_wals_ahead(&self) {
        self.wals_may_be_ahead.store(false, Ordering::Release);
    }

    /// Whether WALs may have commits that the log does not.
    pub fn wals_may_be_ahead(&self) -> bool {
        self.wals_may_be_ahead.load(Ordering::Acquire)
    }

    /// What applications are told of commits has changed.
    pub fn tell_door(&self) {
        self.role_step(RoleStep::Changed);
    }

    /// Captures what has been committed, where that happens afterwards.
    pub fn catch_up(&self) {
        self.role_step(RoleStep::Asked);
    }

    /// Whether the door sees no writes to WALs.
    pub fn follows_wals(&self) -> bool {
        self.follows_wals.load(Ordering::Acquire)
    }

    fn role_step(&self, step: RoleStep) {
        if let Some(hook) = self.role_hook.get() {
            hook(step);
        }
    }

    /// Until when a primary may write by its lease; `None`: without limit.
    pub fn write_limit(&self) -> Option<lease::Time> {
        let until = self.write_until.load(Ordering::Acquire);
        (until != u64::MAX).then(|| lease::Time::from_nanos(until))
    }

    /// A newer epoch was seen; who may write does not change by that.
    pub(crate) fn adopt_epoch(&self, epoch: Epoch) {
        self.epoch.fetch_max(epoch.0, Ordering::AcqRel);
    }

    /// Until when a primary may write; `None`: as long as it is the primary.
    pub fn set_write_limit(&self, until: Option<lease::Time>) {
        let nanoseconds = until.map_or(u64::MAX, |t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX));
        self.write_until.store(nanoseconds, Ordering::Release);
        self.role_step(RoleStep::Changed);
    }

    /// Whether applications may write here. Looks at the clock itself: a process that was stopped for a while must not
    /// take a commit before it has noticed that its lease ran out.
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Acquire) && self.is_within_write_limit()
    }

    /// Whether the lease has not run out, by this node's clock.
    pub(crate) fn is_within_write_limit(&self) -> bool {
        let until = self.write_until.load(Ordering::Acquire);
        until == u64::MAX || lease::clock::now().as_nanos() < u128::from(until)
    }

    /// Names of databases whose durable position moved.
    pub fn changes(&self) -> broadcast::Receiver<DatabaseName> {
        self.changes.subscribe()
    }

    pub(crate) fn changed(&self, name: &DatabaseName) {
        self.unmarked.lock().insert(name.clone());
        // Without a receiver nobody needs to know.
        let _ = self.changes.send(name.clone());
    }

    /// Marking failed: again next time.
    pub(crate) fn mark_later(&self, name: &DatabaseName) {
        self.unmarked.lock().insert(name.clone());
    }

    /// Databases that changed since the last marks.
    pub(crate) fn applying(&self) -> Vec<DatabaseName> {
        if self.is_writable() { Vec::new() } else { self.unmarked.lock().iter().cloned().collect() }
    }

    pub(crate) fn take_unmarked(&self) -> HashSet<DatabaseName> {
        std::mem::take(&mut self.unmarked.lock())
    }

    /// The door is open: names can be forgotten.
    pub fn set_invalidator(&self, invalidator: Arc<dyn NameInvalidator>) {
        // A door that was opened again has the same mount; the first invalidator's kernel connection is gone.
        let _ = self.invalidator.set(invalidator);
    }

    /// A file was put in place behind the kernel's back.
    pub(crate) fn forget_name(&self, db: &Database) {
        if let Some(invalidator) = self.invalidator.get() {
            invalidator.forget(db);
        }
    }

    /// Says what to do with notices; once.
    pub fn on_notice(&self, hook: impl Fn(Notice) + Send + Sync + 'static) {
        let _ = self.notice.set(Box::new(hook));
    }

    pub(crate) fn notify(&self, notice: Notice) {
        if let Some(hook) = self.notice.get() {
            hook(notice);
        }
    }

    /// Transactions are durable and visible.
    pub(crate) fn visible(&self, db: &Database, transactions: u64) {
        if let Some(db) = self.database(&db.name) {
            self.notify(Notice::Transactions(db, transactions));
        }
    }

    pub(crate) fn pending_again(&self, name: &DatabaseName) {
        self.pending.lock().insert(name.clone());
    }

    pub(crate) fn pending_done(&self, name: &DatabaseName) {
        self.pending.lock().remove(name);
    }

    /// Databases whose records wait for readers.
    pub fn take_pending(&self) -> HashSet<DatabaseName> {
        std::mem::take(&mut self.pending.lock())
    }

    /// A known database.
    pub fn database(&self, name: &DatabaseName) -> Option<Arc<Database>> {
        self.databases.read().get(name).cloned()
    }

    /// A database by name, known from now on.
    pub fn database_or_new(self: &Arc<Self>, name: &DatabaseName) -> Arc<Database> {
        if let Some(db) = self.database(name) {
            return db;
        }
        let mut all = self.databases.write();
        all.entry(name.clone()).or_insert_with(|| Database::new(name.clone(), self.clone())).clone()
    }

    /// All databases that have had a transaction.
    pub fn databases(&self) -> Vec<Arc<Database>> {
        let all: Vec<_> = self.databases.read().values().cloned().collect();
        // Not by the state, which a large transaction holds for long.
        all.into_iter().filter(|db| db.durable_position().txid.0 > 0).collect()
    }

    /// All names that are known, databases or not.
    pub fn known(&self) -> Vec<Arc<Database>> {
        self.databases.read().values().cloned().collect()
    }

    /// Databases below a directory.
    pub fn below(&self, dir: &DatabaseName) -> Vec<Arc<Database>> {
        let prefix = format!("{dir}/");
        let mut below = self.known();
        below.retain(|db| db.name.as_str().starts_with(&prefix) && db.state().page_count > 0);
        below
    }
}
