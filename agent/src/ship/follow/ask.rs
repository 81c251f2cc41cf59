//! One question to another node, with a short answer in JSON.

use super::FollowOptions;
use super::connection::{Connection, FollowError, Upstream, accepted, text_up_to};
use crate::ship::body;
use crate::ship::engine::Epoch;
use crate::ship::peer::Identity;
use http::Method;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Longest answer that is read: a line per database of those with the most.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Sends a request to the node at `url` over a connection of its own and reads its answer. Neither side's epoch
/// matters: those who look for a new primary have seen different ones.
///
/// # Errors
/// It cannot be reached, is not of this cluster, refuses, or says something else than was asked.
pub async fn ask<T: DeserializeOwned>(
    url: &str,
    options: &FollowOptions,
    node_id: u64,
    method: Method,
    path_and_query: &str,
) -> Result<T, FollowError> {
    let malformed =
        |e: super::UpstreamError| FollowError::Connect { upstream: url.into(), why: e.to_string() };
    let upstream: Arc<Upstream> = Arc::new(url.parse().map_err(malformed)?);
    let closed = CancellationToken::new();
    let _close = closed.clone().drop_guard();
    let own = Identity {
        node_id,
        node_name: options.node_name.clone(),
        cluster: options.cluster.clone(),
        epoch: Epoch(0),
    };
    let mut connection = Connection::open(&upstream, options, closed).await?;
    let (response, _) = connection.send(method, path_and_query, body::full(""), &own).await?;
    let text = text_up_to(accepted(&upstream, response).await?, ANSWER_BYTES_MAX).await.unwrap_or_default();
    serde_json::from_str(&text).map_err(|error| FollowError::Invalid {
        upstream: upstream.to_string(),
        why: format!("its answer to {path_and_query} is not understood: {error}"),
    })
}
