//! What this node had alone when it took a snapshot instead: kept as files, for `litefs diverged`.

use super::Database;
use super::receive::{PayloadReader, sync_dir_of};
use crate::log::RecordKind;
use crate::ship::engine::StagedSnapshot;
use ltx::{Checksum, Pos, Txid};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The database as it was.
pub const COPY: &str = "database.db";
/// Its WAL, where the copy is not consistent.
pub const COPY_WAL: &str = "database.db-wal";
/// What is kept and why. Written last: without it the agent died before everything was kept.
pub const RECORD: &str = "kept.json";

/// States of a database that somebody wrote to on a replica; older ones make room for newer ones.
const FOREIGN_STATES_KEPT: usize = 4;

/// What [`RECORD`] says, in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Path of the database below the cluster's directory.
    pub database: String,
    /// Its position here: last transaction, ...
    #[serde(with = "crate::status::api::hex")]
    pub txid: Txid,
    /// ... and the checksum after it.
    #[serde(with = "crate::status::api::hex")]
    pub checksum: Checksum,
    /// Last transaction that both histories are known to share.
    pub common_txid: Option<String>,
    /// Position of the upstream's snapshot that took its place, ...
    pub upstream_position: String,
    /// ... and its epoch.
    pub upstream_epoch: u64,
    /// When, in milliseconds since 1970.
    pub kept_unix_ms: i64,
    /// Why the copy is not consistent: what the database was set aside for.
    pub set_aside: Option<String>,
}

impl Kept {
    /// Reads what is said of a directory; nothing where the agent died before it was complete.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn read(dir: &Path) -> io::Result<Option<Kept>> {
        match std::fs::read(dir.join(RECORD)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The position.
    pub fn position(&self) -> Pos {
        Pos { txid: self.txid, checksum: self.checksum }
    }
}

impl Database {
    /// Keeps the database as it is, and the records after `common`, below the directory for diverged data.
    pub(super) fn keep_diverged(
        &self,
        common: Option<Txid>,
        snapshot: &StagedSnapshot,
    ) -> anyhow::Result<Option<PathBuf>> {
        let (position, foreign) = {
            let st = self.state();
            (st.position, st.foreign_content)
        };
        let Some((oldest, newest)) = self.shared.log.kept(&self.name)? else { return Ok(None) };
        let dir =
            self.shared.dirs.diverged.join(self.name.escaped()).join(position.to_string().replace('/', "-"));
        if foreign {
            self.forget_foreign_states(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        let mut next = common.map_or(oldest, |c| Txid(c.0 + 1)).max(oldest);
        while next <= newest {
            let Some(record) = self.shared.log.find(&self.name, next)? else { break };
            if record.kind == RecordKind::Transaction {
                let path = dir.join(format!("{}-{}.ltx", record.min_txid, record.max_txid));
                let mut file = File::create(&path)?;
                io::copy(&mut PayloadReader::of(&self.shared.log, &record), &mut file)?;
                file.sync_all()?;
            }
            next = Txid(record.max_txid.0 + 1);
        }
        let (set_aside, pages) = {
            let st = self.state();
            (st.quarantine_reason().map(str::to_owned), st.page_count)
        };
        if set_aside.is_none() && pages > 0 {
            self.copy_consistently(&dir.join(COPY)).map_err(|e| anyhow::anyhow!("{e}"))?;
        } else {
            for (path, name) in [(&self.paths.database, COPY), (&self.paths.wal, COPY_WAL)] {
                if path.exists() {
                    std::fs::copy(path, dir.join(name))?;
                    File::open(dir.join(name))?.sync_all()?;
                }
            }
        }
        let kept = Kept {
            database: self.name.to_string(),
            txid: position.txid,
            checksum: position.checksum,
            common_txid: common.map(|txid| txid.to_string()),
            upstream_position: snapshot.position.to_string(),
            upstream_epoch: snapshot.epoch.0,
            kept_unix_ms: crate::capture::unix_ms(),
            set_aside,
        };
        let record = dir.join(RECORD);
        std::fs::write(&record, serde_json::to_vec_pretty(&kept)?)?;
        File::open(&record)?.sync_all()?;
        sync_dir_of(&record)?;
        sync_dir_of(&dir)?;
        Ok(Some(dir))
    }

    /// Makes room for `new`: a program that writes to a replica again and again does not fill the disk.
    fn forget_foreign_states(&self, new: &Path) -> io::Result<()> {
        let Ok(entries) = new.parent().unwrap_or(new).read_dir() else { return Ok(()) };
        let mut foreign = Vec::new();
        for entry in entries {
            let dir = entry?.path();
            // What cannot be read is for people to look at.
            let Ok(Some(kept)) = Kept::read(&dir) else { continue };
            let transactions =
                dir.read_dir()?.flatten().any(|file| file.path().extension().is_some_and(|e| e == "ltx"));
            if kept.set_aside.is_none() || transactions {
                continue;
            }
            if dir == new {
                std::fs::remove_dir_all(dir)?;
            } else {
                foreign.push((kept.kept_unix_ms, dir));
            }
        }
        foreign.sort();
        let surplus = (foreign.len() + 1).saturating_sub(FOREIGN_STATES_KEPT);
        foreign[..surplus].iter().try_for_each(|(_, dir)| std::fs::remove_dir_all(dir))
    }
}
