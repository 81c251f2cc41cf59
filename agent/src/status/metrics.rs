//! Prometheus metrics: counters that the node keeps, and gauges read from its status at each scrape.
//!
//! Names that LiteFS has are kept as they are, `litefs_db_commit_count` too, though it counts: OpenMetrics would
//! append `_total` to a counter, so such metrics have no type.

use super::api::{RoleName, Status};
use crate::DatabaseName;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, EncodeMetric, MetricEncoder,
};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A number that only grows, shared by its clones.
#[derive(Clone, Debug, Default)]
pub struct Count(Arc<AtomicU64>);

impl Count {
    /// Adds to it.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// What it is.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl TypedMetric for Count {
    const TYPE: MetricType = MetricType::Unknown;
}

impl EncodeMetric for Count {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_gauge(&self.get())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DatabaseLabel {
    db: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FollowerLabel {
    db: String,
    node: String,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SyncLabel {
    databases: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SyncStateLabel {
    databases: String,
    state: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HookLabel {
    hook: String,
    result: &'static str,
}

/// Counters of one database. Cheap to clone; kept with the database so that a commit looks nothing up.
#[derive(Clone, Debug)]
pub struct DatabaseCounts {
    /// Transactions committed on this node.
    pub commits: Count,
    /// Transactions applied from an upstream.
    pub applies: Count,
}

/// All counters of a node.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    commits: Family<DatabaseLabel, Count>,
    applies: Family<DatabaseLabel, Count>,
    fsync: Histogram,
    hooks: Family<HookLabel, Count>,
    sync_wait: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let commits = Family::default();
        let applies = Family::default();
        // From 20 microseconds (a disk with a write cache) to 10 seconds (a disk that is about to fail).
        let fsync = Histogram::new(exponential_buckets(20e-6, 2.0, 20));
        registry.register("litefs_db_commit_count", "Transactions committed on this node", commits.clone());
        registry.register("litefs_db_apply_count", "Transactions applied from the upstream", applies.clone());
        registry.register("litefs_log_fsync_seconds", "Time to make the commit log durable", fsync.clone());
        let hooks = Family::default();
        registry.register("litefs_hook_run_count", "Runs of a hook", hooks.clone());
        // From a fast network with fast disks to a time-out.
        let sync_wait = Histogram::new(exponential_buckets(100e-6, 2.0, 20));
        registry.register(
            "litefs_sync_wait_seconds",
            "Time that a synchronous commit waited for followers",
            sync_wait.clone(),
        );
        Metrics { registry, commits, applies, fsync, hooks, sync_wait }
    }
}

impl Metrics {
    /// The counters of a database; they begin at 0 when it is new.
    pub fn database(&self, name: &DatabaseName) -> DatabaseCounts {
        let label = DatabaseLabel { db: name.to_string() };
        DatabaseCounts {
            commits: self.commits.get_or_create_owned(&label),
            applies: self.applies.get_or_create_owned(&label),
        }
    }

    /// Drops the counters of a database that is gone.
    pub fn forget(&self, name: &DatabaseName) {
        let label = DatabaseLabel { db: name.to_string() };
        self.commits.remove(&label);
        self.applies.remove(&label);
    }

    /// Counts one fsync of the commit log.
    pub fn fsynced(&self, took: Duration) {
        self.fsync.observe(took.as_secs_f64());
    }

    /// Counts one commit that waited for followers.
    pub fn acknowledged(&self, waited: Duration) {
        self.sync_wait.observe(waited.as_secs_f64());
    }

    /// Counts one run of a hook.
    pub fn hook_ran(&self, hook: &str, success: bool) {
        let result = if success { "success" } else { "failure" };
        self.hooks.get_or_create_owned(&HookLabel { hook: hook.to_owned(), result }).add(1);
    }

    /// All metrics as text.
    pub fn render(&self, status: Status, now_unix_ms: i64) -> String {
        let mut gauges = Registry::default();
        gauges.register_collector(Box::new(Gauges { status, now_unix_ms }));
        let mut text = String::new();
        // Writing to a string does not fail, and neither do the encoders of these types.
        let _ = encode_registry(&mut text, &self.registry);
        let _ = encode_registry(&mut text, &gauges);
        let _ = encode_eof(&mut text);
        text
    }
}

/// What a status says in numbers.
#[derive(Debug)]
struct Gauges {
    status: Status,
    now_unix_ms: i64,
}

impl Gauges {
    /// How far a replica is behind, in seconds: its worst database, or the silence of its upstream.
    fn lag_seconds(&self) -> f64 {
        let lag = self.status.databases.iter().filter_map(|db| db.lag.map(|lag| lag.ms)).max().unwrap_or(0);
        let silence = match &self.status.role.upstream {
            Some(upstream) if !upstream.connected => {
                upstream.last_heartbeat_unix_ms.map_or(0, |last| (self.now_unix_ms - last).max(0) as u64)
            }
            _ => 0,
        };
        lag.max(silence) as f64 / 1000.0
    }
}

impl Collector for Gauges {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.status;
        let is_primary = status.role.name == RoleName::Primary;
        let connected = status.role.upstream.as_ref().is_some_and(|upstream| upstream.connected);
        let quarantined = status.databases.iter().filter(|db| db.reason.is_some()).count();

        one(&mut out, "litefs_db_count", "Databases", status.databases.len() as u64)?;
        one(&mut out, "litefs_db_quarantined_count", "Databases that are set aside", quarantined as u64)?;
        one(&mut out, "litefs_is_primary", "1 on the primary", u64::from(is_primary))?;
        one(
            &mut out,
            "litefs_upstream_connected",
            "1 while the upstream's stream is up",
            u64::from(connected),
        )?;
        one(&mut out, "litefs_epoch", "Newest epoch known", status.role.epoch)?;
        one(
            &mut out,
            "litefs_subscriber_count",
            "Nodes that follow this one",
            status.followers.len() as u64,
        )?;
        one(&mut out, "litefs_lag_seconds", "Time behind the upstream", self.lag_seconds())?;
        one(&mut out, "litefs_log_bytes", "Bytes of the commit log on disk", status.log.bytes)?;
        one(&mut out, "litefs_log_durable_lsn", "Bytes of log ever made durable", status.log.durable_lsn)?;

        let databases = || status.databases.iter().map(|db| (db, DatabaseLabel { db: db.name.clone() }));
        let txids = databases().map(|(db, label)| (label, db.txid.0));
        many(&mut out, "litefs_db_txid", "Last transaction", txids)?;
        let sizes = databases().map(|(db, label)| (label, db.size_bytes));
        many(&mut out, "litefs_db_size_bytes", "Size of the database", sizes)?;
        let lags = databases().filter_map(|(db, label)| Some((label, db.lag?.transactions)));
        many(&mut out, "litefs_db_lag_transactions", "Transactions behind the upstream", lags)?;
        let lags = databases().filter_map(|(db, label)| Some((label, db.lag?.ms as f64 / 1000.0)));
        many(&mut out, "litefs_db_lag_seconds", "Time behind the upstream", lags)?;

        let rules =
            || status.sync.iter().map(|rule| (rule, SyncLabel { databases: rule.databases.join(" ") }));
        let waiting = rules().map(|(rule, label)| (label, rule.waiting));
        many(&mut out, "litefs_sync_waiting", "Commits that wait for followers now", waiting)?;
        let connected = rules().map(|(rule, label)| (label, rule.connected.len() as u64));
        many(&mut out, "litefs_sync_connected", "Members that are connected", connected)?;
        let states = rules().map(|(rule, label)| {
            (SyncStateLabel { databases: label.databases, state: rule.state.as_str().to_owned() }, 1u64)
        });
        many(&mut out, "litefs_sync_state", "1 for the state of synchronous replication", states)?;

        let followers = || {
            status.followers.iter().flat_map(|node| {
                node.databases.iter().map(|db| {
                    let (id, name) = (node.node_id.to_string(), node.name.clone());
                    (db, FollowerLabel { db: db.name.clone(), node: id, name })
                })
            })
        };
        let txids = followers().map(|(db, label)| (label, db.txid.0));
        many(&mut out, "litefs_follower_txid", "Last transaction that a follower acknowledged", txids)?;
        let lags = followers().map(|(db, label)| (label, db.lag_transactions));
        many(&mut out, "litefs_follower_lag_transactions", "Transactions that a follower is behind", lags)
    }
}

fn one(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
    out.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
}

fn many<L: EncodeLabelSet, V: EncodeGaugeValue>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, V)>,
) -> fmt::Result {
    let mut family = out.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (label, value) in values {
        family.encode_family(&label)?.encode_gauge(&value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake;

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|l| l == line), "no line {line:?} in\n{text}");
    }

    #[test]
    fn a_primary_shows_its_databases_and_followers() {
        let metrics = Metrics::default();
        let name = DatabaseName::new("a.db").unwrap();
        metrics.database(&name).commits.add(2);
        metrics.database(&name).commits.add(1);
        metrics.fsynced(Duration::from_micros(100));
        let text = metrics.render(fake::status(), 0);
        has(&text, "litefs_db_count 1");
        has(&text, "litefs_is_primary 1");
        has(&text, "litefs_epoch 3");
        has(&text, "litefs_subscriber_count 1");
        has(&text, "litefs_lag_seconds 0.0");
        has(&text, "litefs_db_commit_count{db=\"a.db\"} 3");
        has(&text, "litefs_db_apply_count{db=\"a.db\"} 0");
        has(&text, "litefs_db_txid{db=\"a.db\"} 42");
        has(
            &text,
            "litefs_follower_lag_transactions{db=\"a.db\",node=\"00000000000000CD\",name=\"host-b\"} 2",
        );
        has(&text, "litefs_log_fsync_seconds_count 1");
        assert!(text.ends_with("# EOF\n"));
        assert_eq!(text.matches("# EOF").count(), 1);

        metrics.forget(&name);
        assert!(!metrics.render(fake::status(), 0).contains("commit_count{"));
    }

    #[test]
    fn a_replica_that_lost_its_upstream_lags_by_the_silence() {
        let mut status = fake::replica();
        let render = |status: &Status| Metrics::default().render(status.clone(), 10_500);
        has(&render(&status), "litefs_lag_seconds 0.02");
        has(&render(&status), "litefs_db_lag_transactions{db=\"a.db\"} 1");
        status.role.upstream.as_mut().unwrap().connected = false;
        status.role.upstream.as_mut().unwrap().last_heartbeat_unix_ms = Some(8_000);
        has(&render(&status), "litefs_lag_seconds 2.5");
        has(&render(&status), "litefs_upstream_connected 0");
    }
}
