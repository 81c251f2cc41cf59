//! Applications on a replica that write without having asked for anything (`preload.forward-writes`): the preload door says
//! that a writer waits, and gets its database from the primary by a halt lock, which is given back soon. The writer is told
//! SQLITE_BUSY meanwhile and tries again, as it does for any other writer.

use super::Node;
use crate::DatabaseName;
use crate::database::Database;
use crate::lease::{Time, clock};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// A lock that nobody uses, or waits for, is given back after this. Longer than the longest pause between two tries of
/// SQLite's busy handler, 100 ms.
const IDLE: Duration = Duration::from_millis(150);
/// And after this where it is used all the time: writers on other hosts wait.
const TURN: Duration = Duration::from_millis(500);
/// Then it is not asked for again so soon: the primary's writers, and then other hosts, come first. Longer than
/// [`super::halt::REST`] and a try of another host.
const REST: Duration = Duration::from_millis(200);
/// Between looks whether it is idle.
const LOOK: Duration = Duration::from_millis(20);
/// A writer that has not tried for so long waits no more.
const WAITS: Duration = Duration::from_secs(1);

/// Databases that writers wait for, or have.
#[derive(Debug, Default)]
pub(super) struct Forwarding {
    /// When a writer asked last, by the lease's clock in nanoseconds.
    asked: Mutex<HashMap<DatabaseName, Arc<AtomicU64>>>,
    stop: CancellationToken,
}

fn now() -> u64 {
    u64::try_from(clock::now().as_nanos()).unwrap_or(u64::MAX)
}

fn is_over(since: &AtomicU64, time: Duration) -> bool {
    clock::now().saturating_sub(Time::from_nanos(since.load(Ordering::Acquire))) > time
}

impl Node {
    /// Gets databases for writers from now on. Before the door is open.
    pub(super) fn forward_writes(self: &Arc<Self>) {
        let (node, runtime): (Weak<Node>, Handle) = (Arc::downgrade(self), Handle::current());
        self.shared.borrow_on_demand(move |db| {
            if let Some(node) = node.upgrade() {
                node.wanted(db, &runtime);
            }
        });
    }

    pub(super) fn stop_forwarding(&self) {
        self.forwarding.stop.cancel();
    }

    fn wanted(self: Arc<Self>, db: Arc<Database>, runtime: &Handle) {
        // One that has no transaction is nobody's yet.
        if self.shared.is_writable()
            || db.durable_position().txid.0 == 0
            || self.forwarding.stop.is_cancelled()
        {
            return;
        }
        let asked = {
            let mut all = self.forwarding.asked.lock();
            if let Some(asked) = all.get(db.name()) {
                return asked.store(now(), Ordering::Release);
            }
            let asked = Arc::new(AtomicU64::new(now()));
            all.insert(db.name().clone(), asked.clone());
            asked
        };
        runtime.spawn(async move {
            let stop = self.forwarding.stop.clone();
            tokio::select! {
                () = self.clone().forward(&db, asked) => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Until no writer waits any more.
    async fn forward(self: Arc<Self>, db: &Arc<Database>, asked: Arc<AtomicU64>) {
        let mut told = false;
        loop {
            match self.clone().halt(db.name().clone()).await {
                Ok(lock) => {
                    let begun = clock::now();
                    let is_idle = || is_over(&asked, IDLE) && lock.is_idle(IDLE);
                    while clock::now() - begun < TURN && !is_idle() && lock.is_held() {
                        tokio::time::sleep(LOOK).await;
                    }
                    lock.release().await;
                }
                Err(error) if !told => {
                    told = true;
                    tracing::warn!(database = %db.name(), %error, "writers on this host wait: their halt lock cannot be had yet");
                }
                Err(error) => tracing::debug!(database = %db.name(), %error, "no halt lock yet"),
            }
            tokio::time::sleep(REST).await;
            let mut all = self.forwarding.asked.lock();
            if is_over(&asked, WAITS) || self.shared.is_writable() {
                all.remove(db.name());
                return;
            }
        }
    }
}
