//! What goes to Consul and comes from it (https://developer.hashicorp.com/consul/api-docs, version 1.8 and newer).

use super::super::{LeaseError, Outcome};
use super::client::Client;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A key as it is read.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct KeyValue {
    pub key: String,
    /// Base64; null for an empty one.
    pub value: Option<String>,
    pub session: Option<String>,
    pub modify_index: u64,
    pub lock_index: u64,
}

impl KeyValue {
    /// The value, in JSON.
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, LeaseError> {
        let bytes = STANDARD.decode(self.value.as_deref().unwrap_or_default()).unwrap_or_default();
        serde_json::from_slice(&bytes).map_err(|error| {
            LeaseError(format!(
                "Consul's key {} holds something else than a lease of LiteFS ({error}): remove it, or choose another \
                 consul.key",
                self.key
            ))
        })
    }
}

/// One step of a transaction.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Operation<'a> {
    verb: &'static str,
    key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
}

/// Steps that are all done, or none.
#[derive(Debug)]
pub(super) struct Transaction<'a> {
    key: &'a str,
    operations: Vec<Operation<'a>>,
}

impl<'a> Transaction<'a> {
    pub fn on(key: &'a str) -> Self {
        Transaction { key, operations: Vec::new() }
    }

    fn then(
        mut self,
        verb: &'static str,
        value: Option<&str>,
        session: Option<&'a str>,
        index: Option<u64>,
    ) -> Self {
        let value = value.map(|text| STANDARD.encode(text));
        self.operations.push(Operation { verb, key: self.key, value, session, index });
        self
    }

    /// Only if the key is still at this version; 0: if it is not there.
    pub fn if_version(self, version: u64) -> Self {
        match version {
            0 => self.then("check-not-exists", None, None, None),
            version => self.then("check-index", None, None, Some(version)),
        }
    }

    /// Only if this session has the lock.
    pub fn if_locked_by(self, session: &'a str) -> Self {
        self.then("check-session", None, Some(session), None)
    }

    /// Takes the lock, or keeps it, and writes.
    pub fn lock(self, session: &'a str, value: &str) -> Self {
        self.then("lock", Some(value), Some(session), None)
    }

    /// Gives the lock back, and writes.
    pub fn unlock(self, session: &'a str, value: &str) -> Self {
        self.then("unlock", Some(value), Some(session), None)
    }

    /// Removes the key.
    pub fn delete(self) -> Self {
        self.then("delete", None, None, None)
    }

    /// Does it; the key's new version, or nothing was as it should be.
    pub async fn commit(self, client: &Client) -> Result<Outcome, LeaseError> {
        #[derive(Serialize)]
        struct Step<'a> {
            #[serde(rename = "KV")]
            kv: Operation<'a>,
        }
        #[derive(Deserialize)]
        struct Done {
            #[serde(rename = "Results")]
            results: Option<Vec<OneResult>>,
        }
        #[derive(Deserialize)]
        struct OneResult {
            #[serde(rename = "KV")]
            kv: KeyValue,
        }
        let steps: Vec<Step<'_>> = self.operations.into_iter().map(|kv| Step { kv }).collect();
        let answer = client.call(Method::PUT, "/v1/txn", &steps).await?;
        match answer.status {
            StatusCode::OK => {
                let done: Done = answer.json()?;
                let version = done.results.iter().flatten().last().map_or(0, |result| result.kv.modify_index);
                Ok(Some(version))
            }
            StatusCode::CONFLICT => {
                tracing::debug!(why = %String::from_utf8_lossy(&answer.body), "Consul refused a transaction");
                Ok(None)
            }
            _ => Err(answer.unexpected()),
        }
    }
}

/// All keys below a prefix, and the index to wait for a change of them. Asks the leader, so that the answer is never
/// older than what was done before.
pub(super) async fn read_tree(
    client: &Client,
    prefix: &str,
    after: Option<u64>,
    wait: Duration,
) -> Result<(Vec<KeyValue>, u64), LeaseError> {
    let mut path = format!("/v1/kv/{prefix}?recurse&consistent");
    let mut limit = Duration::ZERO;
    if let Some(index) = after {
        limit = wait;
        path.push_str(&format!("&index={index}&wait={}ms", wait.as_millis()));
    }
    let answer = client.read(&path, limit).await?;
    let index = answer.index.filter(|index| *index > 0).unwrap_or(1);
    match answer.status {
        StatusCode::OK => Ok((answer.json()?, index)),
        StatusCode::NOT_FOUND => Ok((Vec::new(), index)),
        _ => Err(answer.unexpected()),
    }
}

/// A new session that ends when it is not renewed for `ttl` (10 s at least), and by nothing else.
pub(super) async fn create_session(client: &Client, name: &str, ttl: Duration) -> Result<String, LeaseError> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Create<'a> {
        name: &'a str,
        #[serde(rename = "TTL")]
        ttl: String,
        behavior: &'static str,
        /// The lease counts time by itself.
        lock_delay: &'static str,
        /// No health check of Consul's node: whether it thinks that a host is dead says nothing about its agent.
        node_checks: [&'static str; 0],
        checks: [&'static str; 0],
    }
    #[derive(Deserialize)]
    struct Created {
        #[serde(rename = "ID")]
        id: String,
    }
    let create = Create {
        name,
        ttl: format!("{}ms", ttl.as_millis()),
        behavior: "release",
        lock_delay: "0s",
        node_checks: [],
        checks: [],
    };
    let answer = client.call(Method::PUT, "/v1/session/create", &create).await?;
    match answer.status {
        StatusCode::OK => answer.json::<Created>().map(|created| created.id),
        _ => Err(answer.unexpected()),
    }
}

/// Keeps a session alive. `false`: there is no such session any more.
pub(super) async fn renew_session(client: &Client, session: &str) -> Result<bool, LeaseError> {
    let answer = client.call(Method::PUT, &format!("/v1/session/renew/{session}"), &()).await?;
    match answer.status {
        StatusCode::OK => Ok(true),
        StatusCode::NOT_FOUND => Ok(false),
        _ => Err(answer.unexpected()),
    }
}

/// Ends a session, and gives back the locks that it has.
pub(super) async fn destroy_session(client: &Client, session: &str) -> Result<(), LeaseError> {
    let answer = client.call(Method::PUT, &format!("/v1/session/destroy/{session}"), &()).await?;
    match answer.status {
        StatusCode::OK => Ok(()),
        _ => Err(answer.unexpected()),
    }
}
