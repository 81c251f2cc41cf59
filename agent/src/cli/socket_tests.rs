//! Commands against a served control socket.

use super::client::Client;
use super::failure::{self, Failure};
use super::{export, import, status};
use crate::DatabaseName;
use crate::status::api::DatabaseState;
use crate::status::fake::{self, FakeNode};
use crate::status::handle;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ltx::Pos;
use std::convert::Infallible;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::UnixListener;

/// Answers one connection after the other, as the agent's control socket does.
async fn serve(listener: UnixListener, node: Arc<FakeNode>) {
    while let Ok((stream, _)) = listener.accept().await {
        let node = node.clone();
        let service = service_fn(move |request| {
            let node = node.clone();
            async move { Ok::<_, Infallible>(handle(request, true, node).await) }
        });
        // A client that leaves early is no concern of the next one.
        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }
}

struct Host {
    node: Arc<FakeNode>,
    socket: PathBuf,
    out: tempfile::TempDir,
}

impl Host {
    fn start() -> Host {
        let node = Arc::new(FakeNode::new());
        let socket = node.path("control.sock");
        tokio::spawn(serve(UnixListener::bind(&socket).unwrap(), node.clone()));
        Host { node, socket, out: tempfile::tempdir().unwrap() }
    }

    fn client(&self) -> Client {
        Client::new(self.socket.clone(), None)
    }

    fn out(&self, name: &str) -> PathBuf {
        self.out.path().join(name)
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.out.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    async fn export(&self, name: &str, to: &Path) -> Result<String, Failure> {
        let mut out = Vec::new();
        export::export(self.client(), &DatabaseName::new(name).unwrap(), to, &mut out).await?;
        Ok(String::from_utf8(out).unwrap())
    }

    async fn import(&self, name: &str, from: &Path) -> Result<String, Failure> {
        let mut out = Vec::new();
        import::import(self.client(), &DatabaseName::new(name).unwrap(), from, &mut out).await?;
        Ok(String::from_utf8(out).unwrap())
    }
}

#[tokio::test]
async fn status_tells_by_its_exit_code_whether_all_is_well() {
    let host = Host::start();
    let mut out = Vec::new();
    assert_eq!(status::status(host.client(), true, &mut out).await.unwrap(), 0);
    assert_eq!(serde_json::from_slice::<crate::status::Status>(&out).unwrap(), fake::status());
    host.node.status.lock().databases[0].state = DatabaseState::Quarantined;
    assert_eq!(status::status(host.client(), false, &mut Vec::new()).await.unwrap(), 1);
    *host.node.status.lock() = fake::replica();
    assert_eq!(status::status(host.client(), false, &mut Vec::new()).await.unwrap(), 0);
    host.node.status.lock().role.upstream.as_mut().unwrap().connected = false;
    assert_eq!(status::status(host.client(), false, &mut Vec::new()).await.unwrap(), 1);
}

#[tokio::test]
async fn no_agent_is_said_with_the_socket_and_its_own_code() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let doubt = Some("db.toml:1:1: unknown key x".to_owned());
    let failure =
        status::status(Client::new(socket.clone(), doubt), false, &mut Vec::new()).await.unwrap_err();
    assert_eq!(failure.code, failure::NO_AGENT);
    assert!(failure.message.contains(&socket.display().to_string()), "{failure}");
    assert!(
        failure.message.contains("not running") && failure.message.contains("unknown key x"),
        "{failure}"
    );
    // A socket that a dead agent left behind.
    drop(UnixListener::bind(&socket).unwrap());
    let failure = status::status(Client::new(socket, None), false, &mut Vec::new()).await.unwrap_err();
    assert_eq!(failure.code, failure::NO_AGENT);
}

#[tokio::test]
async fn list_shows_names_positions_and_sizes() {
    let mut out = Vec::new();
    status::list(Host::start().client(), &mut out).await.unwrap();
    assert_eq!(
        String::from_utf8(out).unwrap(),
        "DATABASE  POSITION                               SIZE\n\
         a.db      000000000000002a/ffffffffffffffff  8.00 KiB\n"
    );
}

#[tokio::test]
async fn an_export_replaces_the_file_by_a_checked_copy() {
    let host = Host::start();
    let database = fake::database(512, 3000);
    fs::write(host.node.path("a.db"), &database).unwrap();
    fs::write(host.out("copy.db"), "old").unwrap();
    let said = host.export("a.db", &host.out("copy.db")).await.unwrap();
    assert!(said.starts_with("exported a.db at 000000000000002a/"), "{said}");
    assert_eq!(fs::read(host.out("copy.db")).unwrap(), database);
    assert_eq!(host.files(), ["copy.db"]);
}

#[tokio::test]
async fn a_damaged_export_leaves_the_old_file() {
    let host = Host::start();
    fs::write(host.node.path("a.db"), fake::database(512, 3)).unwrap();
    fs::write(host.out("copy.db"), "old").unwrap();
    *host.node.claimed.lock() = Some(Pos::default());
    let failure = host.export("a.db", &host.out("copy.db")).await.unwrap_err();
    assert_eq!(failure.code, failure::DATA);
    assert!(failure.message.contains("its checksum is"), "{failure}");
    assert_eq!(fs::read(host.out("copy.db")).unwrap(), b"old");
    assert_eq!(host.files(), ["copy.db"]);
}

#[tokio::test]
async fn an_export_that_breaks_off_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nLitefs-Position: 1/2\r\n\r\nabc";
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let name = DatabaseName::new("a.db").unwrap();
    let path = dir.path().join("copy.db");
    let failure = export::export(Client::new(socket, None), &name, &path, &mut Vec::new()).await.unwrap_err();
    assert!(failure.message.contains("broke off after 3 of 1000 bytes"), "{failure}");
    assert!(!path.exists());
    agent.join().unwrap();
}

#[tokio::test]
async fn an_export_beside_a_foreign_wal_is_refused() {
    let host = Host::start();
    fs::write(host.node.path("a.db"), fake::database(512, 3)).unwrap();
    fs::write(host.out("copy.db-wal"), "frames of another database").unwrap();
    let failure = host.export("a.db", &host.out("copy.db")).await.unwrap_err();
    assert!(failure.message.contains("copy.db-wal"), "{failure}");
    assert_eq!(host.files(), ["copy.db-wal"]);
}

#[tokio::test]
async fn an_unknown_database_is_named() {
    let host = Host::start();
    let failure = host.export("gone.db", &host.out("copy.db")).await.unwrap_err();
    assert_eq!(failure.code, failure::NO_INPUT);
    assert_eq!(failure.message, "no database gone.db on this node; `litefs list` shows all");
    assert!(host.files().is_empty());
}

#[tokio::test]
async fn an_import_reaches_the_node() {
    let host = Host::start();
    let database = fake::database(4096, 700);
    fs::write(host.out("source.db"), &database).unwrap();
    let said = host.import("new.db", &host.out("source.db")).await.unwrap();
    assert_eq!(said, "imported new.db at 000000000000002b/8000000000000000, 2867200 bytes in 700 pages\n");
    assert_eq!(fs::read(host.node.path("new.db")).unwrap(), database);
}

#[tokio::test]
async fn a_replica_refuses_an_import_and_names_the_primary() {
    let host = Host::start();
    *host.node.status.lock() = fake::replica();
    fs::write(host.out("source.db"), fake::database(4096, 2)).unwrap();
    let failure = host.import("new.db", &host.out("source.db")).await.unwrap_err();
    assert_eq!(failure.code, failure::UNAVAILABLE);
    assert!(failure.message.ends_with("this host is not the primary; run it on host-a"), "{failure}");
}

#[tokio::test]
async fn sources_that_are_not_whole_are_refused() {
    let host = Host::start();
    let source = host.out("source.db");
    let failure = host.import("new.db", &source).await.unwrap_err();
    assert_eq!(failure.code, failure::NO_INPUT);
    fs::write(&source, "text ".repeat(30)).unwrap();
    let failure = host.import("new.db", &source).await.unwrap_err();
    assert!(failure.message.contains("source.db: not an SQLite database"), "{failure}");
    fs::write(&source, fake::database(4096, 2)).unwrap();
    fs::write(host.out("source.db-wal"), "frames").unwrap();
    let failure = host.import("new.db", &source).await.unwrap_err();
    assert!(failure.message.contains("source.db-wal holds a part of this database"), "{failure}");
    assert!(failure.message.contains(".backup"), "{failure}");
    assert!(!host.node.path("new.db").exists());
}
