//! Connections of the test's own process.

use crate::wait::PATIENCE;
use rusqlite::fallible_iterator::FallibleIterator;
use rusqlite::types::Value;
use rusqlite::{Batch, Connection};
use std::time::Instant;

/// The journal modes in which a commit is captured before SQLite reports it.
pub const JOURNAL_MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];

/// Inserts 300 rows into `t(.., v)` whose content cannot be compressed away and whose sizes differ, up to 9 kB.
pub const FILL: &str =
    "INSERT INTO t(v) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300)
    SELECT randomblob(i * 37 % 9000) FROM n;";

/// A table with one row, in WAL mode.
pub const CREATE_WAL: &str =
    "PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES (1);";
/// The same in a rollback mode.
pub const CREATE_DELETE: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES (1);";
/// Rows of the table.
pub const COUNT: &str = "SELECT count(*) FROM t";

/// Runs statements to their ends, also those that give rows.
///
/// # Errors
/// The first error of SQLite.
pub fn try_exec(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    let mut statements = Batch::new(connection, sql);
    while let Some(mut statement) = FallibleIterator::next(&mut statements)? {
        let mut rows = statement.raw_query();
        while rows.next()?.is_some() {}
    }
    Ok(())
}

/// Runs statements that must succeed to their ends, also those that give rows.
#[track_caller]
pub fn exec(connection: &Connection, sql: &str) {
    if let Err(error) = try_exec(connection, sql) {
        panic!("{sql}: {error}");
    }
}

/// The first column of the first row, as text.
#[track_caller]
pub fn ask(connection: &Connection, sql: &str) -> String {
    match connection.query_row(sql, [], |row| row.get(0)) {
        Ok(Value::Null) => String::new(),
        Ok(Value::Integer(number)) => number.to_string(),
        Ok(Value::Text(text)) => text,
        other => panic!("{sql}: {other:?}"),
    }
}

/// Sets a journal mode; panics when SQLite chooses another one.
#[track_caller]
pub fn set_journal_mode(connection: &Connection, mode: &str) {
    assert_eq!(ask(connection, &format!("PRAGMA journal_mode={mode}")), mode);
}

/// Waits until an open connection sees a value.
#[track_caller]
pub fn wait_seen(connection: &Connection, sql: &str, value: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = ask(connection, sql);
        if seen == value {
            return;
        }
        assert!(Instant::now() < deadline, "{sql} gives {seen:?} instead of {value:?}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
