//! What is known of open descriptors and of the databases behind them.
//!
//! A descriptor's entry is the number of a [`File`], 0 for all that is nobody's business. Tables have a fixed size: there is
//! no allocation, and a descriptor or database too many is refused when it is opened.

use crate::directories::Place;
use crate::lock::{Guard, Lock};
use crate::managed::{self, CLUSTERS, Managed, NAME_MAX, PathBuffer};
use crate::transaction::Transaction;
use crate::{agent, process, sys};
use core::sync::atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};
use shim_protocol::Page;

/// Descriptors from here on cannot be databases.
pub const DESCRIPTORS: usize = 1 << 16;
const FILES: usize = 16384;
/// Databases of all clusters together.
pub const DATABASES: usize = 2048;

/// What a file of a database is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Database = 1,
    Journal = 2,
    Wal = 3,
    Shm = 4,
}

impl Kind {
    fn from_number(number: u32) -> Kind {
        match number {
            2 => Kind::Journal,
            3 => Kind::Wal,
            4 => Kind::Shm,
            _ => Kind::Database,
        }
    }

    /// Splits a file's name into what it is and the name of its database. `None`: no file of a database.
    pub fn of(name: &[u8]) -> Option<(Kind, &[u8])> {
        for (suffix, kind) in [(&b"-journal"[..], Kind::Journal), (b"-wal", Kind::Wal), (b"-shm", Kind::Shm)]
        {
            if let Some(base) = name.strip_suffix(suffix)
                && base.last().is_some_and(|last| *last != b'/')
            {
                return Some((kind, base));
            }
        }
        (!is_super_journal(name)).then_some((Kind::Database, name))
    }
}

/// Whether it is the name of the file by whose end a commit over several databases counts (sqlite3VdbeHalt).
pub fn is_super_journal(name: &[u8]) -> bool {
    name.len() > 12
        && name[name.len() - 12..].starts_with(b"-mj")
        && name[name.len() - 9..].iter().all(u8::is_ascii_hexdigit)
}

/// An open file description, as far as it matters.
pub struct File {
    /// Descriptors that have it.
    descriptors: AtomicU32,
    kind: AtomicU32,
    database: AtomicU32,
    device: AtomicU64,
    inode: AtomicU64,
}

/// A database that is open in this process.
pub struct Database {
    /// Files of it in the table.
    files: AtomicU32,
    cluster: AtomicU32,
    name: Lock<PathBuffer<NAME_MAX>>,
    /// Connection in which `number` counts, and the number.
    pub attached: AtomicU64,
    /// WAL files that are open: it is in WAL mode.
    pub wals: AtomicU32,
    /// Wal-indexes that are open.
    pub shms: AtomicU32,
    /// Journals that are open.
    pub journals: AtomicU32,
    /// This process has the write lock of the wal-index.
    pub writing: AtomicU32,
    /// A commit frame was written since the write lock was taken.
    pub committed: AtomicU32,
    /// The agent has the newest of them: it was held.
    pub captured: AtomicU32,
    /// Where its commit is counted as under way: see [`agent::begin_commit`].
    pub committing: AtomicPtr<Page>,
    /// The application has synced its WAL or its file.
    pub synced: AtomicU32,
    /// Bytes written to the WAL that the agent was not told of.
    pub wal_bytes: AtomicU64,
    /// After the header of the newest commit frame begins.
    pub wal_end: AtomicU64,
    pub transaction: Lock<Transaction>,
    /// The header of a commit frame is kept back in `transaction`; can be asked without its lock.
    pub holding: AtomicU32,
    /// There may be something in `transaction`; can be asked without its lock.
    pub touched: AtomicU32,
    /// The directory that is kept for its sake.
    pub place: Place,
}

static TABLE: [AtomicU16; DESCRIPTORS] = [const { AtomicU16::new(0) }; DESCRIPTORS];
static FILE: [File; FILES] = [const { File::new() }; FILES];
static DATABASE: [Database; DATABASES] = [const { Database::new() }; DATABASES];
/// After the file that was taken last.
static RESERVED: AtomicU32 = AtomicU32::new(0);
/// Held while files and databases come and go.
static CHANGES: Lock<()> = Lock::new(());

impl File {
    const fn new() -> Self {
        File {
            descriptors: AtomicU32::new(0),
            kind: AtomicU32::new(0),
            database: AtomicU32::new(0),
            device: AtomicU64::new(0),
            inode: AtomicU64::new(0),
        }
    }

    pub fn kind(&self) -> Kind {
        Kind::from_number(self.kind.load(Ordering::Relaxed))
    }

    pub fn database(&self) -> &'static Database {
        &DATABASE[self.database.load(Ordering::Relaxed) as usize % DATABASES]
    }

    /// Whether the descriptor still is this file: some other library may have closed it and opened another.
    pub fn is_still(&self, fd: i32) -> bool {
        sys::fstat(fd).is_ok_and(|stat| {
            stat.st_dev == self.device.load(Ordering::Relaxed)
                && stat.st_ino == self.inode.load(Ordering::Relaxed)
        })
    }
}

impl Database {
    const fn new() -> Self {
        Database {
            files: AtomicU32::new(0),
            cluster: AtomicU32::new(0),
            name: Lock::new(PathBuffer::new()),
            attached: AtomicU64::new(0),
            wals: AtomicU32::new(0),
            shms: AtomicU32::new(0),
            journals: AtomicU32::new(0),
            writing: AtomicU32::new(0),
            committed: AtomicU32::new(0),
            captured: AtomicU32::new(0),
            committing: AtomicPtr::new(core::ptr::null_mut()),
            synced: AtomicU32::new(0),
            wal_bytes: AtomicU64::new(0),
            wal_end: AtomicU64::new(0),
            transaction: Lock::new(Transaction::new()),
            touched: AtomicU32::new(0),
            place: Place::none(),
            holding: AtomicU32::new(0),
        }
    }

    pub fn cluster(&self) -> usize {
        self.cluster.load(Ordering::Relaxed) as usize % CLUSTERS
    }

    pub fn name(&self) -> Option<Guard<'_, PathBuffer<NAME_MAX>>> {
        self.name.lock()
    }

    fn count(&self, kind: Kind) -> Option<&AtomicU32> {
        match kind {
            Kind::Database => None,
            Kind::Journal => Some(&self.journals),
            Kind::Wal => Some(&self.wals),
            Kind::Shm => Some(&self.shms),
        }
    }

    /// Whether this process has files of it open; the caller holds it as well.
    pub fn is_open(&self) -> bool {
        self.files.load(Ordering::Relaxed) > 1
    }

    /// Commits in WAL mode are published without a lock that says so: with `locking_mode=EXCLUSIVE` there is no wal-index,
    /// or nobody else may look at it.
    pub fn is_exclusive(&self) -> bool {
        self.shms.load(Ordering::Relaxed) == 0 || self.writing.load(Ordering::Relaxed) == 0
    }

    /// Neither a WAL nor a journal is open: nothing takes a write back.
    pub fn is_unjournaled(&self) -> bool {
        self.wals.load(Ordering::Relaxed) == 0 && self.journals.load(Ordering::Relaxed) == 0
    }
}

/// The file behind a descriptor; almost always none.
#[inline]
pub fn file(fd: i32) -> Option<&'static File> {
    let number = TABLE.get(fd as usize)?.load(Ordering::Acquire);
    if number == 0 { None } else { Some(&FILE[usize::from(number) - 1]) }
}

/// Journals of a cluster that are open, and their databases.
pub fn journals(cluster: usize) -> impl Iterator<Item = (i32, &'static Database)> {
    (0..DESCRIPTORS as i32).filter_map(move |fd| {
        let file = file(fd).filter(|file| file.kind() == Kind::Journal)?;
        (file.database().cluster() == cluster).then(|| (fd, file.database()))
    })
}

/// The database that a path names, and what of it; it must be given back with [`release`].
pub fn database(managed: &Managed) -> Result<(Kind, &'static Database), i32> {
    let Some((kind, name)) = Kind::of(managed.name.bytes()) else { return Err(0) };
    if managed.cluster == managed::TOO_MANY {
        return Err(libc::ENFILE);
    }
    let _changes = CHANGES.lock().ok_or(libc::EDEADLK)?;
    let mut free = None;
    for database in &DATABASE {
        if database.files.load(Ordering::Relaxed) == 0 {
            free = free.or(Some(database));
            // Databases are taken from the start, so the used ones are there; holes are few.
            if database.cluster.load(Ordering::Relaxed) == 0
                && database.name.lock().is_some_and(|n| n.bytes().is_empty())
            {
                break;
            }
        } else if database.cluster() == managed.cluster
            && database.name.lock().is_some_and(|n| n.bytes() == name)
        {
            database.files.fetch_add(1, Ordering::Relaxed);
            return Ok((kind, database));
        }
    }
    let database = free.ok_or(libc::ENFILE)?;
    let Some(mut own) = database.name.lock() else { return Err(libc::EDEADLK) };
    own.cut(0);
    own.push(name);
    drop(own);
    database.cluster.store(managed.cluster as u32, Ordering::Relaxed);
    database.attached.store(0, Ordering::Relaxed);
    let Database { wals, shms, journals, writing, committed, captured, synced, touched, .. } = database;
    for count in [wals, shms, journals, writing, committed, captured, synced, touched, &database.holding] {
        count.store(0, Ordering::Relaxed);
    }
    database.wal_bytes.store(0, Ordering::Relaxed);
    database.wal_end.store(0, Ordering::Relaxed);
    if let Some(mut transaction) = database.transaction.lock() {
        transaction.clear();
        transaction.held = None;
    }
    // Taken while it was closed, if it is not none.
    database.place.leave();
    database.files.store(1, Ordering::Relaxed);
    Ok((kind, database))
}

/// Whether files of a cluster's databases are open.
pub fn uses(cluster: usize) -> bool {
    DATABASE.iter().any(|d| d.files.load(Ordering::Relaxed) > 0 && d.cluster() == cluster)
}

/// Gives a database back.
pub fn release(database: &'static Database) {
    if let Some(_changes) = CHANGES.lock() {
        release_locked(database);
    }
}

fn release_locked(database: &'static Database) {
    if database.files.fetch_sub(1, Ordering::Relaxed) == 1 {
        agent::detach(database);
        database.place.leave();
    }
}

/// Which one of `all` it is.
fn index_in<T>(all: &'static [T], one: &'static T) -> usize {
    (&raw const *one as usize - all.as_ptr() as usize) / size_of::<T>()
}

/// Room for a file that is about to be opened; given to [`opened`] or back with [`unreserve`]. Taken before, because a file
/// that was opened cannot be closed again: that drops the process's locks on it.
pub fn reserve() -> Result<&'static File, i32> {
    let _changes = CHANGES.lock().ok_or(libc::EDEADLK)?;
    let from = RESERVED.load(Ordering::Relaxed) as usize;
    let (before, after) = FILE.split_at(from);
    let mut files = after.iter().chain(before);
    let file = files.find(|file| file.descriptors.load(Ordering::Relaxed) == 0).ok_or(libc::ENFILE)?;
    RESERVED.store((index_in(&FILE, file) + 1) as u32 % FILES as u32, Ordering::Relaxed);
    file.descriptors.store(1, Ordering::Relaxed);
    Ok(file)
}

/// Nothing was opened.
pub fn unreserve(file: &'static File) {
    file.descriptors.store(0, Ordering::Relaxed);
}

/// A file of a database was opened: its status. Takes over the caller's hold on the database and on the file.
pub fn opened(
    fd: i32,
    kind: Kind,
    database: &'static Database,
    file: &'static File,
) -> Result<libc::stat, i32> {
    let stat = sys::fstat(fd)?;
    let entry = TABLE.get(fd as usize).ok_or(libc::EMFILE)?;
    let _changes = CHANGES.lock().ok_or(libc::EDEADLK)?;
    file.kind.store(kind as u32, Ordering::Relaxed);
    file.database.store(index_in(&DATABASE, database) as u32, Ordering::Relaxed);
    file.device.store(stat.st_dev, Ordering::Relaxed);
    file.inode.store(stat.st_ino, Ordering::Relaxed);
    if let Some(count) = database.count(kind) {
        count.fetch_add(1, Ordering::Relaxed);
    }
    let before = entry.swap(index_in(&FILE, file) as u16 + 1, Ordering::AcqRel);
    drop_number(before);
    Ok(stat)
}

/// `copy` is another descriptor of the same open file.
pub fn duplicated(fd: i32, copy: i32) {
    if copy < 0 || fd == copy {
        return;
    }
    closed(copy);
    if file(fd).is_none() || !process::is_own() {
        return;
    }
    let (Some(from), Some(to)) = (TABLE.get(fd as usize), TABLE.get(copy as usize)) else { return };
    let Some(_changes) = CHANGES.lock() else { return };
    let number = from.load(Ordering::Acquire);
    if number != 0 {
        FILE[usize::from(number) - 1].descriptors.fetch_add(1, Ordering::Relaxed);
        to.store(number, Ordering::Release);
    }
}

/// A descriptor is about to be closed, or has become another file.
#[inline]
pub fn closed(fd: i32) {
    if file(fd).is_some() {
        forget(fd);
    }
}

#[cold]
fn forget(fd: i32) {
    // The child of a vfork closes its own descriptors, but these are the parent's tables.
    if !process::is_own() {
        return;
    }
    let Some(_changes) = CHANGES.lock() else { return };
    if let Some(entry) = TABLE.get(fd as usize) {
        drop_number(entry.swap(0, Ordering::AcqRel));
    }
}

fn drop_number(number: u16) {
    if number == 0 {
        return;
    }
    let file = &FILE[usize::from(number) - 1];
    if file.descriptors.load(Ordering::Relaxed) > 1 {
        file.descriptors.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let database = file.database();
    if let Some(count) = database.count(file.kind()) {
        count.fetch_sub(1, Ordering::Relaxed);
    }
    file.descriptors.store(0, Ordering::Relaxed);
    release_locked(database);
}

/// In the child of a fork: descriptors are inherited, the connection to the agent and running transactions are not.
pub fn forked() {
    CHANGES.forget_holder();
    for database in &DATABASE {
        if database.files.load(Ordering::Relaxed) > 0 {
            database.name.forget_holder();
            database.transaction.forget_holder();
            database.attached.store(0, Ordering::Relaxed);
            // What is under way is the parent's.
            database.committing.store(core::ptr::null_mut(), Ordering::Relaxed);
            database.committed.store(0, Ordering::Relaxed);
            database.writing.store(0, Ordering::Relaxed);
            database.touched.store(0, Ordering::Relaxed);
            database.holding.store(0, Ordering::Relaxed);
            if let Some(mut transaction) = database.transaction.lock() {
                transaction.clear();
                transaction.held = None;
            }
        }
    }
}
