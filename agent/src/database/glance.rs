//! What others are told of a database's state. Who has the state may wait for another node with it (a commit under a halt
//! lock does), and nobody who only looks waits for that.

use super::checksums::Mark;
use super::{Database, State};
use crate::log::Lsn;
use crate::ship::engine::Epoch;
use ltx::{Pos, Txid};
use std::time::Duration;

/// How long a look waits before it asks whether the state's holder waits for another node.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The state of a database as it was at one moment.
#[derive(Debug, Clone)]
pub struct Glance {
    /// Newest transaction in the log.
    pub position: Pos,
    /// End of its record there.
    pub logged_end: Lsn,
    /// Its epoch.
    pub record_epoch: Epoch,
    /// What can be seen.
    pub applied: Mark,
    /// Bytes in a page; 0 while the database is empty.
    pub page_size: u32,
    /// Pages in the database.
    pub page_count: u32,
    /// Whether page 1 says WAL.
    pub wal_mode: bool,
    /// Why it stands aside, if it does.
    pub quarantined: Option<String>,
    /// Frames of committed transactions in the WAL.
    pub wal_frames: u64,
    /// Open handles of applications on the main file.
    pub handles: u32,
    /// When the newest transaction was committed, milliseconds since 1970.
    pub last_change_ms: i64,
}

impl Glance {
    fn of(db: &Database, st: &mut State) -> Glance {
        // Not of a file that is still being made: it would be remembered.
        let wal_mode = st.page_count > 0 && db.load_journal_mode(st);
        Glance {
            position: st.position,
            logged_end: st.logged_end,
            record_epoch: db.newest_record_epoch(st),
            applied: st.applied,
            page_size: st.page_size,
            page_count: st.page_count,
            wal_mode,
            quarantined: st.quarantine_reason().map(str::to_owned),
            wal_frames: st.wal.committed_frames(),
            handles: st.handles,
            last_change_ms: st.last_change_ms,
        }
    }

    /// Whether there is such a database: a name alone is none.
    pub fn is_database(&self) -> bool {
        self.page_count > 0 || self.quarantined.is_some()
    }

    /// Where to go on from with an upstream. Of one that stands aside no history has this checksum, so the upstream answers
    /// that it diverged, and a snapshot heals it. Behind where it is: one that is at the upstream's position needs nothing.
    pub fn position_to_follow(&self) -> Pos {
        if self.quarantined.is_some() {
            return Pos {
                txid: Txid(self.position.txid.0.saturating_sub(1).max(1)),
                checksum: ltx::Checksum(0),
            };
        }
        self.position
    }
}

impl Database {
    /// The state as it is, or, while its holder waits for another node, as it was when that began: it has not changed since.
    pub fn glance(&self) -> Glance {
        loop {
            if let Some(mut st) = self.state.try_lock_for(LOOK_AGAIN) {
                return Glance::of(self, &mut st);
            }
            if let Some(kept) = self.waits_elsewhere.lock().clone() {
                return kept;
            }
        }
    }

    /// Whether the state's holder waits for another node.
    pub(crate) fn is_waiting_elsewhere(&self) -> bool {
        self.waits_elsewhere.lock().is_some()
    }

    /// Waits for another node, with the state in hand.
    pub(crate) fn wait_elsewhere<T>(&self, st: &mut State, wait: impl FnOnce() -> T) -> T {
        let kept = Glance::of(self, st);
        *self.waits_elsewhere.lock() = Some(kept);
        let result = wait();
        *self.waits_elsewhere.lock() = None;
        result
    }
}
