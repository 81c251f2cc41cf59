//! Answers requests for status, metrics and events, and exports and imports databases.

use super::staging::{self, StagingError};
use super::{Export, NodeView, RoleRequest, ViewError, events, metrics};
use crate::DatabaseName;
use crate::status::api::{NodeId, RoleName, Status};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use serde_json::json;
use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;

/// A response's body; an error in it breaks the connection, so that the other end notices.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Header with the identity of the node that answers.
pub const LITEFS_ID: HeaderName = HeaderName::from_static("litefs-id");

/// Header of an export: the position `txid/checksum` that the bytes are at. The checksum is that of all pages
/// and so tells whether every byte arrived.
pub const LITEFS_POSITION: HeaderName = HeaderName::from_static("litefs-position");

/// Bytes of a database in one frame of an export.
const CHUNK: usize = 256 << 10;

/// Time between lines of an answer that stands for a halt lock: by these it is noticed that nobody reads it.
const HALT_HEARTBEAT: Duration = Duration::from_millis(250);

/// A refusal: status and message, for people.
struct Refusal(StatusCode, String);

impl Refusal {
    fn internal(message: impl Display) -> Refusal {
        Refusal(StatusCode::INTERNAL_SERVER_ERROR, message.to_string())
    }
}

impl From<ViewError> for Refusal {
    fn from(error: ViewError) -> Refusal {
        let status = match &error {
            ViewError::NoSuchDatabase(_) => StatusCode::NOT_FOUND,
            ViewError::NotPrimary { .. } | ViewError::Busy(_) | ViewError::HaltLock(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            ViewError::Quarantined { .. }
            | ViewError::Damaged(_)
            | ViewError::StaticLease(_)
            | ViewError::Handoff(_) => StatusCode::CONFLICT,
            ViewError::BadDatabase(_) | ViewError::BadConfiguration(_) => StatusCode::UNPROCESSABLE_ENTITY,
            ViewError::Other(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, error.to_string())
    }
}

impl From<StagingError> for Refusal {
    fn from(error: StagingError) -> Refusal {
        let status = match &error {
            StagingError::BrokeOff { .. } => StatusCode::BAD_REQUEST,
            StagingError::BadFile(_) => StatusCode::UNPROCESSABLE_ENTITY,
            StagingError::Store { error, .. } if error.kind() == io::ErrorKind::StorageFull => {
                StatusCode::INSUFFICIENT_STORAGE
            }
            StagingError::Store { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, error.to_string())
    }
}

/// Answers one request. `privileged` requests come from this host's control socket; others may only read.
pub async fn handle<B>(req: Request<B>, privileged: bool, view: Arc<dyn NodeView>) -> Response<Body>
where
    B: http_body::Body<Data = Bytes> + Unpin + Send,
    B::Error: Display,
{
    let id = NodeId(view.node_id()).to_string();
    let allowed = method_of(req.uri().path());
    let mut response = match route(req, privileged, view).await {
        Ok(response) => response,
        Err(Refusal(status, message)) => {
            let mut response = text(status, "text/plain; charset=utf-8", format!("{message}\n"));
            if let (StatusCode::METHOD_NOT_ALLOWED, Some(method)) = (status, &allowed)
                && let Ok(method) = HeaderValue::from_str(method.as_str())
            {
                response.headers_mut().insert(ALLOW, method);
            }
            response
        }
    };
    let id = HeaderValue::from_str(&id).expect("hex digits are a header value");
    response.headers_mut().insert(LITEFS_ID, id);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The method that a path answers.
fn method_of(path: &str) -> Option<Method> {
    match path {
        "/v1/import" | "/v1/reload" | "/v1/promote" | "/v1/demote" | "/v1/handoff" | "/v1/halt" => {
            Some(Method::POST)
        }
        "/v1/status" | "/v1/export" | "/info" | "/metrics" | "/events" => Some(Method::GET),
        _ => None,
    }
}

async fn route<B>(
    req: Request<B>,
    privileged: bool,
    view: Arc<dyn NodeView>,
) -> Result<Response<Body>, Refusal>
where
    B: http_body::Body<Data = Bytes> + Unpin + Send,
    B::Error: Display,
{
    let path = req.uri().path().to_owned();
    let Some(method) = method_of(&path) else {
        return Err(Refusal(StatusCode::NOT_FOUND, format!("nothing is at {path}")));
    };
    if *req.method() != method {
        let message = format!("{path} answers {method} only");
        return Err(Refusal(StatusCode::METHOD_NOT_ALLOWED, message));
    }
    match path.as_str() {
        "/v1/import" => import(req, privileged, view).await,
        "/v1/reload" => {
            on_this_host(
                privileged,
                "reload is allowed on this host's control socket only: run `litefs reload` there",
            )?;
            view.reload().await?;
            json_of(&json!({}))
        }
        "/v1/promote" | "/v1/demote" | "/v1/handoff" => change_role(&req, privileged, view).await,
        "/v1/halt" => halt(&req, privileged, view).await,
        "/v1/export" => export(database_name(&req)?, view).await,
        "/events" => {
            // Subscribed before the role is read: a change between the two is then seen twice, not never.
            let events = view.events();
            let role = (&status(&view).await?.role).into();
            let body = events::body(role, events, events::HEARTBEAT);
            Ok(with_type("application/json", body))
        }
        "/metrics" => {
            let status = status(&view).await?;
            let text_of = view.metrics().render(status, jiff::Timestamp::now().as_millisecond());
            Ok(text(StatusCode::OK, metrics::CONTENT_TYPE, text_of))
        }
        "/info" => json_of(&info(&status(&view).await?)),
        _ => json_of(&serde_json::to_value(status(&view).await?).map_err(Refusal::internal)?),
    }
}

/// Refuses what only the control socket may ask for; `refusal` says what to do instead.
fn on_this_host(privileged: bool, refusal: &str) -> Result<(), Refusal> {
    if privileged { Ok(()) } else { Err(Refusal(StatusCode::FORBIDDEN, refusal.to_owned())) }
}

async fn change_role<B>(
    req: &Request<B>,
    privileged: bool,
    view: Arc<dyn NodeView>,
) -> Result<Response<Body>, Refusal> {
    on_this_host(
        privileged,
        "changes of the role are allowed on this host's control socket only: run `litefs promote`, \
                       `demote` or `handoff` there",
    )?;
    let query = req.uri().query().unwrap_or_default();
    let value = |key: &str| {
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        pairs.find(|(name, _)| name == key).map(|(_, value)| value.into_owned())
    };
    let request = match req.uri().path() {
        "/v1/promote" if value("force").as_deref() == Some("true") => RoleRequest::Force,
        "/v1/promote" => RoleRequest::Promote,
        "/v1/demote" => RoleRequest::Demote,
        _ => RoleRequest::Handoff(value("to")),
    };
    view.request_role(request).await?;
    json_of(&json!({}))
}

/// A halt lock for whoever asks. It lasts as long as the answer, which is empty lines while all is well, and why the lock
/// was lost when it is.
async fn halt<B>(
    req: &Request<B>,
    privileged: bool,
    view: Arc<dyn NodeView>,
) -> Result<Response<Body>, Refusal> {
    on_this_host(
        privileged,
        "a halt lock is for programs of this host: run `litefs run --with-halt-lock-on` there",
    )?;
    let held = view.halt(database_name(req)?).await?;
    let lines = stream::unfold(Some(held), |held| async move {
        let held = held?;
        match tokio::time::timeout(HALT_HEARTBEAT, held.lost()).await {
            Ok(why) => Some((Ok(Frame::data(Bytes::from(format!("{why}\n")))), None)),
            Err(_) => Some((Ok(Frame::data(Bytes::from_static(b"\n"))), Some(held))),
        }
    });
    Ok(with_type("text/plain; charset=utf-8", BodyExt::boxed_unsync(StreamBody::new(lines))))
}

/// What LiteFS tells of itself at this path.
fn info(status: &Status) -> serde_json::Value {
    let is_primary = status.role.name == RoleName::Primary;
    let upstream = status.role.upstream.as_ref().filter(|upstream| upstream.connected);
    let hostname = upstream.and_then(|upstream| upstream.hostname.as_deref()).unwrap_or_default();
    json!({
        "isPrimary": is_primary,
        "candidate": is_primary,
        "path": status.mount.dir,
        "primary": { "hostname": hostname },
    })
}

async fn status(view: &Arc<dyn NodeView>) -> Result<Status, Refusal> {
    let view = view.clone();
    tokio::task::spawn_blocking(move || view.status()).await.map_err(Refusal::internal)
}

async fn export(name: DatabaseName, view: Arc<dyn NodeView>) -> Result<Response<Body>, Refusal> {
    let copy = tokio::task::spawn_blocking(move || {
        let export = view.export(&name)?;
        let size =
            export.file.metadata().map_err(|error| ViewError::Other(format!("{name}: {error}")))?.len();
        Ok::<_, ViewError>((export, size))
    });
    let (Export { file, position }, size) = copy.await.map_err(Refusal::internal)??;
    let state = (tokio::fs::File::from_std(file), size);
    let frames = stream::try_unfold(state, |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let read = (&mut file).take(left.min(CHUNK as u64)).read_buf(&mut chunk).await?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the exported copy shrank"));
        }
        Ok(Some((Frame::data(chunk.freeze()), (file, left - read as u64))))
    });
    let mut response = with_type("application/vnd.sqlite3", BodyExt::boxed_unsync(StreamBody::new(frames)));
    response.headers_mut().insert(CONTENT_LENGTH, size.into());
    let position = HeaderValue::from_str(&position.to_string()).map_err(Refusal::internal)?;
    response.headers_mut().insert(LITEFS_POSITION, position);
    Ok(response)
}

async fn import<B>(
    req: Request<B>,
    privileged: bool,
    view: Arc<dyn NodeView>,
) -> Result<Response<Body>, Refusal>
where
    B: http_body::Body<Data = Bytes> + Unpin + Send,
    B::Error: Display,
{
    on_this_host(
        privileged,
        "import is allowed on this host's control socket only: run `litefs import` there",
    )?;
    let name = database_name(&req)?;
    let (staged, shape) = staging::receive(req.into_body(), &view.import_dir()).await?;
    let imported = tokio::task::spawn_blocking(move || view.import(&name, &staged));
    let position = imported.await.map_err(Refusal::internal)??;
    json_of(&json!({
        "txid": position.txid.to_string(),
        "checksum": position.checksum.to_string(),
        "page_size": shape.page_size,
        "pages": shape.pages,
    }))
}

/// The database that a request's `name` parameter names.
fn database_name<B>(req: &Request<B>) -> Result<DatabaseName, Refusal> {
    let bad = |message: String| Refusal(StatusCode::BAD_REQUEST, message);
    let query = req.uri().query().unwrap_or_default();
    let mut names = form_urlencoded::parse(query.as_bytes()).filter(|(key, _)| key == "name");
    match (names.next(), names.next()) {
        (Some((_, name)), None) => DatabaseName::new(name.as_ref()).map_err(|error| bad(error.to_string())),
        (None, _) => Err(bad("which database? Add ?name=NAME".to_owned())),
        _ => Err(bad("more than one name".to_owned())),
    }
}

fn json_of(value: &serde_json::Value) -> Result<Response<Body>, Refusal> {
    let mut json = serde_json::to_string_pretty(value).map_err(Refusal::internal)?;
    json.push('\n');
    Ok(text(StatusCode::OK, "application/json", json))
}

fn text(status: StatusCode, content_type: &'static str, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
    let mut response = with_type(content_type, body);
    *response.status_mut() = status;
    response
}

fn with_type(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake::{self, FakeNode};
    use std::fs;

    async fn ask(
        node: &Arc<FakeNode>,
        method: &str,
        uri: &str,
        privileged: bool,
        body: &[u8],
    ) -> Response<Body> {
        let request =
            Request::builder().method(method).uri(uri).body(Full::new(Bytes::copy_from_slice(body))).unwrap();
        handle(request, privileged, node.clone()).await
    }

    async fn bytes(response: Response<Body>) -> Vec<u8> {
        response.into_body().collect().await.unwrap().to_bytes().to_vec()
    }

    async fn said(response: Response<Body>) -> (u16, String) {
        (response.status().as_u16(), String::from_utf8(bytes(response).await).unwrap())
    }

    #[tokio::test]
    async fn info_is_what_litefs_says() {
        let node = Arc::new(FakeNode::new());
        *node.status.lock() = fake::replica();
        let response = ask(&node, "GET", "/info", false, b"").await;
        assert_eq!(response.headers()[LITEFS_ID], "00000000000000AB");
        let (status, text) = said(response).await;
        assert_eq!(status, 200);
        assert!(text.ends_with("}\n"));
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            info,
            json!({"isPrimary": false, "candidate": false, "path": "/srv/litefs/db", "primary": {"hostname": "host-a"}})
        );
    }

    #[tokio::test]
    async fn a_reload_is_for_this_host_only_and_its_mistakes_come_back() {
        let node = Arc::new(FakeNode::new());
        assert_eq!(said(ask(&node, "POST", "/v1/reload", false, b"").await).await.0, 403);
        let (status, text) = said(ask(&node, "POST", "/v1/reload", true, b"").await).await;
        assert_eq!((status, text.as_str()), (422, "f.toml:1:1: unknown key x\n"));
    }

    #[tokio::test]
    async fn status_and_metrics_come_from_the_node() {
        let node = Arc::new(FakeNode::new());
        let (_, text) = said(ask(&node, "GET", "/v1/status", false, b"").await).await;
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), fake::status());
        let response = ask(&node, "GET", "/metrics", false, b"").await;
        assert_eq!(response.headers()[CONTENT_TYPE], metrics::CONTENT_TYPE);
        assert!(said(response).await.1.contains("\nlitefs_db_txid{db=\"a.db\"} 42\n"));
    }

    #[tokio::test]
    async fn events_begin_with_the_role() {
        let node = Arc::new(FakeNode::new());
        let mut body = ask(&node, "GET", "/events", false, b"").await.into_body();
        let line = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(line, "{\"type\":\"init\",\"data\":{\"isPrimary\":true,\"role\":\"primary\"}}\n");
    }

    #[tokio::test]
    async fn an_export_says_its_size_and_position() {
        let node = Arc::new(FakeNode::new());
        let database = fake::database(512, 1500);
        fs::create_dir(node.path("app")).unwrap();
        fs::write(node.path("app/a b.db"), &database).unwrap();
        let response = ask(&node, "GET", "/v1/export?name=app%2Fa+b.db", false, b"").await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()[CONTENT_LENGTH], database.len().to_string());
        let checksum = fake::checksum(&database, 512);
        assert_eq!(response.headers()[LITEFS_POSITION], format!("000000000000002a/{checksum}"));
        assert_eq!(bytes(response).await, database);
    }

    #[tokio::test]
    async fn an_import_arrives_whole_and_leaves_nothing_behind() {
        let node = Arc::new(FakeNode::new());
        let database = fake::database(4096, 3);
        let (status, text) = said(ask(&node, "POST", "/v1/import?name=new.db", true, &database).await).await;
        assert_eq!(status, 200, "{text}");
        assert!(text.contains("\"txid\": \"000000000000002b\"") && text.contains("\"pages\": 3"), "{text}");
        assert_eq!(fs::read(node.path("new.db")).unwrap(), database);
        assert_eq!(fs::read_dir(node.import_dir()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn imports_that_cannot_be_are_refused_and_leave_nothing_behind() {
        let node = Arc::new(FakeNode::new());
        let database = fake::database(4096, 3);
        let uri = "/v1/import?name=new.db";
        assert_eq!(said(ask(&node, "POST", uri, false, &database).await).await.0, 403);
        let (status, text) = said(ask(&node, "POST", uri, true, &[b'x'; 200]).await).await;
        assert_eq!((status, text.contains("not an SQLite database")), (422, true), "{text}");
        let (status, text) = said(ask(&node, "POST", uri, true, &database[..8192]).await).await;
        assert_eq!((status, text.contains("cut off")), (422, true), "{text}");
        *node.status.lock() = fake::replica();
        let (status, text) = said(ask(&node, "POST", uri, true, &database).await).await;
        assert_eq!((status, text.as_str()), (503, "this node is not the primary; host-a is\n"));
        assert!(!node.path("new.db").exists());
        assert_eq!(fs::read_dir(node.import_dir()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_upload_that_breaks_off_is_not_imported() {
        let node = Arc::new(FakeNode::new());
        let first = Frame::data(Bytes::from(fake::database(4096, 3)));
        let frames = stream::iter([Ok(first), Err(io::Error::other("cable pulled"))]);
        let request = Request::post("/v1/import?name=new.db").body(StreamBody::new(frames)).unwrap();
        let (status, text) = said(handle(request, true, node.clone()).await).await;
        assert_eq!(status, 400);
        assert_eq!(text, "the upload broke off after 12288 bytes: cable pulled\n");
        assert!(!node.path("new.db").exists());
        assert_eq!(fs::read_dir(node.import_dir()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_wrong_method_is_told_the_right_one() {
        let node = Arc::new(FakeNode::new());
        assert_eq!(ask(&node, "DELETE", "/info", true, b"").await.headers()[ALLOW], "GET");
        assert_eq!(ask(&node, "DELETE", "/v1/import", true, b"").await.headers()[ALLOW], "POST");
    }

    #[tokio::test]
    async fn bad_requests_are_refused_by_name() {
        let node = Arc::new(FakeNode::new());
        for (method, uri, status, message) in [
            ("GET", "/nothing", 404, "nothing is at /nothing"),
            ("GET", "/v1/import?name=a", 405, "/v1/import answers POST only"),
            ("DELETE", "/info", 405, "/info answers GET only"),
            ("GET", "/v1/export", 400, "which database? Add ?name=NAME"),
            ("GET", "/v1/export?name=a&name=b", 400, "more than one name"),
            ("GET", "/v1/export?name=../a", 400, "database name \"../a\" is not a plain relative UTF-8 path"),
            ("GET", "/v1/export?name=gone", 404, "no database gone on this node; `litefs list` shows all"),
        ] {
            let said = said(ask(&node, method, uri, true, b"").await).await;
            assert_eq!(said, (status, format!("{message}\n")), "{method} {uri}");
        }
    }
}
