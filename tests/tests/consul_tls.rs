//! A Consul that is reached by https, wants a certificate of each client, and a token with the documented rights.

use litefs_tests::*;

/// What `docs/configuration.md` says the token needs.
const RULES: &str = r#"key_prefix "litefs/db" { policy = "write" } session_prefix "" { policy = "write" }"#;

/// A Consul with certificates and tokens, and what hosts need to use it.
struct Secured {
    consul: Consul,
    https: Port,
    authority: Authority,
    token: String,
}

impl Secured {
    fn start(fleet: &Fleet) -> Secured {
        let authority = Authority::new();
        let own = authority.certify(&fleet.scratch().join("consul"), &authority);
        let (consul, https) = Consul::start_tls(&own);
        let token = wait_for("Consul makes tokens", PATIENCE, || consul.create_token(RULES));
        Secured { consul, https, authority, token }
    }

    fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.https.number)
    }

    /// A candidate that trusts Consul, and may be trusted by it.
    fn host(&self, fleet: &Fleet, name: &str) -> Host {
        let host = self.host_with(fleet, name, &self.token, &self.authority);
        let identity =
            self.authority.certify(&fleet.scratch().join(format!("{name}-shown")), &self.authority);
        host.set(&format!("consul.tls-certificate={}", identity.certificate.display()));
        host.set(&format!("consul.tls-key={}", identity.key.display()));
        host
    }

    /// One that shows no certificate.
    fn host_with(&self, fleet: &Fleet, name: &str, token: &str, trusted: &Authority) -> Host {
        let host = fleet.host(name, Role::Candidate(&self.address()));
        let identity = self.authority.certify(&fleet.scratch().join(name), trusted);
        host.set(&format!("consul.tls-ca={}", identity.ca.display()));
        let file = fleet.scratch().join(format!("{name}.token"));
        std::fs::write(&file, token).expect("a token in a scratch directory");
        host.set(&format!("consul.token-file={}", file.display()));
        host
    }
}

fn insert(host: &Host) -> Result<String, String> {
    host.try_sql("app.db", "INSERT INTO t DEFAULT VALUES")
}

#[test]
fn the_lease_is_taken_handed_over_and_taken_over_by_https() {
    let fleet = Fleet::new();
    let secured = Secured::start(&fleet);
    let (a, b) = (secured.host(&fleet, "a"), secured.host(&fleet, "b"));
    a.start();
    a.wait_for("the first host is primary", || a.is_primary());
    b.start();
    b.wait_for("the second host follows", || b.follows(&a));
    a.sql("app.db", "PRAGMA journal_mode=WAL; CREATE TABLE t(x INTEGER PRIMARY KEY);");
    run(&mut a.litefs(&["handoff", "--to", "b"]));
    b.wait_for("it leads", || b.is_primary());
    insert(&b).expect("the new primary takes writes");
    a.wait_for("the old one follows", || a.follows(&b));
    a.wait_position_equal(&b, "app.db");
    b.kill();
    a.wait_for("it leads after the TTL", || a.is_primary());
    insert(&a).expect("the new primary takes writes");
    b.start();
    b.wait_for("the old one follows", || b.follows(&a));
    assert_equal(&a, &b, "app.db");

    // The command that systemd runs after an agent that died.
    a.kill();
    let agent = a.agent_command();
    let mut release = std::process::Command::new(agent.get_program());
    release.arg("release-lease").args(agent.get_args().filter(|word| *word != "agent"));
    assert_eq!(run(&mut release), "the lease is free");
    b.wait_for("it leads", || b.is_primary());
    assert_eq!(b.sql("app.db", "SELECT count(*) FROM t"), "2");
}

#[test]
fn a_host_that_consul_does_not_believe_or_that_does_not_believe_it_says_why_and_does_not_lead() {
    let fleet = Fleet::new();
    let secured = Secured::start(&fleet);
    let stranger = Authority::new();
    let wary = secured.host(&fleet, "wary");
    let other = stranger.certify(&fleet.scratch().join("other"), &stranger);
    wary.set(&format!("consul.tls-ca={}", other.ca.display()));
    let bare = secured.host_with(&fleet, "bare", &secured.token, &secured.authority);
    let unknown = secured.host(&fleet, "unknown");
    let shown = stranger.certify(&fleet.scratch().join("shown"), &stranger);
    unknown.set(&format!("consul.tls-certificate={}", shown.certificate.display()));
    unknown.set(&format!("consul.tls-key={}", shown.key.display()));
    let powerless = secured.host(&fleet, "powerless");
    std::fs::write(fleet.scratch().join("powerless.token"), "anonymous")
        .expect("a token in a scratch directory");
    let cases = [
        (&powerless, "consul.token-file"),
        (&wary, "invalid peer certificate: UnknownIssuer; consul.tls-ca"),
        (&bare, "consul.tls-certificate"),
        (&unknown, "consul.tls-certificate"),
    ];
    for (host, why) in cases {
        host.start();
        host.wait_for("the log says why there is no lease", || {
            let log = host.log();
            let line = log.lines().find(|line| line.contains(&secured.address()) && line.contains(why));
            line.is_some()
        });
        assert_eq!(host.status()["role"]["name"], "none");
        // Without rights Consul shows an empty store; it is the session that it refuses.
        if host.name() != "powerless" {
            host.wait_for("so does the status", || host.waits().contains(why));
        }
    }
    // Nobody of them is in the way of one that has all.
    assert!(secured.consul.get("/v1/kv/litefs/db/primary?raw").is_none());
    let good = secured.host(&fleet, "good");
    good.start();
    good.wait_for("it leads", || good.is_primary());
    for (host, _) in cases {
        assert_eq!(host.status()["role"]["name"], "none", "{}", host.name());
    }
}
