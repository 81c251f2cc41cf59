//! Every key of the configuration: its name, its default, what it means, and how it is read.
//!
//! Reading, `litefs config show`, the man page `litefs.toml(5)` and `docs/configuration.md` follow this table.

use super::value::{Value, absolute_path};
use super::{
    Bus, ClientCertificates, Config, DoorKind, Hold, LeaseKind, LeaseRole, LogFormat, LogLevel, Passthrough,
    problem, sync,
};
use std::time::Duration;

/// One key.
pub struct Key {
    /// Full name, such as `http.listen`.
    pub path: &'static str,
    /// The default as it would be written, or how it comes about.
    pub default: &'static str,
    /// What it means, in a sentence or two.
    pub doc: &'static str,
    pub(super) set: fn(&mut Config, &Value) -> Result<(), String>,
}

impl Key {
    /// The TOML table that it is in, if any, and its name there.
    pub fn table_and_name(&self) -> (Option<&'static str>, &'static str) {
        match self.path.split_once('.') {
            Some((table, name)) => (Some(table), name),
            None => (None, self.path),
        }
    }
}

const MILLISECOND: Duration = Duration::from_millis(1);

/// All keys, in the order in which they are shown.
pub const KEYS: &[Key] = &[
    Key {
        path: "cluster",
        default: "\"db\"",
        doc: "Name of the cluster: letters, digits, '-' and '_', a letter first, at most 64. Also given by \
              `--cluster`.",
        set: |config, value| {
            check_cluster(value.text()?)
                .map(|()| config.cluster = value.text().unwrap_or_default().to_owned())
        },
    },
    Key {
        path: "door",
        default: "\"auto\"",
        doc: "How applications reach their databases: \"fuse\" mounts a file system at `mount.dir`; \"preload\" makes \
              it a link to the plain files, for applications that run with `liblitefs.so` (`litefs exec`); \"auto\" \
              is \"fuse\" where /dev/fuse can be opened.",
        set: |config, value| {
            let choices =
                [("auto", DoorKind::Auto), ("fuse", DoorKind::Fuse), ("preload", DoorKind::Preload)];
            config.door = choice(value, choices)?;
            Ok(())
        },
    },
    Key {
        path: "node.name",
        default: "the host name",
        doc: "Name of this host for others: in `.primary`, in status, and in the default of \
              `http.advertise-url`.",
        set: |config, value| {
            check_host(value.text()?)?;
            config.node.name = value.text()?.to_owned();
            Ok(())
        },
    },
    Key {
        path: "data.dir",
        default: "\"/var/lib/litefs/<cluster>\"",
        doc: "Where the agent keeps databases, commit log and sidecars. Local disk; nobody else writes there.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.data.dir = path),
    },
    Key {
        path: "mount.dir",
        default: "\"/srv/litefs/<cluster>\"",
        doc: "Where applications find the databases. Created when missing; must be empty.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.mount.dir = path),
    },
    Key {
        path: "mount.passthrough",
        default: "\"auto\"",
        doc: "\"auto\" lets the kernel read and write database files itself where it can (6.9 and newer); \
              \"off\" sends everything through the agent.",
        set: |config, value| {
            let choices = [("auto", Passthrough::Auto), ("off", Passthrough::Off)];
            config.mount.passthrough = choice(value, choices)?;
            Ok(())
        },
    },
    Key {
        path: "mount.threads",
        default: "0",
        doc: "Threads that answer the kernel, 1 to 256; 0: as many as suit the CPUs.",
        set: |config, value| {
            config.mount.threads = value.integer(0, 256)? as usize;
            Ok(())
        },
    },
    Key {
        path: "mount.helper",
        default: "none",
        doc: "Socket of `litefs-mount`, which mounts and registers files for passthrough on behalf of an agent that may \
              not (CAP_SYS_ADMIN). `litefs@.service` sets it; without it the agent does this itself.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.mount.helper = Some(path)),
    },
    Key {
        path: "mount.takeover-wait",
        default: "\"30s\"",
        doc: "When the agent dies, applications behind FUSE wait this long for the next one, which goes on where it \
              was, before they get errors; \"0s\": not at all. Needs Linux 6.9; on older kernels they get errors at \
              once. Under systemd the service's own restart settings decide how long, unless this is \"0s\".",
        set: |config, value| value.duration(Duration::ZERO).map(|time| config.mount.takeover_wait = time),
    },
    Key {
        path: "preload.hold",
        default: "\"auto\"",
        doc: "Behind the preload door, whether a commit in WAL mode waits until the commit log has it, before anyone can \
              see it: \"always\"; \"never\": it is captured a moment later; \"auto\": it waits unless the lease is \
              static.",
        set: |config, value| {
            let choices = [("auto", Hold::Auto), ("always", Hold::Always), ("never", Hold::Never)];
            config.preload.hold = choice(value, choices)?;
            Ok(())
        },
    },
    Key {
        path: "preload.forward-writes",
        default: "false",
        doc: "Behind the preload door of a replica: an application that wants to write waits as for another writer \
              (SQLITE_BUSY, its busy timeout), while the agent gets the halt lock of the database; its commits then go to \
              the primary first. No effect behind the FUSE door.",
        set: |config, value| {
            config.preload.forward_writes = value.boolean()?;
            Ok(())
        },
    },
    Key {
        path: "http.listen",
        default: "\"127.0.0.1:20202\"",
        doc: "Address and port for followers, metrics and events. The default is reachable from this host \
              only: a primary with followers elsewhere sets \"0.0.0.0:20202\" or one of its addresses. Whoever \
              reaches the port can read all databases, unless `tls.certificate` or `http.token-file` is set.",
        set: |config, value| {
            let text = value.text()?;
            let listen: std::net::SocketAddr = text.parse().map_err(|_| {
                format!("must be an IP address and a port such as \"0.0.0.0:20202\", is {text:?}")
            })?;
            if listen.port() == 0 {
                return Err("must name a port: followers could not find a random one".to_owned());
            }
            config.http.listen = listen;
            Ok(())
        },
    },
    Key {
        path: "http.advertise-url",
        default: "\"http://<node.name>:<port of http.listen>\"",
        doc: "How other hosts reach this one; it begins with https:// when `tls.certificate` is set.",
        set: |config, value| url(value.text()?).map(|url| config.http.advertise_url = url),
    },
    Key {
        path: "http.token-file",
        default: "none",
        doc: "File with a secret of at least 16 characters that all hosts of the cluster share. Requests of others are \
              refused, except for `/metrics` and `/info`. Without this key a credential named `http-token` is it, when \
              there is one. It goes over the network with each request: use TLS too where others can listen.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.http.token_file = Some(path)),
    },
    Key {
        path: "tls.certificate",
        default: "none",
        doc: "PEM file with this host's certificate, followed by those between it and its authority. Setting it turns TLS \
              1.3 on for `http.listen` and for what this host connects to: all hosts of a cluster use it or none. The \
              certificate must be fit for servers and clients.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.tls.certificate = Some(path)),
    },
    Key {
        path: "tls.key",
        default: "none",
        doc: "PEM file with the key of `tls.certificate`. Without it the key is the credential named `tls-key`.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.tls.key = Some(path)),
    },
    Key {
        path: "tls.ca",
        default: "none",
        doc: "PEM file with the authorities that the certificates of this cluster's hosts come from. Nothing else is \
              trusted.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.tls.ca = Some(path)),
    },
    Key {
        path: "tls.peer-name",
        default: "none",
        doc: "DNS name that the certificates of all hosts of the cluster have, such as \"db.litefs.internal\". With it \
              other certificates of the same authority are refused; without it any will do for a follower, and an \
              upstream's must be for the host in its URL.",
        set: |config, value| {
            let name = value.text()?;
            rustls::pki_types::DnsName::try_from(name)
                .map_err(|_| format!("must be a DNS name such as \"db.litefs.internal\", is {name:?}"))?;
            config.tls.peer_name = Some(name.to_owned());
            Ok(())
        },
    },
    Key {
        path: "tls.client-certificates",
        default: "\"required\"",
        doc: "\"required\": hosts that connect must show a certificate, except for `/metrics` and `/info`. \"off\": they \
              need none, for use with `http.token-file`.",
        set: |config, value| {
            let choices = [("required", ClientCertificates::Required), ("off", ClientCertificates::Off)];
            config.tls.client_certificates = choice(value, choices)?;
            Ok(())
        },
    },
    Key {
        path: "socket.path",
        default: "\"/run/litefs/<cluster>/control.sock\"",
        doc: "Unix socket for the commands on this host (`litefs status`, `litefs import`, ...).",
        set: |config, value| absolute_path(value.text()?).map(|path| config.socket.path = path),
    },
    Key {
        path: "log.segment-size",
        default: "\"32MiB\"",
        doc: "The commit log begins a new file after this many bytes; at least \"64KiB\".",
        set: |config, value| value.size(64 << 10).map(|size| config.log.segment_size = size),
    },
    Key {
        path: "log.retention-age",
        default: "\"10m\"",
        doc: "Records are kept at least this long, within `log.retention-size`. A follower that was away \
              longer than its records were kept gets a snapshot.",
        set: |config, value| value.duration(Duration::ZERO).map(|age| config.log.retention_age = age),
    },
    Key {
        path: "log.retention-size",
        default: "\"1GiB\"",
        doc: "Records take at most this many bytes, whatever their age; at least one segment.",
        set: |config, value| value.size(64 << 10).map(|size| config.log.retention_size = size),
    },
    Key {
        path: "lease.type",
        default: "\"static\"",
        doc: "How the primary is chosen. \"static\": the configuration names it, and it never changes by itself. \
              \"consul\": the hosts choose one of them, by a lease that Consul keeps; when it fails another one \
              takes over.",
        set: |config, value| {
            let choices = [("static", LeaseKind::Static), ("consul", LeaseKind::Consul)];
            config.lease.kind = choice(value, choices)?;
            Ok(())
        },
    },
    Key {
        path: "lease.role",
        default: "\"primary\"",
        doc: "This host's role: \"primary\" takes writes, \"replica\" follows `lease.primary-url`. Exactly one \
              host of a cluster may be primary.",
        set: |config, value| {
            let choices = [("primary", LeaseRole::Primary), ("replica", LeaseRole::Replica)];
            config.lease.role = choice(value, choices)?;
            Ok(())
        },
    },
    Key {
        path: "lease.primary-url",
        default: "none",
        doc: "Whom a replica follows: the primary, or another replica (a cascade). Required for a replica.",
        set: |config, value| url(value.text()?).map(|url| config.lease.primary_url = Some(url)),
    },
    Key {
        path: "lease.candidate",
        default: "true",
        doc: "Whether this host may become primary when the hosts choose it; `false`: it only ever follows.",
        set: |config, value| {
            config.lease.candidate = value.boolean()?;
            Ok(())
        },
    },
    Key {
        path: "lease.ttl",
        default: "\"10s\"",
        doc: "A primary that was not heard of at Consul for this long is gone, and another host takes over. A primary \
              that cannot renew its lease takes no more writes after nine tenths of it. The same on all hosts; at least \
              \"1s\".",
        set: |config, value| value.duration(Duration::from_secs(1)).map(|time| config.lease.ttl = time),
    },
    Key {
        path: "consul.address",
        default: "\"http://127.0.0.1:8500\"",
        doc: "Where Consul answers: agents or servers, several with commas in between. The first that answers is used \
              until it fails.",
        set: |config, value| {
            let addresses: Result<Vec<String>, String> =
                value.text()?.split(',').map(|address| url(address.trim())).collect();
            config.consul.address = addresses?.join(",");
            Ok(())
        },
    },
    Key {
        path: "consul.key",
        default: "\"litefs/<cluster>\"",
        doc: "The lease is the key `primary` below this one, and each host has one below `nodes`. The same on all hosts \
              of a cluster.",
        set: |config, value| {
            let key = value.text()?;
            let plain = |part: &str| {
                !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            };
            if !key.split('/').all(plain) {
                return Err(format!(
                    "must be words of letters, digits, '-', '_' and '.' with '/' in between, is {key:?}"
                ));
            }
            config.consul.key = key.to_owned();
            Ok(())
        },
    },
    Key {
        path: "consul.timeout",
        default: "\"2s\"",
        doc: "How long each call waits for each address. At most half of `lease.ttl`.",
        set: |config, value| value.duration(MILLISECOND).map(|time| config.consul.timeout = time),
    },
    Key {
        path: "consul.token-file",
        default: "none",
        doc: "File with the ACL token; read for each call. Without it the credential `consul-token` is used, if there \
              is one. It needs `key_prefix` write on `consul.key` and `session_prefix` write.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.consul.token_file = Some(path)),
    },
    Key {
        path: "consul.tls-ca",
        default: "none",
        doc: "PEM file with the authorities that vouch for Consul's certificate; needed where an address begins with \
              `https://`. Read at the start.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.consul.tls_ca = Some(path)),
    },
    Key {
        path: "consul.tls-certificate",
        default: "none",
        doc: "PEM file with a certificate to show to a Consul that wants one.",
        set: |config, value| {
            absolute_path(value.text()?).map(|path| config.consul.tls_certificate = Some(path))
        },
    },
    Key {
        path: "consul.tls-key",
        default: "none",
        doc: "PEM file with the key of `consul.tls-certificate`.",
        set: |config, value| absolute_path(value.text()?).map(|path| config.consul.tls_key = Some(path)),
    },
    Key {
        path: "replication.heartbeat",
        default: "\"1s\"",
        doc: "Interval between signs of life on a stream.",
        set: |config, value| {
            config.replication.heartbeat = value.duration(10 * MILLISECOND)?;
            Ok(())
        },
    },
    Key {
        path: "replication.timeout",
        default: "\"5s\"",
        doc: "A stream on which nothing arrives for this long is broken; both ends notice. Longer than \
              `replication.heartbeat`.",
        set: |config, value| value.duration(20 * MILLISECOND).map(|time| config.replication.timeout = time),
    },
    Key {
        path: "replication.reconnect-min",
        default: "\"100ms\"",
        doc: "Pause before a follower connects again; it doubles with each failure.",
        set: |config, value| value.duration(MILLISECOND).map(|time| config.replication.reconnect_min = time),
    },
    Key {
        path: "replication.reconnect-max",
        default: "\"5s\"",
        doc: "Longest pause before a follower connects again.",
        set: |config, value| value.duration(MILLISECOND).map(|time| config.replication.reconnect_max = time),
    },
    Key {
        path: "replication.apply-wait",
        default: "\"100ms\"",
        doc: "How long applying waits at a time for readers of a database in a rollback journal mode. WAL mode \
              needs no waiting.",
        set: |config, value| value.duration(MILLISECOND).map(|time| config.replication.apply_wait = time),
    },
    Key {
        path: "sync.acks",
        default: "0",
        doc: "So many followers must have a commit durably in their logs before it counts: until then the application's \
              commit waits, and nobody on this host sees it. 0: replication is asynchronous. `[[sync-rule]]` says \
              something else for some databases. All hosts that may become primary should have the same.",
        set: |config, value| {
            config.sync.acks = value.integer(0, sync::ACKS_MAX)? as usize;
            Ok(())
        },
    },
    Key {
        path: "sync.members",
        default: "[]",
        doc: "Names (`node.name`) of the hosts whose acknowledgements count; the primary may be among them and is not \
              counted. Empty: every host that follows this one counts; hosts that choose the primary by a lease need the names.",
        set: |config, value| sync::members(value).map(|members| config.sync.members = members),
    },
    Key {
        path: "sync.timeout",
        default: "\"5s\"",
        doc: "How long a commit waits for acknowledgements before `sync.on-timeout` happens.",
        set: |config, value| value.duration(sync::TIMEOUT_MIN).map(|time| config.sync.timeout = time),
    },
    Key {
        path: "sync.on-timeout",
        default: "\"wait\"",
        doc: "\"wait\": commits wait on. \"degrade\": they succeed without, and so do later ones, until enough members \
              have caught up; `litefs status`, the journal, D-Bus and metrics say so. \"refuse\": a commit that was \
              already sent waits on, later ones fail until enough members have caught up, and none begins while too \
              few members are connected.",
        set: |config, value| {
            config.sync.on_timeout = choice(value, sync::ON_TIMEOUT)?;
            Ok(())
        },
    },
    Key {
        path: "dbus.bus",
        default: "\"system\"",
        doc: "\"system\": the agent is `io.litefs.LiteFS1.<cluster>` on the system bus, when there is one; see \
              `io.litefs.LiteFS1(5)`. \"off\": it is not.",
        set: |config, value| {
            config.dbus.bus = choice(value, [("system", Bus::System), ("off", Bus::Off)])?;
            Ok(())
        },
    },
    Key {
        path: "log-output.level",
        default: "\"info\"",
        doc: "Least important messages shown: \"error\", \"warn\", \"info\", \"debug\" or \"trace\".",
        set: |config, value| {
            let choices = [
                ("error", LogLevel::Error),
                ("warn", LogLevel::Warn),
                ("info", LogLevel::Info),
                ("debug", LogLevel::Debug),
                ("trace", LogLevel::Trace),
            ];
            config.log_output.level = choice(value, choices)?;
            Ok(())
        },
    },
    Key {
        path: "log-output.format",
        default: "\"auto\"",
        doc: "\"auto\" is the journal under systemd, else text on stderr; \"human\", \"journal\" and \"json\" \
              insist.",
        set: |config, value| {
            let choices = [
                ("auto", LogFormat::Auto),
                ("human", LogFormat::Human),
                ("journal", LogFormat::Journal),
                ("json", LogFormat::Json),
            ];
            config.log_output.format = choice(value, choices)?;
            Ok(())
        },
    },
];

/// One of a few words.
pub(super) fn choice<T: Copy, const N: usize>(
    value: &Value,
    choices: [(&'static str, T); N],
) -> Result<T, String> {
    let text = value.text()?;
    if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == text) {
        return Ok(*choice);
    }
    let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
    let mut message = format!("must be {}, is {text:?}", names.join(" or "));
    if let Some(near) = problem::nearest(text, choices.iter().map(|(name, _)| *name)) {
        message.push_str(&format!(" (did you mean {near:?}?)"));
    }
    Err(message)
}

/// A cluster's name becomes a directory, a unit instance and a part of a D-Bus name.
pub(super) fn check_cluster(name: &str) -> Result<(), String> {
    let plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.len() <= 64
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if plain {
        return Ok(());
    }
    Err(format!("must be letters, digits, '-' and '_', a letter first, at most 64 of them, is {name:?}"))
}

/// A host's name is written into `.primary` and into URLs.
pub(super) fn check_host(name: &str) -> Result<(), String> {
    let plain = !name.is_empty()
        && name.len() <= 253
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if plain {
        Ok(())
    } else {
        Err(format!("must be a host name (letters, digits, '-', '_' and '.'), is {name:?}"))
    }
}

/// `http://host:port` or `https://host:port` without the slash at its end.
fn url(text: &str) -> Result<String, String> {
    let bad = |why: &str| format!("must be a URL such as \"http://host-a:20202\", is {text:?} ({why})");
    let uri: http::Uri = text.parse().map_err(|_| bad("not a URL"))?;
    let scheme = match uri.scheme_str() {
        Some(scheme @ ("http" | "https")) => scheme,
        _ => return Err(bad("it has to begin with http:// or https://")),
    };
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| bad("no host in it"))?;
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(bad("user names are not supported"));
    }
    if uri.path_and_query().is_some_and(|path| path.as_str() != "/") {
        return Err(bad("nothing may follow the port"));
    }
    let port = uri.port_u16().ok_or_else(|| bad("no port in it"))?;
    Ok(format!("{scheme}://{host}:{port}"))
}
