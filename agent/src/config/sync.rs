//! `[sync]` and `[[sync-rule]]`: how many followers must have a commit before it counts.
//!
//! The first rule that names a database is for it; what a rule does not say is as in `[sync]`.

use super::problem::{Origin, Problem, nearest};
use super::value::{Value, show_duration};
use super::{keys, pattern_matches};
use glob::Pattern;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;
use toml::Spanned;
use toml::de::DeValue;

/// Name of the array of tables.
pub const SYNC_TABLE: &str = "sync-rule";

/// Keys of a rule: name, default, and what it means.
pub const SYNC_RULE_KEYS: [(&str, &str, &str); 5] = [
    (
        "databases",
        "required",
        "Databases: names and patterns with `*`, `?` and `[...]`, which do not match '/', and `**`, which does.",
    ),
    ("acks", "as in `[sync]`", "As `sync.acks`; 0: these databases are replicated asynchronously."),
    ("members", "as in `[sync]`", "As `sync.members`."),
    ("timeout", "as in `[sync]`", "As `sync.timeout`."),
    ("on-timeout", "as in `[sync]`", "As `sync.on-timeout`."),
];

/// Names of `on-timeout`.
pub(super) const ON_TIMEOUT: [(&str, OnTimeout); 3] =
    [("wait", OnTimeout::Wait), ("degrade", OnTimeout::Degrade), ("refuse", OnTimeout::Refuse)];

/// What happens to commits that too few followers have in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// They wait on.
    Wait,
    /// They succeed, and so do later ones, until followers have caught up.
    Degrade,
    /// They wait on; later ones fail until followers have caught up.
    Refuse,
}

impl OnTimeout {
    /// As the configuration calls it.
    pub fn as_str(self) -> &'static str {
        ON_TIMEOUT.iter().find(|(_, it)| *it == self).map_or("", |(name, _)| name)
    }
}

/// Who must have a commit before it counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SyncPolicy {
    /// So many followers must have it in their logs; 0: none, replication is asynchronous.
    pub acks: usize,
    /// Names of the hosts that count, this one may be among them; none: every follower counts.
    pub members: Vec<String>,
    /// After so long `on_timeout` happens.
    #[serde(serialize_with = "super::sections::duration")]
    pub timeout: Duration,
    /// What happens after the time-out.
    pub on_timeout: OnTimeout,
}

/// A policy for some databases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncRule {
    /// Names and patterns.
    pub databases: Vec<String>,
    /// What holds for them.
    pub policy: SyncPolicy,
}

impl Default for SyncPolicy {
    fn default() -> Self {
        SyncPolicy {
            acks: 0,
            members: Vec::new(),
            timeout: Duration::from_secs(5),
            on_timeout: OnTimeout::Wait,
        }
    }
}

impl SyncPolicy {
    /// What is wrong with it on the host `node`, and what to do.
    pub(super) fn problem(&self, node: &str) -> Option<(String, &'static str)> {
        let distinct: BTreeSet<&str> = self.members.iter().map(String::as_str).collect();
        if distinct.len() < self.members.len() {
            return Some(("names a member twice".to_owned(), "each host counts once"));
        }
        let others = distinct.iter().filter(|member| **member != node).count();
        if self.acks > others && !self.members.is_empty() {
            return Some((
                format!(
                    "needs {} acknowledgements, but has {others} members besides this host {node}",
                    self.acks
                ),
                "no commit could ever succeed: name more members, or need fewer acknowledgements",
            ));
        }
        None
    }

    /// Whether a follower of this name counts.
    pub fn counts(&self, follower: &str) -> bool {
        self.members.is_empty() || self.members.iter().any(|member| member == follower)
    }
}

impl SyncRule {
    /// Whether it is for a database.
    pub fn is_for(&self, database: &str) -> bool {
        self.databases.iter().any(|pattern| pattern_matches(pattern, database))
    }

    /// The rule as TOML.
    pub(super) fn to_toml(&self) -> String {
        let list = |list: &[String]| toml::Value::from(list.to_vec()).to_string();
        let mut out = format!("\n[[{SYNC_TABLE}]]\ndatabases = {}\n", list(&self.databases));
        let policy = &self.policy;
        let _ = writeln!(out, "acks = {}\nmembers = {}", policy.acks, list(&policy.members));
        let _ = writeln!(out, "timeout = {:?}", show_duration(policy.timeout));
        let _ = writeln!(out, "on-timeout = {:?}", policy.on_timeout.as_str());
        out
    }
}

/// A rule before it is known what `[sync]` says.
#[derive(Debug, Default)]
pub(super) struct UnfinishedRule {
    origin: Option<Origin>,
    databases: Option<Vec<String>>,
    acks: Option<usize>,
    members: Option<Vec<String>>,
    timeout: Option<Duration>,
    on_timeout: Option<OnTimeout>,
}

impl UnfinishedRule {
    pub(super) fn finish(self, general: &SyncPolicy) -> (Option<Origin>, SyncRule) {
        let policy = SyncPolicy {
            acks: self.acks.unwrap_or(general.acks),
            members: self.members.unwrap_or_else(|| general.members.clone()),
            timeout: self.timeout.unwrap_or(general.timeout),
            on_timeout: self.on_timeout.unwrap_or(general.on_timeout),
        };
        (self.origin, SyncRule { databases: self.databases.unwrap_or_default(), policy })
    }

    fn read_key(&mut self, key: &str, value: &DeValue<'_>) -> Result<(), String> {
        let bad = |message: String| format!("{SYNC_TABLE}.{key} {message}");
        let value = Value::from_toml(value);
        match key {
            "databases" => {
                let patterns = value.texts().map_err(bad)?;
                for pattern in &patterns {
                    Pattern::new(pattern)
                        .map_err(|error| bad(format!("has a bad pattern {pattern:?}: {error}")))?;
                }
                self.databases = Some(patterns);
            }
            "acks" => self.acks = Some(value.integer(0, ACKS_MAX).map_err(bad)? as usize),
            "members" => self.members = Some(members(&value).map_err(bad)?),
            "timeout" => self.timeout = Some(value.duration(TIMEOUT_MIN).map_err(bad)?),
            "on-timeout" => self.on_timeout = Some(keys::choice(&value, ON_TIMEOUT).map_err(bad)?),
            _ => {
                let near = nearest(key, SYNC_RULE_KEYS.iter().map(|(name, _, _)| *name));
                let near = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                return Err(format!("unknown key {SYNC_TABLE}.{key}{near}"));
            }
        }
        Ok(())
    }
}

/// More followers than any fleet has of one primary.
pub(super) const ACKS_MAX: i64 = 100;
/// A shorter one would only measure the network.
pub(super) const TIMEOUT_MIN: Duration = Duration::from_millis(10);

/// Names of hosts.
pub(super) fn members(value: &Value) -> Result<Vec<String>, String> {
    let members = value.texts()?;
    members.iter().try_for_each(|member| keys::check_host(member))?;
    Ok(members)
}

/// Reads the `[[sync-rule]]` tables of one file.
pub(super) fn read(
    tables: &[Spanned<DeValue<'_>>],
    at: &dyn Fn(usize) -> Origin,
    rules: &mut Vec<UnfinishedRule>,
    problems: &mut Vec<Problem>,
) {
    for table in tables {
        let origin = at(table.span().start);
        let DeValue::Table(keys) = table.get_ref() else {
            problems.push(not_an_array(origin));
            continue;
        };
        let mut rule = UnfinishedRule { origin: Some(origin.clone()), ..UnfinishedRule::default() };
        for (key, value) in keys {
            if let Err(message) = rule.read_key(key.get_ref(), value.get_ref()) {
                problems.push(Problem { origin: Some(at(value.span().start)), message, help: None });
            }
        }
        if rule.databases.as_ref().is_none_or(Vec::is_empty) {
            let message = format!("{SYNC_TABLE} needs databases");
            let help = Some("name at least one database, or \"**\" for all".to_owned());
            problems.push(Problem { origin: Some(origin), message, help });
        }
        rules.push(rule);
    }
}

/// `[sync-rule]`, or `sync-rule = ...`, instead of `[[sync-rule]]`.
pub(super) fn not_an_array(origin: Origin) -> Problem {
    Problem {
        origin: Some(origin),
        message: format!("{SYNC_TABLE} is not an array of tables"),
        help: Some(format!("write [[{SYNC_TABLE}]] and its keys below it, once for each rule")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ConfigError, Source};

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.toml");
        std::fs::write(&file, format!("[node]\nname = \"a\"\n{text}")).unwrap();
        Config::load(&Source { file: Some(file), ..Source::default() })
    }

    #[test]
    fn rules_take_from_the_table_what_they_do_not_say() {
        let config = load(
            "[sync]\nacks = 1\nmembers = [\"a\", \"b\", \"c\"]\non-timeout = \"degrade\"\n\
             [[sync-rule]]\ndatabases = [\"money/*\"]\nacks = 2\ntimeout = \"1s\"\n\
             [[sync-rule]]\ndatabases = \"cache.db\"\nacks = 0\n",
        )
        .unwrap();
        let (money, cache) = (&config.sync_rules[0], &config.sync_rules[1]);
        assert!(money.is_for("money/a.db") && !money.is_for("money.db"));
        assert_eq!((money.policy.acks, money.policy.on_timeout), (2, OnTimeout::Degrade));
        assert_eq!(
            (money.policy.timeout, cache.policy.timeout),
            (Duration::from_secs(1), Duration::from_secs(5))
        );
        assert_eq!((cache.policy.acks, &cache.policy.members), (0, &config.sync.members));
        let shown = config.to_toml();
        let again: toml::Table = shown.parse().unwrap();
        assert_eq!(again["sync-rule"].as_array().unwrap().len(), 2, "{shown}");
    }

    #[test]
    fn what_can_never_succeed_is_a_mistake() {
        let mistake = |text: &str| load(text).unwrap_err().to_string();
        assert!(
            mistake("[sync]\nacks = 2\nmembers = [\"a\", \"b\"]")
                .contains("has 1 members besides this host a")
        );
        assert!(mistake("[sync]\nacks = 1\nmembers = [\"b\", \"b\"]").contains("twice"));
        assert!(mistake("[sync]\nacks = 1\n[preload]\nhold = \"never\"").contains("preload.hold"));
        let rule = "[[sync-rule]]\ndatabases = [\"**\"]\nacks = 1\nmembers = [\"a\"]";
        assert!(mistake(rule).contains("f.toml:3:1"), "{}", mistake(rule));
        assert!(mistake("[[sync-rule]]\nacks = 1").contains("needs databases"));
        assert!(mistake("[[sync-rule]]\ndatabases = \"a\"\nack = 1").contains("did you mean acks?"));
        assert!(mistake("[sync]\non-timeout = \"fail\"").contains("\"refuse\""));
    }
}
