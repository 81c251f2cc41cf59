//! When a request is answered that ends a transaction or syncs a file: at once, or when the log, the followers or the disk have
//! what it promises.

use super::files::OpenFile;
use super::workers::Workers;
use crate::database::Database;
use crate::log::Lsn;
use crate::sync::Hold;
use crate::write_out;
use fuse_session::fuse::{Errno, ReplyEmpty};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// When a request may be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Now.
    Now,
    /// When the log is durable up to here.
    WhenDurable(Lsn),
    /// When followers have the commit.
    WhenAcknowledged(Hold),
    /// When the file is synced.
    WhenSynced,
    /// When the file is synced, and the directory that it is in.
    WhenEntrySynced,
}

impl Answer {
    /// Does what the request was held for (`publish`) at its time, and calls `answer` with the result. What waits for a sync is
    /// not held: see [`answer_empty`].
    pub fn then(
        self,
        db: &Arc<Database>,
        publish: impl FnOnce(&Database) -> Result<(), i32> + Send + 'static,
        answer: impl FnOnce(Result<(), i32>) + Send + 'static,
    ) {
        match self {
            Answer::WhenAcknowledged(hold) => db.when_acknowledged(hold, publish, answer),
            Answer::WhenDurable(end) if db.shared().log.durable() < end => {
                let published = db.clone();
                let durable = move |durable: Result<(), _>| {
                    answer(durable.map_err(|_| libc::EIO).and_then(|()| publish(&published)));
                };
                db.shared().log.on_durable(end, Box::new(durable));
            }
            Answer::WhenDurable(_) | Answer::Now | Answer::WhenSynced | Answer::WhenEntrySynced => {
                answer(publish(db));
            }
        }
    }
}

/// Answers an empty reply.
pub fn finish(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

/// Answers an empty reply at its time.
pub fn answer_empty(workers: &Workers, file: &OpenFile, answer: Result<Answer, i32>, reply: ReplyEmpty) {
    match (answer, &file.db) {
        (Ok(answer @ (Answer::WhenSynced | Answer::WhenEntrySynced)), db) => {
            let file = file.file.clone();
            let directory = db.as_ref().filter(|_| answer == Answer::WhenEntrySynced);
            let directory = directory.and_then(|db| db.paths().journal.parent()).map(Path::to_owned);
            workers.sync(move || {
                let synced = write_out::whole(&file).and_then(|()| file.sync_data());
                let synced = synced.and_then(|()| match directory {
                    Some(directory) => File::open(directory)?.sync_all(),
                    None => Ok(()),
                });
                match synced {
                    Ok(()) => reply.ok(),
                    Err(e) => reply.error(Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))),
                }
            });
        }
        (Ok(answer), Some(db)) => {
            answer.then(db, |_| Ok(()), move |result| finish(result.map_err(Errno::from_i32), reply));
        }
        (Ok(_), None) => reply.ok(),
        (Err(errno), _) => reply.error(Errno::from_i32(errno)),
    }
}
