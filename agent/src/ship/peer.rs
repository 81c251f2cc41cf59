//! How the two ends of a request know each other: identity, protocol version, and the reasons to refuse.

use crate::ship::body::{self, Body};
use crate::ship::engine::{EngineError, Epoch};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use ltx::Pos;
use std::fmt;
use std::str::FromStr;

/// Version of the replication protocol. Nodes with different major versions refuse each other; a minor version
/// adds only what the other side may ignore.
pub const PROTOCOL: Protocol = Protocol { major: 1, minor: 0 };

const PROTOCOL_HEADER: HeaderName = HeaderName::from_static("litefs-protocol");
const NODE_HEADER: HeaderName = HeaderName::from_static("litefs-node");
const NAME_HEADER: HeaderName = HeaderName::from_static("litefs-name");
const CLUSTER_HEADER: HeaderName = HeaderName::from_static("litefs-cluster");
const EPOCH_HEADER: HeaderName = HeaderName::from_static("litefs-epoch");
const REFUSAL_HEADER: HeaderName = HeaderName::from_static("litefs-refusal");
/// Durable position of the database that a response is about.
pub const POSITION_HEADER: HeaderName = HeaderName::from_static("litefs-position");
/// Milliseconds between heartbeats of the answering side.
pub const HEARTBEAT_HEADER: HeaderName = HeaderName::from_static("litefs-heartbeat-ms");

/// A version of the replication protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Must be equal on both ends.
    pub major: u16,
    /// May differ.
    pub minor: u16,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Protocol {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once('.').ok_or(())?;
        Ok(Protocol { major: major.parse().map_err(drop)?, minor: minor.parse().map_err(drop)? })
    }
}

/// What a node says of itself on every request and response of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Number of the node.
    pub node_id: u64,
    /// Its host name, for people.
    pub node_name: String,
    /// The cluster it belongs to.
    pub cluster: String,
    /// Newest epoch it knows.
    pub epoch: Epoch,
}

/// Why the other side's identity cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdentityError {
    /// Nothing of the protocol in the headers.
    #[error("it does not speak LiteFS replication (no {PROTOCOL_HEADER} header)")]
    NotLitefs,
    /// Another major version.
    #[error(
        "it speaks replication protocol {0}, this node speaks {PROTOCOL}: run the same LiteFS release on both"
    )]
    Protocol(String),
    /// A header is missing or malformed.
    #[error("its {0} header is missing or malformed")]
    Header(HeaderName),
}

impl Identity {
    /// Adds the identity to the headers of a request or response.
    pub fn write(&self, headers: &mut HeaderMap) {
        headers.insert(PROTOCOL_HEADER, text_value(&PROTOCOL.to_string()));
        headers.insert(NODE_HEADER, text_value(&format!("{:016x}", self.node_id)));
        headers.insert(NAME_HEADER, text_value(&percent_encode(&self.node_name)));
        headers.insert(CLUSTER_HEADER, text_value(&percent_encode(&self.cluster)));
        headers.insert(EPOCH_HEADER, HeaderValue::from(self.epoch.0));
    }

    /// Reads the other side's identity; refuses another major version before anything else is looked at.
    pub fn read(headers: &HeaderMap) -> Result<Self, IdentityError> {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let missing = |name: HeaderName| move || IdentityError::Header(name);
        let version = text(&PROTOCOL_HEADER).ok_or(IdentityError::NotLitefs)?;
        match version.parse::<Protocol>() {
            Ok(theirs) if theirs.major == PROTOCOL.major => {}
            _ => return Err(IdentityError::Protocol(version.chars().take(32).collect())),
        }
        let decoded = |name: HeaderName| text(&name).and_then(percent_decode).ok_or_else(missing(name));
        Ok(Identity {
            node_id: text(&NODE_HEADER)
                .filter(|hex| hex.len() == 16)
                .and_then(|hex| u64::from_str_radix(hex, 16).ok())
                .ok_or_else(missing(NODE_HEADER))?,
            node_name: decoded(NAME_HEADER)?,
            cluster: decoded(CLUSTER_HEADER)?,
            epoch: text(&EPOCH_HEADER)
                .and_then(|n| n.parse().ok())
                .map(Epoch)
                .ok_or_else(missing(EPOCH_HEADER))?,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (node {:016x})", self.node_name, self.node_id)
    }
}

/// Why a node refuses a request or ends a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// Malformed request.
    BadRequest,
    /// Another major version of the protocol.
    Protocol,
    /// The follower belongs to another cluster.
    Cluster,
    /// A node cannot follow itself.
    SameNode,
    /// The follower knows a newer epoch: the answering node is stale.
    Stale,
    /// No such database here.
    NoSuchDatabase,
    /// The transaction is not kept (any more, or yet).
    NotKept,
    /// Records after the follower's position are no longer kept.
    Gap,
    /// The follower's position is not in the history.
    Diverged,
    /// The database is quarantined here.
    Quarantined,
    /// The page size changed while a snapshot was sent.
    PageSize,
    /// The database could not be read.
    Engine,
    /// The node is stopping.
    Stopping,
    /// The peer has not proved that it belongs to the cluster.
    Unauthorized,
    /// The halt lock is not to be had, or not held.
    HaltLock,
    /// A code of a newer minor version.
    Other(u16),
}

/// Code, its number in an Error frame, its name in the refusal header, its HTTP status.
const CODES: [(RefusalCode, u16, &str, StatusCode); 15] = [
    (RefusalCode::BadRequest, 1, "bad-request", StatusCode::BAD_REQUEST),
    (RefusalCode::Protocol, 2, "protocol", StatusCode::UPGRADE_REQUIRED),
    (RefusalCode::Cluster, 3, "cluster", StatusCode::FORBIDDEN),
    (RefusalCode::SameNode, 4, "same-node", StatusCode::FORBIDDEN),
    (RefusalCode::Stale, 5, "stale", StatusCode::PRECONDITION_FAILED),
    (RefusalCode::NoSuchDatabase, 6, "no-such-database", StatusCode::NOT_FOUND),
    (RefusalCode::NotKept, 7, "not-kept", StatusCode::NOT_FOUND),
    (RefusalCode::Gap, 8, "gap", StatusCode::GONE),
    (RefusalCode::Diverged, 9, "diverged", StatusCode::CONFLICT),
    (RefusalCode::Quarantined, 10, "quarantined", StatusCode::SERVICE_UNAVAILABLE),
    (RefusalCode::PageSize, 11, "page-size", StatusCode::CONFLICT),
    (RefusalCode::Engine, 12, "engine", StatusCode::INTERNAL_SERVER_ERROR),
    (RefusalCode::Stopping, 13, "stopping", StatusCode::SERVICE_UNAVAILABLE),
    (RefusalCode::Unauthorized, 14, "unauthorized", StatusCode::UNAUTHORIZED),
    (RefusalCode::HaltLock, 15, "halt-lock", StatusCode::LOCKED),
];

impl RefusalCode {
    /// Number in an Error frame.
    pub fn number(self) -> u16 {
        match self {
            RefusalCode::Other(number) => number,
            known => CODES.iter().find(|row| row.0 == known).map_or(0, |row| row.1),
        }
    }

    /// Reads a number of an Error frame.
    pub fn from_number(number: u16) -> Self {
        CODES.iter().find(|row| row.1 == number).map_or(RefusalCode::Other(number), |row| row.0)
    }

    /// Reads the refusal header of a response.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let name = headers.get(REFUSAL_HEADER)?.to_str().ok()?;
        CODES.iter().find(|row| row.2 == name).map(|row| row.0)
    }
}

/// A refusal: code and a message that says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
    /// Durable position of the database here, where it helps the follower.
    pub position: Option<Pos>,
}

impl Refusal {
    /// A refusal without a position.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Refusal { code, message: message.into(), position: None }
    }

    /// The refusal as an HTTP response.
    pub fn response(&self) -> Response<Body> {
        let row = CODES.iter().find(|row| row.0 == self.code);
        let mut response = Response::new(body::full(format!("{}\n", self.message)));
        *response.status_mut() = row.map_or(StatusCode::INTERNAL_SERVER_ERROR, |row| row.3);
        if let Some(row) = row {
            response.headers_mut().insert(REFUSAL_HEADER, HeaderValue::from_static(row.2));
        }
        if let Some(pos) = self.position {
            response.headers_mut().insert(POSITION_HEADER, text_value(&pos.to_string()));
        }
        response
    }
}

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Self {
        let code = match &error {
            EngineError::NoSuchDatabase(_) => RefusalCode::NoSuchDatabase,
            EngineError::Quarantined { .. } => RefusalCode::Quarantined,
            EngineError::OldEpoch { .. } => RefusalCode::Stale,
            EngineError::OutOfSequence { .. }
            | EngineError::Busy(_)
            | EngineError::ChecksumMismatch(_)
            | EngineError::Other(_) => RefusalCode::Engine,
        };
        Refusal::new(code, error.to_string())
    }
}

/// A header value of text that is printable by construction.
pub(crate) fn text_value(text: &str) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::copy_from_slice(text.as_bytes()))
        .expect("percent-encoded text and hex digits are valid in a header")
}

/// Percent-encodes everything but RFC 3986's unreserved characters and `/`, for query values and headers.
pub fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(byte as char)
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Undoes [`percent_encode`]; `None` for a broken escape or when the result is not UTF-8.
pub fn percent_decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digits = [bytes.next()?, bytes.next()?];
        let hex = |digit: u8| (digit as char).to_digit(16);
        out.push((hex(digits[0])? * 16 + hex(digits[1])?) as u8);
    }
    String::from_utf8(out).ok()
}

/// Value of `key` in the query of a URI, decoded.
pub fn query_value(query: Option<&str>, key: &str) -> Option<String> {
    query?
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(k, _)| *k == key)
        .and_then(|(_, v)| percent_decode(v))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { node_id: 0xab, node_name: "höst 1".into(), cluster: "a%b/c".into(), epoch: Epoch(7) }
    }

    #[test]
    fn an_identity_survives_the_headers() {
        let mut headers = HeaderMap::new();
        identity().write(&mut headers);
        assert_eq!(Identity::read(&headers).unwrap(), identity());
    }

    #[test]
    fn another_major_version_is_named_and_a_newer_minor_accepted() {
        let mut headers = HeaderMap::new();
        identity().write(&mut headers);
        headers.insert(PROTOCOL_HEADER, HeaderValue::from_static("1.99"));
        assert!(Identity::read(&headers).is_ok());
        for other in ["2.0", "1", "x.y", ""] {
            headers.insert(PROTOCOL_HEADER, HeaderValue::from_static(other));
            let error = Identity::read(&headers).unwrap_err();
            assert_eq!(error, IdentityError::Protocol(other.into()));
            assert!(error.to_string().contains(&PROTOCOL.to_string()), "{error}");
        }
        assert_eq!(Identity::read(&HeaderMap::new()).unwrap_err(), IdentityError::NotLitefs);
    }

    #[test]
    fn bad_identity_headers_are_errors_with_their_name() {
        for name in [NODE_HEADER, NAME_HEADER, CLUSTER_HEADER, EPOCH_HEADER] {
            let mut headers = HeaderMap::new();
            identity().write(&mut headers);
            headers.insert(name.clone(), HeaderValue::from_static("%zz"));
            assert_eq!(Identity::read(&headers).unwrap_err(), IdentityError::Header(name.clone()));
            headers.remove(&name);
            assert_eq!(Identity::read(&headers).unwrap_err(), IdentityError::Header(name));
        }
    }

    #[test]
    fn refusal_codes_survive_number_and_header() {
        for (code, number, _, status) in CODES {
            assert_eq!(RefusalCode::from_number(number), code);
            assert_eq!(code.number(), number);
            let response = Refusal::new(code, "no").response();
            assert_eq!(response.status(), status);
            assert_eq!(RefusalCode::from_headers(response.headers()), Some(code));
        }
        assert_eq!(RefusalCode::from_number(999), RefusalCode::Other(999));
    }

    #[test]
    fn query_values_are_percent_decoded() {
        let name = "app/ä&b=c 100%.db";
        let query = format!("x=1&name={}", percent_encode(name));
        assert_eq!(query_value(Some(&query), "name").as_deref(), Some(name));
        assert_eq!(query_value(Some("name=%4"), "name"), None);
        assert_eq!(query_value(Some("name=%ff"), "name"), None);
        assert_eq!(query_value(None, "name"), None);
    }
}
