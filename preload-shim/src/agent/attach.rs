//! The number that a database has on a connection: the agent gives it when it is first told of the database.

use super::connection::{self, ring};
use super::slots::{Lost, Question, post};
use crate::table::Database;
use crate::{managed, process, sys};
use core::sync::atomic::Ordering;
use shim_protocol as protocol;
use shim_protocol::{Op, Page};

/// Number of a file that no database can have the name of.
pub(super) const PLAIN: u32 = u32::MAX;

/// Makes sure that an agent knows the database, waiting for one if need be. `Ok(false)`: no database can have its name.
pub fn attach(database: &Database, wait_ms: u64) -> Result<bool, i32> {
    let connection = connection::of(database.cluster());
    if connection.is_up()
        && let attached = database.attached.load(Ordering::Acquire)
        && (attached >> 32) as u32 == connection.generation()
    {
        return Ok(attached as u32 != PLAIN);
    }
    let deadline = sys::now_ns() + wait_ms * 1_000_000;
    let mut again = true;
    loop {
        let (page, generation) = connection.connect(database.cluster(), deadline)?;
        // Who is there gets the usual time to answer.
        let answered = sys::now_ns() + process::wait_ms() * 1_000_000;
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
pub(super) fn attach_on(
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

/// The page, and a database's number on it; `None` while this connection's agent does not know it.
pub(super) fn number_on_page(database: &Database) -> Option<(&'static Page, u32)> {
    let connection = connection::of(database.cluster());
    let page = connection.page()?;
    let attached = database.attached.load(Ordering::Acquire);
    let number = attached as u32;
    let current = (attached >> 32) as u32 == connection.generation();
    (current && (number as usize) < protocol::DATABASES).then_some((page, number))
}

type NameWords = [u64; managed::NAME_MAX / 8 + 1];

/// A name as an agent is told it.
pub(super) fn words_of(name: &[u8]) -> NameWords {
    let mut words = [0u64; managed::NAME_MAX / 8 + 1];
    for (word, bytes) in words.iter_mut().zip(name.chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(padded);
    }
    words
}

/// This process has closed the database.
pub fn detach(database: &Database) {
    if let Some((page, number)) = number_on_page(database) {
        page.changed[number as usize].fetch_or(protocol::CLOSED, Ordering::SeqCst);
        ring(page, protocol::ASLEEP);
    }
    database.attached.store(0, Ordering::Relaxed);
}
