//! A channel that keeps only the newest value per database: bounded by the number of databases.

use crate::DatabaseName;
use parking_lot::Mutex;
use std::collections::HashMap;
use tokio::sync::Notify;

/// Newest values that were not taken yet.
pub(super) struct Latest<V> {
    values: Mutex<HashMap<DatabaseName, V>>,
    wake: Notify,
}

impl<V> Default for Latest<V> {
    fn default() -> Self {
        Latest { values: Mutex::default(), wake: Notify::new() }
    }
}

impl<V> Latest<V> {
    /// Puts a value, in place of an older one.
    pub(super) fn put(&self, name: DatabaseName, value: V) {
        self.values.lock().insert(name, value);
        self.wake.notify_one();
    }

    /// Ends the next wait also without a value.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until values were put since the last wait.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Takes all values.
    pub(super) fn take(&self) -> HashMap<DatabaseName, V> {
        std::mem::take(&mut *self.values.lock())
    }
}
