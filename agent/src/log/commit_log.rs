//! The log as others use it.

use super::error::{Damage, LogError};
use super::flusher::{Flush, OnDurable, OnSync};
use super::format::{self, NewPayload};
use super::index::Index;
use super::keeper::Keeper;
use super::record::{Lsn, NewRecord, RecordInfo};
use super::recovery::{self, Recovered};
use super::segments::SegmentSet;
use super::storage::{DiskStorage, Storage};
use super::writer::Writer;
use crate::DatabaseName;
use parking_lot::{Mutex, RwLock};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;

/// How a log is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Size of a segment file: a multiple of 4096 from 16 KiB to 1 GiB. 32 MiB is a fraction of a second at full
    /// load, and small enough that preparing one does not hold up the disk.
    pub segment_bytes: u64,
    /// Payloads above this become files of their own. At most a quarter of a segment.
    pub inline_bytes_max: u64,
    /// Segments whose newest record is older than this are removed.
    pub retention_age: Duration,
    /// The oldest segments are removed when all segments and external payloads take more than this.
    pub retention_bytes: u64,
    /// The log marks on disk that its last record is durable when nothing was appended for so long. Without it
    /// (`None`) damage to the last records after a crash can look like a write that was never finished.
    pub idle_mark: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            segment_bytes: 32 << 20,
            inline_bytes_max: 8 << 20,
            retention_age: Duration::from_secs(24 * 60 * 60),
            retention_bytes: 1 << 30,
            idle_mark: Some(Duration::from_millis(200)),
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), LogError> {
        let bad = |option, reason: String| Err(LogError::BadOption { option, reason });
        let size = self.segment_bytes;
        if !(16 << 10..=1 << 30).contains(&size) || !size.is_multiple_of(format::BLOCK_BYTES) {
            return bad("segment_bytes", format!("{size} is not a multiple of 4096 from 16 KiB to 1 GiB"));
        }
        if self.inline_bytes_max > size / 4 {
            let reason =
                format!("{} is more than a quarter of segment_bytes ({size})", self.inline_bytes_max);
            return bad("inline_bytes_max", reason);
        }
        Ok(())
    }
}

/// Everything that the threads of a log share.
pub(super) struct Shared {
    pub storage: Arc<dyn Storage>,
    pub dir: PathBuf,
    pub ltx_dir: PathBuf,
    pub options: Options,
    pub log_id: u64,
    pub writer: Mutex<Writer>,
    /// Locked after `writer` where both are.
    pub index: RwLock<Index>,
    pub segments: SegmentSet,
    /// End of the last record that is in the page cache.
    pub appended: AtomicU64,
    /// Bytes that fit into the segment that takes records, as of the last one.
    pub room: AtomicU64,
    pub flush: Flush,
    pub keeper: Keeper,
    pub damaged: Mutex<Vec<Damage>>,
    /// Held while retention runs.
    pub retention: Mutex<()>,
    /// `false`: a test does the threads' work in a fixed order.
    pub threaded: bool,
}

/// The commit log of one cluster instance. See the module's documentation.
pub struct CommitLog {
    pub(super) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl CommitLog {
    /// Opens the log in `dir`, or makes one. The caller makes sure that nobody else has it open. Large payloads go
    /// to the directory `ltx` beside `dir`, which belongs to the log.
    ///
    /// After a crash, what was not durable and is torn or missing is cut off. What was durable and cannot be read
    /// does not stop the log from opening: see [`CommitLog::damaged`].
    pub fn open(dir: &Path, options: Options) -> Result<CommitLog, LogError> {
        Self::open_on(Arc::new(DiskStorage), dir, options, true)
    }

    /// As [`CommitLog::open`], on another file system.
    pub(super) fn open_on(
        storage: Arc<dyn Storage>,
        dir: &Path,
        options: Options,
        threaded: bool,
    ) -> Result<CommitLog, LogError> {
        options.check()?;
        let ltx_dir = dir.parent().unwrap_or(Path::new("")).join("ltx");
        let Recovered { log_id, next, last_end, segments, index, damaged, recycled, next_spare } =
            recovery::recover(&*storage, dir, &ltx_dir, &options)?;
        let shared = Arc::new(Shared {
            segments: SegmentSet::new(storage.clone(), dir, segments),
            storage,
            dir: dir.into(),
            ltx_dir,
            options,
            log_id,
            writer: Mutex::new(Writer::new(next, last_end)),
            index: RwLock::new(index),
            appended: AtomicU64::new(next.0),
            room: AtomicU64::new(0),
            flush: Flush::new(dir.into(), next),
            keeper: Keeper::new(recycled, next_spare),
            damaged: Mutex::new(damaged),
            retention: Mutex::new(()),
            threaded,
        });
        let log = CommitLog { shared, threads: Mutex::default() };
        if threaded {
            log.spawn("log-flusher", Shared::run_flusher)?;
            log.spawn("log-keeper", Shared::run_keeper)?;
        }
        Ok(log)
    }

    fn spawn(&self, name: &'static str, body: fn(&Shared)) -> Result<(), LogError> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || body(&shared));
        let thread = thread.map_err(|e| LogError::io("start a thread for", &self.shared.dir, e))?;
        self.threads.lock().push(thread);
        Ok(())
    }

    /// Appends a record: afterwards it survives the death of this process. It becomes durable once somebody asks for
    /// that, together with all that was appended until then. Returns the LSN to ask for. A payload above [`Options::inline_bytes_max`] is written and synced to a file of its own
    /// first. Records of one database must be appended one after the other; a transaction must follow the last
    /// record in TXID and checksum. After an error (a full disk, say) the log is as it was before.
    pub fn append(&self, record: &NewRecord<'_>, payload: &[u8]) -> Result<Lsn, LogError> {
        if payload.len() as u64 > self.shared.options.inline_bytes_max {
            self.shared.spill(record, payload)
        } else {
            self.shared.append_record(record, NewPayload::Inline(payload))
        }
    }

    /// Returns when no append goes on that began before: one whose [`NewRecord::fence`] is closed by now has been
    /// refused, or has made it into [`CommitLog::appended`].
    pub fn let_appends_end(&self) {
        drop(self.shared.writer.lock());
    }

    /// Appends a record whose payload is the complete LTX file at `path`, on the file system of the log. The file is
    /// synced and renamed into the `ltx` directory; after an error it is where it was.
    pub fn append_file(&self, record: &NewRecord<'_>, path: &Path) -> Result<Lsn, LogError> {
        self.shared.append_file(record, path)
    }

    /// Whether a record of so many bytes finds room without a new segment being made. Payloads too large for a segment
    /// are not looked at.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.shared.has_room(bytes)
    }

    /// Makes sure that there is room for a record of so many bytes, unless others take it first: a commit that is
    /// refused early, while its pages are written, gets a better error.
    pub fn ensure_room(&self, bytes: u64) -> Result<(), LogError> {
        self.shared.ensure_room(bytes)
    }

    /// Everything before this is durable.
    pub fn durable(&self) -> Lsn {
        self.shared.durable()
    }

    /// Everything before this was appended.
    pub fn appended(&self) -> Lsn {
        Lsn(self.shared.appended.load(Ordering::SeqCst))
    }

    /// Follows [`CommitLog::durable`].
    pub fn watch(&self) -> watch::Receiver<Lsn> {
        self.shared.flush.watch()
    }

    /// Waits until everything before `lsn` is durable. Many waiters share one fsync.
    pub fn wait_durable(&self, lsn: Lsn) -> Result<(), LogError> {
        self.shared.wait_durable(lsn)
    }

    /// Has `callback` called from the flusher's thread once everything before `lsn` is durable. It must not block,
    /// and not append. After [`CommitLog::close`] it is called at once, from this thread.
    pub fn on_durable(&self, lsn: Lsn, callback: OnDurable) {
        self.shared.on_durable(lsn, callback, true);
    }

    /// Has `told` called with the time each sync takes; once.
    pub fn on_sync(&self, told: OnSync) {
        let _ = self.shared.flush.on_sync.set(told);
    }

    /// As [`CommitLog::on_durable`], for something that nobody waits for: it is called up to 4 ms later, many together, and
    /// the sync may be as late.
    pub fn on_durable_paced(&self, lsn: Lsn, callback: OnDurable) {
        self.shared.on_durable(lsn, callback, false);
    }

    /// Somebody will soon wait for everything before `lsn` to be durable: the sync begins at once.
    pub fn hasten(&self, lsn: Lsn) {
        self.shared.hasten(lsn);
    }

    /// Has what was appended made durable soon; nobody waits for it.
    pub fn request_flush(&self) {
        self.shared.wake_flusher();
    }

    /// An application is syncing a file of its own: the next of what nobody waits for comes later, as when somebody waits for
    /// the log.
    pub fn leave_the_disk(&self) {
        self.shared.leave_the_disk();
    }

    /// Names of all databases that the log has records of, in no order.
    pub fn databases(&self) -> Vec<DatabaseName> {
        self.shared.index.read().names().cloned().collect()
    }

    /// The last record of a database, while it is kept.
    pub fn last(&self, database: &DatabaseName) -> Option<RecordInfo> {
        self.shared.index.read().get(database).map(|entry| entry.last.clone())
    }

    /// Parts of the log that were durable and cannot be read, as far as it is known.
    pub fn damaged(&self) -> Vec<Damage> {
        self.shared.damaged.lock().clone()
    }

    /// Makes everything durable and ends the threads; the next open then has nothing to scan. Dropping the log
    /// does the same. Appending fails from now on, reading goes on.
    pub fn close(&self) {
        let shared = &self.shared;
        let mut threads = self.threads.lock();
        let (active, end) = shared.writer.lock().close();
        shared.stop_flusher();
        shared.keeper.stop();
        for thread in threads.drain(..) {
            // A callback may hold the last reference to the log.
            let own = thread.thread().id() == std::thread::current().id();
            if !own && thread.join().is_err() {
                tracing::error!("a thread of the commit log panicked");
            }
        }
        if !shared.threaded {
            let _ = shared.flush_once();
            shared.stop_waiting();
        }
        // What the flusher handed over last.
        shared.keep_once();
        if let Some(segment) = active
            && shared.durable() == end
            && shared.flush.failure().is_none()
        {
            shared.seal_last(&segment, end);
        }
    }
}

impl Drop for CommitLog {
    fn drop(&mut self) {
        self.close();
    }
}
