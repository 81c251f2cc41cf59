//! Synchronous replication: a commit counts only when so many followers have it in their logs.
//!
//! | module       | what it does                                                                       |
//! |--------------|------------------------------------------------------------------------------------|
//! | [`board`]    | which commits wait for whom, and when each may go on: no threads, no clock of its own |
//! | [`gate`]     | the board with a thread: holds commits and lets them go                             |
//! | [`quorum`]   | how many members a candidate must hear to know every acknowledged commit            |
//!
//! A held commit is in the log, durable and shipped, but SQLite has not published it: the frame's header is not in the
//! WAL, or the journal is still whole. So nobody on this host sees it, and a crash rolls it forward like any
//! transaction of the log, which is right: what was not acknowledged may or may not survive. See
//! `docs/decisions/0032-synchronous-commits.md`.

pub mod board;
pub mod gate;
pub mod quorum;

pub use board::{Hold, Refused, RuleState};
pub use gate::Gate;
