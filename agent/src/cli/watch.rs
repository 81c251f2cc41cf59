//! `litefs watch`: what happens on this host, for scripts.

use super::client::{self, Client};
use super::failure::{self, Failure};
use super::printable;
use crate::config::pattern_matches;
use crate::status::Status;
use crate::status::api::{DatabaseState, DatabaseStatus, RoleStatus};
use crate::status::events::{Event, RoleData, TxData};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::Value;
use std::collections::HashMap;
use std::io::Write;
use std::time::Duration;

/// The stream has a heartbeat every 5 s; after this long without it is broken.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Between tries to reach an agent that went away.
const RETRY: Duration = Duration::from_millis(200);

/// The lines of an agent's `/events`.
pub struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// Begins to listen.
    pub async fn open(client: &Client) -> Result<Lines, Failure> {
        let request = client::request("GET", "/events".to_owned(), client::empty())?;
        Ok(Lines { body: client.send(request).await?.into_body(), buffer: Vec::new() })
    }

    /// The next one; `None` when the stream ended or broke.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).ok();
            }
            let frame = tokio::time::timeout(SILENCE_MAX, self.body.frame()).await.ok()??;
            if let Ok(data) = frame.ok()?.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}

/// Prints what is of interest, and only what is news.
struct Printer<'a> {
    databases: &'a [String],
    json: bool,
    out: &'a mut dyn Write,
    /// Positions as they were last printed.
    positions: HashMap<String, (String, String)>,
    role: Option<Value>,
}

pub async fn watch(
    client: Client,
    databases: &[String],
    json: bool,
    out: &mut dyn Write,
) -> Result<u8, Failure> {
    let mut printer = Printer { databases, json, out, positions: HashMap::new(), role: None };
    // An agent that is not there at all is a mistake; one that went away comes back.
    let mut lines = Lines::open(&client).await?;
    loop {
        let status = client.status().await;
        if let Ok(status) = &status {
            printer.state(status)?;
        }
        while status.is_ok()
            && let Some(line) = lines.next().await
        {
            printer.event(line)?;
        }
        lines = loop {
            tokio::time::sleep(RETRY).await;
            match Lines::open(&client).await {
                Ok(lines) => break lines,
                Err(error) if error.code == failure::NO_AGENT => {}
                Err(error) => return Err(error),
            }
        };
    }
}

impl Printer<'_> {
    fn wants(&self, database: &str) -> bool {
        self.databases.is_empty() || self.databases.iter().any(|pattern| pattern_matches(pattern, database))
    }

    /// Everything that is, as events.
    fn state(&mut self, status: &Status) -> Result<(), Failure> {
        self.event(role_event(&status.role))?;
        for db in &status.databases {
            if let Some(event) = position_event(db) {
                self.event(event)?;
            }
        }
        Ok(())
    }

    fn event(&mut self, event: Value) -> Result<(), Failure> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let kind = text(&event["type"]);
        let database = event["db"].as_str().map(str::to_owned);
        let data = &event["data"];
        match (kind.as_str(), &database) {
            ("init" | "primaryChange", None) => {
                if !self.databases.is_empty() || self.role.as_ref() == Some(data) {
                    return Ok(());
                }
                self.role = Some(data.clone());
                let role = text(&data["role"]);
                let host = text(&data["hostname"]);
                self.line(&event, &["role", &role, &host])
            }
            ("tx", Some(name)) if self.wants(name) => {
                let position = (text(&data["txID"]), text(&data["postApplyChecksum"]));
                if self.positions.get(name) == Some(&position) {
                    return Ok(());
                }
                self.positions.insert(name.clone(), position.clone());
                let position = format!("{}/{}", position.0, position.1);
                self.line(&event, &["position", name, &position])
            }
            ("quarantine", Some(name)) if self.wants(name) => {
                self.line(&event, &["quarantined", name, &text(&data["reason"])])
            }
            ("divergence", Some(name)) if self.wants(name) => {
                self.line(&event, &["diverged", name, &text(&data["kept"])])
            }
            ("haltLock", Some(name)) if self.wants(name) => {
                self.line(&event, &["halt-lock", name, &text(&data["hostname"])])
            }
            // Heartbeats; and what was missed is made up for by the state after the next connection.
            _ => Ok(()),
        }
    }

    fn line(&mut self, event: &Value, words: &[&str]) -> Result<(), Failure> {
        let line = if self.json { event.to_string() } else { printable(words.join(" ").trim_end()) };
        writeln!(self.out, "{line}").and_then(|()| self.out.flush()).map_err(failure::stdout)
    }
}

fn role_event(role: &RoleStatus) -> Value {
    value(&Event::PrimaryChange { data: RoleData::from(role) })
}

/// The position of a database that is in order.
fn position_event(db: &DatabaseStatus) -> Option<Value> {
    if db.state != DatabaseState::Ok {
        return None;
    }
    let data = TxData {
        txid: db.txid,
        post_apply_checksum: db.checksum,
        page_size: db.page_size,
        commit: db.pages,
        timestamp: db.last_change_unix_ms.unwrap_or_default(),
    };
    Some(value(&Event::Tx { db: crate::DatabaseName::new(&db.name).ok()?, data }))
}

fn value(event: &Event) -> Value {
    serde_json::from_slice(&event.to_line()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake;

    fn printed(databases: &[&str], json: bool, feed: impl FnOnce(&mut Printer<'_>)) -> String {
        let databases: Vec<String> = databases.iter().map(|name| (*name).to_owned()).collect();
        let mut out = Vec::new();
        let (positions, role) = (HashMap::new(), None);
        feed(&mut Printer { databases: &databases, json, out: &mut out, positions, role });
        String::from_utf8(out).unwrap()
    }

    fn tx(txid: u64) -> Value {
        let mut db = fake::status().databases[0].clone();
        db.txid = ltx::Txid(txid);
        position_event(&db).unwrap()
    }

    #[test]
    fn state_and_changes_are_printed_once() {
        let text = printed(&[], false, |printer| {
            printer.state(&fake::status()).unwrap();
            printer.event(tx(42)).unwrap();
            printer.event(tx(43)).unwrap();
            // Connected again: what is known is no news.
            printer.state(&fake::replica()).unwrap();
            printer.event(serde_json::json!({"type": "heartbeat", "data": {}})).unwrap();
            let aside = r#"{"type":"quarantine","db":"a.db","data":{"reason":"page 7"}}"#;
            printer.event(serde_json::from_str(aside).unwrap()).unwrap();
        });
        assert_eq!(
            text,
            "role primary\nposition a.db 000000000000002a/ffffffffffffffff\n\
             position a.db 000000000000002b/ffffffffffffffff\nrole replica host-a\n\
             position a.db 000000000000002a/ffffffffffffffff\nquarantined a.db page 7\n"
        );
    }

    #[test]
    fn with_databases_nothing_else_is_printed() {
        let text = printed(&["b*"], false, |printer| printer.state(&fake::status()).unwrap());
        assert_eq!(text, "");
        let text = printed(&["b*", "a.*"], true, |printer| printer.state(&fake::status()).unwrap());
        let event: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(event["data"]["txID"], "000000000000002a");
    }
}
