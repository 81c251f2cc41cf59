//! Opening a file of a database: who may, and what is remembered of it.

use crate::managed::Managed;
use crate::table::{self, Database, Kind};
use crate::{agent, directories, process, special, sys};
use core::ffi::CStr;
use core::sync::atomic::{AtomicU64, Ordering};

/// The journal whose creation was refused last, and by which thread: a hash.
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// `open`: decides whether, and remembers what was opened.
#[cold]
pub fn open(path: &CStr, managed: &Managed, flags: i32, real: &dyn Fn(i32) -> i32) -> i32 {
    if !process::is_own() {
        return real(flags);
    }
    let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
    if special::is_special(managed.name.bytes()) && reads || special::is_lock(managed.name.bytes()) {
        match special::open(managed, flags) {
            // A database, or another file, may have this name.
            Err(libc::ENOENT) if !reads => {}
            Err(libc::ENOENT) => return real(flags),
            Ok(fd) => return fd,
            Err(error) => return sys::fail(error),
        }
    }
    let (kind, database) = match table::database(managed) {
        Ok(found) => found,
        Err(0) => {
            directories::check(path);
            return real(flags);
        }
        Err(error) => return sys::fail(error),
    };
    let file = match table::reserve() {
        Ok(file) => file,
        Err(error) => {
            table::release(database);
            return sys::fail(error);
        }
    };
    let fd = match may_open(kind, database, flags) {
        Ok(flags) => open_with_help(managed, kind, flags, real),
        Err(0) => {
            table::unreserve(file);
            table::release(database);
            directories::check(path);
            return real(flags);
        }
        Err(error) => {
            if kind == Kind::Journal {
                REFUSED.store(refusal(managed.name.bytes()), Ordering::Relaxed);
            }
            sys::fail(error)
        }
    };
    if fd < 0 {
        let error = sys::errno();
        table::unreserve(file);
        table::release(database);
        return sys::fail(error);
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
        Ok(opened) => {
            // SQLite opens directories too, to sync them.
            if kind == Kind::Database && opened.st_mode & libc::S_IFMT == libc::S_IFREG {
                database.place.take(path, &opened);
            }
            fd
        }
        Err(error) => {
            // More than 65,536 descriptors. Closing this one would drop the locks that SQLite has through others.
            if database.is_open() {
                process::say(&[
                    managed.name.bytes(),
                    b": its descriptor is too high for a database's, and is lost",
                ]);
            } else {
                sys::close(fd);
            }
            table::unreserve(file);
            table::release(database);
            sys::fail(error)
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
        .unwrap_or_else(sys::fail)
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
    let patience = if writes_now { process::wait_ms() } else { 0 };
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
