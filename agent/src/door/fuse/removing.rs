//! Removing files, and cutting them by name: of a database's journal that is a commit, of its WAL the end, of itself a
//! drop.

use super::files::{self, Answer, finish};
use super::filesystem::LitefsFilesystem;
use super::inodes::Node;
use super::names::{Kind, classify};
use super::rename::errno;
use crate::DatabaseName;
use crate::capture::CaptureError;
use crate::database::Database;
use fuse_session::fuse::*;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;

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
