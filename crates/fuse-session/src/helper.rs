//! `litefs-mount`: a process with the capabilities that agents do without. It mounts and registers files for them.
//!
//! It keeps nothing: each call brings the descriptors that it is about, so the helper may end and be replaced at any
//! time. Calls and answers are packets on a Unix socket, which root alone may open.

use crate::{mount, mounter};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::geteuid;
use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A call is a byte and its arguments; paths are shorter than PATH_MAX.
const CALL_BYTES_MAX: usize = 8192;
/// An answer: an errno (0: it was done) and a number.
const ANSWER_BYTES: usize = 8;
/// A helper that does not answer for so long is broken.
const PATIENCE_SECONDS: i64 = 20;
/// Without an agent for so long the helper ends; the socket unit starts it again.
const IDLE_MS: u16 = 10_000;

/// What an agent asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// A descriptor of /dev/fuse.
    OpenDevice,
    /// With the device.
    Mount {
        dir: PathBuf,
        source: String,
    },
    Unmount {
        dir: PathBuf,
    },
    Abort {
        dir: PathBuf,
    },
    /// With the device and the file.
    Register,
    /// With the device.
    Unregister {
        id: u32,
    },
    /// Whether a process has loaded the preload library.
    HasLibrary {
        pid: u32,
    },
}

impl Call {
    fn encode(&self) -> Vec<u8> {
        let path = |code: u8, dir: &Path| [&[code], dir.as_os_str().as_bytes()].concat();
        match self {
            Call::OpenDevice => vec![b'o'],
            Call::Mount { dir, source } => [&path(b'm', dir), &b"\0"[..], source.as_bytes()].concat(),
            Call::Unmount { dir } => path(b'u', dir),
            Call::Abort { dir } => path(b'a', dir),
            Call::Register => vec![b'r'],
            Call::Unregister { id } => [&[b'c'][..], &id.to_ne_bytes()].concat(),
            Call::HasLibrary { pid } => [&[b'l'][..], &pid.to_ne_bytes()].concat(),
        }
    }

    /// `None`: it is no call.
    fn decode(packet: &[u8]) -> Option<Call> {
        let (code, rest) = packet.split_first()?;
        let path = |bytes: &[u8]| {
            let path = Path::new(OsStr::from_bytes(bytes));
            (path.is_absolute() && !bytes.contains(&0)).then(|| path.to_owned())
        };
        Some(match code {
            b'o' if rest.is_empty() => Call::OpenDevice,
            b'm' => {
                let end = rest.iter().position(|byte| *byte == 0)?;
                let source = std::str::from_utf8(&rest[end + 1..]).ok()?;
                Call::Mount { dir: path(&rest[..end])?, source: source.to_owned() }
            }
            b'u' => Call::Unmount { dir: path(rest)? },
            b'a' => Call::Abort { dir: path(rest)? },
            b'r' if rest.is_empty() => Call::Register,
            b'c' => Call::Unregister { id: u32::from_ne_bytes(rest.try_into().ok()?) },
            b'l' => Call::HasLibrary { pid: u32::from_ne_bytes(rest.try_into().ok()?) },
            _ => return None,
        })
    }
}

/// What came of a call.
#[derive(Debug)]
pub(crate) struct Answer {
    pub result: io::Result<u32>,
    pub fd: Option<OwnedFd>,
}

/// The helper as an agent sees it.
#[derive(Debug)]
pub(crate) struct Helper {
    socket: PathBuf,
    stream: Mutex<Option<OwnedFd>>,
    /// This process was not found to lack CAP_SYS_ADMIN.
    capable: AtomicBool,
}

impl Helper {
    pub fn at(socket: PathBuf) -> Helper {
        Helper { socket, stream: Mutex::new(None), capable: AtomicBool::new(true) }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Does what CAP_SYS_ADMIN allows in any namespace, where an operator has left it to this process: that saves a round
    /// trip. `None`: it has not.
    pub fn with_own_capability<T>(&self, act: impl FnOnce() -> io::Result<T>) -> Option<io::Result<T>> {
        if !self.capable.load(Ordering::Relaxed) {
            return None;
        }
        match act() {
            Err(error) if error.raw_os_error() == Some(nix::libc::EPERM) => {
                self.capable.store(false, Ordering::Relaxed);
                None
            }
            done => Some(done),
        }
    }

    /// Asks, and waits for the answer. A helper that ended is asked again: another one has taken its place.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn ask(&self, call: &Call, fds: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        let packet = call.encode();
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = io::Error::from(io::ErrorKind::ConnectionReset);
        for _ in 0..2 {
            let connected = match stream.take() {
                Some(connected) => connected,
                None => self.connect()?,
            };
            match exchange(&connected, &packet, fds) {
                Ok(answer) => {
                    *stream = Some(connected);
                    return Ok(answer);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let stream = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(stream.as_raw_fd(), &UnixAddr::new(&self.socket)?)?;
        setsockopt(&stream, ReceiveTimeout, &TimeVal::seconds(PATIENCE_SECONDS))?;
        Ok(stream)
    }
}

fn exchange(stream: &OwnedFd, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<Answer> {
    send(stream, packet, fds)?;
    let mut bytes = [0; ANSWER_BYTES];
    let (len, mut fds) = receive(stream, &mut bytes)?;
    if len != ANSWER_BYTES {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let [errno, number] = [0, 4].map(|at| u32::from_ne_bytes([0, 1, 2, 3].map(|i| bytes[at + i])));
    let result = match errno.cast_signed() {
        0 => Ok(number),
        errno => Err(io::Error::from_raw_os_error(errno)),
    };
    Ok(Answer { result, fd: fds.pop() })
}

fn send(stream: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
    loop {
        match sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)
        {
            Err(Errno::EINTR) => {}
            sent => return sent.map(drop).map_err(io::Error::from),
        }
    }
}

/// One packet and its descriptors; 0 bytes are the end.
fn receive(stream: &OwnedFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; 2]);
    let mut io = [IoSliceMut::new(bytes)];
    let message = loop {
        match recvmsg::<()>(stream.as_raw_fd(), &mut io, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just put these descriptors into this process, and nobody else knows them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}

/// Listens at a path.
///
/// # Errors
/// It is in use, or too long.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&listener, Backlog::new(64)?)?;
    Ok(listener)
}

/// The life of the helper: serves agents until there has been none for a while.
///
/// # Errors
/// The socket cannot be listened on.
pub fn serve(listener: &OwnedFd) -> io::Result<()> {
    let agents = Arc::new(AtomicUsize::new(0));
    loop {
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::from(IDLE_MS)) {
            Err(Errno::EINTR) => continue,
            Ok(0) if agents.load(Ordering::SeqCst) == 0 => return Ok(()),
            Ok(0) => continue,
            other => other?,
        };
        let agent = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
            // SAFETY: it was made just now, and nobody else knows it.
            accepted => unsafe { OwnedFd::from_raw_fd(accepted?) },
        };
        let peer = getsockopt(&agent, PeerCredentials).map(|peer| peer.uid());
        if !peer.is_ok_and(|uid| uid == 0 || uid == geteuid().as_raw()) {
            continue;
        }
        let counted = Counted::one_more(&agents);
        std::thread::Builder::new().name("agent".into()).spawn(move || {
            let _counted = counted;
            // An agent that sends something else, or is gone, is not served any longer.
            while let Some(()) = serve_call(&agent) {}
        })?;
    }
}

struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one_more(count: &Arc<AtomicUsize>) -> Counted {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn serve_call(agent: &OwnedFd) -> Option<()> {
    let mut bytes = [0; CALL_BYTES_MAX];
    let (len, fds) = receive(agent, &mut bytes).ok()?;
    let call = Call::decode(&bytes[..len])?;
    let (result, fd) = match carry_out(&call, &fds) {
        Ok(Done::Number(number)) => (Ok(number), None),
        Ok(Done::Device(device)) => (Ok(0), Some(device)),
        Err(error) => (Err(error), None),
    };
    let errno = match &result {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(nix::libc::EIO),
    };
    let answer = [errno.to_ne_bytes(), result.unwrap_or(0).to_ne_bytes()].concat();
    let fd = fd.as_ref().map(AsFd::as_fd);
    send(agent, &answer, fd.as_slice()).ok()
}

enum Done {
    Number(u32),
    Device(OwnedFd),
}

fn carry_out(call: &Call, fds: &[OwnedFd]) -> io::Result<Done> {
    let invalid = || io::Error::from_raw_os_error(nix::libc::EINVAL);
    // Only what an agent mounted is taken away.
    let ours = |dir: &Path| match mount::is_ours(dir) {
        Ok(true) => Ok(()),
        _ => Err(invalid()),
    };
    let number = match (call, fds) {
        (Call::OpenDevice, []) => return mounter::open_device().map(Done::Device),
        (Call::Mount { dir, source }, [device]) => mount::mount(device.as_fd(), dir, source).map(|()| 0),
        (Call::Unmount { dir }, []) => ours(dir).and_then(|()| mount::unmount(dir)).map(u32::from),
        (Call::Abort { dir }, []) => ours(dir).map(|()| mounter::abort(dir)).map(|()| 0),
        (Call::Register, [device, file]) => mounter::register(device.as_fd(), file.as_fd()),
        (Call::Unregister { id }, [device]) => mounter::unregister(device.as_fd(), *id).map(|()| 0),
        (Call::HasLibrary { pid }, []) => mounter::has_library(*pid).map(u32::from),
        _ => Err(invalid()),
    };
    number.map(Done::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_come_back_as_they_were_sent_and_other_bytes_are_none() {
        for call in [
            Call::OpenDevice,
            Call::Mount { dir: "/srv/litefs/d b".into(), source: "db".into() },
            Call::Unmount { dir: "/srv".into() },
            Call::Abort { dir: "/srv".into() },
            Call::Register,
            Call::Unregister { id: 7 },
            Call::HasLibrary { pid: 1 },
        ] {
            assert_eq!(Call::decode(&call.encode()), Some(call));
        }
        for bytes in [&b""[..], b"x", b"o1", b"m/srv", b"usrv", b"a/s\0rv", b"c123", b"mrel\0db"] {
            assert_eq!(Call::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_helper_that_ended_is_asked_again_and_nothing_foreign_is_unmounted() {
        let path = std::env::temp_dir().join(format!("litefs-mount-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let helper = Helper::at(path.clone());
        assert!(helper.ask(&Call::OpenDevice, &[]).is_err(), "nobody listens");
        let listener = listen_at(&path).unwrap();
        let serving = listener.try_clone().unwrap();
        std::thread::spawn(move || serve(&serving));
        let foreign = Call::Unmount { dir: "/proc".into() };
        let refused = helper.ask(&foreign, &[]).unwrap().result.unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(nix::libc::EINVAL));
        assert!(Path::new("/proc/self").exists());
        // The connection breaks, as it does when the helper is replaced.
        let broken = helper.stream.lock().unwrap().as_ref().unwrap().try_clone().unwrap();
        nix::sys::socket::shutdown(broken.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
        assert!(helper.ask(&foreign, &[]).unwrap().result.is_err());
        // A call without its descriptors.
        assert!(helper.ask(&Call::Register, &[]).unwrap().result.is_err());
        let _ = std::fs::remove_file(&path);
    }
}
