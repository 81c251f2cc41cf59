//! Clients that append to a list and read it, and the proof that what all of them saw can be true of one list.

mod client;
mod history;

pub use client::{ListClient, program};
pub use history::{History, Summary};

/// What makes the list's table.
pub const CREATE: &str = "PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, value TEXT)";

/// What reads the list, for [`entries`].
pub const READ: &str = "SELECT id, value FROM t ORDER BY id";

/// The list, from what the `sqlite3` shell prints for [`READ`].
///
/// # Panics
/// If it is something else.
pub fn entries(rows: &str) -> Vec<(u64, String)> {
    let entry = |line: &str| {
        let (id, value) = line.split_once('|').expect("two columns");
        (id.parse().expect("a number"), value.to_owned())
    };
    rows.lines().map(entry).collect()
}
