//! Runs each line of its input as SQL: rows, then `ok` or `error: ...`. Argument: database.

use rusqlite::Connection;
use rusqlite::types::Value;
use std::io::{BufRead, Write};

fn rows(connection: &Connection, sql: &str, out: &mut dyn Write) -> rusqlite::Result<()> {
    let mut statement = connection.prepare(sql)?;
    let columns = statement.column_count();
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let values = (0..columns).map(|i| {
            Ok(match row.get(i)? {
                Value::Null => String::new(),
                Value::Integer(number) => number.to_string(),
                Value::Text(text) => text,
                other => format!("{other:?}"),
            })
        });
        let values = values.collect::<rusqlite::Result<Vec<String>>>()?;
        writeln!(out, "{}", values.join("|")).expect("somebody reads");
    }
    Ok(())
}

fn main() {
    let database = std::env::args_os().nth(1).expect("the database is an argument");
    let connection = Connection::open(database).expect("the database opens");
    connection.busy_timeout(std::time::Duration::from_secs(20)).expect("a timeout can be set");
    let mut out = std::io::stdout();
    writeln!(out, "{}", rusqlite::version()).expect("somebody reads");
    for line in std::io::stdin().lock().lines() {
        match rows(&connection, &line.expect("SQL is text"), &mut out) {
            Ok(()) => writeln!(out, "ok").expect("somebody reads"),
            Err(error) => writeln!(out, "error: {error}").expect("somebody reads"),
        }
    }
}
