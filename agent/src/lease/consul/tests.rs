//! Against a real Consul (`cargo xtask test` installs it; `$LITEFS_CONSUL` names another one).

use super::super::{Claim, Gift, Lease, Peer, Standing, Term, View};
use super::*;
use crate::ship::engine::Epoch;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// Consul is started so often, on other ports each time.
const STARTS_MAX: u32 = 5;
/// How long it may take until it has a leader.
const PATIENCE: Duration = Duration::from_secs(60);

/// The program, or `None` where there is none: `cargo test` alone does not install it.
fn program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("LITEFS_CONSUL") {
        return Some(path.into());
    }
    let installed =
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/consul/usr/bin/consul"));
    installed.exists().then_some(installed)
}

struct Consul {
    child: Child,
    address: String,
    tls: Option<Tls>,
    _dir: tempfile::TempDir,
}

impl Drop for Consul {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Consul {
    async fn start(config: &str) -> Option<Consul> {
        Self::start_with(config, None).await
    }

    /// With TLS: `config` names its certificate.
    async fn start_with(config: &str, tls: Option<Tls>) -> Option<Consul> {
        let Some(program) = program() else {
            eprintln!("skipped: no Consul; `cargo xtask test` installs it, or set LITEFS_CONSUL");
            return None;
        };
        for _ in 0..STARTS_MAX {
            if let Some(consul) = Consul::try_start(&program, config, tls.clone()).await {
                return Some(consul);
            }
        }
        panic!("Consul ended {STARTS_MAX} times");
    }

    /// `None`: it has ended, because others took one of its ports first.
    async fn try_start(program: &Path, config: &str, tls: Option<Tls>) -> Option<Consul> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("consul.json"), config).unwrap();
        let ports: Vec<String> = (0..4).map(|_| free_port().to_string()).collect();
        let child = Command::new(program)
            .args(["agent", "-dev", "-bind", "127.0.0.1", "-dns-port", "-1", "-grpc-port", "-1"])
            .args([
                if tls.is_some() { "-https-port" } else { "-http-port" },
                &ports[0],
                "-server-port",
                &ports[1],
            ])
            .args(["-serf-lan-port", &ports[2], "-serf-wan-port", &ports[3]])
            .arg("-config-dir")
            .arg(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut consul =
            Consul { child, address: format!("{scheme}://127.0.0.1:{}", ports[0]), tls, _dir: dir };
        let client = Client::new(consul.options()).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            // A leader, which also has made its tables.
            if let Ok(answer) = client.read("/v1/kv/none?consistent", Duration::ZERO).await
                && answer.status.as_u16() < 500
            {
                return Some(consul);
            }
            if consul.child.try_wait().unwrap().is_some() {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("Consul did not start");
    }

    fn options(&self) -> Options {
        Options {
            addresses: vec![self.address.clone()],
            timeout: Duration::from_secs(5),
            token: Token::Credential("none"),
            tls: self.tls.clone(),
        }
    }

    fn node(&self, id: u64, dir: &std::path::Path) -> ConsulNode {
        ConsulNode {
            options: self.options(),
            key: "litefs/test".into(),
            own: peer(id),
            candidate: true,
            ttl: Duration::from_secs(2),
            data_dir: dir.to_owned(),
        }
    }
}

fn peer(node_id: u64) -> Peer {
    Peer { node_id, name: format!("n{node_id}"), url: format!("http://n{node_id}:1") }
}

fn term(holder: u64, epoch: u64, beat: u64) -> Term {
    let standing = Standing { record_epoch: Epoch(1), transactions: 7 };
    Term { holder: peer(holder), epoch: Epoch(epoch), standing, released: false, beat, sync: Vec::new() }
}

async fn until(lease: &ConsulLease, what: impl Fn(&View) -> bool) -> View {
    let mut after = None;
    let looking = async {
        loop {
            let view = lease.view(after).await.unwrap();
            if what(&view) {
                return view;
            }
            after = Some(view.index);
        }
    };
    tokio::time::timeout(Duration::from_secs(20), looking).await.expect("it is seen in time")
}

#[tokio::test]
async fn a_lease_is_claimed_renewed_given_and_released() {
    let Some(consul) = Consul::start("{}").await else { return };
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = ConsulLease::start(consul.node(0xa, dir_a.path())).unwrap();
    let b = ConsulLease::start(consul.node(0xb, dir_b.path())).unwrap();
    let view = until(&a, |view| view.session.is_some() && view.members.len() == 2).await;
    assert_eq!((view.record.version, &view.record.term), (0, &None));
    let ids: Vec<u64> = view.members.iter().map(|member| member.peer.node_id).collect();
    assert_eq!(ids, [0xa, 0xb]);
    until(&b, |view| view.session.is_some()).await;

    let claim = |id, version| Claim { version, from: None, term: term(id, 1, 1) };
    let first = a.claim(claim(0xa, 0)).await.unwrap().expect("it is free");
    assert_eq!(b.claim(claim(0xb, 0)).await.unwrap(), None, "it is taken");
    assert_eq!(b.claim(claim(0xb, first)).await.unwrap(), None, "its holder has the lock");
    assert_eq!(b.renew(first, term(0xb, 1, 2)).await.unwrap(), None, "it is another's");
    assert_eq!(b.release(first, term(0xb, 1, 2)).await.unwrap(), None, "it is another's");
    let renewed = a.renew(first, term(0xa, 1, 2)).await.unwrap().expect("it is its own");
    assert!(renewed > first);
    // What was sent before, and arrives now.
    assert_eq!(a.renew(first, term(0xa, 1, 3)).await.unwrap(), None);
    assert_eq!(a.release(first, term(0xa, 1, 3)).await.unwrap(), None);

    // Seen by a blocking query, with what was written.
    let view = until(&b, |view| view.record.version == renewed).await;
    assert_eq!(view.record.term, Some(term(0xa, 1, 2)));
    assert_eq!(view.record.taken, 1);
    let session_b = view.session.clone().unwrap();

    // A gift that was decided on an old version changes nothing.
    let gift = |version| Gift { version, session: session_b.clone(), term: term(0xb, 2, 1) };
    assert_eq!(a.give(gift(first)).await.unwrap(), None);
    let given = a.give(gift(renewed)).await.unwrap().expect("it is its own");
    assert_eq!(a.renew(given, term(0xa, 1, 3)).await.unwrap(), None);
    let kept = b.renew(given, term(0xb, 2, 2)).await.unwrap().expect("it was given");
    assert!(kept > given);
    let view = until(&a, |view| view.record.version == kept).await;
    assert_eq!((view.record.session.as_ref(), view.record.taken), (Some(&session_b), 2));

    let mut last = term(0xb, 2, 3);
    last.released = true;
    let released = b.release(kept, last.clone()).await.unwrap().expect("it is its own");
    let view = until(&a, |view| view.record.version == released).await;
    assert_eq!((view.record.session, view.record.term), (None, Some(last)));
    b.leave().await.unwrap();
    until(&a, |view| view.members.len() == 1).await;
    assert!(!session::path(dir_b.path()).exists());
}

#[tokio::test]
async fn a_silent_holder_is_robbed_and_a_lost_session_is_replaced() {
    let Some(consul) = Consul::start("{}").await else { return };
    let (dir_a, dir_b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = ConsulLease::start(consul.node(0xa, dir_a.path())).unwrap();
    let b = ConsulLease::start(consul.node(0xb, dir_b.path())).unwrap();
    let view = until(&a, |view| view.session.is_some()).await;
    let session_a = view.session.unwrap();
    let view = until(&b, |view| view.session.is_some()).await;
    let claim = Claim { version: view.record.version, from: None, term: term(0xa, 1, 1) };
    let version = a.claim(claim).await.unwrap().unwrap();
    let robbing = |version| Claim { version, from: Some(session_a.clone()), term: term(0xb, 2, 1) };
    // It renews just then: what the claim was decided on is old.
    let renewed = a.renew(version, term(0xa, 1, 2)).await.unwrap().unwrap();
    assert_eq!(b.claim(robbing(version)).await.unwrap(), None);
    let robbed = b.claim(robbing(renewed)).await.unwrap().unwrap();
    assert_eq!(a.renew(robbed, term(0xa, 1, 3)).await.unwrap(), None);

    // The next agent on the directory goes on with the session.
    drop(a);
    let a = ConsulLease::start(consul.node(0xa, dir_a.path())).unwrap();
    let view = until(&a, |view| view.session.is_some()).await;
    assert_eq!(view.session.as_ref(), Some(&session_a));
    // One that Consul does not know any more is replaced.
    drop(a);
    api::destroy_session(&Client::new(consul.options()).unwrap(), &session_a).await.unwrap();
    let a = ConsulLease::start(consul.node(0xa, dir_a.path())).unwrap();
    let view = until(&a, |view| view.session.is_some() && view.members.len() == 2).await;
    assert_ne!(view.session, Some(session_a));
}

#[tokio::test]
async fn the_lease_of_a_dead_agent_is_released_and_that_of_a_living_one_is_not() {
    let Some(consul) = Consul::start("{}").await else { return };
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        release_of_dead_agent(consul.options(), "litefs/test", dir.path()).await.unwrap(),
        Released::Nothing
    );
    let a = ConsulLease::start(consul.node(0xa, dir.path())).unwrap();
    until(&a, |view| view.session.is_some()).await;
    a.claim(Claim { version: 0, from: None, term: term(0xa, 1, 1) }).await.unwrap().unwrap();
    let agent = crate::node::Identity::open(dir.path()).unwrap();
    let alive = release_of_dead_agent(consul.options(), "litefs/test", dir.path()).await;
    assert!(matches!(alive, Err(ReleaseError::Alive(_))), "{alive:?}");
    drop(agent);
    a.keeper.abort();
    let released = release_of_dead_agent(consul.options(), "litefs/test", dir.path()).await.unwrap();
    assert_eq!(released, Released::Lease);
    let other = tempfile::tempdir().unwrap();
    let b = ConsulLease::start(consul.node(0xb, other.path())).unwrap();
    let view = until(&b, |view| view.record.session.is_none()).await;
    assert!(view.record.term.unwrap().released);
}

#[tokio::test]
async fn a_token_is_needed_where_consul_wants_one_and_read_again_for_each_call() {
    let acl = r#"{"acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "secret"}}}"#;
    let Some(consul) = Consul::start(acl).await else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "wrong\n").unwrap();
    let options = Options { token: Token::File(file.clone()), ..consul.options() };
    let a = ConsulLease::start(ConsulNode { options, ..consul.node(0xa, dir.path()) }).unwrap();
    // Consul shows no keys to those who may see none.
    let error = match a.view(None).await {
        Err(error) => error.to_string(),
        Ok(view) => {
            assert!(view.members.is_empty(), "seen without a token");
            a.renew(1, term(0xa, 1, 1)).await.unwrap_err().to_string()
        }
    };
    assert!(error.contains("token") || error.contains("no session"), "{error}");
    // The bootstrap of ACLs may take a moment longer than the start.
    std::fs::write(&file, "secret\n").unwrap();
    until(&a, |view| view.session.is_some() && view.members.len() == 1).await;
}

#[tokio::test]
async fn the_next_address_is_used_when_one_hangs_and_all_are_named_when_none_answers() {
    let hanging = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hanging = format!("http://{}", hanging.local_addr().unwrap());
    let gone = format!("http://127.0.0.1:{}", free_port());
    let options = |addresses: &[&String]| Options {
        addresses: addresses.iter().map(|address| (*address).clone()).collect(),
        timeout: Duration::from_millis(300),
        token: Token::Credential("none"),
        tls: None,
    };
    let none = Client::new(options(&[&hanging, &gone])).unwrap();
    let error = none.read("/v1/kv/x", Duration::ZERO).await.unwrap_err().to_string();
    assert!(
        error.contains(&hanging) && error.contains(&gone) && error.contains("does not answer"),
        "{error}"
    );
    let Some(consul) = Consul::start("{}").await else { return };
    let all = Client::new(options(&[&hanging, &gone, &consul.address])).unwrap();
    assert_eq!(all.read("/v1/kv/x?consistent", Duration::ZERO).await.unwrap().status.as_u16(), 404);
}

#[tokio::test]
async fn tls_to_consul_checks_both_sides() {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params.clone(), KeyPair::generate().unwrap()).unwrap();
    let stranger = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let ca = file("ca.pem", authority.pem());
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let identity = (file("own.pem", certificate.pem()), file("own.key", key.serialize_pem()));
    let config = serde_json::json!({
        "ca_file": ca, "cert_file": identity.0, "key_file": identity.1, "verify_incoming": true,
    });
    let tls = Tls { ca: ca.clone(), identity: Some(identity) };
    let Some(consul) = Consul::start_with(&config.to_string(), Some(tls)).await else { return };
    let data = tempfile::tempdir().unwrap();
    let lease = ConsulLease::start(consul.node(0xa, data.path())).unwrap();
    until(&lease, |view| view.session.is_some() && view.members.len() == 1).await;

    let refused = |tls| async {
        let client = Client::new(Options { tls: Some(tls), ..consul.options() }).unwrap();
        client.read("/v1/kv/none", Duration::ZERO).await.unwrap_err().to_string()
    };
    let without = refused(Tls { ca: ca.clone(), identity: None }).await;
    assert!(without.contains(&consul.address), "{without}");
    let untrusted = refused(Tls { ca: file("other.pem", stranger.pem()), identity: None }).await;
    assert!(untrusted.contains("certificate"), "{untrusted}");
    let missing = Tls { ca: dir.path().join("none.pem"), identity: None };
    let error = Client::new(Options { tls: Some(missing), ..consul.options() }).unwrap_err().to_string();
    assert!(error.contains("none.pem"), "{error}");
}
