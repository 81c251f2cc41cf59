//! The agent, as this process sees it.
//!
//! | module           | what it does                                                          |
//! |------------------|-----------------------------------------------------------------------|
//! | [`connection`]   | socket and shared page, the handshake, what becomes of them at a fork |
//! | [`slots`]        | a question in the page, and its answer                                |
//! | [`attach`]       | the number of a database on a connection                              |
//! | [`requests`]     | what is asked for a transaction, and content of files it makes up     |
//! | [`permission`]   | whether applications may write                                        |
//! | [`wal_commits`]  | commits that are announced and not waited for                         |
//! | [`descriptors`]  | files that the agent opens for the process                            |

mod attach;
mod connection;
mod descriptors;
mod permission;
mod requests;
mod slots;
mod wal_commits;

pub use attach::{attach, detach};
pub use connection::{give_up, is_up, next_own, owns, was_there};
pub use descriptors::{lock_file, open_for_writing};
pub use permission::{Turn, holds, is_ready, is_refused, may_write, may_write_to, turn};
pub use requests::{ask, special};
pub use wal_commits::{begin_commit, committed, end_commit, synced, wait_until_near};

/// In the child of a fork, which has no connection: those it inherits are its parent's.
pub fn forked() {
    descriptors::forked();
    connection::forked();
}
