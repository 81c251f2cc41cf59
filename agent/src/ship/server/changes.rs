//! Takes the source's news of moved positions once and wakes exactly the streams that care.

use crate::DatabaseName;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_util::sync::CancellationToken;

/// Databases whose position one follower should be told, coalesced: bounded by the number of databases.
#[derive(Default)]
pub(super) struct Dirty {
    sets: Mutex<DirtySets>,
    wake: Notify,
}

#[derive(Default)]
struct DirtySets {
    /// Some news were lost: compare all databases.
    all: bool,
    /// Tell at once: the follower has no log stream of these and waits for the position to open one.
    now: HashSet<DatabaseName>,
    /// Tell now and then: records tell it first.
    later: HashSet<DatabaseName>,
    /// Log streams that this follower has open, with their number.
    streaming: HashMap<DatabaseName, usize>,
}

impl Dirty {
    fn mark(&self, name: &DatabaseName) {
        let mut sets = self.sets.lock();
        if sets.streaming.contains_key(name) {
            sets.later.insert(name.clone());
        } else if sets.now.insert(name.clone()) {
            self.wake.notify_one();
        }
    }

    /// All databases must be compared.
    pub(super) fn mark_all(&self) {
        self.sets.lock().all = true;
        self.wake.notify_one();
    }

    /// Takes the order to compare all databases.
    pub(super) fn take_all(&self) -> bool {
        std::mem::take(&mut self.sets.lock().all)
    }

    /// Puts names back, to be told at once.
    pub(super) fn put(&self, names: impl IntoIterator<Item = DatabaseName>) {
        self.sets.lock().now.extend(names);
        self.wake.notify_one();
    }

    /// Takes up to `limit` names that must be told at once; wakes again when some are left.
    pub(super) fn take_now(&self, limit: usize) -> Vec<DatabaseName> {
        let mut sets = self.sets.lock();
        let taken = take(&mut sets.now, limit);
        if !sets.now.is_empty() {
            self.wake.notify_one();
        }
        taken
    }

    /// Moves what could wait to what is told at once.
    pub(super) fn hurry(&self) {
        let mut sets = self.sets.lock();
        if sets.later.is_empty() {
            return;
        }
        let later = std::mem::take(&mut sets.later);
        sets.now.extend(later);
        self.wake.notify_one();
    }

    /// Waits until there is something to take.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// A log stream of this follower was opened.
    pub(super) fn stream_opened(&self, name: &DatabaseName) {
        *self.sets.lock().streaming.entry(name.clone()).or_default() += 1;
    }

    /// A log stream has ended. What moved since its last record must be told.
    pub(super) fn stream_closed(&self, name: &DatabaseName) {
        let mut sets = self.sets.lock();
        if let Some(count) = sets.streaming.get_mut(name) {
            *count -= 1;
            if *count == 0 {
                sets.streaming.remove(name);
            }
        }
        sets.later.remove(name);
        sets.now.insert(name.clone());
        self.wake.notify_one();
    }
}

fn take(set: &mut HashSet<DatabaseName>, limit: usize) -> Vec<DatabaseName> {
    if set.len() <= limit {
        return set.drain().collect();
    }
    let names: Vec<_> = set.iter().take(limit).cloned().collect();
    names.iter().for_each(|name| {
        set.remove(name);
    });
    names
}

/// Log streams of one database, each with a number of its own.
type Watchers = Vec<(u64, Arc<Notify>)>;

/// Everybody who waits for positions to move.
#[derive(Default)]
pub(super) struct Changes {
    watchers: Mutex<HashMap<DatabaseName, Watchers>>,
    sessions: Mutex<HashMap<u64, Arc<Dirty>>>,
    next_id: AtomicU64,
}

impl Changes {
    /// Watches one database until the watch is dropped.
    pub(super) fn watch(self: &Arc<Self>, name: &DatabaseName) -> Watch {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let notify = Arc::new(Notify::new());
        self.watchers.lock().entry(name.clone()).or_default().push((id, Arc::clone(&notify)));
        Watch { changes: Arc::clone(self), name: name.clone(), id, notify }
    }

    /// Feeds one follower's dirty sets until the subscription is dropped.
    pub(super) fn subscribe(self: &Arc<Self>, dirty: Arc<Dirty>) -> Subscription {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.sessions.lock().insert(id, dirty);
        Subscription { changes: Arc::clone(self), id }
    }

    fn moved(&self, name: &DatabaseName) {
        if let Some(watchers) = self.watchers.lock().get(name) {
            watchers.iter().for_each(|(_, notify)| notify.notify_one());
        }
        self.sessions.lock().values().for_each(|dirty| dirty.mark(name));
    }

    fn lost_count(&self) {
        for (_, notify) in self.watchers.lock().values().flatten() {
            notify.notify_one();
        }
        self.sessions.lock().values().for_each(|dirty| dirty.mark_all());
    }
}

/// Wakes when the database's position moved.
pub(super) struct Watch {
    changes: Arc<Changes>,
    name: DatabaseName,
    id: u64,
    notify: Arc<Notify>,
}

impl Watch {
    /// Returns at once when the position moved since the last call.
    pub(super) async fn moved(&self) {
        self.notify.notified().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watchers = self.changes.watchers.lock();
        if let Some(list) = watchers.get_mut(&self.name) {
            list.retain(|(id, _)| *id != self.id);
            if list.is_empty() {
                watchers.remove(&self.name);
            }
        }
    }
}

/// Keeps a follower's dirty sets fed.
pub(super) struct Subscription {
    changes: Arc<Changes>,
    id: u64,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.changes.sessions.lock().remove(&self.id);
    }
}

/// Runs until `cancel` or until the source is gone.
pub(super) async fn dispatch(
    mut news: broadcast::Receiver<DatabaseName>,
    changes: Arc<Changes>,
    cancel: CancellationToken,
) {
    loop {
        let moved = tokio::select! {
            moved = news.recv() => moved,
            () = cancel.cancelled() => return,
        };
        match moved {
            Ok(name) => changes.moved(&name),
            Err(RecvError::Lagged(_)) => {
                // Everybody compares everything now, so the rest of the old news is of no use.
                news = news.resubscribe();
                changes.lost_count();
            }
            Err(RecvError::Closed) => return,
        }
    }
}
