//! Programs that use the cluster's directory without the preload library: nothing tells the agent of what they do, so it
//! looks. What they write on the primary is captured afterwards; a file that is copied in becomes a database.

use super::requests::{self, Look};
use crate::DatabaseName;
use crate::database::{Database, Shared};
use crate::door::fuse::RoleView;
use fuse_session::Mounter;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use sqlite_file::locks::{self, LockKind};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A process with the library may have written to a database, and be gone, for so long without being known: it looks so
/// often whether there is another agent, and its end takes a moment to be noticed.
const KNOWN_AFTER: Duration = Duration::from_secs(2);

/// What keeps track of the directory.
pub struct Bystanders {
    shared: Arc<Shared>,
    view: Arc<dyn RoleView>,
    mounter: Mounter,
    inotify: Inotify,
    /// Watched directories, below the cluster's, for what comes and goes in them.
    directories: HashMap<WatchDescriptor, PathBuf>,
    /// Watched files, for the end of writing. A watch of the directory would tell that too, but would cost each read and
    /// write of a file in it more than a tenth.
    files: HashMap<WatchDescriptor, PathBuf>,
    /// A file could not be watched: directories are.
    has_no_room: bool,
    /// Files to watch from now on.
    unwatched: BTreeSet<PathBuf>,
    /// Databases that have a WAL.
    with_wal: BTreeSet<DatabaseName>,
    /// Files in which something may have changed that no process has reported.
    changed: BTreeSet<DatabaseName>,
    /// Databases whose foreign writers were named.
    warned: HashSet<DatabaseName>,
    /// Since when.
    since: Instant,
}

impl Bystanders {
    /// Watches all directories.
    pub fn new(shared: Arc<Shared>, view: Arc<dyn RoleView>, mounter: Mounter) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let mut this = Bystanders {
            shared,
            view,
            mounter,
            inotify,
            directories: HashMap::new(),
            files: HashMap::new(),
            has_no_room: false,
            unwatched: BTreeSet::new(),
            with_wal: BTreeSet::new(),
            changed: BTreeSet::new(),
            warned: HashSet::new(),
            since: Instant::now(),
        };
        this.watch(Path::new(""))?;
        this.watch_files();
        // Recovery has looked at those that are known. In WAL mode nothing else would lead to a look at the file.
        let shared = &this.shared;
        this.changed.retain(|name| shared.database(name).is_none_or(|db| db.is_suspect_in_wal_mode()));
        Ok(this)
    }

    fn watch(&mut self, directory: &Path) -> io::Result<()> {
        let path = self.shared.dirs.files.join(directory);
        let mut events = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        if self.has_no_room {
            events |= AddWatchFlags::IN_CLOSE_WRITE;
        }
        match self.inotify.add_watch(&path, events) {
            Ok(watch) => drop(self.directories.insert(watch, directory.to_owned())),
            Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        // After the watch: what comes later is told.
        for entry in std::fs::read_dir(&path)? {
            let entry = entry?;
            let below = directory.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                self.watch(&below)?;
            } else {
                self.note(&below);
            }
        }
        Ok(())
    }

    fn note(&mut self, path: &Path) {
        let Some(text) = path.to_str() else { return };
        let suffixed = |suffix| text.strip_suffix(suffix).and_then(|base| DatabaseName::new(base).ok());
        if let Some(name) = suffixed("-wal") {
            self.with_wal.insert(name);
        } else if let Some(name) = suffixed("-journal") {
            // One that is kept (TRUNCATE, PERSIST) is closed after each transaction.
            self.unwatched.insert(path.to_owned());
            self.changed.insert(name);
        } else if suffixed("-shm").is_none()
            && let Ok(name) = DatabaseName::new(text)
        {
            self.unwatched.insert(path.to_owned());
            self.changed.insert(name);
        }
    }

    /// Watches the files that were noted. They are looked at afterwards: whoever closes one later is told.
    fn watch_files(&mut self) {
        let events = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_DONT_FOLLOW;
        for path in std::mem::take(&mut self.unwatched) {
            if self.has_no_room {
                continue;
            }
            match self.inotify.add_watch(&self.shared.dirs.files.join(&path), events) {
                // The same watch as before where it is the same file, by whatever name.
                Ok(watch) => drop(self.files.insert(watch, path)),
                Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => {}
                Err(error) => {
                    tracing::warn!(
                        path = %path.display(),
                        %error,
                        "a file cannot be watched: directories are, which makes reads slower (see \
                         fs.inotify.max_user_watches)"
                    );
                    self.has_no_room = true;
                    self.watch_again();
                }
            }
        }
    }

    fn watch_again(&mut self) {
        if let Err(error) = self.watch(Path::new("")) {
            tracing::error!(%error, "the cluster's directory cannot be read");
        }
    }

    /// Takes in what has happened since the last look.
    pub fn look(&mut self) {
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(error) => {
                    tracing::error!(%error, "changes of the cluster's directory cannot be read");
                    break;
                }
            };
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    self.watch_again();
                    continue;
                }
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    self.files.remove(&event.wd);
                    self.directories.remove(&event.wd);
                    continue;
                }
                if let Some(path) = self.files.get(&event.wd).cloned() {
                    self.note(&path);
                    continue;
                }
                let (Some(directory), Some(name)) = (self.directories.get(&event.wd), event.name) else {
                    continue;
                };
                let path = directory.join(name);
                if event.mask.contains(AddWatchFlags::IN_ISDIR) {
                    if event.mask.contains(AddWatchFlags::IN_MOVED_FROM)
                        && let Ok(directory) = DatabaseName::new(&path)
                    {
                        let moved = self.shared.below(&directory);
                        self.changed.extend(moved.iter().map(|db| db.name().clone()));
                    }
                    if event.mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)
                        && let Err(error) = self.watch(&path)
                    {
                        tracing::warn!(directory = %path.display(), %error, "a directory cannot be watched");
                    }
                } else {
                    self.note(&path);
                }
            }
        }
        self.watch_files();
        if !self.shared.is_writable() {
            // Between its start and its term a primary is no replica: what its applications commit then is captured.
            if self.view.primary_hostname().is_none() {
                return;
            }
            self.shared.write_protection.begin(&self.shared);
            // Here files are looked at; a WAL is when there are transactions of the primary to add to it.
            for name in std::mem::take(&mut self.changed) {
                let Some(db) = self.shared.database(&name).filter(|db| db.paths().database.exists()) else {
                    continue;
                };
                self.shared.write_protection.cover(&db);
                // Who writes under a halt lock may wait for the primary with the database's state in hand.
                if db.lender().is_some() || requests::look_at_replica(&db) == Look::Later {
                    self.changed.insert(name);
                }
            }
            return;
        }
        let with_wal = std::mem::take(&mut self.with_wal);
        for name in with_wal {
            let Some(db) = self.shared.database(&name) else {
                self.changed.insert(name);
                continue;
            };
            let mut captured = false;
            requests::follow_for(&db, &mut captured);
            if captured {
                self.warn(&db);
            }
            if db.paths().wal.exists() {
                self.with_wal.insert(name);
            }
        }
        for name in std::mem::take(&mut self.changed) {
            let exists = self.shared.dirs.files.join(&name).exists();
            let known = self.shared.database(&name);
            if !exists {
                if let Some(db) = known {
                    requests::note_removed(&db);
                }
                continue;
            }
            let db = known.unwrap_or_else(|| self.shared.database_or_new(&name));
            if !db.is_complete_database() {
                continue;
            }
            match requests::note_foreign_write(&db) {
                Look::Known => {}
                Look::Later => drop(self.changed.insert(name)),
                Look::Foreign if db.state().page_count > 0 => self.warn(&db),
                Look::Foreign => {}
            }
        }
    }

    fn may_have_had_the_library(&self, db: &Database) -> bool {
        let st = db.state();
        let recently = st.released.is_some_and(|at| at.elapsed() < KNOWN_AFTER);
        st.handles > 0 || recently || self.since.elapsed() < KNOWN_AFTER
    }

    /// Says, once for each database, that somebody writes it without the library.
    fn warn(&mut self, db: &Arc<Database>) {
        let writer = match user(db, &self.mounter) {
            User::WithLibrary => return,
            User::Without(pid) => Some(pid),
            // It has gone already, or may be one with the library.
            User::Unknown if self.may_have_had_the_library(db) => return,
            User::Unknown => None,
        };
        if !self.warned.insert(db.name().clone()) {
            return;
        }
        let program = writer
            .and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok())
            .map_or_else(|| "a program".to_owned(), |comm| comm.trim_end().to_owned());
        tracing::warn!(
            database = %db.name(),
            pid = writer,
            "{program} writes the database without the preload library: its commits are captured afterwards, and are \
             not refused when this host is primary no longer; start it with `litefs exec`"
        );
    }
}

/// Who has a database open in WAL mode.
enum User {
    /// Somebody whose agent this is, or will be again.
    WithLibrary,
    Without(i32),
    Unknown,
}

fn user(db: &Database, mounter: &Mounter) -> User {
    let holder = File::open(&db.paths().shm)
        .and_then(|index| locks::conflicting_holder(&index, LockKind::Write, locks::WAL_DMS));
    let Some(pid) = holder.ok().flatten().and_then(|holder| holder.pid) else { return User::Unknown };
    match mounter.has_library(pid.cast_unsigned()) {
        Ok(true) => User::WithLibrary,
        Ok(false) => User::Without(pid),
        Err(_) => User::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::follow::tests::replica_with_foreign_write;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct View(AtomicBool);
    impl RoleView for View {
        fn primary_hostname(&self) -> Option<String> {
            self.0.load(Ordering::Relaxed).then(|| "node1".into())
        }
        fn lag_ms(&self) -> Option<i64> {
            None
        }
    }

    #[test]
    fn what_was_written_is_judged_as_on_a_replica_only_beside_a_primary() {
        let (_dir, db) = replica_with_foreign_write();
        let view = Arc::new(View::default());
        let shared = db.shared().clone();
        let mut bystanders = Bystanders::new(shared, view.clone(), Mounter::own()).unwrap();
        bystanders.look();
        assert_eq!(db.state().quarantine_reason(), None);
        view.0.store(true, Ordering::Relaxed);
        bystanders.look();
        assert!(db.state().quarantine_reason().is_some());
    }
}
