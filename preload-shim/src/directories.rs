//! The directories of open databases, kept open. In rollback modes SQLite looks at each read whether there is a journal, and
//! whether there is a WAL, and most of such a look is the walk to their directory.
//!
//! While a database is open its path leads to the same directory, or its files are where SQLite does not find them
//! (howtocorrupt.html, section 2.4): a look in the directory finds what belongs to the database. A path of which an `open`
//! shows that it leads to another directory now is no longer looked up here. Only descriptors with high numbers are used:
//! if one is closed in a way that is not seen, its number is hardly ever that of another directory before this library sees
//! who has it.

use crate::lock::Lock;
use crate::managed::{self, PathBuffer};
use crate::{own, sys};
use core::ffi::{CStr, c_char, c_int};
use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering, fence};

/// Directories with open databases in one process; to those of more it is walked.
const DIRECTORIES: usize = 16;
/// Longer paths are walked.
const PATH_WORDS: usize = 32;
/// With a zero at the end.
const PATH_BYTES: usize = PATH_WORDS * 8 + 1;

/// A directory; can be read without a lock.
struct Directory {
    /// Odd while it changes, and another number afterwards.
    version: AtomicU32,
    descriptor: AtomicI32,
    /// Device and inode.
    identity: [AtomicU64; 2],
    /// Bytes of its path; 0: nothing is looked up here.
    len: AtomicU32,
    path: [AtomicU64; PATH_WORDS],
    /// Open databases that are in it.
    databases: AtomicU32,
}

static DIRECTORY: [Directory; DIRECTORIES] = [const { Directory::new() }; DIRECTORIES];
/// How many are kept: asked at every `stat`.
static KEPT: AtomicU32 = AtomicU32::new(0);
/// Held while they change.
static CHANGES: Lock<()> = Lock::new(());

/// Status of a journal or a WAL, by `look` at its name in a directory. `None`: its directory is not kept.
#[inline]
pub fn look(path: *const c_char, look: impl FnOnce(c_int, *const c_char) -> c_int) -> Option<c_int> {
    if KEPT.load(Ordering::Relaxed) == 0 || path.is_null() {
        return None;
    }
    // SAFETY: the application gives a string that ends with a zero.
    look_in_kept(unsafe { CStr::from_ptr(path) }, look)
}

fn look_in_kept(path: &CStr, look: impl FnOnce(c_int, *const c_char) -> c_int) -> Option<c_int> {
    let bytes = path.to_bytes();
    if !bytes.ends_with(b"-journal") && !bytes.ends_with(b"-wal") {
        return None;
    }
    let (dir, name) = managed::split(path.to_bytes_with_nul())?;
    let (directory, version) = DIRECTORY.iter().find_map(|d| d.is(dir).map(|version| (d, version)))?;
    let fd = directory.descriptor.load(Ordering::Relaxed);
    let result = look(fd, name.as_ptr().cast());
    fence(Ordering::Acquire);
    let was_kept = directory.version.load(Ordering::Relaxed) == version;
    (was_kept && (result == 0 || sys::errno() == libc::ENOENT)).then_some(result)
}

/// The kept directory of an open database.
pub struct Place(AtomicU32);

impl Place {
    /// None.
    pub const fn none() -> Self {
        Place(AtomicU32::new(0))
    }

    /// The database was opened by this path, and is this file.
    pub fn take(&self, path: &CStr, file: &libc::stat) {
        let Some((dir, name)) = managed::split(path.to_bytes_with_nul()) else { return };
        let Some(_changes) = CHANGES.lock() else { return };
        let has_it = |fd| {
            let found = sys::stat_at(fd, name.as_ptr().cast());
            found.is_ok_and(|found| (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino))
        };
        let mut known = DIRECTORY.iter().position(|directory| directory.is(dir).is_some());
        if let Some(at) = known
            && !has_it(DIRECTORY[at].descriptor.load(Ordering::Relaxed))
        {
            // The path leads to another one now.
            DIRECTORY[at].forget_path();
            known = None;
        }
        if self.0.load(Ordering::Relaxed) != 0 {
            return;
        }
        let Some(at) = known.or_else(|| keep(dir, has_it)) else { return };
        DIRECTORY[at].databases.fetch_add(1, Ordering::Relaxed);
        self.0.store(at as u32 + 1, Ordering::Relaxed);
    }

    /// The database is closed.
    pub fn leave(&self) {
        let Some(_changes) = CHANGES.lock() else { return };
        let Some(at) = self.0.swap(0, Ordering::Relaxed).checked_sub(1) else { return };
        let directory = &DIRECTORY[at as usize % DIRECTORIES];
        if directory.databases.fetch_sub(1, Ordering::Relaxed) == 1 {
            KEPT.fetch_sub(1, Ordering::Relaxed);
            let fd = directory.set(b"", -1);
            if fd >= 0 && directory.is_still(fd) {
                sys::close(fd);
            }
        }
    }
}

/// Opens a directory to keep it, if it `has_it`: the file for whose sake.
fn keep(dir: &[u8], has_it: impl Fn(c_int) -> bool) -> Option<usize> {
    let at = DIRECTORY.iter().position(|d| d.databases.load(Ordering::Relaxed) == 0)?;
    let mut path = PathBuffer::<PATH_BYTES>::new();
    if !path.push(dir) {
        return None;
    }
    let fd = sys::open_directory(path.c_str()).ok()?;
    let Some(stat) = sys::fstat(fd).ok().filter(|_| has_it(fd)) else {
        sys::close(fd);
        return None;
    };
    lost(fd);
    own::add(fd);
    let [device, inode] = &DIRECTORY[at].identity;
    device.store(stat.st_dev, Ordering::Relaxed);
    inode.store(stat.st_ino, Ordering::Relaxed);
    DIRECTORY[at].set(dir, fd);
    KEPT.fetch_add(1, Ordering::Relaxed);
    Some(at)
}

/// Whether a descriptor is one of these.
pub fn owns(fd: c_int) -> bool {
    DIRECTORY.iter().any(|directory| directory.descriptor.load(Ordering::Relaxed) == fd)
}

/// The lowest of these from `first` on.
pub fn next_own(first: u32) -> Option<u32> {
    let own = DIRECTORY.iter().map(|directory| directory.descriptor.load(Ordering::Relaxed));
    own.filter(|fd| *fd >= 0 && *fd as u32 >= first).map(|fd| fd as u32).min()
}

/// A descriptor is somebody else's, or will be in a moment.
pub fn give_up(fd: c_int) {
    if let Some(_changes) = CHANGES.lock() {
        lost(fd);
    }
}

/// The same, with `CHANGES` held.
fn lost(fd: c_int) {
    for directory in DIRECTORY.iter().filter(|d| d.descriptor.load(Ordering::Relaxed) == fd) {
        directory.set(b"", -1);
    }
}

/// A file was opened by this path, and is none of a database: whether its directory, if it is kept, still is the same.
pub fn check(path: &CStr) {
    if KEPT.load(Ordering::Relaxed) == 0 {
        return;
    }
    let Some((dir, _)) = managed::split(path.to_bytes_with_nul()) else { return };
    let Some(_changes) = CHANGES.lock() else { return };
    let Some(known) = DIRECTORY.iter().find(|directory| directory.is(dir).is_some()) else { return };
    let mut path = PathBuffer::<PATH_BYTES>::new();
    let same = path.push(dir) && sys::stat(path.c_str()).is_ok_and(|stat| known.has_identity(&stat));
    if !same {
        known.forget_path();
    }
}

/// In the child of a fork, which has the descriptors as well. What another thread was changing is kept no longer.
pub fn forked() {
    CHANGES.forget_holder();
    let mut kept = 0;
    for directory in &DIRECTORY {
        if !directory.version.load(Ordering::Relaxed).is_multiple_of(2) {
            directory.set(b"", -1);
        }
        kept += u32::from(directory.databases.load(Ordering::Relaxed) > 0);
    }
    KEPT.store(kept, Ordering::Relaxed);
}

/// Bytes of a path as words, the last one filled up with zeros.
fn words(path: &[u8]) -> impl Iterator<Item = u64> {
    path.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    })
}

impl Directory {
    const fn new() -> Self {
        Directory {
            version: AtomicU32::new(0),
            descriptor: AtomicI32::new(-1),
            identity: [const { AtomicU64::new(0) }; 2],
            len: AtomicU32::new(0),
            path: [const { AtomicU64::new(0) }; PATH_WORDS],
            databases: AtomicU32::new(0),
        }
    }

    /// Its version, if this is its path. It counts if that is its version afterwards.
    fn is(&self, path: &[u8]) -> Option<u32> {
        let version = self.version.load(Ordering::Acquire);
        let same = version.is_multiple_of(2)
            && self.len.load(Ordering::Relaxed) as usize == path.len()
            && words(path).zip(&self.path).all(|(word, own)| word == own.load(Ordering::Relaxed));
        (same && !path.is_empty()).then_some(version)
    }

    /// Whether a descriptor, which was its own, is this directory: it may have been closed in a way that was not seen.
    fn is_still(&self, fd: c_int) -> bool {
        sys::fstat(fd).is_ok_and(|stat| self.has_identity(&stat))
    }

    fn has_identity(&self, stat: &libc::stat) -> bool {
        self.identity.each_ref().map(|number| number.load(Ordering::Relaxed)) == [stat.st_dev, stat.st_ino]
    }

    /// Changes it; gives the descriptor that it had. Nobody else does meanwhile, and the path is not too long.
    fn set(&self, path: &[u8], fd: c_int) -> c_int {
        // It is odd already where a fork came in between.
        let changing = self.version.load(Ordering::Relaxed) | 1;
        self.version.store(changing, Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, own) in words(path).zip(&self.path) {
            own.store(word, Ordering::Relaxed);
        }
        self.len.store(path.len() as u32, Ordering::Relaxed);
        let before = self.descriptor.swap(fd, Ordering::Relaxed);
        self.version.store(changing.wrapping_add(1), Ordering::Release);
        before
    }

    /// Nothing is looked up here any more.
    fn forget_path(&self) {
        self.set(b"", self.descriptor.load(Ordering::Relaxed));
    }
}
