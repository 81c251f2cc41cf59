//! Questions and answers: a question is posted in one of the page's slots, and whoever posted it waits for its answer.

use super::connection::{self, ring};
use crate::sys;
use core::sync::atomic::Ordering;
use shim_protocol as protocol;
use shim_protocol::{Op, Page};

/// Turns of waiting for an answer before the thread sleeps.
const SPINS: u32 = 400;
/// How long the thread sleeps before it looks whether the agent is still there.
pub(super) const LOOK_MS: u64 = 100;

/// Why a request has no answer.
pub(super) enum Lost {
    /// The agent has gone.
    HungUp,
    /// It did not answer in time.
    TimedOut,
}

pub(super) struct Question {
    pub(super) op: Op,
    pub(super) database: u32,
    pub(super) flags: u32,
    pub(super) count: u32,
}

/// Posts a question and waits for its answer; `content` is what the answer has in its data.
pub(super) fn post(
    page: &Page,
    generation: u32,
    cluster: usize,
    question: &Question,
    data: &[u64],
    deadline_ns: u64,
    content: &mut [u64],
) -> Result<Result<u32, i32>, Lost> {
    let gone = || connection::of(cluster).is_gone(generation);
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
