//! Tests of the log as a whole, and what they share.

mod crash;
mod damage;
mod faults;
mod memory;
mod retention;
mod round_trip;

use super::storage::Storage;
use super::*;
use crate::DatabaseName;
use crate::ship::engine::Epoch;
use ltx::{Checksum, Txid};
use memory::MemoryStorage;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Where the log is in [`MemoryStorage`].
const DIR: &str = "/data/log";

fn small() -> Options {
    Options {
        segment_bytes: 16 << 10,
        inline_bytes_max: 4 << 10,
        retention_age: Duration::from_secs(3600),
        retention_bytes: 1 << 30,
        idle_mark: None,
    }
}

fn name(text: &str) -> DatabaseName {
    DatabaseName::new(text).unwrap()
}

/// A log whose threads' work is done by hand, in a fixed order.
fn open_by_hand(storage: &MemoryStorage, options: Options) -> CommitLog {
    CommitLog::open_on(Arc::new(storage.clone()), Path::new(DIR), options, false).unwrap()
}

/// What SIGKILL does: nothing more is written, and what was written stays.
fn kill(log: CommitLog) {
    std::mem::forget(log);
}

/// The end of a term.
#[derive(Debug)]
struct Closed;

impl Fence for Closed {
    fn is_open(&self) -> bool {
        false
    }
}

/// The next transaction of a database, as a record. Checksums are the TXIDs, times too.
fn transaction(database: &DatabaseName, txid: u64) -> NewRecord<'_> {
    NewRecord {
        database,
        kind: RecordKind::Transaction,
        epoch: Epoch(1),
        min_txid: Txid(txid),
        max_txid: Txid(txid),
        pre_apply: Checksum(txid - 1),
        post_apply: Checksum(txid),
        page_size: 4096,
        commit: 10,
        timestamp_ms: txid as i64,
        wal: Some(WalEnd { salt1: 1, salt2: 2, end_offset: txid * 4120 }),
        fence: None,
    }
}

fn reset(database: &DatabaseName, txid: u64) -> NewRecord<'_> {
    NewRecord { kind: RecordKind::Reset, min_txid: Txid(1), ..transaction(database, txid) }
}

/// A payload that tells which record it belongs to.
fn payload_of(database: &DatabaseName, txid: u64, len: usize) -> Vec<u8> {
    let mut payload = format!("{database} {txid} ").into_bytes();
    let mut x = txid.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while payload.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        payload.push(x as u8);
    }
    payload
}

/// Appends transactions `from..=to` with payloads of `len` bytes; returns the end of the last one.
fn fill(log: &CommitLog, database: &DatabaseName, from: u64, to: u64, len: usize) -> Lsn {
    let append = |txid| log.append(&transaction(database, txid), &payload_of(database, txid, len)).unwrap();
    (from..=to).map(append).last().unwrap()
}

/// All records from the beginning of the log.
fn all_records(log: &CommitLog) -> Vec<RecordInfo> {
    records_from(log, Lsn(0)).0
}

/// Records from `from`, and what was damaged in between.
fn records_from(log: &CommitLog, from: Lsn) -> (Vec<RecordInfo>, Vec<Damage>) {
    let (mut records, mut damaged) = (Vec::new(), Vec::new());
    let end = log
        .records_from::<()>(from, |visit| {
            match visit {
                Visit::Record(info) => records.push(info.clone()),
                Visit::Damaged(damage) => damaged.push(damage.clone()),
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(end, None);
    (records, damaged)
}

/// The payload, wherever it is.
fn bytes_of(log: &CommitLog, storage: &dyn Storage, info: &RecordInfo) -> Vec<u8> {
    match log.read(info).unwrap() {
        Payload::Bytes(bytes) => bytes.to_vec(),
        Payload::File { path, size } => {
            let mut bytes = vec![0; size as usize];
            assert_eq!(storage.open(&path, false).unwrap().read_at(&mut bytes, 0).unwrap() as u64, size);
            bytes
        }
    }
}

impl CommitLog {
    /// What the flusher does when nothing happens for a while.
    fn append_mark_for_test(&self) {
        self.shared.append_mark();
    }

    /// What the keeper does by itself.
    fn keep_for_test(&self) {
        self.shared.keep_once();
    }
}
