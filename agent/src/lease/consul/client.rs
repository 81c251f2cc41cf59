//! The part of Consul's HTTP API that the lease needs: keys, transactions and sessions, at one of several servers or
//! agents, with a time-out on every call.

use super::super::LeaseError;
use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Longest answer that is read. A cluster has one key and one more per node.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// The newest index of what was read; what a blocking query waits to see changed.
const INDEX_HEADER: &str = "x-consul-index";
const TOKEN_HEADER: &str = "x-consul-token";

/// How Consul is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Its addresses, `http://host:port` or `https://host:port`; the first that answers is used until it fails. Never empty.
    pub addresses: Vec<String>,
    /// For each call at each address.
    pub timeout: Duration,
    /// The ACL token.
    pub token: Token,
    /// For addresses that begin with `https://`.
    pub tls: Option<Tls>,
}

/// Certificates of the connections to Consul.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Authorities that vouch for Consul's certificate.
    pub ca: PathBuf,
    /// A certificate to show, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Where the ACL token is. It is read for every call, so that it can be changed while the agent runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// In this file.
    File(PathBuf),
    /// In the credential of this name, if there is one.
    Credential(&'static str),
}

impl Token {
    fn read(&self) -> Result<Option<String>, LeaseError> {
        let unreadable = |error: std::io::Error| LeaseError(format!("cannot read Consul's token: {error}"));
        match self {
            Token::Credential(name) => crate::systemd::credentials::read(name).map_err(unreadable),
            Token::File(path) => match std::fs::read_to_string(path) {
                Ok(text) => Ok(Some(text.trim().to_owned())),
                Err(error) => {
                    Err(LeaseError(format!("cannot read consul.token-file {}: {error}", path.display())))
                }
            },
        }
    }
}

/// What Consul answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: StatusCode,
    pub index: Option<u64>,
    pub body: Bytes,
    /// Who answered.
    address: String,
}

impl Answer {
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, LeaseError> {
        serde_json::from_slice(&self.body).map_err(|error| {
            LeaseError(format!("Consul at {} sent an answer that is not understood: {error}", self.address))
        })
    }

    /// An error of a status that the caller did not expect.
    pub fn unexpected(&self) -> LeaseError {
        let text = String::from_utf8_lossy(&self.body);
        let help = match self.status {
            StatusCode::FORBIDDEN => {
                "; the token (consul.token-file, or the credential consul-token) needs key_prefix write on consul.key, \
                 and session_prefix write"
            }
            _ => "",
        };
        LeaseError(format!("Consul at {} refuses ({}): {}{help}", self.address, self.status, text.trim()))
    }
}

/// Calls Consul.
#[derive(Debug)]
pub(super) struct Client {
    options: Options,
    http: HttpClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
    /// The address that answered last.
    preferred: AtomicUsize,
}

impl Client {
    /// # Errors
    /// The certificates cannot be used.
    pub fn new(options: Options) -> Result<Self, LeaseError> {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(options.timeout));
        connector.set_nodelay(true);
        connector.enforce_http(false);
        let tls = match &options.tls {
            Some(Tls { ca, identity }) => {
                let identity = identity.as_ref().map(|(certificate, key)| (&**certificate, &**key));
                crate::tls::client_config(ca, identity)
            }
            // Trusts nobody: the configuration has no https:// then.
            None => crate::tls::client_config_without_trust(),
        };
        let tls = tls.map_err(|error| LeaseError(format!("TLS to Consul: {error}")))?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let http = HttpClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .build(connector);
        Ok(Client { options, http, preferred: AtomicUsize::new(0) })
    }

    /// A call that Consul answers at once.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Answer, LeaseError> {
        let body = serde_json::to_vec(body).map_err(|error| LeaseError(error.to_string()))?;
        self.send(method, path, body.into(), Duration::ZERO).await
    }

    /// A read that Consul may keep waiting for `wait`.
    pub async fn read(&self, path: &str, wait: Duration) -> Result<Answer, LeaseError> {
        // Consul adds up to a sixteenth, so that not all come back at once.
        self.send(Method::GET, path, Bytes::new(), wait + wait / 16).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        wait: Duration,
    ) -> Result<Answer, LeaseError> {
        let token = self.options.token.read()?;
        let count = self.options.addresses.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for address in (0..count).map(|i| (first + i) % count) {
            let name = &self.options.addresses[address];
            let attempt = self.attempt(name, method.clone(), path, body.clone(), token.as_deref());
            let limit = self.options.timeout + wait;
            match tokio::time::timeout(limit, attempt).await {
                // A server without a leader, or one that is overloaded: another one may do better.
                Ok(Ok(answer)) if answer.status.is_server_error() => {
                    failures.push(answer.unexpected().to_string());
                }
                Ok(Ok(answer)) => {
                    self.preferred.store(address, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(why)) => failures.push(format!("Consul at {name} cannot be reached: {why}")),
                Err(_) => failures.push(format!("Consul at {name} does not answer within {limit:?}")),
            }
        }
        Err(LeaseError(failures.join("; ")))
    }

    /// What failed, and which setting it is about where certificates were refused.
    fn unreachable<'e>(&self, error: &'e (dyn std::error::Error + 'static)) -> String {
        let text = crate::ship::frame::full_text(error);
        // What an I/O error carries is not what it calls its source.
        let below =
            |cause: &&'e (dyn std::error::Error + 'static)| match cause.downcast_ref::<std::io::Error>() {
                Some(error) => error.get_ref().map(|error| error as &dyn std::error::Error),
                None => cause.source(),
            };
        let refused = std::iter::successors(Some(error), below).find_map(|cause| cause.downcast_ref());
        let Some(tls) = &self.options.tls else { return text };
        match refused {
            Some(rustls::Error::InvalidCertificate(_)) => {
                format!("{text}; consul.tls-ca is {}", tls.ca.display())
            }
            // Certificates are what Consul looks at.
            Some(rustls::Error::AlertReceived(_)) => match &tls.identity {
                Some((certificate, _)) => {
                    format!("{text}: it does not accept consul.tls-certificate {}", certificate.display())
                }
                None => format!("{text}: it wants a certificate, and consul.tls-certificate is not set"),
            },
            _ => text,
        }
    }

    async fn attempt(
        &self,
        address: &str,
        method: Method,
        path: &str,
        body: Bytes,
        token: Option<&str>,
    ) -> Result<Answer, String> {
        let uri: Uri = format!("{address}{path}").parse().map_err(|e| format!("{address}{path}: {e}"))?;
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(token) = token {
            request = request.header(TOKEN_HEADER, token);
        }
        let request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
        let response = self.http.request(request).await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let index = response.headers().get(INDEX_HEADER);
        let index = index.and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok(Answer { status, index, body, address: address.to_owned() })
    }
}
