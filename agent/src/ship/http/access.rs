//! Who may talk to this node's port, and what this node shows to others: TLS with certificates on both sides, and a
//! secret that all nodes of a cluster share. Both are optional; what is set must be met.

use crate::config::Config;
use crate::ship::peer::{Refusal, RefusalCode};
use crate::systemd::credentials;
use crate::tls::{NodeTls, TlsError};
use http::HeaderValue;
use http::header::{AUTHORIZATION, HeaderMap};
use parking_lot::RwLock;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use tokio::net::TcpStream;
use tokio_rustls::client;
use tokio_util::either::Either;

/// Name of the credential with the shared secret.
const TOKEN_CREDENTIAL: &str = "http-token";

/// Shortest secret; `openssl rand -hex 16` makes twice as many characters.
const TOKEN_LENGTH_MIN: usize = 16;

/// Paths that tell how the node is, but nothing of what is in databases. They are for everyone who can connect.
const OPEN_PATHS: [&str; 2] = ["/metrics", "/info"];

/// Why the secrets of the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The file or credential of the shared secret.
    #[error("cannot read the shared secret {}: {source}", path.display())]
    Token {
        /// File, or name of the credential.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// What is in it.
    #[error("the shared secret in {} {why}", path.display())]
    BadToken {
        /// File, or name of the credential.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// A secret that all nodes of a cluster share.
#[derive(Clone)]
struct Token {
    /// `Bearer ...`, as it is sent.
    header: HeaderValue,
}

impl Token {
    fn new(path: PathBuf, text: &str) -> Result<Token, AccessError> {
        let text = text.trim();
        let bad = |why: String| AccessError::BadToken { path: path.clone(), why };
        if text.len() < TOKEN_LENGTH_MIN {
            return Err(bad(format!("has {} characters: use at least {TOKEN_LENGTH_MIN}", text.len())));
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(bad("may only have printable ASCII characters without spaces".to_owned()));
        }
        let mut header = HeaderValue::from_str(&format!("Bearer {text}")).map_err(|e| bad(e.to_string()))?;
        header.set_sensitive(true);
        Ok(Token { header })
    }

    fn load(config: &Config) -> Result<Option<Token>, AccessError> {
        let (path, text) = match &config.http.token_file {
            Some(path) => (path.clone(), std::fs::read_to_string(path).map(Some)),
            None => (PathBuf::from(TOKEN_CREDENTIAL), credentials::read(TOKEN_CREDENTIAL)),
        };
        match text {
            Ok(Some(text)) => Token::new(path, &text).map(Some),
            Ok(None) => Ok(None),
            Err(source) => Err(AccessError::Token { path, source }),
        }
    }

    /// Takes the same time whatever was shown.
    fn is_shown_in(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        shown.ct_eq(self.header.as_bytes()).into()
    }
}

#[derive(Clone, Default)]
struct Rules {
    tls: Option<NodeTls>,
    token: Option<Token>,
}

impl Rules {
    fn load(config: &Config) -> Result<Rules, AccessError> {
        Ok(Rules { tls: NodeTls::load(&config.tls)?, token: Token::load(config)? })
    }
}

/// The rules in force; connections that are open keep those they began with. The default lets everybody in.
#[derive(Default)]
pub struct Access(RwLock<Rules>);

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.0.read();
        f.debug_struct("Access").field("tls", &rules.tls).field("token", &rules.token.is_some()).finish()
    }
}

/// A stream between nodes.
pub type NodeStream = Either<TcpStream, client::TlsStream<TcpStream>>;

impl Access {
    /// Loads certificates and secret.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub fn load(config: &Config) -> Result<Arc<Access>, AccessError> {
        Ok(Arc::new(Access(RwLock::new(Rules::load(config)?))))
    }

    /// Loads certificates and secret again.
    ///
    /// # Errors
    /// One of them cannot be used; the old ones stay in force.
    pub fn reload(&self, config: &Config) -> Result<(), AccessError> {
        *self.0.write() = Rules::load(config)?;
        Ok(())
    }

    /// The TLS that connections to this node have to speak.
    pub(super) fn tls(&self) -> Option<NodeTls> {
        self.0.read().tls.clone()
    }

    /// Checks a request of another host; `certified`: the connection has shown a certificate of a node.
    pub(super) fn check(&self, path: &str, headers: &HeaderMap, certified: bool) -> Result<(), Refusal> {
        if OPEN_PATHS.contains(&path) {
            return Ok(());
        }
        let rules = self.0.read();
        let refused = |why: &str| Err(Refusal::new(RefusalCode::Unauthorized, why));
        if !certified && rules.tls.as_ref().is_some_and(NodeTls::wants_certificate) {
            return refused(
                "this node wants a certificate of a node of its cluster: look at tls.certificate, tls.ca and tls.peer-name on both sides",
            );
        }
        match &rules.token {
            Some(token) if !token.is_shown_in(headers) => refused(
                "this node wants the secret that the nodes of its cluster share: look at http.token-file and the credential http-token on both sides",
            ),
            _ => Ok(()),
        }
    }

    /// Connects to another node's port, with TLS where this node uses it.
    ///
    /// # Errors
    /// No connection; the other side cannot prove that it is who it should be; or `tls`, which is what the other node's
    /// address asks for, is not what this node is configured for.
    pub async fn connect(&self, host: &str, port: u16, tls: bool) -> io::Result<NodeStream> {
        let own = self.tls();
        match (tls, own.is_some()) {
            (true, false) => {
                return Err(io::Error::other(
                    "its address begins with https://, but this node has no [tls] settings",
                ));
            }
            (false, true) => {
                return Err(io::Error::other(
                    "its address begins with http://, but this node has [tls] settings: use https:// and TLS on all nodes",
                ));
            }
            _ => {}
        }
        let stream = TcpStream::connect((host, port)).await?;
        // Frames are flushed as they are made; Nagle would hold each back for a round trip.
        stream.set_nodelay(true)?;
        Ok(match own {
            Some(tls) => Either::Right(tls.connect(host, stream).await?),
            None => Either::Left(stream),
        })
    }

    /// Adds the shared secret to a request for another node.
    pub fn sign(&self, headers: &mut HeaderMap) {
        if let Some(token) = &self.0.read().token {
            headers.insert(AUTHORIZATION, token.header.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_token(text: &str) -> Access {
        let token = Token::new("file".into(), text).unwrap();
        Access(RwLock::new(Rules { tls: None, token: Some(token) }))
    }

    #[test]
    fn a_secret_that_is_signed_is_accepted_and_no_other() {
        let access = with_token("0123456789abcdef");
        let mut headers = HeaderMap::new();
        assert!(access.check("/v1/follow", &headers, false).is_err());
        with_token("0123456789abcdeg").sign(&mut headers);
        let refusal = access.check("/v1/follow", &headers, false).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::Unauthorized);
        access.sign(&mut headers);
        assert_eq!(access.check("/v1/follow", &headers, false), Ok(()));
        assert_eq!(access.check("/metrics", &HeaderMap::new(), false), Ok(()));
    }

    #[test]
    fn secrets_that_are_easy_to_guess_or_cannot_be_sent_are_refused() {
        for (text, why) in [
            ("short", "has 5 characters"),
            ("0123456789 abcdef", "printable"),
            ("0123456789äbcdef", "printable"),
        ] {
            let error = Token::new("/etc/litefs/token".into(), text).err().unwrap().to_string();
            assert!(error.contains(why) && error.contains("/etc/litefs/token"), "{error}");
        }
        assert!(Token::new("file".into(), "0123456789abcdef\n").is_ok());
    }

    #[test]
    fn a_secret_is_never_shown() {
        let shown = format!("{:?}", with_token("0123456789abcdef"));
        assert!(!shown.contains("0123456789"), "{shown}");
    }
}
