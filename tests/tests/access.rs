//! Who may connect: certificates on both sides, and a shared secret.

use litefs_tests::{Authority, Fleet, Host, Identity, PATIENCE, Role, assert_equal, run, wait_for};
use std::fs;
use std::process::Command;

const CREATE: &str = "PRAGMA journal_mode=WAL; CREATE TABLE t(v); INSERT INTO t VALUES (1);";

/// Gives a host a directory with certificate, key and the authority that it trusts, and switches TLS on.
fn secure(fleet: &Fleet, host: &Host, signed_by: &Authority, trusted: &Authority) -> Identity {
    let identity = signed_by.certify(&fleet.scratch().join(host.name()), trusted);
    for (key, file) in [("certificate", &identity.certificate), ("key", &identity.key), ("ca", &identity.ca)]
    {
        host.set(&format!("tls.{key}={}", file.display()));
    }
    host.set(&format!("http.advertise-url=https://127.0.0.1:{}", host.port()));
    identity
}

fn follow(host: &Host, upstream: &Host) {
    host.set(&format!("lease.primary-url=https://127.0.0.1:{}", upstream.port()));
}

/// HTTP status that somebody gets who has neither certificate nor secret.
fn asked_by_a_stranger(url: &str) -> String {
    let program = "import ssl, sys, urllib.request, urllib.error\n\
        context = ssl._create_unverified_context()\n\
        try: print(urllib.request.urlopen(sys.argv[1], context=context, timeout=30).status)\n\
        except urllib.error.HTTPError as error: print(error.code, error.read().decode())\n";
    run(Command::new("python3").args(["-c", program, url]))
}

#[track_caller]
fn wait_log(host: &Host, text: &str) {
    wait_for(&format!("{text:?} in the log of {}", host.name()), PATIENCE, || {
        host.log().contains(text).then_some(())
    });
}

#[test]
fn hosts_with_certificates_follow_each_other_and_strangers_see_only_metrics() {
    let fleet = Fleet::new();
    let authority = Authority::new();
    let primary = fleet.host("a", Role::Primary);
    secure(&fleet, &primary, &authority, &authority);
    primary.start();
    primary.sql("app.db", CREATE);
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    secure(&fleet, &replica, &authority, &authority);
    follow(&replica, &primary);
    replica.start();
    replica.wait_sql("app.db", "SELECT v FROM t", "1");
    primary.sql("app.db", "INSERT INTO t VALUES (2)");
    primary.wait_position_equal(&replica, "app.db");
    assert_equal(&primary, &replica, "app.db");

    let port = primary.port();
    assert_eq!(asked_by_a_stranger(&format!("https://127.0.0.1:{port}/metrics")), "200");
    assert_eq!(asked_by_a_stranger(&format!("https://127.0.0.1:{port}/info")), "200");
    for path in ["/v1/export?name=app.db", "/v1/status", "/events", "/v1/databases/snapshot?name=app.db"] {
        let answer = asked_by_a_stranger(&format!("https://127.0.0.1:{port}{path}"));
        assert!(answer.starts_with("401 this node wants a certificate"), "{path}: {answer}");
    }
}

#[test]
fn neither_side_believes_a_host_of_another_authority() {
    let fleet = Fleet::new();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let primary = fleet.host("a", Role::Primary);
    secure(&fleet, &primary, &ours, &ours);
    primary.start();
    primary.sql("app.db", CREATE);
    // One whose certificate the primary does not believe, and one that does not believe the primary.
    for (name, signed_by, trusted) in [("unknown", &theirs, &ours), ("wary", &ours, &theirs)] {
        let replica = fleet.host(name, Role::ReplicaOf(&primary));
        secure(&fleet, &replica, signed_by, trusted);
        follow(&replica, &primary);
        replica.start();
        wait_log(&replica, &format!("upstream https://127.0.0.1:{}", primary.port()));
        wait_log(&primary, "no TLS connection");
        assert!(!replica.path("app.db").exists());
    }
}

#[test]
fn an_expired_certificate_is_replaced_by_a_reload() {
    let fleet = Fleet::new();
    let authority = Authority::new();
    let primary = fleet.host("a", Role::Primary);
    let files = secure(&fleet, &primary, &authority, &authority);
    authority.renew_until(&files, 2020);
    primary.start();
    primary.sql("app.db", CREATE);
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    secure(&fleet, &replica, &authority, &authority);
    follow(&replica, &primary);
    replica.start();
    wait_log(&replica, "expired");
    // A reload with a file that is no certificate changes nothing.
    let good = fs::read(&files.ca).unwrap();
    fs::write(&files.ca, "nothing").unwrap();
    primary.expect_error("the configuration was not taken over").reload();
    wait_log(&primary, "ca.pem");
    primary.assert_running();
    fs::write(&files.ca, good).unwrap();
    authority.renew(&files);
    primary.reload();
    replica.wait_sql("app.db", "SELECT v FROM t", "1");
}

#[test]
fn a_shared_secret_keeps_others_out() {
    let fleet = Fleet::new();
    let secret = |host: &Host, text: &str| {
        let file = fleet.scratch().join(format!("{}.secret", host.name()));
        fs::write(&file, text).expect("a secret in a scratch directory");
        host.set(&format!("http.token-file={}", file.display()));
        file
    };
    let primary = fleet.host("a", Role::Primary);
    secret(&primary, "correct horse battery staple".replace(' ', "-").as_str());
    primary.start();
    primary.sql("app.db", CREATE);
    let replica = fleet.host("b", Role::ReplicaOf(&primary));
    let file = secret(&replica, "incorrect-horse-battery");
    replica.start();
    wait_log(&replica, "this node wants the secret");
    let answer = asked_by_a_stranger(&format!("{}/v1/export?name=app.db", primary.url()));
    assert!(answer.starts_with("401 this node wants the secret"), "{answer}");
    assert_eq!(asked_by_a_stranger(&format!("{}/metrics", primary.url())), "200");
    assert!(!replica.path("app.db").exists());
    fs::write(file, "correct-horse-battery-staple\n").unwrap();
    replica.reload();
    replica.wait_sql("app.db", "SELECT v FROM t", "1");
}

#[test]
fn an_agent_with_unusable_secrets_does_not_start_and_names_the_file() {
    let fleet = Fleet::new();
    let host = fleet.host("a", Role::Primary);
    host.set("http.token-file=/nonexistent/secret").start_without_waiting();
    assert!(!host.wait_ended().success());
    assert!(host.log().contains("/nonexistent/secret"), "{}", host.log());
}
