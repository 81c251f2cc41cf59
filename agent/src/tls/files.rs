//! Certificates, keys and authorities out of PEM files.

use super::{TlsError, provider};
use crate::systemd::credentials;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use std::path::Path;

/// Name of the credential with this node's key.
const KEY_CREDENTIAL: &str = "tls-key";

/// A client of a server that is no node, with authorities that vouch for it, and a certificate with its key to show
/// where the server wants one.
///
/// # Errors
/// A file is missing or is not what it should be.
pub fn client_config(ca: &Path, identity: Option<(&Path, &Path)>) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Authorities { path: ca.to_owned(), why: error.to_string() })?
        .with_root_certificates(roots(ca)?);
    let Some((certificate, key)) = identity else { return Ok(builder.with_no_client_auth()) };
    builder
        .with_client_auth_cert(certificates(certificate)?, key_file(key)?)
        .map_err(|error| TlsError::Unusable { path: certificate.to_owned(), why: error.to_string() })
}

/// A client that trusts no authority, for one that never speaks TLS.
///
/// # Errors
/// TLS cannot be set up at all.
pub fn client_config_without_trust() -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder =
        builder.map_err(|error| TlsError::Authorities { path: "".into(), why: error.to_string() })?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// A certificate and those between it and its authority.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |why: String| TlsError::File { what: "the certificate", path: path.to_owned(), why };
    let chain = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let chain: Vec<_> = chain.map_err(|error: pem::Error| failed(show(&error)))?;
    if chain.is_empty() {
        return Err(failed("there is no certificate in PEM form in it".to_owned()));
    }
    Ok(chain)
}

/// This node's key: the file, or the credential of the service.
pub(super) fn key(path: Option<&Path>) -> Result<PrivateKeyDer<'static>, TlsError> {
    if let Some(path) = path {
        return key_file(path);
    }
    let text = credentials::read(KEY_CREDENTIAL)?.ok_or(TlsError::NoKey)?;
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| TlsError::File {
        what: "the credential",
        path: KEY_CREDENTIAL.into(),
        why: show(&error),
    })
}

fn key_file(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::File {
        what: "the private key",
        path: path.to_owned(),
        why: show(&error),
    })
}

/// The authorities that certificates must come from.
pub(super) fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::Authorities { path: path.to_owned(), why: error.to_string() })?;
    }
    Ok(roots)
}

fn show(error: &pem::Error) -> String {
    match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => "it has no such PEM section".to_owned(),
        other => other.to_string(),
    }
}
