//! The configuration file.
//!
//! Every key has a default, so that no file is needed. Settings come in layers, later ones win: the defaults,
//! `/etc/litefs/<cluster>.toml` (or the file that `--config` names), the drop-ins `<file>.d/*.toml` in the
//! order of their names, and `--set KEY=VALUE` on the command line. [`Config::load`] reads the layers, checks
//! every value and reports everything that is wrong at once, each with its place.

mod keys;
mod layers;
mod on_change;
mod problem;
mod show;
mod sync;
mod value;

pub use keys::{KEYS, Key};
pub use on_change::{HOOK_KEYS, HookAction, HookConfig, UnitVerb, pattern_matches};
pub use problem::{ConfigError, Origin, Problem};
pub use sync::{OnTimeout, SYNC_RULE_KEYS, SYNC_TABLE, SyncPolicy, SyncRule};
pub use value::show_duration;

use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// Where the configuration files are when `--config` names none.
pub const CONFIG_DIR: &str = "/etc/litefs";

/// The cluster when nobody names one.
pub const DEFAULT_CLUSTER: &str = "db";

/// Bytes of a Unix socket's path that fit in `sockaddr_un` with its terminator (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// Everything the agent needs to know, checked.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    /// Name of the cluster, as in `litefs@<cluster>.service`.
    pub cluster: String,
    /// This host.
    pub node: NodeConfig,
    /// Where the agent keeps its own files.
    pub data: DataConfig,
    /// How applications reach their databases.
    pub door: DoorKind,
    /// Where applications find their databases.
    pub mount: MountConfig,
    /// The preload door.
    pub preload: PreloadConfig,
    /// The port for followers and monitoring.
    pub http: HttpConfig,
    /// Certificates between hosts.
    pub tls: TlsConfig,
    /// The socket for commands on this host.
    pub socket: SocketConfig,
    /// The commit log.
    pub log: LogConfig,
    /// Who may write.
    pub lease: LeaseConfig,
    /// Where the lease is, when Consul has it.
    pub consul: ConsulConfig,
    /// Streams between hosts.
    pub replication: ReplicationConfig,
    /// Who must have a commit before it counts.
    pub sync: SyncPolicy,
    /// The same for some databases; the first that is for a database counts.
    #[serde(skip)]
    pub sync_rules: Vec<SyncRule>,
    /// The agent on the system bus.
    pub dbus: DbusConfig,
    /// The agent's own messages.
    pub log_output: LogOutputConfig,
    /// What runs when a database changed on this host.
    #[serde(skip)]
    pub on_change: Vec<HookConfig>,
    /// From where this was loaded, to load it again.
    #[serde(skip)]
    pub source: Source,
    /// Where each key that is not at its default was set, by its full name such as `http.listen`.
    #[serde(skip)]
    pub origins: BTreeMap<&'static str, Origin>,
}

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

/// Which files and options make up a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file that `--config` names.
    pub file: Option<PathBuf>,
    /// The cluster that `--cluster` names.
    pub cluster: Option<String>,
    /// `KEY=VALUE` settings of the command line, in order.
    pub set: Vec<String>,
    /// Directory of `<cluster>.toml`: [`CONFIG_DIR`] outside tests.
    pub dir: PathBuf,
}

impl Default for Source {
    fn default() -> Self {
        Source { file: None, cluster: None, set: Vec::new(), dir: CONFIG_DIR.into() }
    }
}

impl Source {
    /// The main file, whether it exists or not.
    pub fn main_file(&self) -> PathBuf {
        match &self.file {
            Some(file) => file.clone(),
            None => self.dir.join(format!("{}.toml", self.cluster.as_deref().unwrap_or(DEFAULT_CLUSTER))),
        }
    }
}

impl Config {
    /// Reads, merges and checks all layers.
    ///
    /// # Errors
    /// Everything that is wrong, each with file, line and column: files that cannot be read, bad TOML, unknown
    /// keys, bad values, and values that do not fit together.
    pub fn load(source: &Source) -> Result<Config, ConfigError> {
        let mut problems = Vec::new();
        let layers::Read { settings: layers, hooks, sync_rules } = layers::read(source, &mut problems);

        let mut cluster = source.cluster.clone();
        for setting in layers.iter().filter(|setting| setting.key.path == "cluster") {
            // A value of another type is reported below with all others.
            let Ok(named) = setting.value.text() else { continue };
            match &source.cluster {
                Some(wanted) if wanted != named => problems.push(Problem {
                    origin: Some(setting.origin.clone()),
                    message: format!("cluster is {named:?}, but the command line asks for {wanted:?}"),
                    help: Some("remove one of the two, or make them equal".into()),
                }),
                _ => cluster = Some(named.to_owned()),
            }
        }
        let cluster = cluster.unwrap_or_else(|| DEFAULT_CLUSTER.to_owned());
        if let Err(message) = keys::check_cluster(&cluster) {
            problems.push(Problem { origin: None, message: format!("cluster {message}"), help: None });
            return Err(ConfigError { problems });
        }

        let mut config = Config::defaults(&cluster, source.clone());
        config.on_change = hooks;
        for setting in &layers {
            match (setting.key.set)(&mut config, &setting.value) {
                Ok(()) => {
                    config.origins.insert(setting.key.path, setting.origin.clone());
                }
                Err(message) => problems.push(Problem {
                    origin: Some(setting.origin.clone()),
                    message: format!("{} {message}", setting.key.path),
                    help: Some(format!("its default is {}", setting.key.default)),
                }),
            }
        }
        if !config.origins.contains_key("http.advertise-url") {
            let scheme = config.scheme();
            config.http.advertise_url =
                format!("{scheme}://{}:{}", config.node.name, config.http.listen.port());
        }
        let general = config.sync.clone();
        let finished: Vec<_> = sync_rules.into_iter().map(|rule| rule.finish(&general)).collect();
        if problems.is_empty() {
            for (origin, rule) in &finished {
                problems.extend(rule.policy.problem(&config.node.name).map(|(message, help)| Problem {
                    origin: origin.clone(),
                    message: format!("{SYNC_TABLE} for {} {message}", rule.databases.join(", ")),
                    help: Some(help.to_owned()),
                }));
            }
        }
        config.sync_rules = finished.into_iter().map(|(_, rule)| rule).collect();
        // Bad values were replaced by defaults, so cross-checks would report what nobody wrote.
        if problems.is_empty() {
            config.cross_check(&mut problems);
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError { problems }) }
    }

    /// Loads the same files and options again.
    ///
    /// # Errors
    /// As [`Config::load`]; this configuration stays what it is.
    pub fn reload(&self) -> Result<Config, ConfigError> {
        Config::load(&self.source)
    }

    /// The configuration of a cluster that sets nothing.
    fn defaults(cluster: &str, source: Source) -> Config {
        let node = nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .filter(|name| keys::check_host(name).is_ok())
            .unwrap_or_else(|| "localhost".to_owned());
        Config {
            cluster: cluster.to_owned(),
            node: NodeConfig { name: node },
            data: DataConfig { dir: Path::new("/var/lib/litefs").join(cluster) },
            door: DoorKind::Auto,
            preload: PreloadConfig { hold: Hold::Auto },
            mount: MountConfig {
                dir: Path::new("/srv/litefs").join(cluster),
                passthrough: Passthrough::Auto,
                helper: None,
                takeover_wait: Duration::from_secs(30),
                threads: 0,
            },
            http: HttpConfig {
                listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 20202)),
                advertise_url: String::new(),
                token_file: None,
            },
            tls: TlsConfig {
                certificate: None,
                key: None,
                ca: None,
                peer_name: None,
                client_certificates: ClientCertificates::Required,
            },
            socket: SocketConfig { path: Path::new("/run/litefs").join(cluster).join("control.sock") },
            log: LogConfig {
                segment_size: 32 << 20,
                retention_age: Duration::from_secs(600),
                retention_size: 1 << 30,
            },
            lease: LeaseConfig {
                kind: LeaseKind::Static,
                role: LeaseRole::Primary,
                primary_url: None,
                candidate: true,
                ttl: Duration::from_secs(10),
            },
            consul: ConsulConfig {
                address: "http://127.0.0.1:8500".to_owned(),
                key: format!("litefs/{cluster}"),
                timeout: Duration::from_secs(2),
                token_file: None,
                tls_ca: None,
                tls_certificate: None,
                tls_key: None,
            },
            replication: ReplicationConfig {
                heartbeat: Duration::from_secs(1),
                timeout: Duration::from_secs(5),
                reconnect_min: Duration::from_millis(100),
                reconnect_max: Duration::from_secs(5),
                apply_wait: Duration::from_millis(100),
            },
            sync: SyncPolicy::default(),
            sync_rules: Vec::new(),
            dbus: DbusConfig { bus: Bus::System },
            on_change: Vec::new(),
            log_output: LogOutputConfig { level: LogLevel::Info, format: LogFormat::Auto },
            source,
            origins: BTreeMap::new(),
        }
    }

    /// How addresses of this cluster's hosts begin.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.certificate.is_some() { "https" } else { "http" }
    }

    /// Whether commits of some databases wait for followers.
    pub fn has_sync(&self) -> bool {
        self.sync.acks > 0 || self.sync_rules.iter().any(|rule| rule.policy.acks > 0)
    }

    /// What single values cannot tell.
    fn cross_check(&self, problems: &mut Vec<Problem>) {
        let mut problem = |key: &str, message: String, help: &str| {
            problems.push(Problem {
                origin: self.origins.get(key).cloned(),
                message,
                help: Some(help.to_owned()),
            });
        };
        let (data, mount) = (&self.data.dir, &self.mount.dir);
        let key = if self.origins.contains_key("mount.dir") { "mount.dir" } else { "data.dir" };
        if data.starts_with(mount) || mount.starts_with(data) {
            problem(
                key,
                format!("data.dir {} and mount.dir {} overlap", data.display(), mount.display()),
                "use two directories of which neither contains the other",
            );
        }
        if self.socket.path.starts_with(mount) {
            problem(
                "socket.path",
                format!("socket.path {} is below mount.dir {}", self.socket.path.display(), mount.display()),
                "the mount holds databases only; put the socket under /run/litefs",
            );
        }
        if self.socket.path.as_os_str().len() > SOCKET_PATH_MAX {
            problem(
                "socket.path",
                format!("socket.path {} is longer than {SOCKET_PATH_MAX} bytes", self.socket.path.display()),
                "Unix sockets need a shorter path",
            );
        }
        let advertised = self.http.advertise_url.as_str();
        let tls = &self.tls;
        match (&tls.certificate, &tls.ca) {
            (Some(_), None) => problem(
                "tls.certificate",
                "tls.certificate is set, but tls.ca is not".to_owned(),
                "hosts check each other's certificates: name the file with their authority",
            ),
            (None, _) => {
                let others = [
                    ("tls.ca", tls.ca.is_some()),
                    ("tls.key", tls.key.is_some()),
                    ("tls.peer-name", tls.peer_name.is_some()),
                    ("tls.client-certificates", tls.client_certificates == ClientCertificates::Off),
                ];
                if let Some((key, _)) = others.into_iter().find(|(_, is_set)| *is_set) {
                    problem(
                        key,
                        format!("{key} is set, but tls.certificate is not"),
                        "TLS needs this host's certificate and the authority of all: set tls.certificate and tls.ca",
                    );
                }
            }
            _ => {}
        }
        let urls = [
            ("http.advertise-url", Some(&self.http.advertise_url)),
            ("lease.primary-url", self.lease.primary_url.as_ref()),
        ];
        for (key, url) in urls {
            let Some(url) = url else { continue };
            let scheme = self.scheme();
            if !url.starts_with(&format!("{scheme}://")) {
                let (message, help) = match scheme {
                    "https" => (
                        format!("{key} is {url}, but [tls] is set"),
                        "TLS is for all hosts of a cluster: begin the URL with https://",
                    ),
                    _ => (
                        format!("{key} is {url}, but [tls] is not set"),
                        "set tls.certificate and tls.ca, or begin the URL with http://",
                    ),
                };
                problem(key, message, help);
            }
        }
        match (self.lease.role, &self.lease.primary_url) {
            (LeaseRole::Replica, None) => problem(
                "lease.role",
                "lease.role is \"replica\", but lease.primary-url is not set".to_owned(),
                "set lease.primary-url to the primary's address, such as \"http://host-a:20202\"",
            ),
            (LeaseRole::Primary, Some(_)) => problem(
                "lease.primary-url",
                "lease.primary-url is set, but lease.role is \"primary\"".to_owned(),
                "set lease.role = \"replica\", or remove lease.primary-url",
            ),
            (LeaseRole::Replica, Some(url)) if url == advertised => problem(
                "lease.primary-url",
                format!("lease.primary-url {url} is this host's own http.advertise-url"),
                "a host cannot follow itself; name the primary",
            ),
            _ => {}
        }
        if let Some((message, help)) = self.sync.problem(&self.node.name) {
            problem("sync.acks", format!("sync {message}"), help);
        }
        let is_blind = |policy: &SyncPolicy| policy.acks > 0 && policy.members.is_empty();
        if self.lease.kind != LeaseKind::Static
            && (is_blind(&self.sync) || self.sync_rules.iter().any(|rule| is_blind(&rule.policy)))
        {
            problem(
                "sync.acks",
                "hosts choose the primary by themselves, but sync.members does not say whose acknowledgements count"
                    .to_owned(),
                "set sync.members to the names (node.name) of these hosts: only then a new primary can know that it has \
                 every acknowledged commit",
            );
        }
        if self.has_sync() && self.preload.hold == Hold::Never {
            problem(
                "preload.hold",
                "preload.hold is \"never\", but there are synchronous databases".to_owned(),
                "their commits have to be held: remove preload.hold, or set it to \"auto\"",
            );
        }
        if self.lease.kind == LeaseKind::Consul {
            for key in ["lease.role", "lease.primary-url"] {
                if self.origins.contains_key(key) {
                    problem(
                        key,
                        format!("{key} is set, but lease.type is \"consul\""),
                        "remove it: hosts choose the primary by themselves",
                    );
                }
            }
            let host = self.http.listen.ip();
            if host.is_loopback() && !self.origins.contains_key("http.listen") {
                problem(
                    "lease.type",
                    "lease.type is \"consul\", but other hosts cannot reach http.listen, which is at its default".to_owned(),
                    "set http.listen, such as \"0.0.0.0:20202\"",
                );
            }
            if self.consul.address.contains("https://") && self.consul.tls_ca.is_none() {
                problem(
                    "consul.address",
                    format!("consul.address is {}, but consul.tls-ca is not set", self.consul.address),
                    "name the file with the authority of Consul's certificates (`ca_file` in Consul's configuration)",
                );
            }
            if self.consul.tls_certificate.is_some() != self.consul.tls_key.is_some() {
                problem(
                    if self.consul.tls_key.is_some() { "consul.tls-key" } else { "consul.tls-certificate" },
                    "consul.tls-certificate and consul.tls-key belong together, and one of them is not set"
                        .to_owned(),
                    "set both, or none where Consul wants no certificate (`verify_incoming`)",
                );
            }
            if self.consul.timeout * 2 > self.lease.ttl {
                problem(
                    "consul.timeout",
                    format!(
                        "consul.timeout ({}) is more than half of lease.ttl ({})",
                        value::show_duration(self.consul.timeout),
                        value::show_duration(self.lease.ttl)
                    ),
                    "a primary has to be able to try twice before its lease ends",
                );
            }
        }
        let replication = &self.replication;
        if replication.timeout <= replication.heartbeat {
            problem(
                if self.origins.contains_key("replication.timeout") {
                    "replication.timeout"
                } else {
                    "replication.heartbeat"
                },
                format!(
                    "replication.timeout ({}) is not longer than replication.heartbeat ({})",
                    value::show_duration(replication.timeout),
                    value::show_duration(replication.heartbeat)
                ),
                "a stream would count as broken between two heartbeats; use at least three times the heartbeat",
            );
        }
        if replication.reconnect_max < replication.reconnect_min {
            problem(
                "replication.reconnect-max",
                "replication.reconnect-max is shorter than replication.reconnect-min".to_owned(),
                "make it at least as long",
            );
        }
        if self.log.retention_size < self.log.segment_size {
            problem(
                "log.retention-size",
                format!(
                    "log.retention-size ({}) is less than one log.segment-size ({})",
                    value::show_size(self.log.retention_size),
                    value::show_size(self.log.segment_size)
                ),
                "records are removed by whole segments; keep room for several",
            );
        }
    }

    /// The effective configuration as TOML; a comment says where each value that was set comes from.
    pub fn to_toml(&self) -> String {
        show::to_toml(self)
    }
}

/// An absolute path without `.` and `..`, or what is wrong with it.
fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path: PathBuf = Path::new(text).components().filter(|part| *part != Component::CurDir).collect();
    if !path.is_absolute()
        || path.components().any(|part| part == Component::ParentDir)
        || text.contains('\0')
    {
        return Err(format!("must be an absolute path without \"..\", is {text:?}"));
    }
    if path.parent().is_none() {
        return Err("must not be the root directory".to_owned());
    }
    Ok(path)
}

fn size<S: Serializer>(size: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value::show_size(*size))
}

fn duration<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value::show_duration(*duration))
}

#[cfg(test)]
mod tests;
