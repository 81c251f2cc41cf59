//! A large database: the snapshot that a late joiner gets, and what the agents keep in memory.

use super::door::Door;
use super::process::{self, Agent, Driver, wait_for};
use super::report::{Cell, Report, Rounds, thousands};
use super::rows::Row;
use super::{Extent, number, progress};
use crate::run;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const NAME: &str = "large.db";

/// How long making, importing or shipping it may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// From this size on the bar for memory holds.
const RSS_BYTES: u64 = 1 << 30;

/// Makes the database, measures both rows, and reports those that are asked for.
pub fn measure(
    litefs: &Path,
    doors: &[Door],
    dir: &Path,
    script: &Path,
    rows: &[Row],
    extent: &Extent,
    report: &mut Report,
) -> Result<()> {
    let dir = dir.join("large");
    fs::create_dir_all(&dir)?;
    progress(&format!("making a database of {} MiB", extent.large_bytes >> 20));
    let source = dir.join(NAME);
    let mut driver = Driver::start(script)?;
    driver.tell(&json!({"do": "create_large", "path": source, "bytes": extent.large_bytes}))?;
    let bytes = number(&driver.answer(PATIENCE)?["bytes"])?;

    let mut sides = Vec::new();
    for door in doors {
        sides.push(Side::start(*door, litefs, &dir.join(door.name()), &source, bytes)?);
    }
    let mut snapshots = Rounds::new(doors.len());
    for round in 0..extent.long_rounds {
        progress(&format!("a replica joins, round {} of {}", round + 1, extent.long_rounds));
        let mut measured = vec![copy(&source, bytes)?];
        for side in &mut sides {
            measured.push(side.join(bytes)?);
        }
        snapshots.add(&measured);
    }
    if rows.contains(&Row::Snapshot) {
        report.heading(&format!("{:.0} MB database, MB/s", bytes / 1e6), "cp, fsync", "ratio (of rounds)");
        report.row(Row::Snapshot.title(), |_| None, &snapshots.native(), &snapshots.cells(), "");
        let cell = |side: &Side| Cell { figure: thousands(side.import), beside: String::new(), judged: 0.0 };
        report.row("litefs import", |_| None, "", &sides.iter().map(cell).collect::<Vec<_>>(), "");
    }
    if rows.contains(&Row::Rss) {
        for side in &mut sides {
            side.commit(script, extent)?;
        }
        report.heading("RSS with it, MiB", "", "");
        for who in ["primary", "replica"] {
            let cell = |side: &Side| -> Result<Cell> {
                let agent = if who == "primary" { Some(&side.primary) } else { side.replica.as_ref() };
                let agent = agent.context("no replica")?;
                let [now, peak] = [agent.memory_kib("VmRSS")?, agent.memory_kib("VmHWM")?];
                let now = now as f64 / 1024.0;
                let beside = format!("peak {:.1}", peak as f64 / 1024.0);
                Ok(Cell { figure: format!("{now:.1}"), beside, judged: now })
            };
            let bar = |door| Row::Rss.bar(door).filter(|_| extent.large_bytes >= RSS_BYTES);
            report.row(who, bar, "", &sides.iter().map(cell).collect::<Result<Vec<_>>>()?, "");
        }
    }
    Ok(())
}

/// Copies the file natively; MB/s.
fn copy(source: &Path, bytes: f64) -> Result<f64> {
    let copy = source.with_extension("copy");
    let begin = Instant::now();
    fs::copy(source, &copy)?;
    File::open(&copy)?.sync_all()?;
    let rate = bytes / 1e6 / begin.elapsed().as_secs_f64();
    fs::remove_file(&copy)?;
    Ok(rate)
}

/// A door: a primary with the database, and the last replica that joined.
struct Side {
    door: Door,
    litefs: PathBuf,
    dir: PathBuf,
    /// MB/s of the import.
    import: f64,
    replica: Option<Agent>,
    primary: Agent,
}

impl Side {
    fn start(door: Door, litefs: &Path, dir: &Path, source: &Path, bytes: f64) -> Result<Side> {
        progress("importing it");
        let mut primary = Agent::start(litefs, door, dir, "primary", None)?;
        primary.wait_until_ready()?;
        let begin = Instant::now();
        let source = source.to_str().context("a path that is not UTF-8")?;
        run::output(&mut primary.command(&["import", NAME, source]))?;
        let import = bytes / 1e6 / begin.elapsed().as_secs_f64();
        Ok(Side { door, litefs: litefs.to_owned(), dir: dir.to_owned(), import, replica: None, primary })
    }

    /// A replica with nothing joins; MB/s from the start of its process until it has the database.
    fn join(&mut self, bytes: f64) -> Result<f64> {
        if let Some(joined) = self.replica.take() {
            drop::<Agent>(joined);
            fs::remove_dir_all(self.dir.join("replica"))?;
        }
        let begin = Instant::now();
        let mut joining = Agent::start(&self.litefs, self.door, &self.dir, "replica", Some(&self.primary))?;
        let position = self.primary.position(NAME)?.context("the primary has no position of the database")?;
        while joining.position(NAME)?.as_ref() != Some(&position) {
            joining.check_running()?;
            self.primary.check_running()?;
            process::check_interrupted()?;
            anyhow::ensure!(begin.elapsed() < PATIENCE, "no snapshot; the log:\n{}", joining.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        let rate = bytes / 1e6 / begin.elapsed().as_secs_f64();
        joining.wait_until_ready()?;
        self.replica = Some(joining);
        Ok(rate)
    }

    /// An application commits for a while, and the replica takes it.
    fn commit(&mut self, script: &Path, extent: &Extent) -> Result<()> {
        let mut driver = Driver::start_through(script, self.door, &self.dir)?;
        let path = self.primary.path(NAME);
        driver.ask(&json!({"do": "open", "name": NAME, "path": path, "synchronous": "normal"}))?;
        driver.ask(&json!({"do": "commits", "name": NAME, "seconds": extent.seconds}))?;
        driver.ask(&json!({"do": "close", "name": NAME}))?;
        let replica = self.replica.as_ref().context("no replica")?;
        wait_for("the replica has the last commits", || {
            Ok((self.primary.position(NAME)? == replica.position(NAME)?).then_some(()))
        })
    }
}
