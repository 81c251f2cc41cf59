//! The object of one database.

use super::authority::{Action, authorize};
use super::error::BusError;
use super::view::BusView;
use crate::DatabaseName;
use crate::status::ViewError;
use crate::status::api::{DatabaseState, DatabaseStatus};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use zbus::message::Header;
use zbus::{Connection, interface};

/// What was read this shortly ago is told again: one `GetAll` reads the state once.
const FRESH: Duration = Duration::from_millis(50);

/// A transaction that is being captured may hold the state; then what was last known is told.
const PATIENCE: Duration = Duration::from_secs(1);

/// Properties that change without a signal: whoever wants them asks.
pub const HOT: [&str; 4] = ["LagMillis", "LagTransactions", "OpenHandles", "WalFrames"];

/// One database on the bus.
pub struct DatabaseObject {
    name: DatabaseName,
    view: Arc<dyn BusView>,
    seen: Mutex<(Instant, DatabaseStatus)>,
}

/// Runs what blocks off the async threads.
pub(super) async fn off_thread<T: Send + 'static>(
    view: &Arc<dyn BusView>,
    work: impl FnOnce(&dyn BusView) -> Result<T, ViewError> + Send + 'static,
) -> Result<T, BusError> {
    let view = view.clone();
    tokio::task::spawn_blocking(move || work(&*view)).await.map_err(BusError::failed)?.map_err(Into::into)
}

impl DatabaseObject {
    /// The object of a database that is there.
    pub fn new(view: Arc<dyn BusView>, name: DatabaseName, status: DatabaseStatus) -> DatabaseObject {
        DatabaseObject { name, view, seen: Mutex::new((Instant::now(), status)) }
    }

    /// It was just read by somebody else.
    pub async fn refresh(&self, status: DatabaseStatus) {
        *self.seen.lock().await = (Instant::now(), status);
    }

    async fn now(&self) -> DatabaseStatus {
        let mut seen = self.seen.lock().await;
        if seen.0.elapsed() > FRESH {
            let (view, name) = (self.view.clone(), self.name.clone());
            let read = tokio::task::spawn_blocking(move || view.database(&name));
            if let Ok(Ok(Some(status))) = tokio::time::timeout(PATIENCE, read).await {
                *seen = (Instant::now(), status);
            }
        }
        seen.1.clone()
    }

    async fn authorize(
        &self,
        connection: &Connection,
        header: &Header<'_>,
        action: Action,
    ) -> Result<(), BusError> {
        let details = HashMap::from([("database", self.name.as_str())]);
        authorize(connection, header, action, details).await
    }
}

/// One database of the cluster, as it is on this host.
#[interface(name = "io.litefs.LiteFS1.Database")]
impl DatabaseObject {
    /// Moves what is in the write-ahead log into the database file, as far as readers allow, and makes the files
    /// durable. Nobody is waited for. Returns the frames in the write-ahead log and how many of them are in the
    /// database file too; 0 and 0 for a database that has none.
    #[zbus(out_args("frames", "moved"))]
    async fn checkpoint(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(u64, u64), BusError> {
        self.authorize(connection, &header, Action::Checkpoint).await?;
        let name = self.name.clone();
        let done = off_thread(&self.view, move |view| view.checkpoint(&name)).await?;
        Ok((done.frames, done.moved))
    }

    /// Writes one consistent state as an LTX file below the agent's data directory, where it stays until somebody
    /// removes it. Returns its path and the position that it is at.
    #[zbus(out_args("path", "position"))]
    async fn snapshot(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(String, String), BusError> {
        self.authorize(connection, &header, Action::Snapshot).await?;
        let name = self.name.clone();
        let (path, position) = off_thread(&self.view, move |view| view.snapshot(&name)).await?;
        Ok((path.to_string_lossy().into_owned(), position.to_string()))
    }

    /// Reads every page and compares with the checksum of the position, which it returns.
    #[zbus(out_args("position"))]
    async fn verify(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<String, BusError> {
        self.authorize(connection, &header, Action::Verify).await?;
        let name = self.name.clone();
        Ok(off_thread(&self.view, move |view| view.verify(&name)).await?.to_string())
    }

    /// Makes a consistent copy and returns a descriptor of it, open for reading at its start, and its position. The
    /// copy has no name: it is gone when the descriptor is closed.
    #[zbus(out_args("file", "position"))]
    async fn export(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(zbus::OwnedFd, String), BusError> {
        self.authorize(connection, &header, Action::Export).await?;
        let name = self.name.clone();
        let export = off_thread(&self.view, move |view| view.export(&name)).await?;
        Ok((std::os::fd::OwnedFd::from(export.file).into(), export.position.to_string()))
    }

    /// Path below the cluster's directory.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.name.to_string()
    }

    /// Position: last transaction and checksum after it, `TXID/CHECKSUM` in hexadecimal digits. Changes are told at
    /// most ten times a second, however many transactions there are.
    #[zbus(property)]
    async fn position(&self) -> String {
        let status = self.now().await;
        format!("{}/{}", status.txid, status.checksum)
    }

    /// Number of the last transaction.
    #[zbus(property)]
    async fn txid(&self) -> u64 {
        self.now().await.txid.0
    }

    /// When the last transaction was committed, in microseconds since 1970; 0 when unknown.
    #[zbus(property)]
    async fn last_change(&self) -> u64 {
        let ms = self.now().await.last_change_unix_ms.unwrap_or_default();
        u64::try_from(ms).unwrap_or_default().saturating_mul(1000)
    }

    /// Size in bytes.
    #[zbus(property)]
    async fn size(&self) -> u64 {
        self.now().await.size_bytes
    }

    /// Bytes in a page.
    #[zbus(property)]
    async fn page_size(&self) -> u32 {
        self.now().await.page_size
    }

    /// `wal` or `rollback`.
    #[zbus(property)]
    async fn journal_mode(&self) -> String {
        self.now().await.journal_mode
    }

    /// `ok`, or `quarantined`: it cannot be trusted and stands aside.
    #[zbus(property)]
    async fn health(&self) -> String {
        match self.now().await.state {
            DatabaseState::Ok => "ok".into(),
            DatabaseState::Quarantined => "quarantined".into(),
        }
    }

    /// Why it is quarantined; empty when it is not.
    #[zbus(property)]
    async fn reason(&self) -> String {
        self.now().await.reason.unwrap_or_default()
    }

    /// The host that writes it under a halt lock, told on that host and on the primary; empty when there is none.
    #[zbus(property)]
    async fn halt_lock(&self) -> String {
        self.now().await.halt_lock.unwrap_or_default()
    }

    /// Transactions that the upstream has and this host has not; 0 on the primary.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn lag_transactions(&self) -> u64 {
        self.now().await.lag.map_or(0, |lag| lag.transactions)
    }

    /// Milliseconds behind the upstream; 0 on the primary.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn lag_millis(&self) -> u64 {
        self.now().await.lag.map_or(0, |lag| lag.ms)
    }

    /// Handles that applications on this host have open.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn open_handles(&self) -> u64 {
        self.now().await.open_handles
    }

    /// Frames in the write-ahead log.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn wal_frames(&self) -> u64 {
        self.now().await.wal_frames
    }
}
