//! The connection to an agent: one for each cluster and process, made when it is first needed and again when it is lost.
//! It is a socket, whose end tells of the agent's, and a page of memory that both have mapped.

use crate::lock::Lock;
use crate::managed::{self, CLUSTERS, PathBuffer};
use crate::{directories, own, process, sys};
use core::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use shim_protocol as protocol;
use shim_protocol::{Hello, MAGIC, Page, VERSION, Welcome};

/// Between looks whether the agent of an idle connection is still there.
const CHECK_NS: u64 = 500_000_000;
/// How long an agent that has accepted may take for its welcome.
pub(super) const WELCOME_MS: u64 = 2000;
/// Between tries to reach an agent that is not there.
pub(super) const RETRY_MS: u64 = 20;

/// One cluster's.
pub(super) struct Connection {
    /// Stays mapped: other threads may be in it when the connection is lost.
    page: AtomicPtr<Page>,
    /// The socket; -1 while there is no agent.
    socket: AtomicI32,
    /// Counts connections; 0 before the first.
    generation: AtomicU32,
    /// When the socket was last looked at.
    checked_ns: AtomicU64,
    /// Since when there is no agent; 0: there is one, or never was.
    lost_ns: AtomicU64,
    changes: Lock<()>,
}

static CONNECTION: [Connection; CLUSTERS] = [const { Connection::new() }; CLUSTERS];

/// That of a cluster.
pub(super) fn of(cluster: usize) -> &'static Connection {
    &CONNECTION[cluster]
}

/// In the child of a fork: the connections are the parent's.
pub fn forked() {
    for connection in &CONNECTION {
        connection.changes.forget_holder();
        let socket = connection.socket.swap(-1, Ordering::Relaxed);
        if socket >= 0 {
            sys::close(socket);
        }
        connection.page.store(core::ptr::null_mut(), Ordering::Relaxed);
        connection.lost_ns.store(0, Ordering::Relaxed);
    }
}

/// Whether a descriptor is a connection.
pub fn owns(fd: i32) -> bool {
    CONNECTION.iter().any(|c| c.socket.load(Ordering::Relaxed) == fd)
}

/// The lowest descriptor of a connection from `first` on.
pub fn next_own(first: u32) -> Option<u32> {
    let own = CONNECTION.iter().map(|c| c.socket.load(Ordering::Relaxed));
    own.filter(|fd| *fd > 2 && *fd as u32 >= first).map(|fd| fd as u32).min()
}

/// The application takes a descriptor for itself.
pub fn give_up(fd: i32) {
    for connection in &CONNECTION {
        if connection.socket.compare_exchange(fd, -1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            connection.lost_ns.store(sys::now_ns().max(1), Ordering::Relaxed);
            // The agent is there, and has nobody to tell of changes until there is another connection.
            connection.checked_ns.store(0, Ordering::Relaxed);
        }
    }
}

/// Whether the agent is there, as far as is known.
pub fn is_up(cluster: usize) -> bool {
    CONNECTION[cluster].is_up()
}

/// Whether there was an agent until a moment ago: what it said last counts for as long as an application would wait.
pub fn was_there(cluster: usize) -> bool {
    let connection = &CONNECTION[cluster];
    connection.page().is_some()
        && connection.lost_for_ns(sys::now_ns()).is_some_and(|lost| lost < process::wait_ms() * 1_000_000)
}

impl Connection {
    const fn new() -> Self {
        Connection {
            page: AtomicPtr::new(core::ptr::null_mut()),
            socket: AtomicI32::new(-1),
            generation: AtomicU32::new(0),
            checked_ns: AtomicU64::new(0),
            lost_ns: AtomicU64::new(0),
            changes: Lock::new(()),
        }
    }

    /// What it shares with the agent; also after it was lost, `None` before the first connection.
    pub(super) fn page(&self) -> Option<&'static Page> {
        // SAFETY: a page stays mapped as long as the process lives.
        unsafe { self.page.load(Ordering::Acquire).as_ref() }
    }

    /// Counts connections: what was said on an older one does not count.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Whether the agent is there, as far as is known.
    pub(super) fn is_up(&self) -> bool {
        self.socket.load(Ordering::Acquire) >= 0
    }

    /// Whether the agent has gone. This asks the system.
    pub(super) fn has_hung_up(&self) -> bool {
        let socket = self.socket.load(Ordering::Acquire);
        socket < 0 || sys::hung_up(socket)
    }

    /// The same of the agent of this generation, which may have a successor.
    pub(super) fn is_gone(&self, generation: u32) -> bool {
        self.has_hung_up() || self.generation() != generation
    }

    /// For how long there has been no agent. `None`: there is one, or never was.
    pub(super) fn lost_for_ns(&self, now_ns: u64) -> Option<u64> {
        let lost = self.lost_ns.load(Ordering::Relaxed);
        (lost != 0).then(|| now_ns.saturating_sub(lost))
    }

    /// Looks from time to time whether the agent is still there, or is there again.
    pub(super) fn check(&self, cluster: usize, now_ns: u64) {
        if now_ns.saturating_sub(self.checked_ns.load(Ordering::Relaxed)) <= CHECK_NS {
            return;
        }
        self.checked_ns.store(now_ns, Ordering::Relaxed);
        let socket = self.socket.load(Ordering::Relaxed);
        if socket >= 0 && sys::hung_up(socket) {
            self.lose(self.generation());
        }
        if !self.is_up() {
            let _ = self.try_connect(cluster);
        }
    }

    /// The agent is gone.
    pub(super) fn lose(&self, generation: u32) {
        let Some(_changes) = self.changes.lock() else { return };
        if self.generation() != generation {
            return;
        }
        let socket = self.socket.swap(-1, Ordering::AcqRel);
        if socket >= 0 {
            sys::close(socket);
            self.lost_ns.store(sys::now_ns().max(1), Ordering::Relaxed);
        }
    }

    /// The page and the generation of a connection that is up, made now where it is not.
    pub(super) fn connect(&self, cluster: usize, deadline_ns: u64) -> Result<(&'static Page, u32), i32> {
        let begun = sys::now_ns();
        loop {
            if self.is_up()
                && let Some(page) = self.page()
            {
                return Ok((page, self.generation()));
            }
            let error = match self.try_connect(cluster) {
                Ok(()) => continue,
                Err(error) => error,
            };
            if error == libc::EPROTO || error == libc::EDEADLK || sys::now_ns() >= deadline_ns {
                // Who did not wait goes on without.
                if error != libc::EPROTO && deadline_ns > begun {
                    let mut path = PathBuffer::<108>::new();
                    managed::runtime_path(cluster, protocol::SOCKET, &mut path);
                    match error {
                        libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS => process::say(&[
                            b"no descriptor or memory is left for a connection to the agent at ",
                            path.bytes(),
                            b": raise the limits of this process",
                        ]),
                        _ => process::say(&[b"no agent answers at ", path.bytes(), b": start litefs"]),
                    }
                }
                return Err(match error {
                    // Applications, and SQLite, would try again at once, for ever.
                    libc::EINTR | libc::EAGAIN => libc::ETIMEDOUT,
                    other => other,
                });
            }
            sys::sleep_ms(RETRY_MS);
        }
    }

    fn try_connect(&self, cluster: usize) -> Result<(), i32> {
        if !process::is_own() {
            return Err(libc::EDEADLK);
        }
        let _changes = self.changes.lock().ok_or(libc::EDEADLK)?;
        if self.is_up() {
            return Ok(());
        }
        let mut path = PathBuffer::<108>::new();
        if !managed::runtime_path(cluster, protocol::SOCKET, &mut path) {
            return Err(libc::ENAMETOOLONG);
        }
        let socket = sys::socket()?;
        let page = handshake(socket, path.bytes());
        match page {
            Ok(page) => {
                self.page.store(page, Ordering::Release);
                self.generation.fetch_add(1, Ordering::Relaxed);
                self.checked_ns.store(sys::coarse_now_ns(), Ordering::Relaxed);
                self.lost_ns.store(0, Ordering::Relaxed);
                directories::give_up(socket);
                own::add(socket);
                self.socket.store(socket, Ordering::Release);
                Ok(())
            }
            Err(error) => {
                sys::close(socket);
                if error == libc::EPROTO {
                    process::say(&[
                        b"the agent at ",
                        path.bytes(),
                        b" speaks another version: update both, start both anew",
                    ]);
                }
                Err(error)
            }
        }
    }
}

fn handshake(socket: i32, path: &[u8]) -> Result<*mut Page, i32> {
    sys::connect(socket, path)?;
    let hello = Hello { magic: MAGIC, version: VERSION };
    // SAFETY: a plain struct of two words.
    let bytes = unsafe { core::slice::from_raw_parts((&raw const hello).cast::<u8>(), size_of::<Hello>()) };
    sys::send(socket, bytes)?;
    if !sys::readable(socket, WELCOME_MS) {
        return Err(libc::ETIMEDOUT);
    }
    let mut answer = [0u8; size_of::<Welcome>()];
    let (count, memory) = sys::receive(socket, &mut answer)?;
    let word = |at: usize| u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
    let fits = count == answer.len() && word(0) == MAGIC && word(4) == VERSION;
    let Some(memory) = memory else {
        return Err(match count {
            0 => libc::ECONNRESET,
            // It was sent one, for which there was no number.
            _ if fits => libc::EMFILE,
            _ => libc::EPROTO,
        });
    };
    let mapped = if fits { sys::map(memory, size_of::<Page>()) } else { Err(libc::EPROTO) };
    sys::close(memory);
    mapped.map(|at| at.cast())
}

/// Rings; wakes an agent that sleeps at least so deeply.
pub(super) fn ring(page: &Page, from: u32) {
    page.doorbell.fetch_add(1, Ordering::SeqCst);
    if page.asleep.load(Ordering::SeqCst) >= from {
        page.asleep.store(protocol::AWAKE, Ordering::SeqCst);
        sys::futex_wake(&page.doorbell, 1);
    }
}
