//! `litefs status` and `litefs list`.

use super::client::Client;
use super::failure::{self, Failure};
use super::printable;
use crate::status::Status;
use crate::status::api::{self, DatabaseState, DatabaseStatus, SyncStatus};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{BinaryBytes, HumanDuration};
use std::fmt::Write as _;
use std::io::Write;
use std::time::Duration;

pub async fn status(client: Client, json: bool, out: &mut dyn Write) -> Result<u8, Failure> {
    let status = client.status().await?;
    let text = if json {
        serde_json::to_string_pretty(&status).map_err(|error| Failure::new(failure::SOFTWARE, error))? + "\n"
    } else {
        render(&status, jiff::Timestamp::now().as_millisecond())
    };
    out.write_all(text.as_bytes()).map_err(failure::stdout)?;
    Ok(if troubles(&status).is_empty() { 0 } else { failure::TROUBLE })
}

pub async fn list(client: Client, out: &mut dyn Write) -> Result<u8, Failure> {
    let status = client.status().await?;
    let mut rows = table(&["DATABASE", "POSITION", "SIZE"], &[2]);
    for db in &status.databases {
        rows.add_row([printable(&db.name), position(db), BinaryBytes(db.size_bytes).to_string()]);
    }
    writeln!(out, "{}", rows.trim_fmt()).map_err(failure::stdout)?;
    Ok(0)
}

/// What is wrong, one sentence each.
fn troubles(status: &Status) -> Vec<String> {
    let aside = status.databases.iter().filter(|db| db.state == DatabaseState::Quarantined);
    let aside = aside.map(|db| (db.name.as_str(), db.reason.as_deref()));
    let mut troubles = api::troubles(&status.role, aside);
    troubles.extend(status.sync.iter().filter_map(SyncStatus::trouble));
    troubles.iter().map(|trouble| printable(trouble)).collect()
}

fn render(status: &Status, now: i64) -> String {
    let mut text = String::new();
    let role = &status.role;
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "cluster {}, node {}: {} for {}, epoch {}",
        printable(&status.cluster),
        printable(&status.node.name),
        role.name.as_str(),
        ago(now, role.since_unix_ms),
        role.epoch
    );
    if let Some(upstream) = &role.upstream {
        let name = upstream.hostname.as_deref().unwrap_or("an unknown host");
        let heard = match upstream.last_heartbeat_unix_ms {
            Some(at) => format!("heard {} ago", ago(now, at)),
            None => "never heard".to_owned(),
        };
        let connected = if upstream.connected { "connected" } else { "NOT CONNECTED" };
        let (name, url) = (printable(name), printable(&upstream.url));
        let _ = write!(text, "\nupstream {name} ({url}), {connected}, {heard}");
    }
    let passthrough = if status.mount.passthrough { "with passthrough" } else { "without passthrough" };
    let _ = writeln!(
        text,
        "\nmount {} ({} {passthrough}), log {}, litefs {}",
        printable(&status.mount.dir.to_string_lossy()),
        printable(&status.mount.door),
        BinaryBytes(status.log.bytes),
        printable(&status.node.version)
    );

    if status.databases.is_empty() {
        let _ = writeln!(text, "\nno databases yet");
    } else {
        let mut rows =
            table(&["DATABASE", "POSITION", "SIZE", "JOURNAL", "STATE", "LAG", "OPEN", "CHANGED"], &[2, 6]);
        for db in &status.databases {
            rows.add_row(database_row(db, now));
        }
        let _ = writeln!(text, "\n{}", rows.trim_fmt());
    }
    if !status.followers.is_empty() {
        let mut rows = table(&["FOLLOWER", "ADDRESS", "CONNECTED", "BEHIND"], &[]);
        for follower in &status.followers {
            let behind: u64 = follower.databases.iter().map(|db| db.lag_transactions).sum();
            let late = follower.databases.iter().filter(|db| db.lag_transactions > 0).count();
            let behind = match late {
                0 => "nothing".to_owned(),
                1 => format!("{behind} tx in 1 database"),
                _ => format!("{behind} tx in {late} databases"),
            };
            rows.add_row([
                printable(&follower.name),
                printable(&follower.address),
                ago(now, follower.connected_since_unix_ms),
                behind,
            ]);
        }
        let _ = writeln!(text, "\n{}", rows.trim_fmt());
    }
    if !status.sync.is_empty() {
        let mut rows =
            table(&["SYNCHRONOUS", "STATE", "ACKS", "MEMBERS CONNECTED", "WAITING", "ON TIME-OUT"], &[]);
        for rule in &status.sync {
            let waiting = match rule.oldest_wait_ms {
                Some(ms) => format!("{} for {ms} ms", rule.waiting),
                None => "none".to_owned(),
            };
            rows.add_row([
                printable(&rule.databases.join(", ")),
                rule.state.as_str().to_owned(),
                rule.acks.to_string(),
                printable(&rule.connected.join(", ")),
                waiting,
                format!("{} after {} ms", printable(&rule.on_timeout), rule.timeout_ms),
            ]);
        }
        let _ = writeln!(text, "\n{}", rows.trim_fmt());
    }
    if !status.files_not_replicated.is_empty() {
        let _ = writeln!(text, "\nnot databases, on this host only:");
        for file in &status.files_not_replicated {
            let _ = writeln!(text, "  {}", printable(file));
        }
    }
    let troubles = troubles(status);
    if !troubles.is_empty() {
        let _ = writeln!(text, "\nwrong:");
        for trouble in troubles {
            let _ = writeln!(text, "  {trouble}");
        }
    }
    text
}

fn database_row(db: &DatabaseStatus, now: i64) -> [String; 8] {
    let lag = match &db.lag {
        None => "-".to_owned(),
        Some(lag) if lag.transactions == 0 => "none".to_owned(),
        Some(lag) => {
            let bytes = lag.bytes.map(|bytes| format!(", {}", BinaryBytes(bytes))).unwrap_or_default();
            format!("{} tx{bytes}, {} ms", lag.transactions, lag.ms)
        }
    };
    let state = match db.state {
        DatabaseState::Ok => "ok",
        DatabaseState::Quarantined => "QUARANTINED",
    };
    [
        printable(&db.name),
        position(db),
        BinaryBytes(db.size_bytes).to_string(),
        printable(&db.journal_mode),
        match &db.halt_lock {
            Some(host) => format!("{state}, halt lock: {}", printable(host)),
            None => state.to_owned(),
        },
        lag,
        db.open_handles.to_string(),
        db.last_change_unix_ms.map_or("-".to_owned(), |at| format!("{} ago", ago(now, at))),
    ]
}

fn position(db: &DatabaseStatus) -> String {
    format!("{}/{}", db.txid, db.checksum)
}

/// Time since, in one unit. Clocks of hosts differ a little: the future is now.
fn ago(now: i64, then: i64) -> String {
    let ms = u64::try_from(now.saturating_sub(then)).unwrap_or(0);
    if ms < 1000 { format!("{ms}ms") } else { format!("{:#}", HumanDuration(Duration::from_millis(ms))) }
}

/// Columns without lines, as in `ps`.
fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake;

    #[test]
    fn a_primary_shows_databases_and_followers() {
        assert_eq!(
            render(&fake::status(), 62_000),
            "\
cluster db, node host-a: primary for 61s, epoch 3
mount /srv/litefs/db (fuse with passthrough), log 4.00 KiB, litefs 0.1.0

DATABASE  POSITION                               SIZE  JOURNAL  STATE  LAG  OPEN  CHANGED
a.db      000000000000002a/ffffffffffffffff  8.00 KiB  wal      ok     -       1  60s ago

FOLLOWER  ADDRESS         CONNECTED  BEHIND
host-b    10.0.0.2:40000  61s        2 tx in 1 database
"
        );
        assert!(troubles(&fake::status()).is_empty());
    }

    #[test]
    fn a_replica_shows_its_upstream_and_lag() {
        let text = render(&fake::replica(), 10_500);
        assert!(
            text.contains("\nupstream host-a (http://host-a:20202), connected, heard 500ms ago\n"),
            "{text}"
        );
        assert!(text.contains("1 tx, 4.10 KiB, 20 ms"), "{text}");
        assert!(!text.contains("FOLLOWER") && !text.contains("wrong:"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_said_last() {
        let mut status = fake::replica();
        status.role.upstream.as_mut().unwrap().connected = false;
        status.databases[0].state = DatabaseState::Quarantined;
        status.databases[0].reason = Some("page 7 does not match its checksum".into());
        status.files_not_replicated.push("notes.txt".into());
        let text = render(&status, 10_500);
        assert!(
            text.ends_with(
                "not databases, on this host only:\n  notes.txt\n\nwrong:\n  not connected to the upstream \
                 http://host-a:20202: nothing new arrives\n  database a.db is quarantined: page 7 does not match its \
                 checksum\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn an_agent_without_databases_says_so() {
        let mut status = fake::status();
        status.databases.clear();
        assert!(render(&status, 0).contains("no databases yet"));
    }
}
