//! Which paths are below a directory of an agent.
//!
//! Agents name their directories by device and inode in the runtime directory. A path is managed when a directory above
//! it is one of those, by whatever name it is reached. Most paths are not: for these the answer is kept, per directory, for a
//! second, in a table that is read without a lock.

use crate::lock::Lock;
use crate::{directories, process, sys, table};
use core::ffi::CStr;
use core::sync::atomic::{AtomicU64, Ordering};
use shim_protocol::{REGISTRATION, RUNTIME_DIR, RUNTIME_DIR_VARIABLE, Registration};

/// Longest path.
pub const PATH_MAX: usize = 4096;
/// Longest path of a database below its directory.
pub const NAME_MAX: usize = 1024;
/// Clusters on one host that one process can use.
pub const CLUSTERS: usize = 64;
/// [`Managed::cluster`]: this process uses so many already. No file of a database is opened there.
pub const TOO_MANY: usize = usize::MAX;
/// Directories between a database and the managed one.
const DEPTH_MAX: usize = 32;
/// A negative answer counts for about so long.
const KEPT_NS: u64 = 1 << 30;

/// A path in a buffer of its own, with a zero at its end.
pub struct PathBuffer<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> PathBuffer<N> {
    pub const fn new() -> Self {
        PathBuffer { bytes: [0; N], len: 0 }
    }

    /// Appends; `false` where it does not fit.
    pub fn push(&mut self, part: &[u8]) -> bool {
        if self.len + part.len() >= N {
            return false;
        }
        self.bytes[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
        self.bytes[self.len] = 0;
        true
    }

    pub fn cut(&mut self, len: usize) {
        self.len = len.min(self.len);
        self.bytes[self.len] = 0;
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub fn c_str(&self) -> &CStr {
        match CStr::from_bytes_until_nul(&self.bytes) {
            Ok(path) => path,
            Err(_) => c"",
        }
    }
}

/// A managed directory.
#[derive(Clone, Copy)]
struct Cluster {
    device: u64,
    inode: u64,
    /// Where its agent's files are.
    runtime: [u8; 108],
    runtime_len: usize,
    /// Its registration is there. Otherwise it is no cluster any more, and its inode may be another directory's.
    registered: bool,
}

/// Those that this process has used; an index stays what it is.
struct Clusters {
    known: [Option<Cluster>; CLUSTERS],
}

static FOUND: Lock<Clusters> = Lock::new(Clusters { known: [None; CLUSTERS] });

/// Directories that are not managed: their hash, and in the low 16 bits when this was found out.
static UNMANAGED: [AtomicU64; 1024] = [const { AtomicU64::new(0) }; 1024];

fn hash(path: &[u8]) -> u64 {
    // Word by word: this is on the way of every open of a file.
    let add = |hash: u64, word: u64| {
        let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        product ^ product >> 32
    };
    let (words, rest) = path.as_chunks::<8>();
    let mut hash =
        words.iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| add(hash, u64::from_le_bytes(*word)));
    // The last eight bytes again, of which some are new.
    match path.last_chunk::<8>() {
        Some(last) if !rest.is_empty() => hash = add(hash, u64::from_le_bytes(*last)),
        Some(_) => {}
        None => hash = rest.iter().fold(hash, |hash, byte| add(hash, u64::from(*byte))),
    }
    let hash = hash ^ path.len() as u64;
    (hash ^ hash >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// A path below a managed directory.
pub struct Managed {
    /// Which.
    pub cluster: usize,
    /// Path below it.
    pub name: PathBuffer<NAME_MAX>,
}

/// Directory and name of a file, where the path can be one of a database: SQLite makes every path absolute. A zero at the
/// path's end stays at the name's.
pub fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.first() != Some(&b'/') {
        return None;
    }
    let slash = path.iter().rposition(|b| *b == b'/')?;
    let (dir, file) = (&path[..slash.max(1)], &path[slash + 1..]);
    (!file.is_empty()).then_some((dir, file))
}

/// Where it is kept that a directory is not managed, and what is there while that counts.
fn unmanaged(dir: &[u8]) -> (&'static AtomicU64, u64) {
    let key = hash(dir);
    let tick = (sys::coarse_now_ns() / KEPT_NS) & 0xffff;
    (&UNMANAGED[key as usize >> 20 & 1023], key & !0xffff | tick)
}

/// Whether a path is known to be nobody's business. This is on the way of every open of a file.
#[inline(never)]
pub fn is_unmanaged(path: &CStr) -> bool {
    let Some((dir, _)) = split(path.to_bytes()) else { return true };
    let (place, kept) = unmanaged(dir);
    place.load(Ordering::Relaxed) == kept
}

/// What a path is; `None`: nobody's business.
pub fn find(path: &CStr) -> Option<Managed> {
    if is_unmanaged(path) {
        return None;
    }
    let (dir, file) = split(path.to_bytes())?;
    let found = look(dir, file);
    if found.is_none() {
        directories::check(path);
        let (place, kept) = unmanaged(dir);
        place.store(kept, Ordering::Relaxed);
    }
    found
}

/// Walks up from a directory to a managed one.
#[cold]
fn look(dir: &[u8], file: &[u8]) -> Option<Managed> {
    let mut clusters = FOUND.lock()?;
    let mut up = PathBuffer::<PATH_MAX>::new();
    if !up.push(dir) {
        return None;
    }
    let mut above = [(0, 0); DEPTH_MAX];
    let mut count = 0;
    while count < DEPTH_MAX {
        let stat = sys::stat(up.c_str()).ok()?;
        let here = (stat.st_dev, stat.st_ino);
        if count > 0 && above[count - 1] == here {
            break;
        }
        above[count] = here;
        count += 1;
        if !up.push(b"/..") {
            break;
        }
    }
    let above = &above[..count];
    let is_known = clusters.load(above);
    let found =
        |(depth, here): (usize, &(u64, u64))| clusters.index_of(*here).map(|cluster| (depth, cluster));
    let (depth, cluster) = match above.iter().enumerate().find_map(found) {
        Some(found) => found,
        None if is_known => return None,
        None => {
            process::say(&[
                dir,
                b": this process uses 64 clusters already, databases of another cannot be opened",
            ]);
            let mut name = PathBuffer::new();
            return name.push(file).then_some(Managed { cluster: TOO_MANY, name });
        }
    };
    // The last `depth` parts of the directory, and the file.
    let mut start = dir.len();
    for _ in 0..depth {
        start = dir[..start].iter().rposition(|b| *b == b'/')?;
    }
    let mut name = PathBuffer::new();
    let below = &dir[start.min(dir.len())..];
    let below = below.strip_prefix(b"/").unwrap_or(below);
    let fits = name.push(below) && (below.is_empty() || name.push(b"/")) && name.push(file);
    fits.then_some(Managed { cluster, name })
}

/// Path of a file of a cluster's agent.
pub fn runtime_path(cluster: usize, file: &str, path: &mut PathBuffer<108>) -> bool {
    let Some(clusters) = FOUND.lock() else { return false };
    let Some(found) = clusters.known[cluster] else { return false };
    path.push(&found.runtime[..found.runtime_len]) && path.push(b"/") && path.push(file.as_bytes())
}

/// In the child of a fork.
pub fn forked() {
    FOUND.forget_holder();
}

impl Clusters {
    fn index_of(&self, (device, inode): (u64, u64)) -> Option<usize> {
        let is = |c: &Cluster| c.registered && (c.device, c.inode) == (device, inode);
        self.known.iter().position(|c| c.as_ref().is_some_and(is))
    }

    /// Reads the runtime directories, and takes up those clusters that have one of the directories `above`. `false`: there
    /// is no room for one of them.
    fn load(&mut self, above: &[(u64, u64)]) -> bool {
        // SAFETY: the name ends with a zero; the value is read at once.
        let variable = unsafe { libc::getenv(VARIABLE.as_ptr()) };
        let dirs = if variable.is_null() {
            RUNTIME_DIR.as_bytes()
        } else {
            // SAFETY: a string of the environment.
            unsafe { CStr::from_ptr(variable) }.to_bytes()
        };
        self.known.iter_mut().flatten().for_each(|cluster| cluster.registered = false);
        let mut fits = true;
        for dir in dirs.split(|b| *b == b':').filter(|dir| !dir.is_empty()) {
            let mut path = PathBuffer::<108>::new();
            if !path.push(dir) {
                continue;
            }
            fits &= self.load_registration(&mut path, above);
            fits &= self.load_below(&mut path, above);
        }
        fits
    }

    fn load_below(&mut self, path: &mut PathBuffer<108>, above: &[(u64, u64)]) -> bool {
        let mut fits = true;
        let Ok(fd) = sys::open_read(path.c_str(), libc::O_DIRECTORY) else { return fits };
        #[repr(align(8))]
        struct Entries([u8; 2048]);
        let mut entries = Entries([0; 2048]);
        let len = path.bytes().len();
        while let Ok(count @ 1..) = sys::getdents(fd, &mut entries.0) {
            let mut rest = &entries.0[..count];
            // struct linux_dirent64: inode, offset, length, type, name (getdents64(2)).
            while rest.len() > 19 {
                let size = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
                if size < 20 || size > rest.len() {
                    break;
                }
                if let Ok(name) = CStr::from_bytes_until_nul(&rest[19..size])
                    && !name.to_bytes().starts_with(b".")
                    && path.push(b"/")
                    && path.push(name.to_bytes())
                {
                    fits &= self.load_registration(path, above);
                }
                path.cut(len);
                rest = &rest[size..];
            }
        }
        sys::close(fd);
        fits
    }

    /// `path` is the directory it may be in. `false`: there is no room for it.
    fn load_registration(&mut self, path: &mut PathBuffer<108>, above: &[(u64, u64)]) -> bool {
        let len = path.bytes().len();
        let file = path.push(b"/") && path.push(REGISTRATION.as_bytes());
        let content = if file { sys::open_read(path.c_str(), 0) } else { Err(libc::ENAMETOOLONG) };
        path.cut(len);
        let Ok(fd) = content else { return true };
        let mut text = [0; 128];
        let read = sys::read(fd, &mut text);
        sys::close(fd);
        let Some(found) = read.ok().and_then(|count| Registration::parse(&text[..count])) else {
            return true;
        };
        let Registration { device, inode, .. } = found;
        let mut cluster = Cluster { device, inode, runtime: [0; 108], runtime_len: len, registered: true };
        cluster.runtime[..len].copy_from_slice(path.bytes());
        let same_place = |c: &Cluster| c.runtime[..c.runtime_len] == *path.bytes();
        // The directory of a cluster can be made anew; its place is then the same.
        let at = self.known.iter().position(|c| c.as_ref().is_some_and(same_place));
        if at.is_none() && !above.contains(&(device, inode)) {
            // Nothing of it is used here.
            return true;
        }
        let at = at.or_else(|| self.index_of((device, inode)));
        let at = at.or_else(|| self.known.iter().position(Option::is_none));
        // One that is gone, and of which nothing is open here.
        let at = at.or_else(|| {
            let unused = |at: &usize| self.known[*at].is_some_and(|c| !c.registered) && !table::uses(*at);
            (0..CLUSTERS).find(unused)
        });
        if let Some(at) = at {
            self.known[at] = Some(cluster);
        }
        at.is_some()
    }
}

const VARIABLE: &CStr = c"LITEFS_RUNTIME_DIR";
const _: () = assert!(RUNTIME_DIR_VARIABLE.len() + 1 == VARIABLE.to_bytes_with_nul().len());
