//! The side that borrows a database: asks the primary about a halt lock, over one connection.

use super::FollowOptions;
use super::connection::{Connection, FollowError, Upstream, accepted, small_text};
use crate::database::halt::Transaction;
use crate::ship::body::{self, Body};
use crate::ship::engine::Epoch;
use crate::ship::halt::{Granted, HaltLock, PREFIX};
use crate::ship::peer::{Identity, RefusalCode, percent_encode};
use bytes::Bytes;
use http::Method;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Bytes of a large transaction that are sent at a time.
const PART_BYTES: usize = 256 << 10;

/// Why a question about a halt lock has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum HaltError {
    /// The primary refuses; `busy`: somebody else has the lock, or applications there do not let go.
    #[error("{message}")]
    Refused {
        /// What it says.
        message: String,
        /// Worth another try.
        busy: bool,
    },
    /// It cannot be reached, or did not answer.
    #[error("{0}")]
    Lost(String),
}

impl From<FollowError> for HaltError {
    fn from(error: FollowError) -> Self {
        match error {
            FollowError::Refused { code, message, .. } => {
                HaltError::Refused { message, busy: code == Some(RefusalCode::HaltLock) }
            }
            error @ (FollowError::Connect { .. } | FollowError::Lost { .. }) => {
                HaltError::Lost(error.to_string())
            }
            error => HaltError::Refused { message: error.to_string(), busy: false },
        }
    }
}

/// Asks one primary about one halt lock.
pub struct HaltClient {
    upstream: Arc<Upstream>,
    options: FollowOptions,
    node_id: u64,
    lock: HaltLock,
    connection: tokio::sync::Mutex<Option<Connection>>,
    closed: CancellationToken,
    _close: DropGuard,
}

impl std::fmt::Debug for HaltClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HaltClient").field("lock", &self.lock).finish()
    }
}

impl HaltClient {
    /// Connects with the first question.
    ///
    /// # Errors
    /// `url` is none.
    pub fn new(
        url: &str,
        options: FollowOptions,
        node_id: u64,
        lock: HaltLock,
    ) -> Result<HaltClient, HaltError> {
        let malformed = |error: super::UpstreamError| HaltError::Lost(error.to_string());
        let closed = CancellationToken::new();
        Ok(HaltClient {
            upstream: Arc::new(url.parse().map_err(malformed)?),
            options,
            node_id,
            lock,
            connection: tokio::sync::Mutex::default(),
            _close: closed.clone().drop_guard(),
            closed,
        })
    }

    /// Asks for the lock; `seen` is the newest epoch that this node knows.
    ///
    /// # Errors
    /// It was not given.
    pub async fn acquire(&self, seen: Epoch) -> Result<Granted, HaltError> {
        let text = self.ask("acquire", seen, None, body::full("")).await?;
        serde_json::from_str(&text).map_err(|error| HaltError::Refused {
            message: format!("{} gave a halt lock in words that are not understood: {error}", self.upstream),
            busy: false,
        })
    }

    /// Keeps it.
    ///
    /// # Errors
    /// It is not known to be held.
    pub async fn renew(&self, epoch: Epoch) -> Result<(), HaltError> {
        self.ask("renew", epoch, Some(epoch), body::full("")).await.map(|_| ())
    }

    /// Ends it.
    ///
    /// # Errors
    /// The primary does not know; the lock runs out there.
    pub async fn release(&self, epoch: Epoch) -> Result<(), HaltError> {
        self.ask("release", epoch, Some(epoch), body::full("")).await.map(|_| ())
    }

    /// Has it commit a transaction.
    ///
    /// # Errors
    /// It is not known to have been committed.
    pub async fn commit(&self, epoch: Epoch, transaction: Transaction) -> Result<(), HaltError> {
        let body = match transaction {
            Transaction::Bytes(bytes) => body::full(bytes),
            Transaction::File(path) => {
                let (sender, body) = body::channel(2);
                tokio::task::spawn_blocking(move || send_file(&path, &sender));
                body
            }
        };
        self.ask("commit", epoch, Some(epoch), body).await.map(|_| ())
    }

    /// `seen`: stale nodes do not answer.
    async fn ask(
        &self,
        what: &str,
        seen: Epoch,
        epoch: Option<Epoch>,
        body: Body,
    ) -> Result<String, HaltError> {
        let own = Identity {
            node_id: self.node_id,
            node_name: self.options.node_name.clone(),
            cluster: self.options.cluster.clone(),
            epoch: seen,
        };
        let epoch = epoch.map(|epoch| format!("&epoch={}", epoch.0)).unwrap_or_default();
        let name = percent_encode(self.lock.name.as_str());
        let path = format!("{PREFIX}{what}?name={name}&id={}{epoch}", self.lock.id);
        let mut connection = {
            let mut kept = self.connection.lock().await;
            match kept.as_ref().filter(|connection| !connection.is_closed()) {
                Some(open) => open.clone(),
                None => {
                    let opened = Connection::open(&self.upstream, &self.options, self.closed.clone()).await?;
                    kept.insert(opened).clone()
                }
            }
        };
        let (response, _) = connection.send(Method::POST, &path, body, &own).await?;
        let body = accepted(&self.upstream, response).await?;
        small_text(body)
            .await
            .ok_or_else(|| HaltError::Lost(format!("{} did not end its answer to {what}", self.upstream)))
    }
}

/// A file that cannot be read to its end ends the body early: it is no whole transaction then, and is refused.
fn send_file(path: &PathBuf, sender: &body::BodySender) {
    let sent = std::fs::File::open(path).and_then(|mut file| {
        loop {
            let mut part = vec![0; PART_BYTES];
            let read = file.read(&mut part)?;
            part.truncate(read);
            if read == 0 || sender.blocking_send(Bytes::from(part)).is_err() {
                return Ok(());
            }
        }
    });
    if let Err(error) = sent {
        tracing::warn!(path = %path.display(), %error, "cannot read a transaction that is to be sent");
    }
}
