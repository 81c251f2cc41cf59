//! One process that has the preload library: a thread waits on its doorbell, looks at the databases that it has changed
//! and answers its requests.

use super::memory::{self, SharedPage};
use super::peer::Peer;
use super::requests::{self, Answer};
use super::special::SpecialFiles;
use crate::DatabaseName;
use crate::database::{Database, Shared};
use parking_lot::Mutex;
use shim_protocol::{self as protocol, Op, Slot};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// While commits come the thread looks by itself so often, and need not be woken for each.
const NAP: Duration = Duration::from_micros(300);
/// How fast commits come is told from stretches of this length.
const STRETCH: Duration = Duration::from_millis(8);
/// They come fast when there were so many in each of two stretches: one may have what was held up before.
const FAST: u32 = 16;
/// While they do it looks so often: what has come together costs little more than one.
const LONG_NAP: Duration = Duration::from_millis(8);
/// So many in a stretch do not wait for the disk.
const VERY_FAST: u32 = 64;
/// So many in each of two stretches are enough where the application syncs its WAL in both: it waits for the disk, and for
/// the CPUs on which it is served. One sync alone may be a checkpoint's.
const SYNCING: u32 = 4;
/// While they come as fast as that, but not [`SYNCING_FAST`], it looks so often.
const SYNCING_NAP: Duration = Duration::from_millis(4);
/// Of such an application so many in a stretch come fast.
const SYNCING_FAST: u32 = 10;
/// While they do it looks so often: each look has two logs synced, and the application waits for the disk meanwhile.
const SYNCING_LONG_NAP: Duration = Duration::from_millis(32);
/// After so many looks in vain it sleeps until it is woken.
const NAPS: u32 = 8;
/// Looks whether it shall end, should a wake-up be lost.
const SLEEP: Duration = Duration::from_secs(1);
/// Writes of a transaction that are kept; more are compared page by page.
const WRITES_MAX: usize = 8 << 20;

/// A connected process.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    special: Arc<SpecialFiles>,
    memory: Arc<SharedPage>,
    peer: Peer,
    /// The socket has ended, or the door is closed.
    ended: AtomicBool,
    attached: Mutex<Vec<Option<Arc<Database>>>>,
}

/// What only the serving thread has.
#[derive(Debug, Default)]
struct Serving {
    writes: HashMap<u32, requests::Writes>,
}

/// How fast the bell rings.
struct Pace {
    since: Instant,
    bell: u32,
    /// Stretches, until now, in which they came fast.
    fast: u32,
    /// How long to sleep while they come as fast as in the last one.
    nap: Option<Duration>,
    /// The application has synced a WAL since then.
    synced: bool,
    /// And in the stretch before.
    synced_before: bool,
}

impl Pace {
    fn new() -> Self {
        Pace { since: Instant::now(), bell: 0, fast: 0, nap: None, synced: false, synced_before: false }
    }

    /// How long to sleep while they come fast.
    fn nap(&mut self, bell: u32, now: Instant) -> Option<Duration> {
        let elapsed = now - self.since;
        if elapsed >= STRETCH {
            let stretches = elapsed.as_secs_f64() / STRETCH.as_secs_f64();
            let rings = f64::from(bell.wrapping_sub(self.bell)) / stretches;
            let synced = std::mem::take(&mut self.synced);
            let syncing = std::mem::replace(&mut self.synced_before, synced) && synced;
            let reached = |count: u32| rings >= f64::from(count);
            // The long pause itself makes them come a little faster.
            let kept = u32::from(self.nap == Some(SYNCING_LONG_NAP));
            self.nap = if syncing && reached(SYNCING_FAST - kept) && !reached(VERY_FAST) {
                Some(SYNCING_LONG_NAP)
            } else if reached(FAST) {
                Some(LONG_NAP)
            } else {
                (syncing && reached(SYNCING)).then_some(SYNCING_NAP)
            };
            self.fast = if self.nap.is_some() { self.fast.saturating_add(1) } else { 0 };
            (self.since, self.bell) = (now, bell);
        }
        self.nap.filter(|_| self.fast > 1)
    }
}

impl Connection {
    /// A process that has said hello. Nothing is served yet.
    pub fn new(shared: Arc<Shared>, special: Arc<SpecialFiles>, memory: Arc<SharedPage>, peer: Peer) -> Self {
        Connection {
            shared,
            special,
            memory,
            peer,
            ended: AtomicBool::new(false),
            attached: Mutex::default(),
        }
    }

    /// The memory it shares with the process.
    pub fn memory(&self) -> &SharedPage {
        &self.memory
    }

    /// Databases that the process has open for writing.
    pub fn databases(&self) -> Vec<Arc<Database>> {
        self.attached.lock().iter().flatten().cloned().collect()
    }

    /// Tells the process which of its databases' commits cannot be taken.
    pub fn refuse_quarantined(&self) {
        for (number, db) in self.attached.lock().iter().enumerate() {
            let Some(db) = db else { continue };
            // Whoever has the state now may be at work for long.
            if let Some(st) = db.try_state() {
                let refused = u32::from(st.quarantine_reason().is_some());
                self.memory.page().refused[number].store(refused, Ordering::Relaxed);
            }
        }
    }

    /// Tells the process how it may write each of its databases.
    pub fn tell_access(&self) {
        for (number, db) in self.attached.lock().iter().enumerate() {
            let access = db.as_ref().map_or(0, |db| access_of(db));
            self.memory.page().access[number].store(access, Ordering::SeqCst);
        }
    }

    /// Makes the serving thread end.
    pub fn end(&self) {
        // A commit that it had begun will not be published.
        self.memory.page().committing.store(0, Ordering::SeqCst);
        self.ended.store(true, Ordering::Release);
        self.memory.page().doorbell.fetch_add(1, Ordering::SeqCst);
        memory::wake(&self.memory.page().doorbell);
    }

    /// Serves until the process or the door ends.
    pub fn serve(self: &Arc<Self>) {
        let page = self.memory.page();
        let mut serving = Serving::default();
        let mut idle = 0;
        let mut pace = Pace::new();
        loop {
            let bell = page.doorbell.load(Ordering::SeqCst);
            let ended = self.ended.load(Ordering::Acquire);
            let served = self.serve_requests(&mut serving);
            let changed = self.look_at_changed(&mut pace);
            if ended {
                break;
            }
            if changed
                && !served
                && let Some(limit) = pace.nap(bell, Instant::now())
            {
                self.nap(limit);
                idle = 0;
                continue;
            }
            if served || changed {
                // Who asks wakes it; only who changes something without asking is looked for.
                idle = if changed { 0 } else { NAPS };
                continue;
            }
            idle += 1;
            let (depth, limit) =
                if idle <= NAPS { (protocol::NAPPING, NAP) } else { (protocol::ASLEEP, SLEEP) };
            page.asleep.store(depth, Ordering::SeqCst);
            memory::wait(&page.doorbell, bell, limit);
            page.asleep.store(protocol::AWAKE, Ordering::SeqCst);
        }
        let attached = std::mem::take(&mut *self.attached.lock());
        for db in attached.into_iter().flatten() {
            requests::let_go(&db);
        }
    }

    /// Sleeps while commits come; a request ends it.
    fn nap(&self, limit: Duration) {
        let page = self.memory.page();
        page.asleep.store(protocol::NAPPING, Ordering::SeqCst);
        let bell = page.doorbell.load(Ordering::SeqCst);
        // A request that was posted before this look is seen here, one after it rings again.
        if page.slots.iter().all(|slot| slot.state.load(Ordering::SeqCst) != protocol::POSTED) {
            memory::wait(&page.doorbell, bell, limit);
        }
        page.asleep.store(protocol::AWAKE, Ordering::SeqCst);
    }

    fn serve_requests(self: &Arc<Self>, serving: &mut Serving) -> bool {
        let mut busy = false;
        for (index, slot) in self.memory.page().slots.iter().enumerate() {
            if slot.state.load(Ordering::Relaxed) != protocol::POSTED
                || !pass(slot, protocol::POSTED, protocol::SERVED)
            {
                continue;
            }
            busy = true;
            if self.commit_elsewhere(serving, index, slot) {
                continue;
            }
            let result = self.request(serving, slot);
            let held = matches!(result, Ok(Answer::WhenAcknowledged(_)));
            let db = if held { self.database(slot).ok() } else { None };
            answer(&self.shared, &self.memory, index, db, result);
        }
        busy
    }

    /// A commit that the primary has to take first: it waits on a thread of its own, and other databases of the process go
    /// on.
    fn commit_elsewhere(&self, serving: &mut Serving, index: usize, slot: &Slot) -> bool {
        let op = Op::from_number(slot.op.load(Ordering::Relaxed));
        let Some(op @ (Op::Commit | Op::WalCommit)) = op else { return false };
        let Some(db) = self.database(slot).ok().filter(|db| db.lender().is_some()) else { return false };
        let number = slot.database.load(Ordering::Relaxed);
        let count = slot.count.load(Ordering::Relaxed) as usize;
        let flags = slot.flags.load(Ordering::Relaxed);
        let data: Vec<u64> = slot.data.iter().take(count).map(|word| word.load(Ordering::Relaxed)).collect();
        let mut writes = serving.writes.remove(&number).unwrap_or_default();
        // However long it takes: the process looks only whether this agent is there.
        pass(slot, protocol::SERVED, protocol::WAITING);
        let (shared, memory, pid) = (self.shared.clone(), self.memory.clone(), self.peer.pid);
        let commit = move || {
            let result = if op == Op::WalCommit {
                requests::wal_commit(&db, &data, pid)
            } else {
                writes.add(data.into_iter(), WRITES_MAX);
                requests::commit(&db, flags, &writes, pid)
            };
            answer(&shared, &memory, index, Some(db), result);
        };
        if let Err(error) = std::thread::Builder::new().name("preload-commit".into()).spawn(commit) {
            tracing::error!(%error, "no thread is left for a commit under a halt lock: it is refused");
            finish(slot, 0, libc::EIO);
        }
        true
    }

    fn request(&self, serving: &mut Serving, slot: &Slot) -> Result<Answer, i32> {
        // What the process says is not trusted to be in range.
        let op = Op::from_number(slot.op.load(Ordering::Relaxed)).ok_or(libc::ENOSYS)?;
        let count = slot.count.load(Ordering::Relaxed) as usize;
        if matches!(op, Op::Attach | Op::Special) {
            let mut bytes: Vec<u8> =
                slot.data.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
            bytes.truncate(count);
            let answer = if op == Op::Attach { self.attach(&bytes) } else { self.special(slot, &bytes) };
            return answer.map(Answer::Now);
        }
        let number = slot.database.load(Ordering::Relaxed);
        let db = self.database(slot)?;
        let data = slot.data.iter().take(count).map(|word| word.load(Ordering::Relaxed));
        let flags = slot.flags.load(Ordering::Relaxed);
        match op {
            Op::Written | Op::Commit => {
                let writes = serving.writes.entry(number).or_default();
                writes.add(data, WRITES_MAX);
                if op == Op::Written {
                    return Ok(Answer::Now(0));
                }
                let writes = serving.writes.remove(&number).unwrap_or_default();
                requests::commit(&db, flags, &writes, self.peer.pid)
            }
            Op::WalEnd => requests::wal_end(&db, flags),
            Op::WalCommit => requests::wal_commit(&db, &data.collect::<Vec<_>>(), self.peer.pid),
            Op::WalSync => {
                let mut st = db.state();
                st.wal_synced = true;
                Ok(Answer::WhenDurable(st.logged_end))
            }
            Op::Drop => requests::will_drop(&db),
            Op::Dropped => {
                requests::note_removed(&db);
                Ok(Answer::Now(0))
            }
            Op::Move => requests::will_move(&db),
            Op::Moved => requests::was_replaced(&db),
            Op::Attach | Op::Special => Err(libc::ENOSYS),
        }
    }

    fn database(&self, slot: &Slot) -> Result<Arc<Database>, i32> {
        let number = slot.database.load(Ordering::Relaxed) as usize;
        self.attached.lock().get(number).cloned().flatten().ok_or(libc::EBADF)
    }

    /// Puts the content of a file that the agent makes up into the slot.
    fn special(&self, slot: &Slot, path: &[u8]) -> Result<u32, i32> {
        let path = std::str::from_utf8(path).map_err(|_| libc::ENOENT)?;
        let content = self.special.content(path).ok_or(libc::ENOENT)?;
        for (word, bytes) in slot.data.iter().zip(content.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(padded), Ordering::Relaxed);
        }
        u32::try_from(content.len()).map_err(|_| libc::EFBIG)
    }

    fn attach(&self, name: &[u8]) -> Result<u32, i32> {
        let name = std::str::from_utf8(name).map_err(|_| libc::EINVAL)?;
        let name = DatabaseName::new(name).map_err(|_| libc::EINVAL)?;
        // Whoever may not write the file gets that answer from the kernel.
        if !self.peer.may_write(&self.shared.dirs.files.join(&name)) {
            return Err(libc::EINVAL);
        }
        let db = self.shared.database_or_new(&name);
        let refused = requests::take_up(&db);
        let mut attached = self.attached.lock();
        let number = match attached.iter().position(Option::is_none) {
            Some(free) => free,
            None if attached.len() < protocol::DATABASES => {
                attached.push(None);
                attached.len() - 1
            }
            None => return Err(libc::ENFILE),
        };
        tracing::debug!(database = %name, pid = self.peer.pid, "opened through the preload library");
        // The number may have been another database's.
        let page = self.memory.page();
        page.captured[number].store(page.written[number].load(Ordering::SeqCst), Ordering::SeqCst);
        page.refused[number].store(u32::from(refused), Ordering::Relaxed);
        // With the list locked, so that no change is missed.
        page.access[number].store(access_of(&db), Ordering::SeqCst);
        attached[number] = Some(db);
        Ok(number as u32)
    }

    /// Writers that wait until the agent is near enough look again.
    fn has_captured(&self, number: usize, written: u64) {
        let page = self.memory.page();
        let before = page.captured[number].swap(written, Ordering::SeqCst);
        // Whoever waits was that far ahead.
        if written.saturating_sub(before) > protocol::AHEAD_BYTES / 2 {
            page.caught_up.fetch_add(1, Ordering::SeqCst);
            memory::wake(&page.caught_up);
        }
    }

    fn look_at_changed(&self, pace: &mut Pace) -> bool {
        let page = self.memory.page();
        let count = self.attached.lock().len();
        let mut busy = false;
        for (number, word) in page.changed.iter().take(count).enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let what = word.swap(0, Ordering::SeqCst);
            let Some(db) = self.attached.lock().get(number).cloned().flatten() else { continue };
            busy = true;
            if what & protocol::SYNCED != 0 {
                self.shared.log.leave_the_disk();
                pace.synced = true;
            }
            if what & protocol::CHANGED != 0 {
                let written = page.written[number].load(Ordering::SeqCst);
                if requests::follow(&db) {
                    self.has_captured(number, written);
                } else if db.state().quarantine_reason().is_some() {
                    page.refused[number].store(1, Ordering::Relaxed);
                }
            }
            if what & protocol::WANTED != 0 {
                self.shared.wanted(&db);
            }
            if what & protocol::CLOSED != 0 {
                self.attached.lock()[number] = None;
                requests::let_go(&db);
            }
        }
        busy
    }
}

/// Answers a request, now or when the log or followers have what it is about.
fn answer(
    shared: &Shared,
    memory: &Arc<SharedPage>,
    index: usize,
    db: Option<Arc<Database>>,
    result: Result<Answer, i32>,
) {
    let slot = &memory.page().slots[index];
    match (result, db) {
        (Ok(Answer::Now(answer)), _) => finish(slot, answer, 0),
        (Err(errno), _) => finish(slot, 0, errno),
        (Ok(Answer::WhenAcknowledged(hold)), Some(db)) => {
            // However long it takes: the process looks only whether this agent is there.
            pass(slot, protocol::SERVED, protocol::WAITING);
            let memory = memory.clone();
            let answer = move |result: Result<(), i32>| {
                finish(&memory.page().slots[index], 0, result.err().unwrap_or(0));
            };
            db.when_acknowledged(hold, |_| Ok(()), answer);
        }
        (Ok(Answer::WhenAcknowledged(_)), None) => finish(slot, 0, libc::EBADF),
        (Ok(Answer::WhenDurable(end)), _) => {
            let memory = memory.clone();
            shared.log.on_durable(
                end,
                Box::new(move |result| {
                    let errno = if result.is_ok() { 0 } else { libc::EIO };
                    finish(&memory.page().slots[index], 0, errno);
                }),
            );
        }
    }
}

/// How a process may write a database, beyond what the role says.
fn access_of(db: &Database) -> u32 {
    match db.lender() {
        // Who is in a transaction may end it; all others wait.
        Some(_) if db.is_loan_ending() => protocol::ACCESS_BORROWED | protocol::ACCESS_LENT,
        Some(_) => protocol::ACCESS_BORROWED,
        None if db.is_lent() => protocol::ACCESS_LENT,
        None if db.shared().borrows_on_demand() => protocol::ACCESS_ON_DEMAND,
        None => 0,
    }
}

/// Takes a slot from one state to another, unless the process has done so.
fn pass(slot: &Slot, from: u32, to: u32) -> bool {
    slot.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

fn finish(slot: &Slot, answer: u32, errno: i32) {
    slot.answer.store(answer, Ordering::Relaxed);
    slot.error.store(errno.unsigned_abs(), Ordering::Relaxed);
    if slot.state.swap(protocol::DONE, Ordering::AcqRel) == protocol::ABANDONED {
        slot.state.store(protocol::FREE, Ordering::Release);
    } else {
        memory::wake(&slot.state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long to sleep after stretches with so many commits each, of an application that syncs its WAL in them or not.
    fn nap_after(stretches: &[(u32, bool)]) -> Option<Duration> {
        let mut pace = Pace::new();
        let (mut nap, mut bell) = (None, 0);
        for (commits, syncs) in stretches {
            bell += commits;
            pace.synced = *syncs;
            nap = pace.nap(bell, pace.since + STRETCH);
        }
        nap
    }

    #[test]
    fn commits_that_come_fast_are_looked_at_together() {
        for (commits, syncs, nap) in [
            (VERY_FAST, false, Some(LONG_NAP)),
            (FAST, false, Some(LONG_NAP)),
            (FAST - 1, false, None),
            (VERY_FAST, true, Some(LONG_NAP)),
            (VERY_FAST - 1, true, Some(SYNCING_LONG_NAP)),
            (SYNCING_FAST, true, Some(SYNCING_LONG_NAP)),
            (SYNCING_FAST - 1, true, Some(SYNCING_NAP)),
            (SYNCING, true, Some(SYNCING_NAP)),
            (SYNCING - 1, true, None),
        ] {
            let stretch = (commits, syncs);
            assert_eq!(nap_after(&[stretch; 3]), nap, "{commits} commits, syncs: {syncs}");
            assert_eq!(nap_after(&[stretch]), None, "one stretch may have what was held up before");
        }
    }

    #[test]
    fn the_sync_of_a_checkpoint_is_not_one_of_each_commit() {
        let (synced, not) = ((FAST, true), (FAST, false));
        assert_eq!(nap_after(&[not, synced, not, not, synced]), Some(LONG_NAP));
        assert_eq!(nap_after(&[not, not, synced, synced]), Some(SYNCING_LONG_NAP));
    }

    #[test]
    fn the_long_pause_stays_a_little_longer() {
        let stretch = |commits| (commits, true);
        let begin = [stretch(SYNCING_FAST); 3];
        for (commits, nap) in [(SYNCING_FAST - 1, SYNCING_LONG_NAP), (SYNCING_FAST - 2, SYNCING_NAP)] {
            assert_eq!(nap_after(&[&begin[..], &[stretch(commits)]].concat()), Some(nap));
        }
    }

    #[test]
    fn a_slow_stretch_ends_it() {
        let (fast, slow) = ((FAST, false), (1, false));
        assert_eq!(nap_after(&[fast, fast]), Some(LONG_NAP));
        assert_eq!(nap_after(&[fast, fast, slow]), None);
        assert_eq!(nap_after(&[fast, fast, slow, fast]), None);
    }
}
