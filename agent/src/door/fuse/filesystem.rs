//! The requests of the kernel: finds what a request is about and hands it on. What a commit is, is decided in
//! [`super::files`].

use super::Threads;
use super::attributes::{attr_of, set_ownership, set_times, special_attr, special_number};
use super::files::{Answer, Handle, Handles, Invalidator, PLAIN_BIT, answer_empty, finish};
use super::inodes::{Inode, Inodes, Node, ROOT, SPECIAL_BIT, Special};
use super::journal_sync::SparedSyncs;
use super::names::{Kind, POSITION_SUFFIX};
use super::opening::fopen_flags;
use super::page_count;
use super::predecessor::Predecessor;
use super::removing::truncate_by_path;
use super::rename::{Tree, errno};
use super::special::RoleView;
use super::workers::Workers;
use crate::DatabaseName;
use crate::database::{Database, Shared};
use crate::door::lock_file::{self, HaltLocks, LOCK_SUFFIX, Opener};
use fuse_session::fuse::*;
use fuse_session::{Backings, Connection, RESENT};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;

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
    locks: Arc<dyn HaltLocks>,
    pub(super) handles: Arc<Handles>,
    pub(super) backings: Backings,
    /// What another process knew that served this mount before.
    pub(super) predecessor: Option<Predecessor>,
    want_passthrough: bool,
    pub(super) passthrough: Arc<AtomicBool>,
    pub(super) invalidator: Arc<Invalidator>,
    pub(super) workers: Workers,
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
        locks: Arc<dyn HaltLocks>,
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
            locks,
            handles: Arc::new(Handles::new(connection.handles.clone())),
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

    pub(super) fn backing(&self, path: &Path) -> PathBuf {
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

    pub(super) fn child(&self, parent: INodeNo, name: &OsStr) -> Result<PathBuf, Errno> {
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
            text if text.ends_with(LOCK_SUFFIX) => {
                lock_file::database_of(&self.shared, text).map(Special::Lock)
            }
            text => {
                let name = DatabaseName::new(text.strip_suffix(POSITION_SUFFIX)?).ok()?;
                self.shared.database(&name).filter(|db| db.is_tracked()).map(Special::Position)
            }
        }
    }

    pub(super) fn find(&self, path: &Path) -> Result<(Arc<Inode>, FileAttr), Errno> {
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

    /// Opens `NAME-lock` for writing, when the halt lock is had: until then whoever opens it waits, and nobody else.
    fn open_lock_file(&self, thread: u32, db: Arc<Database>, reply: ReplyOpen) {
        let closed = CancellationToken::new();
        let (release, handles) = (closed.clone().drop_guard(), self.handles.clone());
        let opener =
            Opener { pid: thread, closed, has_given_up: Box::new(move || lock_file::is_interrupted(thread)) };
        let told = move |got: Result<(), i32>| match got {
            Ok(()) => {
                let handle = Handle::Lock { _release: release };
                let fopen = fopen_flags(&handle, false);
                reply.opened(FileHandle(handles.add_plain(handle)), fopen);
            }
            Err(error) => reply.error(Errno::from_i32(error)),
        };
        self.locks.acquire(db, opener, Box::new(told));
    }

    fn may_write(&self, internal: bool) -> bool {
        internal || self.shared.is_writable()
    }

    /// As [`Self::may_write`], for a file of a database, which may be lent or borrowed.
    pub(super) fn may_write_file(&self, internal: bool, kind: Kind, db: Option<&Arc<Database>>) -> bool {
        match db {
            // Who opens a database that is lent writes when it is back.
            Some(db) if kind == Kind::Main => self.may_write(internal) || db.may_write(),
            Some(db) => internal || db.may_write(),
            None => self.may_write(internal),
        }
    }
}

/// Whether another server has read this request before, and may have carried it out.
pub(super) fn again(req: &Request) -> bool {
    req.unique().0 & RESENT != 0
}

/// Whether a request comes from this process. Its threads are the only ones it may trust with what the log has.
pub(super) fn is_internal(req: &Request) -> bool {
    Path::new("/proc/self/task").join(req.pid().to_string()).exists()
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
        let comes_and_goes = path.to_str().is_some_and(|path| {
            path == ".primary" || path.ends_with(POSITION_SUFFIX) || path.ends_with(LOCK_SUFFIX)
        });
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
                return match special {
                    Special::Lock(db) => self.open_lock_file(req.pid(), db, reply),
                    _ => reply.error(Errno::EACCES),
                };
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
        match self.create_file(req, parent, name, mode, flags) {
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
            Some(Handle::Lock { .. }) => reply.data(&[]),
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
            // As LiteFS says.
            Some(Handle::Lock { .. }) => Err(libc::EIO),
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
