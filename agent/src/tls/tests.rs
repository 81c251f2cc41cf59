use super::*;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// A directory with `NAME.ca`, and `NAME.pem` and `NAME.key` of what it signed.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    ca: PathBuf,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let ca = dir.join(format!("{name}.ca"));
        std::fs::write(&ca, issuer.pem()).unwrap();
        Authority { issuer, ca }
    }

    fn sign(&self, names: &[&str]) -> TlsConfig {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let stem = self.ca.with_file_name(names.join(","));
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let (pem, key_file) = (stem.with_extension("pem"), stem.with_extension("key"));
        std::fs::write(&pem, certificate.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        TlsConfig {
            certificate: Some(pem),
            key: Some(key_file),
            ca: Some(self.ca.clone()),
            peer_name: None,
            client_certificates: ClientCertificates::Required,
        }
    }
}

fn load(config: &TlsConfig) -> NodeTls {
    NodeTls::load(config).unwrap().unwrap()
}

/// What each side finds: the accepting one whether the other is certified.
async fn meet(accepting: &NodeTls, connecting: &NodeTls, host: &str) -> (io::Result<bool>, io::Result<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async {
        let (stream, _) = listener.accept().await?;
        let (mut stream, certified) = accepting.accept(stream).await?;
        stream.write_all(b"hello").await?;
        stream.flush().await?;
        Ok(certified)
    };
    let connect = async {
        let mut stream = connecting.connect(host, TcpStream::connect(address).await?).await?;
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).await?;
        assert_eq!(&hello, b"hello");
        Ok(())
    };
    tokio::join!(accept, connect)
}

#[tokio::test]
async fn nodes_of_one_authority_prove_who_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "fleet");
    let (a, b) = (load(&authority.sign(&["host-a"])), load(&authority.sign(&["host-b"])));
    let (accepted, connected) = meet(&a, &b, "host-a").await;
    assert!(accepted.unwrap());
    connected.unwrap();
}

#[tokio::test]
async fn an_upstream_with_the_certificate_of_another_host_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "fleet");
    let (a, b) = (load(&authority.sign(&["host-a"])), load(&authority.sign(&["host-b"])));
    let error = meet(&a, &b, "host-c").await.1.unwrap_err().to_string();
    assert!(error.contains("host-c") && error.contains("host-a"), "{error}");
}

#[tokio::test]
async fn a_node_of_another_authority_is_refused_by_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(dir.path(), "ours"), Authority::new(dir.path(), "theirs"));
    let (a, stranger) = (load(&ours.sign(&["host-a"])), load(&theirs.sign(&["stranger"])));
    assert!(meet(&stranger, &a, "stranger").await.1.is_err());
    // It does not look at what the other side shows.
    let mut blind = theirs.sign(&["blind"]);
    blind.ca = Some(ours.ca.clone());
    let (accepted, connected) = meet(&a, &load(&blind), "host-a").await;
    assert!(accepted.is_err());
    assert!(connected.is_err());
}

#[tokio::test]
async fn with_a_peer_name_only_certificates_that_have_it_count() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "fleet");
    let named = |names: &[&str]| {
        let mut config = authority.sign(names);
        config.peer_name = Some("db.fleet".into());
        load(&config)
    };
    let (a, b, web) = (named(&["a", "db.fleet"]), named(&["b", "db.fleet"]), named(&["web"]));
    // The URL's host does not matter then.
    let (accepted, connected) = meet(&a, &b, "192.0.2.1").await;
    assert!(accepted.unwrap());
    connected.unwrap();
    assert!(!meet(&a, &web, "a").await.0.unwrap());
    assert!(meet(&web, &b, "web").await.1.is_err());
}

#[test]
fn what_is_no_certificate_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "fleet");
    let good = authority.sign(&["host-a"]);
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let missing = dir.path().join("missing");
    let other = authority.sign(&["host-b"]).key;
    for (config, file) in [
        (TlsConfig { certificate: Some(missing.clone()), ..good.clone() }, "missing"),
        (TlsConfig { certificate: Some(empty.clone()), ..good.clone() }, "empty"),
        (TlsConfig { key: Some(empty.clone()), ..good.clone() }, "empty"),
        (TlsConfig { ca: Some(empty), ..good.clone() }, "empty"),
        (TlsConfig { key: None, ..good.clone() }, "tls.key"),
        (TlsConfig { key: other, ..good.clone() }, "host-a.pem"),
    ] {
        let error = NodeTls::load(&config).unwrap_err().to_string();
        assert!(error.contains(file), "{error}");
    }
    assert!(NodeTls::load(&TlsConfig { certificate: None, ..good }).unwrap().is_none());
}
