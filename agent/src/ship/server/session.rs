//! `POST /v1/follow`: the control stream of one follower.

use super::Server;
use super::changes::Dirty;
use crate::DatabaseName;
use crate::ship::body::{self, Body, BodySender};
use crate::ship::engine::Source;
use crate::ship::frame::{EndReason, Frame, FrameError, FrameReader};
use crate::ship::peer::{HEARTBEAT_HEADER, Identity, Refusal, RefusalCode, text_value};
use crate::ship::unix_ms;
use crate::status::messages;
use bytes::BytesMut;
use http::Response;
use hyper::body::Incoming;
use ltx::{Pos, Txid};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;

/// Positions put into one part of the stream.
const POSITIONS_PER_PART: usize = 512;

/// A heartbeat is left out while this much waits to be sent: the peer does not read, or hears enough.
const HEARTBEAT_ROOM_BYTES: usize = 4096;

/// Databases that a follower may list: far beyond what a node carries, so that a peer cannot fill the memory.
const LISTED_MAX: usize = 4_000_000;

/// A connected follower, for status.
#[derive(Clone, Debug)]
pub struct FollowerInfo {
    /// Who it is.
    pub identity: Identity,
    /// Where it connects from.
    pub peer: String,
    /// Since when.
    pub since: SystemTime,
    /// Databases and the positions it has acknowledged.
    pub acknowledged: Vec<(DatabaseName, Pos)>,
}

/// One connected follower.
pub(super) struct Session {
    identity: Identity,
    peer: String,
    since: SystemTime,
    /// Ends the control stream and the follower's other streams.
    pub(super) cancel: CancellationToken,
    /// Cancelled when the session has cleaned up.
    done: CancellationToken,
    pub(super) dirty: Arc<Dirty>,
    source: Arc<dyn Source>,
    acknowledged: Mutex<HashMap<DatabaseName, Pos>>,
    /// Databases that the source was told of for this follower.
    noted: Mutex<HashSet<DatabaseName>>,
}

impl Session {
    /// Tells the source which records this follower still needs.
    pub(super) fn note(&self, name: &DatabaseName, needs_after: Txid) {
        // The lock is held over the call so that nothing is noted after `forget`.
        let mut noted = self.noted.lock();
        if self.done.is_cancelled() {
            return;
        }
        if !noted.contains(name) {
            noted.insert(name.clone());
        }
        self.source.follower_position(self.identity.node_id, name, Some(needs_after));
    }

    fn forget(&self) {
        self.source.follower_left(self.identity.node_id);
        let mut noted = self.noted.lock();
        for name in noted.drain() {
            self.source.follower_position(self.identity.node_id, &name, None);
        }
        self.done.cancel();
    }
}

/// The followers that are connected, by node id.
#[derive(Default)]
pub(super) struct Sessions(Mutex<HashMap<u64, Arc<Session>>>);

impl Sessions {
    pub(super) fn get(&self, follower: u64) -> Option<Arc<Session>> {
        self.0.lock().get(&follower).cloned()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.0.lock().values().map(|session| session.identity.node_name.clone()).collect()
    }

    pub(super) fn list(&self) -> Vec<FollowerInfo> {
        let sessions: Vec<_> = self.0.lock().values().cloned().collect();
        sessions
            .iter()
            .map(|session| FollowerInfo {
                identity: session.identity.clone(),
                peer: session.peer.clone(),
                since: session.since,
                acknowledged: session.acknowledged.lock().iter().map(|(n, p)| (n.clone(), *p)).collect(),
            })
            .collect()
    }

    /// Enters a new session, after an older one of the same follower has ended: half-open ones would linger.
    async fn enter(&self, session: Arc<Session>) {
        loop {
            let older = {
                let mut sessions = self.0.lock();
                match sessions.get(&session.identity.node_id) {
                    None => {
                        sessions.insert(session.identity.node_id, session);
                        return;
                    }
                    Some(older) => Arc::clone(older),
                }
            };
            older.cancel.cancel();
            older.done.cancelled().await;
        }
    }

    fn leave(&self, session: &Session) {
        // Out of the map only after the source was told, so that a successor's notes come later.
        session.forget();
        self.0.lock().remove(&session.identity.node_id);
    }
}

/// Leaves the registry also when the task is dropped.
struct Entered {
    server: Arc<Server>,
    session: Arc<Session>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.server.sessions.leave(&self.session);
    }
}

/// Answers the request and starts the session.
pub(super) async fn open(
    server: &Arc<Server>,
    follower: Identity,
    peer: &str,
    incoming: Incoming,
) -> Result<Response<Body>, Refusal> {
    let session = Arc::new(Session {
        identity: follower,
        peer: peer.to_owned(),
        since: SystemTime::now(),
        cancel: server.cancel.child_token(),
        done: CancellationToken::new(),
        dirty: Arc::default(),
        source: Arc::clone(&server.source),
        acknowledged: Mutex::default(),
        noted: Mutex::default(),
    });
    server.sessions.enter(Arc::clone(&session)).await;
    server.source.follower_joined(session.identity.node_id, &session.identity.node_name);
    let entered = Entered { server: Arc::clone(server), session };
    let (sender, body) = body::channel(4);
    let mut response = Response::new(body);
    let heartbeat_ms = server.options.heartbeat.as_millis().to_string();
    response.headers_mut().insert(HEARTBEAT_HEADER, text_value(&heartbeat_ms));
    server.tracker.spawn(async move {
        let (server, session) = (&entered.server, &entered.session);
        tracing::info!(follower = %session.identity, peer = session.peer, "a follower is connected");
        let ended = converse(server, session, FrameReader::new(incoming), &sender).await;
        session.cancel.cancel();
        farewell(session, &sender, ended);
    });
    Ok(response)
}

/// Why a session ended.
enum Ended {
    /// The follower went away by itself.
    Left(String),
    /// Silence.
    Silent(Duration),
    /// This side ends it.
    Us(EndReason),
    /// The follower cannot be served any more.
    Refused(Refusal),
    /// The follower sent something invalid.
    Invalid(FrameError),
}

/// Logs why the stream ends and tells the follower, if that needs no waiting.
fn farewell(session: &Session, sender: &BodySender, ended: Ended) {
    let (follower, peer) = (&session.identity, &session.peer);
    let last = match ended {
        Ended::Left(why) => {
            tracing::info!(
                MESSAGE_ID = messages::FOLLOWER_LOST,
                %follower,
                peer,
                "the follower left: {why}"
            );
            return;
        }
        Ended::Silent(timeout) => {
            tracing::warn!(
                MESSAGE_ID = messages::FOLLOWER_LOST,
                %follower,
                peer,
                "dropped the follower: heard nothing from it for {timeout:?}"
            );
            return;
        }
        Ended::Us(reason) => {
            tracing::info!(%follower, peer, ?reason, "ended the control stream of the follower");
            Frame::End(reason)
        }
        Ended::Refused(refusal) => {
            tracing::warn!(%follower, peer, "dropped the follower: {refusal}");
            Frame::Error { code: refusal.code, message: refusal.message }
        }
        Ended::Invalid(error) => {
            tracing::warn!(%follower, peer, "dropped the follower: {error}");
            Frame::Error { code: RefusalCode::BadRequest, message: error.to_string() }
        }
    };
    let mut part = BytesMut::new();
    last.encode(&mut part);
    // A full channel means that the follower does not read: nothing more can be told.
    let _ = sender.try_send(part.freeze());
}

/// What the server has told the follower, and what it is about to.
#[derive(Default)]
struct Telling {
    /// Positions that the follower knows.
    told: HashMap<DatabaseName, Pos>,
    /// Databases of the follower that are not here, still to be told.
    unknown: Vec<DatabaseName>,
    /// The follower's list is complete.
    listed: bool,
    /// The follower was told that the answer to its list is complete.
    answered: bool,
    /// Encoded frames that the stream has not taken.
    out: BytesMut,
}

/// Everything that a control stream does after its head.
async fn converse(
    server: &Arc<Server>,
    session: &Session,
    mut reader: FrameReader<Incoming>,
    sender: &BodySender,
) -> Ended {
    // Subscribed before the follower's list is compared, so that no move falls between.
    let _subscription = server.changes.subscribe(Arc::clone(&session.dirty));
    let options = &server.options;
    let mut telling = Telling::default();
    let mut deadline = Instant::now() + options.timeout;
    let ticker = |period: Duration| {
        let mut ticks = interval_at(Instant::now() + period, period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    let (mut heartbeat, mut positions) = (ticker(options.heartbeat), ticker(options.position_interval));
    loop {
        tokio::select! {
            frame = reader.next() => {
                deadline = Instant::now() + options.timeout;
                let heard = match frame {
                    Ok(Some(frame)) => heard(server, session, frame, &mut telling),
                    Ok(None) => Err(Ended::Left("it closed the stream".into())),
                    Err(FrameError::Cut(why)) => Err(Ended::Left(why)),
                    Err(error) => Err(Ended::Invalid(error)),
                };
                if let Err(ended) = heard {
                    return ended;
                }
            }
            permit = sender.reserve(), if !telling.out.is_empty() => match permit {
                Ok(permit) => permit.send(telling.out.split().freeze()),
                Err(_) => return Ended::Left("it no longer reads".into()),
            },
            () = session.dirty.woken(), if telling.listed && telling.out.is_empty() => {
                if session.dirty.take_all() {
                    compare(server, session, &telling.told).await;
                }
                tell(server, session, &mut telling);
            }
            _ = positions.tick() => session.dirty.hurry(),
            _ = heartbeat.tick(), if telling.out.len() < HEARTBEAT_ROOM_BYTES => {
                Frame::Heartbeat { epoch: server.source.epoch(), unix_ms: unix_ms() }.encode(&mut telling.out);
            }
            () = sleep_until(deadline) => return Ended::Silent(options.timeout),
            () = sender.closed() => return Ended::Left("it closed the stream".into()),
            () = session.cancel.cancelled() => {
                let stopping = server.cancel.is_cancelled();
                return Ended::Us(if stopping { EndReason::Stopping } else { EndReason::Superseded });
            }
        }
    }
}

/// One frame from the follower.
fn heard(server: &Server, session: &Session, frame: Frame, telling: &mut Telling) -> Result<(), Ended> {
    match frame {
        Frame::Holds { name, pos, needs_after } if !telling.listed => {
            if telling.told.len() + telling.unknown.len() >= LISTED_MAX {
                let message = format!("a list of more than {LISTED_MAX} databases");
                return Err(Ended::Refused(Refusal::new(RefusalCode::BadRequest, message)));
            }
            if server.position(&name).is_none() {
                telling.unknown.push(name);
                return Ok(());
            }
            if needs_after.0 > 0 {
                session.note(&name, needs_after);
            }
            server.source.follower_acknowledged(session.identity.node_id, &name, pos);
            telling.told.insert(name, pos);
        }
        Frame::Listed if !telling.listed => {
            telling.listed = true;
            session.dirty.mark_all();
        }
        Frame::Ack { name, pos } if telling.listed => {
            if server.position(&name).is_some() {
                session.note(&name, pos.txid);
                server.source.follower_acknowledged(session.identity.node_id, &name, pos);
                session.acknowledged.lock().insert(name, pos);
            }
        }
        Frame::Heartbeat { epoch, .. } => {
            server.not_stale(&session.identity, epoch).map_err(Ended::Refused)?;
        }
        Frame::End(_) => return Err(Ended::Left("it said so".into())),
        other => return Err(Ended::Invalid(FrameError::OutOfPlace(other.kind()))),
    }
    Ok(())
}

/// Marks all databases of which the follower has not been told the position.
async fn compare(server: &Server, session: &Session, told: &HashMap<DatabaseName, Pos>) {
    match server.blocking(|source| Ok(source.databases())).await {
        Ok(databases) => {
            let differing = databases.into_iter().filter(|(name, pos)| told.get(name) != Some(pos));
            session.dirty.put(differing.map(|(name, _)| name));
        }
        Err(error) => {
            tracing::error!(%error, "cannot list the databases; the follower is told of those that move");
        }
    }
}

/// Fills one part of the stream with what the follower does not know yet.
fn tell(server: &Server, session: &Session, telling: &mut Telling) {
    let rest = telling.unknown.len().saturating_sub(POSITIONS_PER_PART);
    for name in telling.unknown.drain(rest..) {
        Frame::Unknown { name }.encode(&mut telling.out);
    }
    let names = session.dirty.take_now(POSITIONS_PER_PART);
    let complete = names.len() < POSITIONS_PER_PART && telling.unknown.is_empty();
    for name in names {
        let Some(pos) = server.position(&name) else {
            continue;
        };
        if telling.told.get(&name) != Some(&pos) {
            telling.told.insert(name.clone(), pos);
            Frame::Position { name, pos, unix_ms: unix_ms() }.encode(&mut telling.out);
        }
    }
    if complete && !telling.answered {
        telling.answered = true;
        Frame::Listed.encode(&mut telling.out);
    } else if !complete {
        session.dirty.put([]);
    }
}
