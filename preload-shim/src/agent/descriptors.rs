//! Descriptors that the agent opens for this process: each is asked for on a connection of its own, without a page.

use super::connection::{RETRY_MS, WELCOME_MS};
use crate::managed::{self, PathBuffer};
use crate::{process, sys};
use core::sync::atomic::{AtomicI32, Ordering};
use shim_protocol as protocol;

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

/// In the child of a fork: nobody there waits for a lock.
pub fn forked() {
    for place in &LOCKING {
        let socket = place.swap(-1, Ordering::Relaxed);
        if socket >= 0 {
            sys::close(socket);
        }
    }
}

/// `NAME-lock`, once the agent has the halt lock, which ends when all copies of the descriptor are closed. `ENOENT`: there is no
/// such lock. `EINTR`: a signal handler has run.
pub fn lock_file(cluster: usize, name: &[u8], close_on_exec: bool) -> Result<i32, i32> {
    let (path, question) = about_file(cluster, protocol::LOCK_FILE_MAGIC, name).ok_or(libc::ENAMETOOLONG)?;
    let mut deadline = sys::now_ns() + process::wait_ms() * 1_000_000;
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
                process::say(&[b"no agent answers at ", path.bytes(), b": start litefs"]);
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
    *deadline = sys::now_ns() + process::wait_ms() * 1_000_000;
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
