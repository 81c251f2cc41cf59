//! Opening a log: finding out what is in it after whatever happened to it.
//!
//! Sealed segments have an index file and are not read. What comes after the last of them is scanned. A record that
//! is not valid there is either the torn end of the log, which was never durable, or damage to something that
//! was. Records tell which: each carries the LSN up to which the log was durable when it was appended, so any
//! later record, mark or index that says "durable beyond this point" makes it damage. Otherwise the log is cut.

use super::commit_log::Options;
use super::error::{Damage, LogError};
use super::external;
use super::format::{
    self, BLOCK_BYTES, FIRST_LSN, Place, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKey, UNCLEAN_GAP_BYTES,
    VERSION, offset_in_segment,
};
use super::index::Index;
use super::keeper::{cut_to_end, spare_number};
use super::record::Lsn;
use super::scan::{Found, Scanner};
use super::sealed::{IndexFacts, Summary};
use super::segments::{Sealed, Segment};
use super::storage::{Storage, StorageFile};
use crate::DatabaseName;
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Spares that are taken over.
const RECYCLED_MAX: usize = 2;

/// A log as it was found.
pub struct Recovered {
    /// Random number of the log.
    pub log_id: u64,
    /// Where appending goes on.
    pub next: Lsn,
    /// Where the last segment ends.
    pub last_end: Lsn,
    /// All segments, oldest first.
    pub segments: Vec<Segment>,
    /// All databases.
    pub index: Index,
    /// What cannot be read.
    pub damaged: Vec<Damage>,
    /// Files that can become segments.
    pub recycled: Vec<PathBuf>,
    /// No spare has this number or a higher one.
    pub next_spare: u64,
}

/// One segment file.
struct Candidate {
    first: Lsn,
    path: PathBuf,
    file: Arc<dyn StorageFile>,
    file_bytes: u64,
    key: Option<SegmentKey>,
    place: Option<Place>,
    /// Where the segment says that it was cut.
    stated_end: Option<Lsn>,
    /// Size of the file as long as it is not cut.
    uncut_bytes: u64,
    index: Option<IndexFacts>,
}

impl Candidate {
    /// LSN after the last one that fits into the file as it is.
    fn file_end(&self) -> Lsn {
        self.end_of(self.file_bytes)
    }

    fn end_of(&self, file_bytes: u64) -> Lsn {
        format::end_of_file(self.first, file_bytes)
    }

    /// The file lost its end: a segment has its full size from the beginning, and says so before it is cut.
    fn lost_its_end(&self) -> bool {
        self.stated_end.is_none() && self.file_bytes < self.uncut_bytes
    }

    fn previous_end(&self) -> Lsn {
        let told = self.index.map(|index| index.previous_end).or(self.place.map(|place| place.previous_end));
        told.unwrap_or(self.first)
    }

    /// The index, when it says all there is to know. A segment that was cut short is looked at itself.
    fn sealed(&self) -> Option<IndexFacts> {
        self.index.filter(|index| index.end <= self.file_end())
    }
}

/// Something in a segment that is not a record.
struct Bad {
    lsn: Lsn,
    end: Lsn,
    database: Option<DatabaseName>,
    reason: &'static str,
}

/// What a scan of a segment without index found.
struct Probe {
    bad: Vec<Bad>,
    /// Highest LSN that a record says was durable.
    durable: Lsn,
    /// Whether the disk refused to read some of it.
    unreadable: bool,
}

/// A segment whose end is known.
struct Bounded {
    candidate: Candidate,
    end: Lsn,
    damaged: bool,
}

/// Reads the log in `dir` and puts it in order.
pub fn recover(
    storage: &dyn Storage,
    dir: &Path,
    ltx_dir: &Path,
    options: &Options,
) -> Result<Recovered, LogError> {
    storage.create_dir(dir).map_err(|e| LogError::io("create", dir, e))?;
    let mut recovery = Recovery { storage, dir, damaged: Vec::new(), log_id: None };
    let names = storage.list(dir).map_err(|e| LogError::io("list", dir, e))?;
    let candidates = recovery.candidates(&names)?;
    let (recycled, next_spare) = recovery.tidy(&names, &candidates, options)?;
    let clean = candidates.last().is_none_or(|last| last.sealed().is_some_and(|index| index.clean));
    let (bounded, durable) = recovery.find_ends(candidates)?;

    let (mut index, mut segments) = (Index::default(), Vec::new());
    let mut externals: HashMap<DatabaseName, HashSet<String>> = HashMap::new();
    for segment in bounded {
        let (summary, file_bytes) = recovery.settle(&segment, durable)?;
        for (database, file_name, _) in &summary.externals {
            externals.entry(database.clone()).or_default().insert(file_name.clone());
        }
        let Bounded { candidate, end, .. } = segment;
        let sealed = Sealed { newest_ms: summary.newest_ms, externals: summary.externals };
        let (key, previous_end) = (candidate.key, candidate.previous_end());
        segments.push(Segment::found(candidate.first, key, previous_end, end, file_bytes, sealed));
        summary.databases.into_values().for_each(|database| index.load(database));
    }

    let mut damaged = recovery.damaged;
    for damage in &mut damaged {
        damage.database = damage.database.take().filter(|name| index.get(name).is_some());
        tracing::error!(%damage, "the commit log is damaged");
    }
    if damaged.is_empty() {
        external::remove_orphans(storage, ltx_dir, &externals)
            .map_err(|e| LogError::io("tidy", ltx_dir, e))?;
    }
    let last_end = segments.last().map_or(FIRST_LSN, Segment::end);
    let next = if clean { last_end } else { Lsn(last_end.0 + UNCLEAN_GAP_BYTES) };
    if !clean {
        tracing::info!(end = %last_end, "the commit log was not closed in order and has been recovered");
    }
    let log_id = recovery.log_id.unwrap_or_else(format::random_id);
    Ok(Recovered { log_id, next, last_end, segments, index, damaged, recycled, next_spare })
}

struct Recovery<'a> {
    storage: &'a dyn Storage,
    dir: &'a Path,
    damaged: Vec<Damage>,
    log_id: Option<u64>,
}

impl Recovery<'_> {
    /// Opens all segments, oldest first.
    fn candidates(&mut self, names: &[String]) -> Result<Vec<Candidate>, LogError> {
        let mut firsts: Vec<Lsn> =
            names.iter().filter_map(|name| format::parse_file_name(name, "log")).collect();
        firsts.sort();
        firsts.into_iter().map(|first| self.candidate(first)).collect()
    }

    fn candidate(&mut self, first: Lsn) -> Result<Candidate, LogError> {
        let path = self.dir.join(format::segment_file(first));
        let io = |e| LogError::io("open", &path, e);
        let file = self.storage.open(&path, false).map_err(io)?;
        let file_bytes = file.len().map_err(io)?;
        let mut block = vec![0; SEGMENT_HEADER_BYTES as usize];
        let n = file.read_at(&mut block, 0).unwrap_or(0);
        let facts = match format::decode_segment_header(&block[..n]) {
            SegmentHeader::Good(facts) => Some(facts),
            SegmentHeader::Damaged => None,
            SegmentHeader::Version(found) => return Err(LogError::Version { path, found, known: VERSION }),
            SegmentHeader::Foreign => {
                return Err(LogError::NotASegment { path, reason: "it begins with other bytes".into() });
            }
        };
        let (key, place) = (facts.map(|facts| facts.key), facts.and_then(|facts| facts.place));
        if let Some(place) = place
            && place.first != first
        {
            let reason =
                format!("it is the segment {} under a wrong name", format::segment_file(place.first));
            return Err(LogError::NotASegment { path, reason });
        }
        let index = IndexFacts::read(self.storage, self.dir, first);
        let index = index.filter(|index| key.is_none_or(|key| key == index.key));
        let key = key.or(index.map(|index| index.key));
        if let Some(found) = key.map(|key| key.log_id) {
            let expected = *self.log_id.get_or_insert(found);
            if found != expected {
                return Err(LogError::ForeignSegment { path, found, expected });
            }
        }
        let stated_end = facts.and_then(|facts| facts.end);
        let uncut_bytes = facts.map_or(0, |facts| facts.file_bytes);
        Ok(Candidate { first, path, file, file_bytes, key, place, stated_end, uncut_bytes, index })
    }

    /// Removes what was left half done, and finds the spares.
    fn tidy(
        &self,
        names: &[String],
        candidates: &[Candidate],
        options: &Options,
    ) -> Result<(Vec<PathBuf>, u64), LogError> {
        let (mut recycled, mut next_spare) = (Vec::new(), 0);
        for name in names {
            let path = self.dir.join(name);
            let index_of = format::parse_file_name(name, "idx");
            let left_over = index_of.is_some_and(|first| candidates.iter().all(|c| c.first != first))
                || format::parse_file_name(name, "tmp").is_some();
            let mut unneeded = left_over;
            if let Some(number) = spare_number(name) {
                next_spare = next_spare.max(number.saturating_add(1));
                let whole = self.storage.open(&path, false).and_then(|file| file.len());
                let usable =
                    whole.is_ok_and(|len| len == options.segment_bytes) && recycled.len() < RECYCLED_MAX;
                if usable { recycled.push(path.clone()) } else { unneeded = true }
            }
            if unneeded {
                self.storage.remove(&path).map_err(|e| LogError::io("remove", &path, e))?;
            }
        }
        Ok((recycled, next_spare))
    }

    /// Decides where each segment ends, and says up to where the log surely was durable. Cuts the log at its first
    /// record that was not and is not whole; segments after it are removed.
    fn find_ends(&mut self, candidates: Vec<Candidate>) -> Result<(Vec<Bounded>, Lsn), LogError> {
        let limit = |i: usize| {
            let own = &candidates[i];
            let file_end = own.end_of(own.file_bytes.max(own.uncut_bytes));
            let told = own.index.map_or(file_end, |index| index.end.max(own.file_end()));
            let told = own.stated_end.unwrap_or(told);
            candidates.get(i + 1).map_or(told, Candidate::previous_end).max(own.first)
        };
        let probed: Vec<(Lsn, Option<Probe>)> =
            (0..candidates.len()).map(|i| (limit(i), probe(&candidates[i], limit(i)))).collect();
        let told = probed.iter().filter_map(|(_, probe)| probe.as_ref()).map(|probe| probe.durable);
        let indexed = candidates.iter().filter_map(|candidate| candidate.index).map(|index| index.end);
        let stated = candidates.iter().filter_map(|candidate| candidate.stated_end);
        let durable = told.chain(indexed).chain(stated).max().unwrap_or_default();

        let mut bounded: Vec<Bounded> = Vec::new();
        let (mut never_durable, mut cut) = (Vec::new(), false);
        let newest = candidates.last().map(|candidate| candidate.first);
        for (candidate, (limit, probe)) in candidates.into_iter().zip(probed) {
            if cut {
                never_durable.push(candidate);
                continue;
            }
            let known = self.damaged.len();
            let end;
            (end, cut) = self.find_end(&candidate, probe, limit, durable, newest == Some(candidate.first));
            bounded.push(Bounded { candidate, end, damaged: self.damaged.len() > known });
        }
        // The newest first: a log without its middle would look damaged after another crash.
        for candidate in never_durable.into_iter().rev() {
            tracing::info!(segment = %candidate.path.display(), "removing a segment that was never durable");
            let removed = self.storage.remove(&candidate.path).and_then(|()| self.storage.sync_dir(self.dir));
            removed.map_err(|e| LogError::io("remove", &candidate.path, e))?;
        }
        Ok((bounded, durable))
    }

    /// Where the segment ends, and whether the log ends there.
    fn find_end(
        &mut self,
        candidate: &Candidate,
        probe: Option<Probe>,
        limit: Lsn,
        durable: Lsn,
        newest: bool,
    ) -> (Lsn, bool) {
        let first = candidate.first;
        let Some(probe) = probe else {
            if let Some(index) = candidate.sealed() {
                if index.end < limit && !newest {
                    self.damage(candidate, index.end, limit, None, "the segment after this one is missing");
                }
                return (index.end, false);
            }
            self.damage(candidate, first, limit, None, "the header of the segment is damaged");
            self.damaged.last_mut().expect("just pushed").offset = 0;
            return (limit, false);
        };
        let lost_its_end = candidate.lost_its_end();
        for Bad { lsn, end, database, reason } in probe.bad {
            if lost_its_end {
                // What says whether this was durable may be in the lost part.
                let reason = if end < limit { reason } else { "the file has lost its end" };
                self.damage(candidate, lsn, end, database, reason);
            } else if probe.unreadable {
                self.damage(candidate, lsn, end, database, "the disk cannot read it");
            } else if lsn >= durable {
                // Nothing says that this ever was durable, so neither was anything after it.
                return (lsn, true);
            } else {
                self.damage(candidate, lsn, end.min(durable), database, reason);
                if end > durable {
                    return (durable, true);
                }
            }
        }
        (limit, false)
    }

    fn damage(&mut self, at: &Candidate, lsn: Lsn, end: Lsn, database: Option<DatabaseName>, reason: &str) {
        let offset = offset_in_segment(at.first, lsn);
        self.damaged.push(Damage {
            segment: at.path.clone(),
            offset,
            lsn,
            end,
            database,
            reason: reason.into(),
        });
    }

    /// Sums up a segment, and says how large its file is. One without index is made durable first.
    fn settle(&self, segment: &Bounded, durable: Lsn) -> Result<(Summary, u64), LogError> {
        let Bounded { candidate, end, damaged } = segment;
        let Some(key) = candidate.key else {
            let unknown = SegmentKey { log_id: 0, segment_id: 0 };
            let mut summary = Summary::new(unknown, candidate.first, candidate.previous_end(), *end);
            // How old it is cannot be told, so it is kept until its size matters.
            summary.newest_ms = i64::MAX;
            return Ok((summary, candidate.file_bytes));
        };
        if candidate.sealed().is_some()
            && let Some(summary) = Summary::read(self.storage, self.dir, candidate.first)
        {
            return Ok((summary, candidate.file_bytes));
        }
        let io = |e| LogError::io("recover", &candidate.path, e);
        let file_bytes = candidate.file_bytes.min(offset_in_segment(candidate.first, *end));
        rewrite(&*candidate.file, 0, SEGMENT_HEADER_BYTES).map_err(io)?;
        if *end > durable {
            let from = offset_in_segment(candidate.first, durable.max(candidate.first));
            rewrite(&*candidate.file, from, file_bytes).map_err(io)?;
        }
        if *end > durable || *damaged {
            // Before the segment says that it ends there: what comes before a stated end was durable.
            candidate.file.sync_data().map_err(io)?;
        }
        // A damaged one is looked at again each time the log is opened, so it stays as it is.
        if !*damaged {
            cut_to_end(&*candidate.file, key, *end, file_bytes).map_err(io)?;
        }
        self.storage.sync_dir(self.dir).map_err(io)?;
        let summary = Summary::new(key, candidate.first, candidate.previous_end(), *end);
        let (summary, _) = summary.scan(candidate.file.clone());
        if !damaged && let Err(e) = summary.write(self.storage, self.dir) {
            tracing::warn!(segment = %candidate.path.display(), error = %e, "cannot write the index of a segment");
        }
        Ok((summary, file_bytes))
    }
}

/// Writes what is there again. After a failed fsync the kernel may hold pages that it takes for written and that the
/// disk does not have; only writing them again makes the next fsync tell the truth. What cannot be read stays.
fn rewrite(file: &dyn StorageFile, from: u64, to: u64) -> io::Result<()> {
    let mut buffer = Vec::new();
    let mut at = from;
    while at < to {
        buffer.resize((to.min((at / BLOCK_BYTES + 1) * BLOCK_BYTES) - at) as usize, 0);
        if let Ok(n) = file.read_at(&mut buffer, at) {
            file.write_at(&buffer[..n], at)?;
        }
        at += buffer.len() as u64;
    }
    Ok(())
}

/// Scans a segment that has no index.
fn probe(candidate: &Candidate, limit: Lsn) -> Option<Probe> {
    let key = candidate.key.filter(|_| candidate.sealed().is_none())?;
    let (file, first) = (candidate.file.clone(), candidate.first);
    let mut scanner = Scanner::new(file, key, first, first, limit).verify_payloads();
    let mut probe = Probe { bad: Vec::new(), durable: Lsn(0), unreadable: false };
    for found in scanner.by_ref() {
        match found {
            Found::Record { info, durable, bad_payload } => {
                probe.durable = probe.durable.max(durable);
                if bad_payload {
                    let (lsn, end, database) = (info.lsn, info.end(), Some(info.database));
                    probe.bad.push(Bad { lsn, end, database, reason: "the payload is damaged" });
                }
            }
            Found::Mark { durable } => probe.durable = probe.durable.max(durable),
            Found::Bad { lsn, end, database, reason } => probe.bad.push(Bad { lsn, end, database, reason }),
        }
    }
    probe.unreadable = scanner.unreadable();
    Some(probe)
}
