//! Durability: one thread syncs what all databases appended, then tells everyone who waits for it.

use super::commit_log::Shared;
use super::error::LogError;
use super::record::Lsn;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Between two times that callbacks are called which nobody waits for, and between the syncs for them: followers get what
/// was committed this much later at most, and a commit costs a fraction of a sync and of a shipment.
const PACE: Duration = Duration::from_millis(1);
/// The same while commits come fast or applications wait for syncs: followers, whose logs may be on the same disk, then get
/// more at once, and leave the disk and the CPUs to the commits.
const PACE_BUSY: Duration = Duration::from_millis(4);
/// So many callbacks per second and more: commits come fast.
const BUSY_RATE: u128 = 1_500;
/// How fast they come is told from stretches of this length.
const STRETCH: Duration = Duration::from_millis(20);

/// Gets the time each sync took.
pub type OnSync = Box<dyn Fn(Duration) + Send + Sync>;

/// Called once a record is durable, or cannot be any more.
pub type OnDurable = Box<dyn FnOnce(Result<(), LogError>) + Send>;

/// State that the flusher shares with those who wait for it.
pub struct Flush {
    dir: PathBuf,
    state: Mutex<FlushState>,
    /// Wakes the flusher.
    work: Condvar,
    /// Wakes who waits for durability.
    done: Condvar,
    /// Whether the flusher sleeps, so that appending need not wake it each time.
    asleep: AtomicBool,
    durable: AtomicU64,
    /// Told how long each sync took.
    pub(super) on_sync: OnceLock<OnSync>,
    published: watch::Sender<Lsn>,
    /// The first failed fsync. The kernel may have dropped what it could not write, so that a second fsync would
    /// succeed without it: there is no way on.
    failed: OnceLock<Arc<io::Error>>,
}

#[derive(Default)]
struct FlushState {
    /// Somebody waits for everything before this; what comes after may wait for the pace.
    urgent: Lsn,
    callbacks: Vec<(Lsn, OnDurable)>,
    /// Callbacks that nobody waits for, in the order in which they came.
    paced: Vec<(Lsn, OnDurable)>,
    /// How fast they come.
    arrivals: Arrivals,
    /// Since they were last called an application waited for a sync, of the log or of a file of its own.
    waited_for: bool,
    /// They wait until then, also when they are due.
    paced_until: Option<Instant>,
    stop: bool,
    /// No flusher will ever run again.
    stopped: bool,
}

impl Flush {
    /// Everything before `durable` is durable.
    pub fn new(dir: PathBuf, durable: Lsn) -> Self {
        Flush {
            dir,
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            asleep: AtomicBool::new(false),
            durable: AtomicU64::new(durable.0),
            on_sync: OnceLock::new(),
            published: watch::Sender::new(durable),
            failed: OnceLock::new(),
        }
    }

    /// The error that everything answers after a failed fsync.
    pub fn failure(&self) -> Option<LogError> {
        let source = self.failed.get()?.clone();
        Some(LogError::Failed { path: self.dir.clone(), source })
    }

    fn durable(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::Acquire))
    }

    /// Follows the durable LSN.
    pub fn watch(&self) -> watch::Receiver<Lsn> {
        self.published.subscribe()
    }
}

impl Shared {
    /// Everything before this is durable.
    pub(super) fn durable(&self) -> Lsn {
        self.flush.durable()
    }

    /// Wakes the flusher if it sleeps: something was appended.
    pub(super) fn wake_flusher(&self) {
        // Pairs with the store in `flusher_sleep`: either it sees what was appended, or this sees it asleep.
        if self.flush.asleep.load(Ordering::SeqCst) {
            drop(self.flush.state.lock());
            self.flush.work.notify_one();
        }
    }

    /// Waits until everything before `lsn` is durable.
    pub(super) fn wait_durable(&self, lsn: Lsn) -> Result<(), LogError> {
        if self.durable() >= lsn {
            return Ok(());
        }
        assert!(lsn.0 <= self.appended.load(Ordering::SeqCst), "nobody can wait for what was not appended");
        if !self.threaded {
            while self.durable() < lsn {
                self.flush_once()?;
            }
            return Ok(());
        }
        let mut state = self.flush.state.lock();
        state.urgent = state.urgent.max(lsn);
        self.flush.work.notify_one();
        while self.durable() < lsn {
            if let Some(error) = self.flush.failure() {
                return Err(error);
            }
            if state.stopped {
                return Err(LogError::Closed(self.dir.clone()));
            }
            self.flush.done.wait(&mut state);
        }
        Ok(())
    }

    /// Has `callback` called by the flusher once everything before `lsn` is durable; `urgent`: as soon as the disk can.
    pub(super) fn on_durable(&self, lsn: Lsn, callback: OnDurable, urgent: bool) {
        let mut state = self.flush.state.lock();
        if !state.stopped {
            if urgent {
                state.callbacks.push((lsn, callback));
                state.urgent = state.urgent.max(lsn);
            } else {
                state.paced.push((lsn, callback));
            }
            drop(state);
            if urgent || self.durable() >= lsn {
                self.flush.work.notify_one();
            } else {
                self.wake_flusher();
            }
            return;
        }
        drop(state);
        let durable = self.durable() >= lsn;
        callback(if durable { Ok(()) } else { Err(LogError::Closed(self.dir.clone())) });
    }

    /// Somebody will soon wait for everything before `lsn`: the sync begins at once.
    pub(super) fn hasten(&self, lsn: Lsn) {
        let mut state = self.flush.state.lock();
        if state.urgent < lsn {
            state.urgent = lsn;
            drop(state);
            self.flush.work.notify_one();
        }
    }

    /// An application waits for the disk.
    pub(super) fn leave_the_disk(&self) {
        self.flush.state.lock().waited_for = true;
    }

    /// Syncs what was appended so far and publishes it. After an error the log takes nothing more.
    pub(super) fn flush_once(&self) -> Result<(), LogError> {
        if let Some(error) = self.flush.failure() {
            return Err(error);
        }
        let work = self.writer.lock().take_work();
        let begun = Instant::now();
        for file in &work.files {
            let synced = file.file.sync_data();
            let synced =
                synced.and_then(|()| if file.name_too { self.storage.sync_dir(&self.dir) } else { Ok(()) });
            if let Err(e) = synced {
                tracing::error!(segment = %self.segments.path(file.first).display(), error = %e, "fsync failed");
                return Err(self.fail(e));
            }
        }
        if let (Some(told), false) = (self.flush.on_sync.get(), work.files.is_empty()) {
            told(begun.elapsed());
        }
        self.publish_durable(work.target, begun);
        if !work.to_seal.is_empty() {
            self.keeper.seal(work.to_seal);
        }
        Ok(())
    }

    fn publish_durable(&self, target: Lsn, begun: Instant) {
        let mut state = self.flush.state.lock();
        self.flush.durable.store(target.0, Ordering::Release);
        let ready = take_ready(&mut state.callbacks, |lsn| lsn <= target);
        state.waited_for |= !ready.is_empty();
        let paced = state.take_paced(begun, false, |lsn| lsn <= target);
        drop(state);
        // First those whom an application waits for.
        ready.into_iter().for_each(|callback| callback(Ok(())));
        self.flush.done.notify_all();
        self.flush.published.send_if_modified(|published| std::mem::replace(published, target) != target);
        paced.into_iter().for_each(|callback| callback(Ok(())));
    }

    /// Stops the log for good after a failed fsync; everyone who waits is told. Returns the error to answer.
    pub(super) fn fail(&self, error: io::Error) -> LogError {
        let state = self.flush.state.lock();
        let source = self.flush.failed.get_or_init(|| Arc::new(error)).clone();
        drop(state);
        self.flush.done.notify_all();
        self.flush.work.notify_one();
        LogError::Failed { path: self.dir.clone(), source }
    }

    /// Body of the flusher's thread.
    pub(super) fn run_flusher(&self) {
        let guard = FailOnPanic(self);
        let mut next_sync = Instant::now();
        loop {
            let mut state = self.flush.state.lock();
            let stop = self.flusher_sleep(&mut state);
            while !state.stop
                && self.flush.failed.get().is_none()
                && state.urgent <= self.durable()
                // Somebody asked for what had become durable just before.
                && !state.callbacks.iter().any(|(lsn, _)| *lsn <= self.durable())
            {
                // A sync that nobody waits for begins when its callbacks may be called.
                let until = state.paced_until.map_or(next_sync, |until| until.max(next_sync));
                if self.flush.work.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
            let failure = self.flush.failure();
            let durable = self.durable();
            let due = |lsn: Lsn| failure.is_some() || lsn <= durable;
            let mut ready = take_ready(&mut state.callbacks, due);
            let at_once = failure.is_some() || state.stop;
            ready.extend(state.take_paced(Instant::now(), at_once, due));
            drop(state);
            for callback in ready {
                callback(failure.clone().map_or(Ok(()), Err));
            }
            if failure.is_none() && self.appended.load(Ordering::SeqCst) > durable.0 {
                next_sync = Instant::now() + PACE;
                // A failure is told to everyone by the next round.
                let _ = self.flush_once();
            } else if stop {
                break;
            }
        }
        std::mem::forget(guard);
        self.stop_waiting();
    }

    /// Sleeps until there is something to do. `true`: the log is being closed.
    fn flusher_sleep(&self, state: &mut MutexGuard<'_, FlushState>) -> bool {
        let mut mark_due = self.options.idle_mark;
        self.flush.asleep.store(true, Ordering::SeqCst);
        loop {
            let failed = self.flush.failed.get().is_some();
            let durable = self.durable();
            let pending = !failed && self.appended.load(Ordering::SeqCst) > durable.0;
            let due =
                |callbacks: &[(Lsn, OnDurable)]| callbacks.iter().any(|(lsn, _)| failed || *lsn <= durable);
            let paced = due(&state.paced);
            let wait = state.paced_until.filter(|until| paced && !failed && *until > Instant::now());
            if pending || due(&state.callbacks) || state.stop || paced && wait.is_none() {
                break;
            }
            if let Some(until) = wait {
                self.flush.work.wait_until(state, until);
                continue;
            }
            match mark_due {
                Some(after) if self.flush.work.wait_for(state, after).timed_out() => {
                    mark_due = None;
                    MutexGuard::unlocked(state, || self.append_mark());
                }
                Some(_) => {}
                None => self.flush.work.wait(state),
            }
        }
        self.flush.asleep.store(false, Ordering::SeqCst);
        state.stop
    }

    /// Callbacks that nobody waits for come at `until`, whatever their number.
    #[cfg(test)]
    pub(super) fn pace_until(&self, until: Instant) {
        self.flush.state.lock().paced_until = Some(until);
    }

    /// Asks the flusher to end once everything is durable.
    pub(super) fn stop_flusher(&self) {
        self.flush.state.lock().stop = true;
        self.flush.work.notify_one();
    }

    /// Tells everyone who still waits that nothing will come any more.
    pub(super) fn stop_waiting(&self) {
        let mut state = self.flush.state.lock();
        state.stopped = true;
        let mut left = std::mem::take(&mut state.callbacks);
        left.append(&mut state.paced);
        drop(state);
        self.flush.done.notify_all();
        for (lsn, callback) in left {
            let error = self.flush.failure().unwrap_or_else(|| LogError::Closed(self.dir.clone()));
            callback(if lsn <= self.durable() { Ok(()) } else { Err(error) });
        }
    }
}

impl FlushState {
    /// Takes the callbacks that are due and that nobody waits for, if it is time for them or they go `at_once`; the next
    /// ones then wait. `begun`: when the sync began that made them durable.
    fn take_paced(&mut self, begun: Instant, at_once: bool, due: impl Fn(Lsn) -> bool) -> Vec<OnDurable> {
        if !at_once && self.paced_until.is_some_and(|until| until > begun) {
            return Vec::new();
        }
        let ready = take_ready(&mut self.paced, due);
        if !ready.is_empty() {
            let fast = self.arrivals.are_fast(ready.len(), begun);
            let busy = std::mem::take(&mut self.waited_for) || fast;
            self.paced_until = Some(begun + if busy { PACE_BUSY } else { PACE });
        }
        ready
    }
}

/// How fast callbacks come that nobody waits for.
#[derive(Default)]
struct Arrivals {
    /// When the running stretch began.
    since: Option<Instant>,
    /// How many have come in it.
    count: usize,
    /// Stretches before it, one after the other, in which they came fast.
    fast: u32,
}

impl Arrivals {
    /// Whether they come fast, now that `count` more have come. One stretch alone may have what the disk held up before.
    fn are_fast(&mut self, count: usize, now: Instant) -> bool {
        self.count += count;
        let elapsed = now.saturating_duration_since(*self.since.get_or_insert(now));
        if elapsed >= STRETCH {
            let fast = self.count as u128 * 1_000_000_000 >= BUSY_RATE * elapsed.as_nanos();
            self.fast = if fast { self.fast.saturating_add(1) } else { 0 };
            (self.since, self.count) = (Some(now), 0);
        }
        self.fast > 1
    }
}

/// Takes the callbacks that are due, in the order of their LSNs.
fn take_ready(callbacks: &mut Vec<(Lsn, OnDurable)>, due: impl Fn(Lsn) -> bool) -> Vec<OnDurable> {
    let mut ready: Vec<_> = callbacks.extract_if(.., |(lsn, _)| due(*lsn)).collect();
    ready.sort_by_key(|(lsn, _)| *lsn);
    ready.into_iter().map(|(_, callback)| callback).collect()
}

/// A callback that panics must not leave everyone waiting.
struct FailOnPanic<'a>(&'a Shared);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        self.0.fail(io::Error::other("the flusher of the commit log panicked"));
        self.0.stop_waiting();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn followers_wait_longer_while_applications_wait_for_syncs_or_commits_come_fast() {
        let mut state = FlushState::default();
        let mut pause_after = |begun: Instant, count: usize, waited_for: bool| {
            state.paced.extend((0..count).map(|_| (Lsn(0), Box::new(|_| ()) as OnDurable)));
            state.waited_for |= waited_for;
            assert_eq!(state.take_paced(begun, false, |_| true).len(), count);
            state.paced_until.map(|until| until - begun)
        };
        let begun = Instant::now();
        let after = |seconds: u64| begun + Duration::from_secs(seconds);
        assert_eq!(pause_after(begun, 1, false), Some(PACE));
        assert_eq!(pause_after(after(1), 1, true), Some(PACE_BUSY));
        assert_eq!(pause_after(after(2), 1, false), Some(PACE));
        assert_eq!(pause_after(after(3), BUSY_RATE as usize, false), Some(PACE));
        assert_eq!(pause_after(after(4), BUSY_RATE as usize, false), Some(PACE_BUSY));
    }

    #[test]
    fn commits_come_fast_when_two_stretches_say_so() {
        let mut arrivals = Arrivals::default();
        let many = (BUSY_RATE * STRETCH.as_millis() / 1000) as usize;
        let begun = Instant::now();
        assert!(!arrivals.are_fast(many, begun));
        for (stretch, count, fast) in [
            // What a slow sync held up comes at once.
            (1, 0, false),
            (2, 0, false),
            (3, many, false),
            (4, many, true),
            (5, many, true),
            (6, many - 1, false),
        ] {
            assert_eq!(arrivals.are_fast(count, begun + stretch * STRETCH), fast, "stretch {stretch}");
        }
    }
}
