//! The connection to an agent: one for each cluster and process, made when it is first needed and again when it is lost.

use crate::lock::Lock;
use crate::managed::{self, CLUSTERS, PathBuffer};
use crate::sys;
use crate::table::{self, Database};
use core::ffi::CStr;
use core::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use shim_protocol as protocol;
use shim_protocol::{Hello, MAGIC, Op, Page, VERSION, Welcome};

/// Turns of waiting for an answer before the thread sleeps.
const SPINS: u32 = 400;
/// How long the thread sleeps before it looks whether the agent is still there.
const LOOK_MS: u64 = 100;
/// Between looks whether the agent of an idle connection is still there.
const CHECK_NS: u64 = 500_000_000;
/// How long an agent that has accepted may take for its welcome.
const WELCOME_MS: u64 = 2000;
/// Between tries to reach an agent that is not there.
const RETRY_MS: u64 = 20;
/// Words of a file that the agent makes up: the name of a host.
const SPECIAL_WORDS: usize = 40;
/// Number of a file that no database can have the name of.
const PLAIN: u32 = u32::MAX;

/// One cluster's.
struct Connection {
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
/// Lowest number that a descriptor of this library ever had: asked at every close.
static LOWEST_OWN: AtomicI32 = AtomicI32::new(i32::MAX);
static PROCESS: AtomicI32 = AtomicI32::new(0);
/// Standard error when the process began: device and inode. Another file may get its number later.
static STDERR: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
static WAIT_MS: AtomicU64 = AtomicU64::new(protocol::WAIT_MS);

/// Remembers what cannot be asked later.
pub fn remember_process() {
    PROCESS.store(sys::getpid(), Ordering::Relaxed);
    if let Ok(stat) = sys::fstat(2) {
        STDERR[0].store(stat.st_dev, Ordering::Relaxed);
        STDERR[1].store(stat.st_ino, Ordering::Relaxed);
    }
    // SAFETY: the name ends with a zero; the value is read at once.
    let wait = unsafe { libc::getenv(c"LITEFS_WAIT_MS".as_ptr()) };
    if !wait.is_null() {
        // SAFETY: a string of the environment.
        let digits = unsafe { CStr::from_ptr(wait) }.to_bytes();
        if let Some(ms) = core::str::from_utf8(digits).ok().and_then(|d| d.parse().ok()) {
            WAIT_MS.store(ms, Ordering::Relaxed);
        }
    }
}

/// How long an application waits for an agent.
pub fn wait_ms() -> u64 {
    WAIT_MS.load(Ordering::Relaxed)
}

/// Whether this is not the child of a vfork, which has its parent's memory.
pub fn is_own_process() -> bool {
    sys::getpid() == PROCESS.load(Ordering::Relaxed)
}

/// Runs in the child of a fork.
pub extern "C" fn forked() {
    PROCESS.store(sys::getpid(), Ordering::Relaxed);
    managed::forked();
    for place in &LOCKING {
        let socket = place.swap(-1, Ordering::Relaxed);
        if socket >= 0 {
            sys::close(socket);
        }
    }
    for connection in &CONNECTION {
        connection.changes.forget_holder();
        let socket = connection.socket.swap(-1, Ordering::Relaxed);
        if socket >= 0 {
            sys::close(socket);
        }
        connection.page.store(core::ptr::null_mut(), Ordering::Relaxed);
        connection.lost_ns.store(0, Ordering::Relaxed);
    }
    table::forked();
}

/// Whether a descriptor is this library's.
pub fn owns(fd: i32) -> bool {
    fd >= LOWEST_OWN.load(Ordering::Relaxed)
        && fd > 2
        && CONNECTION.iter().any(|c| c.socket.load(Ordering::Relaxed) == fd)
}

/// This library's descriptors from `first` on, the lowest.
pub fn next_own(first: u32) -> Option<u32> {
    let own = CONNECTION.iter().map(|c| c.socket.load(Ordering::Relaxed));
    own.filter(|fd| *fd > 2 && *fd as u32 >= first).map(|fd| fd as u32).min()
}

/// Says something on standard error, if that is still what it was.
pub fn say(parts: &[&[u8]]) {
    let same = sys::fstat(2).is_ok_and(|stat| {
        stat.st_dev == STDERR[0].load(Ordering::Relaxed) && stat.st_ino == STDERR[1].load(Ordering::Relaxed)
    });
    if !same || table::file(2).is_some() {
        return;
    }
    let mut line = PathBuffer::<512>::new();
    line.push(b"litefs: ");
    for part in parts {
        line.push(part);
    }
    line.push(b"\n");
    let _ = sys::write(2, line.bytes());
}

/// Why a request has no answer.
enum Lost {
    /// The agent has gone.
    HungUp,
    /// It did not answer in time.
    TimedOut,
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

    fn page(&self) -> Option<&'static Page> {
        // SAFETY: a page stays mapped as long as the process lives.
        unsafe { self.page.load(Ordering::Acquire).as_ref() }
    }

    fn is_up(&self) -> bool {
        self.socket.load(Ordering::Acquire) >= 0
    }

    /// The agent is gone.
    fn lose(&self, generation: u32) {
        let Some(_changes) = self.changes.lock() else { return };
        if self.generation.load(Ordering::Relaxed) != generation {
            return;
        }
        let socket = self.socket.swap(-1, Ordering::AcqRel);
        if socket >= 0 {
            sys::close(socket);
            self.lost_ns.store(sys::now_ns().max(1), Ordering::Relaxed);
        }
    }

    /// The page and the generation of a connection that is up, made now where it is not.
    fn connect(&self, cluster: usize, deadline_ns: u64) -> Result<(&'static Page, u32), i32> {
        let begun = sys::now_ns();
        loop {
            if self.is_up()
                && let Some(page) = self.page()
            {
                return Ok((page, self.generation.load(Ordering::Relaxed)));
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
                        libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS => say(&[
                            b"no descriptor or memory is left for a connection to the agent at ",
                            path.bytes(),
                            b": raise the limits of this process",
                        ]),
                        _ => say(&[b"no agent answers at ", path.bytes(), b": start litefs"]),
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
        if !is_own_process() {
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
                LOWEST_OWN.fetch_min(socket, Ordering::Relaxed);
                self.socket.store(socket, Ordering::Release);
                Ok(())
            }
            Err(error) => {
                sys::close(socket);
                if error == libc::EPROTO {
                    say(&[
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

/// Whether applications may write now. Looks from time to time whether the agent is still there; without one, what it
/// said last counts for as long as an application would wait for it.
pub fn may_write(cluster: usize) -> bool {
    let connection = &CONNECTION[cluster];
    let now = sys::coarse_now_ns();
    if now.saturating_sub(connection.checked_ns.load(Ordering::Relaxed)) > CHECK_NS {
        connection.checked_ns.store(now, Ordering::Relaxed);
        let socket = connection.socket.load(Ordering::Relaxed);
        if socket >= 0 && sys::hung_up(socket) {
            connection.lose(connection.generation.load(Ordering::Relaxed));
        }
        if !connection.is_up() {
            let _ = connection.try_connect(cluster);
        }
    }
    let Some(page) = connection.page() else {
        return connection.connect(cluster, now).is_ok() && may_write(cluster);
    };
    let lost = connection.lost_ns.load(Ordering::Relaxed);
    if lost != 0 && now.saturating_sub(lost) > wait_ms() * 1_000_000 {
        return false;
    }
    if page.mode.load(Ordering::SeqCst) & protocol::MODE_WRITABLE == 0 {
        return false;
    }
    let until = page.write_until_ns.load(Ordering::Relaxed);
    until == u64::MAX || sys::lease_now_ns() < until
}

/// `ACCESS_*` bits of a database.
fn access(database: &Database) -> u32 {
    number_on_page(database).map_or(0, |(page, number)| page.access[number as usize].load(Ordering::SeqCst))
}

/// Whether applications may write this database now: the host's, or another one's under a halt lock.
pub fn may_write_to(database: &Database) -> bool {
    may_write(database.cluster()) || access(database) & protocol::ACCESS_BORROWED != 0
}

/// What a writer that wants to begin is told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It may.
    Now,
    /// To wait, until the halt lock of another host has ended or this one has got it.
    Later,
    /// This host is no primary.
    Never,
}

/// Whether a writer may begin. That one waits is told to the agent, which may get it the database; nothing waits here.
pub fn turn(database: &Database) -> Turn {
    // Looks whether the agent is still there: what a dead one has said would count for ever.
    let may_write = may_write_to(database);
    let access = access(database);
    if access & protocol::ACCESS_LENT != 0 {
        Turn::Later
    } else if may_write {
        Turn::Now
    } else if access & protocol::ACCESS_ON_DEMAND != 0 && want(database) {
        Turn::Later
    } else {
        Turn::Never
    }
}

/// Tells the agent that a writer waits for this database.
fn want(database: &Database) -> bool {
    let Some((page, number)) = number_on_page(database) else { return false };
    page.changed[number as usize].fetch_or(protocol::WANTED, Ordering::SeqCst);
    ring(page, protocol::NAPPING);
    true
}

/// Whether the agent is there, as far as is known.
pub fn is_up(cluster: usize) -> bool {
    CONNECTION[cluster].is_up()
}

/// Whether there was an agent until a moment ago: what it said last counts for as long as an application would wait.
pub fn was_there(cluster: usize) -> bool {
    let connection = &CONNECTION[cluster];
    let lost = connection.lost_ns.load(Ordering::Relaxed);
    connection.page().is_some() && lost != 0 && sys::now_ns().saturating_sub(lost) < wait_ms() * 1_000_000
}

/// The application takes a descriptor of this library for itself.
pub fn give_up(fd: i32) {
    for connection in &CONNECTION {
        if connection.socket.compare_exchange(fd, -1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            connection.lost_ns.store(sys::now_ns().max(1), Ordering::Relaxed);
            // The agent is there, and has nobody to tell of changes until there is another connection.
            connection.checked_ns.store(0, Ordering::Relaxed);
        }
    }
}

/// Whether commits in WAL mode are held.
pub fn holds(database: &Database) -> bool {
    access(database) & protocol::ACCESS_BORROWED != 0 || holds_all(database.cluster())
}

fn holds_all(cluster: usize) -> bool {
    CONNECTION[cluster]
        .page()
        .is_some_and(|page| page.mode.load(Ordering::Acquire) & protocol::MODE_HELD != 0)
}

/// Makes sure that an agent knows the database, waiting for one if need be. `Ok(false)`: no database can have its name.
pub fn attach(database: &Database, wait_ms: u64) -> Result<bool, i32> {
    let connection = &CONNECTION[database.cluster()];
    if connection.is_up()
        && let attached = database.attached.load(Ordering::Acquire)
        && (attached >> 32) as u32 == connection.generation.load(Ordering::Relaxed)
    {
        return Ok(attached as u32 != PLAIN);
    }
    let deadline = sys::now_ns() + wait_ms * 1_000_000;
    let mut again = true;
    loop {
        let (page, generation) = connection.connect(database.cluster(), deadline)?;
        // Who is there gets the usual time to answer.
        let answered = sys::now_ns() + self::wait_ms() * 1_000_000;
        match attach_on(page, generation, database, answered) {
            Ok(number) => return Ok(number != PLAIN),
            Err(Some(error)) => return Err(error),
            Err(None) => connection.lose(generation),
        }
        // That connection may have been its predecessor's.
        if sys::now_ns() >= deadline && !core::mem::replace(&mut again, false) {
            return Err(libc::ETIMEDOUT);
        }
    }
}

/// The database's number on a connection. `Err(None)`: the connection is lost.
fn attach_on(
    page: &Page,
    generation: u32,
    database: &Database,
    deadline_ns: u64,
) -> Result<u32, Option<i32>> {
    let attached = database.attached.load(Ordering::Acquire);
    if (attached >> 32) as u32 == generation && generation != 0 {
        return Ok(attached as u32);
    }
    let (words, len) = {
        let name = database.name().ok_or(Some(libc::EDEADLK))?;
        (words_of(name.bytes()), name.bytes().len())
    };
    let question = Question { op: Op::Attach, database: 0, flags: 0, count: len as u32 };
    let words = &words[..len.div_ceil(8)];
    let number = match post(page, generation, database.cluster(), &question, words, deadline_ns, &mut []) {
        Ok(Ok(number)) => number,
        Ok(Err(libc::EINVAL)) => PLAIN,
        Ok(Err(error)) => return Err(Some(error)),
        Err(Lost::HungUp) => return Err(None),
        Err(Lost::TimedOut) => return Err(Some(libc::ETIMEDOUT)),
    };
    database.attached.store(u64::from(generation) << 32 | u64::from(number), Ordering::Release);
    Ok(number)
}

type NameWords = [u64; managed::NAME_MAX / 8 + 1];

fn words_of(name: &[u8]) -> NameWords {
    let mut words = [0u64; managed::NAME_MAX / 8 + 1];
    for (word, bytes) in words.iter_mut().zip(name.chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(padded);
    }
    words
}

/// Content of a file that the agent makes up, and its length in bytes.
pub fn special(cluster: usize, name: &[u8]) -> Result<([u64; SPECIAL_WORDS], usize), i32> {
    let connection = &CONNECTION[cluster];
    let deadline = sys::now_ns() + wait_ms() * 1_000_000;
    let words = words_of(name);
    let question = Question { op: Op::Special, database: 0, flags: 0, count: name.len() as u32 };
    let mut content = [0; SPECIAL_WORDS];
    loop {
        let (page, generation) = connection.connect(cluster, deadline)?;
        let words = &words[..name.len().div_ceil(8)];
        match post(page, generation, cluster, &question, words, deadline, &mut content) {
            Ok(answer) => return answer.map(|len| (content, (len as usize).min(SPECIAL_WORDS * 8))),
            Err(Lost::HungUp) => connection.lose(generation),
            Err(Lost::TimedOut) => return Err(libc::ETIMEDOUT),
        }
    }
}

/// The agent's socket, and the first message of a connection that asks for a file; `None`: a name is too long.
fn about_file(
    cluster: usize,
    magic: u32,
    name: &[u8],
) -> Option<(PathBuffer<108>, PathBuffer<{ managed::NAME_MAX + 4 }>)> {
    let (mut path, mut question) = (PathBuffer::new(), PathBuffer::new());
    let fits = managed::runtime_path(cluster, protocol::SOCKET, &mut path)
        && question.push(&magic.to_ne_bytes())
        && question.push(name);
    fits.then_some((path, question))
}

/// A received descriptor, as the application asked for it.
fn handed_over(fd: i32, close_on_exec: bool) -> Result<i32, i32> {
    if close_on_exec { Ok(fd) } else { sys::keep_on_exec(fd).map(|()| fd) }
}

/// Connections on which threads wait for halt locks: a child of a fork has to close them.
static LOCKING: [AtomicI32; 32] = [const { AtomicI32::new(-1) }; 32];

/// `NAME-lock`, once the agent has the halt lock, which ends when all copies of the descriptor are closed. `ENOENT`: there is no
/// such lock. `EINTR`: a signal handler has run.
pub fn lock_file(cluster: usize, name: &[u8], close_on_exec: bool) -> Result<i32, i32> {
    let (path, question) = about_file(cluster, protocol::LOCK_FILE_MAGIC, name).ok_or(libc::ENAMETOOLONG)?;
    let mut deadline = sys::now_ns() + wait_ms() * 1_000_000;
    loop {
        let socket = sys::socket()?;
        let place = LOCKING
            .iter()
            .find(|place| place.compare_exchange(-1, socket, Ordering::AcqRel, Ordering::Relaxed).is_ok());
        let answer = ask_for_lock(socket, path.bytes(), question.bytes(), &mut deadline);
        if let Some(place) = place {
            place.store(-1, Ordering::Release);
        }
        sys::close(socket);
        match answer {
            Ok(fd) => return handed_over(fd, close_on_exec),
            Err(Some(error)) => return Err(error),
            Err(None) if sys::now_ns() >= deadline => {
                say(&[b"no agent answers at ", path.bytes(), b": start litefs"]);
                return Err(libc::EIO);
            }
            // Its successor is asked anew.
            Err(None) => sys::sleep_ms(RETRY_MS),
        }
    }
}

/// `Err(None)`: the agent is not there.
fn ask_for_lock(socket: i32, path: &[u8], question: &[u8], deadline: &mut u64) -> Result<i32, Option<i32>> {
    sys::connect(socket, path).and_then(|()| sys::send(socket, question)).map_err(|_| None)?;
    // However long it takes: it is noticed when the agent goes, and signals interrupt it.
    sys::make_waiting(socket).map_err(Some)?;
    let opened = receive_opened(socket, protocol::LOCK_FILE_MAGIC);
    *deadline = sys::now_ns() + wait_ms() * 1_000_000;
    opened
}

/// The descriptor that the agent sends. `Err(None)`: the agent has gone.
fn receive_opened(socket: i32, magic: u32) -> Result<i32, Option<i32>> {
    let mut answer = [0u8; size_of::<protocol::Opened>()];
    let received = sys::receive(socket, &mut answer);
    let (count, file) = received.map_err(|error| (error == libc::EINTR).then_some(error))?;
    let word = |at: usize| u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
    match file {
        _ if count == 0 => Err(None),
        Some(fd) if count == answer.len() && word(0) == magic && word(4) == 0 => Ok(fd),
        Some(fd) => {
            sys::close(fd);
            Err(Some(libc::EPROTO))
        }
        None if count < answer.len() => Err(Some(libc::EPROTO)),
        // An agent from before there was this question.
        None if word(0) != magic => Err(Some(libc::ENOENT)),
        // It was sent one, for which there was no number.
        None if word(4) == 0 => Err(Some(libc::EMFILE)),
        None => Err(Some(word(4) as i32)),
    }
}

/// A file of a database, opened for writing by the agent; none is waited for. `EACCES`: it may not be written, or nobody helps.
pub fn open_for_writing(cluster: usize, name: &[u8], close_on_exec: bool) -> Result<i32, i32> {
    let (path, question) = about_file(cluster, protocol::OPEN_MAGIC, name).ok_or(libc::EACCES)?;
    let socket = sys::socket()?;
    let asked = sys::connect(socket, path.bytes()).and_then(|()| sys::send(socket, question.bytes()));
    let opened = match asked {
        Ok(_) if sys::readable(socket, WELCOME_MS) => receive_opened(socket, protocol::OPEN_MAGIC),
        _ => Err(None),
    };
    sys::close(socket);
    match opened {
        Ok(fd) => handed_over(fd, close_on_exec),
        Err(Some(error @ (libc::EMFILE | libc::EINTR))) => Err(error),
        Err(_) => Err(libc::EACCES),
    }
}

/// Asks the agent and waits for its answer, if need be of its successor. A file that is no database is granted
/// everything.
pub fn ask(database: &Database, op: Op, flags: u32, data: &[u64], wait_ms: u64) -> Result<(), i32> {
    let cluster = database.cluster();
    let connection = &CONNECTION[cluster];
    let deadline = sys::now_ns() + wait_ms * 1_000_000;
    loop {
        let (page, generation) = connection.connect(cluster, deadline)?;
        let number = match attach_on(page, generation, database, deadline) {
            Ok(PLAIN) => return Ok(()),
            Ok(number) => number,
            Err(Some(error)) => return Err(error),
            Err(None) => {
                connection.lose(generation);
                continue;
            }
        };
        match ask_on(page, generation, database, number, op, flags, data, deadline) {
            Ok(answer) => return answer,
            Err(Lost::HungUp) => connection.lose(generation),
            Err(Lost::TimedOut) => {
                // A WAL that does not end goes on: nothing is refused.
                if op != Op::WalEnd {
                    say(&[b"the agent did not answer in time: the transaction is refused"]);
                }
                return Err(libc::ETIMEDOUT);
            }
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of one question")]
fn ask_on(
    page: &Page,
    generation: u32,
    database: &Database,
    number: u32,
    op: Op,
    flags: u32,
    data: &[u64],
    deadline_ns: u64,
) -> Result<Result<(), i32>, Lost> {
    let cluster = database.cluster();
    let whole = data.len().saturating_sub(1) / protocol::DATA_WORDS * protocol::DATA_WORDS;
    for part in data[..whole].chunks(protocol::DATA_WORDS) {
        let question = Question { op: Op::Written, database: number, flags: 0, count: part.len() as u32 };
        if let Err(error) = post(page, generation, cluster, &question, part, deadline_ns, &mut [])? {
            return Ok(Err(error));
        }
    }
    let last = &data[whole..];
    let question = Question { op, database: number, flags, count: last.len() as u32 };
    post(page, generation, cluster, &question, last, deadline_ns, &mut []).map(|answer| answer.map(|_| ()))
}

struct Question {
    op: Op,
    database: u32,
    flags: u32,
    count: u32,
}

/// Posts a question and waits for its answer; `content` is what the answer has in its data.
fn post(
    page: &Page,
    generation: u32,
    cluster: usize,
    question: &Question,
    data: &[u64],
    deadline_ns: u64,
    content: &mut [u64],
) -> Result<Result<u32, i32>, Lost> {
    let connection = &CONNECTION[cluster];
    let gone = || {
        let socket = connection.socket.load(Ordering::Acquire);
        connection.generation.load(Ordering::Relaxed) != generation || socket < 0 || sys::hung_up(socket)
    };
    let slot = loop {
        let free = page.slots.iter().find(|slot| {
            slot.state
                .compare_exchange(protocol::FREE, protocol::TAKEN, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        });
        if let Some(slot) = free {
            break slot;
        }
        if gone() {
            return Err(Lost::HungUp);
        }
        if sys::now_ns() >= deadline_ns {
            return Err(Lost::TimedOut);
        }
        sys::sleep_ms(1);
    };
    slot.op.store(question.op as u32, Ordering::Relaxed);
    slot.database.store(question.database, Ordering::Relaxed);
    slot.flags.store(question.flags, Ordering::Relaxed);
    slot.count.store(question.count, Ordering::Relaxed);
    for (to, from) in slot.data.iter().zip(data) {
        to.store(*from, Ordering::Relaxed);
    }
    slot.state.store(protocol::POSTED, Ordering::SeqCst);
    ring(page, protocol::NAPPING);

    let mut spins = 0;
    loop {
        let state = slot.state.load(Ordering::Acquire);
        if state == protocol::DONE {
            break;
        }
        spins += 1;
        if spins < SPINS {
            core::hint::spin_loop();
            continue;
        }
        sys::futex_wait(&slot.state, state, LOOK_MS);
        let state = slot.state.load(Ordering::Acquire);
        if state == protocol::DONE {
            break;
        }
        if gone() {
            // What it has answered before it went counts.
            if slot.state.load(Ordering::Acquire) == protocol::DONE {
                break;
            }
            // The slot stays taken: the agent may still write to it.
            return Err(Lost::HungUp);
        }
        if state != protocol::WAITING && sys::now_ns() >= deadline_ns {
            // What the agent has not begun is taken back; what it has, it frees.
            let after = if state == protocol::POSTED { protocol::FREE } else { protocol::ABANDONED };
            if slot.state.compare_exchange(state, after, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return Err(Lost::TimedOut);
            }
        }
    }
    let (error, answer) = (slot.error.load(Ordering::Relaxed), slot.answer.load(Ordering::Relaxed));
    for (to, from) in content.iter_mut().zip(&slot.data) {
        *to = from.load(Ordering::Relaxed);
    }
    slot.state.store(protocol::FREE, Ordering::Release);
    Ok(if error == 0 { Ok(answer) } else { Err(error as i32) })
}

/// Rings; wakes an agent that sleeps at least so deeply.
fn ring(page: &Page, from: u32) {
    page.doorbell.fetch_add(1, Ordering::SeqCst);
    if page.asleep.load(Ordering::SeqCst) >= from {
        page.asleep.store(protocol::AWAKE, Ordering::SeqCst);
        sys::futex_wake(&page.doorbell, 1);
    }
}

fn number_on_page(database: &Database) -> Option<(&'static Page, u32)> {
    let connection = &CONNECTION[database.cluster()];
    let page = connection.page()?;
    let attached = database.attached.load(Ordering::Acquire);
    let number = attached as u32;
    let current = (attached >> 32) as u32 == connection.generation.load(Ordering::Relaxed);
    (current && (number as usize) < protocol::DATABASES).then_some((page, number))
}

/// Whether a write may begin without waiting for anything.
pub fn is_ready(database: &Database) -> bool {
    let Some((page, number)) = number_on_page(database) else { return false };
    let number = number as usize;
    let ahead = page.written[number]
        .load(Ordering::Relaxed)
        .saturating_sub(page.captured[number].load(Ordering::SeqCst));
    is_up(database.cluster())
        && ahead <= protocol::AHEAD_BYTES
        && may_write_to(database)
        && access(database) & protocol::ACCESS_LENT == 0
}

/// Whether the agent cannot take commits of this database now.
pub fn is_refused(database: &Database) -> bool {
    number_on_page(database)
        .is_some_and(|(page, number)| page.refused[number as usize].load(Ordering::Relaxed) != 0)
}

/// A commit in WAL mode is about to be written; says whether it has to be held. From now on the agent waits for it before it
/// ends a term. `None`: the term, or the halt lock, has ended.
pub fn begin_commit(database: &Database) -> Option<bool> {
    let cluster = database.cluster();
    if access(database) & protocol::ACCESS_BORROWED != 0 {
        // Should the lock end now, the agent refuses what it is asked.
        return Some(true);
    }
    if !database.committing.load(Ordering::Relaxed).is_null() {
        // The header of the same commit again, with another checksum.
        return Some(holds_all(cluster));
    }
    loop {
        let page = CONNECTION[cluster].page();
        if let Some(page) = page {
            // Before the look at the mode: the agent clears that first and looks at this afterwards.
            page.committing.fetch_add(1, Ordering::SeqCst);
            database.committing.store(core::ptr::from_ref(page).cast_mut(), Ordering::Relaxed);
        }
        let may = may_write(cluster);
        // It may have found another agent, which has to wait too.
        let same = CONNECTION[cluster].page().map(core::ptr::from_ref) == page.map(core::ptr::from_ref);
        if may && same {
            return Some(holds_all(cluster));
        }
        end_commit(database);
        if !may {
            return None;
        }
    }
}

/// The commit is published, or will not be.
pub fn end_commit(database: &Database) {
    let page = database.committing.swap(core::ptr::null_mut(), Ordering::Relaxed);
    // SAFETY: a page stays mapped as long as the process lives.
    if let Some(page) = unsafe { page.as_ref() } {
        page.committing.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A commit is visible in the WAL: nobody waits for anything. An agent that is not there now finds it later.
pub fn committed(database: &Database) {
    if database.captured.swap(0, Ordering::Relaxed) != 0 {
        // It was held: the agent has it, and sees in the wal-index that it counts.
        database.wal_bytes.store(0, Ordering::Relaxed);
    } else if let Some((page, number)) = number_on_page(database) {
        let bytes = database.wal_bytes.swap(0, Ordering::Relaxed);
        page.written[number as usize].fetch_add(bytes, Ordering::SeqCst);
        page.changed[number as usize].fetch_or(protocol::CHANGED, Ordering::SeqCst);
        ring(page, protocol::ASLEEP);
    }
    end_commit(database);
}

/// Waits until the agent is near enough for another transaction. Where no agent is it does not wait: how long commits go
/// on without one is limited elsewhere.
pub fn wait_until_near(database: &Database) -> Result<(), i32> {
    let connection = &CONNECTION[database.cluster()];
    let mut deadline = 0;
    loop {
        let Some((page, number)) = number_on_page(database) else { return Ok(()) };
        let seen = page.caught_up.load(Ordering::SeqCst);
        let captured = page.captured[number as usize].load(Ordering::SeqCst);
        let written = page.written[number as usize].load(Ordering::Relaxed);
        if written.saturating_sub(captured) <= protocol::AHEAD_BYTES {
            return Ok(());
        }
        let now = sys::now_ns();
        if deadline == 0 {
            deadline = now + wait_ms() * 1_000_000;
            // A wake-up may have been missed.
            page.changed[number as usize].fetch_or(protocol::CHANGED, Ordering::SeqCst);
            ring(page, protocol::NAPPING);
        }
        let socket = connection.socket.load(Ordering::Acquire);
        if socket < 0 || sys::hung_up(socket) {
            return Ok(());
        }
        if now >= deadline {
            say(&[b"the agent does not keep up with this database: a transaction has to wait"]);
            return Err(libc::EAGAIN);
        }
        sys::futex_wait(&page.caught_up, seen, LOOK_MS);
    }
}

/// This process has closed the database.
pub fn detach(database: &Database) {
    if let Some((page, number)) = number_on_page(database) {
        page.changed[number as usize].fetch_or(protocol::CLOSED, Ordering::SeqCst);
        ring(page, protocol::ASLEEP);
    }
    database.attached.store(0, Ordering::Relaxed);
}
