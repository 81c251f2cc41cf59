//! HTTP bodies: whole ones, and ones that a task writes as it goes.

use bytes::Bytes;
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use std::io;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Body of every response of the node and of the requests it makes.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A body that is already there.
pub fn full(content: impl Into<Bytes>) -> Body {
    Full::new(content.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Writing end of a streamed body. Dropping it ends the body; it is closed when the peer no longer reads.
pub type BodySender = mpsc::Sender<Bytes>;

/// A streamed body with room for `parts` parts that the peer has not taken yet.
pub fn channel(parts: usize) -> (BodySender, Body) {
    let (sender, receiver) = mpsc::channel(parts);
    let stream = ReceiverStream::new(receiver).map(|part| Ok(Frame::data(part)));
    (sender, StreamBody::new(stream).boxed_unsync())
}
