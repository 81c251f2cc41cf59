//! Where the records of each database are, in bounded memory: the last one, every 32nd one, and the links from
//! record to record in the log lead to all.

use super::record::{Lsn, RecordInfo, RecordKind};
use super::sealed::DatabaseSummary;
use crate::DatabaseName;
use crate::ship::engine::Epoch;
use ltx::Txid;
use std::collections::{HashMap, VecDeque};

/// One record in so many is remembered: half a byte per record, and at most twice as many links to follow.
pub const SAMPLE_EVERY: u32 = 32;

/// One database.
#[derive(Debug)]
pub struct Entry {
    /// Its last record.
    pub last: RecordInfo,
    /// First transaction and record since the last reset. The record may no longer be kept.
    pub first: (Txid, Lsn),
    /// Last transaction and LSN of some records since the last reset, ascending.
    pub samples: VecDeque<(Txid, Lsn)>,
    since_sample: u32,
}

impl Entry {
    fn new(info: RecordInfo) -> Self {
        let first = (info.first_txid(), info.lsn);
        Entry { last: info, first, samples: VecDeque::new(), since_sample: 1 }
    }

    /// The remembered record nearest above `txid`, where a walk along the links can start; the last one otherwise.
    pub fn at_or_above(&self, txid: Txid) -> Lsn {
        let i = self.samples.partition_point(|sample| sample.0 < txid);
        self.samples.get(i).map_or(self.last.lsn, |sample| sample.1)
    }

    /// A record that is surely not after the one with `txid`.
    pub fn below(&self, txid: Txid) -> Lsn {
        let i = self.samples.partition_point(|sample| sample.0 < txid);
        i.checked_sub(1).map_or(self.first.1, |i| self.samples[i].1)
    }
}

/// All databases.
#[derive(Debug, Default)]
pub struct Index {
    /// Boxed: a table that grows holds twice as many slots as entries.
    entries: HashMap<DatabaseName, Box<Entry>>,
}

impl Index {
    /// One database.
    pub fn get(&self, database: &DatabaseName) -> Option<&Entry> {
        self.entries.get(database).map(|entry| &**entry)
    }

    /// Newest epoch of any record that is the last one of its database.
    pub fn newest_epoch(&self) -> Epoch {
        self.entries.values().map(|entry| entry.last.epoch).max().unwrap_or_default()
    }

    /// All names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &DatabaseName> {
        self.entries.keys()
    }

    /// Takes in a record that was appended.
    pub fn append(&mut self, info: RecordInfo) {
        match self.entries.get_mut(&info.database) {
            Some(entry) if info.kind == RecordKind::Reset => **entry = Entry::new(info),
            Some(entry) => {
                entry.since_sample += 1;
                if entry.since_sample >= SAMPLE_EVERY {
                    entry.samples.push_back((info.max_txid, info.lsn));
                    entry.since_sample = 0;
                }
                entry.last = info;
            }
            None => {
                self.entries.insert(info.database.clone(), Box::new(Entry::new(info)));
            }
        }
    }

    /// Takes in the next segment's summary of a database, when a log is opened.
    pub fn load(&mut self, summary: DatabaseSummary) {
        let DatabaseSummary { last, first, reset, samples, since_sample } = summary;
        let entry = match self.entries.get_mut(&last.database) {
            Some(entry) if !reset => entry,
            _ => {
                let samples = samples.into();
                let entry = Entry { last, first, samples, since_sample };
                self.entries.insert(entry.last.database.clone(), Box::new(entry));
                return;
            }
        };
        if samples.is_empty() {
            entry.since_sample += since_sample;
            if entry.since_sample >= SAMPLE_EVERY {
                entry.samples.push_back((last.max_txid, last.lsn));
                entry.since_sample = 0;
            }
        } else {
            entry.samples.extend(samples);
            entry.since_sample = since_sample;
        }
        entry.last = last;
    }

    /// Remembers where the records of a database begin now.
    pub fn set_first(&mut self, database: &DatabaseName, first: (Txid, Lsn)) {
        if let Some(entry) = self.entries.get_mut(database)
            && entry.first.1 < first.1
        {
            entry.first = first;
        }
    }

    /// Forgets everything before `oldest`, also databases whose last record is.
    pub fn forget_before(&mut self, oldest: Lsn) {
        self.entries.retain(|_, entry| {
            while entry.samples.front().is_some_and(|sample| sample.1 < oldest) {
                entry.samples.pop_front();
            }
            entry.last.lsn >= oldest
        });
    }
}
