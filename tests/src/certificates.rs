//! Certificates that tests sign themselves. Every host of a test is at 127.0.0.1.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Longer than any test runs.
const LAST_YEAR: i32 = 4000;

/// Signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

/// PEM files: what somebody shows, and the authority that it trusts.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The trusted authority.
    pub ca: PathBuf,
}

impl Default for Authority {
    fn default() -> Self {
        Authority::new()
    }
}

fn key_pair() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn write(path: &Path, text: String) {
    fs::write(path, text).expect("a certificate in a scratch directory");
}

impl Authority {
    /// One that nobody else knows.
    pub fn new() -> Authority {
        let key = key_pair();
        let mut params = CertificateParams::default();
        // Of the same name it would be a forged one, not an unknown one.
        let name = format!("authority {:02x?}", &key.public_key_raw()[..8]);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    /// Makes the directory and writes a certificate and its key there, and `trusted` as the authority.
    pub fn certify(&self, dir: &Path, trusted: &Authority) -> Identity {
        fs::create_dir(dir).expect("a directory for certificates");
        let identity =
            Identity { certificate: dir.join("host.pem"), key: dir.join("host.key"), ca: dir.join("ca.pem") };
        write(&identity.ca, trusted.0.pem());
        self.renew(&identity);
        identity
    }

    /// Writes another certificate, which ends with that year, and its key.
    pub fn renew_until(&self, identity: &Identity, last_year: i32) {
        let key = key_pair();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address");
        params.not_after = date_time_ymd(last_year, 12, 31);
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        write(&identity.certificate, certificate.pem());
        write(&identity.key, key.serialize_pem());
    }

    /// As [`Authority::renew_until`], for longer than any test runs.
    pub fn renew(&self, identity: &Identity) {
        self.renew_until(identity, LAST_YEAR);
    }
}
