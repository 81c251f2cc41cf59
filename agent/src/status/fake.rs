//! A node without databases, for the tests of status and of the commands.

use super::api::*;
use super::changes::ChangeFeed;
use super::dbus::view::{BusView, Checkpointed, Constants};
use super::{Event, EventBus, Export, Metrics, NodeView, RoleRequest, ViewError};
use crate::DatabaseName;
use futures_util::future::BoxFuture;
use ltx::{Checksum, Pos, Txid};
use parking_lot::Mutex;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tokio::sync::broadcast;

/// Status of a primary with one database and one follower.
pub fn status() -> Status {
    Status {
        cluster: "db".into(),
        node: NodeStatus { name: "host-a".into(), id: NodeId(0xab), version: "0.1.0".into() },
        role: RoleStatus {
            name: RoleName::Primary,
            epoch: 3,
            since_unix_ms: 1000,
            upstream: None,
            waits: None,
        },
        caught_up: true,
        mount: MountStatus { dir: "/srv/litefs/db".into(), door: "fuse".into(), passthrough: true },
        databases: vec![DatabaseStatus {
            name: "a.db".into(),
            txid: Txid(42),
            checksum: Checksum(u64::MAX),
            page_size: 4096,
            pages: 2,
            size_bytes: 8192,
            journal_mode: "wal".into(),
            state: DatabaseState::Ok,
            reason: None,
            lag: None,
            wal_frames: 5,
            open_handles: 1,
            halt_lock: None,
            last_change_unix_ms: Some(2000),
        }],
        followers: vec![FollowerStatus {
            node_id: NodeId(0xcd),
            name: "host-b".into(),
            address: "10.0.0.2:40000".into(),
            connected_since_unix_ms: 1500,
            databases: vec![FollowerDatabase { name: "a.db".into(), txid: Txid(40), lag_transactions: 2 }],
        }],
        sync: vec![],
        log: LogStatus { oldest_lsn: 0, durable_lsn: 4096, bytes: 4096 },
        files_not_replicated: vec![],
    }
}

/// Status of a connected replica, 1 transaction and 20 ms behind.
pub fn replica() -> Status {
    let mut status = status();
    status.role.name = RoleName::Replica;
    status.role.upstream = Some(UpstreamStatus {
        url: "http://host-a:20202".into(),
        hostname: Some("host-a".into()),
        connected: true,
        last_heartbeat_unix_ms: Some(10_000),
    });
    status.followers.clear();
    status.databases[0].lag = Some(Lag { transactions: 1, bytes: Some(4200), ms: 20 });
    status
}

/// A node whose databases are the files of a directory.
pub struct FakeNode {
    pub dir: tempfile::TempDir,
    pub status: Mutex<Status>,
    pub events: EventBus,
    pub feed: ChangeFeed,
    /// What was asked for over the bus.
    pub asked: Mutex<Vec<RoleRequest>>,
    pub metrics: Metrics,
    /// Position that exports claim; the file's own when `None`.
    pub claimed: Mutex<Option<Pos>>,
}

impl FakeNode {
    pub fn new() -> FakeNode {
        FakeNode {
            dir: tempfile::tempdir().unwrap(),
            status: Mutex::new(status()),
            events: EventBus::default(),
            feed: ChangeFeed::default(),
            asked: Mutex::default(),
            metrics: Metrics::default(),
            claimed: Mutex::new(None),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// A database of `pages` pages with the header that SQLite would write, each page with other bytes.
pub fn database(page_size: u32, pages: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..page_size as u64 * u64::from(pages)).map(|i| (i % 251) as u8).collect();
    bytes[..16].copy_from_slice(b"SQLite format 3\0");
    bytes[16..18].copy_from_slice(&((page_size % 65536 + page_size / 65536) as u16).to_be_bytes());
    bytes[18..24].copy_from_slice(&[1, 1, 0, 64, 32, 32]);
    bytes[24..28].copy_from_slice(&7u32.to_be_bytes());
    bytes[28..32].copy_from_slice(&pages.to_be_bytes());
    bytes[92..96].copy_from_slice(&7u32.to_be_bytes());
    bytes
}

/// Checksum of a whole database file.
pub fn checksum(bytes: &[u8], page_size: u32) -> Checksum {
    let pages = bytes.chunks(page_size as usize).zip(1u32..);
    pages.fold(Checksum::EMPTY, |sum, (page, pgno)| sum.xor(ltx::page_checksum(pgno, page)))
}

impl NodeView for FakeNode {
    fn status(&self) -> Status {
        self.status.lock().clone()
    }

    fn node_id(&self) -> u64 {
        0xab
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn export(&self, name: &DatabaseName) -> Result<Export, ViewError> {
        let path = self.path(name.as_str());
        let bytes = fs::read(&path).map_err(|_| ViewError::NoSuchDatabase(name.clone()))?;
        let page_size = u32::from(u16::from_be_bytes([bytes[16], bytes[17]]));
        let own = Pos { txid: Txid(42), checksum: checksum(&bytes, page_size) };
        Ok(Export { file: File::open(path).unwrap(), position: self.claimed.lock().unwrap_or(own) })
    }

    fn import(&self, name: &DatabaseName, staged: &Path) -> Result<Pos, ViewError> {
        if self.status.lock().role.name != RoleName::Primary {
            return Err(ViewError::NotPrimary { primary: Some("host-a".into()) });
        }
        assert!(staged.starts_with(self.import_dir()));
        fs::rename(staged, self.path(name.as_str())).unwrap();
        Ok(Pos { txid: Txid(43), checksum: Checksum::EMPTY })
    }

    fn reload(&self) -> BoxFuture<'static, Result<(), ViewError>> {
        Box::pin(async { Err(ViewError::BadConfiguration("f.toml:1:1: unknown key x".into())) })
    }

    fn request_role(
        self: std::sync::Arc<Self>,
        request: RoleRequest,
    ) -> BoxFuture<'static, Result<(), ViewError>> {
        self.asked.lock().push(request);
        Box::pin(async { Ok(()) })
    }

    fn halt(
        self: std::sync::Arc<Self>,
        name: DatabaseName,
    ) -> BoxFuture<'static, Result<crate::node::HeldLock, ViewError>> {
        Box::pin(async move { Err(ViewError::NoSuchDatabase(name)) })
    }

    fn import_dir(&self) -> PathBuf {
        self.path("staging")
    }
}

impl BusView for FakeNode {
    fn constants(&self) -> Constants {
        let status = self.status.lock();
        Constants {
            cluster: status.cluster.clone(),
            node_name: status.node.name.clone(),
            mount: status.mount.dir.clone(),
        }
    }

    fn role(&self) -> RoleStatus {
        self.status.lock().role.clone()
    }

    fn lag_ms(&self) -> Option<u64> {
        self.status.lock().databases.iter().filter_map(|db| db.lag.map(|lag| lag.ms)).max()
    }

    fn followers(&self) -> Vec<FollowerStatus> {
        self.status.lock().followers.clone()
    }

    fn sync(&self) -> Vec<SyncStatus> {
        self.status.lock().sync.clone()
    }

    fn follower_names(&self) -> Vec<String> {
        self.followers().into_iter().map(|follower| follower.name).collect()
    }

    fn names(&self) -> Vec<DatabaseName> {
        self.status.lock().databases.iter().map(|db| DatabaseName::new(&db.name).unwrap()).collect()
    }

    fn database(&self, name: &DatabaseName) -> Option<DatabaseStatus> {
        self.status.lock().databases.iter().find(|db| db.name == name.as_str()).cloned()
    }

    fn feed(&self) -> &ChangeFeed {
        &self.feed
    }

    fn checkpoint(&self, _: &DatabaseName) -> Result<Checkpointed, ViewError> {
        Ok(Checkpointed { frames: 5, moved: 4 })
    }

    fn snapshot(&self, name: &DatabaseName) -> Result<(PathBuf, Pos), ViewError> {
        let position = self.export(name)?.position;
        Ok((self.path("snapshots/a.db/1.ltx"), position))
    }

    fn verify(&self, name: &DatabaseName) -> Result<Pos, ViewError> {
        Err(ViewError::Damaged(format!("{name}: page 7 is not what was committed")))
    }
}
