//! Finding the databases of a node at start, and recovering those that need it.

use super::LastStop;
use crate::DatabaseName;
use crate::capture::CaptureError;
use crate::database::checksums::Checksums;
use crate::database::{Database, Shared};
use crate::name::BESIDE;
use crate::status::messages;
use sqlite_file::locks::{self, LockGuard, LockKind};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// In what state a node is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Applications have outlived the last agent: nothing in the files may change.
    Live,
    /// Nobody has anything open, or what they have open is the business of a mount that is gone.
    Alone(LastStop),
}

/// What was found.
#[derive(Debug, Default)]
pub struct Discovered {
    /// Databases with a position.
    pub databases: usize,
    /// All pages of these must be compared once the role is known.
    pub compare: Vec<Arc<Database>>,
    /// SQLite files that have no position yet.
    pub untracked: Vec<Arc<Database>>,
}

/// Recovers every database that the log, a sidecar or a backing file names. One that cannot be recovered is set aside.
pub fn discover(shared: &Arc<Shared>, start: Start) -> io::Result<Discovered> {
    let mut names: BTreeSet<DatabaseName> = shared.log.databases().into_iter().collect();
    for entry in std::fs::read_dir(&shared.dirs.checksums)? {
        let path = entry?.path();
        match Checksums::read_mark(&path) {
            Ok((name, _, record_epoch)) => {
                shared.note_record_epoch(record_epoch);
                shared.database_or_new(&name).state().record_epoch = record_epoch;
                names.insert(name);
            }
            Err(error) => tracing::warn!(path = %path.display(), %error, "a sidecar cannot be read"),
        }
    }
    let mut found = Discovered::default();
    let last_stop = match start {
        Start::Live => {
            take_up(shared, &names, &mut found)?;
            return Ok(Discovered { databases: names.len(), ..found });
        }
        Start::Alone(last_stop) => last_stop,
    };
    for name in &names {
        let db = shared.database_or_new(name);
        match db.recover(last_stop) {
            Ok(_) if !db.is_tracked() && has_sqlite_header(&db.paths().database) => {
                tracing::error!(
                    MESSAGE_ID = messages::HISTORY_LOST,
                    database = %name,
                    "its history is lost; the file is taken in as a new one"
                );
                found.untracked.push(db);
            }
            Ok(recovered) if recovered.compare => found.compare.push(db),
            Ok(_) => {}
            Err(error) => {
                let mut st = db.state();
                st.quarantine(&db, error.to_string());
            }
        }
        found.databases += 1;
    }
    let mut files = Vec::new();
    main_files(&shared.dirs.files, Path::new(""), &mut files)?;
    for name in files {
        if !names.contains(&name) && has_sqlite_header(&shared.dirs.files.join(&name)) {
            let db = shared.database_or_new(&name);
            match db.recover(last_stop) {
                Ok(_) => found.untracked.push(db),
                Err(error) => tracing::warn!(database = %name, %error, "a file cannot be taken in"),
            }
        }
    }
    Ok(found)
}

/// Takes up databases that may be in use, and files that may become databases.
fn take_up(shared: &Arc<Shared>, names: &BTreeSet<DatabaseName>, found: &mut Discovered) -> io::Result<()> {
    let mut files = Vec::new();
    main_files(&shared.dirs.files, Path::new(""), &mut files)?;
    files.retain(|name| !names.contains(name) && has_sqlite_header(&shared.dirs.files.join(name)));
    for name in names.iter().chain(&files) {
        let db = shared.database_or_new(name);
        match db.reattach() {
            Ok(()) if shared.wals_may_be_ahead() => report(&db, db.capture_left_in_wal()),
            Ok(()) => {}
            Err(error) => match kept_from_applications(&db)? {
                Some(_locks) if shared.wals_may_be_ahead() => {
                    tracing::warn!(
                        database = %name,
                        %error,
                        "it cannot be taken up as it is; nobody has it open, so it is recovered"
                    );
                    // Its page checksums may be what is wrong: they are made anew from the log and the file.
                    match std::fs::remove_file(&db.paths().checksums) {
                        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                        _ => {}
                    }
                    // The inode stays: applications find it by its path, and wait for the locks.
                    match db.recover(LastStop::PowerFailed) {
                        Ok(recovered) if recovered.compare => found.compare.push(db.clone()),
                        Ok(_) => {}
                        Err(error) => db.state().quarantine(&db, error.to_string()),
                    }
                }
                _ => db.state().quarantine(&db, error.to_string()),
            },
        }
    }
    Ok(())
}

/// SQLite's EXCLUSIVE on a plain file. `None`: somebody has it open, or it is not there.
fn kept_from_applications(db: &Database) -> io::Result<Option<[LockGuard; 2]>> {
    let file = match File::options().read(true).write(true).open(&db.paths().database) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => Arc::new(file?),
    };
    let Some(pending) = LockGuard::try_acquire(&file, LockKind::Write, locks::PENDING)? else {
        return Ok(None);
    };
    let shared = LockGuard::try_acquire(&file, LockKind::Write, locks::SHARED)?;
    Ok(shared.map(|shared| [pending, shared]))
}

/// What could only be done once the role is known: on the primary, what the log does not know becomes transactions.
pub fn settle(found: &Discovered, writable: bool) {
    for db in &found.compare {
        report(db, db.compare_after_crash());
    }
    if !writable {
        return;
    }
    for db in &found.untracked {
        let mut st = db.state();
        st.rollback.mark_unknown();
        report(db, db.capture_rollback(&mut st).map(|_| ()));
    }
}

fn report(db: &Database, result: Result<(), CaptureError>) {
    if let Err(error) = result {
        let mut st = db.state();
        st.quarantine(db, error.to_string());
    }
}

fn main_files(root: &Path, below: &Path, found: &mut Vec<DatabaseName>) -> io::Result<()> {
    for entry in std::fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            main_files(root, &path, found)?;
        } else if kind.is_file()
            && let Ok(name) = DatabaseName::new(&path)
        {
            found.push(name);
        }
    }
    Ok(())
}

fn has_sqlite_header(path: &Path) -> bool {
    let mut magic = [0; 16];
    std::fs::File::open(path).and_then(|f| f.read_exact_at(&mut magic, 0)).is_ok()
        && &magic == sqlite_file::header::HEADER_MAGIC
}

/// Files below the cluster's directory that are no databases and stay on this host.
pub fn files_not_replicated(shared: &Shared, limit: usize) -> Vec<String> {
    let mut files = Vec::new();
    if main_files(&shared.dirs.files, Path::new(""), &mut files).is_err() {
        return Vec::new();
    }
    files
        .into_iter()
        .filter(|name| {
            let text = name.as_str();
            let companion = BESIDE.iter().any(|s| text.ends_with(s));
            !companion && shared.database(name).is_none_or(|db| db.glance().page_count == 0)
        })
        .map(|name| name.to_string())
        .take(limit)
        .collect()
}
