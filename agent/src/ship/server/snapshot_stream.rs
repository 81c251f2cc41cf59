//! `GET /v1/databases/snapshot`: the pages of one database, while writers go on.

use super::session::Session;
use super::{Server, database, parameter};
use crate::DatabaseName;
use crate::ship::body::{self, Body, BodySender};
use crate::ship::engine::{EngineError, PageRange, Resume};
use crate::ship::frame::{CHUNK_BYTES_MAX, EndReason, Frame, encode_pages};
use crate::ship::peer::{Identity, POSITION_HEADER, Refusal, RefusalCode, query_value, text_value};
use bytes::BytesMut;
use http::{Request, Response};
use hyper::body::Incoming;
use ltx::{Checksum, Pos, Txid};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Parts that wait for the network, per snapshot.
const PARTS: usize = 2;

/// Answers the request and starts the stream. Without `base_txid` and `base_checksum`, or when the records after
/// that base are no longer kept, the snapshot begins anew at page 1.
pub(super) async fn open(
    server: &Arc<Server>,
    follower: Identity,
    request: &Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let name = database(request)?;
    let Some(here) = server.position(&name) else {
        return Err(EngineError::NoSuchDatabase(name).into());
    };
    let mut from = None;
    if query_value(request.uri().query(), "base_txid").is_some() {
        let base = Pos {
            txid: parameter::<Txid>(request, "base_txid")?,
            checksum: parameter::<Checksum>(request, "base_checksum")?,
        };
        let first_page = parameter::<u32>(request, "from_page")?;
        let of = name.clone();
        let kept = server.blocking(move |source| source.resume(&of, base)).await?;
        if first_page > 0 && kept == Resume::Continue {
            from = Some((base, first_page));
        }
    }
    let session = server.sessions.get(follower.node_id);
    let cancel = session.as_ref().map_or_else(|| server.cancel.child_token(), |s| s.cancel.child_token());
    let (sender, body) = body::channel(PARTS);
    let mut response = Response::new(body);
    response.headers_mut().insert(POSITION_HEADER, text_value(&here.to_string()));
    tracing::info!(database = %name, %follower, resumed = from.is_some(), "sending a snapshot");
    let stream = SnapshotStream { server: Arc::clone(server), name, session, sender, cancel };
    server.tracker.spawn(stream.run(from));
    Ok(response)
}

struct SnapshotStream {
    server: Arc<Server>,
    name: DatabaseName,
    session: Option<Arc<Session>>,
    sender: BodySender,
    cancel: CancellationToken,
}

/// What one read of the database gives.
struct Read {
    range: PageRange,
    /// Encoded Pages frame; empty when there were no pages.
    frame: BytesMut,
}

impl SnapshotStream {
    async fn run(self, from: Option<(Pos, u32)>) {
        let result = tokio::select! {
            result = self.stream(from) => result,
            () = self.sender.closed() => return,
            () = self.cancel.cancelled() => Ok(Frame::End(EndReason::Stopping)),
        };
        let last = result.unwrap_or_else(|refusal| {
            tracing::warn!(database = %self.name, "ended a snapshot: {refusal}");
            Frame::Error { code: refusal.code, message: refusal.message }
        });
        let mut part = BytesMut::new();
        last.encode(&mut part);
        tokio::select! {
            _ = self.sender.send(part.freeze()) => {}
            () = self.cancel.cancelled() => {}
        }
    }

    /// Sends all pages; gives the last frame.
    async fn stream(&self, from: Option<(Pos, u32)>) -> Result<Frame, Refusal> {
        let mut next = from.map_or(1, |(_, first_page)| first_page);
        // The page size is not known yet: one page of the largest fits, 128 of the smallest do as well.
        let mut read = self.read(next, 1).await?;
        let (page_size, mut out) = (read.range.page_size, BytesMut::new());
        let base = from.map_or(read.range.position, |(base, _)| base);
        if let Some(session) = &self.session {
            session.note(&self.name, base.txid);
        }
        let commit = read.range.commit;
        let epoch = self.server.source.epoch();
        Frame::SnapshotBegin { base, epoch, page_size, commit, first_page: next }.encode(&mut out);
        let step = (CHUNK_BYTES_MAX as u32).checked_div(page_size).unwrap_or(1);
        let mut count = 1;
        loop {
            out.extend_from_slice(&read.frame);
            if !out.is_empty() && self.sender.send(out.split().freeze()).await.is_err() {
                // The follower is gone; nobody reads the last frame.
                return Ok(Frame::End(EndReason::Stopping));
            }
            next = next.saturating_add(count);
            // Pages past the end now that were in the database at `base` were cut off by a record after it, and
            // pages that come later are in records: neither is needed from here.
            if next > read.range.commit {
                break;
            }
            count = step;
            read = self.read(next, count).await?;
            if read.range.page_size != page_size && read.range.commit != 0 {
                let message = format!(
                    "the page size of {} changed from {page_size} to {} while its snapshot was sent; begin anew",
                    self.name, read.range.page_size
                );
                return Err(Refusal::new(RefusalCode::PageSize, message));
            }
        }
        // Asked after the last read: no page that was sent is newer.
        let position = self.server.position(&self.name);
        let position =
            position.ok_or_else(|| Refusal::from(EngineError::NoSuchDatabase(self.name.clone())))?;
        Ok(Frame::SnapshotEnd { position, epoch: self.server.source.epoch() })
    }

    /// Reads and compresses `count` pages from `first` on.
    async fn read(&self, first: u32, count: u32) -> Result<Read, Refusal> {
        let name = self.name.clone();
        let last = first.saturating_add(count - 1);
        self.server
            .blocking(move |source| {
                let range = source.pages(&name, first..=last)?;
                let mut frame = BytesMut::new();
                if !range.pages.is_empty() {
                    Frame::Pages(encode_pages(&range.pages)).encode(&mut frame);
                }
                Ok(Read { range, frame })
            })
            .await
    }
}
