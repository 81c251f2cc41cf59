//! `litefs wait`: until this host is what is asked for.

use super::client::Client;
use super::failure::{self, Failure};
use super::watch::Lines;
use crate::status::Status;
use crate::status::api::{DatabaseState, RoleName};
use clap::Args;
use ltx::{Checksum, Txid};
use std::time::Duration;
use tokio::time::Instant;

/// Between looks while nothing is told, or the agent is not there.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Between looks while very much is told.
const LOOK_MIN: Duration = Duration::from_millis(20);

/// What is waited for.
#[derive(Args, Debug, Clone)]
#[command(group = clap::ArgGroup::new("condition").required(true).multiple(true))]
pub struct Conditions {
    /// Role of this host
    #[arg(long, group = "condition", value_parser = ["primary", "replica"])]
    role: Option<String>,
    /// Position of a database on this host, or a later one, such as app.db=000000000000002a; may be repeated
    #[arg(long, group = "condition", value_name = "DATABASE=TXID", value_parser = position)]
    position: Vec<Wanted>,
    /// Applications on this host see all that the primary had when it was last heard
    #[arg(long, group = "condition")]
    caught_up: bool,
    /// Longest time to wait, such as 30s [default: for ever]
    #[arg(long, value_parser = duration)]
    timeout: Option<Duration>,
}

/// A position that is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    database: String,
    txid: Txid,
    /// Tells another history that has the same TXID.
    checksum: Option<Checksum>,
}

fn position(text: &str) -> Result<Wanted, String> {
    let (database, position) =
        text.rsplit_once('=').ok_or("write DATABASE=TXID, such as app.db=000000000000002a")?;
    let (txid, checksum) = match position.split_once('/') {
        Some((txid, checksum)) => (txid, Some(checksum)),
        None => (position, None),
    };
    let hex = |what: &str| format!("{what} is 16 hexadecimal digits, as `litefs list` shows it");
    Ok(Wanted {
        database: database.to_owned(),
        txid: txid.parse().map_err(|_| hex("a TXID"))?,
        checksum: checksum.map(str::parse).transpose().map_err(|_| hex("a checksum"))?,
    })
}

pub fn duration(text: &str) -> Result<Duration, String> {
    jiff::fmt::friendly::SpanParser::new()
        .parse_unsigned_duration(text)
        .map_err(|_| "must be a duration such as \"100ms\", \"5s\" or \"10m\"".to_owned())
}

impl Conditions {
    /// This host is primary and takes writes.
    pub fn primary(timeout: Option<Duration>) -> Conditions {
        Conditions { role: Some("primary".into()), position: Vec::new(), caught_up: false, timeout }
    }

    /// What is not as it should be; nothing when all is.
    fn missing(&self, status: &Status) -> Option<String> {
        if let Some(role) = &self.role
            && status.role.name.as_str() != role
        {
            return Some(format!("this host is {}", describe(status.role.name)));
        }
        if self.role.as_deref() == Some("primary")
            && let Some(why) = &status.role.waits
        {
            return Some(format!("this host is the primary and takes no writes: {why}"));
        }
        for wanted in &self.position {
            let db = status.databases.iter().find(|db| db.name == wanted.database);
            let Some(db) = db else {
                return Some(format!("there is no database {} yet", wanted.database));
            };
            let other_history =
                db.txid == wanted.txid && wanted.checksum.is_some_and(|checksum| checksum != db.checksum);
            if db.state != DatabaseState::Ok || db.txid < wanted.txid || other_history {
                return Some(format!("{} is at {}/{}", db.name, db.txid, db.checksum));
            }
        }
        if self.caught_up && !status.caught_up {
            let connected = status.role.upstream.as_ref().is_some_and(|upstream| upstream.connected);
            return Some(if connected { "it is behind" } else { "it is not connected" }.to_owned());
        }
        None
    }
}

fn describe(role: RoleName) -> &'static str {
    match role {
        RoleName::Primary => "the primary",
        RoleName::Replica => "a replica",
        RoleName::None => "neither primary nor replica",
    }
}

pub async fn wait(client: &Client, conditions: &Conditions) -> Result<u8, Failure> {
    let mut missing = "its agent did not answer".to_owned();
    let waiting = async {
        loop {
            match look(client, conditions, &mut missing).await {
                Ok(()) => return Ok(0),
                Err(error) if matches!(error.code, failure::NO_AGENT | failure::IO) => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(error) => return Err(error),
            }
        }
    };
    let timeout = conditions.timeout.unwrap_or(Duration::MAX);
    match tokio::time::timeout(timeout, waiting).await {
        Ok(done) => done,
        Err(_) => Err(Failure::new(
            failure::TRY_AGAIN,
            format_args!("not within {}: {missing}", crate::config::show_duration(timeout)),
        )),
    }
}

/// Looks again whenever the agent tells something, until all is as it should be.
async fn look(client: &Client, conditions: &Conditions, missing: &mut String) -> Result<(), Failure> {
    let mut lines = Lines::open(client).await?;
    loop {
        let begun = Instant::now();
        match conditions.missing(&client.status().await?) {
            None => return Ok(()),
            Some(what) => *missing = what,
        }
        match tokio::time::timeout(LOOK_EVERY, lines.next()).await {
            // The stream ended: it begins anew.
            Ok(None) => lines = Lines::open(client).await?,
            Ok(Some(_)) => tokio::time::sleep_until(begun + LOOK_MIN).await,
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake;

    fn conditions() -> Conditions {
        Conditions { role: None, position: Vec::new(), caught_up: false, timeout: None }
    }

    #[test]
    fn each_condition_is_looked_at() {
        let (primary, mut replica) = (fake::status(), fake::replica());
        let role = Conditions { role: Some("primary".into()), ..conditions() };
        assert_eq!(role.missing(&primary), None);
        assert_eq!(role.missing(&replica).unwrap(), "this host is a replica");

        let at = |text: &str| Conditions { position: vec![position(text).unwrap()], ..conditions() };
        assert_eq!(at("a.db=000000000000002a").missing(&primary), None);
        assert_eq!(at("a.db=0000000000000001/0000000000000001").missing(&primary), None);
        assert_eq!(at("a.db=000000000000002a/ffffffffffffffff").missing(&primary), None);
        let missing = at("a.db=000000000000002b").missing(&primary).unwrap();
        assert_eq!(missing, "a.db is at 000000000000002a/ffffffffffffffff");
        assert!(at("a.db=000000000000002a/fffffffffffffffe").missing(&primary).is_some());
        assert!(at("b.db=0000000000000001").missing(&primary).unwrap().contains("no database b.db"));

        let caught_up = Conditions { caught_up: true, ..conditions() };
        replica.caught_up = false;
        assert_eq!(caught_up.missing(&replica).unwrap(), "it is behind");
        assert_eq!(caught_up.missing(&primary), None);
    }

    #[test]
    fn one_condition_is_needed_and_several_are_allowed() {
        #[derive(clap::Parser, Debug)]
        struct Line {
            #[command(flatten)]
            _conditions: Conditions,
        }
        let parse = |arguments: &[&str]| {
            <Line as clap::Parser>::try_parse_from([&["wait"], arguments].concat()).map(|_| ())
        };
        assert!(parse(&["--timeout", "1s"]).is_err());
        assert!(parse(&["--caught-up"]).is_ok());
        let all = ["--role", "replica", "--caught-up", "--position", "a=000000000000002a", "--timeout", "1s"];
        assert!(parse(&all).is_ok());
        assert!(parse(&["--role", "boss"]).is_err());
    }

    #[test]
    fn positions_are_checked() {
        assert_eq!(position("x=y.db=000000000000002a").unwrap().database, "x=y.db");
        for bad in ["a.db", "a.db=42", "a.db=000000000000002a/1"] {
            assert!(position(bad).is_err(), "{bad}");
        }
    }
}
