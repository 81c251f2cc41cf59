//! A snapshot on its way in: one plain file that grows page by page and is brought to one exact position by the
//! records after its base. A small file beside it remembers the progress over cuts and restarts.

use crate::DatabaseName;
use crate::ship::engine::{Epoch, RecordPayload, ShippedRecord, StagedSnapshot};
use bytes::Bytes;
use ltx::{Checksum, Pos, Txid};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PAGES_SUFFIX: &str = ".snapshot";
const PROGRESS_SUFFIX: &str = ".progress";
const RECORD_PREFIX: &str = "incoming-";
const RECORD_SUFFIX: &str = ".record";

/// Version of the progress file; one of another version is discarded.
const FORMAT: u32 = 1;

/// Pages are made durable and the progress remembered after this many bytes: what a crash can cost.
const CHECKPOINT_BYTES: u64 = 64 << 20;

/// Largest progress file that is read.
const PROGRESS_BYTES_MAX: u64 = 4096;

/// Why a staged snapshot cannot go on. It is discarded and begun anew, except after [`StagingError::Io`].
#[derive(Debug, thiserror::Error)]
pub(super) enum StagingError {
    /// The file system refuses.
    #[error("staging {name} in {}: {source}", path.display())]
    Io { name: DatabaseName, path: PathBuf, source: io::Error },
    /// The upstream's bytes contradict each other.
    #[error("the snapshot of {name} is of no use: {why}; it is discarded and begun anew")]
    Unusable { name: DatabaseName, why: String },
}

/// What the progress file holds. Numbers that exceed 53 bits are hex text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    format: u32,
    base_txid: String,
    base_checksum: String,
    epoch: u64,
    page_size: u32,
    commit: u32,
    next_page: u32,
    /// Transaction up to which records must be applied; set when all pages are here.
    end_txid: Option<String>,
}

/// A snapshot being received.
#[derive(Debug)]
pub(super) struct Staging {
    name: DatabaseName,
    pages_path: PathBuf,
    progress_path: PathBuf,
    file: File,
    /// All pages here are as of this position or later; after [`Staging::finish_pages`] records move it on.
    pub(super) pos: Pos,
    epoch: Epoch,
    page_size: u32,
    commit: u32,
    /// First page that has not come.
    pub(super) next_page: u32,
    /// Set when all pages have come: records up to here are needed.
    pub(super) end: Option<Txid>,
    unsaved: u64,
}

impl Staging {
    /// Begins anew.
    pub(super) fn begin(
        dir: &Path,
        name: &DatabaseName,
        base: Pos,
        epoch: Epoch,
        page_size: u32,
        commit: u32,
    ) -> Result<Self, StagingError> {
        let (pages_path, progress_path) = paths(dir, name);
        let failed = io_error(name, &pages_path);
        remove(&progress_path).map_err(&failed)?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&pages_path);
        let file = file.map_err(&failed)?;
        let mut staging = Staging {
            name: name.clone(),
            pages_path,
            progress_path,
            file,
            pos: base,
            epoch,
            page_size,
            commit,
            next_page: 1,
            end: None,
            unsaved: 0,
        };
        staging.save()?;
        Ok(staging)
    }

    /// Continues what an earlier stream left; `None` when there is nothing of use.
    pub(super) fn resume(dir: &Path, name: &DatabaseName) -> Result<Option<Self>, StagingError> {
        let (pages_path, progress_path) = paths(dir, name);
        let failed = io_error(name, &progress_path);
        let Some(progress) = Progress::read(&progress_path).map_err(&failed)? else {
            return Ok(None);
        };
        let file = match OpenOptions::new().read(true).write(true).open(&pages_path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error(name, &pages_path)(e)),
        };
        let txid = |text: &str| text.parse::<Txid>().ok();
        let (Some(base), Ok(sum)) = (txid(&progress.base_txid), progress.base_checksum.parse::<Checksum>())
        else {
            return Ok(None);
        };
        let valid_size =
            ltx::is_page_size(progress.page_size) || (progress.page_size, progress.commit) == (0, 0);
        if !valid_size || progress.next_page == 0 {
            return Ok(None);
        }
        Ok(Some(Staging {
            name: name.clone(),
            pages_path,
            progress_path,
            file,
            pos: Pos { txid: base, checksum: sum },
            epoch: Epoch(progress.epoch),
            page_size: progress.page_size,
            commit: progress.commit,
            next_page: progress.next_page,
            end: progress.end_txid.as_deref().and_then(txid),
            unsaved: 0,
        }))
    }

    /// Bytes in a page.
    pub(super) fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Writes pages that have come, in ascending order.
    pub(super) fn write_pages(&mut self, pages: &[(u32, Bytes)]) -> Result<(), StagingError> {
        if self.page_size == 0 && !pages.is_empty() {
            return Err(self.unusable("it has pages but no page size".into()));
        }
        for (pgno, data) in pages {
            if *pgno < self.next_page || data.len() != self.page_size as usize {
                return Err(self.unusable(format!("page {pgno} came where page {} was due", self.next_page)));
            }
            if *pgno == ltx::lock_page(self.page_size) {
                return Err(self.unusable(format!("it contains the lock page {pgno}")));
            }
            self.write_page(*pgno, data)?;
            self.next_page = pgno.saturating_add(1);
        }
        self.save_if_due()
    }

    /// Saves after every [`CHECKPOINT_BYTES`].
    pub(super) fn save_if_due(&mut self) -> Result<(), StagingError> {
        if self.unsaved >= CHECKPOINT_BYTES { self.save() } else { Ok(()) }
    }

    fn write_page(&mut self, pgno: u32, data: &[u8]) -> Result<(), StagingError> {
        let offset = u64::from(pgno - 1) * u64::from(self.page_size);
        self.file.write_all_at(data, offset).map_err(io_error(&self.name, &self.pages_path))?;
        self.unsaved += data.len() as u64;
        Ok(())
    }

    /// All pages have come; none is newer than `end`.
    pub(super) fn finish_pages(&mut self, end: Txid) -> Result<(), StagingError> {
        if end < self.pos.txid {
            return Err(self.unusable(format!("it ends at {end}, before its base {}", self.pos.txid)));
        }
        self.end = Some(end);
        self.save()
    }

    /// Whether the file is at one exact position.
    pub(super) fn is_complete(&self) -> bool {
        self.end.is_some_and(|end| end <= self.pos.txid)
    }

    /// Applies a record that follows the position.
    pub(super) fn apply(&mut self, record: &ShippedRecord) -> Result<(), StagingError> {
        match &record.payload {
            RecordPayload::Bytes(bytes) => self.apply_file(record, &bytes[..]),
            RecordPayload::File { path, .. } => {
                let file = File::open(path).map_err(io_error(&self.name, path))?;
                self.apply_file(record, BufReader::with_capacity(128 << 10, file))
            }
        }
    }

    fn apply_file(&mut self, record: &ShippedRecord, reader: impl Read) -> Result<(), StagingError> {
        let name = self.name.clone();
        let broken = |e: ltx::Error| StagingError::Unusable {
            name: name.clone(),
            why: format!("record {}-{} is broken: {e}", record.min_txid, record.max_txid),
        };
        let mut decoder = ltx::Decoder::new(reader).map_err(&broken)?;
        let header = decoder.header().clone();
        if (header.min_txid, header.max_txid) != (record.min_txid, record.max_txid)
            || header.min_txid.0 != self.pos.txid.0 + 1
        {
            let (min, max) = (header.min_txid, header.max_txid);
            return Err(self.unusable(format!("record {min}-{max} came after {}", self.pos)));
        }
        if self.pos.txid.0 > 0 && header.pre_apply != self.pos.checksum {
            let (min, pre) = (header.min_txid, header.pre_apply);
            return Err(
                self.unusable(format!("record {min} wants checksum {pre} before it, here is {}", self.pos))
            );
        }
        if self.commit == 0 && header.commit > 0 && ltx::is_page_size(header.page_size) {
            self.page_size = header.page_size;
        }
        if header.commit > 0 && header.page_size != self.page_size {
            let (old, new) = (self.page_size, header.page_size);
            return Err(self.unusable(format!("its page size changed from {old} to {new}")));
        }
        let mut page = Vec::new();
        while let Some(pgno) = decoder.next_page(&mut page).map_err(&broken)? {
            // A page past the end would be cut off right below.
            if pgno <= header.commit {
                self.write_page(pgno, &page)?;
            }
        }
        let trailer = decoder.finish().map_err(&broken)?;
        if trailer.post_apply != record.post_apply {
            return Err(
                self.unusable(format!("record {} has another checksum than announced", header.min_txid))
            );
        }
        self.commit = header.commit;
        self.set_len()?;
        self.pos = Pos { txid: header.max_txid, checksum: trailer.post_apply };
        self.epoch = self.epoch.max(record.epoch);
        Ok(())
    }

    fn set_len(&self) -> Result<(), StagingError> {
        let len = u64::from(self.commit) * u64::from(self.page_size);
        self.file.set_len(len).map_err(io_error(&self.name, &self.pages_path))
    }

    /// Checks that the whole file has the checksum of its position, and makes it durable.
    pub(super) fn verify(&mut self) -> Result<StagedSnapshot, StagingError> {
        assert!(self.is_complete(), "verified before it was complete");
        self.set_len()?;
        let checksum = self.checksum()?;
        if checksum != self.pos.checksum {
            return Err(self.unusable(format!("it has checksum {checksum} at {}", self.pos)));
        }
        self.file.sync_all().map_err(io_error(&self.name, &self.pages_path))?;
        Ok(StagedSnapshot {
            path: self.pages_path.clone(),
            page_size: if self.commit == 0 { 0 } else { self.page_size },
            commit: self.commit,
            position: self.pos,
            epoch: self.epoch,
        })
    }

    fn checksum(&self) -> Result<Checksum, StagingError> {
        let mut sum = Checksum::EMPTY;
        if self.commit == 0 {
            return Ok(sum);
        }
        let page_size = self.page_size as usize;
        let mut buffer = vec![0; (1 << 20).max(page_size)];
        let lock_page = ltx::lock_page(self.page_size);
        let (mut pgno, mut offset) = (1_u32, 0_u64);
        let end = u64::from(self.commit) * u64::from(self.page_size);
        while offset < end {
            let len = (end - offset).min(buffer.len() as u64) as usize;
            let part = &mut buffer[..len];
            self.file.read_exact_at(part, offset).map_err(io_error(&self.name, &self.pages_path))?;
            for page in part.chunks_exact(page_size) {
                if pgno != lock_page {
                    sum = sum.xor(ltx::page_checksum(pgno, page));
                }
                pgno = pgno.saturating_add(1);
            }
            offset += len as u64;
        }
        Ok(sum)
    }

    /// Makes what has come durable and remembers it.
    pub(super) fn save(&mut self) -> Result<(), StagingError> {
        let failed = io_error(&self.name, &self.progress_path);
        self.file.sync_data().map_err(&failed)?;
        let progress = Progress {
            format: FORMAT,
            base_txid: self.pos.txid.to_string(),
            base_checksum: self.pos.checksum.to_string(),
            epoch: self.epoch.0,
            page_size: self.page_size,
            commit: self.commit,
            next_page: self.next_page,
            end_txid: self.end.map(|end| end.to_string()),
        };
        progress.write(&self.progress_path).map_err(&failed)?;
        self.unsaved = 0;
        Ok(())
    }

    /// The error for bytes that contradict each other.
    pub(super) fn unusable(&self, why: String) -> StagingError {
        StagingError::Unusable { name: self.name.clone(), why }
    }
}

impl Progress {
    fn read(path: &Path) -> io::Result<Option<Progress>> {
        let mut text = Vec::new();
        match File::open(path) {
            Ok(file) => file.take(PROGRESS_BYTES_MAX).read_to_end(&mut text)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        // A file that a crash left half-written, or of another release, only costs a new beginning.
        Ok(serde_json::from_slice(&text).ok().filter(|progress: &Progress| progress.format == FORMAT))
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let fresh = path.with_extension("progress-new");
        fs::write(&fresh, serde_json::to_vec(self)?)?;
        File::open(&fresh)?.sync_data()?;
        fs::rename(&fresh, path)
    }
}

fn io_error(name: &DatabaseName, path: &Path) -> impl Fn(io::Error) -> StagingError + use<> {
    let (name, path) = (name.clone(), path.to_owned());
    move |source| StagingError::Io { name: name.clone(), path: path.clone(), source }
}

fn paths(dir: &Path, name: &DatabaseName) -> (PathBuf, PathBuf) {
    let escaped = name.escaped();
    (dir.join(format!("{escaped}{PAGES_SUFFIX}")), dir.join(format!("{escaped}{PROGRESS_SUFFIX}")))
}

/// Removes what is staged of a database, if anything.
pub(super) fn discard(dir: &Path, name: &DatabaseName) -> Result<(), StagingError> {
    let (pages, progress) = paths(dir, name);
    for path in [progress, pages] {
        remove(&path).map_err(io_error(name, &path))?;
    }
    Ok(())
}

/// Removes a file unless it is gone already.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Path for a large record that is being received.
pub(super) fn record_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{RECORD_PREFIX}{number}{RECORD_SUFFIX}"))
}

/// Looks at what an earlier process left: gives the snapshots that can be resumed, with the transaction after which
/// they need records, and removes everything else that is ours.
pub(super) fn scan(dir: &Path) -> io::Result<Vec<(DatabaseName, Txid)>> {
    fs::create_dir_all(dir)?;
    let mut resumable = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?.file_name();
        let Some(entry) = entry.to_str() else {
            continue;
        };
        if entry.starts_with(RECORD_PREFIX) && entry.ends_with(RECORD_SUFFIX) {
            remove(&dir.join(entry))?;
            continue;
        }
        let Some(escaped) = entry.strip_suffix(PROGRESS_SUFFIX).or(entry.strip_suffix(PAGES_SUFFIX)) else {
            continue;
        };
        let Ok(name) = DatabaseName::from_escaped(escaped) else {
            continue;
        };
        match Staging::resume(dir, &name) {
            Ok(Some(staging)) if entry.ends_with(PROGRESS_SUFFIX) => resumable.push((name, staging.pos.txid)),
            Ok(Some(_)) => {}
            Ok(None) => discard(dir, &name).map_err(io::Error::other)?,
            Err(error) => tracing::warn!(database = %name, "cannot look at a staged snapshot: {error}"),
        }
    }
    Ok(resumable)
}
