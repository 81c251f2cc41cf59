//! Asks the agent over its control socket.

use super::failure::{self, Failure};
use crate::DatabaseName;
use crate::status::Status;
use crate::status::handler::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// An agent that says nothing for this long has a problem of its own.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest answer that is held in memory: the status of a few hundred thousand databases.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// The agent's end.
pub struct Client {
    socket: PathBuf,
    /// Why the configuration could not say which socket it is.
    doubt: Option<String>,
}

impl Client {
    pub fn new(socket: PathBuf, doubt: Option<String>) -> Client {
        Client { socket, doubt }
    }

    /// Where the agent listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request and waits for the beginning of the answer, which is a success.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let broken = |error: hyper::Error| self.broken(&error);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // An error of the connection also ends the request or its body.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let code = match response.status() {
            StatusCode::NOT_FOUND => failure::NO_INPUT,
            StatusCode::FORBIDDEN => failure::NO_PERMISSION,
            StatusCode::UNPROCESSABLE_ENTITY | StatusCode::CONFLICT => failure::DATA,
            StatusCode::INSUFFICIENT_STORAGE => failure::IO,
            StatusCode::SERVICE_UNAVAILABLE => failure::UNAVAILABLE,
            StatusCode::BAD_REQUEST => failure::USAGE,
            _ => failure::SOFTWARE,
        };
        let status = response.status();
        let message = match self.read(response).await {
            Ok(bytes) if !bytes.is_empty() => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
            _ => format!("the agent answered {status}"),
        };
        Err(Failure::new(code, message))
    }

    /// Reads a whole answer.
    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, Failure> {
        match Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => Err(self.broken(&error)),
        }
    }

    /// Reads a whole answer in JSON.
    pub async fn read_json<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, Failure> {
        let bytes = self.read(response).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            let socket = self.socket.display();
            Failure::new(
                failure::SOFTWARE,
                format_args!(
                    "cannot understand the answer of the agent at {socket}: {error}; is it another version?"
                ),
            )
        })
    }

    /// Everything the agent says of itself.
    pub async fn status(&self) -> Result<Status, Failure> {
        let request = request("GET", "/v1/status".to_owned(), empty())?;
        let answer = async { self.read_json(self.send(request).await?).await };
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(status) => status,
            Err(_) => Err(Failure::new(
                failure::NO_AGENT,
                format_args!(
                    "the agent at {} does not answer within {} s; see its log",
                    self.socket.display(),
                    ANSWER_TIMEOUT.as_secs()
                ),
            )),
        }
    }

    fn unreachable(&self, error: &io::Error) -> Failure {
        let socket = self.socket.display();
        let advice = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                "the agent is not running (start it with `litefs agent`, or `systemctl start litefs@<cluster>`), or \
                 serves another cluster (--cluster) or socket (--socket)"
            }
            io::ErrorKind::PermissionDenied => "run the command as root or in the group of the agent",
            _ => "see the log of the agent",
        };
        let mut message = format!("cannot reach the agent at {socket}: {error}\n  help: {advice}");
        if let Some(doubt) = &self.doubt {
            message.push_str("\n  note: the configuration could not say which socket it is:\n");
            message.push_str(doubt);
        }
        let code = match error.kind() {
            io::ErrorKind::PermissionDenied => failure::NO_PERMISSION,
            _ => failure::NO_AGENT,
        };
        Failure { code, message }
    }

    fn broken(&self, error: &dyn std::fmt::Display) -> Failure {
        let socket = self.socket.display();
        Failure::new(
            failure::IO,
            format_args!("the connection to the agent at {socket} broke: {error}; see its log"),
        )
    }
}

/// A request to the agent.
pub fn request(method: &str, uri: String, body: Body) -> Result<Request<Body>, Failure> {
    Request::builder()
        .method(method)
        .uri(uri)
        .header(http::header::HOST, "localhost")
        .body(body)
        .map_err(|error| Failure::new(failure::SOFTWARE, format_args!("cannot build the request: {error}")))
}

/// `path?name=NAME`
pub fn uri_of(path: &str, name: &DatabaseName) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).append_pair("name", name.as_str()).finish();
    format!("{path}?{query}")
}

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}
