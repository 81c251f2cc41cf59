//! What an operation on a database's file means for replication. See `docs/preload-door.md` for the rules; the bytes and
//! the order of calls are SQLite's (os_unix.c, pager.c, wal.c).

use crate::agent;
use crate::managed::{self, Managed};
use crate::sys;
use crate::table::{self, Database, File, HeldFrame, Kind};
use core::sync::atomic::{AtomicU64, Ordering};
use shim_protocol::{FLAG_PLAYBACK, FLAG_SYNCED, FLAG_UNJOURNALED, FLAG_UNKNOWN, Op};

/// Database file: first of the bytes that readers lock; a writer has all of them (os_unix.c).
const SHARED_FIRST: i64 = 0x4000_0002;
const SHARED_SIZE: i64 = 510;
/// Database file: locked by the one who is about to write.
const RESERVED: i64 = 0x4000_0001;
/// Wal-index: locked by the writer.
const WAL_WRITE: i64 = 120;
/// Wal-index: locked, all four, to begin the WAL anew.
const WAL_READERS: (i64, i64) = (124, 4);
const WAL_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
/// Zeros over a journal's header end it in PERSIST mode.
const JOURNAL_END: usize = 28;
/// How long the end of a WAL may wait for an agent that is there: SQLite can do without it.
const WAL_END_MS: u64 = 1000;

/// The journal whose creation was refused last, and by which thread: a hash.
static REFUSED: AtomicU64 = AtomicU64::new(0);

fn fail(error: i32) -> i32 {
    sys::set_errno(error);
    -1
}

/// `open`: decides whether, and remembers what was opened.
#[cold]
pub fn open(managed: &Managed, flags: i32, real: &dyn Fn(i32) -> i32) -> i32 {
    if !agent::is_own_process() {
        return real(flags);
    }
    let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
    if is_special(managed.name.bytes()) && reads || is_lock(managed.name.bytes()) {
        match open_special(managed, flags) {
            // A database, or another file, may have this name.
            Err(libc::ENOENT) if !reads => {}
            Err(libc::ENOENT) => return real(flags),
            Ok(fd) => return fd,
            Err(error) => return fail(error),
        }
    }
    let (kind, database) = match table::database(managed) {
        Ok(found) => found,
        Err(0) => return real(flags),
        Err(error) => return fail(error),
    };
    let file = match table::reserve() {
        Ok(file) => file,
        Err(error) => {
            table::release(database);
            return fail(error);
        }
    };
    let fd = match may_open(kind, database, flags) {
        Ok(flags) => open_with_help(managed, kind, flags, real),
        Err(0) => {
            table::unreserve(file);
            table::release(database);
            return real(flags);
        }
        Err(error) => {
            if kind == Kind::Journal {
                REFUSED.store(refusal(managed.name.bytes()), Ordering::Relaxed);
            }
            fail(error)
        }
    };
    if fd < 0 {
        let error = sys::errno();
        table::unreserve(file);
        table::release(database);
        return fail(error);
    }
    if kind == Kind::Database
        && (flags & libc::O_ACCMODE == libc::O_WRONLY || flags & libc::O_TRUNC != 0)
        && let Some(mut transaction) = database.transaction.lock()
    {
        // Another program: it is looked at when it has closed the file.
        transaction.unknown = true;
        database.touched.store(1, Ordering::Relaxed);
    }
    if kind == Kind::Journal
        && flags & libc::O_ACCMODE != libc::O_RDONLY
        && flags & libc::O_CREAT == 0
        && let Some(mut transaction) = database.transaction.lock()
    {
        // To take back the transaction of a process that died, which may have written more than its journal has: pages
        // from the free list.
        transaction.unknown = true;
        transaction.playback = true;
        database.touched.store(1, Ordering::Relaxed);
    }
    match table::opened(fd, kind, database, file) {
        Ok(()) => fd,
        Err(error) => {
            // More than 65,536 descriptors. Closing this one would drop the locks that SQLite has through others.
            if database.is_open() {
                agent::say(&[
                    managed.name.bytes(),
                    b": its descriptor is too high for a database's, and is lost",
                ]);
            } else {
                sys::close(fd);
            }
            table::unreserve(file);
            table::release(database);
            fail(error)
        }
    }
}

/// On a replica permissions keep writers out that have no library; others get their descriptor from the agent.
fn open_with_help(managed: &Managed, kind: Kind, flags: i32, real: &dyn Fn(i32) -> i32) -> i32 {
    let fd = real(flags);
    let helps = flags & libc::O_ACCMODE == libc::O_RDWR
        && flags & libc::O_TRUNC == 0
        && (kind != Kind::Journal || flags & libc::O_CREAT == 0);
    if fd >= 0 || sys::errno() != libc::EACCES || !helps {
        return fd;
    }
    agent::open_for_writing(managed.cluster, managed.name.bytes(), flags & libc::O_CLOEXEC != 0)
        .unwrap_or_else(fail)
}

/// Whether it is the name of a file that the agent makes up.
fn is_special(name: &[u8]) -> bool {
    name == b".primary" || name == b".lag" || name.ends_with(b"-pos") || is_lock(name)
}

/// Whether it is that of LiteFS's file for the halt lock.
fn is_lock(name: &[u8]) -> bool {
    name.ends_with(b"-lock")
}

/// Whether a path ends like that of such a file.
pub fn ends_like_special(path: &[u8]) -> bool {
    [&b".primary"[..], b".lag", b"-pos", b"-lock"].iter().any(|end| path.ends_with(end))
}

/// Whether a path ends like that of LiteFS's file for the halt lock.
pub fn ends_like_lock(path: &[u8]) -> bool {
    is_lock(path)
}

/// Such a file as it is now. `ENOENT`: there is none.
pub fn special(managed: &Managed, flags: i32) -> Result<i32, i32> {
    let asked = agent::is_own_process() && is_special(managed.name.bytes());
    if asked { open_special(managed, flags) } else { Err(libc::ENOENT) }
}

fn open_special(managed: &Managed, flags: i32) -> Result<i32, i32> {
    if managed.cluster == managed::TOO_MANY {
        return Err(libc::ENFILE);
    }
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        let fd = agent::lock_file(managed.cluster, managed.name.bytes(), flags & libc::O_CLOEXEC != 0)?;
        // Its number may have been closed in a way that was not seen.
        table::closed(fd);
        return Ok(fd);
    }
    let (words, len) = agent::special(managed.cluster, managed.name.bytes())?;
    // SAFETY: the bytes of initialised words; `len` is not more than there are.
    let content = unsafe { core::slice::from_raw_parts(words.as_ptr().cast::<u8>(), len) };
    sys::file_with(content, flags & libc::O_CLOEXEC != 0)
}

/// The flags to open with. `Err(0)`: the file is nobody's business.
fn may_open(kind: Kind, database: &'static Database, flags: i32) -> Result<i32, i32> {
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
    if !writes {
        return Ok(flags);
    }
    // Whoever only reads needs no agent, but opens databases for writing all the same. What a journal is opened for
    // needs one, and so does a program that writes a file of its own.
    let writes_now = kind == Kind::Journal || flags & libc::O_TRUNC != 0;
    let patience = if writes_now { agent::wait_ms() } else { 0 };
    match agent::attach(database, patience) {
        Ok(true) => {}
        Ok(false) => return Err(0),
        Err(_) if writes_now => return Err(libc::EIO),
        Err(_) => return Ok(flags),
    }
    if agent::may_write(database.cluster()) || kind == Kind::Journal && agent::may_write_to(database) {
        return Ok(flags);
    }
    match kind {
        Kind::Database if flags & libc::O_TRUNC != 0 => Err(libc::EROFS),
        Kind::Database => Ok(flags & !libc::O_CREAT),
        // SQLite makes "attempt to write a readonly database" of it, for this attempt only. Without O_CREAT a hot
        // journal is opened to play it back.
        Kind::Journal if flags & libc::O_CREAT != 0 => Err(libc::EACCES),
        _ => Ok(flags),
    }
}

fn refusal(name: &[u8]) -> u64 {
    let hash = name.iter().fold(0u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    hash << 32 | sys::gettid() as u32 as u64 | 1 << 31
}

/// Whether a journal was refused a moment ago: SQLite asks whether it exists, and goes on to read-only use of an old
/// one where it does.
pub fn was_refused() -> bool {
    REFUSED.load(Ordering::Relaxed) != 0
}

/// The same for this path and thread; once.
pub fn take_refusal(managed: &Managed) -> bool {
    let own = refusal(managed.name.bytes());
    REFUSED.compare_exchange(own, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

/// A write to a tracked file; `real` does it.
#[inline]
pub fn write(fd: i32, file: &File, data: &[u8], offset: u64, real: &dyn Fn() -> isize) -> isize {
    let database = file.database();
    let allowed = match file.kind() {
        Kind::Wal => return wal_write(fd, database, data, offset, real),
        Kind::Database => database_write(database, data, offset),
        Kind::Journal if offset == 0 && data.len() == JOURNAL_END && data.iter().all(|b| *b == 0) => {
            journal_ends(database)
        }
        Kind::Journal | Kind::Shm => Ok(()),
    };
    match allowed {
        Ok(()) => real(),
        Err(error) => fail(error) as isize,
    }
}

fn database_write(database: &Database, data: &[u8], offset: u64) -> Result<(), i32> {
    let journaled = database.journals.load(Ordering::Relaxed) > 0;
    if database.wals.load(Ordering::Relaxed) > 0 && !journaled {
        // A checkpoint: the WAL, and so the log, has it.
        return Ok(());
    }
    if !journaled && !agent::may_write_to(database) {
        return Err(libc::EROFS);
    }
    let mut transaction = database.transaction.lock().ok_or(libc::EDEADLK)?;
    database.touched.store(1, Ordering::Relaxed);
    transaction.add(offset, data.len() as u64);
    transaction.journaled = journaled;
    Ok(())
}

/// A transaction ends by its journal, or without one: the agent takes it over first.
fn ends(database: &Database, flags: u32) -> Result<(), i32> {
    let mut transaction = database.transaction.lock().ok_or(libc::EDEADLK)?;
    if !transaction.is_dirty() {
        transaction.clear();
        database.touched.store(0, Ordering::Relaxed);
        return Ok(());
    }
    let flags = flags
        | if transaction.synced { FLAG_SYNCED } else { 0 }
        | if transaction.unknown { FLAG_UNKNOWN } else { 0 }
        | if transaction.playback { FLAG_PLAYBACK } else { 0 };
    agent::ask(database, Op::Commit, flags, transaction.writes(), agent::wait_ms())?;
    transaction.clear();
    database.touched.store(0, Ordering::Relaxed);
    Ok(())
}

fn journal_ends(database: &Database) -> Result<(), i32> {
    ends(database, 0)
}

/// A commit over several databases is about to count: SQLite ignores what becomes of their journals afterwards, so the
/// agent takes all of it over now.
fn super_journal_ends(managed: &Managed) -> Result<(), i32> {
    for (fd, database) in table::journals(managed.cluster) {
        if names_super_journal(fd, managed.name.bytes()) {
            journal_ends(database)?;
        }
    }
    Ok(())
}

/// Whether a journal ends with the name of this super-journal (fileformat2.html, section 3; writeSuperJournal).
fn names_super_journal(journal: i32, name: &[u8]) -> bool {
    const MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
    // Length of the path, its checksum, magic; before them the path.
    let mut end = [0; 16];
    let Ok(size) = sys::fstat(journal).map(|stat| stat.st_size as u64) else { return false };
    let Some(at) = size.checked_sub(end.len() as u64) else { return false };
    if sys::pread(journal, &mut end, at) != Ok(end.len()) || end[8..] != MAGIC {
        return false;
    }
    let mut named = [0; managed::NAME_MAX];
    let Some(at) = at.checked_sub(name.len() as u64) else { return false };
    sys::pread(journal, &mut named[..name.len()], at) == Ok(name.len()) && named[..name.len()] == *name
}

fn wal_ends(database: &Database) -> Result<(), i32> {
    wal_ends_within(database, if agent::is_up(database.cluster()) { WAL_END_MS } else { 0 })
}

fn wal_ends_within(database: &Database, wait_ms: u64) -> Result<(), i32> {
    let flags = if database.synced.load(Ordering::Relaxed) != 0 { FLAG_SYNCED } else { 0 };
    agent::ask(database, Op::WalEnd, flags, &[], wait_ms)
}

fn wal_write(
    fd: i32,
    database: &'static Database,
    data: &[u8],
    offset: u64,
    real: &dyn Fn() -> isize,
) -> isize {
    database.wal_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
    if data.len() == FRAME_HEADER && offset >= WAL_HEADER as u64 {
        if data[4..8] != [0; 4] {
            let exclusive = database.is_exclusive();
            if agent::is_refused(database) || exclusive && agent::wait_until_near(database).is_err() {
                return fail(libc::EIO) as isize;
            }
            // The header of a commit that is written already gets another checksum: its transaction had spilled.
            let again = offset < database.wal_end.load(Ordering::Relaxed);
            let Some(held) = agent::begin_commit(database) else {
                return fail(libc::EROFS) as isize;
            };
            database.wal_end.store(offset + 1, Ordering::Relaxed);
            database.committed.store(1, Ordering::Relaxed);
            database.captured.store(0, Ordering::Relaxed);
            if held {
                match hold(fd, database, data, offset) {
                    Ok(true) => return FRAME_HEADER as isize,
                    Ok(false) => {}
                    Err(error) => return fail(error) as isize,
                }
            }
            if again && exclusive {
                let count = real();
                announce_exclusive(database);
                return count;
            }
        }
        return real();
    }
    if data.len() == WAL_HEADER && offset == 0 {
        // By now SQLite cannot do without, and an agent may be just starting.
        if wal_ends_within(database, agent::wait_ms()).is_err() {
            return fail(libc::EIO) as isize;
        }
        forget_held(database);
        database.wal_end.store(0, Ordering::Relaxed);
        return real();
    }
    // Also when commits need not be held any more since its header was kept back.
    let is_held = database.holding.load(Ordering::Relaxed) != 0;
    let held = if is_held { database.transaction.lock() } else { None };
    if let Some(mut transaction) = held
        && let Some(frame) = transaction.held
        && offset == frame.offset + FRAME_HEADER as u64 + frame.written
    {
        let count = real();
        if count <= 0 {
            return count;
        }
        let frame = HeldFrame { written: frame.written + count as u64, ..frame };
        transaction.held = Some(frame);
        if frame.written >= frame.page_size {
            transaction.held = None;
            database.holding.store(0, Ordering::Relaxed);
            if let Err(error) = commit_frame(fd, database, &frame) {
                return fail(error) as isize;
            }
            database.captured.store(1, Ordering::Relaxed);
            transaction.committed_end = frame.offset + FRAME_HEADER as u64 + frame.page_size;
        }
        drop(transaction);
        announce_exclusive(database);
        return count;
    }
    let count = real();
    announce_exclusive(database);
    count
}

/// With `locking_mode=EXCLUSIVE` there is no unlock that says that a commit is over. Nobody else may look at the
/// database: what the WAL has, counts.
fn announce_exclusive(database: &Database) {
    if database.is_exclusive()
        && database.committed.load(Ordering::Relaxed) != 0
        && database.transaction.lock().is_some_and(|t| t.held.is_none())
    {
        database.committed.store(0, Ordering::Relaxed);
        // Also one that was held: no wal-index says to the agent that it counts.
        database.captured.store(0, Ordering::Relaxed);
        agent::committed(database);
    }
}

/// Keeps a commit frame's header back. `false`: it is a header of before that gets another checksum.
fn hold(fd: i32, database: &Database, header: &[u8], offset: u64) -> Result<bool, i32> {
    let mut transaction = database.transaction.lock().ok_or(libc::EDEADLK)?;
    if offset < transaction.committed_end {
        return Ok(false);
    }
    let mut wal = [0; 12];
    if sys::pread(fd, &mut wal, 0)? != wal.len() {
        return Err(libc::EIO);
    }
    let page_size = u64::from(u32::from_be_bytes([wal[8], wal[9], wal[10], wal[11]]));
    let mut kept = [0; FRAME_HEADER];
    kept.copy_from_slice(header);
    transaction.held = Some(HeldFrame { offset, header: kept, page_size, written: 0 });
    database.holding.store(1, Ordering::Relaxed);
    Ok(true)
}

/// Another transaction begins, or another WAL.
fn forget_held(database: &Database) {
    if let Some(mut transaction) = database.transaction.lock() {
        transaction.committed_end = 0;
        transaction.held = None;
        database.holding.store(0, Ordering::Relaxed);
    }
}

/// The page of a held frame is written: the agent takes the transaction over, then the header makes it valid.
fn commit_frame(fd: i32, database: &Database, frame: &HeldFrame) -> Result<(), i32> {
    let mut data = [frame.offset, 0, 0, 0];
    for (word, bytes) in data[1..].iter_mut().zip(frame.header.chunks_exact(8)) {
        *word = u64::from_ne_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]);
    }
    agent::ask(database, Op::WalCommit, 0, &data, agent::wait_ms())?;
    let mut written = 0;
    while written < FRAME_HEADER {
        match sys::pwrite(fd, &frame.header[written..], frame.offset + written as u64) {
            Ok(count) => written += count,
            Err(libc::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// `fsync` and `fdatasync`.
pub fn sync(file: &File, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    if matches!(file.kind(), Kind::Database | Kind::Wal) {
        database.synced.store(1, Ordering::Relaxed);
    }
    match file.kind() {
        Kind::Journal => {
            if let Some(mut transaction) = database.transaction.lock() {
                transaction.synced = true;
            }
            real()
        }
        Kind::Database if database.is_unjournaled() => {
            let synced = real();
            if synced == 0
                && let Err(error) = ends(database, FLAG_UNJOURNALED | FLAG_SYNCED)
            {
                return fail(error);
            }
            synced
        }
        Kind::Wal if agent::holds(database) => {
            match agent::ask(database, Op::WalSync, 0, &[], agent::wait_ms()) {
                Ok(()) => 0,
                Err(error) => fail(error),
            }
        }
        _ => real(),
    }
}

/// `ftruncate`.
pub fn truncate(file: &File, len: i64, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    let allowed = match file.kind() {
        Kind::Journal if len == 0 => journal_ends(database),
        Kind::Wal if len == 0 => wal_ends(database),
        _ => Ok(()),
    };
    match allowed {
        Ok(()) => real(),
        Err(error) => fail(error),
    }
}

/// `unlink`.
#[cold]
pub fn unlink(managed: &Managed, real: &dyn Fn() -> i32) -> i32 {
    if !agent::is_own_process() {
        return real();
    }
    if table::is_super_journal(managed.name.bytes()) {
        return match super_journal_ends(managed) {
            Ok(()) => real(),
            Err(error) => fail(error),
        };
    }
    let (kind, database) = match table::database(managed) {
        Ok(found) => found,
        Err(0) => return real(),
        Err(error) => return fail(error),
    };
    let allowed = match kind {
        Kind::Journal => journal_ends(database),
        // What is in it was taken over when EXCLUSIVE was granted; now the agent only hears that it goes.
        Kind::Wal => {
            let _ = wal_ends(database);
            Ok(())
        }
        Kind::Database => {
            if agent::attach(database, agent::wait_ms()).is_ok_and(|yes| yes)
                && !agent::may_write(database.cluster())
            {
                Err(libc::EROFS)
            } else {
                agent::ask(database, Op::Drop, 0, &[], agent::wait_ms())
            }
        }
        Kind::Shm => Ok(()),
    };
    let result = match allowed {
        Ok(()) => real(),
        Err(error) => fail(error),
    };
    let error = sys::errno();
    if kind == Kind::Database && result == 0 {
        // Should this fail, the agent finds out by itself.
        let _ = agent::ask(database, Op::Dropped, 0, &[], agent::wait_ms());
    }
    table::release(database);
    sys::set_errno(error);
    result
}

/// `rename`: nothing of a database moves on a replica, and no database that somebody has open.
#[cold]
pub fn rename(from: Option<Managed>, to: Option<Managed>, real: &dyn Fn() -> i32) -> i32 {
    if !agent::is_own_process() {
        return real();
    }
    for managed in [&from, &to].into_iter().flatten() {
        if let Err(error) = may_move(managed) {
            return fail(error);
        }
    }
    let result = real();
    if result == 0 {
        let error = sys::errno();
        // Should this fail, the agent finds out by itself.
        for (managed, op) in [(from, Op::Dropped), (to, Op::Moved)] {
            if let Some((Kind::Database, database)) = managed.and_then(|m| table::database(&m).ok()) {
                let _ = agent::ask(database, op, 0, &[], agent::wait_ms());
                table::release(database);
            }
        }
        sys::set_errno(error);
    }
    result
}

fn may_move(managed: &Managed) -> Result<(), i32> {
    let (kind, database) = match table::database(managed) {
        Ok(found) => found,
        Err(0) => return Ok(()),
        Err(error) => return Err(error),
    };
    let may = match agent::attach(database, agent::wait_ms()) {
        Ok(true) if !agent::may_write(database.cluster()) => Err(libc::EROFS),
        Ok(true) if kind == Kind::Database && database.is_open() => Err(libc::EBUSY),
        Ok(true) if kind == Kind::Database => agent::ask(database, Op::Move, 0, &[], agent::wait_ms()),
        Ok(_) => Ok(()),
        Err(_) => Err(libc::EIO),
    };
    table::release(database);
    may
}

/// A descriptor of a tracked file is about to be closed.
pub fn closing(file: &File) {
    let database = file.database();
    if file.kind() == Kind::Database && database.is_unjournaled() && agent::is_own_process() {
        let error = sys::errno();
        // The agent looks at the file by itself later, should this fail.
        let _ = ends(database, FLAG_UNJOURNALED);
        sys::set_errno(error);
    }
}

/// A POSIX lock on a tracked file.
#[inline]
pub fn lock(fd: i32, file: &File, lock: &libc::flock, real: &dyn Fn() -> i32) -> i32 {
    match file.kind() {
        Kind::Shm => lock_shm(fd, file, lock, real),
        Kind::Database => lock_database(fd, file, lock, real),
        _ => real(),
    }
}

fn lock_shm(fd: i32, file: &File, lock: &libc::flock, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    let kind = i32::from(lock.l_type);
    let of_writer = lock.l_start <= WAL_WRITE && WAL_WRITE < lock.l_start + lock.l_len;
    if kind == libc::F_WRLCK && of_writer {
        // Without a valid wal-index this is somebody who reads, and has to make it first.
        if !agent::is_ready(database) && has_valid_index(fd) {
            // Commits are announced to an agent, so there has to be one, or to have been one until a moment ago: its
            // successor finds them.
            if agent::attach(database, 0).is_err()
                && !agent::was_there(database.cluster())
                && agent::attach(database, agent::wait_ms()).is_err()
            {
                return fail(libc::EIO);
            }
            if agent::turn(database) != agent::Turn::Now {
                return fail(libc::EAGAIN);
            }
            if let Err(error) = agent::wait_until_near(database) {
                return fail(error);
            }
        }
        let locked = real();
        if locked == 0 {
            database.writing.store(1, Ordering::Relaxed);
            agent::end_commit(database);
            database.committed.store(0, Ordering::Relaxed);
            // Whether commits are held may have changed since the last transaction.
            forget_held(database);
        }
        return locked;
    }
    if kind == libc::F_UNLCK && of_writer {
        database.writing.store(0, Ordering::Relaxed);
        let unlocked = real();
        if database.committed.load(Ordering::Relaxed) != 0 {
            database.committed.store(0, Ordering::Relaxed);
            agent::committed(database);
        }
        return unlocked;
    }
    if kind == libc::F_WRLCK && (lock.l_start, lock.l_len) == WAL_READERS {
        let locked = real();
        // The holder of the write lock is about to begin the WAL anew. Without this lock it just goes on.
        if locked == 0 && wal_ends(database).is_err() {
            relock(fd, libc::F_UNLCK, lock);
            return fail(libc::EAGAIN);
        }
        return locked;
    }
    real()
}

fn lock_database(fd: i32, file: &File, lock: &libc::flock, real: &dyn Fn() -> i32) -> i32 {
    let database = file.database();
    let kind = i32::from(lock.l_type);
    if kind == libc::F_WRLCK {
        if (lock.l_start, lock.l_len) == (RESERVED, 1) && agent::turn(database) == agent::Turn::Later {
            return fail(libc::EAGAIN);
        }
        let locked = real();
        let exclusive = (lock.l_start, lock.l_len) == (SHARED_FIRST, SHARED_SIZE);
        // The last one out of the WAL: it will be checkpointed and removed. Without EXCLUSIVE it stays.
        if locked == 0
            && exclusive
            && database.wals.load(Ordering::Relaxed) > 0
            && wal_ends(database).is_err()
        {
            relock(fd, libc::F_RDLCK, lock);
            return fail(libc::EAGAIN);
        }
        return locked;
    }
    // Giving up EXCLUSIVE makes a transaction without a journal visible. Readers give up their locks here too.
    let covers = lock.l_len == 0 || lock.l_start + lock.l_len > SHARED_FIRST;
    let unjournaled = || database.transaction.lock().is_some_and(|t| t.is_dirty() && !t.journaled);
    if covers && database.touched.load(Ordering::Relaxed) != 0 && database.is_unjournaled() && unjournaled() {
        let error = sys::errno();
        let refused = ends(database, FLAG_UNJOURNALED).is_err();
        if refused {
            agent::say(&[b"a transaction without a journal was refused and cannot be taken back"]);
        }
        sys::set_errno(error);
    }
    real()
}

fn relock(fd: i32, kind: i32, lock: &libc::flock) {
    let mut other = *lock;
    other.l_type = kind as i16;
    sys::set_lock(fd, &other);
}

/// Whether both copies of the wal-index header agree and are initialised (walformat.html, section 2.1).
fn has_valid_index(fd: i32) -> bool {
    let mut headers = [0; 96];
    sys::pread(fd, &mut headers, 0) == Ok(headers.len()) && headers[12] != 0 && headers[..48] == headers[48..]
}
