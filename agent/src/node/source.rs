//! The node as others follow it.

use super::Node;
use crate::DatabaseName;
use crate::log::{LogError, Payload, RecordKind};
use crate::ship::engine::{EngineError, Epoch, PageRange, RecordPayload, Resume, ShippedRecord, Source};
use ltx::{Checksum, Pos, Txid};
use std::fs::File;
use std::io::BufReader;
use std::ops::RangeInclusive;
use std::path::Path;
use tokio::sync::broadcast;

fn other(e: impl std::fmt::Display) -> EngineError {
    EngineError::Other(e.to_string())
}

/// Nothing, where the log has lost what was asked for to damage (which it reports) or retention: followers that need
/// it get a snapshot.
fn unless_lost<T>(found: Result<Option<T>, LogError>) -> Result<Option<T>, EngineError> {
    match found {
        Err(LogError::Damaged(_) | LogError::Gone { .. }) => Ok(None),
        other_result => other_result.map_err(other),
    }
}

fn check_file(path: &Path) -> Result<(), ltx::Error> {
    let file = File::open(path).map_err(|source| ltx::Error::Io { offset: 0, source })?;
    let mut decoder = ltx::Decoder::new(BufReader::new(file))?;
    let mut page = Vec::new();
    while decoder.next_page(&mut page)?.is_some() {}
    decoder.finish().map(|_| ())
}

impl Source for Node {
    fn node_id(&self) -> u64 {
        self.shared.node_id
    }

    fn epoch(&self) -> Epoch {
        self.shared.epoch()
    }

    fn databases(&self) -> Vec<(DatabaseName, Pos)> {
        self.shared.databases().iter().map(|db| (db.name().clone(), db.durable_position())).collect()
    }

    fn position(&self, name: &DatabaseName) -> Option<Pos> {
        self.shared.database(name).map(|db| db.durable_position()).filter(|pos| pos.txid.0 > 0)
    }

    fn changes(&self) -> broadcast::Receiver<DatabaseName> {
        self.shared.changes()
    }

    fn resume(&self, name: &DatabaseName, position: Pos) -> Result<Resume, EngineError> {
        let durable =
            Source::position(self, name).ok_or_else(|| EngineError::NoSuchDatabase(name.clone()))?;
        let log = &self.shared.log;
        if position == durable {
            return Ok(Resume::Continue);
        }
        if position.txid.0 == 0 {
            let kept = log.kept(name).map_err(other)?;
            return Ok(if kept.is_some_and(|(oldest, _)| oldest.0 == 1) {
                Resume::Continue
            } else {
                Resume::Gap
            });
        }
        if position.txid >= durable.txid {
            return Ok(Resume::Diverged);
        }
        // The record after the position says what it begins with, also when the position's own is gone.
        match unless_lost(log.find(name, Txid(position.txid.0 + 1)))? {
            Some(next) if next.kind == RecordKind::Transaction && next.min_txid.0 == position.txid.0 + 1 => {
                Ok(if next.pre_apply == position.checksum { Resume::Continue } else { Resume::Diverged })
            }
            _ => Ok(Resume::Gap),
        }
    }

    fn checksum_at(&self, name: &DatabaseName, txid: Txid) -> Result<Option<Checksum>, EngineError> {
        let record = unless_lost(self.shared.log.find(name, txid))?;
        Ok(record.filter(|r| r.max_txid == txid).map(|r| r.post_apply))
    }

    fn recent_record(&self, name: &DatabaseName, min_txid: Txid) -> Option<ShippedRecord> {
        self.shared.database(name)?.recent_record(min_txid)
    }

    fn record(&self, name: &DatabaseName, min_txid: Txid) -> Result<Option<ShippedRecord>, EngineError> {
        let Some(db) = self.shared.database(name) else { return Ok(None) };
        if let Some(recent) = db.recent_record(min_txid) {
            return Ok(Some(recent));
        }
        let durable = db.durable_position();
        let found = unless_lost(self.shared.log.find(name, min_txid))?;
        let Some(info) = found.filter(|r| {
            r.kind == RecordKind::Transaction && r.min_txid == min_txid && r.max_txid <= durable.txid
        }) else {
            return Ok(None);
        };
        let Some(payload) = unless_lost(self.shared.log.read(&info).map(Some))? else { return Ok(None) };
        let payload = match payload {
            Payload::Bytes(bytes) => RecordPayload::Bytes(bytes),
            Payload::File { path, size } => {
                // The log checks such a file's size and end only.
                if let Err(error) = check_file(&path) {
                    tracing::error!(database = %name, path = %path.display(), %error, "a record is damaged");
                    return Ok(None);
                }
                RecordPayload::File { path, size }
            }
        };
        Ok(Some(ShippedRecord {
            epoch: info.epoch,
            min_txid: info.min_txid,
            max_txid: info.max_txid,
            post_apply: info.post_apply,
            payload,
        }))
    }

    fn pages(&self, name: &DatabaseName, range: RangeInclusive<u32>) -> Result<PageRange, EngineError> {
        let db = self.shared.database(name).ok_or_else(|| EngineError::NoSuchDatabase(name.clone()))?;
        db.committed_pages(range)
    }

    fn follower_position(&self, follower: u64, name: &DatabaseName, needs_after: Option<Txid>) {
        let mut followed = self.followed.lock();
        match needs_after {
            Some(txid) => {
                followed.insert((follower, name.clone()), txid);
            }
            None => {
                followed.remove(&(follower, name.clone()));
            }
        }
    }

    fn follower_joined(&self, follower: u64, name: &str) {
        self.shared.gate.joined(follower, name);
    }

    fn follower_acknowledged(&self, follower: u64, name: &DatabaseName, position: Pos) {
        self.shared.gate.acknowledged(follower, name, position);
    }

    fn follower_left(&self, follower: u64) {
        self.shared.gate.left(follower);
    }
}

impl Node {
    /// Whether every connected follower has acknowledged all that this node has, also of databases that it has not
    /// begun with.
    pub(super) fn followers_have_all(&self) -> bool {
        let connected = self.server.lock().as_ref().map(|server| server.followers()).unwrap_or_default();
        connected
            .iter()
            .all(|follower| self.has_acknowledged(follower.identity.node_id, |db| db.state().position))
    }
}
