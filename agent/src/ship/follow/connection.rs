//! Connections to the upstream, and the errors that its answers can mean.

use super::FollowOptions;
use crate::ship::body::Body;
use crate::ship::engine::Epoch;
use crate::ship::frame::{FrameError, MESSAGE_BYTES_MAX, full_text};
use crate::ship::http::access::Access;
use crate::ship::peer::{Identity, IdentityError, POSITION_HEADER, RefusalCode};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ltx::Pos;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Port of a node whose address names none.
pub const DEFAULT_PORT: u16 = 20202;

/// Response bytes of one stream that may wait in memory while its database applies.
const STREAM_WINDOW_BYTES: u32 = 512 << 10;

/// Response bytes of all streams of a connection. Above what slow databases can pin (see
/// [`FollowOptions::streams_max`]), so that their full windows never stop the stream of another.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// Time for the head of a response; the upstream may have to read its disk before it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Address of an upstream: `http://host[:port]`, or `https://host[:port]` where nodes use TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    host: String,
    port: u16,
    tls: bool,
}

/// Why a text is not the address of an upstream.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UpstreamError {
    /// It is no such address.
    #[error("upstream {0:?} is not of the form http://host[:port] or https://host[:port]")]
    Malformed(String),
}

impl FromStr for Upstream {
    type Err = UpstreamError;

    fn from_str(text: &str) -> Result<Self, UpstreamError> {
        let malformed = || UpstreamError::Malformed(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| malformed())?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(malformed()),
        };
        let authority = uri.authority().ok_or_else(malformed)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = match authority.port() {
            Some(port) => port.as_str().parse().map_err(|_| malformed())?,
            None if authority.as_str() == authority.host() => DEFAULT_PORT,
            None => return Err(malformed()),
        };
        if host.is_empty() || port == 0 || uri.path() != "/" || uri.query().is_some() {
            return Err(malformed());
        }
        Ok(Upstream { host: host.to_owned(), port, tls })
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        if self.host.contains(':') {
            return write!(f, "{scheme}://[{}]:{}", self.host, self.port);
        }
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

/// Why following the upstream fails. Messages name the upstream.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FollowError {
    /// No connection.
    #[error("cannot connect to upstream {upstream}: {why}")]
    Connect {
        /// Its address.
        upstream: String,
        /// The reason.
        why: String,
    },
    /// The connection or stream broke, or fell silent.
    #[error("lost upstream {upstream}: {why}")]
    Lost {
        /// Its address.
        upstream: String,
        /// The reason.
        why: String,
    },
    /// Whoever answers there is not a node this node can talk to.
    #[error("cannot follow {upstream}: {why}")]
    Identity {
        /// Its address.
        upstream: String,
        /// The reason; names both versions when they are it.
        why: String,
    },
    /// It belongs to another cluster.
    #[error("cannot follow {upstream}: it belongs to cluster {theirs:?}, this node to {ours:?}")]
    Cluster {
        /// Its address.
        upstream: String,
        /// Its cluster.
        theirs: String,
        /// This node's cluster.
        ours: String,
    },
    /// It is this node.
    #[error("cannot follow {upstream}: it is this node itself (or has a copy of its data directory)")]
    SameNode {
        /// Its address.
        upstream: String,
    },
    /// It serves an older epoch.
    #[error(
        "cannot follow {upstream}: it is stale, its epoch {theirs} is older than epoch {seen} that this node has seen"
    )]
    Stale {
        /// Its address.
        upstream: String,
        /// Its epoch.
        theirs: u64,
        /// This node's.
        seen: u64,
    },
    /// It refuses.
    #[error("upstream {upstream} refuses: {message}")]
    Refused {
        /// Its address.
        upstream: String,
        /// Kind of reason, when it gives one that is known here.
        code: Option<RefusalCode>,
        /// Its words.
        message: String,
        /// Durable position there of the database in question, when it tells.
        position: Option<Pos>,
    },
    /// It sent something invalid.
    #[error("upstream {upstream} sent an invalid stream: {why}")]
    Invalid {
        /// Its address.
        upstream: String,
        /// What is wrong.
        why: String,
    },
    /// This node's own side failed.
    #[error("cannot follow {upstream}: {why}")]
    Own {
        /// Its address.
        upstream: String,
        /// The reason.
        why: String,
    },
}

impl FollowError {
    /// An error of a stream.
    pub(super) fn frame(upstream: &Upstream, error: FrameError) -> Self {
        let (upstream, why) = (upstream.to_string(), error.to_string());
        match error {
            FrameError::Cut(_) | FrameError::Truncated { .. } => FollowError::Lost { upstream, why },
            _ => FollowError::Invalid { upstream, why },
        }
    }

    /// The upstream's reason to refuse, when it is one.
    pub(super) fn code(&self) -> Option<RefusalCode> {
        match self {
            FollowError::Refused { code, .. } => *code,
            _ => None,
        }
    }
}

/// A way to send requests to one upstream over one TCP connection.
#[derive(Clone)]
pub(super) struct Connection {
    upstream: Arc<Upstream>,
    access: Arc<Access>,
    sender: SendRequest<Body>,
}

impl Connection {
    /// Connects. The connection is cut when `cancel` is.
    pub(super) async fn open(
        upstream: &Arc<Upstream>,
        options: &FollowOptions,
        cancel: CancellationToken,
    ) -> Result<Self, FollowError> {
        let failed = |why: String| FollowError::Connect { upstream: upstream.to_string(), why };
        let opening = async {
            let stream = options
                .access
                .connect(&upstream.host, upstream.port, upstream.tls)
                .await
                .map_err(|e| full_text(&e))?;
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(options.timeout / 4)
                .keep_alive_timeout(options.timeout)
                .keep_alive_while_idle(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_header_list_size(16 << 10)
                .handshake(TokioIo::new(stream))
                .await
                .map_err(|e| full_text(&e))
        };
        let (sender, driver) = match timeout(options.timeout, opening).await {
            Ok(opened) => opened.map_err(failed)?,
            Err(_) => return Err(failed(format!("no answer within {:?}", options.timeout))),
        };
        let peer = upstream.to_string();
        tokio::spawn(async move {
            tokio::select! {
                result = driver => if let Err(error) = result {
                    tracing::debug!(upstream = peer, "connection closed: {}", full_text(&error));
                },
                () = cancel.cancelled() => {}
            }
        });
        Ok(Connection { upstream: Arc::clone(upstream), access: Arc::clone(&options.access), sender })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a request and checks who answers. The answer may still be a refusal.
    pub(super) async fn send(
        &mut self,
        method: Method,
        path_and_query: &str,
        body: Body,
        own: &Identity,
    ) -> Result<(Response<Incoming>, Identity), FollowError> {
        let upstream = self.upstream.to_string();
        let lost = |why: String| FollowError::Lost { upstream: upstream.clone(), why };
        let uri = format!("{upstream}{path_and_query}");
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = uri.parse().map_err(|e| lost(format!("{uri} is not a valid URI: {e}")))?;
        own.write(request.headers_mut());
        self.access.sign(request.headers_mut());
        let answer = async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        };
        let response = match timeout(ANSWER_TIMEOUT, answer).await {
            Ok(response) => response.map_err(|e| lost(full_text(&e)))?,
            Err(_) => return Err(lost(format!("no answer to {path_and_query} within {ANSWER_TIMEOUT:?}"))),
        };
        let identity = match Identity::read(response.headers()) {
            Ok(identity) => identity,
            Err(IdentityError::NotLitefs) => {
                let status = response.status();
                let why = format!("{} (HTTP status {status})", IdentityError::NotLitefs);
                return Err(FollowError::Identity { upstream, why });
            }
            Err(error) => return Err(FollowError::Identity { upstream, why: error.to_string() }),
        };
        if identity.cluster != own.cluster {
            return Err(FollowError::Cluster {
                upstream,
                theirs: identity.cluster,
                ours: own.cluster.clone(),
            });
        }
        if identity.node_id == own.node_id {
            return Err(FollowError::SameNode { upstream });
        }
        check_epoch(&self.upstream, identity.epoch, own.epoch)?;
        Ok((response, identity))
    }
}

/// Refuses an upstream whose epoch is older than what this node has seen.
pub(super) fn check_epoch(upstream: &Upstream, theirs: Epoch, seen: Epoch) -> Result<(), FollowError> {
    if theirs >= seen {
        return Ok(());
    }
    Err(FollowError::Stale { upstream: upstream.to_string(), theirs: theirs.0, seen: seen.0 })
}

/// The body of a response that is not a refusal.
pub(super) async fn accepted(
    upstream: &Upstream,
    response: Response<Incoming>,
) -> Result<Incoming, FollowError> {
    if response.status() == StatusCode::OK {
        return Ok(response.into_body());
    }
    let code = RefusalCode::from_headers(response.headers());
    let status = response.status();
    let position =
        response.headers().get(POSITION_HEADER).and_then(|value| value.to_str().ok()).and_then(parse_pos);
    let text = small_text(response.into_body()).await.unwrap_or_default();
    let message = if text.is_empty() { format!("HTTP status {status}") } else { text };
    Err(FollowError::Refused { upstream: upstream.to_string(), code, message, position })
}

/// Reads `txid/checksum`, both 16 hex digits.
fn parse_pos(text: &str) -> Option<Pos> {
    let (txid, checksum) = text.split_once('/')?;
    Some(Pos { txid: txid.parse().ok()?, checksum: checksum.parse().ok()? })
}

/// A short body as text; `None` when it is cut, too long or does not come.
pub(super) async fn small_text(body: Incoming) -> Option<String> {
    text_up_to(body, MESSAGE_BYTES_MAX).await
}

/// As [`small_text`], for a longer body.
pub(super) async fn text_up_to(body: Incoming, bytes_max: usize) -> Option<String> {
    let collected = timeout(ANSWER_TIMEOUT, Limited::new(body, bytes_max).collect()).await.ok()?.ok()?;
    Some(String::from_utf8_lossy(&collected.to_bytes()).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_addresses_are_read_and_bad_ones_refused() {
        for (text, shown) in [
            ("http://node1", "http://node1:20202"),
            ("http://node1/", "http://node1:20202"),
            ("http://10.0.0.1:80", "http://10.0.0.1:80"),
            ("http://[fe80::1]:7", "http://[fe80::1]:7"),
            ("http://[::1]", "http://[::1]:20202"),
            ("https://node1", "https://node1:20202"),
            ("https://[::1]:7", "https://[::1]:7"),
        ] {
            assert_eq!(text.parse::<Upstream>().unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "node1",
            "node1:80",
            "ftp://a",
            "http://a/b",
            "http://a?b",
            "http://a:0",
            "http://u@a",
            "http://a:x",
        ] {
            assert_eq!(bad.parse::<Upstream>(), Err(UpstreamError::Malformed(bad.into())), "{bad}");
        }
    }
}
