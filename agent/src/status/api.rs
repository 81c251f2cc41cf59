//! What `GET /v1/status` says, as JSON. Fields may be added; readers ignore those that they do not know.
//!
//! TXIDs, checksums and node ids are strings of 16 hex digits (JSON numbers are not exact above 2^53); points
//! in time are milliseconds since 1970.

use crate::sync::RuleState;
use ltx::{Checksum, Txid};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Cluster that it belongs to.
    pub cluster: String,
    /// The host.
    pub node: NodeStatus,
    /// What it may do now.
    pub role: RoleStatus,
    /// Whether applications on this host can see all that the upstream has told of; a primary is.
    #[serde(default)]
    pub caught_up: bool,
    /// Where applications meet it.
    pub mount: MountStatus,
    /// All databases, by name.
    pub databases: Vec<DatabaseStatus>,
    /// Nodes that follow this one now.
    pub followers: Vec<FollowerStatus>,
    /// On a primary, how commits fare that wait for followers: one for each rule of the configuration.
    #[serde(default)]
    pub sync: Vec<SyncStatus>,
    /// The commit log.
    pub log: LogStatus,
    /// Files in the cluster's directory that are no SQLite databases and stay on this host.
    #[serde(default)]
    pub files_not_replicated: Vec<String>,
}

/// The host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Its identity.
    #[serde(with = "hex")]
    pub id: NodeId,
    /// Version of the agent.
    pub version: String,
}

/// A node's identity; shown as 16 upper-case hex digits, as LiteFS shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016X}", self.0)
    }
}

impl std::str::FromStr for NodeId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match u64::from_str_radix(text, 16) {
            Ok(id) if text.len() == 16 => Ok(NodeId(id)),
            _ => Err(format!("{text:?} is not a node id of 16 hex digits")),
        }
    }
}

/// What the node may do now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleStatus {
    /// The role.
    pub name: RoleName,
    /// Newest epoch that the node knows.
    pub epoch: u64,
    /// When the role began.
    pub since_unix_ms: i64,
    /// Whom a replica follows.
    pub upstream: Option<UpstreamStatus>,
    /// Why there is no primary, as far as this node can tell: what it waits for before it becomes one, or writes.
    #[serde(default)]
    pub waits: Option<String>,
}

/// A role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoleName {
    /// Takes writes.
    Primary,
    /// Follows.
    Replica,
    /// Neither: nobody to follow.
    None,
}

impl RoleName {
    /// The name as it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            RoleName::Primary => "primary",
            RoleName::Replica => "replica",
            RoleName::None => "none",
        }
    }
}

/// Whom a replica follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamStatus {
    /// Its address.
    pub url: String,
    /// The name it gave itself; unknown before the first connection.
    pub hostname: Option<String>,
    /// Whether the stream is up.
    pub connected: bool,
    /// When something last arrived.
    pub last_heartbeat_unix_ms: Option<i64>,
}

/// Where applications meet the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStatus {
    /// The directory.
    pub dir: PathBuf,
    /// Kind of door: `"fuse"`.
    pub door: String,
    /// Whether the kernel reads and writes backing files itself.
    pub passthrough: bool,
}

/// One database.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatabaseStatus {
    /// Path below the cluster's directory.
    pub name: String,
    /// Its position: last transaction, ...
    #[serde(with = "hex")]
    pub txid: Txid,
    /// ... and the checksum after it.
    #[serde(with = "hex")]
    pub checksum: Checksum,
    /// Bytes in a page; 0 while it has none.
    pub page_size: u32,
    /// Size in pages.
    pub pages: u32,
    /// Size in bytes.
    pub size_bytes: u64,
    /// `"wal"` or `"rollback"` (the file does not tell DELETE, TRUNCATE and PERSIST apart).
    pub journal_mode: String,
    /// Whether it is replicated.
    pub state: DatabaseState,
    /// Why it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How far it is behind the upstream; nothing on a primary, or when unknown.
    pub lag: Option<Lag>,
    /// Frames in the WAL.
    pub wal_frames: u64,
    /// Handles that applications have open.
    pub open_handles: u64,
    /// Name of the host that writes it under a halt lock, on that host and on the primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub halt_lock: Option<String>,
    /// When its last transaction was committed; nothing when unknown.
    pub last_change_unix_ms: Option<i64>,
}

/// Whether a database is replicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatabaseState {
    /// It is.
    Ok,
    /// It cannot be trusted and stands aside.
    Quarantined,
}

/// How far a database is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// Transactions.
    pub transactions: u64,
    /// Bytes of LTX records; nothing when unknown.
    pub bytes: Option<u64>,
    /// Milliseconds.
    pub ms: u64,
}

/// A node that follows this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowerStatus {
    /// Its identity.
    #[serde(with = "hex")]
    pub node_id: NodeId,
    /// Its name.
    pub name: String,
    /// The other end of its connection.
    pub address: String,
    /// When it connected.
    pub connected_since_unix_ms: i64,
    /// How far it is.
    pub databases: Vec<FollowerDatabase>,
}

/// How far a follower is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowerDatabase {
    /// Database.
    pub name: String,
    /// Last transaction it acknowledged.
    #[serde(with = "hex")]
    pub txid: Txid,
    /// Transactions that it has not acknowledged.
    pub lag_transactions: u64,
}

/// A rule for synchronous commits, and how they fare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// Names and patterns of its databases; `**` for all that have no other rule.
    pub databases: Vec<String>,
    /// So many members must have a commit.
    pub acks: usize,
    /// Names of hosts that count; none: all followers.
    pub members: Vec<String>,
    /// Of those, the ones that are connected; without members, all followers.
    pub connected: Vec<String>,
    /// What happens to commits that are not acknowledged within `timeout_ms`: `wait`, `degrade` or `refuse`.
    pub on_timeout: String,
    /// Milliseconds.
    pub timeout_ms: u64,
    /// How commits fare.
    pub state: RuleState,
    /// Commits that wait now.
    pub waiting: u64,
    /// How long the oldest of them has waited, in milliseconds.
    pub oldest_wait_ms: Option<u64>,
}

impl SyncStatus {
    /// What is wrong, if anything is.
    pub fn trouble(&self) -> Option<String> {
        let what = match self.state {
            RuleState::Synchronous => return None,
            RuleState::Waiting => "commits wait for acknowledgements",
            RuleState::Degraded => "commits succeed WITHOUT acknowledgements",
            RuleState::Refusing => "commits are refused",
        };
        let (databases, connected) = (self.databases.join(", "), self.connected.len());
        Some(format!("{databases}: {what} of {} members, {connected} are connected", self.acks))
    }
}

/// The commit log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogStatus {
    /// First byte that is kept.
    pub oldest_lsn: u64,
    /// Everything before this byte is durable.
    pub durable_lsn: u64,
    /// Bytes on disk.
    pub bytes: u64,
}

/// What is wrong with a node of this role that has these databases set aside (name, reason): one sentence each.
pub fn troubles<'a>(
    role: &RoleStatus,
    aside: impl Iterator<Item = (&'a str, Option<&'a str>)>,
) -> Vec<String> {
    let mut troubles = Vec::new();
    match (role.name, &role.upstream) {
        (RoleName::Replica, Some(upstream)) if !upstream.connected => {
            troubles.push(format!("not connected to the upstream {}: nothing new arrives", upstream.url));
        }
        (RoleName::Replica, None) => {
            troubles.push("a replica without an upstream: nothing new arrives".to_owned())
        }
        (RoleName::None, _) => troubles.push("neither primary nor replica: writes are refused".to_owned()),
        _ => {}
    }
    troubles.extend(role.waits.iter().map(|why| format!("this node does not take writes: {why}")));
    troubles.extend(aside.map(|(name, reason)| {
        format!("database {name} is quarantined: {}", reason.unwrap_or("for an unknown reason"))
    }));
    troubles
}

/// Text of 16 hex digits for types that display and parse as that.
pub(crate) mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::borrow::Cow;
    use std::fmt::Display;
    use std::str::FromStr;

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr,
        T::Err: Display,
        D: Deserializer<'de>,
    {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_survives_json_and_keeps_64_bits() {
        let status = crate::status::fake::status();
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["databases"][0]["checksum"], "ffffffffffffffff");
        assert_eq!(json["databases"][0]["txid"], "000000000000002a");
        assert_eq!(json["node"]["id"], "00000000000000AB");
        assert_eq!(json["role"]["name"], "primary");
        assert_eq!(json["databases"][0]["lag"], serde_json::Value::Null);
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), status);
    }

    #[test]
    fn fields_of_a_newer_agent_are_ignored_and_bad_ids_are_errors() {
        let mut json = serde_json::to_value(crate::status::fake::status()).unwrap();
        json["tomorrow"] = true.into();
        assert!(serde_json::from_value::<Status>(json.clone()).is_ok());
        json["node"]["id"] = "12".into();
        assert!(serde_json::from_value::<Status>(json).unwrap_err().to_string().contains("16 hex digits"));
    }
}
