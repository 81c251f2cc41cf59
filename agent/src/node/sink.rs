//! The node as it follows another one.

use super::{Heard, Node};
use crate::DatabaseName;
use crate::database::Database;
use crate::ship::engine::{EngineError, Epoch, ShippedRecord, Sink, StagedSnapshot};
use ltx::{Checksum, Pos, Txid};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Sink for Node {
    fn node_id(&self) -> u64 {
        self.shared.node_id
    }

    fn epoch(&self) -> Epoch {
        self.shared.epoch()
    }

    fn observe_epoch(&self, epoch: Epoch) -> Result<(), EngineError> {
        let seen = self.shared.epoch();
        if epoch < seen {
            return Err(EngineError::OldEpoch { got: epoch.0, seen: seen.0 });
        }
        if epoch > seen {
            self.identity.store_epoch(epoch).map_err(|e| EngineError::Other(e.to_string()))?;
            self.shared.adopt_epoch(epoch);
            self.role.send_modify(|role| role.epoch = epoch);
            self.feed.role();
        }
        self.note_heard();
        Ok(())
    }

    fn databases(&self) -> Vec<(DatabaseName, Pos)> {
        let of = |db: Arc<Database>| {
            let known = db.glance();
            // What is told is taken for an acknowledgement.
            let durable = self.shared.log.wait_durable(known.logged_end).is_ok();
            (db.name().clone(), if durable { known.position_to_follow() } else { db.durable_position() })
        };
        self.shared.databases().into_iter().map(of).collect()
    }

    fn position(&self, name: &DatabaseName) -> Pos {
        let Some(db) = self.shared.database(name) else { return Pos::default() };
        db.glance().position_to_follow()
    }

    fn receive(
        &self,
        name: &DatabaseName,
        records: Vec<ShippedRecord>,
        durable: &mut dyn FnMut(Pos),
    ) -> Result<Pos, EngineError> {
        let db = self.shared.database_or_new(name);
        let bound = self.config.read().replication.apply_wait;
        self.note_heard();
        let result = db.receive(records, bound, durable);
        self.caught_up(name, Sink::position(self, name));
        result
    }

    fn staging_dir(&self) -> PathBuf {
        self.shared.dirs.staging.clone()
    }

    fn install(
        &self,
        name: &DatabaseName,
        snapshot: StagedSnapshot,
        common: Option<Txid>,
    ) -> Result<(), EngineError> {
        let bound = self.config.read().replication.apply_wait;
        self.shared.database_or_new(name).install(&snapshot, common, bound)
    }

    fn checksum_at(&self, name: &DatabaseName, txid: Txid) -> Result<Option<Checksum>, EngineError> {
        crate::ship::engine::Source::checksum_at(self, name, txid)
    }

    fn kept(&self, name: &DatabaseName) -> Option<(Txid, Txid)> {
        self.shared.log.kept(name).ok().flatten()
    }

    fn upstream_changed(&self, upstream: Option<String>) {
        self.compared.store(false, Ordering::Release);
        self.note_heard();
        self.change_role(|role| {
            let Some(known) = &mut role.upstream else { return };
            known.connected = upstream.is_some();
            if upstream.is_some() {
                known.hostname = upstream;
            }
        });
    }

    fn compared(&self) {
        self.compared.store(true, Ordering::Release);
        // Of what was not told the upstream has what this node has.
        for db in self.shared.known() {
            let told = self.heard.lock().get(db.name()).map(|heard| heard.position);
            db.upstream_has(told);
        }
    }

    fn upstream_position(&self, name: &DatabaseName, position: Pos, upstream_unix_ms: i64) {
        let _ = upstream_unix_ms;
        self.note_heard();
        // Not the state, which a large transaction holds for long: the stream must go on meanwhile.
        let db = self.shared.database(name);
        if let Some(db) = &db {
            db.upstream_has(Some(position));
        }
        let own = db.map(|db| db.durable_position()).unwrap_or_default();
        let now = Instant::now();
        let mut heard = self.heard.lock();
        let entry = heard.entry(name.clone()).or_insert(Heard { position, at: now, behind_since: None });
        entry.position = position;
        entry.at = now;
        if own.txid >= position.txid {
            entry.behind_since = None;
        } else if entry.behind_since.is_none() {
            entry.behind_since = Some(now);
        }
    }
}

impl Node {
    fn caught_up(&self, name: &DatabaseName, own: Pos) {
        if let Some(entry) = self.heard.lock().get_mut(name)
            && own.txid >= entry.position.txid
        {
            entry.behind_since = None;
        }
    }
}
