//! Threads for what must not hold up the few that serve the mount: syncing files, and work that goes through the mount
//! itself.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// Syncs of different files overlap; the disk does not get faster with more.
const SYNC_THREADS: usize = 8;

type Job = Box<dyn FnOnce() + Send>;

/// The door's helpers. Their queues are unbounded, but hold at most one job per request of an application that waits.
#[derive(Debug, Clone)]
pub struct Workers {
    syncs: Sender<Job>,
    mount: Sender<Job>,
}

impl Workers {
    /// Starts the threads; they end when the last clone is dropped.
    pub fn start() -> io::Result<Self> {
        let (syncs, jobs) = channel();
        let jobs = Arc::new(Mutex::new(jobs));
        for i in 0..SYNC_THREADS {
            let jobs = jobs.clone();
            std::thread::Builder::new().name(format!("door-sync-{i}")).spawn(move || {
                // The lock is held while waiting for a job, not while doing it.
                while let Some(job) = next(&jobs) {
                    job();
                }
            })?;
        }
        let (mount, jobs) = channel::<Job>();
        std::thread::Builder::new().name("door-worker".into()).spawn(move || {
            while let Ok(job) = jobs.recv() {
                job();
            }
        })?;
        Ok(Workers { syncs, mount })
    }

    /// Runs something that waits for the disk.
    pub fn sync(&self, job: impl FnOnce() + Send + 'static) {
        // The threads live as long as this sender.
        let _ = self.syncs.send(Box::new(job));
    }

    /// Runs something that goes through the mount, one after the other.
    pub fn through_mount(&self, job: impl FnOnce() + Send + 'static) {
        let _ = self.mount.send(Box::new(job));
    }
}

fn next(jobs: &Mutex<Receiver<Job>>) -> Option<Job> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}
