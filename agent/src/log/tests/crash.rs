//! The power fails after every operation of a random workload, with any part of what was not synced lost. The log that
//! is opened then holds the records that were appended, in order and whole, up to some point at or after the last one
//! that was reported durable; and it can be appended to, and crash again.

use super::*;
use fastrand::Rng;

/// A record that was appended.
#[derive(Clone)]
struct Appended {
    database: DatabaseName,
    txid: u64,
    kind: RecordKind,
    payload: Vec<u8>,
    lsn: Lsn,
    end: Lsn,
}

/// What was known when so many operations had been done.
#[derive(Clone, Copy)]
struct Known {
    ops: usize,
    /// Records appended.
    appended: usize,
    /// Records reported durable.
    durable: usize,
    /// Records that retention may have removed.
    removed: usize,
}

struct Run {
    storage: MemoryStorage,
    log: Option<CommitLog>,
    records: Vec<Appended>,
    /// Records up to here existed before this run.
    known: Vec<Known>,
}

fn options() -> Options {
    Options { retention_bytes: 40 << 10, ..small() }
}

impl Run {
    fn new(storage: MemoryStorage, records: Vec<Appended>, removed: usize) -> Run {
        let log = open_by_hand(&storage, options());
        assert_eq!(log.damaged(), [], "a crash is no damage");
        let durable = records.len();
        let known = vec![Known { ops: 0, appended: durable, durable, removed }];
        let mut run = Run { storage, log: Some(log), records, known };
        run.note(|_| {});
        run
    }

    fn log(&self) -> &CommitLog {
        self.log.as_ref().unwrap()
    }

    fn note(&mut self, change: impl FnOnce(&mut Known)) {
        let mut known = *self.known.last().unwrap();
        known.appended = self.records.len();
        change(&mut known);
        known.ops = self.storage.ops();
        self.known.push(known);
    }

    fn append(&mut self, random: &mut Rng) {
        let database = name(["a", "b", "dir/c"][random.usize(..3)]);
        let kind = if random.u64(..20) == 0 { RecordKind::Reset } else { RecordKind::Transaction };
        let last = self.log().last(&database).map_or(0, |info| info.max_txid.0);
        let txid = if kind == RecordKind::Reset { random.u64(..(last + 3)) + 1 } else { last + 1 };
        let len = match random.u64(..10) {
            0 => 5000,
            1 => 4000,
            n => n * 150,
        };
        let payload = payload_of(&database, txid ^ random.u64(..) << 32, len as usize);
        let record = NewRecord { kind, ..transaction(&database, txid) };
        let record = NewRecord { min_txid: Txid(txid), ..record };
        let end = self.log().append(&record, &payload).unwrap();
        let lsn = self.log().last(&database).unwrap().lsn;
        self.records.push(Appended { database, txid, kind, payload, lsn, end });
        self.note(|_| {});
    }

    fn sync(&mut self) {
        self.log().wait_durable(self.log().appended()).unwrap();
        let durable = self.records.len();
        self.note(|known| known.durable = durable);
    }

    fn step(&mut self, random: &mut Rng) {
        match random.u64(..20) {
            0..=12 => self.append(random),
            13..=16 => self.sync(),
            17 => {
                self.log().append_mark_for_test();
                self.log().keep_for_test();
            }
            18 => {
                let durable = self.log().durable();
                // It may be cut short by the crash, so it counts from its beginning.
                let at = self.known.len();
                let retained = self.log().enforce_retention(0, durable, Lsn(0)).unwrap();
                let removed = self.records.iter().take_while(|record| record.lsn < retained.oldest).count();
                self.note(|known| known.removed = removed);
                self.known[at - 1].removed = removed;
            }
            _ if random.u64(..2) == 0 => {
                self.log = None;
                self.reopen();
            }
            _ => {
                kill(self.log.take().unwrap());
                self.reopen();
            }
        }
    }

    fn reopen(&mut self) {
        self.log = Some(open_by_hand(&self.storage, options()));
        assert_eq!(self.log().damaged(), []);
        let durable = self.records.len();
        self.note(|known| known.durable = durable);
        self.check(self.records.clone(), *self.known.last().unwrap());
    }

    /// Checks that the log holds `records`, as far as it must and may; returns how far it does.
    fn check(&self, records: Vec<Appended>, known: Known) -> (usize, usize) {
        let log = self.log();
        assert_eq!(log.damaged(), []);
        let found = all_records(log);
        let oldest = log.oldest();
        let from = records.iter().take_while(|record| record.lsn < oldest).count().min(known.removed);
        let to = from + found.len();
        assert!(to >= known.durable, "{to} records, but {} were durable", known.durable);
        assert!(to <= known.appended, "{to} records, but only {} were appended", known.appended);
        for (info, record) in found.iter().zip(&records[from..]) {
            assert_eq!((info.lsn, info.end(), info.kind), (record.lsn, record.end, record.kind));
            assert_eq!((&info.database, info.max_txid.0), (&record.database, record.txid));
            assert_eq!(bytes_of(log, &self.storage, info), record.payload);
        }
        for database in log.databases() {
            let of_it = found.iter().filter(|info| info.database == database);
            let last_reset = of_it.clone().rposition_reset();
            let history: Vec<_> = of_it.skip(last_reset).collect();
            let range = (history[0].first_txid(), history.last().unwrap().max_txid);
            assert_eq!(log.kept(&database).unwrap(), Some(range));
            for info in history {
                assert_eq!(log.find(&database, info.max_txid).unwrap().as_ref(), Some(info));
            }
        }
        (from, to)
    }

    /// The run that begins when the power fails after `ops` operations.
    fn crash(&self, ops: usize, random: &mut Rng) -> Run {
        let before = *self.known.iter().rfind(|known| known.ops <= ops).unwrap();
        let after = *self.known.iter().find(|known| known.ops >= ops).unwrap_or(&before);
        let appended = after.appended.max(before.appended);
        let known =
            Known { appended, durable: before.durable, removed: after.removed.max(before.removed), ops: 0 };
        let storage = self.storage.crash(ops, random);
        let mut run = Run::new(storage, Vec::new(), 0);
        let (from, to) = run.check(self.records[..appended].to_vec(), known);
        // LSNs that were seen before do not come again.
        let seen = self.records[..before.appended].last().map_or(Lsn(0), |record| record.end);
        assert!(run.log().appended() >= seen, "{} after {seen}", run.log().appended());
        run.records = self.records[..to].to_vec();
        run.known = vec![Known { ops: 0, appended: to, durable: to, removed: from }];
        run.note(|_| {});
        run
    }
}

trait LastReset {
    fn rposition_reset(self) -> usize;
}

impl<'a, I: Iterator<Item = &'a RecordInfo>> LastReset for I {
    /// How many come before the last reset.
    fn rposition_reset(self) -> usize {
        self.enumerate().filter(|(_, info)| info.kind == RecordKind::Reset).last().map_or(0, |(i, _)| i)
    }
}

/// Crashes a random run at every operation (or every `every`th), and some of what follows at a few.
fn torture(seed: u64, steps: usize, every: usize) {
    let mut random = Rng::with_seed(seed);
    let mut run = Run::new(MemoryStorage::default(), Vec::new(), 0);
    for _ in 0..steps {
        run.step(&mut random);
    }
    for ops in (0..=run.storage.ops()).step_by(every) {
        let mut second = run.crash(ops, &mut random);
        for _ in 0..random.u64(..6) {
            second.step(&mut random);
        }
        // Also while the log is being put in order.
        let mut third = second.crash(random.usize(..=second.storage.ops()), &mut random);
        third.append(&mut random);
        third.sync();
        third.log = None;
        third.reopen();
    }
}

#[test]
fn after_a_power_failure_anywhere_everything_durable_is_there() {
    for seed in 0..20 {
        torture(seed, 60, 2);
    }
}

#[test]
fn after_a_power_failure_late_in_a_long_run_everything_durable_is_there() {
    for seed in 100..103 {
        torture(seed, 400, 97);
    }
}

#[test]
fn a_power_failure_while_a_log_is_recovered_is_no_damage() {
    let storage = MemoryStorage::default();
    let killed = open_by_hand(&storage, options());
    fill(&killed, &name("a"), 1, 1, 1000);
    kill(killed);
    let begun = storage.ops();
    kill(open_by_hand(&storage, options()));
    for ops in begun..=storage.ops() {
        for seed in 0..50 {
            let after = storage.crash(ops, &mut Rng::with_seed(seed));
            assert_eq!(open_by_hand(&after, options()).damaged(), [], "{ops} operations, seed {seed}");
        }
    }
}
