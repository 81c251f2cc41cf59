//! The objects over a private connection, without a bus.

use super::names::MANAGER_PATH;
use super::objects::{AUTOMATIC_MAX, REQUESTED_MAX};
use super::service::Service;
use super::view::BusView;
use crate::DatabaseName;
use crate::status::RoleRequest;
use crate::status::api::{DatabaseState, DatabaseStatus, RoleName};
use crate::status::changes::Happening;
use crate::status::fake::{self, FakeNode};
use futures_util::StreamExt;
use ltx::Txid;
use std::collections::HashMap;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use zbus::fdo::{ObjectManagerProxy, PropertiesProxy};
use zbus::{Connection, OwnedVariant, Proxy, connection::Builder};

/// A node and a client of it.
struct Pair {
    node: Arc<FakeNode>,
    client: Connection,
    _server: Connection,
    running: Option<JoinHandle<zbus::Result<()>>>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}

async fn pair(node: FakeNode, run: bool) -> (Pair, Option<Service>) {
    let node = Arc::new(node);
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    let guid = zbus::Guid::generate();
    let server = Builder::unix_stream(here).server(guid).p2p().build();
    let client = Builder::unix_stream(there).p2p().build();
    let (server, client) = tokio::join!(server, client);
    let (server, client) = (server.unwrap(), client.unwrap());
    let view: Arc<dyn BusView> = node.clone();
    let mut service = Service::start(&server, view).await.unwrap();
    let (running, service) = if run {
        (Some(tokio::spawn(async move { service.run().await })), None)
    } else {
        (None, Some(service))
    };
    (Pair { node, client, _server: server, running }, service)
}

impl Pair {
    async fn proxy(&self, path: &str, interface: &str) -> Proxy<'static> {
        let interface = format!("io.litefs.LiteFS1.{interface}");
        zbus::proxy::Builder::new(&self.client)
            .destination("io.litefs.LiteFS1.db")
            .path(path.to_owned())
            .interface(interface)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .unwrap()
    }

    async fn manager(&self) -> Proxy<'static> {
        self.proxy(MANAGER_PATH, "Manager").await
    }

    async fn database(&self) -> Proxy<'static> {
        self.proxy("/io/litefs/LiteFS1/databases/a_2edb", "Database").await
    }

    fn commit(&self, txid: u64) {
        self.node.status.lock().databases[0].txid = Txid(txid);
        self.node.feed.database(&DatabaseName::new("a.db").unwrap());
    }
}

/// A node with databases `db00000`, `db00001`, ...
fn with_databases(count: usize) -> FakeNode {
    let node = FakeNode::new();
    let one = node.status.lock().databases[0].clone();
    let databases = (0..count).map(|number| DatabaseStatus { name: format!("db{number:05}"), ..one.clone() });
    node.status.lock().databases = databases.collect();
    node
}

fn named(error: zbus::Error) -> (String, String) {
    match error {
        zbus::Error::MethodError(name, text, _) => (name.to_string(), text.unwrap_or_default()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn properties_are_those_of_the_node() {
    let (pair, _) = pair(FakeNode::new(), true).await;
    let manager = pair.manager().await;
    assert_eq!(manager.get_property::<String>("Role").await.unwrap(), "primary");
    assert_eq!(manager.get_property::<u64>("Epoch").await.unwrap(), 3);
    assert_eq!(manager.get_property::<String>("Primary").await.unwrap(), "host-a");
    assert_eq!(manager.get_property::<String>("Health").await.unwrap(), "ok");
    assert_eq!(manager.get_property::<Vec<String>>("Followers").await.unwrap(), ["host-b"]);
    assert_eq!(manager.get_property::<String>("NodeId").await.unwrap(), "00000000000000AB");
    let database = pair.database().await;
    assert_eq!(
        database.get_property::<String>("Position").await.unwrap(),
        "000000000000002a/ffffffffffffffff"
    );
    assert_eq!(database.get_property::<u64>("LastChange").await.unwrap(), 2_000_000);
    let listed: Vec<(String, u64)> = manager.call("ListDatabases", &("", 0u32)).await.unwrap();
    assert_eq!(listed, [("a.db".to_owned(), 42)]);
    let after: Vec<(String, u64)> = manager.call("ListDatabases", &("a.db", 1u32)).await.unwrap();
    assert!(after.is_empty());
    let followers: Vec<(String, String, String, u64, u64)> =
        manager.call("ListFollowers", &()).await.unwrap();
    assert_eq!((followers[0].0.as_str(), followers[0].4), ("host-b", 2));
}

#[tokio::test]
async fn the_object_manager_lists_every_database() {
    let (pair, _) = pair(FakeNode::new(), true).await;
    let manager = ObjectManagerProxy::new(&pair.client, "io.litefs.LiteFS1.db", MANAGER_PATH).await.unwrap();
    let objects = manager.get_managed_objects().await.unwrap();
    let path = zbus::OwnedObjectPath::try_from("/io/litefs/LiteFS1/databases/a_2edb").unwrap();
    let object = &objects[&path];
    let properties = &object["io.litefs.LiteFS1.Database"];
    assert_eq!(u64::try_from(&properties["Txid"]).unwrap(), 42);
}

#[tokio::test]
async fn methods_reach_the_node_and_errors_have_names() {
    let (pair, _) = pair(FakeNode::new(), true).await;
    let manager = pair.manager().await;
    manager.call::<_, _, ()>("Promote", &()).await.unwrap();
    manager.call::<_, _, ()>("Handoff", &("host-b",)).await.unwrap();
    manager.call::<_, _, ()>("Handoff", &("",)).await.unwrap();
    manager.call::<_, _, ()>("Demote", &()).await.unwrap();
    let to_b = RoleRequest::Handoff(Some("host-b".into()));
    assert_eq!(
        *pair.node.asked.lock(),
        [RoleRequest::Promote, to_b, RoleRequest::Handoff(None), RoleRequest::Demote]
    );
    let (name, text) = named(manager.call::<_, _, ()>("Reload", &()).await.unwrap_err());
    assert_eq!(name, "io.litefs.LiteFS1.Error.BadConfiguration");
    assert!(text.contains("unknown key"), "{text}");
    let missing = manager.call::<_, _, zbus::OwnedObjectPath>("GetDatabase", &("b.db",)).await.unwrap_err();
    assert_eq!(named(missing).0, "io.litefs.LiteFS1.Error.NoSuchDatabase");

    let database = pair.database().await;
    assert_eq!(database.call::<_, _, (u64, u64)>("Checkpoint", &()).await.unwrap(), (5, 4));
    let (name, _) = named(database.call::<_, _, String>("Verify", &()).await.unwrap_err());
    assert_eq!(name, "io.litefs.LiteFS1.Error.ChecksumMismatch");
    let bytes = fake::database(512, 3);
    std::fs::write(pair.node.path("a.db"), &bytes).unwrap();
    let (file, position): (zbus::OwnedFd, String) = database.call("Export", &()).await.unwrap();
    let mut file = std::fs::File::from(file.as_fd().try_clone_to_owned().unwrap());
    let mut read = Vec::new();
    std::io::Read::read_to_end(&mut file, &mut read).unwrap();
    assert!(read == bytes, "the descriptor has another content");
    assert!(position.starts_with("000000000000002a/"), "{position}");
}

#[tokio::test]
async fn a_change_is_told_by_object_and_by_manager() {
    let (pair, _) = pair(FakeNode::new(), true).await;
    let properties =
        PropertiesProxy::new(&pair.client, "io.litefs.LiteFS1.db", "/io/litefs/LiteFS1/databases/a_2edb");
    let mut told = properties.await.unwrap().receive_properties_changed().await.unwrap();
    let mut changed = pair.manager().await.receive_signal("Changed").await.unwrap();
    pair.commit(43);
    let signal = told.next().await.unwrap();
    let args = signal.args().unwrap();
    assert_eq!(args.interface_name, "io.litefs.LiteFS1.Database");
    let mut names: Vec<&str> = args.changed_properties.keys().copied().collect();
    names.sort_unstable();
    assert_eq!(names, ["Position", "Txid"], "what did not change, and what is hot, is not told");
    let databases: Vec<(String, u64, String)> = changed.next().await.unwrap().body().deserialize().unwrap();
    assert_eq!(databases, [("a.db".to_owned(), 43, "ffffffffffffffff".to_owned())]);
}

#[tokio::test]
async fn thousands_of_commits_are_a_few_signals_and_the_last_is_told() {
    let (pair, _) = pair(FakeNode::new(), true).await;
    let mut changed = pair.manager().await.receive_signal("Changed").await.unwrap();
    let begun = Instant::now();
    for txid in 43..10_043 {
        pair.commit(txid);
        if txid % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    let (mut signals, mut last) = (0u128, 0);
    while last != 10_042 {
        let databases: Vec<(String, u64, String)> =
            changed.next().await.unwrap().body().deserialize().unwrap();
        last = databases[0].1;
        signals += 1;
    }
    let most = begun.elapsed().as_millis() / 100 + 2;
    assert!(signals <= most, "{signals} signals in {:?}", begun.elapsed());
}

#[tokio::test]
async fn role_health_and_happenings_are_told() {
    let (pair, _) = pair(FakeNode::new(), true).await;
    let manager = pair.manager().await;
    let mut roles = manager.receive_signal("RoleChanged").await.unwrap();
    let mut quarantined = manager.receive_signal("Quarantined").await.unwrap();
    let mut diverged = manager.receive_signal("Diverged").await.unwrap();
    let properties = PropertiesProxy::new(&pair.client, "io.litefs.LiteFS1.db", MANAGER_PATH).await.unwrap();
    let mut told = properties.receive_properties_changed().await.unwrap();

    {
        let mut status = pair.node.status.lock();
        status.role = fake::replica().role;
        status.role.epoch = 4;
    }
    pair.node.feed.role();
    let (role, epoch, primary): (String, u64, String) =
        roles.next().await.unwrap().body().deserialize().unwrap();
    assert_eq!((role.as_str(), epoch, primary.as_str()), ("replica", 4, "host-a"));
    let changed = told.next().await.unwrap();
    let args = changed.args().unwrap();
    assert_eq!(args.interface_name, "io.litefs.LiteFS1.Manager");
    assert!(args.changed_properties.contains_key("UpstreamConnected"), "{args:?}");

    let name = DatabaseName::new("a.db").unwrap();
    {
        let mut status = pair.node.status.lock();
        status.databases[0].state = DatabaseState::Quarantined;
        status.databases[0].reason = Some("page 7".into());
    }
    pair.node.feed.happened(&Happening::Quarantined { database: name.clone(), reason: "page 7".into() });
    pair.node.feed.happened(&Happening::Diverged { database: name.clone(), kept: "/kept".into() });
    pair.node.feed.database(&name);
    let body = quarantined.next().await.unwrap().body();
    assert_eq!(body.deserialize::<(String, String)>().unwrap(), ("a.db".into(), "page 7".into()));
    let body = diverged.next().await.unwrap().body();
    assert_eq!(body.deserialize::<(String, String)>().unwrap(), ("a.db".into(), "/kept".into()));
    let changed = told.next().await.unwrap();
    let args = changed.args().unwrap();
    assert_eq!(String::try_from(args.changed_properties["Health"].try_clone().unwrap()).unwrap(), "degraded");
    let troubles: Vec<String> = manager.get_property("Troubles").await.unwrap();
    assert_eq!(troubles, ["database a.db is quarantined: page 7"]);
}

#[tokio::test]
async fn databases_come_and_go() {
    let (pair, _) = pair(FakeNode::new(), true).await;
    let manager = ObjectManagerProxy::new(&pair.client, "io.litefs.LiteFS1.db", MANAGER_PATH).await.unwrap();
    let mut added = manager.receive_interfaces_added().await.unwrap();
    let mut removed = manager.receive_interfaces_removed().await.unwrap();
    let mut another = fake::status().databases[0].clone();
    another.name = "app/b.db".into();
    pair.node.status.lock().databases.push(another);
    let name = DatabaseName::new("app/b.db").unwrap();
    pair.node.feed.database(&name);
    let signal = added.next().await.unwrap();
    assert_eq!(signal.args().unwrap().object_path, "/io/litefs/LiteFS1/databases/app_2fb_2edb");
    pair.node.status.lock().databases[1].pages = 0;
    pair.node.feed.database(&name);
    let signal = removed.next().await.unwrap();
    assert_eq!(signal.args().unwrap().object_path, "/io/litefs/LiteFS1/databases/app_2fb_2edb");
}

/// Where there are more databases than objects, each can be had, and memory stays bounded.
#[tokio::test]
async fn more_databases_than_objects() {
    let node = FakeNode::new();
    let total = AUTOMATIC_MAX + REQUESTED_MAX + 5;
    {
        let mut status = node.status.lock();
        let one = status.databases[0].clone();
        status.databases = (0..total)
            .map(|number| {
                let mut db = one.clone();
                db.name = format!("db{number:05}");
                db
            })
            .collect();
    }
    let (pair, _) = pair(node, true).await;
    let objects = ObjectManagerProxy::new(&pair.client, "io.litefs.LiteFS1.db", MANAGER_PATH).await.unwrap();
    let count = async || {
        let objects = objects.get_managed_objects().await.unwrap();
        objects.values().filter(|interfaces| !interfaces.is_empty()).count()
    };
    assert_eq!(count().await, AUTOMATIC_MAX);
    let manager = pair.manager().await;
    for number in AUTOMATIC_MAX..total {
        let name = format!("db{number:05}");
        let path: zbus::OwnedObjectPath = manager.call("GetDatabase", &(name.as_str(),)).await.unwrap();
        let object = pair.proxy(path.as_str(), "Database").await;
        assert_eq!(object.get_property::<String>("Name").await.unwrap(), name);
    }
    assert_eq!(count().await, AUTOMATIC_MAX + REQUESTED_MAX);

    // The oldest that was asked for is gone, and can be had again.
    let name = format!("db{AUTOMATIC_MAX:05}");
    let path: zbus::OwnedObjectPath = manager.call("GetDatabase", &(name.as_str(),)).await.unwrap();
    assert!(pair.proxy(path.as_str(), "Database").await.get_property::<String>("Name").await.is_ok());
    assert_eq!(count().await, AUTOMATIC_MAX + REQUESTED_MAX);
}

/// Many databases at once: nothing is lost, though not all are told in one round.
#[tokio::test]
async fn rounds_are_bounded_and_nothing_is_lost() {
    let node = with_databases(250);
    let (pair, _) = pair(node, true).await;
    let rule = zbus::MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .member("PropertiesChanged")
        .build()
        .unwrap();
    let mut told = zbus::MessageStream::for_match_rule(rule, &pair.client, NonZero::new(1024)).await.unwrap();
    for db in &mut pair.node.status.lock().databases {
        db.txid = Txid(43);
    }
    for number in 0..250 {
        pair.node.feed.database(&DatabaseName::new(format!("db{number:05}")).unwrap());
    }
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 250 {
        let message = told.next().await.unwrap().unwrap();
        let (interface, changed, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            message.body().deserialize().unwrap();
        if interface == super::names::DATABASE_INTERFACE && changed.contains_key("Txid") {
            seen.insert(message.header().path().unwrap().to_string());
        }
    }
}

/// Those that change all the time do not keep others from being told.
#[tokio::test]
async fn nobody_waits_for_ever() {
    let node = with_databases(150);
    let (pair, _) = pair(node, true).await;
    let last =
        PropertiesProxy::new(&pair.client, "io.litefs.LiteFS1.db", "/io/litefs/LiteFS1/databases/db00149");
    let mut told = last.await.unwrap().receive_properties_changed().await.unwrap();
    let node = pair.node.clone();
    let busy = tokio::spawn(async move {
        for txid in 43.. {
            for number in 0..150 {
                node.status.lock().databases[number].txid = Txid(txid);
                // The last one changes once only.
                if number < 149 || txid == 43 {
                    node.feed.database(&DatabaseName::new(format!("db{number:05}")).unwrap());
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let signal = tokio::time::timeout(Duration::from_secs(30), told.next()).await.expect("it is told");
    assert!(signal.unwrap().args().unwrap().changed_properties.contains_key("Txid"));
    busy.abort();
}

#[tokio::test]
async fn a_replica_that_was_cut_off_is_degraded() {
    let node = FakeNode::new();
    *node.status.lock() = fake::replica();
    node.status.lock().role.upstream.as_mut().unwrap().connected = false;
    let (pair, _) = pair(node, true).await;
    let manager = pair.manager().await;
    assert_eq!(manager.get_property::<String>("Health").await.unwrap(), "degraded");
    assert_eq!(manager.get_property::<String>("Primary").await.unwrap(), "");
    assert_eq!(manager.get_property::<u64>("LagMillis").await.unwrap(), 20);
    pair.node.status.lock().role.name = RoleName::None;
    let troubles: Vec<String> = manager.get_property("Troubles").await.unwrap();
    assert_eq!(troubles, ["neither primary nor replica: writes are refused"]);
}
