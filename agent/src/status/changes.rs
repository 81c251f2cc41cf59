//! What changed since somebody last looked: a feed that never floods and never loses, for the D-Bus service and hooks.
//!
//! Each subscriber has one set that a change is added to. However many transactions a database has between two looks,
//! it is in the set once; however slow the subscriber is, the set is no larger than the databases are many.

use crate::DatabaseName;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use tokio::sync::Notify;

/// Single happenings that are kept for a subscriber that does not look.
const HAPPENINGS_MAX: usize = 1024;

/// Something that has no state to look at afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A database was set aside.
    Quarantined {
        /// Database.
        database: DatabaseName,
        /// Why.
        reason: String,
    },
    /// A database had transactions that the primary does not have; they are kept as files.
    Diverged {
        /// Database.
        database: DatabaseName,
        /// Directory of the files.
        kept: std::path::PathBuf,
    },
}

/// What changed between two looks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ChangeSet {
    /// Databases with new transactions, or with another health.
    pub databases: BTreeSet<DatabaseName>,
    /// The role, the epoch or the upstream may be another.
    pub role: bool,
    /// In order; the oldest are dropped when nobody looks.
    pub happenings: Vec<Happening>,
}

impl ChangeSet {
    fn is_empty(&self) -> bool {
        self.databases.is_empty() && !self.role && self.happenings.is_empty()
    }
}

/// One subscriber's end.
#[derive(Debug, Default)]
pub struct Subscription {
    set: Mutex<ChangeSet>,
    wake: Notify,
}

impl Subscription {
    /// Everything since the last look; waits until there is something.
    pub async fn next(&self) -> ChangeSet {
        loop {
            // The permit of a change that comes between the look and the wait is kept.
            let woken = self.wake.notified();
            let set = std::mem::take(&mut *self.set.lock());
            if !set.is_empty() {
                return set;
            }
            woken.await;
        }
    }

    fn add(&self, change: impl FnOnce(&mut ChangeSet)) {
        change(&mut self.set.lock());
        self.wake.notify_one();
    }
}

/// Where the node says what changed. Cheap where nobody subscribed.
#[derive(Debug, Default)]
pub struct ChangeFeed {
    subscribers: RwLock<Vec<Weak<Subscription>>>,
}

impl ChangeFeed {
    /// Changes from now on, until it is dropped.
    pub fn subscribe(&self) -> Arc<Subscription> {
        let subscription = Arc::<Subscription>::default();
        let mut subscribers = self.subscribers.write();
        subscribers.retain(|subscriber| subscriber.strong_count() > 0);
        subscribers.push(Arc::downgrade(&subscription));
        subscription
    }

    /// A database has new transactions, or another health. Called for every commit.
    pub fn database(&self, name: &DatabaseName) {
        self.each(|set| {
            if !set.databases.contains(name) {
                set.databases.insert(name.clone());
            }
        });
    }

    /// Role, epoch or upstream changed.
    pub fn role(&self) {
        self.each(|set| set.role = true);
    }

    /// Something happened once.
    pub fn happened(&self, happening: &Happening) {
        self.each(|set| {
            if set.happenings.len() == HAPPENINGS_MAX {
                set.happenings.remove(0);
            }
            set.happenings.push(happening.clone());
        });
    }

    fn each(&self, change: impl Fn(&mut ChangeSet)) {
        for subscriber in self.subscribers.read().iter().filter_map(Weak::upgrade) {
            subscriber.add(&change);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> DatabaseName {
        DatabaseName::new(name).unwrap()
    }

    #[tokio::test]
    async fn a_slow_subscriber_sees_each_database_once_and_a_quick_one_each_change() {
        let feed = ChangeFeed::default();
        feed.database(&name("before.db"));
        let (slow, quick) = (feed.subscribe(), feed.subscribe());
        for _ in 0..1000 {
            feed.database(&name("a.db"));
            assert_eq!(quick.next().await.databases, BTreeSet::from([name("a.db")]));
        }
        feed.database(&name("b.db"));
        feed.role();
        let seen = slow.next().await;
        assert_eq!(seen.databases, BTreeSet::from([name("a.db"), name("b.db")]));
        assert!(seen.role);
    }

    #[tokio::test]
    async fn waiting_ends_with_a_change_and_a_dropped_subscriber_is_forgotten() {
        let feed = Arc::new(ChangeFeed::default());
        drop(feed.subscribe());
        let subscription = feed.subscribe();
        assert_eq!(feed.subscribers.read().len(), 1);
        let waiting = tokio::spawn(async move { subscription.next().await });
        tokio::task::yield_now().await;
        feed.role();
        assert!(waiting.await.unwrap().role);
    }

    #[tokio::test]
    async fn happenings_keep_their_order_and_are_bounded() {
        let feed = ChangeFeed::default();
        let subscription = feed.subscribe();
        for number in 0..HAPPENINGS_MAX + 2 {
            let reason = number.to_string();
            feed.happened(&Happening::Quarantined { database: name("a.db"), reason });
        }
        let seen = subscription.next().await.happenings;
        assert_eq!(seen.len(), HAPPENINGS_MAX);
        let first = Happening::Quarantined { database: name("a.db"), reason: "2".into() };
        assert_eq!(seen[0], first);
    }
}
