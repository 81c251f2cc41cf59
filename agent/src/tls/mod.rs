//! Certificates of this node: loaded once, shown to whoever connects and to whom this node connects, and checked on
//! both sides. TLS 1.3 with rustls; keys and certificates are PEM files.

mod files;
#[cfg(test)]
mod tests;

pub use files::{client_config, client_config_without_trust};

use crate::config::{ClientCertificates, TlsConfig};
use files::{certificates, key, roots};
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{DnsName, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is no PEM.
    #[error("cannot read {what} {}: {why}", path.display())]
    File {
        /// What it should be.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// There is no key.
    #[error(
        "tls.certificate is set, but neither tls.key nor a credential \"tls-key\" is there: set one of the two"
    )]
    NoKey,
    /// The credential cannot be read.
    #[error(transparent)]
    Credential(#[from] io::Error),
    /// The files do not fit together, or TLS refuses them.
    #[error("cannot use the certificate {} with its key: {why}", path.display())]
    Unusable {
        /// The certificate.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// No certificate can have this name.
    #[error("tls.peer-name {name:?}: {why}")]
    PeerName {
        /// The name.
        name: String,
        /// The reason.
        why: String,
    },
    /// The authorities cannot be used.
    #[error("cannot use the certificate authorities in {}: {why}", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: String,
    },
}

/// What this node needs to accept and open TLS connections between nodes.
#[derive(Clone)]
pub struct NodeTls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    /// Name that the certificates of all nodes have, if the configuration wants one.
    peer_name: Option<DnsName<'static>>,
    client_certificates: ClientCertificates,
}

impl fmt::Debug for NodeTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeTls").field("peer_name", &self.peer_name).finish_non_exhaustive()
    }
}

impl NodeTls {
    /// Loads what the configuration names; `None` when it names nothing.
    ///
    /// # Errors
    /// A file is missing or is not what it should be.
    pub fn load(config: &TlsConfig) -> Result<Option<NodeTls>, TlsError> {
        let (Some(certificate), Some(ca)) = (&config.certificate, &config.ca) else { return Ok(None) };
        let chain = certificates(certificate)?;
        let key = key(config.key.as_deref())?;
        let roots = Arc::new(roots(ca)?);
        let unusable =
            |error: rustls::Error| TlsError::Unusable { path: certificate.clone(), why: error.to_string() };

        let peer_name = match &config.peer_name {
            Some(name) => Some(
                DnsName::try_from(name.clone())
                    .map_err(|error| TlsError::PeerName { name: name.clone(), why: error.to_string() })?,
            ),
            None => None,
        };
        let provider = provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            // Metrics are for those without a certificate too; everything else is refused request by request.
            .allow_unauthenticated()
            .build()
            .map_err(|error| TlsError::Authorities { path: ca.clone(), why: error.to_string() })?;
        let versions = &[&rustls::version::TLS13];
        let mut accepting = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        accepting.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut connecting = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(unusable)?;
        connecting.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Some(NodeTls {
            acceptor: Arc::new(accepting).into(),
            connector: Arc::new(connecting).into(),
            peer_name,
            client_certificates: config.client_certificates,
        }))
    }

    /// Whether a peer has to show a certificate before it gets more than metrics.
    pub fn wants_certificate(&self) -> bool {
        self.client_certificates == ClientCertificates::Required
    }

    /// Accepts a connection; also tells whether the peer has shown a certificate of a node.
    ///
    /// # Errors
    /// It is not TLS, or a certificate is not valid.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(server::TlsStream<TcpStream>, bool)> {
        let stream = self.acceptor.accept(stream).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certified = match (shown, &self.peer_name) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(certificate), Some(name)) => ParsedCertificate::try_from(certificate)
                .and_then(|parsed| verify_server_name(&parsed, &ServerName::DnsName(name.clone())))
                .is_ok(),
        };
        Ok((stream, certified))
    }

    /// Makes a connection to `host` a TLS connection.
    ///
    /// # Errors
    /// The other side does not speak TLS, or its certificate is not valid for it.
    pub async fn connect(&self, host: &str, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        let name = match &self.peer_name {
            Some(name) => ServerName::DnsName(name.clone()),
            None => ServerName::try_from(host.to_owned()).map_err(io::Error::other)?,
        };
        self.connector.connect(name, stream).await
    }
}

/// The cryptography of all TLS in this process. Named, so that nothing depends on a default of the process.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
