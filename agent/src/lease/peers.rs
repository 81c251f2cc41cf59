//! What nodes ask each other about the lease, on the port for followers. `docs/replication-protocol.md` lists it.
//!
//! | request                                  | meaning                                                             |
//! |------------------------------------------|---------------------------------------------------------------------|
//! | `GET /v1/lease/standing?databases=0\|1`   | how far are you (with each database), and may you become primary? [`Answer`] |
//! | `POST /v1/lease/prepare`                 | will you take the lease over from me, now? `true` or `false`         |
//! | `POST /v1/lease/grant?version=&epoch=`   | it is yours: this version of the record says so                     |
//! | `POST /v1/lease/want`                    | hand the lease over to me; `null`, or why not                        |

use super::{Answer, Peer};
use crate::ship::body::{self, Body};
use crate::ship::engine::Epoch;
use crate::ship::follow::{FollowError, FollowOptions, ask};
use crate::ship::peer::{Refusal, RefusalCode, query_value};
use futures_util::future::BoxFuture;
use http::{Method, Response};
use std::time::Duration;

/// All these requests are below this path.
pub const PREFIX: &str = "/v1/lease/";

/// A node as others ask it.
pub trait Candidate: Send + Sync + 'static {
    /// How far it is; `databases`: with each database.
    fn standing(&self, databases: bool) -> BoxFuture<'_, Result<Answer, String>>;
    /// `from` wants it as its successor: whether it agrees.
    fn prepare(&self, from: u64) -> BoxFuture<'_, bool>;
    /// The lease was given to it.
    fn grant(&self, version: u64, epoch: Epoch);
    /// `to` wants to be its successor; why it is not, when it is not.
    fn hand_over_to(&self, to: u64) -> BoxFuture<'_, Result<(), String>>;
}

/// Answers one request of the node `from`.
pub async fn serve(
    candidate: &dyn Candidate,
    from: u64,
    method: &Method,
    path: &str,
    query: Option<&str>,
) -> Result<Response<Body>, Refusal> {
    let bad = |message: String| Refusal::new(RefusalCode::BadRequest, message);
    let number = |key: &str| {
        let value = query_value(query, key).and_then(|text| text.parse::<u64>().ok());
        value.ok_or_else(|| bad(format!("the query has no valid {key}=")))
    };
    let said = match (method, path.strip_prefix(PREFIX).unwrap_or_default()) {
        (&Method::GET, "standing") => {
            let databases = query_value(query, "databases").is_some_and(|value| value == "1");
            let answer = candidate.standing(databases).await;
            serde_json::to_string(&answer.map_err(|why| Refusal::new(RefusalCode::Stopping, why))?)
        }
        (&Method::POST, "prepare") => serde_json::to_string(&candidate.prepare(from).await),
        (&Method::POST, "grant") => {
            candidate.grant(number("version")?, Epoch(number("epoch")?));
            serde_json::to_string(&())
        }
        (&Method::POST, "want") => serde_json::to_string(&candidate.hand_over_to(from).await.err()),
        _ => return Err(bad(format!("there is nothing at {method} {path}"))),
    };
    said.map(|text| Response::new(body::full(text)))
        .map_err(|e| Refusal::new(RefusalCode::Engine, e.to_string()))
}

/// Asks other nodes.
#[derive(Clone, Debug)]
pub struct Asking {
    /// Who asks, and how.
    pub options: FollowOptions,
    /// Identity of who asks.
    pub node_id: u64,
}

impl Asking {
    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        peer: &Peer,
        method: Method,
        path: &str,
        limit: Duration,
    ) -> Result<T, String> {
        let asking = ask(&peer.url, &self.options, self.node_id, method, path);
        match tokio::time::timeout(limit, asking).await {
            Ok(answer) => answer.map_err(|error: FollowError| error.to_string()),
            Err(_) => Err(format!("{} at {} does not answer within {limit:?}", peer.name, peer.url)),
        }
    }

    /// How far it is.
    pub async fn standing(&self, peer: &Peer, databases: bool, limit: Duration) -> Result<Answer, String> {
        let path = format!("/v1/lease/standing?databases={}", u8::from(databases));
        self.ask(peer, Method::GET, &path, limit).await
    }

    /// Whether it agrees to be the successor of this node.
    pub async fn prepare(&self, peer: &Peer, limit: Duration) -> Result<bool, String> {
        self.ask(peer, Method::POST, "/v1/lease/prepare", limit).await
    }

    /// Tells it that the lease is in its name.
    pub async fn grant(
        &self,
        peer: &Peer,
        version: u64,
        epoch: Epoch,
        limit: Duration,
    ) -> Result<(), String> {
        let path = format!("/v1/lease/grant?version={version}&epoch={}", epoch.0);
        self.ask(peer, Method::POST, &path, limit).await
    }

    /// Asks the primary for its lease.
    pub async fn want(&self, primary: &Peer, limit: Duration) -> Result<(), String> {
        let refused: Option<String> = self.ask(primary, Method::POST, "/v1/lease/want", limit).await?;
        refused.map_or(Ok(()), Err)
    }
}
