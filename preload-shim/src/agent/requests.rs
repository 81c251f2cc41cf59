//! What is asked of the agent, if need be of its successor, and waited for.

use super::attach::{PLAIN, attach_on, words_of};
use super::connection;
use super::slots::{Lost, Question, post};
use crate::table::Database;
use crate::{process, sys};
use shim_protocol as protocol;
use shim_protocol::{Op, Page};

/// Words of a file that the agent makes up: the name of a host.
const SPECIAL_WORDS: usize = 40;

/// Asks the agent and waits for its answer, if need be of its successor. A file that is no database is granted
/// everything.
pub fn ask(database: &Database, op: Op, flags: u32, data: &[u64], wait_ms: u64) -> Result<(), i32> {
    let cluster = database.cluster();
    let connection = connection::of(cluster);
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
                    process::say(&[b"the agent did not answer in time: the transaction is refused"]);
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

/// Content of a file that the agent makes up, and its length in bytes.
pub fn special(cluster: usize, name: &[u8]) -> Result<([u64; SPECIAL_WORDS], usize), i32> {
    let connection = connection::of(cluster);
    let deadline = sys::now_ns() + process::wait_ms() * 1_000_000;
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
