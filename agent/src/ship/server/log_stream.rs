//! `GET /v1/databases/log`: the records of one database after a position, and its live tail.

use super::changes::Watch;
use super::session::Session;
use super::{Server, database, position};
use crate::DatabaseName;
use crate::ship::body::{self, Body, BodySender};
use crate::ship::engine::{EngineError, RecordPayload, Resume, ShippedRecord, Source};
use crate::ship::frame::{CHUNK_BYTES_MAX, EndReason, Frame, INLINE_RECORD_BYTES_MAX, RecordHead};
use crate::ship::peer::{Identity, POSITION_HEADER, Refusal, RefusalCode, text_value};
use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use hyper::body::Incoming;
use ltx::{Pos, Txid};
use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Records and bytes read in one go; all of it goes into one DATA frame when it is there.
const BATCH_RECORDS: usize = 256;
const BATCH_BYTES: usize = 256 << 10;

/// Parts that wait for the network, per stream.
const PARTS: usize = 2;

/// Answers the request and starts the stream.
pub(super) async fn open(
    server: &Arc<Server>,
    follower: Identity,
    request: &Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let (name, after) = (database(request)?, position(request, "txid", "checksum")?);
    let session = server.sessions.get(follower.node_id);
    // Watched before the position is compared, so that no move falls between.
    let watch = server.changes.watch(&name);
    resume(server, &name, after).await?;
    let (sender, body) = body::channel(PARTS);
    let mut response = Response::new(body);
    if let Some(pos) = server.position(&name) {
        response.headers_mut().insert(POSITION_HEADER, text_value(&pos.to_string()));
    }
    let cancel = session.as_ref().map_or_else(|| server.cancel.child_token(), |s| s.cancel.child_token());
    let stream = LogStream {
        open: Open::new(session, &name),
        server: Arc::clone(server),
        name,
        watch,
        sender,
        cancel,
    };
    server.tracker.spawn(stream.run(after));
    Ok(response)
}

/// Compares the follower's position with the history; anything but `Continue` is a refusal.
async fn resume(server: &Server, name: &DatabaseName, after: Pos) -> Result<(), Refusal> {
    let here = server.position(name);
    let Some(here) = here else {
        return Err(EngineError::NoSuchDatabase(name.clone()).into());
    };
    let of = name.clone();
    let (code, what) = match server.blocking(move |source| source.resume(&of, after)).await? {
        Resume::Continue => return Ok(()),
        Resume::Gap => (RefusalCode::Gap, "the records after it are no longer kept; take a snapshot"),
        Resume::Diverged => (RefusalCode::Diverged, "it is not in the history here"),
    };
    let message = format!("{name} cannot be continued from {after} (here: {here}): {what}");
    Err(Refusal { position: Some(here), ..Refusal::new(code, message) })
}

/// Says on the follower's session that a log stream is open, while it is.
struct Open {
    session: Option<Arc<Session>>,
    name: DatabaseName,
}

impl Open {
    fn new(session: Option<Arc<Session>>, name: &DatabaseName) -> Self {
        if let Some(session) = &session {
            session.dirty.stream_opened(name);
        }
        Open { session, name: name.clone() }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            session.dirty.stream_closed(&self.name);
        }
    }
}

/// Records that were read together.
#[derive(Default)]
struct Batch {
    /// Frames, ready to send.
    frames: BytesMut,
    /// A large record after them.
    large: Option<(RecordHead, Large)>,
    /// Position after all of it.
    pos: Option<Pos>,
}

/// Where the bytes of a large record come from.
enum Large {
    Bytes(Bytes),
    File(File),
}

/// Why a stream stopped.
enum Stop {
    /// The follower closed it.
    Closed,
    /// A well-defined end.
    End(EndReason),
    /// It cannot go on.
    Refused(Refusal),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Stop::Refused(refusal)
    }
}

struct LogStream {
    server: Arc<Server>,
    name: DatabaseName,
    watch: Watch,
    sender: BodySender,
    cancel: CancellationToken,
    open: Open,
}

impl LogStream {
    async fn run(self, after: Pos) {
        let stop = tokio::select! {
            stop = self.stream(after) => stop,
            () = self.sender.closed() => Stop::Closed,
            () = self.cancel.cancelled() => Stop::End(EndReason::Stopping),
        };
        let last = match stop {
            Stop::Closed => return,
            Stop::End(reason) => Frame::End(reason),
            Stop::Refused(refusal) => {
                tracing::info!(database = %self.name, "ended a log stream: {refusal}");
                Frame::Error { code: refusal.code, message: refusal.message }
            }
        };
        let mut part = BytesMut::new();
        last.encode(&mut part);
        // Before the last frame: what moves from here on is told on the control stream.
        drop(self.open);
        tokio::select! {
            _ = self.sender.send(part.freeze()) => {}
            () = self.cancel.cancelled() => {}
        }
    }

    async fn stream(&self, mut pos: Pos) -> Stop {
        loop {
            match self.step(pos).await {
                Ok(next) => pos = next,
                Err(stop) => return stop,
            }
        }
    }

    /// Sends what is there, or waits for more.
    async fn step(&self, pos: Pos) -> Result<Pos, Stop> {
        let here = self.server.position(&self.name);
        if here == Some(pos) {
            return match timeout(self.server.options.idle_stream, self.watch.moved()).await {
                Ok(()) => Ok(pos),
                Err(_) => Err(Stop::End(EndReason::Idle)),
            };
        }
        let batch = self.next_batch(pos).await?;
        let Some(next) = batch.pos else {
            // The history moved away under the stream: a snapshot was installed here, the database was removed,
            // or retention overtook the follower.
            resume(&self.server, &self.name, pos).await?;
            let message = format!("the record of {} after {pos} is missing from the log", self.name);
            return Err(Refusal::new(RefusalCode::Gap, message).into());
        };
        if !batch.frames.is_empty() {
            self.send(batch.frames).await?;
        }
        if let Some((head, large)) = batch.large {
            self.send_large(head, large).await?;
        }
        Ok(next)
    }

    /// What is there after `pos`: from memory, where nothing waits, or read from the log.
    async fn next_batch(&self, pos: Pos) -> Result<Batch, Refusal> {
        let source = &self.server.source;
        let recent = read_batch(&self.name, pos.txid, |txid| Ok(source.recent_record(&self.name, txid)))?;
        if recent.pos.is_some() {
            return Ok(recent);
        }
        let name = self.name.clone();
        let read = move |source: &dyn Source| read_batch(&name, pos.txid, |txid| source.record(&name, txid));
        self.server.blocking(read).await
    }

    async fn send(&self, frames: BytesMut) -> Result<(), Stop> {
        self.sender.send(frames.freeze()).await.map_err(|_| Stop::Closed)
    }

    async fn send_large(&self, head: RecordHead, mut large: Large) -> Result<(), Stop> {
        let mut frames = BytesMut::new();
        Frame::RecordStart(head).encode(&mut frames);
        let mut left = head.size;
        while left > 0 {
            let len = left.min(CHUNK_BYTES_MAX as u64) as usize;
            let chunk = match &mut large {
                Large::Bytes(bytes) => bytes.split_to(len),
                Large::File(file) => {
                    let mut file = file.try_clone().map_err(|e| self.unreadable(e))?;
                    let read = move || {
                        let mut chunk = vec![0; len];
                        file.read_exact(&mut chunk).map(|()| Bytes::from(chunk))
                    };
                    let read = tokio::task::spawn_blocking(read).await.map_err(|e| self.unreadable(e))?;
                    read.map_err(|e| self.unreadable(e))?
                }
            };
            Frame::RecordChunk(chunk).encode(&mut frames);
            self.send(frames.split()).await?;
            left -= len as u64;
        }
        Ok(())
    }

    fn unreadable(&self, error: impl std::fmt::Display) -> Stop {
        Stop::Refused(Refusal::new(
            RefusalCode::Engine,
            format!("cannot read a record of {}: {error}", self.name),
        ))
    }
}

/// Reads the records after `after` that are there, up to a batch.
fn read_batch(
    name: &DatabaseName,
    after: Txid,
    record: impl Fn(Txid) -> Result<Option<ShippedRecord>, EngineError>,
) -> Result<Batch, EngineError> {
    let mut batch = Batch::default();
    let mut last = after;
    for _ in 0..BATCH_RECORDS {
        if batch.large.is_some() || batch.frames.len() >= BATCH_BYTES {
            break;
        }
        let Some(record) = record(Txid(last.0.saturating_add(1)))? else {
            break;
        };
        last = record.max_txid;
        batch.pos = Some(Pos { txid: last, checksum: record.post_apply });
        add(&mut batch, name, record)?;
    }
    Ok(batch)
}

fn add(batch: &mut Batch, name: &DatabaseName, record: ShippedRecord) -> Result<(), EngineError> {
    let head = |size| RecordHead {
        epoch: record.epoch,
        min_txid: record.min_txid,
        max_txid: record.max_txid,
        post_apply: record.post_apply,
        size,
    };
    match record.payload {
        RecordPayload::Bytes(bytes) if bytes.len() <= INLINE_RECORD_BYTES_MAX => {
            Frame::Record(head(bytes.len() as u64), bytes).encode(&mut batch.frames);
        }
        RecordPayload::Bytes(bytes) => {
            batch.large = Some((head(bytes.len() as u64), Large::Bytes(bytes)));
        }
        RecordPayload::File { ref path, size } => {
            let failed =
                |e| EngineError::Other(format!("cannot read a record of {name} in {}: {e}", path.display()));
            // Opened at once: compaction may remove the name while the stream waits for the network.
            let mut file = File::open(path).map_err(failed)?;
            if size <= INLINE_RECORD_BYTES_MAX as u64 {
                let mut bytes = vec![0; size as usize];
                file.read_exact(&mut bytes).map_err(failed)?;
                Frame::Record(head(size), bytes.into()).encode(&mut batch.frames);
            } else {
                batch.large = Some((head(size), Large::File(file)));
            }
        }
    }
    Ok(())
}
