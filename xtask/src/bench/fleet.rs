//! What is measured with a primary and one replica behind each door, and plain files beside them.

use super::door::Door;
use super::process::{Agent, Driver, PATIENCE, wait_for};
use super::report::{Cell, Report, Rounds, median, percentile, thousands};
use super::rows::Row;
use super::{Extent, Quiet, number, progress, rate};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Rows of the databases that are read: more than SQLite's own cache of 2 MB holds.
const READ_ROWS: u64 = 100_000;

/// Applications on plain files, and those behind each door.
pub struct Fleet {
    native: Driver,
    /// Reads what `native` writes.
    native_reader: Driver,
    native_dir: PathBuf,
    sides: Vec<Side>,
    script: PathBuf,
    quiet: Quiet,
}

/// A door: a primary, its replica, and an application on each.
struct Side {
    door: Door,
    /// Below which its agents have their directories.
    dir: PathBuf,
    ours: Driver,
    on_replica: Driver,
    replica: Agent,
    primary: Agent,
}

impl Side {
    fn start(door: Door, litefs: &Path, dir: &Path, script: &Path) -> Result<(Side, Value)> {
        let dir = dir.join(door.name());
        let mut primary = Agent::start(litefs, door, &dir, "primary", None)?;
        let status = primary.wait_until_ready()?;
        let mut replica = Agent::start(litefs, door, &dir, "replica", Some(&primary))?;
        replica.wait_until_ready()?;
        let (ours, on_replica) =
            (Driver::start_through(script, door, &dir)?, Driver::start_through(script, door, &dir)?);
        Ok((Side { door, dir, ours, on_replica, replica, primary }, status))
    }

    /// Another application.
    fn start_driver(&self, script: &Path) -> Result<Driver> {
        Driver::start_through(script, self.door, &self.dir)
    }

    /// Waits until the replica has what the primary has.
    fn wait_for_replica(&mut self, name: &str) -> Result<Duration> {
        let begin = Instant::now();
        wait_for(&format!("the replica has {name} as the primary has it"), || {
            self.primary.check_running()?;
            self.replica.check_running()?;
            let position = self.primary.position(name)?;
            Ok((position.is_some() && position == self.replica.position(name)?).then(|| begin.elapsed()))
        })
        .with_context(|| format!("the log of the replica says:\n{}", self.replica.log()))
    }
}

impl Fleet {
    /// Starts everything; says in the report what the doors are.
    pub fn start(
        litefs: &Path,
        doors: &[Door],
        dir: &Path,
        script: &Path,
        quiet: Quiet,
        report: &mut Report,
    ) -> Result<Fleet> {
        progress("starting primaries and replicas");
        // As deep, by default, as a cluster's directory is for applications (`/srv/litefs/CLUSTER`): each directory on the
        // way costs every look for a journal a little.
        let native_dir = dir.join("native");
        fs::create_dir_all(&native_dir)?;
        let mut sides = Vec::new();
        for door in doors {
            let (side, status) = Side::start(*door, litefs, dir, script)?;
            sides.push(side);
            report.line(&format!("{:<12} {}", door.name(), status["mount"]));
        }
        Ok(Fleet {
            native: Driver::start(script)?,
            native_reader: Driver::start(script)?,
            native_dir,
            sides,
            script: script.to_owned(),
            quiet,
        })
    }

    /// How many measurements there were, and how many of them on a busy machine.
    pub fn disturbed(&self) -> String {
        self.quiet.disturbed()
    }

    /// Makes a database natively and behind each door, and opens all of them for the run.
    fn add_database(&mut self, name: &str, mode: &str, synchronous: &str, rows: u64) -> Result<()> {
        let native = self.native_dir.join(name);
        let ours = self.sides.iter_mut().map(|side| (&mut side.ours, side.primary.path(name)));
        for (driver, path) in [(&mut self.native, native)].into_iter().chain(ours) {
            driver.ask(&json!({"do": "create", "path": path, "mode": mode, "rows": rows}))?;
            driver.ask(&json!({"do": "open", "name": name, "path": path, "synchronous": synchronous}))?;
        }
        self.sides.iter_mut().try_for_each(|side| side.wait_for_replica(name).map(|_| ()))
    }

    /// Commits/s of each row.
    pub fn commits(&mut self, rows: &[Row], extent: &Extent, report: &mut Report) -> Result<()> {
        let cells: Vec<(Row, String)> =
            rows.iter().map(|row| (*row, format!("{}.db", row.title().replace(' ', "-")))).collect();
        for (row, name) in &cells {
            let (mode, synchronous) = row.commits().context("not a row of commits")?;
            self.add_database(name, mode, synchronous, 0)?;
        }
        let doors = self.sides.len();
        let mut rates: Vec<Rounds> = cells.iter().map(|_| Rounds::new(doors)).collect();
        let mut behind = vec![vec![Vec::new(); doors]; cells.len()];
        for round in 0..extent.rounds {
            progress(&format!("commits, round {} of {}", round + 1, extent.rounds));
            for (i, (_, name)) in cells.iter().enumerate() {
                let command = json!({"do": "commits", "name": name, "seconds": extent.seconds});
                let mut measured = vec![0.0; doors + 1];
                for who in in_turn(round + i, doors + 1) {
                    self.quiet.wait()?;
                    if who == 0 {
                        measured[0] = rate(&self.native.ask(&command)?)?;
                        continue;
                    }
                    let side = &mut self.sides[who - 1];
                    measured[who] = rate(&side.ours.ask(&command)?)?;
                    behind[i][who - 1].push(side.wait_for_replica(name)?.as_secs_f64() * 1e3);
                }
                rates[i].add(&measured);
            }
        }
        report.heading("commits/s", "native", "ratio (of rounds)");
        for (((row, _), rates), behind) in cells.iter().zip(&rates).zip(&behind) {
            let behind: Vec<String> = behind.iter().map(|ms| format!("{:.0}", median(ms))).collect();
            let note = format!("replica done {} ms after", behind.join(", "));
            report.row(row.title(), |door| row.bar(door), &rates.native(), &rates.cells(), &note);
        }
        Ok(())
    }

    /// Point reads/s of each row, on the primary and on the replica.
    pub fn reads(&mut self, rows: &[Row], extent: &Extent, report: &mut Report) -> Result<()> {
        let name_of = |row: &Row| format!("read-{}.db", row.title().replace(", ", "-"));
        for row in rows {
            let name = &name_of(row);
            // Those who made it keep it open, and with it its WAL.
            self.add_database(name, row.reads().context("not a row of reads")?, "normal", READ_ROWS)?;
            if *row == Row::ReadWal {
                let ours = self.sides.iter_mut().map(|side| &mut side.ours);
                for driver in std::iter::once(&mut self.native).chain(ours) {
                    driver.ask(&json!({"do": "pace", "name": name, "rate": 1000, "count": 1}))?;
                }
            }
            for side in &mut self.sides {
                side.wait_for_replica(name)?;
            }
        }
        let doors = self.sides.len();
        let mut rates: Vec<[Rounds; 2]> =
            rows.iter().map(|_| [Rounds::new(doors), Rounds::new(doors)]).collect();
        for round in 0..extent.rounds {
            progress(&format!("reads, round {} of {}", round + 1, extent.rounds));
            // Natively, on the primaries, on the replicas.
            let mut places = vec![(Driver::start(&self.script)?, self.native_dir.clone())];
            let primaries = self.sides.iter().map(|side| (side, &side.primary));
            for (side, agent) in primaries.chain(self.sides.iter().map(|side| (side, &side.replica))) {
                places.push((side.start_driver(&self.script)?, agent.path("")));
            }
            for (i, row) in rows.iter().enumerate() {
                let name = name_of(row);
                for (driver, dir) in &mut places {
                    let path = dir.join(&name);
                    driver
                        .ask(&json!({"do": "open", "name": name, "path": path, "synchronous": "normal"}))?;
                    // The first read of a page is the disk's business.
                    driver.ask(&json!({"do": "scan", "name": name}))?;
                }
                self.quiet.wait()?;
                let mut drivers: Vec<&mut Driver> = places.iter_mut().map(|(driver, _)| driver).collect();
                let command = json!({"do": "reads", "name": name});
                let mut measured = in_slices(&mut drivers, round + i, extent.seconds, &command)?;
                rates[i][0].add(&measured[..=doors]);
                measured.drain(1..=doors);
                rates[i][1].add(&measured);
            }
        }
        report.heading("point reads/s", "native", "ratio (of rounds)");
        for (row, rates) in rows.iter().zip(&rates) {
            for (place, rates) in ["primary", "replica"].iter().zip(rates) {
                let title = format!("{}, {place}", row.title());
                report.row(&title, |door| row.bar(door), &rates.native(), &rates.cells(), "");
            }
        }
        Ok(())
    }

    /// Files/s of a program that opens no database.
    pub fn plain_files(&mut self, extent: &Extent, report: &mut Report) -> Result<()> {
        let mut rates = Rounds::new(self.sides.len());
        let dir = self.native_dir.join("plain");
        fs::create_dir_all(&dir)?;
        let command = json!({"do": "files", "dir": dir});
        for round in 0..extent.rounds {
            progress(&format!("files, round {} of {}", round + 1, extent.rounds));
            let ours = self.sides.iter().map(|side| side.start_driver(&self.script));
            let mut drivers: Vec<Driver> =
                std::iter::once(Driver::start(&self.script)).chain(ours).collect::<Result<_>>()?;
            self.quiet.wait()?;
            rates.add(&in_slices(
                &mut drivers.iter_mut().collect::<Vec<_>>(),
                round,
                extent.seconds,
                &command,
            )?);
        }
        let row = Row::PlainFiles;
        report.heading("file I/O", "native", "ratio (of rounds)");
        report.row(row.title(), |door| row.bar(door), &rates.native(), &rates.cells(), "");
        Ok(())
    }

    /// From a commit's return to the moment another connection sees it: natively, and on the replica.
    pub fn latency(&mut self, rows: &[Row], extent: &Extent, report: &mut Report) -> Result<()> {
        let name = "latency.db";
        self.add_database(name, "wal", "normal", 1)?;
        let native = (&mut self.native_reader, self.native_dir.join(name));
        let ours = self.sides.iter_mut().map(|side| (&mut side.on_replica, side.replica.path(name)));
        for (driver, path) in std::iter::once(native).chain(ours) {
            driver.ask(&json!({"do": "open", "name": name, "path": path, "synchronous": "normal"}))?;
        }
        report.heading("commit -> visible, ms", "native", "");
        for row in rows {
            let rate = row.latency().context("not a row of latencies")?;
            let mut latencies = vec![Vec::new(); 1 + self.sides.len()];
            let mut made = Vec::new();
            for round in 0..extent.long_rounds {
                progress(&format!("latency at {rate}/s, round {} of {}", round + 1, extent.long_rounds));
                for who in in_turn(round, latencies.len()) {
                    self.quiet.wait()?;
                    let (writer, reader) = match who.checked_sub(1) {
                        None => (&mut self.native, &mut self.native_reader),
                        Some(side) => {
                            let side = &mut self.sides[side];
                            (&mut side.ours, &mut side.on_replica)
                        }
                    };
                    let count = (rate as f64 * extent.seconds * 2.0) as u64;
                    let limit = (extent.seconds * 2.0) as u64 + PATIENCE.as_secs();
                    // The first answer tells that it is watching.
                    reader.ask(&json!({"do": "watch", "name": name, "count": count, "timeout": limit}))?;
                    let pace = json!({"do": "pace", "name": name, "rate": rate, "count": count});
                    let committed = writer.ask(&pace)?;
                    let seen = reader.answer(Duration::from_secs(limit) + PATIENCE)?;
                    latencies[who].extend(milliseconds_between(&committed, &seen)?);
                    if who > 0 {
                        made.push(count as f64 / number(&committed["seconds"])?);
                    }
                }
            }
            let note = format!("{} samples, {}/s were made", latencies[0].len(), thousands(median(&made)));
            for (what, percent) in [("p50", 50.0), ("p99", 99.0)] {
                let bar = |door| row.bar(door).filter(|_| percent > 50.0);
                let figures: Vec<f64> = latencies.iter().map(|l| percentile(l, percent)).collect();
                let cell = |ms: &f64| Cell { figure: format!("{ms:.2}"), beside: String::new(), judged: *ms };
                let cells: Vec<Cell> = figures[1..].iter().map(cell).collect();
                report.row(
                    &format!("{what} {}", row.title()),
                    bar,
                    &format!("{:.2}", figures[0]),
                    &cells,
                    &note,
                );
            }
        }
        Ok(())
    }
}

/// The order in which `count` take their turn: each goes first in some rounds.
fn in_turn(round: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| (turn + round) % count)
}

/// A slice of what [`in_slices`] measures.
const SLICE_SECONDS: f64 = 0.05;

/// What each of `drivers` does in a second, of something that leaves nothing behind for the next. Differences of a hundredth
/// show when they take turns in slices far shorter than the times for which such a machine is faster or slower, and when
/// each round has drivers of its own: where a process happens to have its memory makes one or two hundredths.
fn in_slices(drivers: &mut [&mut Driver], first: usize, seconds: f64, command: &Value) -> Result<Vec<f64>> {
    let slices = (seconds / SLICE_SECONDS).ceil().max(1.0);
    let mut command = command.clone();
    command["seconds"] = json!(seconds / slices);
    let mut done = vec![(0.0, 0.0); drivers.len()];
    for slice in 0..slices as usize {
        for who in in_turn(first + slice, drivers.len()) {
            let answer = drivers[who].ask(&command)?;
            done[who].0 += number(&answer["count"])?;
            done[who].1 += number(&answer["seconds"])?;
        }
    }
    Ok(done.iter().map(|(count, seconds)| count / seconds).collect())
}

/// How long after its commit had returned each row was seen.
fn milliseconds_between(committed: &Value, seen: &Value) -> Result<Vec<f64>> {
    let times = |answer: &Value| -> Result<Vec<i64>> {
        let times = answer["times"].as_array().context("no times in the answer")?;
        times.iter().map(|time| time.as_i64().context("not a time")).collect()
    };
    let (committed, seen) = (times(committed)?, times(seen)?);
    // A reader may see a commit before it has returned to the writer.
    Ok(committed.iter().zip(&seen).map(|(c, s)| (s - c).max(0) as f64 / 1e6).collect())
}
