//! What nodes ask the primary about halt locks, on the port for followers. `docs/replication-protocol.md` lists it.
//!
//! | request                                         | meaning                                              |
//! |-------------------------------------------------|------------------------------------------------------|
//! | `POST /v1/halt-lock/acquire?name=&id=`          | lend me this database: [`Granted`]                   |
//! | `POST /v1/halt-lock/renew?name=&id=&epoch=`     | I still have it                                      |
//! | `POST /v1/halt-lock/commit?name=&id=&epoch=`    | body: a transaction in LTX; the position it led to   |
//! | `POST /v1/halt-lock/release?name=&id=&epoch=`   | I do not need it any more                            |

use crate::DatabaseName;
use crate::ship::body::{self, Body};
use crate::ship::engine::{Epoch, RecordPayload};
use crate::ship::peer::{Identity, Refusal, RefusalCode, query_value};
use bytes::BytesMut;
use futures_util::future::BoxFuture;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::PathBuf;

/// All these requests are below this path.
pub const PREFIX: &str = "/v1/halt-lock/";

/// Transactions of more bytes go through a file.
const IN_MEMORY_BYTES_MAX: usize = 1 << 20;

/// A halt lock.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HaltLock {
    /// The database.
    pub name: DatabaseName,
    /// Chosen by who asks.
    pub id: u64,
}

/// A halt lock was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// The term of the primary in which it counts.
    pub epoch: u64,
    /// Where the database is, as `TXID/checksum`.
    pub position: String,
    /// How long it lasts without a renewal or a commit.
    pub ttl_ms: u64,
}

/// A node that lends databases.
pub trait HaltLocks: Send + Sync + 'static {
    /// Where a large transaction is put while it comes.
    fn staging_dir(&self) -> PathBuf;
    /// Gives the lock, also again to who has it.
    fn acquire(&self, from: Identity, lock: HaltLock) -> BoxFuture<'_, Result<Granted, Refusal>>;
    /// Keeps it.
    fn renew(&self, from: u64, lock: HaltLock, epoch: Epoch) -> BoxFuture<'_, Result<(), Refusal>>;
    /// Commits a transaction of who has it; says the position after it.
    fn commit(
        &self,
        from: u64,
        lock: HaltLock,
        epoch: Epoch,
        transaction: RecordPayload,
    ) -> BoxFuture<'_, Result<String, Refusal>>;
    /// Ends it; nothing happens if it is not held.
    fn release(&self, from: u64, lock: HaltLock, epoch: Epoch) -> BoxFuture<'_, ()>;
}

/// Answers one request of the node `from`.
pub async fn serve(
    locks: &dyn HaltLocks,
    from: &Identity,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let bad = |message: String| Refusal::new(RefusalCode::BadRequest, message);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if method != Method::POST {
        return Err(bad(format!("{path} wants POST, not {method}")));
    }
    let query = request.uri().query().map(str::to_owned);
    let value = |key: &str| query_value(query.as_deref(), key);
    let number = |key: &str| {
        let value = value(key).and_then(|text| text.parse::<u64>().ok());
        value.ok_or_else(|| bad(format!("the query has no valid {key}=")))
    };
    let name =
        value("name").ok_or_else(|| bad("the query has no (properly percent-encoded) name=".into()))?;
    let name = DatabaseName::new(&name).map_err(|error| bad(error.to_string()))?;
    let lock = HaltLock { name, id: number("id")? };
    let said = match path.strip_prefix(PREFIX).unwrap_or_default() {
        "acquire" => serde_json::to_string(&locks.acquire(from.clone(), lock).await?),
        "renew" => serde_json::to_string(&locks.renew(from.node_id, lock, Epoch(number("epoch")?)).await?),
        "release" => serde_json::to_string(&locks.release(from.node_id, lock, Epoch(number("epoch")?)).await),
        "commit" => {
            let epoch = Epoch(number("epoch")?);
            let transaction = read_transaction(request.into_body(), locks.staging_dir()).await?;
            let remove = match &transaction {
                RecordPayload::File { path, .. } => Some(path.clone()),
                RecordPayload::Bytes(_) => None,
            };
            let committed = locks.commit(from.node_id, lock, epoch, transaction).await;
            // The log has renamed it away if it took it.
            if let Some(path) = remove
                && let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove a transaction that was received");
            }
            serde_json::to_string(&committed?)
        }
        _ => return Err(bad(format!("there is nothing at {method} {path}"))),
    };
    said.map(|text| Response::new(body::full(text)))
        .map_err(|e| Refusal::new(RefusalCode::Engine, e.to_string()))
}

/// Takes a transaction in: in memory, or a large one in a file.
async fn read_transaction(mut body: Incoming, staging: PathBuf) -> Result<RecordPayload, Refusal> {
    let failed =
        |e: std::io::Error| Refusal::new(RefusalCode::Engine, format!("cannot take the transaction in: {e}"));
    let broken = |e: hyper::Error| {
        Refusal::new(RefusalCode::BadRequest, format!("the transaction broke off on its way: {e}"))
    };
    let mut memory = BytesMut::new();
    let mut file: Option<tempfile::NamedTempFile> = None;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        memory.extend_from_slice(&data);
        if memory.len() > IN_MEMORY_BYTES_MAX {
            let (dir, part) = (staging.clone(), memory.split());
            let into = file.take();
            let written = tokio::task::spawn_blocking(move || {
                let mut into = match into {
                    Some(into) => into,
                    None => {
                        tempfile::Builder::new().prefix("transaction-").suffix(".ltx").tempfile_in(dir)?
                    }
                };
                into.write_all(&part).map(|()| into)
            });
            file = Some(written.await.map_err(std::io::Error::other).flatten().map_err(failed)?);
        }
    }
    let Some(mut file) = file else { return Ok(RecordPayload::Bytes(memory.freeze())) };
    let kept = tokio::task::spawn_blocking(move || {
        file.write_all(&memory)?;
        file.as_file().sync_data()?;
        let size = file.as_file().metadata()?.len();
        let (_, path) = file.keep().map_err(|error| error.error)?;
        Ok(RecordPayload::File { path, size })
    });
    kept.await.map_err(std::io::Error::other).flatten().map_err(failed)
}
