//! The tables of the configuration, as the agent sees them.

use super::value;
use serde::{Serialize, Serializer};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// `[node]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeConfig {
    /// Name of this host for others.
    pub name: String,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DataConfig {
    /// Directory of databases, log and sidecars.
    pub dir: PathBuf,
}

/// `[mount]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MountConfig {
    /// Mount point.
    pub dir: PathBuf,
    /// Whether the kernel reads and writes backing files itself.
    pub passthrough: Passthrough,
    /// Threads that answer the kernel; 0: as many as suit the CPUs.
    pub threads: usize,
    /// Socket of `litefs-mount`, which mounts for an agent that may not.
    pub helper: Option<PathBuf>,
    /// How long applications wait for another agent when this one dies.
    #[serde(serialize_with = "duration")]
    pub takeover_wait: Duration,
}

/// `[http]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HttpConfig {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// How other hosts reach it: `http://host:port`, or https, no slash at the end.
    pub advertise_url: String,
    /// File with the secret that all hosts of the cluster share.
    pub token_file: Option<PathBuf>,
}

/// `[tls]`: certificate and authority are both there or both not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TlsConfig {
    /// PEM file with this host's certificate, and those between it and the authority.
    pub certificate: Option<PathBuf>,
    /// PEM file with the certificate's key; without it the key is the credential `tls-key`.
    pub key: Option<PathBuf>,
    /// PEM file with the authorities that certificates of this cluster's hosts come from.
    pub ca: Option<PathBuf>,
    /// DNS name that the certificates of all hosts have.
    pub peer_name: Option<String>,
    /// Whether other hosts have to show a certificate.
    pub client_certificates: ClientCertificates,
}

/// Whether other hosts have to show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientCertificates {
    /// For everything but metrics.
    Required,
    /// Not.
    Off,
}

/// `[socket]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SocketConfig {
    /// Path of the control socket.
    pub path: PathBuf,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LogConfig {
    /// Bytes after which a new segment begins.
    #[serde(serialize_with = "size")]
    pub segment_size: u64,
    /// Records are kept at least this long.
    #[serde(serialize_with = "duration")]
    pub retention_age: Duration,
    /// Bytes of records that are kept at most.
    #[serde(serialize_with = "size")]
    pub retention_size: u64,
}

/// `[lease]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LeaseConfig {
    /// How the primary is chosen.
    #[serde(rename = "type")]
    pub kind: LeaseKind,
    /// This host's role under a static lease.
    pub role: LeaseRole,
    /// Whom a replica follows (the primary, or a replica in a cascade): `http://host:port`, no slash at the
    /// end. Present exactly when the role is replica.
    pub primary_url: Option<String>,
    /// Whether this host may become primary, where hosts choose it.
    pub candidate: bool,
    /// A primary that was not heard of for this long is gone.
    #[serde(serialize_with = "duration")]
    pub ttl: Duration,
}

/// `[consul]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConsulConfig {
    /// Addresses of servers or agents: `http://host:port` or `https://host:port`, with commas in between.
    pub address: String,
    /// The keys are below this one.
    pub key: String,
    /// For each call at each address.
    #[serde(serialize_with = "duration")]
    pub timeout: Duration,
    /// File with the ACL token, if it is not a credential.
    pub token_file: Option<PathBuf>,
    /// Authorities that vouch for Consul's certificate.
    pub tls_ca: Option<PathBuf>,
    /// Certificate to show to Consul.
    pub tls_certificate: Option<PathBuf>,
    /// Its key.
    pub tls_key: Option<PathBuf>,
}

impl ConsulConfig {
    /// How Consul is reached.
    pub fn options(&self) -> crate::lease::consul::Options {
        use crate::lease::consul::{Options, Tls, Token};
        let identity = self.tls_certificate.clone().zip(self.tls_key.clone());
        Options {
            addresses: self.address.split(',').map(|address| address.trim().to_owned()).collect(),
            timeout: self.timeout,
            token: match &self.token_file {
                Some(path) => Token::File(path.clone()),
                None => Token::Credential("consul-token"),
            },
            tls: self.tls_ca.clone().map(|ca| Tls { ca, identity }),
        }
    }
}

/// `[replication]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicationConfig {
    /// Interval between signs of life on a stream.
    #[serde(serialize_with = "duration")]
    pub heartbeat: Duration,
    /// Silence after which a stream counts as broken.
    #[serde(serialize_with = "duration")]
    pub timeout: Duration,
    /// First pause before a follower connects again.
    #[serde(serialize_with = "duration")]
    pub reconnect_min: Duration,
    /// Longest pause before a follower connects again.
    #[serde(serialize_with = "duration")]
    pub reconnect_max: Duration,
    /// How long applying waits for readers of a rollback-mode database at a time.
    #[serde(serialize_with = "duration")]
    pub apply_wait: Duration,
}

/// `[dbus]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DbusConfig {
    /// Which bus the agent is on.
    pub bus: Bus,
}

/// `[log-output]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LogOutputConfig {
    /// Least important messages that are shown.
    pub level: LogLevel,
    /// Where they go and what they look like.
    pub format: LogFormat,
}

/// How applications reach their databases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DoorKind {
    /// FUSE where this host has it.
    Auto,
    /// A FUSE mount.
    Fuse,
    /// A plain directory, and a library in the applications.
    Preload,
}

/// `[preload]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PreloadConfig {
    /// Whether commits in WAL mode wait for the agent.
    pub hold: Hold,
    /// Applications on a replica get halt locks by writing.
    pub forward_writes: bool,
}

/// Whether commits in WAL mode are held until the log has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// Where another host may become primary by itself.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Whether FUSE passthrough is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Passthrough {
    /// When the kernel can (6.9 and newer).
    Auto,
    /// Never.
    Off,
}

/// Which bus the agent is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bus {
    /// The system bus, when there is one.
    System,
    /// None.
    Off,
}

/// How the primary is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseKind {
    /// The configuration says who it is.
    Static,
    /// Hosts choose one of them, by a lease that Consul keeps.
    Consul,
}

/// A host's role under a static lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseRole {
    /// Takes writes.
    Primary,
    /// Follows.
    Replica,
}

/// Importance of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something needs attention.
    Warn,
    /// What happens.
    Info,
    /// Why it happens.
    Debug,
    /// Every step.
    Trace,
}

/// Form of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// The journal when stderr is connected to it, else human.
    Auto,
    /// Text on stderr.
    Human,
    /// Fields for journald.
    Journal,
    /// JSON lines on stderr.
    Json,
}

pub(super) fn size<S: Serializer>(size: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value::show_size(*size))
}

pub(super) fn duration<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value::show_duration(*duration))
}
