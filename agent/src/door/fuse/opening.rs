//! Opening and closing regular files and `NAME-lock`: who may, whether the kernel passes their reads and writes through, and what the
//! database's state counts.

use super::files::OpenFile;
use super::filesystem::{LitefsFilesystem, again, is_internal};
use super::handles::{Handle, flags};
use super::inodes::{Inode, Node, OpenState};
use super::names::{Kind, classify};
use super::rename::errno;
use super::staged::StagedWrite;
use crate::DatabaseName;
use crate::database::Database;
use crate::door::lock_file::{self, Opener};
use fuse_session::fuse::*;
use fuse_session::{Backing, OpenHandle, RESENT};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio_util::sync::CancellationToken;

/// Number of a handle, how the kernel shall treat it, and its backing file.
pub(super) type Opened = (u64, FopenFlags, Option<Arc<Backing>>);

impl LitefsFilesystem {
    /// Makes a file, or opens the one that is there.
    pub(super) fn create_file(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        flags: i32,
    ) -> Result<(FileAttr, Opened), Errno> {
        let internal = is_internal(req);
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
    }

    /// Opens a regular file: decides how, and keeps the handle.
    pub(super) fn open_file(
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
        let mut table_flags = flags::OPEN;
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

    /// Opens `NAME-lock` for writing, when the halt lock is had: until then whoever opens it waits, and nobody else.
    pub(super) fn open_lock_file(&self, thread: u32, db: Arc<Database>, reply: ReplyOpen) {
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

    pub(super) fn close_file(&self, inode: &Inode, file: Option<&OpenFile>) {
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
}

pub(super) fn fopen_flags(handle: &Handle, passthrough: bool) -> FopenFlags {
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
        Handle::Special(_) | Handle::Lock { .. } => {
            fopen |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH
        }
        Handle::Directory { .. } => {}
    }
    fopen
}

/// The kernel has checked the application's rights (`default_permissions`); the agent's own suffice for both ways.
fn open_backing_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)
}
