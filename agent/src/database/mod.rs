//! One database: its files, its position, its page checksums, and what the doors report of it.
//!
//! Lock order, which keeps the agent from waiting on itself: a thread holds at most one [`State`] at a time, and never
//! while it touches a file *through the mount* (the threads that serve the mount take the same lock). Whoever goes
//! through the mount ([`crate::apply`]) holds only the database's apply lock.

pub mod checksums;
pub mod diverged;
pub mod follow;
pub mod glance;
pub mod halt;
mod hold;
pub mod import;
pub mod install;
mod lost_log;
pub mod pages;
pub mod reattach;
pub mod receive;
pub mod recovery;
pub mod shared;
pub mod snapshot_file;
pub mod sync;
mod unpublished;
pub mod write_protection;

use crate::DatabaseName;
use crate::apply::{Applier, WalFrames};
use crate::capture::rollback::RollbackCapture;
use crate::capture::wal::WalCapture;
use crate::capture::{self, CaptureError, Logged};
use crate::log::Lsn;
use crate::ship::engine::{Epoch, RecordPayload, ShippedRecord};
use crate::status::messages;
use checksums::{Checksums, ChecksumsError, Mark};
use ltx::{Pos, Txid};
use parking_lot::{Mutex, MutexGuard, RwLock};
use receive::ApplySide;
pub use shared::{Dirs, Notice, RoleStep, Shared};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Paths of a database's files below the backing directory.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The main database file.
    pub database: PathBuf,
    /// Its WAL.
    pub wal: PathBuf,
    /// Its rollback journal.
    pub journal: PathBuf,
    /// Its wal-index.
    pub shm: PathBuf,
    /// Its page checksums.
    pub checksums: PathBuf,
}

/// Whether a database may be used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    #[default]
    Ok,
    /// No, for this reason; all other databases go on.
    Quarantined(String),
}

/// One database of the cluster (or a name that may become one: its position is 0 until its first transaction).
#[derive(Debug)]
pub struct Database {
    pub(crate) name: DatabaseName,
    pub(crate) paths: Paths,
    pub(crate) shared: Arc<Shared>,
    state: Mutex<State>,
    /// Newest position whose record is durable here.
    durable: Mutex<Pos>,
    /// Newest records, for followers that are live: they need not be found and read in the log. Changed only with `state`
    /// locked, so in the order of the log. Nothing but `durable` is locked inside.
    pub(crate) recent: Mutex<RecentRecords>,
    /// Writes transactions through the applications' path. Taken before `state`, never while holding it.
    pub(crate) apply: Mutex<ApplySide>,
    /// Newest commit that nobody acknowledged before this node's term ended, until it is known whether it counts. A leaf.
    unconfirmed: Mutex<Option<Pos>>,
    /// Who may write it, where that is not simply the primary. A leaf.
    loan: RwLock<Option<halt::Loan>>,
    /// A halt lock of this node is about to end: no transaction begins under it any more.
    loan_ends: AtomicBool,
    /// What the state was when its holder began to wait for another node. A leaf.
    waits_elsewhere: Mutex<Option<glance::Glance>>,
}

/// The newest small records of a database, oldest first.
#[derive(Debug, Default)]
pub(crate) struct RecentRecords {
    records: VecDeque<ShippedRecord>,
    bytes: usize,
}

impl RecentRecords {
    const BYTES_MAX: usize = 256 * 1024;

    pub(crate) fn push(&mut self, record: ShippedRecord) {
        let RecordPayload::Bytes(payload) = &record.payload else { return self.clear() };
        self.bytes += payload.len();
        self.records.push_back(record);
        while self.bytes > Self::BYTES_MAX
            && let Some(ShippedRecord { payload: RecordPayload::Bytes(old), .. }) = self.records.pop_front()
        {
            self.bytes -= old.len();
        }
    }

    /// The record that begins with a transaction. The records follow each other without a gap.
    pub(crate) fn get(&self, min_txid: Txid) -> Option<&ShippedRecord> {
        let index = self.records.binary_search_by_key(&min_txid, |record| record.min_txid).ok()?;
        self.records.get(index)
    }

    pub(crate) fn clear(&mut self) {
        *self = RecentRecords::default();
    }
}

/// What changes with every transaction.
#[derive(Debug, Default)]
pub struct State {
    /// Newest transaction in the log.
    pub position: Pos,
    /// Bytes in a page; 0 while the database is empty.
    pub page_size: u32,
    /// Pages in the database.
    pub page_count: u32,
    /// How far the files are: equal to the log on the primary, maybe behind it on a replica.
    pub applied: Mark,
    /// Position of the newest commit that waits for followers: not published yet, so not in `applied`.
    pub(crate) held: Option<Pos>,
    /// Applications of before a restart may ask for a commit again that nobody has acknowledged.
    pub(crate) asked_again: bool,
    /// What was applied before the newest commit under a halt lock of this node, until that is known to be published.
    pub(crate) lent_before: Option<Mark>,
    /// Bytes 18 and 19 of page 1 say WAL.
    pub wal_mode: bool,
    journal_mode_known: bool,
    /// Files of a WAL whose writes no door sees.
    pub(crate) followed: follow::Followed,
    /// What is captured now was committed in a term that has ended.
    pub(crate) ahead: bool,
    /// On a replica: what a followed WAL had when the agent let go of it last. `None`: not known, or an application has
    /// committed since.
    pub(crate) applied_frames: Option<WalFrames>,
    /// SQLite's change counter in page 1 as the log has it; `None`: not known, or written by the agent since.
    pub(crate) change_counter: Option<u32>,
    /// The running WAL generation.
    pub wal: WalCapture,
    /// Up to here the kernel's cache has pages of the WAL in advance, until somebody asks how long the file is.
    pub wal_cached_end: u64,
    /// The application has synced the WAL since its last commit, as with `synchronous=FULL`.
    pub wal_synced: bool,
    /// On a replica: why the plain file may not be what the log has. Asked when transactions were applied to it.
    pub(crate) suspect: Option<follow::Suspicion>,
    /// It was set aside because somebody wrote to it: that is kept before a snapshot takes its place.
    pub(crate) foreign_content: bool,
    /// The running rollback-mode transaction.
    pub rollback: RollbackCapture,
    /// Open handles through which the door does not see writes.
    pub passthrough_handles: u32,
    /// Open handles of programs that copy a database in: it is complete when they have closed it.
    pub copiers: u32,
    /// Open handles of applications on the rollback journal: a writer that lives has one.
    pub journal_handles: u32,
    /// The sweep has seen a journal that nobody has open, and nothing has happened to it since.
    pub journal_left: bool,
    /// Open handles of applications on the main file.
    pub handles: u32,
    /// End of the newest record in the log.
    pub logged_end: Lsn,
    /// When an application behind the preload door has closed it last.
    pub released: Option<Instant>,
    /// When the newest transaction was committed, milliseconds since 1970.
    pub last_change_ms: i64,
    pub(crate) health: Health,
    checksums: Option<Checksums>,
    file: Option<Arc<File>>,
    /// mtime and size of the file after the last capture.
    stamp: Option<(i64, i64, u64)>,
    /// Epoch of the newest record at the last mark.
    pub(crate) record_epoch: Epoch,
    /// Position of the mark in the sidecar.
    pub(crate) marked: Pos,
}

impl Database {
    /// A database by its name; nothing is opened.
    pub fn new(name: DatabaseName, shared: Arc<Shared>) -> Arc<Self> {
        let database = shared.dirs.files.join(&name);
        let beside = |suffix: &str| {
            let mut path = database.clone().into_os_string();
            path.push(suffix);
            PathBuf::from(path)
        };
        let paths = Paths {
            wal: beside("-wal"),
            journal: beside("-journal"),
            shm: beside("-shm"),
            checksums: shared.dirs.checksums.join(format!("{}.sum", name.escaped())),
            database,
        };
        let applier = Applier::new(shared.dirs.mount.join(&name), name.clone());
        Arc::new(Database {
            name,
            paths,
            shared,
            state: Mutex::default(),
            durable: Mutex::default(),
            recent: Mutex::default(),
            apply: Mutex::new(ApplySide::new(applier)),
            unconfirmed: Mutex::default(),
            loan: RwLock::default(),
            loan_ends: AtomicBool::new(false),
            waits_elsewhere: Mutex::default(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &DatabaseName {
        &self.name
    }

    /// Its files.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Locks the state. See the lock order at the head of this module.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Locks the state if nobody works on it now.
    pub fn try_state(&self) -> Option<MutexGuard<'_, State>> {
        self.state.try_lock()
    }

    /// Closes what an idle database holds: its descriptor, its mapping and its newest records.
    pub(crate) fn close_idle(&self, st: &mut State) {
        if st.handles == 0 && st.marked == st.position && !st.rollback.is_dirty() {
            st.file = None;
            st.checksums = None;
            self.recent.lock().clear();
        }
    }

    /// Newest position whose record is durable in this node's log.
    pub fn durable_position(&self) -> Pos {
        *self.durable.lock()
    }

    /// The durable record that begins with a transaction, if it is among the newest ones: its bytes are in memory.
    pub fn recent_record(&self, min_txid: Txid) -> Option<ShippedRecord> {
        let recent = self.recent.lock();
        // Inside, so that both are of one history.
        let durable = self.durable_position();
        recent.get(min_txid).filter(|record| record.max_txid <= durable.txid).cloned()
    }

    pub(crate) fn set_durable_position(&self, position: Pos) {
        *self.durable.lock() = position;
    }

    /// Newest position that applications on this host can see.
    pub fn visible_position(&self) -> Pos {
        self.glance().applied.position
    }

    /// Whether it has ever had a transaction.
    pub fn is_tracked(&self) -> bool {
        self.state().position.txid.0 > 0
    }

    /// A transaction was logged: once it is durable, followers may have it. `held`: somebody waits for that.
    pub(crate) fn committed(self: &Database, position: Pos, end: Lsn, held: bool) {
        let Some(this) = self.shared.database(&self.name) else { return };
        let told: crate::log::OnDurable = Box::new(move |result| {
            if result.is_ok() {
                let mut durable = this.durable.lock();
                if durable.txid < position.txid {
                    *durable = position;
                }
                drop(durable);
                this.shared.changed(&this.name);
                if !held {
                    this.shared.visible(&this, 1);
                }
            }
        });
        if held {
            self.shared.log.on_durable(end, told);
        } else {
            self.shared.log.on_durable_paced(end, told);
        }
    }

    /// A commit of a WAL is synced if the last one was: the log's sync begins before the application asks for it.
    pub fn expect_sync(&self, st: &mut State, logged: Logged) {
        if std::mem::take(&mut st.wal_synced) {
            self.shared.log.hasten(logged.end);
        }
    }

    pub(crate) fn wal_error(&self, source: io::Error) -> CaptureError {
        CaptureError::Io { path: self.paths.wal.clone(), source }
    }

    pub(crate) fn database_error(&self, source: io::Error) -> CaptureError {
        CaptureError::Io { path: self.paths.database.clone(), source }
    }

    /// Reads whole pages; what lies past the end of the file is zeros.
    pub(crate) fn read_at_or_zero(
        &self,
        file: &File,
        mut buf: &mut [u8],
        mut offset: u64,
    ) -> Result<(), CaptureError> {
        while !buf.is_empty() {
            match file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.database_error(e)),
            }
        }
        Ok(())
    }

    /// Reads one page of the main file; the page size is the buffer's.
    pub(crate) fn read_database_page(
        &self,
        file: &File,
        pgno: u32,
        buf: &mut [u8],
    ) -> Result<(), CaptureError> {
        let offset = u64::from(pgno - 1) * buf.len() as u64;
        self.read_at_or_zero(file, buf, offset)
    }

    /// What it shares with all databases of the node.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether page 1 of the file says WAL; read from the file when it is not known yet.
    pub fn load_journal_mode(&self, st: &mut State) -> bool {
        if !st.journal_mode_known {
            let mut first = [0; sqlite_file::header::HEADER_BYTES];
            let read = File::open(&self.paths.database).and_then(|f| f.read_exact_at(&mut first, 0));
            if read.is_ok()
                && let Ok(header) = sqlite_file::header::DatabaseHeader::parse(&first)
            {
                st.wal_mode = header.is_wal();
                st.journal_mode_known = true;
            }
        }
        st.wal_mode
    }

    /// The journal ends, or the file is known to be consistent: captures the rollback-mode transaction.
    pub fn capture_rollback(&self, st: &mut State) -> Result<Option<Logged>, CaptureError> {
        self.capture_ending(st, false, &|| Ok(()))
    }

    /// As [`Database::capture_rollback`], while nothing but `still` says that nobody writes to the file.
    pub fn capture_rollback_while(
        &self,
        st: &mut State,
        still: &dyn Fn() -> Result<(), CaptureError>,
    ) -> Result<Option<Logged>, CaptureError> {
        self.capture_ending(st, false, still)
    }

    /// As [`Database::capture_rollback`], for a door that can hold the transaction (see [`Database::hold_of`]).
    pub fn capture_rollback_to_hold(&self, st: &mut State) -> Result<Option<Logged>, CaptureError> {
        self.capture_ending(st, true, &|| Ok(()))
    }

    fn capture_ending(
        &self,
        st: &mut State,
        may_hold: bool,
        still: &dyn Fn() -> Result<(), CaptureError>,
    ) -> Result<Option<Logged>, CaptureError> {
        let logged = capture::rollback::capture(self, st, may_hold, still)?;
        st.rollback.journal_active = false;
        st.rollback.uncounted = false;
        st.journal_left = false;
        Ok(logged)
    }
}

impl Database {
    /// Takes back a rollback-mode transaction whose writer died, as the next connection would: until somebody does,
    /// pages that it wrote over may be nowhere (what came from the free list is not even in its journal). Goes through
    /// the mount: never on a thread that serves it.
    pub fn end_dead_transaction(&self) -> anyhow::Result<()> {
        {
            let mut st = self.state();
            if !st.rollback.journal_active || st.journal_handles > 0 {
                return Ok(());
            }
            // SQLite closes a journal just before it removes it: only one that stays is left over, and only then is it
            // worth the locks, at which others fail.
            if !std::mem::replace(&mut st.journal_left, true) {
                return Ok(());
            }
        }
        let Some(side) = self.apply.try_lock() else { return Ok(()) };
        let Some(dead) = side.applier.roll_back_dead()? else { return Ok(()) };
        {
            let mut st = self.state();
            // Pages from the free list stay as the dead writer left them: they are a transaction of their own.
            st.rollback.mark_unknown();
            self.capture_rollback(&mut st)?;
            st.rollback.synced = false;
        }
        dead.end()?;
        tracing::info!(database = %self.name, "took back the transaction of an application that died");
        Ok(())
    }
}

impl State {
    /// The sidecar, opened (and created for a new database) on first use.
    pub(crate) fn open_checksums(&mut self, db: &Database) -> Result<&mut Checksums, ChecksumsError> {
        if self.checksums.is_none() {
            let path = &db.paths.checksums;
            let opened = match Checksums::open(path) {
                Err(ChecksumsError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && self.page_count == 0 =>
                {
                    Checksums::create(path, &db.name)?
                }
                other => other?,
            };
            self.checksums = Some(opened);
        }
        Ok(self.checksums_mut())
    }

    /// Replaces the sidecar.
    pub(crate) fn set_checksums(&mut self, checksums: Checksums) {
        self.marked = checksums.mark().position;
        self.checksums = Some(checksums);
    }

    pub(crate) fn checksums(&self) -> &Checksums {
        match &self.checksums {
            Some(checksums) => checksums,
            None => unreachable!("open_checksums comes first"),
        }
    }

    pub(crate) fn checksums_mut(&mut self) -> &mut Checksums {
        match &mut self.checksums {
            Some(checksums) => checksums,
            None => unreachable!("open_checksums comes first"),
        }
    }

    /// The main file, opened for reading and writing on first use.
    pub(crate) fn database_file(&mut self, db: &Database) -> Result<Arc<File>, CaptureError> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&db.paths.database)
            .map_err(|e| db.database_error(e))?;
        let file = Arc::new(file);
        self.file = Some(file.clone());
        Ok(file)
    }

    /// The main file, if it is open.
    pub(crate) fn kept_database_file(&self) -> Option<Arc<File>> {
        self.file.clone()
    }

    /// Gives the main file to use, or forgets it (it was replaced, removed, or nobody uses it now).
    pub(crate) fn set_database_file(&mut self, file: Option<Arc<File>>) {
        self.file = file;
    }

    /// The position and shape that the log has.
    pub(crate) fn logged_mark(&self) -> Mark {
        Mark { position: self.position, page_size: self.page_size, page_count: self.page_count }
    }

    pub(crate) fn set_wal_mode(&mut self, wal_mode: bool) {
        self.wal_mode = wal_mode;
        self.journal_mode_known = true;
    }

    pub(crate) fn advance(&mut self, position: Pos, end: Lsn, timestamp_ms: i64) {
        assert!(position.txid > self.position.txid, "positions grow: {position} after {}", self.position);
        self.position = position;
        self.logged_end = end;
        self.last_change_ms = timestamp_ms;
    }

    pub(crate) fn check_health(&self) -> Result<(), CaptureError> {
        match &self.health {
            Health::Ok => Ok(()),
            Health::Quarantined(reason) => Err(CaptureError::Quarantined(reason.clone())),
        }
    }

    /// Why the database stands aside, if it does.
    pub fn quarantine_reason(&self) -> Option<&str> {
        match &self.health {
            Health::Ok => None,
            Health::Quarantined(reason) => Some(reason),
        }
    }

    pub(crate) fn clear_quarantine(&mut self) {
        self.health = Health::Ok;
        self.foreign_content = false;
    }

    /// The file may be another one now.
    pub(crate) fn forget_journal_mode(&mut self) {
        self.wal_mode = false;
        self.journal_mode_known = false;
        self.change_counter = None;
    }

    /// Sets the database aside, alone.
    pub(crate) fn quarantine(&mut self, db: &Database, reason: String) {
        tracing::error!(
            MESSAGE_ID = messages::QUARANTINED,
            database = %db.name,
            %reason,
            "database is quarantined; all others go on"
        );
        db.shared.counters.quarantines.fetch_add(1, Ordering::Relaxed);
        db.shared.notify(Notice::Quarantined(db.name.clone(), reason.clone()));
        self.health = Health::Quarantined(reason);
    }

    /// Whether the file's size or times are not what the last capture left.
    pub(crate) fn stamp_changed(&mut self, db: &Database) -> Result<bool, CaptureError> {
        let stamp = self.read_stamp(db)?;
        Ok(self.stamp != Some(stamp))
    }

    /// Whether it is known how the last capture, or the last transaction of a primary, left the file.
    pub(crate) fn has_stamp(&self) -> bool {
        self.stamp.is_some()
    }

    pub(crate) fn remember_stamp(&mut self, db: &Database) -> Result<(), CaptureError> {
        self.stamp = Some(self.read_stamp(db)?);
        Ok(())
    }

    fn read_stamp(&mut self, db: &Database) -> Result<(i64, i64, u64), CaptureError> {
        let m = self.database_file(db)?.metadata().map_err(|e| db.database_error(e))?;
        Ok((m.mtime(), m.mtime_nsec(), m.size()))
    }
}
