//! A real Consul: one server in memory (`consul agent -dev`), or a cluster of three; also one that wants certificates and
//! tokens.

use crate::certificates::Identity;
use crate::ports::Port;
use crate::wait::{PATIENCE, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;
use tempfile::TempDir;

/// Path of `consul`: `$LITEFS_CONSUL`, or the one that `cargo xtask test` installs below `target/tools`.
fn program() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("LITEFS_CONSUL") {
            return path.into();
        }
        let tools = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/consul/usr/bin/consul");
        let path = PathBuf::from(tools);
        assert!(path.exists(), "{tools} is missing: `cargo xtask setup` installs it, or set LITEFS_CONSUL");
        path
    })
}

/// Ports of one server: HTTP, server, LAN and WAN gossip.
fn ports() -> [Port; 4] {
    [Port::reserve(), Port::reserve(), Port::reserve(), Port::reserve()]
}

/// One running Consul server.
#[derive(Debug)]
pub struct Consul {
    child: Child,
    ports: [Port; 4],
    arguments: Vec<String>,
    _dir: TempDir,
}

impl Consul {
    /// A server of its own, in memory, with a leader.
    pub fn start() -> Consul {
        let consul = Consul::spawn(ports(), vec!["-dev".into(), "-bind".into(), "127.0.0.1".into()]);
        consul.wait_for_leader();
        consul
    }

    /// As [`Consul::start`], reachable also at the other addresses of this machine.
    pub fn start_for(hub: std::net::Ipv4Addr) -> (Consul, String) {
        let arguments = ["-dev", "-bind", "127.0.0.1", "-client", "0.0.0.0"];
        let consul = Consul::spawn(ports(), arguments.map(str::to_owned).to_vec());
        consul.wait_for_leader();
        let address = format!("http://{hub}:{}", consul.ports[0].number);
        (consul, address)
    }

    /// As [`Consul::start`], and reachable by https at the address that comes with it, for those with a certificate of its
    /// authority and an ACL token. The test itself asks without a certificate, as [`Consul::MASTER_TOKEN`].
    pub fn start_tls(own: &Identity) -> (Consul, Port) {
        let https = Port::reserve();
        let config = serde_json::json!({
            "ca_file": own.ca, "cert_file": own.certificate, "key_file": own.key, "verify_incoming": true,
            "ports": { "https": https.number },
            "acl": { "enabled": true, "default_policy": "deny", "tokens": { "master": Consul::MASTER_TOKEN } },
        });
        let arguments = vec!["-dev".into(), "-bind=127.0.0.1".into(), format!("-hcl={config}")];
        let consul = Consul::spawn(ports(), arguments);
        consul.wait_for_leader();
        (consul, https)
    }

    /// The token that may do everything at [`Consul::start_tls`].
    pub const MASTER_TOKEN: &str = "master";

    /// Makes a token with these rules; `None` while Consul sets its ACLs up.
    pub fn create_token(&self, rules: &str) -> Option<String> {
        let policy = serde_json::json!({ "Name": "litefs", "Rules": rules });
        let _ = self.request("PUT", "/v1/acl/policy", &policy.to_string());
        let token = serde_json::json!({ "Policies": [{ "Name": "litefs" }] });
        let made = self.request("PUT", "/v1/acl/token", &token.to_string())?;
        let made: serde_json::Value = serde_json::from_str(&made).ok()?;
        made["SecretID"].as_str().map(str::to_owned)
    }

    /// Three servers with a leader.
    pub fn cluster() -> Vec<Consul> {
        let all: Vec<[Port; 4]> = (0..3).map(|_| ports()).collect();
        let joins: Vec<String> =
            all.iter().map(|ports| format!("-retry-join=127.0.0.1:{}", ports[2].number)).collect();
        let servers: Vec<Consul> = all
            .into_iter()
            .enumerate()
            .map(|(i, ports)| {
                let mut arguments: Vec<String> = vec![
                    "-server".into(),
                    "-bootstrap-expect=3".into(),
                    "-bind=127.0.0.1".into(),
                    format!("-node=consul-{i}"),
                    "-retry-interval=1s".into(),
                    // Elections as quick as they are recommended for production.
                    "-hcl=performance { raft_multiplier = 1 }".into(),
                ];
                arguments.extend(joins.iter().cloned());
                Consul::spawn(ports, arguments)
            })
            .collect();
        for server in &servers {
            server.wait_for_leader();
        }
        servers
    }

    fn spawn(ports: [Port; 4], mut arguments: Vec<String>) -> Consul {
        let dir = tempfile::Builder::new().prefix("litefs-consul-").tempdir().expect("a temporary directory");
        if !arguments.iter().any(|argument| argument == "-dev") {
            arguments.push(format!("-data-dir={}", dir.path().display()));
        }
        let child = run(&arguments, &ports);
        Consul { child, ports, arguments, _dir: dir }
    }

    /// Its address.
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0].number)
    }

    /// Kills the server. One in memory loses everything.
    pub fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is our child");
    }

    /// Starts it again.
    pub fn restart(&mut self) {
        self.child = run(&self.arguments, &self.ports);
        self.wait_for_leader();
    }

    /// Stops it without its noticing: it accepts connections and says nothing.
    pub fn freeze(&self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGSTOP).expect("it runs");
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGCONT).expect("it runs");
    }

    /// Body of a `GET`.
    pub fn get(&self, path: &str) -> Option<String> {
        self.request("GET", path, "")
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.ports[0].number)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        let (token, length) = (Consul::MASTER_TOKEN, body.len());
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: consul\r\nX-Consul-Token: {token}\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.contains(" 200 ").then(|| body.to_owned())
    }

    fn wait_for_leader(&self) {
        wait_for("Consul has a leader", PATIENCE, || {
            self.get("/v1/kv/?keys&consistent")
                .or_else(|| self.get("/v1/session/list?consistent"))
                .map(|_| ())
        });
    }
}

impl Drop for Consul {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(arguments: &[String], ports: &[Port; 4]) -> Child {
    let mut command = Command::new(program());
    command.arg("agent").args(arguments).args(["-dns-port", "-1", "-grpc-port", "-1"]);
    for (option, port) in ["-http-port", "-server-port", "-serf-lan-port", "-serf-wan-port"].iter().zip(ports)
    {
        command.arg(option).arg(port.number.to_string());
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}
