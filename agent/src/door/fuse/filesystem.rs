//! The requests of the kernel: hands each on to what it is about, and answers. What a commit is, is decided in
//! [`super::files`].

use super::answering::{Answer, answer_empty, finish};
use super::attributes::{attr_of, set_ownership, set_times, special_attr};
use super::handles::{Handle, Handles};
use super::inodes::{Inodes, Node, ROOT, Special};
use super::journal_sync::SparedSyncs;
use super::kernel_cache::Invalidator;
use super::names::{Kind, POSITION_SUFFIX};
use super::opening::fopen_flags;
use super::page_count;
use super::predecessor::Predecessor;
use super::removing::truncate_by_path;
use super::rename::{Tree, errno};
use super::serving_threads::Threads;
use super::special::RoleView;
use super::workers::Workers;
use crate::database::{Database, Shared};
use crate::door::lock_file::{HaltLocks, LOCK_SUFFIX};
use fuse_session::fuse::*;
use fuse_session::{Backings, Connection, RESENT};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

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
    pub(super) view: Arc<dyn RoleView>,
    pub(super) tree: Tree,
    pub(super) locks: Arc<dyn HaltLocks>,
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
            view,
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
        };
        fs.go_on();
        Ok(fs)
    }

    /// What makes the kernel forget names.
    pub fn invalidator(&self) -> Arc<Invalidator> {
        self.invalidator.clone()
    }

    pub(super) fn backing(&self, path: &Path) -> PathBuf {
        self.tree.backing(path)
    }

    pub(super) fn may_write(&self, internal: bool) -> bool {
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
        self.threads.settle();
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
            return match special.content(&*self.view) {
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
                    Ok(Answer::Now) => Ok(()),
                    Ok(held) => {
                        let Some(db) = &file.db else { return reply.error(Errno::EIO) };
                        let (cut, shown) = (file.file.clone(), file.file.clone());
                        let publish = move |_: &Database| cut.set_len(size).map_err(|e| errno(e).code());
                        let answer = move |result: Result<(), i32>| {
                            let cut = result
                                .map_err(Errno::from_i32)
                                .and_then(|()| shown.metadata().map_err(errno));
                            match cut {
                                Ok(meta) => reply.attr(&KEEP, &attr_of(ino.0, &meta)),
                                Err(e) => reply.error(e),
                            }
                        };
                        return held.then(db, publish, answer);
                    }
                    Err(e) => Err(e),
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
        match self.make_directory(req, parent, name, mode) {
            Ok(attr) => reply.entry(&KEEP, &attr, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        finish(self.remove_directory(req, parent, name), reply);
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
                let content = special.content(&*self.view).unwrap_or_default();
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
        self.threads.settle();
        let handle = self.handles.get(fh.0);
        let written = match handle.as_deref() {
            Some(Handle::File(file)) => match file.write(offset, data, again(req)) {
                Ok(Answer::Now) => {
                    self.invalidator.keep_ahead(file, offset + data.len() as u64);
                    Ok(())
                }
                Ok(held) => {
                    self.invalidator.keep_ahead(file, offset + data.len() as u64);
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
                    return held.then(db, publish, answer);
                }
                Err(e) => Err(e),
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
