//! What single values cannot tell: values that do not fit together.

use super::*;

/// Bytes of a Unix socket's path that fit in `sockaddr_un` with its terminator (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

impl Config {
    /// What single values cannot tell.
    pub(super) fn cross_check(&self, problems: &mut Vec<Problem>) {
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
}
