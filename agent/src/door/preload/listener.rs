//! Accepts processes with the preload library, and notices when they have gone.

use super::Connections;
use super::bystanders::Bystanders;
use super::connection::Connection;
use super::lock_file;
use super::memory::SharedPage;
use super::opening;
use super::peer::Peer;
use crate::door::fuse::RoleView;
use fuse_session::Mounter;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen,
    recv, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use shim_protocol::{Hello, LOCK_FILE_MAGIC, MAGIC, OPEN_MAGIC, VERSION};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between looks at what is done without the library.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A process that connects says hello at once.
const HELLO_SECONDS: i64 = 2;
/// Longest of what it says first: a path.
const FIRST_BYTES_MAX: usize = 4096;
/// Between looks whether what a process has left is captured.
const ENDING_PAUSE_MS: u8 = 5;
/// Before accepting again where the system refused (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The listening thread, and the one that looks for what is done without the library: that may have to read a whole
/// database, and who connects must not wait for it.
#[derive(Debug)]
pub struct Listener {
    stop: UnixStream,
    thread: JoinHandle<()>,
    stop_looking: mpsc::Sender<()>,
    looking: JoinHandle<()>,
}

/// A process that has connected, and the thread that serves it.
struct Served {
    socket: OwnedFd,
    /// The process has gone, or the door is closed.
    gone: CancellationToken,
    /// Once it has said hello: who asks for a file has none.
    connection: Arc<OnceLock<Arc<Connection>>>,
    thread: JoinHandle<()>,
}

impl Served {
    /// Makes the thread end.
    fn end(&self) {
        // Before the look: a connection that is made now looks at this afterwards.
        self.gone.cancel();
        if let Some(connection) = self.connection.get() {
            connection.end();
        }
    }
}

impl Listener {
    /// Binds the socket and starts the thread.
    pub fn start(
        path: &Path,
        connections: Arc<Connections>,
        view: Arc<dyn RoleView>,
        mounter: Mounter,
    ) -> io::Result<Listener> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listening = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(listening.as_raw_fd(), &UnixAddr::new(path)?)?;
        // What a process may do follows from the permissions of the databases.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        listen(&listening, Backlog::new(128)?)?;
        let (stop, stopped) = UnixStream::pair()?;
        let mut bystanders = Bystanders::new(connections.shared.clone(), view, mounter)?;
        let (stop_looking, stopped_looking) = mpsc::channel();
        let all = connections.clone();
        let looking = std::thread::Builder::new().name("bystanders".into()).spawn(move || {
            loop {
                all.all.lock().iter().for_each(|connection| connection.refuse_quarantined());
                bystanders.look();
                if stopped_looking.recv_timeout(LOOK_EVERY) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        let thread = std::thread::Builder::new()
            .name("preload-listen".into())
            .spawn(move || run(&listening, &stopped, &connections))?;
        Ok(Listener { stop, thread, stop_looking, looking })
    }

    /// Ends the threads, after those that serve processes.
    pub fn stop(mut self) {
        // Fails only where the thread has ended.
        let _ = self.stop.write_all(&[0]);
        drop(self.stop_looking);
        for thread in [self.thread, self.looking] {
            if thread.join().is_err() {
                tracing::error!("a thread of the preload door panicked");
            }
        }
    }
}

fn run(listening: &OwnedFd, mut stopped: &UnixStream, connections: &Arc<Connections>) {
    let mut served: Vec<Served> = Vec::new();
    // Their processes have gone, and what they have committed is being captured.
    let mut ending: Vec<Served> = Vec::new();
    loop {
        let timeout = if ending.is_empty() { PollTimeout::NONE } else { PollTimeout::from(ENDING_PAUSE_MS) };
        let mut fds = vec![
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(listening.as_fd(), PollFlags::POLLIN),
        ];
        // A process says nothing after its hello; its end is told without being asked for (POLLHUP).
        fds.extend(served.iter().map(|s| PollFd::new(s.socket.as_fd(), PollFlags::empty())));
        if let Err(error) = poll(&mut fds, timeout)
            && error != nix::errno::Errno::EINTR
        {
            tracing::error!(%error, "the preload door cannot wait for processes");
            std::thread::sleep(ACCEPT_PAUSE);
        }
        let ready: Vec<bool> =
            fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        drop(fds);
        if ready[0] {
            let _ = stopped.read(&mut [0]);
            served.iter().for_each(Served::end);
            served.append(&mut ending);
            served.into_iter().for_each(|s| reap(connections, s));
            return;
        }
        let mut index = 2;
        let gone: Vec<Served> = served
            .extract_if(.., |_| {
                index += 1;
                ready[index - 1]
            })
            .collect();
        gone.iter().for_each(Served::end);
        ending.extend(gone);
        let ended: Vec<Served> = ending.extract_if(.., |s| s.thread.is_finished()).collect();
        ended.into_iter().for_each(|s| reap(connections, s));
        if ready[1] {
            match accept(listening, connections) {
                Ok(new) => served.extend(new),
                Err(error) => {
                    tracing::warn!(%error, "a process with the preload library cannot be served");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }
}

/// What a process that has gone had committed is captured. Until then its databases are asked for.
fn reap(connections: &Connections, served: Served) {
    if served.thread.join().is_err() {
        tracing::error!("a thread that served a process with the preload library panicked");
    }
    if let Some(connection) = served.connection.get() {
        connections.all.lock().retain(|c| !Arc::ptr_eq(c, connection));
    }
}

fn accept(listening: &OwnedFd, connections: &Arc<Connections>) -> io::Result<Option<Served>> {
    let accepted = match accept4(listening.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
        Ok(fd) => fd,
        // It has gone already.
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::ECONNABORTED | nix::errno::Errno::EINTR) => {
            return Ok(None);
        }
        Err(e) => return Err(e.into()),
    };
    // SAFETY: a new descriptor that nobody else knows.
    let socket = unsafe { OwnedFd::from_raw_fd(accepted) };
    let peer = Peer::of(socket.as_fd())?;
    let (gone, connection) = (CancellationToken::new(), Arc::new(OnceLock::new()));
    let name = format!("preload-{}", peer.pid);
    let (asked, closed, made, all) =
        (socket.try_clone()?, gone.clone(), connection.clone(), connections.clone());
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        let pid = peer.pid;
        match serve_first(&asked, &closed, &made, &all, peer) {
            Ok(Some(connection)) => {
                drop(asked);
                connection.serve();
            }
            Ok(None) => {}
            // It was killed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => {
                tracing::warn!(pid, %error, "a process is refused at the preload door");
                // The other descriptor keeps the connection open until the listening thread sees the end.
                let _ = nix::sys::socket::shutdown(asked.as_raw_fd(), nix::sys::socket::Shutdown::Both);
            }
        }
    })?;
    Ok(Some(Served { socket, gone, connection, thread }))
}

/// Answers what a process says first. It wants a file, or says hello and gets a connection.
fn serve_first(
    socket: &OwnedFd,
    gone: &CancellationToken,
    made: &OnceLock<Arc<Connection>>,
    connections: &Connections,
    peer: Peer,
) -> io::Result<Option<Arc<Connection>>> {
    let words = first_words(socket)?;
    let shared = &connections.shared;
    if let Some(path) = words.strip_prefix(&LOCK_FILE_MAGIC.to_ne_bytes()) {
        return lock_file::serve(socket, gone, &peer, shared, &*connections.locks, path).map(|()| None);
    }
    if let Some(path) = words.strip_prefix(&OPEN_MAGIC.to_ne_bytes()) {
        return opening::serve(socket, &peer, &shared.dirs.files, path).map(|()| None);
    }
    let welcome = [MAGIC, VERSION];
    if let Err(refused) = agree(&words) {
        answer(socket, welcome, None)?;
        return Err(refused);
    }
    let memory = Arc::new(SharedPage::create()?);
    let connection =
        Arc::new(Connection::new(shared.clone(), connections.special.clone(), memory.clone(), peer));
    {
        // In one step with becoming known, so that no change of the role is missed.
        let mut all = connections.all.lock();
        connections.tell(&connection);
        all.push(connection.clone());
    }
    let connection = made.get_or_init(|| connection);
    if gone.is_cancelled() {
        connection.end();
    }
    answer(socket, welcome, Some(memory.file().as_fd()))?;
    Ok(Some(connection.clone()))
}

/// What a process says first.
fn first_words(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::new(HELLO_SECONDS, 0))?;
    let mut bytes = vec![0; FIRST_BYTES_MAX];
    let count = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Whether these are the words of a library of this version.
fn agree(words: &[u8]) -> io::Result<()> {
    let word = |at: usize| {
        words.get(at..at + 4).map_or(0, |word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
    };
    if words.len() != size_of::<Hello>() || word(0) != MAGIC {
        return Err(io::Error::other("what it says is not the preload library's hello"));
    }
    if word(4) != VERSION {
        return Err(io::Error::other(format!(
            "its preload library speaks version {}, this agent {VERSION}: update both and restart the application",
            word(4)
        )));
    }
    Ok(())
}

/// Sends two words and a descriptor.
pub(super) fn answer(
    socket: &OwnedFd,
    words: [u32; 2],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let descriptors: Vec<_> = descriptor.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let controls: &[ControlMessage<'_>] = if descriptor.is_some() { &rights } else { &[] };
    let parts = [IoSlice::new(&bytes)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, controls, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}
