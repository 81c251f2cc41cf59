//! Halt locks: this node as the primary that lends databases, and as a replica that borrows one.

use super::Node;
use crate::DatabaseName;
use crate::apply::WriterHold;
use crate::database::Database;
use crate::database::halt::{Lender, Transaction};
use crate::lease::{Time, clock};
use crate::ship::engine::{EngineError, Epoch, RecordPayload, ShippedRecord};
use crate::ship::follow::halt::{HaltClient, HaltError};
use crate::ship::halt::{Granted, HaltLock, HaltLocks};
use crate::ship::peer::{Identity, Refusal, RefusalCode};
use crate::status::ViewError;
use crate::status::api::RoleName;
use crate::status::events::{Event, HaltLockData};
use futures_util::future::BoxFuture;
use ltx::Pos;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io::{BufReader, Cursor, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long the writers of a database may take to end when it is lent, or given back.
const WRITERS_END: Duration = Duration::from_secs(5);
/// How long a borrower tries to get a lock that somebody else has.
pub(super) const ACQUIRE: Duration = Duration::from_secs(30);
/// How long it waits between.
const TRY_AGAIN: Duration = Duration::from_millis(50);
/// A database that was taken back is not lent again for so long: the primary's own writers, whose busy handlers look every
/// 100 ms, have their turn.
pub(super) const REST: Duration = Duration::from_millis(120);
/// How long it waits for what the primary had when it lent the database.
const CATCH_UP: Duration = Duration::from_secs(10);
/// How long a commit may take at the primary.
const COMMIT: Duration = Duration::from_secs(20);
/// How long a release may take before the lock is left to run out.
const RELEASE: Duration = Duration::from_secs(2);

/// A database that another node has.
struct Lent {
    epoch: Epoch,
    until: Time,
    /// In rollback modes: makes this node's writers wait.
    hold: Option<WriterHold>,
}

/// A lock, and who has it, which can be told while a commit is under way.
#[derive(Clone)]
struct LentEntry {
    lent: Arc<Mutex<Lent>>,
    lock: HaltLock,
    to: Identity,
}

/// All halt locks that this node gives or has.
#[derive(Default)]
pub(super) struct Locks {
    lent: Mutex<HashMap<DatabaseName, LentEntry>>,
    /// Databases whose writers are being waited for.
    lending: Mutex<HashSet<DatabaseName>>,
    /// When databases may be lent again.
    rests: Mutex<HashMap<DatabaseName, Time>>,
    borrowed: Mutex<HashMap<DatabaseName, Option<Arc<Borrowed>>>>,
    /// Nobody waits for a lock any more.
    pub(super) stop: CancellationToken,
}

fn refused(message: impl Into<String>) -> Refusal {
    Refusal::new(RefusalCode::HaltLock, message)
}

impl Node {
    fn halt_ttl(&self) -> Duration {
        self.config.read().lease.ttl
    }

    fn lend(&self, to: Identity, lock: HaltLock) -> Result<Granted, Refusal> {
        let name = lock.name.clone();
        if !self.shared.is_writable() {
            let primary = self.primary_name();
            let hint = primary.map(|name| format!("; {name} is")).unwrap_or_default();
            let message = format!("this node is not the primary{hint}: it lends no database");
            return Err(Refusal::new(RefusalCode::Engine, message));
        }
        let (epoch, ttl) = (self.shared.epoch(), self.halt_ttl());
        let granted = |position: Pos| Granted {
            epoch: epoch.0,
            position: position.to_string(),
            ttl_ms: ttl.as_millis() as u64,
        };
        let db = self.shared.database(&name).filter(|db| db.is_tracked());
        let db = db.ok_or_else(|| Refusal::from(EngineError::NoSuchDatabase(name.clone())))?;
        self.check_members_without(&to, &name)?;
        let rests_until = self.halt_locks.rests.lock().get(&name).copied();
        if rests_until.is_some_and(|until| clock::now() < until) {
            return Err(refused(format!("it is the turn of the primary's own writers of {name}")));
        }
        if !self.halt_locks.lending.lock().insert(name.clone()) {
            return Err(refused(format!("{name} is being lent to somebody else")));
        }
        let done = self.lend_one(to, lock, &db, epoch);
        self.halt_locks.lending.lock().remove(&name);
        done.map(granted)
    }

    /// The borrower acknowledges no commit of its own: there have to be enough others that do.
    fn check_members_without(&self, borrower: &Identity, name: &DatabaseName) -> Result<(), Refusal> {
        let Some(members) = self.shared.gate.members_of(name) else { return Ok(()) };
        let acks = members.acks;
        let own = self.config.read().node.name.clone();
        let others = |names: &[String]| {
            names.iter().filter(|member| **member != own && **member != borrower.node_name).count()
        };
        if !members.named.is_empty() && others(&members.named) < acks {
            let message = format!(
                "commits of {name} wait for {acks} members ([sync]), and without {own} and {borrower} there are too few: it \
                 is written on the primary only"
            );
            return Err(Refusal::new(RefusalCode::Engine, message));
        }
        let connected = others(&members.connected);
        if connected < acks {
            return Err(refused(format!(
                "commits of {name} wait for {acks} members ([sync]), and without {borrower} {connected} are connected"
            )));
        }
        Ok(())
    }

    /// One thread at a time, for one database.
    fn lend_one(&self, to: Identity, lock: HaltLock, db: &Database, epoch: Epoch) -> Result<Pos, Refusal> {
        let (name, until) = (lock.name.clone(), clock::now() + self.halt_ttl());
        let known = self.halt_locks.lent.lock().get(&name).cloned();
        if let Some(entry) = known {
            let Some(mut lent) = entry.lent.try_lock() else {
                return Err(refused(format!("{} writes {name} under a halt lock", entry.to.node_name)));
            };
            if entry.lock == lock && entry.to.node_id == to.node_id && self.is_running(&lent) {
                // The answer was lost.
                lent.until = until;
                return Ok(db.state().position);
            }
            if self.is_running(&lent) {
                return Err(refused(format!("{} has a halt lock on {name}", entry.to.node_name)));
            }
            self.halt_locks.lent.lock().remove(&name);
            self.take_back(&name, &mut lent);
        }
        let (position, hold) = db.lend(WRITERS_END).map_err(|error| match error {
            EngineError::Busy(_) => refused(format!("applications on the primary do not let go of {name}")),
            error => error.into(),
        })?;
        tracing::debug!(database = %name, %to, %position, "lent under a halt lock");
        let lent = Arc::new(Mutex::new(Lent { epoch, until: clock::now() + self.halt_ttl(), hold }));
        self.halt_locks.lent.lock().insert(name.clone(), LentEntry { lent: lent.clone(), lock, to });
        let mut lent = lent.lock();
        if !self.is_running(&lent) {
            self.halt_locks.lent.lock().remove(&name);
            self.take_back(&name, &mut lent);
            return Err(refused(format!("this node's term ended while {name} was being lent")));
        }
        self.tell_halt_lock(&name);
        Ok(position)
    }

    fn primary_name(&self) -> Option<String> {
        self.role().upstream.and_then(|upstream| upstream.hostname)
    }

    /// Whether a lock counts: in its own term only, and until it runs out.
    fn is_running(&self, lent: &Lent) -> bool {
        lent.epoch == self.shared.epoch() && self.shared.is_writable() && clock::now() < lent.until
    }

    /// A lock that a node has.
    fn lent_to(&self, from: u64, lock: &HaltLock) -> Result<Arc<Mutex<Lent>>, Refusal> {
        let all = self.halt_locks.lent.lock();
        let entry = all.get(&lock.name).filter(|entry| entry.lock == *lock && entry.to.node_id == from);
        let entry = entry.ok_or_else(|| refused(format!("the halt lock on {} has ended", lock.name)))?;
        Ok(entry.lent.clone())
    }

    fn check_lent(&self, name: &DatabaseName, lent: &Lent, epoch: Epoch) -> Result<(), Refusal> {
        if lent.epoch == epoch && self.is_running(lent) {
            return Ok(());
        }
        Err(refused(format!(
            "the halt lock on {name} has run out, or was given in an earlier term (epoch {}; now {})",
            epoch.0,
            self.shared.epoch().0
        )))
    }

    fn take_back(&self, name: &DatabaseName, lent: &mut Lent) {
        self.halt_locks.rests.lock().insert(name.clone(), clock::now() + REST);
        if let Some(db) = self.shared.database(name) {
            db.take_back();
        }
        lent.hold = None;
    }

    /// Takes back what was lent to nodes that do not renew, or in an earlier term.
    pub(super) fn end_halt_locks(&self) {
        let ended: Vec<_> = {
            let mut all = self.halt_locks.lent.lock();
            let is_over =
                |entry: &mut LentEntry| entry.lent.try_lock().is_some_and(|lent| !self.is_running(&lent));
            all.extract_if(|_, entry| is_over(entry)).collect()
        };
        for (name, entry) in ended {
            let mut lent = entry.lent.lock();
            tracing::warn!(database = %name, to = %entry.to, "a halt lock was not renewed, or its term has ended");
            self.take_back(&name, &mut lent);
            self.tell_halt_lock(&name);
        }
    }

    /// Tells who has the halt lock of a database now.
    fn tell_halt_lock(&self, name: &DatabaseName) {
        self.feed.database(name);
        if self.events.has_readers() {
            let data = HaltLockData { hostname: self.halt_lock_of(name) };
            self.events.publish(Event::HaltLock { db: name.clone(), data });
        }
    }

    /// The host that has the halt lock of a database, as far as this node knows: it gave it, or has it.
    pub(super) fn halt_lock_of(&self, name: &DatabaseName) -> Option<String> {
        let is_kept = |borrowed: &Arc<Borrowed>| borrowed.lost.borrow().is_none();
        if self.halt_locks.borrowed.lock().get(name).and_then(Option::as_ref).is_some_and(is_kept) {
            return Some(self.config.read().node.name.clone());
        }
        self.halt_locks.lent.lock().get(name).map(|entry| entry.to.node_name.clone())
    }

    fn commit_lent(
        &self,
        from: u64,
        lock: &HaltLock,
        epoch: Epoch,
        transaction: RecordPayload,
    ) -> Result<Pos, Refusal> {
        let lent = self.lent_to(from, lock)?;
        let mut lent = lent.lock();
        self.check_lent(&lock.name, &lent, epoch)?;
        let record = shipped(epoch, transaction).map_err(|e| {
            Refusal::new(RefusalCode::BadRequest, format!("a damaged transaction of {}: {e}", lock.name))
        })?;
        let db = self.shared.database(&lock.name);
        let db = db.ok_or_else(|| Refusal::from(EngineError::NoSuchDatabase(lock.name.clone())))?;
        let bound = self.config.read().replication.apply_wait;
        let position = db.take_lent(record, &mut lent.hold, bound)?;
        lent.until = clock::now() + self.halt_ttl();
        Ok(position)
    }
}

/// What the log says of a transaction.
fn shipped(epoch: Epoch, payload: RecordPayload) -> Result<ShippedRecord, ltx::Error> {
    let reader: Box<dyn Read> = match &payload {
        RecordPayload::Bytes(bytes) => Box::new(Cursor::new(bytes.clone())),
        RecordPayload::File { path, .. } => {
            let file = std::fs::File::open(path).map_err(|source| ltx::Error::Io { offset: 0, source })?;
            Box::new(BufReader::new(file))
        }
    };
    let (header, _, post_apply) = crate::database::receive::read_page_checksums(reader)?;
    Ok(ShippedRecord { epoch, min_txid: header.min_txid, max_txid: header.max_txid, post_apply, payload })
}

/// Runs a call that waits for locks and the disk.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(call).await;
    done.unwrap_or_else(|error| Err(Refusal::new(RefusalCode::Engine, error.to_string())))
}

/// The node as others borrow from it.
pub(super) struct LendingNode(pub Arc<Node>);

impl HaltLocks for LendingNode {
    fn staging_dir(&self) -> PathBuf {
        self.0.shared.dirs.staging.clone()
    }

    fn acquire(&self, from: Identity, lock: HaltLock) -> BoxFuture<'_, Result<Granted, Refusal>> {
        let node = self.0.clone();
        Box::pin(blocking(move || node.lend(from, lock)))
    }

    fn renew(&self, from: u64, lock: HaltLock, epoch: Epoch) -> BoxFuture<'_, Result<(), Refusal>> {
        let node = self.0.clone();
        Box::pin(blocking(move || {
            let lent = node.lent_to(from, &lock)?;
            // Else a commit is under way, perhaps one that waits for members; it renews the lock when it ends.
            let Some(mut lent) = lent.try_lock() else { return Ok(()) };
            node.check_lent(&lock.name, &lent, epoch)?;
            lent.until = clock::now() + node.halt_ttl();
            Ok(())
        }))
    }

    fn commit(
        &self,
        from: u64,
        lock: HaltLock,
        epoch: Epoch,
        transaction: RecordPayload,
    ) -> BoxFuture<'_, Result<String, Refusal>> {
        let node = self.0.clone();
        Box::pin(blocking(move || {
            node.commit_lent(from, &lock, epoch, transaction).map(|position| position.to_string())
        }))
    }

    fn release(&self, from: u64, lock: HaltLock, epoch: Epoch) -> BoxFuture<'_, ()> {
        let node = self.0.clone();
        Box::pin(async move {
            // Who does not have it has nothing to release.
            let _ = blocking(move || {
                let lent = node.lent_to(from, &lock)?;
                let mut lent = lent.lock();
                if lent.epoch == epoch {
                    node.halt_locks.lent.lock().remove(&lock.name);
                    node.take_back(&lock.name, &mut lent);
                    tracing::debug!(database = %lock.name, node = from, "its halt lock was released");
                    node.tell_halt_lock(&lock.name);
                }
                Ok(())
            })
            .await;
        })
    }
}

/// A database that this node has from the primary.
#[derive(Debug)]
pub(super) struct Borrowed {
    node: Weak<Node>,
    client: HaltClient,
    epoch: Epoch,
    ttl: Duration,
    /// Nanoseconds of the lease's clock until which the lock counts here: less than it does at the primary.
    until: AtomicU64,
    /// The same clock's, when a commit was made under it last, or it was got.
    used: AtomicU64,
    /// Why it was lost.
    lost: watch::Sender<Option<String>>,
    runtime: Handle,
}

impl Borrowed {
    /// It was confirmed by an answer to what was sent then.
    fn confirmed(&self, sent: Time) {
        let until = sent + self.ttl.mul_f64(0.9);
        self.until.fetch_max(until.as_nanos() as u64, Ordering::AcqRel);
    }

    fn is_used(&self) {
        self.used.store(clock::now().as_nanos() as u64, Ordering::Release);
    }

    fn lose(&self, why: &str) {
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            if first {
                *lost = Some(why.to_owned());
            }
            first
        });
    }

    fn has_run_out(&self) -> bool {
        clock::now().as_nanos() as u64 >= self.until.load(Ordering::Acquire)
            || self.node.upgrade().is_none_or(|node| node.shared.epoch() != self.epoch)
    }
}

impl Lender for Borrowed {
    fn is_held(&self) -> bool {
        self.lost.borrow().is_none() && !self.has_run_out()
    }

    fn commit(&self, transaction: Transaction) -> Result<(), String> {
        if !self.is_held() {
            self.lose("it was not renewed in time, or its term has ended");
            return Err("it was not renewed in time, or its term has ended".into());
        }
        let sent = clock::now();
        // The timer belongs to the runtime.
        let committing = async {
            let mut lost = self.lost.subscribe();
            tokio::select! {
                done = tokio::time::timeout(COMMIT, self.client.commit(self.epoch, transaction)) => match done {
                    Ok(done) => done.map_err(|error| error.to_string()),
                    Err(_) => Err(format!("the primary did not answer a commit within {COMMIT:?}")),
                },
                // A primary that cannot be reached, or leads no more, does not answer.
                lost = lost.wait_for(Option::is_some) => {
                    Err(lost.ok().and_then(|why| why.clone()).unwrap_or_else(|| RELEASED.to_owned()))
                }
            }
        };
        let done = self.runtime.block_on(committing);
        match done {
            Ok(()) => {
                self.confirmed(sent);
                self.is_used();
                Ok(())
            }
            Err(why) => {
                self.lose(&why);
                Err(why)
            }
        }
    }
}

/// A halt lock that somebody on this host uses. It ends with this.
pub struct HeldLock {
    /// Nothing: this host is the primary.
    borrowed: Option<(Arc<Node>, Arc<Database>, Arc<Borrowed>)>,
}

impl HeldLock {
    /// Waits until the lock is lost, and says why.
    pub async fn lost(&self) -> String {
        let Some((.., borrowed)) = &self.borrowed else { return std::future::pending().await };
        let mut lost = borrowed.lost.subscribe();
        match lost.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "it has ended".into(),
        }
    }

    /// Whether it counts; on the primary, where there is none, it does not.
    pub(super) fn is_held(&self) -> bool {
        self.borrowed.as_ref().is_some_and(|(.., borrowed)| borrowed.is_held())
    }

    /// Whether nobody has committed under it for so long.
    pub(super) fn is_idle(&self, time: Duration) -> bool {
        self.borrowed.as_ref().is_none_or(|(.., borrowed)| {
            let used = Time::from_nanos(borrowed.used.load(Ordering::Acquire));
            clock::now().saturating_sub(used) > time
        })
    }

    /// Ends it, and waits for that.
    pub(super) async fn release(mut self) {
        if let Some((node, db, borrowed)) = self.borrowed.take() {
            node.give_back(&db, &borrowed).await;
        }
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        if let Some((node, db, borrowed)) = self.borrowed.take() {
            let runtime = borrowed.runtime.clone();
            runtime.spawn(async move { node.give_back(&db, &borrowed).await });
        }
    }
}

impl Node {
    /// Gets a halt lock on a database for somebody on this host.
    ///
    /// # Errors
    /// Why this host may not write it.
    pub(super) async fn halt(self: Arc<Self>, name: DatabaseName) -> Result<HeldLock, ViewError> {
        if self.shared.is_writable() {
            return Ok(HeldLock { borrowed: None });
        }
        let known = self.shared.database(&name).filter(|db| db.is_tracked());
        let db = known.ok_or_else(|| ViewError::NoSuchDatabase(name.clone()))?;
        // In a task of its own: if the one who asks goes away, what was done is undone.
        let gone = CancellationToken::new();
        let _asking = gone.clone().drop_guard();
        let getting = tokio::spawn(async move {
            let give_up = clock::now() + ACQUIRE;
            while !self.reserve(&name) {
                if clock::now() > give_up || gone.is_cancelled() {
                    return Err(format!("another program on this host has a halt lock on {name}"));
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
            match self.clone().borrow(&db, give_up, &gone).await {
                Ok(borrowed) => {
                    self.halt_locks.borrowed.lock().insert(name.clone(), Some(borrowed.clone()));
                    self.tell_halt_lock(&name);
                    Ok(HeldLock { borrowed: Some((self, db, borrowed)) })
                }
                Err(why) => {
                    self.halt_locks.borrowed.lock().remove(&name);
                    Err(why)
                }
            }
        });
        let got = getting.await.unwrap_or_else(|error| Err(error.to_string()));
        got.map_err(ViewError::HaltLock)
    }

    /// One program at a time: the others wait here.
    fn reserve(&self, name: &DatabaseName) -> bool {
        let mut borrowed = self.halt_locks.borrowed.lock();
        let free = !borrowed.contains_key(name);
        if free {
            borrowed.insert(name.clone(), None);
        }
        free
    }

    async fn borrow(
        self: Arc<Self>,
        db: &Arc<Database>,
        give_up: Time,
        gone: &CancellationToken,
    ) -> Result<Arc<Borrowed>, String> {
        let name = db.name();
        let id = RandomState::new().hash_one(clock::now().as_nanos());
        let lock = HaltLock { name: name.clone(), id };
        let (client, granted, sent) = loop {
            if gone.is_cancelled() {
                return Err("nobody waits for it any more".into());
            }
            let role = self.role();
            let upstream = role.upstream.filter(|_| role.name == RoleName::Replica);
            let url = upstream
                .map(|upstream| upstream.url)
                .ok_or("this host follows nobody: there is no primary to get the lock from")?;
            let client = HaltClient::new(&url, self.follow_options(), self.shared.node_id, lock.clone());
            let client = client.map_err(|error| error.to_string())?;
            let sent = clock::now();
            match client.acquire(self.shared.epoch()).await {
                Ok(granted) => break (client, granted, sent),
                Err(HaltError::Refused { busy: true, .. } | HaltError::Lost(_)) if clock::now() < give_up => {
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                Err(error) => return Err(error.to_string()),
            }
        };
        let borrowed = Arc::new(Borrowed {
            node: Arc::downgrade(&self),
            client,
            epoch: Epoch(granted.epoch),
            ttl: Duration::from_millis(granted.ttl_ms),
            until: AtomicU64::new(0),
            used: AtomicU64::new(0),
            lost: watch::Sender::new(None),
            runtime: Handle::current(),
        });
        borrowed.confirmed(sent);
        tokio::spawn(self.clone().renew(db.clone(), borrowed.clone()));
        let caught_up = async {
            let position: Pos = granted.position.parse().map_err(|e: ltx::Error| e.to_string())?;
            loop {
                if self.shared.epoch() == borrowed.epoch && db.visible_position() == position {
                    return Ok(());
                }
                if let Some(why) = borrowed.lost.borrow().clone() {
                    return Err(why);
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let caught_up = match tokio::time::timeout(CATCH_UP, caught_up).await {
            Ok(caught_up) => caught_up,
            Err(_) => Err(format!(
                "{name} did not get to {} within {CATCH_UP:?}: readers hold it up, or the stream is slow",
                granted.position
            )),
        };
        if let Err(why) = caught_up {
            borrowed.lose(&why);
            self.release(&borrowed).await;
            return Err(why);
        }
        let (writing, lender) = (db.clone(), borrowed.clone());
        let begun = tokio::task::spawn_blocking(move || writing.borrow(lender)).await;
        if let Err(why) =
            begun.map_err(|error| error.to_string()).and_then(|begun| begun.map_err(|e| e.to_string()))
        {
            borrowed.lose(&why);
            self.release(&borrowed).await;
            return Err(why);
        }
        borrowed.is_used();
        tracing::debug!(database = %name, position = granted.position, "this host writes it under a halt lock");
        Ok(borrowed)
    }

    /// Keeps a lock until it is lost; then applications here write no more.
    async fn renew(self: Arc<Self>, db: Arc<Database>, borrowed: Arc<Borrowed>) {
        let mut lost = borrowed.lost.subscribe();
        let mut ticks = tokio::time::interval(borrowed.ttl / 4);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let renewing = async {
            loop {
                ticks.tick().await;
                if borrowed.has_run_out() {
                    return "it was not renewed in time, or its term has ended".to_owned();
                }
                let sent = clock::now();
                let renewal = tokio::time::timeout(borrowed.ttl / 4, borrowed.client.renew(borrowed.epoch));
                match renewal.await {
                    Ok(Ok(())) => borrowed.confirmed(sent),
                    Ok(Err(HaltError::Refused { message, .. })) => return message,
                    Ok(Err(HaltError::Lost(_))) | Err(_) => {}
                }
            }
        };
        tokio::select! {
            why = renewing => borrowed.lose(&why),
            _ = lost.wait_for(Option::is_some) => {}
        }
        let why = borrowed.lost.borrow().clone().unwrap_or_default();
        if why != RELEASED {
            tracing::warn!(database = %db.name(), why, "the halt lock is lost: applications on this host write no more");
            self.tell_halt_lock(db.name());
            self.stop_borrowing(&db).await;
        }
    }

    /// Not while somebody waits for the lock: then nothing has been allowed yet, and this changes nothing.
    async fn stop_borrowing(self: &Arc<Self>, db: &Arc<Database>) {
        let (node, db) = (self.clone(), db.clone());
        let _ = tokio::task::spawn_blocking(move || {
            db.give_back(WRITERS_END);
            if !node.shared.is_writable() {
                node.keep_writers_out();
            }
        })
        .await;
    }

    async fn release(&self, borrowed: &Borrowed) {
        let releasing = tokio::time::timeout(RELEASE, borrowed.client.release(borrowed.epoch));
        if !matches!(releasing.await, Ok(Ok(()))) {
            tracing::debug!("the primary did not hear that a halt lock was released: it runs out there");
        }
    }

    /// Whoever used the lock has ended.
    async fn give_back(self: &Arc<Self>, db: &Arc<Database>, borrowed: &Arc<Borrowed>) {
        let held = borrowed.is_held();
        self.stop_borrowing(db).await;
        borrowed.lose(RELEASED);
        if held {
            self.tell_halt_lock(db.name());
            self.release(borrowed).await;
        }
        self.halt_locks.borrowed.lock().remove(db.name());
    }

    /// The agent stops: other hosts need not wait until the locks run out.
    pub(super) async fn give_back_all(self: &Arc<Self>) {
        self.halt_locks.stop.cancel();
        let all: Vec<_> = self.halt_locks.borrowed.lock().drain().collect();
        for (name, borrowed) in all {
            if let (Some(db), Some(borrowed)) = (self.shared.database(&name), borrowed) {
                self.give_back(&db, &borrowed).await;
            }
        }
    }
}

/// Why a lock was lost that was not needed any more.
const RELEASED: &str = "it was released";
