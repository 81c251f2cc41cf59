//! Payloads that are files of their own: `ltx/<database>/<first>-<last>.ltx` beside the log.

use super::commit_log::Shared;
use super::error::LogError;
use super::format::{self, EXTERNAL_TAIL_BYTES, NewPayload};
use super::record::{Lsn, NewRecord};
use super::storage::{Storage, StorageFile};
use crate::DatabaseName;
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

/// The file's size, and the CRC of its last bytes.
pub fn look_at(file: &dyn StorageFile) -> io::Result<(u64, u64)> {
    let size = file.len()?;
    let mut tail = [0; EXTERNAL_TAIL_BYTES as usize];
    let n = file.read_at(&mut tail, size.saturating_sub(EXTERNAL_TAIL_BYTES))?;
    Ok((size, format::crc(&tail[..n])))
}

impl Shared {
    /// Where the external payloads of a database are.
    pub(super) fn external_dir(&self, database: &DatabaseName) -> PathBuf {
        self.ltx_dir.join(database.escaped())
    }

    /// A name that no file has yet: after a reset the same TXIDs may come again.
    fn external_name(&self, dir: &Path, record: &NewRecord<'_>) -> String {
        let base = format!("{}-{}", record.min_txid, record.max_txid);
        let names = std::iter::once(format!("{base}.ltx")).chain((1u64..).map(|n| format!("{base}.{n}.ltx")));
        let mut unused = names.filter(|name| self.storage.open(&dir.join(name), false).is_err());
        unused.next().expect("an endless list of names")
    }

    /// See [`super::CommitLog::append_file`].
    pub(super) fn append_file(&self, record: &NewRecord<'_>, path: &Path) -> Result<Lsn, LogError> {
        self.check_usable(false)?;
        self.check_sequence(record)?;
        let looked = self.storage.open(path, false).and_then(|file| {
            file.sync_data()?;
            look_at(&*file)
        });
        let (size, tail_crc) = looked.map_err(|e| LogError::io("sync", path, e))?;
        let dir = self.external_dir(record.database);
        self.storage.create_dir(&dir).map_err(|e| LogError::io("create", &dir, e))?;
        let file_name = self.external_name(&dir, record);
        let target = dir.join(&file_name);
        self.storage.rename(path, &target).map_err(|e| LogError::io("rename to", &target, e))?;
        let payload = NewPayload::External { file_name: &file_name, size, tail_crc };
        let synced = self.storage.sync_dir(&dir).map_err(|e| LogError::io("sync", &dir, e));
        let appended = synced.and_then(|()| self.append_record(record, payload));
        if appended.is_err()
            && let Err(e) = self.storage.rename(&target, path)
        {
            tracing::warn!(file = %target.display(), error = %e, "cannot put back an LTX file that was not appended");
        }
        appended
    }

    /// Appends a payload that is too large for a segment.
    pub(super) fn spill(&self, record: &NewRecord<'_>, payload: &[u8]) -> Result<Lsn, LogError> {
        let dir = self.external_dir(record.database);
        let path = dir.join(format!("{}-{}.tmp", record.min_txid, record.max_txid));
        let write = || {
            self.storage.create_dir(&dir)?;
            let file = self.storage.open(&path, true)?;
            file.set_len(0)?;
            file.write_at(payload, 0)
        };
        let written = write().map_err(|e| LogError::io("write", &path, e));
        let appended = written.and_then(|()| self.append_file(record, &path));
        if appended.is_err() {
            let _ = self.storage.remove(&path);
        }
        appended
    }
}

/// Removes files that no record refers to: their records were never durable, or retention was cut short.
pub fn remove_orphans(
    storage: &dyn Storage,
    ltx_dir: &Path,
    kept: &HashMap<DatabaseName, HashSet<String>>,
) -> io::Result<()> {
    let directories = match storage.list(ltx_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in directories {
        let Ok(database) = DatabaseName::from_escaped(&entry) else {
            continue;
        };
        let dir = ltx_dir.join(&entry);
        let ours = |name: &str| name.ends_with(".ltx") || name.ends_with(".tmp");
        for name in storage.list(&dir)?.into_iter().filter(|name| ours(name)) {
            if !kept.get(&database).is_some_and(|names| names.contains(&name)) {
                tracing::info!(%database, file = name, "removing an LTX file that no record refers to");
                storage.remove(&dir.join(name))?;
            }
        }
    }
    Ok(())
}
