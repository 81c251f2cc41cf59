//! The event stream: one JSON object per line, in the form of LiteFS (`{"type","db"?,"data"}`).
//!
//! Every reader has a queue of [`QUEUE_EVENTS`]. One that is too slow is told how many events it missed and
//! disconnected, so that it never takes a gap for silence; when nothing happens it gets a heartbeat.

use super::api::{RoleName, RoleStatus, hex};
use super::handler::Body;
use crate::DatabaseName;
use crate::sync::RuleState;
use bytes::Bytes;
use futures_util::stream;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use ltx::{Checksum, Txid};
use serde::{Serialize, Serializer};
use std::time::Duration;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Instant, Interval, MissedTickBehavior};

/// Events that a reader may be behind.
pub const QUEUE_EVENTS: usize = 1024;

/// Longest silence on the stream.
pub const HEARTBEAT: Duration = Duration::from_secs(5);

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum Event {
    /// First line of every stream: the role at its beginning.
    Init {
        /// The role.
        data: RoleData,
    },
    /// A transaction was committed or applied here.
    Tx {
        /// Database.
        #[serde(serialize_with = "name")]
        db: DatabaseName,
        /// The transaction.
        data: TxData,
    },
    /// The role changed, or the upstream was connected or lost.
    PrimaryChange {
        /// The role now.
        data: RoleData,
    },
    /// A database was set aside.
    Quarantine {
        /// Database.
        #[serde(serialize_with = "name")]
        db: DatabaseName,
        /// Why.
        data: QuarantineData,
    },
    /// This node had transactions of its own, which are kept as files.
    Divergence {
        /// Database.
        #[serde(serialize_with = "name")]
        db: DatabaseName,
        /// Where they are.
        data: DivergenceData,
    },
    /// Another host than the primary may write a database from now on, or may not any more; told on both.
    HaltLock {
        /// Database.
        #[serde(serialize_with = "name")]
        db: DatabaseName,
        /// Who has it.
        data: HaltLockData,
    },
    /// Commits that wait for followers fare differently now.
    Sync {
        /// How.
        data: SyncData,
    },
    /// Nothing happened for a while.
    Heartbeat {
        /// When.
        data: HeartbeatData,
    },
    /// Last line for a reader that was too slow.
    Overflow {
        /// How much it missed.
        data: OverflowData,
    },
}

/// Role in an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RoleData {
    /// Whether this node is the primary.
    pub is_primary: bool,
    /// The role; LiteFS does not tell it.
    pub role: RoleName,
    /// Host name of the upstream, when one is connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
}

impl From<&RoleStatus> for RoleData {
    fn from(role: &RoleStatus) -> Self {
        let upstream = role.upstream.as_ref().filter(|upstream| upstream.connected);
        RoleData {
            is_primary: role.name == RoleName::Primary,
            role: role.name,
            hostname: upstream.and_then(|upstream| upstream.hostname.clone()),
        }
    }
}

/// Transaction in an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TxData {
    /// Its number.
    #[serde(rename = "txID", with = "hex")]
    pub txid: Txid,
    /// Checksum of the database after it.
    #[serde(with = "hex")]
    pub post_apply_checksum: Checksum,
    /// Bytes in a page.
    pub page_size: u32,
    /// Size of the database in pages; 0 when it was dropped.
    pub commit: u32,
    /// When it was committed on the primary, in milliseconds since 1970; RFC 3339 in the stream.
    #[serde(serialize_with = "timestamp")]
    pub timestamp: i64,
}

/// Why a database was set aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QuarantineData {
    /// Why.
    pub reason: String,
}

/// Where a diverged history is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DivergenceData {
    /// Directory of the files.
    pub kept: std::path::PathBuf,
}

/// A halt lock on a database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HaltLockData {
    /// The host that has it; none: it was released, or lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
}

/// How commits fare that wait for followers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SyncData {
    /// Names and patterns of databases.
    pub databases: Vec<String>,
    /// How they fare.
    pub state: RuleState,
    /// So many members must have a commit.
    pub acks: usize,
    /// So many are connected.
    pub connected: usize,
}

/// A sign of life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeartbeatData {
    /// This node's clock, in milliseconds since 1970; RFC 3339 in the stream.
    #[serde(serialize_with = "timestamp")]
    pub timestamp: i64,
}

/// What a slow reader missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OverflowData {
    /// Events.
    pub missed: u64,
}

fn name<S: Serializer>(name: &DatabaseName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(name.as_str())
}

fn timestamp<S: Serializer>(unix_ms: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    // Years outside of what RFC 3339 can say come from a broken clock.
    let time = jiff::Timestamp::from_millisecond(*unix_ms).unwrap_or_default();
    serializer.collect_str(&format_args!("{time:.3}"))
}

impl Event {
    /// The event as one line.
    pub fn to_line(&self) -> Bytes {
        let mut line = serde_json::to_vec(self).expect("events are plain JSON");
        line.push(b'\n');
        line.into()
    }
}

/// Where the node publishes events. Cheap to clone; the streams end when the last one is dropped.
#[derive(Clone, Debug)]
pub struct EventBus {
    sender: broadcast::Sender<Event>,
}

impl Default for EventBus {
    fn default() -> Self {
        EventBus { sender: broadcast::Sender::new(QUEUE_EVENTS) }
    }
}

impl EventBus {
    /// Tells all readers; never waits.
    pub fn publish(&self, event: Event) {
        // An error only says that nobody listens.
        let _ = self.sender.send(event);
    }

    /// Whether anybody listens: building an event may cost something.
    pub fn has_readers(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }
}

struct Reader {
    first: Option<Event>,
    events: broadcast::Receiver<Event>,
    heartbeat: Interval,
    ended: bool,
}

/// The body of an event stream that begins with `init`.
pub(super) fn body(init: RoleData, events: broadcast::Receiver<Event>, heartbeat: Duration) -> Body {
    let mut interval = tokio::time::interval_at(Instant::now() + heartbeat, heartbeat);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let reader =
        Reader { first: Some(Event::Init { data: init }), events, heartbeat: interval, ended: false };
    let lines = stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(Frame::data(event.to_line())), reader))
    });
    BodyExt::boxed_unsync(StreamBody::new(lines))
}

impl Reader {
    async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        tokio::select! {
            biased;
            event = self.events.recv() => {
                self.heartbeat.reset();
                match event {
                    Ok(event) => Some(event),
                    Err(RecvError::Lagged(missed)) => {
                        self.ended = true;
                        Some(Event::Overflow { data: OverflowData { missed } })
                    }
                    Err(RecvError::Closed) => None,
                }
            }
            _ = self.heartbeat.tick() => {
                let timestamp = jiff::Timestamp::now().as_millisecond();
                Some(Event::Heartbeat { data: HeartbeatData { timestamp } })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tx(txid: u64) -> Event {
        Event::Tx {
            db: DatabaseName::new("app/a.db").unwrap(),
            data: TxData {
                txid: Txid(txid),
                post_apply_checksum: Checksum(0xad2d_ffe3_3333_3333),
                page_size: 4096,
                commit: 2,
                timestamp: 1000,
            },
        }
    }

    async fn line(body: &mut Body) -> Option<String> {
        let frame = body.frame().await?.unwrap();
        Some(String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap())
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_stream_begins_with_the_role_and_ends_with_the_bus() {
        let bus = EventBus::default();
        let init = RoleData { is_primary: false, role: RoleName::Replica, hostname: Some("host-a".into()) };
        let mut body = body(init, bus.subscribe(), LONG);
        bus.publish(tx(42));
        drop(bus);
        assert_eq!(
            line(&mut body).await.unwrap(),
            "{\"type\":\"init\",\"data\":{\"isPrimary\":false,\"role\":\"replica\",\"hostname\":\"host-a\"}}\n"
        );
        assert_eq!(
            line(&mut body).await.unwrap(),
            "{\"type\":\"tx\",\"db\":\"app/a.db\",\"data\":{\"txID\":\"000000000000002a\",\"postApplyChecksum\":\
             \"ad2dffe333333333\",\"pageSize\":4096,\"commit\":2,\"timestamp\":\"1970-01-01T00:00:01.000Z\"}}\n"
        );
        assert_eq!(line(&mut body).await, None);
    }

    #[tokio::test]
    async fn a_slow_reader_is_told_what_it_missed_and_disconnected() {
        let bus = EventBus::default();
        let mut body = body(
            RoleData { is_primary: true, role: RoleName::Primary, hostname: None },
            bus.subscribe(),
            LONG,
        );
        for txid in 0..QUEUE_EVENTS as u64 + 7 {
            bus.publish(tx(txid));
        }
        assert_eq!(
            line(&mut body).await.unwrap(),
            "{\"type\":\"init\",\"data\":{\"isPrimary\":true,\"role\":\"primary\"}}\n"
        );
        assert_eq!(line(&mut body).await.unwrap(), "{\"type\":\"overflow\",\"data\":{\"missed\":7}}\n");
        assert_eq!(line(&mut body).await, None);
    }

    #[tokio::test]
    async fn silence_is_broken_by_heartbeats() {
        let bus = EventBus::default();
        let init = RoleData { is_primary: true, role: RoleName::Primary, hostname: None };
        let mut body = body(init, bus.subscribe(), Duration::from_millis(1));
        line(&mut body).await.unwrap();
        for _ in 0..2 {
            let heartbeat = line(&mut body).await.unwrap();
            assert!(
                heartbeat.starts_with("{\"type\":\"heartbeat\",\"data\":{\"timestamp\":\"2"),
                "{heartbeat}"
            );
        }
        bus.publish(tx(1));
        let mut next = line(&mut body).await.unwrap();
        while next.contains("heartbeat") {
            next = line(&mut body).await.unwrap();
        }
        assert!(next.contains("\"txID\":\"0000000000000001\""));
    }
}
