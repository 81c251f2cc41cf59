//! Removing files, and cutting them by name: of a database's journal that is a commit, of a super-journal one of several
//! databases, of a WAL its end, of a database a drop.

use super::answering::{Answer, finish};
use super::files;
use super::filesystem::LitefsFilesystem;
use super::inodes::Node;
use super::names::{Kind, classify};
use super::rename::errno;
use crate::DatabaseName;
use crate::capture::CaptureError;
use crate::database::Database;
use fuse_session::fuse::*;
use parking_lot::Mutex;
use sqlite_file::journal;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

impl LitefsFilesystem {
    pub(super) fn unlink_file(&self, path: &Path, internal: bool, again: bool, reply: ReplyEmpty) {
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
        if kind == Kind::SuperJournal {
            return self.super_journal_ends(path, remove, reply);
        }
        let mut st = db.state();
        let result = match kind {
            Kind::Journal => match files::journal_ends(&db, &mut st) {
                Ok(Answer::Now) => Ok(()),
                Ok(held) => {
                    drop(st);
                    let publish = move |_: &Database| remove().map_err(|e| e.code());
                    let answer = |result: Result<(), i32>| finish(result.map_err(Errno::from_i32), reply);
                    return held.then(&db, publish, answer);
                }
                Err(e) => Err(e),
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

    /// A commit over several databases is about to count: whatever becomes of their journals afterwards, SQLite reports it.
    /// So all of it is captured, and waited for, now.
    fn super_journal_ends(
        &self,
        path: &Path,
        remove: impl FnOnce() -> Result<(), Errno> + Send + 'static,
        reply: ReplyEmpty,
    ) {
        let databases = match self.databases_of_super_journal(path) {
            Ok(databases) => databases,
            Err(e) => return reply.error(errno(e)),
        };
        if databases.iter().any(|db| !db.may_write()) {
            return reply.error(Errno::EROFS);
        }
        let mut ended = Vec::new();
        let mut result = Ok(());
        for db in databases {
            let answer = files::journal_ends(&db, &mut db.state());
            match answer {
                Ok(answer) => ended.push((db, answer)),
                Err(e) => {
                    result = Err(files::errno_of(&db, "commit", &e));
                    break;
                }
            }
        }
        // Also after an error: nobody else waits for what is in the log.
        when_all(ended, result, move |result| match result {
            Ok(()) => finish(remove(), reply),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    /// The databases whose journals a super-journal names, and that name it. The names are the application's, which may see
    /// the mount at another place: what counts is how they end.
    fn databases_of_super_journal(&self, path: &Path) -> io::Result<Vec<Arc<Database>>> {
        let names = match std::fs::read(self.backing(path)) {
            // It has been removed by a request that is read again.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            names => names?,
        };
        let is_part = |db: &Arc<Database>| {
            let journal = File::open(&db.paths().journal).ok();
            let named = journal.and_then(|journal| journal::super_journal(&journal).ok().flatten());
            named.is_some_and(|named| named.file_name() == path.file_name())
        };
        let database = |name: &[u8]| {
            let (Kind::Journal, base) = classify(Path::new(OsStr::from_bytes(name))) else { return None };
            let parts: Vec<_> =
                base.components().filter(|part| matches!(part, Component::Normal(_))).collect();
            (0..parts.len()).find_map(|from| {
                let name = DatabaseName::new(parts[from..].iter().collect::<PathBuf>()).ok()?;
                self.shared.database(&name).filter(is_part)
            })
        };
        Ok(names.split(|byte| *byte == 0).filter_map(database).collect())
    }
}

/// Calls `done` once all that is waited for is so, with the first error.
fn when_all(
    waits: Vec<(Arc<Database>, Answer)>,
    result: Result<(), i32>,
    done: impl FnOnce(Result<(), i32>) + Send + 'static,
) {
    // One for this function itself: what is so at once must not end it early.
    let rest = Arc::new(Mutex::new((waits.len() + 1, result, Some(done))));
    let one_is_so = move |result: Result<(), i32>| {
        let mut rest = rest.lock();
        rest.0 -= 1;
        rest.1 = rest.1.and(result);
        if rest.0 == 0
            && let Some(done) = rest.2.take()
        {
            let result = rest.1;
            drop(rest);
            done(result);
        }
    };
    for (db, answer) in waits {
        answer.then(&db, |_| Ok(()), one_is_so.clone());
    }
    one_is_so(Ok(()));
}

/// truncate(2) without an open file: never how SQLite cuts a database.
pub(super) fn truncate_by_path(node: &Node, path: &Path, size: u64) -> Result<(), i32> {
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
