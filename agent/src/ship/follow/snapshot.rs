//! Takes a snapshot: pages into a staging file, the records after its base on top, checked as a whole, installed.

use super::connection::{FollowError, accepted};
use super::database::{BATCH_BYTES, BATCH_RECORDS, Trouble, Worker, log_path, records};
use super::intake::{Intake, RecordFiles, Stop, total_bytes};
use super::staging::{self, Staging, StagingError};
use super::{Session, Shared, control};
use crate::DatabaseName;
use crate::ship::engine::{EngineError, ShippedRecord};
use crate::ship::frame::{Frame, FrameReader, decode_pages};
use crate::ship::jitter;
use crate::ship::peer::{RefusalCode, percent_encode};
use crate::ship::server::SNAPSHOT_PATH;
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use ltx::{Pos, Txid};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use tokio::time::{Instant, sleep};

/// Attempts to install over a database that is busy, before standing back (what is staged stays).
const INSTALL_ATTEMPTS: u32 = 20;

/// Takes a snapshot of the worker's database, or goes on with one that was begun, and installs it.
pub(super) async fn take(
    worker: &mut Worker,
    session: &Arc<Session>,
    common: Option<Txid>,
) -> Result<(), Trouble> {
    let shared = Arc::clone(&worker.shared);
    let _permit = tokio::select! {
        permit = shared.snapshots.acquire() => permit.expect("never closed"),
        // The session is over: the next one asks again.
        () = session.cancel.cancelled() => return Ok(()),
    };
    let began = Instant::now();
    let dir = shared.staging_dir().await.map_err(Trouble::Own)?;
    let taking = Taking { shared: &shared, session, name: &worker.name, dir: &dir };
    let staging = taking.staged().await?;
    let staging = match staging {
        Some(staging) if staging.end.is_some() => staging,
        begun => taking.pages(begun).await?,
    };
    let staging = taking.records(staging).await?;
    let (name, position) = (worker.name.clone(), staging.pos);
    taking.install(staging, common).await?;
    tracing::info!(database = %name, %position, took = ?began.elapsed(), "installed a snapshot");
    worker.reread().await;
    worker.advanced(worker.pos);
    Ok(())
}

struct Taking<'a> {
    shared: &'a Arc<Shared>,
    session: &'a Session,
    name: &'a DatabaseName,
    dir: &'a Path,
}

impl Taking<'_> {
    /// What an earlier attempt left.
    async fn staged(&self) -> Result<Option<Staging>, Trouble> {
        let (dir, name) = (self.dir.to_owned(), self.name.clone());
        Ok(self.shared.with_database(move |_| Staging::resume(&dir, &name)).await.map_err(Trouble::Own)??)
    }

    /// Fetches the pages that are missing.
    async fn pages(&self, begun: Option<Staging>) -> Result<Staging, Trouble> {
        let mut path = format!("{SNAPSHOT_PATH}?name={}", percent_encode(self.name.as_str()));
        if let Some(staging) = &begun {
            let Pos { txid, checksum } = staging.pos;
            path += &format!("&from_page={}&base_txid={txid}&base_checksum={checksum}", staging.next_page);
        }
        let response = self.session.get_over(&self.session.pages, &path).await?;
        let mut reader = FrameReader::new(accepted(&self.session.upstream, response).await?);
        let first = reader.expect().await.map_err(|e| self.invalid(e))?;
        let mut staging = self.begin(begun, first).await?;
        control::staged(self.shared, self.name, Some(staging.pos.txid));
        loop {
            let frame = match reader.expect().await {
                Ok(frame) => frame,
                Err(error) => {
                    // The next attempt asks only for what has not come.
                    self.on_disk(staging, Staging::save).await?;
                    return Err(self.invalid(error));
                }
            };
            match frame {
                Frame::Pages(payload) => {
                    staging = self.on_disk(staging, move |staging| write(staging, &payload)).await?;
                }
                Frame::SnapshotEnd { position, .. } => {
                    return self.on_disk(staging, move |staging| staging.finish_pages(position.txid)).await;
                }
                Frame::Error { code, message } => {
                    self.give_up(staging, code == RefusalCode::PageSize).await?;
                    return Err(Trouble::Ended { name: self.name.clone(), code, message });
                }
                Frame::End(_) => {
                    self.give_up(staging, false).await?;
                    return Err(self.lost("it ended the snapshot"));
                }
                other => {
                    self.give_up(staging, false).await?;
                    return Err(self.out_of_place(&other));
                }
            }
        }
    }

    /// Begins anew, or goes on when the upstream does.
    async fn begin(&self, begun: Option<Staging>, first: Frame) -> Result<Staging, Trouble> {
        let (base, epoch, page_size, commit, first_page) = match first {
            Frame::SnapshotBegin { base, epoch, page_size, commit, first_page } => {
                (base, epoch, page_size, commit, first_page)
            }
            Frame::Error { code, message } => {
                return Err(Trouble::Ended { name: self.name.clone(), code, message });
            }
            other => return Err(self.out_of_place(&other)),
        };
        if let Some(staging) = begun {
            let same = (base, page_size, first_page) == (staging.pos, staging.page_size(), staging.next_page);
            if same {
                tracing::info!(database = %self.name, first_page, %base, "goes on with a snapshot");
                return Ok(staging);
            }
        }
        let (dir, name) = (self.dir.to_owned(), self.name.clone());
        if first_page != 1 {
            self.shared
                .with_database(move |_| staging::discard(&dir, &name))
                .await
                .map_err(Trouble::Own)??;
            let why =
                format!("its pages of {page_size} bytes from {first_page} on do not continue what is here");
            return Err(StagingError::Unusable { name: self.name.clone(), why }.into());
        }
        tracing::info!(database = %self.name, %base, pages = commit, "begins a snapshot");
        let begin = move |_: &dyn crate::ship::engine::Sink| {
            Staging::begin(&dir, &name, base, epoch, page_size, commit)
        };
        Ok(self.shared.with_database(begin).await.map_err(Trouble::Own)??)
    }

    /// Fetches the records after the base and applies them to the staged file, until it is at one position.
    async fn records(&self, mut staging: Staging) -> Result<Staging, Trouble> {
        if staging.is_complete() {
            return Ok(staging);
        }
        let response = self.session.get(&log_path(self.name, staging.pos)).await?;
        let body = match accepted(&self.session.upstream, response).await {
            Ok(body) => body,
            Err(error) if matches!(error.code(), Some(RefusalCode::Gap | RefusalCode::Diverged)) => {
                self.give_up(staging, true).await?;
                let why = format!("the records after its base are gone: {error}");
                return Err(StagingError::Unusable { name: self.name.clone(), why }.into());
            }
            Err(error) => return Err(error.into()),
        };
        let mut stream = pin!(records(Intake::new(body, self.dir)));
        while !staging.is_complete() {
            let mut batch = Vec::new();
            let mut files = RecordFiles::default();
            let (mut bytes, mut stopped) = (0, None);
            let mut next = stream.next().await;
            while let Some(item) = next {
                match item {
                    Ok(record) => {
                        bytes += total_bytes(&record);
                        files.add(&record);
                        batch.push(record);
                    }
                    Err(stop) => stopped = Some(stop),
                }
                if stopped.is_some() || batch.len() >= BATCH_RECORDS || bytes >= BATCH_BYTES {
                    break;
                }
                next = stream.next().now_or_never().flatten();
            }
            staging = self.on_disk(staging, move |staging| apply(staging, &batch)).await?;
            if let Some(stop) = stopped
                && !staging.is_complete()
            {
                // A record that is lost there does not come back; later pages have what was in it.
                let lost = matches!(stop, Stop::Refused(RefusalCode::Gap, _));
                self.give_up(staging, lost).await?;
                return Err(self.stopped(stop));
            }
        }
        Ok(staging)
    }

    /// Checks the whole file and makes it the database.
    async fn install(&self, staging: Staging, common: Option<Txid>) -> Result<(), Trouble> {
        let (dir, name) = (self.dir.to_owned(), self.name.clone());
        let verified = self.shared.with_database(move |_| {
            let mut staging = staging;
            staging.verify().or_else(|error| discard_unusable(&dir, &name, error))
        });
        let snapshot = verified.await.map_err(Trouble::Own)??;
        let (mut wait, longest) = self.shared.options.busy_retry;
        for attempt in 1.. {
            let (name, snapshot) = (self.name.clone(), snapshot.clone());
            let install = move |sink: &dyn crate::ship::engine::Sink| sink.install(&name, snapshot, common);
            match self.shared.with_database(install).await.map_err(Trouble::Own)? {
                Ok(()) => break,
                Err(EngineError::Busy(_)) if attempt < INSTALL_ATTEMPTS => {
                    sleep(jitter(wait)).await;
                    wait = (wait * 2).min(longest);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let (dir, name) = (self.dir.to_owned(), self.name.clone());
        self.shared.with_database(move |_| staging::discard(&dir, &name)).await.map_err(Trouble::Own)??;
        control::staged(self.shared, self.name, None);
        Ok(())
    }

    /// Runs a step on the staged file; one that finds it unusable discards it.
    async fn on_disk(
        &self,
        mut staging: Staging,
        step: impl FnOnce(&mut Staging) -> Result<(), StagingError> + Send + 'static,
    ) -> Result<Staging, Trouble> {
        let (dir, name) = (self.dir.to_owned(), self.name.clone());
        let done = self.shared.with_database(move |_| match step(&mut staging) {
            Ok(()) => Ok(staging),
            Err(error) => discard_unusable(&dir, &name, error),
        });
        Ok(done.await.map_err(Trouble::Own)??)
    }

    /// Saves what has come, or discards it.
    async fn give_up(&self, staging: Staging, discard: bool) -> Result<(), Trouble> {
        if !discard {
            self.on_disk(staging, Staging::save).await?;
            return Ok(());
        }
        let (dir, name) = (self.dir.to_owned(), self.name.clone());
        self.shared.with_database(move |_| staging::discard(&dir, &name)).await.map_err(Trouble::Own)??;
        control::staged(self.shared, self.name, None);
        Ok(())
    }

    fn stopped(&self, stop: Stop) -> Trouble {
        match stop {
            Stop::End(_) => self.lost("it ended the log stream"),
            Stop::Refused(code, message) => Trouble::Ended { name: self.name.clone(), code, message },
            Stop::Frame(error) => self.invalid(error),
            Stop::Store(path, source) => Trouble::Store { name: self.name.clone(), path, source },
        }
    }

    fn invalid(&self, error: crate::ship::frame::FrameError) -> Trouble {
        FollowError::frame(&self.session.upstream, error).into()
    }

    fn lost(&self, why: &str) -> Trouble {
        FollowError::Lost { upstream: self.session.upstream.to_string(), why: why.into() }.into()
    }

    fn out_of_place(&self, frame: &Frame) -> Trouble {
        let why = format!("a {} frame in the snapshot of {}", frame.kind(), self.name);
        FollowError::Invalid { upstream: self.session.upstream.to_string(), why }.into()
    }
}

/// Discards what is staged when the error says that it is of no use.
fn discard_unusable<T>(dir: &Path, name: &DatabaseName, error: StagingError) -> Result<T, StagingError> {
    if matches!(error, StagingError::Unusable { .. }) {
        staging::discard(dir, name)?;
    }
    Err(error)
}

fn write(staging: &mut Staging, payload: &Bytes) -> Result<(), StagingError> {
    let pages = decode_pages(payload, staging.page_size()).map_err(|e| staging.unusable(e.to_string()))?;
    staging.write_pages(&pages)
}

fn apply(staging: &mut Staging, batch: &[ShippedRecord]) -> Result<(), StagingError> {
    for record in batch {
        // What comes after the end is fetched again once the snapshot is installed.
        if staging.is_complete() {
            break;
        }
        staging.apply(record)?;
    }
    staging.save_if_due()
}
