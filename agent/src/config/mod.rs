//! The configuration file.
//!
//! Every key has a default, so that no file is needed. Settings come in layers, later ones win: the defaults,
//! `/etc/litefs/<cluster>.toml` (or the file that `--config` names), the drop-ins `<file>.d/*.toml` in the
//! order of their names, and `--set KEY=VALUE` on the command line. [`Config::load`] reads the layers, checks
//! every value and reports everything that is wrong at once, each with its place.

mod cross_check;
mod keys;
mod layers;
mod on_change;
mod problem;
mod sections;
mod show;
mod sync;
mod value;

pub use keys::{KEYS, Key};
pub use on_change::{HOOK_KEYS, HookAction, HookConfig, UnitVerb, pattern_matches};
pub use problem::{ConfigError, Origin, Problem};
pub use sections::{
    Bus, ClientCertificates, ConsulConfig, DataConfig, DbusConfig, DoorKind, Hold, HttpConfig, LeaseConfig,
    LeaseKind, LeaseRole, LogConfig, LogFormat, LogLevel, LogOutputConfig, MountConfig, NodeConfig,
    Passthrough, PreloadConfig, ReplicationConfig, SocketConfig, TlsConfig,
};
pub use sync::{OnTimeout, SYNC_RULE_KEYS, SYNC_TABLE, SyncPolicy, SyncRule};
pub use value::show_duration;

use serde::Serialize;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the configuration files are when `--config` names none.
pub const CONFIG_DIR: &str = "/etc/litefs";

/// The cluster when nobody names one.
pub const DEFAULT_CLUSTER: &str = "db";

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
            preload: PreloadConfig { hold: Hold::Auto, forward_writes: false },
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

    /// The effective configuration as TOML; a comment says where each value that was set comes from.
    pub fn to_toml(&self) -> String {
        show::to_toml(self)
    }
}

#[cfg(test)]
mod tests;
