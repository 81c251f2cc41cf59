//! The control stream to the upstream: connects, says what this node has, hears what moves, acknowledges.

use super::connection::{Connection, FollowError, accepted, check_epoch};
use super::{Session, Shared, Target, staging};
use crate::DatabaseName;
use crate::ship::body;
use crate::ship::engine::Epoch;
use crate::ship::frame::{EndReason, Frame, FrameReader};
use crate::ship::peer::{HEARTBEAT_HEADER, Identity};
use crate::ship::server::FOLLOW_PATH;
use crate::ship::{jitter, unix_ms};
use crate::status::messages;
use bytes::BytesMut;
use http::{HeaderMap, Method};
use hyper::body::Incoming;
use ltx::{Pos, Txid};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until};

/// Databases put into one part of the stream.
const LISTED_PER_PART: usize = 512;

/// A heartbeat is left out while this much waits to be sent: the upstream does not read, or hears enough.
const HEARTBEAT_ROOM_BYTES: usize = 4096;

/// Follows until cancelled: one session after the other.
pub(super) async fn run(shared: Arc<Shared>) {
    tokio::select! {
        () = sessions(&shared) => {}
        () = shared.cancel.cancelled() => {}
    }
    disconnected(&shared).await;
}

async fn sessions(shared: &Arc<Shared>) {
    prepare(shared).await;
    let (first, longest) = shared.options.retry;
    let mut delay = first;
    let mut number = 0;
    loop {
        number += 1;
        let error = match session(shared, number).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        let lost = disconnected(shared).await;
        if lost {
            delay = first;
        }
        let message = error.to_string();
        let known = shared.state.lock().last_error.replace(message.clone());
        if known.as_ref() == Some(&message) {
            tracing::debug!("{message}; trying again");
        } else {
            tracing::warn!(
                MESSAGE_ID = lost.then_some(messages::UPSTREAM_LOST),
                upstream = %shared.upstream,
                "{message}; trying again"
            );
        }
        sleep(jitter(delay)).await;
        delay = (delay * 2).min(longest);
    }
}

/// Looks once at what an earlier process left in the staging directory.
async fn prepare(shared: &Arc<Shared>) {
    let scanned = shared.with_sink(|sink| (sink.staging_dir(), staging::scan(&sink.staging_dir()))).await;
    let scanned = match scanned {
        Ok((dir, resumable)) => {
            let _ = shared.staging_dir.set(dir);
            resumable
        }
        Err(error) => return tracing::error!("{error}"),
    };
    match scanned {
        Ok(resumable) => shared.staged.lock().extend(resumable),
        Err(error) => {
            let dir = shared.staging_dir.get().cloned().unwrap_or_default();
            tracing::error!(dir = %dir.display(), %error, "cannot use the staging directory; snapshots will fail");
        }
    }
}

/// Ends the session, if there is one; says whether.
async fn disconnected(shared: &Arc<Shared>) -> bool {
    let Some(session) = shared.session.send_replace(None) else {
        return false;
    };
    session.cancel.cancel();
    {
        let mut state = shared.state.lock();
        state.compared = false;
    }
    if let Err(error) = shared.with_sink(|sink| sink.upstream_changed(None)).await {
        tracing::error!("{error}");
    }
    true
}

/// Gives the upstream's positions to the sink, off the control stream: the sink may block.
pub(super) async fn report(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.reports.woken() => {}
            () = shared.cancel.cancelled() => return,
        }
        // Before the positions are taken: all that came before the list's end are among them, or were.
        let compared = shared.state.lock().compared;
        let positions = shared.reports.take();
        let told = shared.with_sink(move |sink| {
            for (name, (pos, unix_ms)) in &positions {
                sink.upstream_position(name, *pos, *unix_ms);
            }
            if compared {
                sink.compared();
            }
        });
        if let Err(error) = told.await {
            tracing::error!("{error}");
        }
    }
}

enum Never {}

/// Connects and talks until something ends it.
async fn session(shared: &Arc<Shared>, number: u64) -> Result<Never, FollowError> {
    let upstream = &shared.upstream;
    let own_error = |why: String| FollowError::Own { upstream: upstream.to_string(), why };
    let options = &shared.options;
    let (node_id, seen) = shared.with_sink(|sink| (sink.node_id(), sink.epoch())).await.map_err(own_error)?;
    let own = Identity {
        node_id,
        node_name: options.node_name.clone(),
        cluster: options.cluster.clone(),
        epoch: seen,
    };
    let cancel = shared.cancel.child_token();
    let cut_on_return = cancel.clone().drop_guard();
    let mut connection = Connection::open(upstream, options, cancel.clone()).await?;
    let (sender, request_body) = body::channel(4);
    let (response, peer) = connection.send(Method::POST, FOLLOW_PATH, request_body, &own).await?;
    let timeout = patience(shared, response.headers());
    let reader = FrameReader::new(accepted(upstream, response).await?);
    if peer.epoch > seen {
        observe(shared, peer.epoch).await?;
    }
    tracing::info!(
        MESSAGE_ID = messages::UPSTREAM_CONNECTED,
        %upstream,
        %peer,
        epoch = peer.epoch.0,
        "connected to the upstream"
    );
    let (session_number, host) = (number, peer.node_name.clone());
    let session = Arc::new(Session {
        number: session_number,
        upstream: Arc::clone(upstream),
        options: options.clone(),
        own,
        new_term: peer.epoch > seen,
        epoch: AtomicU64::new(peer.epoch.0),
        peer,
        since: SystemTime::now(),
        cancel,
        records: tokio::sync::Mutex::default(),
        pages: tokio::sync::Mutex::default(),
    });
    {
        let mut state = shared.state.lock();
        state.unknown_upstream.clear();
        state.last_error = None;
        state.heard_unix_ms = unix_ms();
    }
    shared.with_sink(move |sink| sink.upstream_changed(Some(host))).await.map_err(own_error)?;
    // The list says more than what an earlier session did not acknowledge.
    shared.acks.take();
    let mut databases = shared.with_sink(|sink| sink.databases()).await.map_err(own_error)?;
    new_databases(shared, &mut databases);
    shared.session.send_replace(Some(Arc::clone(&session)));
    let talk = Talk { shared, session: &session, timeout, listing: Some(databases), out: BytesMut::new() };
    let ended = talk.run(reader, sender).await;
    drop(cut_on_return);
    ended
}

/// Adds databases of which there is only a staged snapshot yet, so that the upstream keeps the records it needs.
fn new_databases(shared: &Shared, databases: &mut Vec<(DatabaseName, Pos)>) {
    let staged = shared.staged.lock();
    if staged.is_empty() {
        return;
    }
    let here: HashSet<_> = databases.iter().map(|(name, _)| name.clone()).collect();
    databases
        .extend(staged.keys().filter(|name| !here.contains(name)).map(|name| (name.clone(), Pos::default())));
}

/// The time after which a silent upstream is given up: never less than three of its heartbeats.
fn patience(shared: &Shared, headers: &HeaderMap) -> Duration {
    let own = shared.options.timeout;
    let told =
        headers.get(HEARTBEAT_HEADER).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u32>().ok());
    let theirs = told.map_or(own, |ms| Duration::from_millis(u64::from(ms)) * 3);
    // An upstream may not talk this node out of noticing that it is gone.
    own.max(theirs.min(own * 10))
}

async fn observe(shared: &Shared, epoch: Epoch) -> Result<(), FollowError> {
    let failed = |why: String| FollowError::Own { upstream: shared.upstream.to_string(), why };
    let observed = shared.with_sink(move |sink| sink.observe_epoch(epoch)).await.map_err(failed)?;
    observed.map_err(|e| failed(format!("epoch {} cannot be adopted: {e}", epoch.0)))
}

/// The conversation on the control stream.
struct Talk<'a> {
    shared: &'a Arc<Shared>,
    session: &'a Arc<Session>,
    timeout: Duration,
    /// What of this node's list was not sent yet; `None` when all was.
    listing: Option<Vec<(DatabaseName, Pos)>>,
    /// Encoded frames that the stream has not taken.
    out: BytesMut,
}

impl Talk<'_> {
    async fn run(
        mut self,
        mut reader: FrameReader<Incoming>,
        sender: body::BodySender,
    ) -> Result<Never, FollowError> {
        let shared = self.shared;
        let lost = |why: String| FollowError::Lost { upstream: shared.upstream.to_string(), why };
        let period = shared.options.heartbeat;
        let mut heartbeat = interval_at(Instant::now() + period, period);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut deadline = Instant::now() + self.timeout;
        self.list();
        loop {
            tokio::select! {
                frame = reader.expect() => {
                    let frame = frame.map_err(|e| FollowError::frame(&shared.upstream, e))?;
                    deadline = Instant::now() + self.timeout;
                    self.heard(frame).await?;
                }
                permit = sender.reserve(), if !self.out.is_empty() => {
                    let permit = permit.map_err(|_| lost("it no longer reads the control stream".into()))?;
                    permit.send(self.out.split().freeze());
                    self.list();
                }
                () = shared.acks.woken(), if self.listing.is_none() && self.out.is_empty() => {
                    for (name, pos) in shared.acks.take() {
                        Frame::Ack { name, pos }.encode(&mut self.out);
                    }
                }
                _ = heartbeat.tick(), if self.out.len() < HEARTBEAT_ROOM_BYTES => {
                    Frame::Heartbeat { epoch: self.session.epoch(), unix_ms: unix_ms() }.encode(&mut self.out);
                }
                () = sleep_until(deadline) => {
                    return Err(lost(format!("heard nothing from it for {:?}", self.timeout)));
                }
                () = self.session.cancel.cancelled() => return Err(lost("the session was ended".into())),
            }
        }
    }

    /// Puts a part of this node's list into the stream.
    fn list(&mut self) {
        let Some(databases) = &mut self.listing else {
            return;
        };
        let staged = self.shared.staged.lock();
        let rest = databases.len().saturating_sub(LISTED_PER_PART);
        for (name, pos) in databases.drain(rest..) {
            let needs_after = staged.get(&name).copied().unwrap_or(pos.txid);
            Frame::Holds { name, pos, needs_after }.encode(&mut self.out);
        }
        if databases.is_empty() {
            self.listing = None;
            Frame::Listed.encode(&mut self.out);
        }
    }

    async fn heard(&mut self, frame: Frame) -> Result<(), FollowError> {
        let shared = self.shared;
        match frame {
            Frame::Heartbeat { epoch, unix_ms } => {
                shared.state.lock().heard_unix_ms = unix_ms;
                self.epoch(epoch).await
            }
            Frame::Position { name, pos, unix_ms } => {
                shared.reports.put(name.clone(), (pos, unix_ms));
                shared.moved(name, Target { pos, session: self.session.number });
                Ok(())
            }
            Frame::Unknown { name } => {
                shared.unknown(name);
                Ok(())
            }
            Frame::Listed => {
                shared.state.lock().compared = true;
                shared.reports.wake();
                Ok(())
            }
            Frame::End(reason) => {
                let why = match reason {
                    EndReason::Stopping => "it is stopping",
                    EndReason::Superseded => "another connection of a node with this node's id took over",
                    EndReason::Idle => "it closed the control stream",
                };
                Err(FollowError::Lost { upstream: shared.upstream.to_string(), why: why.into() })
            }
            Frame::Error { code, message } => Err(FollowError::Refused {
                upstream: shared.upstream.to_string(),
                code: Some(code),
                message,
                position: None,
            }),
            other => Err(FollowError::Invalid {
                upstream: shared.upstream.to_string(),
                why: format!("a {} frame on the control stream", other.kind()),
            }),
        }
    }

    /// The upstream's epoch: a newer one is adopted, an older one than this node knows ends the session.
    async fn epoch(&mut self, theirs: Epoch) -> Result<(), FollowError> {
        let failed = |why| FollowError::Own { upstream: self.shared.upstream.to_string(), why };
        let seen = self.shared.with_sink(|sink| sink.epoch()).await.map_err(failed)?;
        check_epoch(&self.shared.upstream, theirs, seen)?;
        if theirs > seen {
            observe(self.shared, theirs).await?;
        }
        self.session.epoch.fetch_max(theirs.0, Ordering::Relaxed);
        Ok(())
    }
}

/// Says which records a staged snapshot needs, on the next list.
pub(super) fn staged(shared: &Shared, name: &DatabaseName, base: Option<Txid>) {
    let mut staged = shared.staged.lock();
    match base {
        Some(txid) => staged.insert(name.clone(), txid),
        None => staged.remove(name),
    };
}
