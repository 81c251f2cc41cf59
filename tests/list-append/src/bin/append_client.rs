//! Appends to a list and reads it, over and over, and prints what came of it. Arguments: database, name of the client.
//! Ends when its input ends. `list_append::History` reads what it prints:
//!
//! ```text
//! append <begin> <end> ok|failed|unknown <value>      times in nanoseconds of CLOCK_MONOTONIC
//! read <connection> <begin> <end> <id> <value>        the last entry
//! ```

use nix::time::{ClockId, clock_gettime};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn now() -> u128 {
    Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has this clock")).as_nanos()
}

/// Never creates one: where nothing is mounted there is none.
fn open(database: &str) -> Option<Connection> {
    let connection = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE).ok()?;
    connection.busy_timeout(Duration::from_millis(500)).ok()?;
    Some(connection)
}

fn last(connection: &Connection) -> rusqlite::Result<Option<(i64, String)>> {
    let mut statement = connection.prepare_cached("SELECT id, value FROM t ORDER BY id DESC LIMIT 1")?;
    let mut rows = statement.query([])?;
    rows.next()?.map(|row| Ok((row.get(0)?, row.get(1)?))).transpose()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (database, name) = (arguments.next().expect("a database"), arguments.next().expect("a name"));
    let ends = Arc::new(AtomicBool::new(false));
    let ended = ends.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        ended.store(true, Ordering::Relaxed);
    });
    let (mut writer, mut reader, mut connections) = (None, None, 0);
    let mut out = std::io::stdout();
    for number in 0.. {
        if ends.load(Ordering::Relaxed) {
            return;
        }
        if writer.is_none() {
            writer = open(&database);
        }
        if reader.is_none() {
            reader = open(&database);
            connections += 1;
        }
        if let Some(connection) = &writer {
            let value = format!("{name}-{number}");
            let begin = now();
            let done = connection.execute("INSERT INTO t(value) VALUES (?1)", [&value]);
            let end = now();
            let outcome = match done.as_ref().map_err(rusqlite::Error::sqlite_error_code) {
                Ok(_) => "ok",
                Err(Some(ErrorCode::DatabaseBusy | ErrorCode::ReadOnly)) => "failed",
                Err(_) => "unknown",
            };
            if outcome != "failed" {
                writeln!(out, "append {begin} {end} {outcome} {value}").expect("somebody reads");
            }
            if done.is_err_and(|error| error.sqlite_error_code() != Some(ErrorCode::DatabaseBusy)) {
                writer = None;
            }
        }
        if let Some(connection) = &reader {
            let begin = now();
            match last(connection) {
                Ok(Some((id, value))) => {
                    writeln!(out, "read {connections} {begin} {} {id} {value}", now())
                        .expect("somebody reads");
                }
                Ok(None) => {}
                Err(_) => reader = None,
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
