//! A file system in memory that remembers every operation, so that a test can ask what a disk may hold when the power
//! fails after any of them: of everything not synced, any 512-byte sector may or may not be there, and of the directory
//! operations not synced, any prefix. It can also be full, or fail to sync.

use crate::log::storage::{Storage, StorageFile};
use fastrand::Rng;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Disks write sectors whole.
const SECTOR_BYTES: u64 = 512;

#[derive(Clone, Debug)]
enum Op {
    Write { file: usize, offset: u64, data: Vec<u8> },
    SetLen { file: usize, len: u64 },
    Sync { file: usize },
    Create { path: PathBuf, file: usize },
    Rename { from: PathBuf, to: PathBuf },
    Remove { path: PathBuf },
    SyncDir { dir: PathBuf },
}

#[derive(Clone, Default)]
struct State {
    files: Vec<Vec<u8>>,
    names: BTreeMap<PathBuf, usize>,
    dirs: BTreeSet<PathBuf>,
    ops: Vec<Op>,
    /// The image that `ops` begin with.
    base: Option<Box<State>>,
    /// Bytes that files may still grow by.
    space: Option<u64>,
    /// Syncs fail from now on.
    broken: bool,
    /// Overwriting fails as on a full copy-on-write file system, after this many bytes have been written.
    torn_write: Option<usize>,
    /// Reads of these bytes of a file fail.
    unreadable: Option<(PathBuf, std::ops::Range<u64>)>,
}

/// See the module's documentation. Clones are the same file system.
#[derive(Clone, Default)]
pub struct MemoryStorage(Arc<Mutex<State>>);

struct MemoryFile {
    state: Arc<Mutex<State>>,
    file: usize,
}

impl MemoryStorage {
    /// Number of operations so far.
    pub fn ops(&self) -> usize {
        self.0.lock().ops.len()
    }

    /// Whether operation `i` is a sync.
    pub fn is_sync(&self, i: usize) -> bool {
        matches!(self.0.lock().ops[i], Op::Sync { .. } | Op::SyncDir { .. })
    }

    /// A disk after the power failed when `ops` operations were done.
    pub fn crash(&self, ops: usize, random: &mut Rng) -> MemoryStorage {
        let state = self.0.lock();
        let mut durable = state.base.as_deref().cloned().unwrap_or_default();
        durable.dirs = state.dirs.clone();
        durable.files.resize(state.files.len(), Vec::new());
        let mut pending_writes: Vec<Vec<&Op>> = vec![Vec::new(); state.files.len()];
        let mut pending_names: Vec<&Op> = Vec::new();
        for op in &state.ops[..ops] {
            match op {
                Op::Write { file, .. } | Op::SetLen { file, .. } => pending_writes[*file].push(op),
                Op::Sync { file } => pending_writes[*file].drain(..).for_each(|op| durable.replay(op)),
                Op::Create { .. } | Op::Rename { .. } | Op::Remove { .. } => pending_names.push(op),
                Op::SyncDir { dir } => {
                    let touches = |path: &Path| path.parent() == Some(dir);
                    let last = pending_names.iter().rposition(|op| match op {
                        Op::Rename { from, to } => touches(from) || touches(to),
                        Op::Create { path, .. } | Op::Remove { path } => touches(path),
                        _ => unreachable!(),
                    });
                    pending_names.drain(..last.map_or(0, |i| i + 1)).for_each(|op| durable.replay(op));
                }
            }
        }
        let kept_names = random.usize(..=pending_names.len());
        pending_names[..kept_names].iter().for_each(|op| durable.replay(op));
        // All, none, or some: the extremes are likely on a real disk and rare among independent coins.
        let keep_of_four = random.u64(..=4);
        for op in pending_writes.into_iter().flatten() {
            durable.replay_torn(op, random, keep_of_four);
        }
        durable.ops.clear();
        let base = durable.clone();
        durable.base = Some(Box::new(base));
        MemoryStorage(Arc::new(Mutex::new(durable)))
    }

    /// The same files, without history.
    pub fn copy(&self) -> MemoryStorage {
        let mut state = self.0.lock().clone();
        state.ops.clear();
        state.base = None;
        let base = state.clone();
        state.base = Some(Box::new(base));
        MemoryStorage(Arc::new(Mutex::new(state)))
    }

    /// Paths of all files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.0.lock().names.keys().cloned().collect()
    }

    /// Changes the content of a file behind everyone's back.
    pub fn edit(&self, path: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.0.lock();
        let file = state.names[path];
        edit(&mut state.files[file]);
    }

    /// Content of a file.
    pub fn content(&self, path: &Path) -> Vec<u8> {
        let state = self.0.lock();
        state.files[state.names[path]].clone()
    }

    /// Lets files grow by so many bytes; `None`: without end.
    pub fn set_space(&self, bytes: Option<u64>) {
        self.0.lock().space = bytes;
    }

    /// Makes the next write stop with "no space" after so many bytes.
    pub fn tear_next_write(&self, after: usize) {
        self.0.lock().torn_write = Some(after);
    }

    /// Makes all syncs fail, or work again.
    pub fn set_broken(&self, broken: bool) {
        self.0.lock().broken = broken;
    }

    /// Makes reads of a part of a file fail.
    pub fn set_unreadable(&self, part: Option<(PathBuf, std::ops::Range<u64>)>) {
        self.0.lock().unreadable = part;
    }

    fn with_dir<T>(&self, path: &Path, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.0.lock();
        let parent = path.parent().unwrap_or(Path::new("/"));
        if !state.dirs.contains(parent) {
            return Err(io::ErrorKind::NotFound.into());
        }
        act(&mut state)
    }
}

impl State {
    fn replay(&mut self, op: &Op) {
        match op {
            Op::Write { file, offset, data } => write(&mut self.files[*file], *offset, data),
            Op::SetLen { file, len } => self.files[*file].resize(*len as usize, 0),
            Op::Create { path, file } => {
                self.names.insert(path.clone(), *file);
            }
            Op::Rename { from, to } => {
                let file = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), file);
            }
            Op::Remove { path } => {
                self.names.remove(path).unwrap();
            }
            Op::Sync { .. } | Op::SyncDir { .. } => {}
        }
    }

    fn replay_torn(&mut self, op: &Op, random: &mut Rng, keep_of_four: u64) {
        let Op::Write { file, offset, data } = op else {
            if random.u64(..4) < keep_of_four {
                self.replay(op);
            }
            return;
        };
        let mut at = *offset;
        while at < offset + data.len() as u64 {
            let end = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(offset + data.len() as u64);
            if random.u64(..4) < keep_of_four {
                write(&mut self.files[*file], at, &data[(at - offset) as usize..(end - offset) as usize]);
            }
            at = end;
        }
    }
}

fn write(content: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let end = offset as usize + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset as usize..end].copy_from_slice(data);
}

impl Storage for MemoryStorage {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn StorageFile>> {
        let file = self.with_dir(path, |state| match state.names.get(path) {
            Some(file) => Ok(*file),
            None if create => {
                let file = state.files.len();
                state.files.push(Vec::new());
                state.names.insert(path.into(), file);
                state.ops.push(Op::Create { path: path.into(), file });
                Ok(file)
            }
            None => Err(io::ErrorKind::NotFound.into()),
        })?;
        Ok(Arc::new(MemoryFile { state: self.0.clone(), file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.with_dir(to, |state| {
            let file = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            state.names.insert(to.into(), file);
            state.ops.push(Op::Rename { from: from.into(), to: to.into() });
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.with_dir(path, |state| {
            let file = state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
            let freed = state.files[file].len() as u64;
            state.space = state.space.map(|space| space + freed);
            state.ops.push(Op::Remove { path: path.into() });
            Ok(())
        })
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.dirs.extend(path.ancestors().map(Path::to_owned));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.0.lock();
        if !state.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let entries = state.names.keys().chain(&state.dirs).filter(|path| path.parent() == Some(dir));
        Ok(entries.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        if state.broken {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        state.ops.push(Op::SyncDir { dir: dir.into() });
        Ok(())
    }
}

impl StorageFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.state.lock();
        if let Some((path, range)) = &state.unreadable
            && state.names.get(path) == Some(&self.file)
            && offset < range.end
            && range.start < offset + buffer.len() as u64
        {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let content = &state.files[self.file];
        let from = (offset as usize).min(content.len());
        let n = buffer.len().min(content.len() - from);
        buffer[..n].copy_from_slice(&content[from..from + n]);
        Ok(n)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        let torn = state.torn_write.take();
        let growth = (offset + data.len() as u64).saturating_sub(state.files[self.file].len() as u64);
        let room = state.space.unwrap_or(u64::MAX);
        let allowed = torn.unwrap_or(data.len()).min(data.len() - growth.saturating_sub(room) as usize);
        let data = &data[..allowed];
        let grown = (offset + allowed as u64).saturating_sub(state.files[self.file].len() as u64);
        state.space = state.space.map(|space| space - grown);
        write(&mut state.files[self.file], offset, data);
        state.ops.push(Op::Write { file: self.file, offset, data: data.into() });
        if torn.is_some() || growth > room { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.broken {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        state.ops.push(Op::Sync { file: self.file });
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().files[self.file].len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        state.files[self.file].resize(len as usize, 0);
        state.ops.push(Op::SetLen { file: self.file, len });
        Ok(())
    }
}
