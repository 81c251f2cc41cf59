//! Turns a log stream into records: small ones in memory, large ones in files of the staging directory.

use super::staging;
use crate::ship::engine::{RecordPayload, ShippedRecord};
use crate::ship::frame::{EndReason, Frame, FrameError, FrameReader, RecordHead};
use crate::ship::peer::RefusalCode;
use bytes::Bytes;
use hyper::body::Incoming;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers the files of large records within this process; an earlier process's files are gone by then.
static NEXT_FILE: AtomicU64 = AtomicU64::new(1);

/// Why no further record comes.
#[derive(Debug)]
pub(super) enum Stop {
    /// The upstream ended the stream in good order.
    End(EndReason),
    /// The upstream cannot go on.
    Refused(RefusalCode, String),
    /// The stream broke or is invalid.
    Frame(FrameError),
    /// A large record could not be stored here.
    Store(PathBuf, io::Error),
}

/// Reads the records of one log stream.
pub(super) struct Intake {
    reader: FrameReader<Incoming>,
    staging_dir: PathBuf,
}

impl Intake {
    pub(super) fn new(body: Incoming, staging_dir: &Path) -> Self {
        Intake { reader: FrameReader::new(body), staging_dir: staging_dir.to_owned() }
    }

    /// The next record. Must be polled to its end: cancelling loses a large record that was half-way.
    pub(super) async fn next(&mut self) -> Result<ShippedRecord, Stop> {
        match self.reader.expect().await.map_err(Stop::Frame)? {
            Frame::Record(head, bytes) => Ok(record(head, RecordPayload::Bytes(bytes))),
            Frame::RecordStart(head) => self.large(head).await,
            Frame::End(reason) => Err(Stop::End(reason)),
            Frame::Error { code, message } => Err(Stop::Refused(code, message)),
            other => Err(Stop::Frame(FrameError::OutOfPlace(other.kind()))),
        }
    }

    async fn large(&mut self, head: RecordHead) -> Result<ShippedRecord, Stop> {
        let path = staging::record_path(&self.staging_dir, NEXT_FILE.fetch_add(1, Ordering::Relaxed));
        let store = |e: io::Error| Stop::Store(path.clone(), e);
        let mut partial = Partial { path: path.clone(), complete: false };
        let mut file = {
            let path = path.clone();
            blocking(move || File::create(path)).await.map_err(store)?
        };
        let mut left = head.size;
        while left > 0 {
            let chunk = match self.reader.expect().await.map_err(Stop::Frame)? {
                Frame::RecordChunk(chunk) => chunk,
                Frame::Error { code, message } => return Err(Stop::Refused(code, message)),
                Frame::End(reason) => return Err(Stop::End(reason)),
                other => return Err(Stop::Frame(FrameError::OutOfPlace(other.kind()))),
            };
            left = left.checked_sub(chunk.len() as u64).ok_or_else(|| {
                let why = format!("chunks of more than the {} bytes announced", head.size);
                Stop::Frame(FrameError::Malformed { what: "RecordChunk", why })
            })?;
            file = blocking(move || append(file, chunk)).await.map_err(store)?;
        }
        blocking(move || file.sync_all()).await.map_err(store)?;
        partial.complete = true;
        Ok(record(head, RecordPayload::File { path, size: head.size }))
    }
}

fn append(mut file: File, chunk: Bytes) -> io::Result<File> {
    file.write_all(&chunk)?;
    Ok(file)
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(call).await.map_err(io::Error::other)?
}

/// Removes the file of a record that did not come to its end.
struct Partial {
    path: PathBuf,
    complete: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.complete {
            let _ = staging::remove(&self.path);
        }
    }
}

fn record(head: RecordHead, payload: RecordPayload) -> ShippedRecord {
    ShippedRecord {
        epoch: head.epoch,
        min_txid: head.min_txid,
        max_txid: head.max_txid,
        post_apply: head.post_apply,
        payload,
    }
}

/// Bytes of a record that are held in memory.
pub(super) fn memory_bytes(record: &ShippedRecord) -> usize {
    match &record.payload {
        RecordPayload::Bytes(bytes) => bytes.len(),
        RecordPayload::File { .. } => 0,
    }
}

/// Bytes of a record wherever they are.
pub(super) fn total_bytes(record: &ShippedRecord) -> u64 {
    match &record.payload {
        RecordPayload::Bytes(bytes) => bytes.len() as u64,
        RecordPayload::File { size, .. } => *size,
    }
}

/// Files of records, removed when they are done with, unless the sink renamed them away.
#[derive(Default)]
pub(super) struct RecordFiles(Vec<PathBuf>);

impl RecordFiles {
    pub(super) fn add(&mut self, record: &ShippedRecord) {
        if let RecordPayload::File { path, .. } = &record.payload {
            self.0.push(path.clone());
        }
    }
}

impl Drop for RecordFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = staging::remove(path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove the file of a received record");
            }
        }
    }
}
