//! A node in memory that is source and sink: enough of an engine to tell right from wrong.

use super::site::PATIENCE;
use crate::DatabaseName;
use crate::ship::engine::{
    EngineError, Epoch, PageRange, RecordPayload, Resume, ShippedRecord, Sink, Source, StagedSnapshot,
};
use bytes::Bytes;
use ltx::{Checksum, Decoder, Encoder, Header, Pos, Txid};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tempfile::TempDir;
use tokio::sync::broadcast;

pub fn name(text: &str) -> DatabaseName {
    DatabaseName::new(text).unwrap()
}

/// One database: its pages, its log, its position.
#[derive(Clone, Default)]
pub struct Database {
    pub page_size: u32,
    pub pages: Vec<Vec<u8>>,
    pub records: BTreeMap<u64, ShippedRecord>,
    pub pos: Pos,
}

impl Database {
    fn checksum(&self) -> Checksum {
        let pages = self.pages.iter().enumerate();
        pages.fold(Checksum::EMPTY, |sum, (i, page)| sum.xor(ltx::page_checksum(i as u32 + 1, page)))
    }

    fn checksum_at(&self, txid: Txid) -> Option<Checksum> {
        self.records.values().find(|record| record.max_txid == txid).map(|record| record.post_apply)
    }
}

/// What tests look at afterwards.
#[derive(Default)]
pub struct Seen {
    /// Sizes of the batches given to `receive`, with the epochs of their records.
    pub batches: Vec<(DatabaseName, usize)>,
    pub file_records: usize,
    pub installs: Vec<(DatabaseName, Pos, Option<Txid>)>,
    pub pages_read: Vec<RangeInclusive<u32>>,
    pub upstreams: Vec<Option<String>>,
    pub upstream_positions: HashMap<DatabaseName, Pos>,
    pub needs: HashMap<(u64, DatabaseName), Option<Txid>>,
    pub busy_answers: usize,
}

/// How the node misbehaves.
#[derive(Default)]
pub struct Faults {
    /// `receive` of these waits until the name is removed.
    pub held: HashSet<DatabaseName>,
    /// `pages` beyond this number waits until it is raised; 0: no limit.
    pub pages_held_after: u32,
    /// `receive` of these says that it is busy so many times more.
    pub busy: HashMap<DatabaseName, usize>,
    pub quarantined: HashSet<DatabaseName>,
    /// The log of every database is quarantined.
    pub unreadable: bool,
}

pub struct MemoryNode {
    pub id: u64,
    pub databases: Mutex<HashMap<DatabaseName, Database>>,
    pub seen: Mutex<Seen>,
    pub faults: Mutex<Faults>,
    faults_changed: Condvar,
    epoch: AtomicU64,
    changes: broadcast::Sender<DatabaseName>,
    dir: TempDir,
    next_file: AtomicU64,
}

impl MemoryNode {
    pub fn new(id: u64) -> Arc<Self> {
        Arc::new(MemoryNode {
            id,
            databases: Mutex::default(),
            seen: Mutex::default(),
            faults: Mutex::default(),
            faults_changed: Condvar::new(),
            epoch: AtomicU64::new(1),
            changes: broadcast::channel(64).0,
            dir: tempfile::tempdir().unwrap(),
            next_file: AtomicU64::new(0),
        })
    }

    pub fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::SeqCst);
    }

    pub fn fault(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.faults.lock());
        self.faults_changed.notify_all();
    }

    pub fn pos(&self, name: &DatabaseName) -> Pos {
        self.databases.lock().get(name).map_or(Pos::default(), |db| db.pos)
    }

    pub fn pages(&self, name: &DatabaseName) -> Vec<Vec<u8>> {
        self.databases.lock().get(name).map_or(Vec::new(), |db| db.pages.clone())
    }

    /// Commits a transaction: sets pages to contents and the size to `commit` pages.
    pub fn commit_pages(
        &self,
        name: &DatabaseName,
        page_size: u32,
        pages: &[(u32, Vec<u8>)],
        commit: u32,
    ) -> Pos {
        let mut databases = self.databases.lock();
        let db = databases.entry(name.clone()).or_default();
        if db.page_size != page_size {
            db.pages.clear();
            db.page_size = page_size;
        }
        let before = db.pos;
        db.pages.resize(commit as usize, vec![0; page_size as usize]);
        for (pgno, content) in pages {
            db.pages[*pgno as usize - 1].clone_from(content);
        }
        let post = db.checksum();
        let txid = Txid(before.txid.0 + 1);
        let header = Header {
            flags: 0,
            page_size,
            commit,
            min_txid: txid,
            max_txid: txid,
            timestamp_ms: 0,
            pre_apply: if before.txid.0 == 0 { Checksum(0) } else { before.checksum },
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: self.id,
            epoch: self.epoch.load(Ordering::SeqCst),
            owner: None,
        };
        let mut encoder = Encoder::new(Vec::new(), header).unwrap();
        for (pgno, content) in pages {
            encoder.encode_page(*pgno, content).unwrap();
        }
        let (_, bytes) = encoder.finish(post).unwrap();
        let record = ShippedRecord {
            epoch: Epoch(self.epoch.load(Ordering::SeqCst)),
            min_txid: txid,
            max_txid: txid,
            post_apply: post,
            payload: RecordPayload::Bytes(bytes.into()),
        };
        db.pos = Pos { txid, checksum: post };
        db.records.insert(txid.0, record);
        let pos = db.pos;
        drop(databases);
        self.moved(name);
        pos
    }

    /// Commits one page of 512 bytes with a content made of `fill`; the first commit makes a database of one page.
    pub fn commit(&self, name: &DatabaseName, pgno: u32, fill: u64) -> Pos {
        let size = (self.pages(name).len() as u32).max(pgno);
        let known = self.pages(name).len() as u32;
        // Pages that the file grows over are part of the transaction.
        let grown = (known + 1..pgno).map(|pgno| (pgno, vec![0; 512]));
        let pages: Vec<_> = grown.chain([(pgno, content(fill, 512))]).collect();
        self.commit_pages(name, 512, &pages, size)
    }

    /// Commits page 1 once for each fill; gives the last position.
    pub fn commits(&self, name: &DatabaseName, fills: impl IntoIterator<Item = u64>) -> Pos {
        fills.into_iter().fold(Pos::default(), |_, fill| self.commit(name, 1, fill))
    }

    /// Turns the last record into one in a file.
    pub fn last_record_to_file(&self, name: &DatabaseName) {
        let mut databases = self.databases.lock();
        let record = databases.get_mut(name).unwrap().records.values_mut().last().unwrap();
        let RecordPayload::Bytes(bytes) = &record.payload else { panic!("it is in a file") };
        let path = self.fresh_path();
        std::fs::write(&path, bytes).unwrap();
        record.payload = RecordPayload::File { path, size: bytes.len() as u64 };
    }

    /// Forgets the records up to a transaction, as retention does.
    pub fn forget_records(&self, name: &DatabaseName, up_to: u64) {
        self.databases.lock().get_mut(name).unwrap().records.retain(|min, _| *min > up_to);
    }

    /// Makes this node's database what another node's is, history included.
    pub fn copy(&self, other: &MemoryNode, name: &DatabaseName) {
        let database = other.databases.lock()[name].clone();
        self.databases.lock().insert(name.clone(), database);
    }

    fn fresh_path(&self) -> PathBuf {
        let number = self.next_file.fetch_add(1, Ordering::SeqCst);
        self.dir.path().join(format!("kept-{number}.ltx"))
    }

    /// Files in the staging directory that are not records which this node keeps.
    pub fn staged_files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with("kept-")).collect()
    }

    /// Bytes of a snapshot that is being taken.
    pub fn staged_bytes(&self, name: &DatabaseName) -> u64 {
        let path = self.dir.path().join(format!("{}.snapshot", name.escaped()));
        std::fs::metadata(path).map_or(0, |file| file.len())
    }

    fn moved(&self, name: &DatabaseName) {
        let _ = self.changes.send(name.clone());
    }

    /// Waits for a change of the faults; a test that forgot about it fails instead of hanging.
    fn wait(&self, faults: &mut MutexGuard<'_, Faults>) {
        let waited = self.faults_changed.wait_for(faults, PATIENCE);
        assert!(!waited.timed_out(), "a held call was never released");
    }

    fn healthy(&self, name: &DatabaseName) -> Result<(), EngineError> {
        let faults = self.faults.lock();
        if faults.unreadable || faults.quarantined.contains(name) {
            return Err(EngineError::Quarantined { name: name.clone(), reason: "page 7 is damaged".into() });
        }
        Ok(())
    }

    fn apply(
        &self,
        db: &mut Database,
        name: &DatabaseName,
        record: &ShippedRecord,
    ) -> Result<(), EngineError> {
        let bytes = match &record.payload {
            RecordPayload::Bytes(bytes) => bytes.clone(),
            RecordPayload::File { path, size } => {
                let bytes = std::fs::read(path).unwrap();
                assert_eq!(bytes.len() as u64, *size);
                self.seen.lock().file_records += 1;
                bytes.into()
            }
        };
        let other = |e: ltx::Error| EngineError::Other(format!("{name}: {e}"));
        let mut decoder = Decoder::new(&bytes[..]).map_err(other)?;
        let header = decoder.header().clone();
        let follows = header.min_txid.0 == db.pos.txid.0 + 1;
        if !follows || (db.pos.txid.0 > 0 && header.pre_apply != db.pos.checksum) {
            return Err(EngineError::OutOfSequence {
                name: name.clone(),
                min_txid: header.min_txid,
                max_txid: header.max_txid,
                position: db.pos,
            });
        }
        db.page_size = header.page_size;
        db.pages.resize(header.commit as usize, vec![0; header.page_size as usize]);
        let mut page = Vec::new();
        while let Some(pgno) = decoder.next_page(&mut page).map_err(other)? {
            db.pages[pgno as usize - 1].clone_from(&page);
        }
        let trailer = decoder.finish().map_err(other)?;
        assert_eq!(db.checksum(), trailer.post_apply, "{name} differs after {}", header.max_txid);
        assert_eq!(trailer.post_apply, record.post_apply);
        db.pos = Pos { txid: header.max_txid, checksum: trailer.post_apply };
        let mut kept = record.clone();
        if let RecordPayload::File { path, size } = &record.payload {
            let own = self.fresh_path();
            std::fs::rename(path, &own).unwrap();
            kept.payload = RecordPayload::File { path: own, size: *size };
        }
        db.records.insert(header.min_txid.0, kept);
        Ok(())
    }
}

/// A page whose content differs for every `fill` and hardly compresses.
pub fn content(fill: u64, size: usize) -> Vec<u8> {
    let mut state = fill.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()
    });
    words.take(size / 8).flatten().collect()
}

impl Source for MemoryNode {
    fn node_id(&self) -> u64 {
        self.id
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }

    fn databases(&self) -> Vec<(DatabaseName, Pos)> {
        self.databases.lock().iter().map(|(name, db)| (name.clone(), db.pos)).collect()
    }

    fn position(&self, name: &DatabaseName) -> Option<Pos> {
        self.databases.lock().get(name).map(|db| db.pos)
    }

    fn changes(&self) -> broadcast::Receiver<DatabaseName> {
        self.changes.subscribe()
    }

    fn resume(&self, name: &DatabaseName, position: Pos) -> Result<Resume, EngineError> {
        self.healthy(name)?;
        let databases = self.databases.lock();
        let db = databases.get(name).ok_or_else(|| EngineError::NoSuchDatabase(name.clone()))?;
        let next = db.records.get(&(position.txid.0 + 1));
        if position == db.pos {
            return Ok(Resume::Continue);
        }
        if position.txid >= db.pos.txid {
            return Ok(Resume::Diverged);
        }
        let before_next = next.map(|record| {
            let RecordPayload::Bytes(bytes) = &record.payload else { return position.checksum };
            Decoder::new(&bytes[..]).unwrap().header().pre_apply
        });
        let known = match db.checksum_at(position.txid).or(before_next) {
            Some(known) => known,
            None => return Ok(Resume::Gap),
        };
        if position.txid.0 > 0 && known != position.checksum {
            return Ok(Resume::Diverged);
        }
        Ok(if next.is_some() { Resume::Continue } else { Resume::Gap })
    }

    fn checksum_at(&self, name: &DatabaseName, txid: Txid) -> Result<Option<Checksum>, EngineError> {
        Ok(self.databases.lock().get(name).and_then(|db| db.checksum_at(txid)))
    }

    fn recent_record(&self, name: &DatabaseName, min_txid: Txid) -> Option<ShippedRecord> {
        // Some are not: streams go both ways.
        let in_memory = |record: &ShippedRecord| {
            !record.min_txid.0.is_multiple_of(3) && matches!(record.payload, RecordPayload::Bytes(_))
        };
        self.record(name, min_txid).ok().flatten().filter(in_memory)
    }

    fn record(&self, name: &DatabaseName, min_txid: Txid) -> Result<Option<ShippedRecord>, EngineError> {
        Ok(self.databases.lock().get(name).and_then(|db| db.records.get(&min_txid.0).cloned()))
    }

    fn pages(&self, name: &DatabaseName, range: RangeInclusive<u32>) -> Result<PageRange, EngineError> {
        let mut faults = self.faults.lock();
        while faults.pages_held_after != 0 && *range.end() > faults.pages_held_after {
            self.wait(&mut faults);
        }
        drop(faults);
        self.seen.lock().pages_read.push(range.clone());
        let databases = self.databases.lock();
        let db = databases.get(name).ok_or_else(|| EngineError::NoSuchDatabase(name.clone()))?;
        let wanted = (1..).zip(&db.pages).filter(|(pgno, _)| range.contains(pgno));
        Ok(PageRange {
            position: db.pos,
            page_size: db.page_size,
            commit: db.pages.len() as u32,
            pages: wanted.map(|(pgno, page)| (pgno, Bytes::copy_from_slice(page))).collect(),
        })
    }

    fn follower_position(&self, follower: u64, name: &DatabaseName, needs_after: Option<Txid>) {
        self.seen.lock().needs.insert((follower, name.clone()), needs_after);
    }
}

impl Sink for MemoryNode {
    fn node_id(&self) -> u64 {
        self.id
    }

    fn epoch(&self) -> Epoch {
        Source::epoch(self)
    }

    fn observe_epoch(&self, epoch: Epoch) -> Result<(), EngineError> {
        let seen = self.epoch.fetch_max(epoch.0, Ordering::SeqCst);
        if epoch.0 < seen {
            return Err(EngineError::OldEpoch { got: epoch.0, seen });
        }
        Ok(())
    }

    fn databases(&self) -> Vec<(DatabaseName, Pos)> {
        Source::databases(self)
    }

    fn position(&self, name: &DatabaseName) -> Pos {
        self.pos(name)
    }

    fn receive(
        &self,
        name: &DatabaseName,
        records: Vec<ShippedRecord>,
        _durable: &mut dyn FnMut(Pos),
    ) -> Result<Pos, EngineError> {
        let mut faults = self.faults.lock();
        while faults.held.contains(name) {
            self.wait(&mut faults);
        }
        if let Some(left @ 1..) = faults.busy.get_mut(name) {
            *left -= 1;
            self.seen.lock().busy_answers += 1;
            return Err(EngineError::Busy(name.clone()));
        }
        drop(faults);
        self.healthy(name)?;
        self.seen.lock().batches.push((name.clone(), records.len()));
        let mut databases = self.databases.lock();
        let db = databases.entry(name.clone()).or_default();
        records.iter().try_for_each(|record| self.apply(db, name, record))?;
        let pos = db.pos;
        drop(databases);
        self.moved(name);
        Ok(pos)
    }

    fn staging_dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    fn install(
        &self,
        name: &DatabaseName,
        snapshot: StagedSnapshot,
        common: Option<Txid>,
    ) -> Result<(), EngineError> {
        self.healthy(name)?;
        let bytes = std::fs::read(&snapshot.path).unwrap();
        assert_eq!(bytes.len(), snapshot.commit as usize * snapshot.page_size as usize);
        let pages = match snapshot.page_size {
            0 => Vec::new(),
            page_size => bytes.chunks(page_size as usize).map(<[u8]>::to_vec).collect(),
        };
        let db = Database {
            page_size: snapshot.page_size,
            pages,
            records: BTreeMap::new(),
            pos: snapshot.position,
        };
        assert_eq!(db.checksum(), snapshot.position.checksum, "{name} was staged wrongly");
        std::fs::remove_file(&snapshot.path).unwrap();
        self.databases.lock().insert(name.clone(), db);
        self.seen.lock().installs.push((name.clone(), snapshot.position, common));
        self.moved(name);
        Ok(())
    }

    fn checksum_at(&self, name: &DatabaseName, txid: Txid) -> Result<Option<Checksum>, EngineError> {
        Source::checksum_at(self, name, txid)
    }

    fn kept(&self, name: &DatabaseName) -> Option<(Txid, Txid)> {
        let databases = self.databases.lock();
        let records = &databases.get(name)?.records;
        Some((records.values().next()?.min_txid, records.values().last()?.max_txid))
    }

    fn upstream_changed(&self, upstream: Option<String>) {
        self.seen.lock().upstreams.push(upstream);
    }

    fn upstream_position(&self, name: &DatabaseName, position: Pos, _upstream_unix_ms: i64) {
        self.seen.lock().upstream_positions.insert(name.clone(), position);
    }
}
