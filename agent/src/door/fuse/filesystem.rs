//! The requests of the kernel: finds what a request is about and hands it on. What a commit is, is decided in
//! [`super::files`].

use super::Threads;
use super::files::{
    self, Answer, Handle, Handles, Invalidator, OpenFile, PLAIN_BIT, answer_empty, finish, flags,
};
use super::inodes::{Inode, Inodes, Node, OpenState, ROOT, SPECIAL_BIT, Special};
use super::journal_sync::SparedSyncs;
use super::names::{Kind, POSITION_SUFFIX, classify};
use super::page_count;
use super::predecessor::Predecessor;
use super::rename::{Tree, errno};
use super::special::RoleView;
use super::staged::StagedWrite;
use super::workers::Workers;
use crate::DatabaseName;
use crate::capture::CaptureError;
use crate::database::{Database, Shared};
use fuse_session::fuse::*;
use fuse_session::{Backing, Backings, Connection, OpenHandle, RESENT};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Every change of a backing file goes through the mount, or is followed by an invalidation; so the kernel may keep
/// what it knows. Without this a read in rollback mode costs an upcall to see that there is no journal.
const KEEP: Duration = Duration::from_secs(3600);
/// Special files come and go by themselves.
const FORGET: Duration = Duration::ZERO;
/// Largest write of the kernel in one request.
const WRITE_BYTES_MAX: u32 = 1024 * 1024;

/// The file system behind the mount.
#[derive(Debug)]
pub struct LitefsFilesystem {
    pub(super) shared: Arc<Shared>,
    view: ViewDebug,
    pub(super) tree: Tree,
    pub(super) handles: Handles,
    pub(super) backings: Backings,
    /// What another process knew that served this mount before.
    pub(super) predecessor: Option<Predecessor>,
    want_passthrough: bool,
    passthrough: Arc<AtomicBool>,
    invalidator: Arc<Invalidator>,
    workers: Workers,
    spared: SparedSyncs,
    threads: Threads,
    /// Threads that have found their CPU.
    settled: AtomicUsize,
}

/// A role view, without its content in debug output.
struct ViewDebug(Arc<dyn RoleView>);

impl std::fmt::Debug for ViewDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RoleView")
    }
}

impl LitefsFilesystem {
    /// A file system over the node's backing files.
    pub fn new(
        shared: Arc<Shared>,
        view: Arc<dyn RoleView>,
        want_passthrough: bool,
        passthrough: Arc<AtomicBool>,
        threads: Threads,
        connection: &Connection,
    ) -> io::Result<Self> {
        let inodes = Arc::new(Inodes::default());
        let invalidator = Arc::new(Invalidator::default());
        let root = shared.dirs.files.clone();
        {
            let root = root.clone();
            invalidator.run(move |dir| {
                if dir.as_os_str().is_empty() {
                    Some(ROOT)
                } else {
                    root.join(dir).metadata().ok().map(|m| m.ino())
                }
            })?;
        }
        std::fs::create_dir_all(&shared.dirs.orphans)?;
        let fs = LitefsFilesystem {
            tree: Tree { shared: shared.clone(), inodes, root },
            shared,
            view: ViewDebug(view),
            handles: Handles::new(connection.handles.clone()),
            backings: connection.backings(),
            predecessor: connection.is_taken_over().then(Predecessor::default),
            want_passthrough,
            passthrough,
            invalidator,
            workers: Workers::start()?,
            spared: SparedSyncs::default(),
            threads,
            settled: AtomicUsize::new(0),
        };
        fs.go_on();
        Ok(fs)
    }

    /// An open handle. Of directories and special files another server of the mount has left none, and needs to leave none.
    fn plain_handle(&self, inode: INodeNo, handle: FileHandle) -> Option<Arc<Handle>> {
        let known = self.handles.get(handle.0);
        if known.is_some() || self.predecessor.is_none() || handle.0 & PLAIN_BIT == 0 {
            return known;
        }
        let made = match self.inode(inode.0).ok()?.node() {
            Node::Directory => Handle::Directory { inode: inode.0, entries: OnceLock::new() },
            Node::Special(special) => Handle::Special(special),
            Node::File(..) => return None,
        };
        self.handles.insert(handle.0, made);
        self.handles.get(handle.0)
    }

    /// An inode the kernel knows.
    fn inode(&self, number: u64) -> Result<Arc<Inode>, Errno> {
        if let Some(inode) = self.tree.inodes.get(number) {
            return Ok(inode);
        }
        let known = self.predecessor.as_ref().and_then(|predecessor| predecessor.find(&self.tree, number));
        known.ok_or(Errno::ENOENT)
    }

    /// What makes the kernel forget names.
    pub fn invalidator(&self) -> Arc<Invalidator> {
        self.invalidator.clone()
    }

    /// Puts a serving thread on its CPU at its first request.
    fn settle_thread(&self) {
        thread_local!(static SETTLED: Cell<bool> = const { Cell::new(false) });
        if !self.threads.pinned || SETTLED.replace(true) {
            return;
        }
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let cpus: Vec<usize> =
            (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
        let mut own = CpuSet::new();
        if let Some(cpu) = cpus.get(self.settled.fetch_add(1, Ordering::Relaxed) % cpus.len().max(1))
            && own.set(*cpu).is_ok()
            && let Err(error) = sched_setaffinity(Pid::from_raw(0), &own)
        {
            tracing::debug!(%error, cpu, "a thread of the mount stays unpinned");
        }
    }

    fn backing(&self, path: &Path) -> PathBuf {
        self.tree.backing(path)
    }

    /// A directory's entries: inode, is a directory, name.
    fn list(&self, number: u64) -> Result<Vec<(u64, bool, OsString)>, Errno> {
        let inode = self.inode(number)?;
        let dir = inode.path();
        let mut entries = vec![(number, true, OsString::from(".")), (ROOT, true, OsString::from(".."))];
        for entry in std::fs::read_dir(self.backing(&dir)).map_err(errno)? {
            let entry = entry.map_err(errno)?;
            let meta = entry.metadata().map_err(errno)?;
            let name = entry.file_name();
            if let Node::File(Kind::Main, Some(db)) = self.tree.node_for(&dir.join(&name), meta.is_dir())
                && db.state().page_count > 0
            {
                let mut position = name.clone();
                position.push(POSITION_SUFFIX);
                entries.push((SPECIAL_BIT | meta.ino(), false, position));
            }
            entries.push((meta.ino(), meta.is_dir(), name));
        }
        if number == ROOT {
            entries.push((SPECIAL_BIT, false, OsString::from(".lag")));
            if self.view.0.primary_hostname().is_some() {
                entries.push((SPECIAL_BIT | 1, false, OsString::from(".primary")));
            }
        }
        Ok(entries)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Result<PathBuf, Errno> {
        let dir = self.inode(parent.0)?;
        match dir.node() {
            Node::Directory => Ok(dir.path().join(name)),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// The special file at a path, where there is one now.
    pub(super) fn special_at(&self, path: &Path) -> Option<Special> {
        match path.to_str()? {
            ".primary" => Some(Special::Primary),
            ".lag" => Some(Special::Lag),
            text => {
                let name = DatabaseName::new(text.strip_suffix(POSITION_SUFFIX)?).ok()?;
                self.shared.database(&name).filter(|db| db.is_tracked()).map(Special::Position)
            }
        }
    }

    fn find(&self, path: &Path) -> Result<(Arc<Inode>, FileAttr), Errno> {
        if let Some(special) = self.special_at(path) {
            let content = special.content(&*self.view.0).ok_or(Errno::ENOENT)?;
            let number = special_number(path);
            let attr = special_attr(number, &special, content.len() as u64);
            return Ok((self.tree.inodes.looked_up(number, path, || Node::Special(special)), attr));
        }
        let meta = self.backing(path).symlink_metadata().map_err(errno)?;
        let inode = self.tree.inodes.looked_up(meta.ino(), path, || self.tree.node_for(path, meta.is_dir()));
        let attr = self.attr(&inode, &meta);
        Ok((inode, attr))
    }

    fn attr(&self, inode: &Inode, meta: &Metadata) -> FileAttr {
        let mut attr = attr_of(inode.number, meta);
        if inode.open.lock().orphan {
            attr.nlink = attr.nlink.saturating_sub(1);
        }
        if let Node::File(Kind::Wal, Some(db)) = inode.node() {
            // Never less than the kernel has: it would drop pages that a writer has filled and is about to send.
            let st = db.state();
            attr.size = st.wal.visible_len(attr.size.max(st.wal_cached_end));
        }
        attr
    }

    fn may_write(&self, internal: bool) -> bool {
        internal || self.shared.is_writable()
    }

    /// As [`Self::may_write`], for a file of a database, which may be lent or borrowed.
    fn may_write_file(&self, internal: bool, kind: Kind, db: Option<&Arc<Database>>) -> bool {
        match db {
            // Who opens a database that is lent writes when it is back.
            Some(db) if kind == Kind::Main => self.may_write(internal) || db.may_write(),
            Some(db) => internal || db.may_write(),
            None => self.may_write(internal),
        }
    }

    /// Opens a regular file: decides how, and keeps the handle.
    fn open_file(
        &self,
        inode: &Arc<Inode>,
        flags: i32,
        internal: bool,
        created: bool,
        request: u64,
    ) -> Result<Opened, Errno> {
        let Node::File(kind, db) = inode.node() else { return Err(Errno::EISDIR) };
        if request & RESENT != 0
            && let Some(number) = self.handles.table.opened_by(request & !RESENT)
            && let Some(opened) = self.opened_before(number)
        {
            return Ok(opened);
        }
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
        // SQLite opens databases for reading and writing, and never truncates them at open.
        let plain_program =
            !internal && (flags & libc::O_ACCMODE == libc::O_WRONLY || flags & libc::O_TRUNC != 0);
        if writes
            && !matches!(kind, Kind::Wal | Kind::Shm)
            && !self.may_write_file(internal, kind, db.as_ref())
        {
            // SQLite goes on read-only after EROFS; a journal it must not be able to make.
            return Err(if kind == Kind::Journal { Errno::EACCES } else { Errno::EROFS });
        }
        let (mut tracked, mut wal_mode) = (false, false);
        if let (Kind::Main, Some(db)) = (kind, &db) {
            let mut st = db.state();
            tracked = st.page_count > 0;
            if tracked
                && !internal
                && let Some(reason) = st.quarantine_reason()
            {
                tracing::warn!(database = %db.name(), reason, "an application opened a quarantined database");
                return Err(Errno::EIO);
            }
            wal_mode = db.load_journal_mode(&mut st);
        }
        let replaces = kind == Kind::Main && tracked && plain_program;
        if replaces && flags & libc::O_TRUNC == 0 {
            tracing::info!(path = %inode.path().display(), "refused to open a live database for writing in place");
            return Err(Errno::EPERM);
        }

        let mut open = inode.open.lock();
        let file = match &open.file {
            Some(file) => file.clone(),
            None => {
                Arc::new(open_backing_file(&self.backing(&inode.path())).map_err(|e| match e.kind() {
                    // The kernel's entry is older than the removal of the file: it looks again.
                    io::ErrorKind::NotFound => Errno::ESTALE,
                    _ => errno(e),
                })?)
            }
        };
        let suits = match kind {
            Kind::Main => wal_mode,
            Kind::Shm => true,
            Kind::Journal | Kind::Wal | Kind::SuperJournal => false,
        };
        let passes = self.passthrough.load(Ordering::Acquire)
            && if open.handles > 0 { open.backing.is_some() } else { suits };
        let backing = match (&open.backing, passes) {
            (Some(id), true) => Some(id.clone()),
            (None, true) => Some(Arc::new(self.backings.register(&file).map_err(|e| {
                tracing::error!(path = %inode.path().display(), error = %e, "cannot register a backing file");
                Errno::EIO
            })?)),
            _ => None,
        };

        let adopts = match kind {
            Kind::Main => !replaces && !tracked && (plain_program || (created && flags & libc::O_EXCL != 0)),
            Kind::Wal => plain_program,
            Kind::Journal | Kind::Shm | Kind::SuperJournal => false,
        };
        let truncated = flags & libc::O_TRUNC != 0;
        let mut table_flags = files::flags::OPEN;
        for (set, flag) in [
            (internal, flags::INTERNAL),
            (adopts, flags::ADOPT),
            (truncated, flags::WRITTEN),
            (replaces, flags::STAGED),
        ] {
            table_flags |= if set { flag } else { 0 };
        }
        let number = self.handles.table.add(OpenHandle {
            inode: inode.number,
            request: request & !RESENT,
            backing: backing.as_ref().map_or(0, |backing| backing.id()),
            flags: table_flags,
        });
        let number = number.ok_or(Errno::ENFILE)?;
        let made = if replaces {
            db.clone().ok_or(Errno::EIO).and_then(|db| {
                StagedWrite::new(db, number).map(|copy| Handle::Staged(Arc::new(copy))).map_err(errno)
            })
        } else {
            let cut = if truncated && !created { file.set_len(0).map_err(errno) } else { Ok(()) };
            cut.map(|()| {
                Handle::File(OpenFile {
                    inode: inode.clone(),
                    kind,
                    db: db.clone(),
                    file: file.clone(),
                    internal,
                    passthrough: backing.is_some(),
                    adopt: adopts,
                    written: AtomicBool::new(truncated),
                    number,
                    table: self.handles.table.clone(),
                })
            })
        };
        let handle = made.inspect_err(|_| self.handles.table.remove(number))?;
        let fopen = fopen_flags(&handle, backing.is_some());
        open.handles += 1;
        open.file = Some(file.clone());
        open.backing.clone_from(&backing);
        drop(open);
        self.count_opened(&handle);
        if let (Kind::Main, Some(db)) = (kind, &db) {
            let mut st = db.state();
            if st.passthrough_handles == 1 && backing.is_some() {
                let _ = st.remember_stamp(db);
            }
            st.set_database_file(Some(file));
        }
        self.handles.insert(number, handle);
        Ok((number, fopen, backing))
    }

    /// Counts an open handle in its database's state.
    pub(super) fn count_opened(&self, handle: &Handle) {
        if let Handle::File(OpenFile {
            kind: Kind::Main, db: Some(db), adopt, internal, passthrough, ..
        }) = handle
        {
            let mut st = db.state();
            st.copiers += u32::from(*adopt);
            st.handles += u32::from(!internal);
            st.passthrough_handles += u32::from(*passthrough);
        }
        if let Handle::File(OpenFile { kind: Kind::Journal, db: Some(db), internal: false, .. }) = handle {
            let mut st = db.state();
            st.journal_handles += 1;
            st.journal_left = false;
        }
    }

    /// What the answer to an open was, or should have been, that another server has carried out.
    fn opened_before(&self, number: u64) -> Option<Opened> {
        let handle = self.handles.get(number)?;
        let backing = match &*handle {
            Handle::File(file) if file.passthrough => file.inode.open.lock().backing.clone(),
            _ => None,
        };
        Some((number, fopen_flags(&handle, backing.is_some()), backing))
    }

    fn close_file(&self, inode: &Inode, file: Option<&OpenFile>) {
        let mut open = inode.open.lock();
        open.handles = open.handles.saturating_sub(1);
        if open.handles == 0 {
            if open.orphan {
                let _ = std::fs::remove_file(self.shared.dirs.orphan(inode.number));
            }
            *open = OpenState::default();
        }
        drop(open);
        if let Some(OpenFile { kind: Kind::Journal, db: Some(db), internal: false, .. }) = file {
            let mut st = db.state();
            st.journal_handles = st.journal_handles.saturating_sub(1);
        }
        if let (Node::File(Kind::Main, Some(db)), Some(file)) = (inode.node(), file) {
            let mut st = db.state();
            st.copiers = st.copiers.saturating_sub(u32::from(file.adopt));
            st.handles = st.handles.saturating_sub(u32::from(!file.internal));
            if file.passthrough && st.page_count > 0 && !db.load_journal_mode(&mut st) {
                // What it wrote since the database left WAL mode was not seen: the sweep looks.
                if st.stamp_changed(&db).unwrap_or(true) {
                    st.rollback.mark_unknown();
                }
            }
            st.passthrough_handles = st.passthrough_handles.saturating_sub(u32::from(file.passthrough));
        }
    }

    fn unlink_file(&self, path: &Path, internal: bool, again: bool, reply: ReplyEmpty) {
        let (kind, base) = classify(path);
        let (tree, removed) = (self.tree.clone(), path.to_owned());
        let remove = move || {
            if kind != Kind::Journal {
                tree.keep_if_open(&removed);
            }
            match std::fs::remove_file(tree.backing(&removed)) {
                Err(e) if again && e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other.map_err(errno),
            }
        };
        let db = DatabaseName::new(&base).ok().and_then(|name| self.shared.database(&name));
        let Some(db) = db.filter(|_| !internal) else { return finish(remove(), reply) };
        if !db.may_write() && !matches!(kind, Kind::Wal | Kind::Shm) {
            return reply.error(if db.is_lent() { Errno::EBUSY } else { Errno::EROFS });
        }
        let mut st = db.state();
        let result = match kind {
            Kind::Journal => match files::journal_ends(&db, &mut st) {
                Ok(Answer::WhenAcknowledged(hold)) => {
                    drop(st);
                    let publish = move |_: &Database| remove().map_err(|e| e.code());
                    let answer = |result: Result<(), i32>| finish(result.map_err(Errno::from_i32), reply);
                    return db.when_acknowledged(hold, publish, answer);
                }
                Ok(Answer::WhenDurable(end)) => {
                    drop(st);
                    let done = Box::new(move |result: Result<(), _>| match result {
                        Ok(()) => finish(remove(), reply),
                        Err(_) => reply.error(Errno::EIO),
                    });
                    return self.shared.log.on_durable(end, done);
                }
                other => other.map(|_| ()),
            },
            Kind::Wal => match files::wal_ends(&db, &mut st) {
                Err(CaptureError::WalIsNeeded) => {
                    drop(st);
                    let invalidator = self.invalidator.clone();
                    return self.workers.sync(move || {
                        let removed = files::wal_is_removed(&db, &invalidator);
                        let removed =
                            removed.map_err(|e| Errno::from_i32(files::errno_of(&db, "remove the WAL", &e)));
                        finish(removed.and_then(|()| remove()), reply);
                    });
                }
                other => other,
            },
            Kind::Main if st.page_count > 0 => db.log_drop(&mut st),
            Kind::Main => {
                st.set_database_file(None);
                st.rollback = Default::default();
                Ok(())
            }
            _ => Ok(()),
        };
        drop(st);
        match result {
            Ok(()) => finish(remove(), reply),
            Err(e) => reply.error(Errno::from_i32(files::errno_of(&db, "remove", &e))),
        }
    }
}

/// Number of a handle, how the kernel shall treat it, and its backing file.
type Opened = (u64, FopenFlags, Option<Arc<Backing>>);

fn fopen_flags(handle: &Handle, passthrough: bool) -> FopenFlags {
    let mut fopen = FopenFlags::empty();
    match handle {
        // The kernel must not keep what is written: the database is as it was until the copy is complete.
        Handle::Staged(_) => fopen |= FopenFlags::FOPEN_DIRECT_IO,
        Handle::File(file) => {
            // A flush of the agent's own handles would be a request of a dying process to itself. And the kernel locks the
            // file for it: whoever closes a WAL would wait for a commit in it that waits for followers.
            if file.internal || !file.adopt {
                fopen |= FopenFlags::FOPEN_NOFLUSH;
            }
            if file.kind == Kind::Journal {
                // Read only to roll back: the kernel's cache would cut its writes and save nothing.
                fopen |= FopenFlags::FOPEN_DIRECT_IO;
            } else if !passthrough {
                fopen |= FopenFlags::FOPEN_KEEP_CACHE;
            }
        }
        Handle::Special(_) => fopen |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
        Handle::Directory { .. } => {}
    }
    fopen
}

/// Whether another server has read this request before, and may have carried it out.
fn again(req: &Request) -> bool {
    req.unique().0 & RESENT != 0
}

/// The kernel has checked the application's rights (`default_permissions`); the agent's own suffice for both ways.
fn open_backing_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Whether a request comes from this process. Its threads are the only ones it may trust with what the log has.
fn is_internal(req: &Request) -> bool {
    Path::new("/proc/self/task").join(req.pid().to_string()).exists()
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanos = Duration::from_nanos(nanoseconds.unsigned_abs());
    match u64::try_from(seconds) {
        Ok(s) => UNIX_EPOCH + Duration::from_secs(s) + nanos,
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + nanos,
    }
}

fn attr_of(number: u64, m: &Metadata) -> FileAttr {
    let kind = FileType::from_std(m.file_type()).unwrap_or(FileType::RegularFile);
    FileAttr {
        ino: INodeNo(number),
        size: m.size(),
        blocks: m.blocks(),
        atime: time(m.atime(), m.atime_nsec()),
        mtime: time(m.mtime(), m.mtime_nsec()),
        ctime: time(m.ctime(), m.ctime_nsec()),
        crtime: UNIX_EPOCH,
        kind,
        perm: (m.mode() & 0o7777) as u16,
        nlink: m.nlink() as u32,
        uid: m.uid(),
        gid: m.gid(),
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

/// Inode number of a special file.
pub(super) fn special_number(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    SPECIAL_BIT | (hasher.finish() & (SPECIAL_BIT - 1))
}

fn special_attr(number: u64, special: &Special, size: u64) -> FileAttr {
    let changed = match special {
        Special::Position(db) => time(db.state().last_change_ms / 1000, 0),
        Special::Primary | Special::Lag => SystemTime::now(),
    };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: 1,
        atime: changed,
        mtime: changed,
        ctime: changed,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0o444,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

impl Filesystem for LitefsFilesystem {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ATOMIC_O_TRUNC | InitFlags::FUSE_PARALLEL_DIROPS;
        if let Err(missing) = config.add_capabilities(wanted) {
            tracing::debug!(?missing, "the kernel lacks FUSE capabilities");
            let _ = config.add_capabilities(wanted - missing);
        }
        let _ = config.set_max_write(WRITE_BYTES_MAX);
        if self.want_passthrough
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok()
        {
            self.passthrough.store(true, Ordering::Release);
        } else {
            tracing::info!("database files are served by the agent: no FUSE passthrough");
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.settle_thread();
        let path = match self.child(parent, name) {
            Ok(path) => path,
            Err(e) => return reply.error(e),
        };
        let comes_and_goes = path.to_str().is_some_and(|p| p == ".primary" || p.ends_with(POSITION_SUFFIX));
        match self.find(&path) {
            Ok((inode, attr)) => {
                let keep = if matches!(inode.node(), Node::Special(_)) { FORGET } else { KEEP };
                reply.entry(&keep, &attr, Generation(0));
            }
            // A negative entry that the kernel keeps saves a request for each journal that is not there.
            Err(e) if e.code() == libc::ENOENT && !comes_and_goes => {
                let attr = FileAttr { ino: INodeNo(0), ..special_attr(0, &Special::Lag, 0) };
                reply.entry(&KEEP, &attr, Generation(0));
            }
            Err(e) => reply.error(e),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.tree.inodes.forget(ino.0, nlookup);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let Ok(inode) = self.inode(ino.0) else { return reply.error(Errno::ENOENT) };
        if let Node::Special(special) = inode.node() {
            return match special.content(&*self.view.0) {
                Some(content) => reply.attr(&FORGET, &special_attr(ino.0, &special, content.len() as u64)),
                None => reply.error(Errno::ENOENT),
            };
        }
        // An unlinked file that is still open has no path.
        let open = fh.and_then(|fh| self.handles.get(fh.0)).and_then(|h| match &*h {
            Handle::File(f) => f.file.metadata().ok(),
            _ => None,
        });
        let open = open.or_else(|| inode.open.lock().file.as_ref().and_then(|f| f.metadata().ok()));
        match open.map_or_else(|| self.backing(&inode.path()).symlink_metadata(), Ok) {
            Ok(meta) => {
                let attr = self.attr(&inode, &meta);
                let answer = move || reply.attr(&KEEP, &attr);
                match page_count::asked_for_size(&inode) {
                    Some(db) if !is_internal(req) => page_count::state_soon(db, answer),
                    _ => answer(),
                }
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuse_session::fuse::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Ok(inode) = self.inode(ino.0) else { return reply.error(Errno::ENOENT) };
        let internal = is_internal(req);
        let node = inode.node();
        let companion = matches!(node, Node::File(Kind::Wal | Kind::Shm, _));
        if matches!(node, Node::Special(_)) {
            return reply.error(Errno::EPERM);
        }
        let may_write = match &node {
            Node::File(kind, db) => self.may_write_file(internal, *kind, db.as_ref()),
            _ => self.may_write(internal),
        };
        if !may_write && !companion {
            return reply.error(Errno::EROFS);
        }
        let path = self.backing(&inode.path());
        if let Some(size) = size {
            let handle = fh.and_then(|fh| self.handles.get(fh.0));
            let result = match handle.as_deref() {
                Some(Handle::File(file)) => match file.set_len(size) {
                    Ok(Answer::WhenAcknowledged(hold)) => {
                        let Some(db) = &file.db else { return reply.error(Errno::EIO) };
                        let (cut, shown) = (file.file.clone(), file.file.clone());
                        let publish = move |_: &Database| {
                            cut.set_len(size).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
                        };
                        let answer = move |result: Result<(), i32>| {
                            let cut = result
                                .map_err(Errno::from_i32)
                                .and_then(|()| shown.metadata().map_err(errno));
                            match cut {
                                Ok(meta) => reply.attr(&KEEP, &attr_of(ino.0, &meta)),
                                Err(e) => reply.error(e),
                            }
                        };
                        return db.when_acknowledged(hold, publish, answer);
                    }
                    Ok(Answer::WhenDurable(end)) => {
                        let file = file.file.clone();
                        let done = move |durable: Result<(), _>| {
                            let cut = durable.map_err(|_| Errno::EIO).and_then(|()| {
                                file.set_len(size).and_then(|()| file.metadata()).map_err(errno)
                            });
                            match cut {
                                Ok(meta) => reply.attr(&KEEP, &attr_of(ino.0, &meta)),
                                Err(e) => reply.error(e),
                            }
                        };
                        return self.shared.log.on_durable(end, Box::new(done));
                    }
                    other => other.map(|_| ()),
                },
                Some(Handle::Staged(copy)) => {
                    copy.set_len(size).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
                }
                Some(_) => Err(libc::EINVAL),
                None => truncate_by_path(&node, &path, size),
            };
            if let Err(e) = result {
                return reply.error(Errno::from_i32(e));
            }
        }
        if let Err(e) = set_ownership(&path, mode, uid, gid).and_then(|()| set_times(&path, atime, mtime)) {
            return reply.error(errno(e));
        }
        self.getattr(req, ino, fh, reply);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let made = (|| {
            let path = self.child(parent, name)?;
            if !self.may_write(is_internal(req)) {
                return Err(Errno::EROFS);
            }
            if self.special_at(&path).is_some() {
                return Err(Errno::EEXIST);
            }
            let backing = self.backing(&path);
            match std::fs::DirBuilder::new().mode(mode).create(&backing) {
                Err(e) if again(req) && e.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(errno)?,
            }
            std::os::unix::fs::chown(&backing, Some(req.uid()), Some(req.gid())).map_err(errno)?;
            // The agent's own umask is not the application's, which the kernel has applied.
            let mode = std::fs::Permissions::from_mode(mode & 0o7777);
            std::fs::set_permissions(&backing, mode).map_err(errno)?;
            self.find(&path)
        })();
        match made {
            Ok((_, attr)) => reply.entry(&KEEP, &attr, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.child(parent, name).and_then(|path| {
            if !self.may_write(is_internal(req)) {
                return Err(Errno::EROFS);
            }
            match std::fs::remove_dir(self.backing(&path)) {
                Err(e) if again(req) && e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other.map_err(errno),
            }
        });
        finish(removed, reply);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.child(parent, name) {
            Ok(path) => match self.special_at(&path) {
                // It goes with its database; rm -r must not fail on it.
                Some(Special::Position(_)) => reply.ok(),
                Some(_) => reply.error(Errno::EPERM),
                None => self.unlink_file(&path, is_internal(req), again(req), reply),
            },
            Err(e) => reply.error(e),
        }
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let paths = self.child(parent, name).and_then(|from| Ok((from, self.child(newparent, newname)?)));
        let (from, to) = match paths {
            Ok(paths) => paths,
            Err(e) => return reply.error(e),
        };
        if self.special_at(&from).is_some() || self.special_at(&to).is_some() {
            return reply.error(Errno::EPERM);
        }
        if !self.may_write(is_internal(req)) {
            return reply.error(Errno::EROFS);
        }
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            return reply.error(Errno::EINVAL);
        }
        if again(req) && !self.backing(&from).exists() && self.backing(&to).exists() {
            return reply.ok();
        }
        let (tree, no_replace) = (self.tree.clone(), flags.contains(RenameFlags::RENAME_NOREPLACE));
        self.workers.sync(move || finish(tree.rename(&from, &to, no_replace), reply));
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Ok(inode) = self.inode(ino.0) else { return reply.error(Errno::ENOENT) };
        if let Node::Special(special) = inode.node() {
            if flags.acc_mode() != OpenAccMode::O_RDONLY {
                return reply.error(Errno::EACCES);
            }
            let handle = Handle::Special(special);
            let fopen = fopen_flags(&handle, false);
            return reply.opened(FileHandle(self.handles.add_plain(handle)), fopen);
        }
        let internal = is_internal(req);
        if !internal
            && let Node::File(Kind::Journal, Some(db)) = inode.node()
            && db.has_journal_of_dead_apply()
        {
            // SQLite opens it again when it is told that it was interrupted, and then finds it empty.
            let end = move || {
                if let Err(error) = db.roll_back_dead_apply() {
                    tracing::warn!(database = %db.name(), %error, "cannot take back what a dead agent applied in part");
                }
                reply.error(Errno::EINTR);
            };
            return self.workers.through_mount(end);
        }
        match self.open_file(&inode, flags.0, internal, false, req.unique().0) {
            Ok((fh, fopen, Some(backing))) => backing.opened(reply, FileHandle(fh), fopen),
            Ok((fh, fopen, None)) => reply.opened(FileHandle(fh), fopen),
            Err(e) => reply.error(e),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let internal = is_internal(req);
        let made = (|| {
            let path = self.child(parent, name)?;
            if self.special_at(&path).is_some() {
                return Err(Errno::EEXIST);
            }
            let (kind, base) = classify(&path);
            let db = DatabaseName::new(&base).ok().and_then(|name| self.shared.database(&name));
            if !matches!(kind, Kind::Wal | Kind::Shm) && !self.may_write_file(internal, kind, db.as_ref()) {
                return Err(if kind == Kind::Journal { Errno::EACCES } else { Errno::EROFS });
            }
            let backing = self.backing(&path);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(flags & libc::O_EXCL != 0 && !again(req))
                .create(true)
                .truncate(false)
                .mode(mode)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&backing)
                .map_err(errno)?;
            // The umask of this process must not count, the application's already has.
            file.set_permissions(std::fs::Permissions::from_mode(mode & 0o7777)).map_err(errno)?;
            if !internal {
                std::os::unix::fs::fchown(&file, Some(req.uid()), Some(req.gid())).map_err(errno)?;
            }
            let (inode, attr) = self.find(&path)?;
            if let Node::File(Kind::Wal, Some(db)) = inode.node() {
                let mut st = db.state();
                st.wal.reset();
                st.wal_cached_end = 0;
            }
            let opened = self.open_file(&inode, flags, internal, true, req.unique().0)?;
            Ok((attr, opened))
        })();
        match made {
            Ok((attr, (fh, fopen, Some(backing)))) => {
                backing.created(reply, &KEEP, &attr, FileHandle(fh), fopen);
            }
            Ok((attr, (fh, fopen, None))) => {
                reply.created(&KEEP, &attr, Generation(0), FileHandle(fh), fopen)
            }
            Err(e) => reply.error(e),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.plain_handle(ino, fh).as_deref() {
            Some(Handle::File(file)) => match file.read(offset, size) {
                Ok(data) => reply.data(&data),
                Err(e) => reply.error(errno(e)),
            },
            Some(Handle::Special(special)) => {
                let content = special.content(&*self.view.0).unwrap_or_default();
                let from = (offset as usize).min(content.len());
                reply.data(&content[from..(from + size as usize).min(content.len())]);
            }
            _ => reply.error(Errno::EBADF),
        }
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.settle_thread();
        let handle = self.handles.get(fh.0);
        let written = match handle.as_deref() {
            Some(Handle::File(file)) => match file.write(offset, data, again(req)) {
                Ok(Answer::WhenDurable(end)) => {
                    let (file, data) = (file.file.clone(), data.to_vec());
                    let done =
                        move |durable: Result<(), _>| match durable.map_err(|_| libc::EIO).and_then(|()| {
                            file.write_all_at(&data, offset)
                                .map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
                        }) {
                            Ok(()) => reply.written(data.len() as u32),
                            Err(e) => reply.error(Errno::from_i32(e)),
                        };
                    return self.shared.log.on_durable(end, Box::new(done));
                }
                Ok(Answer::WhenAcknowledged(hold)) => {
                    file.keep_ahead_cached(&self.invalidator, offset + data.len() as u64);
                    let Some(db) = &file.db else { return reply.error(Errno::EIO) };
                    let (handle, written) = (handle.clone(), data.len() as u32);
                    // What a WAL lacks is a header that the database's state keeps.
                    let data = if file.kind == Kind::Wal { Vec::new() } else { data.to_vec() };
                    let publish = move |db: &Database| match handle.as_deref() {
                        Some(Handle::File(file)) => file.finish_held_write(db, offset, &data),
                        _ => Err(libc::EBADF),
                    };
                    let answer = move |result: Result<(), i32>| match result {
                        Ok(()) => reply.written(written),
                        Err(e) => reply.error(Errno::from_i32(e)),
                    };
                    return db.when_acknowledged(hold, publish, answer);
                }
                other => {
                    file.keep_ahead_cached(&self.invalidator, offset + data.len() as u64);
                    other.map(|_| ())
                }
            },
            Some(Handle::Staged(copy)) => {
                copy.write(offset, data).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
            }
            _ => Err(libc::EBADF),
        };
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(Errno::from_i32(e)),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        match self.handles.get(fh.0).as_deref() {
            Some(Handle::File(file)) => answer_empty(&self.workers, file, file.closed(), reply),
            Some(Handle::Staged(copy)) => {
                let copy = copy.clone();
                self.workers.through_mount(move || finish(copy.install().map_err(Errno::from_i32), reply));
            }
            _ => reply.ok(),
        }
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        match self.handles.remove(fh.0).as_deref() {
            Some(Handle::File(file)) => {
                if file.kind == Kind::Wal && !file.adopt {
                    // Whoever wrote it in another way than SQLite; what fails is told, and tried with the next write.
                    let _ = file.closed();
                }
                self.close_file(&file.inode, Some(file));
            }
            Some(Handle::Staged(_)) => {
                if let Some(inode) = self.tree.inodes.get(ino.0) {
                    self.close_file(&inode, None);
                }
            }
            _ => {}
        }
        reply.ok();
    }

    fn fsync(&self, req: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.handles.get(fh.0).as_deref() {
            Some(Handle::File(file)) => {
                answer_empty(&self.workers, file, file.sync(req.pid(), &self.spared), reply)
            }
            _ => reply.ok(),
        }
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // SQLite opens directories only to sync them: they are listed when they are read.
        let handle = self.handles.add_plain(Handle::Directory { inode: ino.0, entries: OnceLock::new() });
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let handle = self.plain_handle(ino, fh);
        let Some(Handle::Directory { inode, entries }) = handle.as_deref() else {
            return reply.error(Errno::EBADF);
        };
        let entries = match entries.get() {
            Some(entries) => entries,
            None => match self.list(*inode) {
                Ok(listed) => entries.get_or_init(|| listed),
                Err(e) => return reply.error(e),
            },
        };
        for (i, (number, is_dir, name)) in entries.iter().enumerate().skip(offset as usize) {
            let kind = if *is_dir { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(*number), i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.handles.remove(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let synced = self.inode(ino.0).map(|inode| self.backing(&inode.path())).and_then(|directory| {
            if self.spared.spare_directory(&directory, req.pid()) {
                return Ok(());
            }
            File::open(directory).and_then(|dir| dir.sync_all()).map_err(errno)
        });
        finish(synced, reply);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match nix::sys::statvfs::statvfs(&self.tree.root) {
            Ok(s) => reply.statfs(
                s.blocks(),
                s.blocks_free(),
                s.blocks_available(),
                s.files(),
                s.files_free(),
                s.block_size() as u32,
                s.name_max() as u32,
                s.fragment_size() as u32,
            ),
            Err(e) => reply.error(Errno::from_i32(e as i32)),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel seeks by itself then.
        reply.error(Errno::ENOSYS);
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}

/// truncate(2) without an open file: never how SQLite cuts a database.
fn truncate_by_path(node: &Node, path: &Path, size: u64) -> Result<(), i32> {
    if let Node::File(kind, Some(db)) = node {
        let mut st = db.state();
        match kind {
            Kind::Main if st.page_count > 0 => return Err(libc::EPERM),
            Kind::Journal if size == 0 => {
                // Not how SQLite ends a journal: nothing is held for it.
                db.capture_rollback(&mut st).map_err(|e| files::errno_of(db, "commit", &e))?;
            }
            Kind::Wal if size == 0 => {
                files::wal_ends(db, &mut st).map_err(|e| files::errno_of(db, "truncate the WAL", &e))?;
            }
            _ => {}
        }
    }
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(size))
        .map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
}

fn set_ownership(path: &Path, mode: Option<u32>, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    if let Some(mode) = mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o7777))?;
    }
    if uid.is_some() || gid.is_some() {
        std::os::unix::fs::chown(path, uid, gid)?;
    }
    Ok(())
}

fn set_times(path: &Path, atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>) -> io::Result<()> {
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;
    if atime.is_none() && mtime.is_none() {
        return Ok(());
    }
    let spec = |t: Option<TimeOrNow>| match t {
        None => TimeSpec::UTIME_OMIT,
        Some(TimeOrNow::Now) => TimeSpec::UTIME_NOW,
        Some(TimeOrNow::SpecificTime(t)) => {
            TimeSpec::from_duration(t.duration_since(UNIX_EPOCH).unwrap_or_default())
        }
    };
    let (atime, mtime) = (spec(atime), spec(mtime));
    utimensat(nix::fcntl::AT_FDCWD, path, &atime, &mtime, UtimensatFlags::NoFollowSymlink)
        .map_err(io::Error::from)
}
