//! `cargo xtask bench`: this product and plain SQLite side by side, on this machine, in one run.
//!
//! What is measured natively and what is measured in the mount alternates in short rounds, so that a machine that is
//! busy with other things for a while is unfair to both; the median of the rounds' ratios counts. The application is a
//! Python program on the `sqlite3` module with one connection per database, open all the time. One replica is
//! connected throughout.

mod machine;
mod process;
mod report;

use crate::run::{self, cargo};
use crate::setup;
use anyhow::{Context, Result};
use process::{Agent, Driver, PATIENCE, wait_for};
use report::{Bar, Pairs, Report, median, percentile, thousands};
use serde_json::{Value, json};
use std::cell::Cell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const JOURNAL_MODES: [&str; 2] = ["wal", "delete"];
const SYNCHRONOUS: [&str; 3] = ["off", "normal", "full"];

/// Rows of the databases that are read: more than SQLite's own cache of 2 MB holds.
const READ_ROWS: u64 = 100_000;

/// Commits per second at which the way to the replica is timed.
const LATENCY_RATES: [u64; 2] = [50, 1000];

/// How long making, importing or shipping the large database may take.
const LARGE_PATIENCE: Duration = Duration::from_secs(600);

const MIB: f64 = 1024.0 * 1024.0;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// About a minute: fewer and shorter rounds, and a database of 256 MiB where 1 GiB is asked for
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Three times as many rounds
    #[arg(long)]
    full: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Put the databases, native and replicated, below this directory instead of the target directory
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Measure this program instead of building one
    #[arg(long)]
    litefs: Option<PathBuf>,
    /// Seconds to wait, before each measurement, for a machine that is busy with other things
    #[arg(long, default_value_t = 1)]
    patience: u64,
}

/// A part of the benchmark.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Commits,
    Reads,
    Latency,
    Large,
}

/// How much of everything.
struct Extent {
    rounds: usize,
    seconds: f64,
    latency_rounds: usize,
    latency_seconds: u64,
    large_bytes: u64,
}

impl Options {
    fn extent(&self) -> Extent {
        if self.quick {
            return Extent {
                rounds: 3,
                seconds: 0.4,
                latency_rounds: 1,
                latency_seconds: 2,
                large_bytes: 256 << 20,
            };
        }
        let times = if self.full { 3 } else { 1 };
        Extent {
            rounds: 5 * times,
            seconds: 1.5,
            latency_rounds: 2 * times,
            latency_seconds: 4,
            large_bytes: 1 << 30,
        }
    }

    fn has(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Runs the benchmark.
pub fn run(options: Options) -> Result<()> {
    setup::packages()?;
    setup::can_mount()?;
    let target = target_directory()?;
    let litefs = match &options.litefs {
        Some(litefs) => fs::canonicalize(litefs).with_context(|| litefs.display().to_string())?,
        None => {
            run::run(&mut cargo(&["build", "--release", "--package", "litefs-agent"]))?;
            target.join("release/litefs")
        }
    };
    process::handle_interrupts()?;
    let parent = options.dir.as_ref().unwrap_or(&target);
    let dir = tempfile::Builder::new().prefix("bench-").tempdir_in(parent)?;
    // Agents and drivers are started below here, so they are gone before the directory goes.
    let mut report = Report::default();
    let measured = measure(&options, &litefs, &fs::canonicalize(dir.path())?, &mut report);
    // What was measured before something failed is worth seeing.
    println!("{}", report.finish());
    measured?;
    dir.close().context("cannot remove the directory of the benchmark")
}

fn target_directory() -> Result<PathBuf> {
    let metadata = run::output(&mut cargo(&["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cannot read cargo metadata")?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(target))
}

fn measure(options: &Options, litefs: &Path, dir: &Path, report: &mut Report) -> Result<()> {
    let script = dir.join("driver.py");
    fs::write(&script, include_str!("bench/driver.py"))?;
    let extent = options.extent();
    let versions = Driver::start(&script)?.ask(&json!({"do": "version"}))?;
    for (name, fact) in machine::facts(dir, &versions, litefs)? {
        report.line(&format!("{name:<12} {fact}"));
    }
    if [Part::Commits, Part::Reads, Part::Latency].iter().any(|part| options.has(*part)) {
        let mut fleet = Fleet::start(litefs, dir, &script, options.patience)?;
        report.line(&format!("passthrough  {}", fleet.passthrough));
        if options.has(Part::Commits) {
            fleet.commits(&extent, report)?;
        }
        if options.has(Part::Reads) {
            fleet.reads(&extent, report)?;
        }
        if options.has(Part::Latency) {
            fleet.latency(&extent, report)?;
        }
        report.line("");
        report.line(&format!(
            "{} of {} measurements began on a machine that was busy with other things",
            fleet.quiet.busy.get(),
            fleet.quiet.measured.get()
        ));
    }
    if options.has(Part::Large) {
        large(litefs, dir, &script, &extent, report)?;
    }
    report.line("");
    report.line(&format!("load after   {}", machine::load()?));
    Ok(())
}

/// Waits a while for a machine that has nothing else to do, and counts how often there was none.
struct Quiet {
    patience: Duration,
    measured: Cell<usize>,
    busy: Cell<usize>,
}

impl Quiet {
    fn wait(&self) -> Result<()> {
        self.measured.set(self.measured.get() + 1);
        let deadline = Instant::now() + self.patience;
        while machine::busy(Duration::from_millis(150))? > 0.2 {
            process::check_interrupted()?;
            if Instant::now() > deadline {
                self.busy.set(self.busy.get() + 1);
                break;
            }
        }
        Ok(())
    }
}

fn progress(text: &str) {
    eprintln!("{text}");
}

/// A primary, its replica, and applications: one on plain files, one on the primary, one on the replica.
struct Fleet {
    native: Driver,
    ours: Driver,
    on_replica: Driver,
    native_dir: PathBuf,
    replica: Agent,
    primary: Agent,
    passthrough: bool,
    quiet: Quiet,
}

impl Fleet {
    fn start(litefs: &Path, dir: &Path, script: &Path, patience: u64) -> Result<Fleet> {
        progress("starting a primary and a replica");
        let native_dir = dir.join("native");
        fs::create_dir_all(&native_dir)?;
        let mut primary = Agent::start(litefs, dir, "primary", None)?;
        let status = primary.wait_until_ready()?;
        let mut replica = Agent::start(litefs, dir, "replica", Some(&primary))?;
        replica.wait_until_ready()?;
        Ok(Fleet {
            native: Driver::start(script)?,
            ours: Driver::start(script)?,
            on_replica: Driver::start(script)?,
            native_dir,
            replica,
            primary,
            passthrough: status["mount"]["passthrough"].as_bool().unwrap_or_default(),
            quiet: Quiet {
                patience: Duration::from_secs(patience),
                measured: Cell::default(),
                busy: Cell::default(),
            },
        })
    }

    /// Makes a database natively and in the mount, and opens both for the run.
    fn add_database(&mut self, name: &str, mode: &str, synchronous: &str, rows: u64) -> Result<()> {
        let native = self.native_dir.join(name);
        let ours = self.primary.path(name);
        for (driver, path) in [(&mut self.native, &native), (&mut self.ours, &ours)] {
            driver.ask(&json!({"do": "create", "path": path, "mode": mode, "rows": rows}))?;
            driver.ask(&json!({"do": "open", "name": name, "path": path, "synchronous": synchronous}))?;
        }
        self.wait_for_replica(name).map(|_| ())
    }

    /// Waits until the replica has what the primary has.
    fn wait_for_replica(&mut self, name: &str) -> Result<Duration> {
        let begin = Instant::now();
        wait_for(&format!("the replica has {name} as the primary has it"), || {
            self.primary.check_running()?;
            self.replica.check_running()?;
            let position = self.primary.position(name);
            Ok((position.is_some() && position == self.replica.position(name)).then(|| begin.elapsed()))
        })
        .with_context(|| format!("the log of the replica says:\n{}", self.replica.log()))
    }

    fn commits(&mut self, extent: &Extent, report: &mut Report) -> Result<()> {
        let cells: Vec<(&str, &str, String)> = JOURNAL_MODES
            .iter()
            .flat_map(|mode| {
                SYNCHRONOUS.map(|synchronous| (*mode, synchronous, format!("{mode}-{synchronous}.db")))
            })
            .collect();
        for (mode, synchronous, name) in &cells {
            self.add_database(name, mode, synchronous, 0)?;
        }
        let mut rates: Vec<Pairs> = cells.iter().map(|_| Pairs::default()).collect();
        let mut behind: Vec<Vec<f64>> = vec![Vec::new(); cells.len()];
        for round in 0..extent.rounds {
            progress(&format!("commits, round {} of {}", round + 1, extent.rounds));
            for (i, (_, _, name)) in cells.iter().enumerate() {
                let command = json!({"do": "commits", "name": name, "seconds": extent.seconds});
                let (mut native, mut ours) = (0.0, 0.0);
                for ours_now in in_turn(round + i) {
                    self.quiet.wait()?;
                    if ours_now {
                        ours = rate(&self.ours.ask(&command)?)?;
                        behind[i].push(self.wait_for_replica(name)?.as_secs_f64() * 1e3);
                    } else {
                        native = rate(&self.native.ask(&command)?)?;
                    }
                }
                rates[i].add(native, ours);
            }
        }
        report.heading("commits/s", "native", "litefs");
        for (i, (mode, synchronous, _)) in cells.iter().enumerate() {
            let bar = match (*mode, *synchronous) {
                ("wal", "full") => Some(Bar::ratio(0.4, 0.8)),
                ("wal", _) => Some(Bar::ratio(0.1, 0.5)),
                ("delete", "full") => Some(Bar::ratio(0.4, 0.7)),
                _ => None,
            };
            let name = format!("{} {}", mode.to_uppercase(), synchronous.to_uppercase());
            let note = format!("replica done {:.0} ms after", median(&behind[i]));
            report.ratio(&name, &rates[i], bar, &note);
        }
        Ok(())
    }

    fn reads(&mut self, extent: &Extent, report: &mut Report) -> Result<()> {
        let cells = [
            // Since it was opened nobody has written: then SQLite asks the file's size at every read.
            ("WAL, nothing written yet", "wal", "read-wal-empty.db", Bar::ratio(0.95, 1.0)),
            ("WAL", "wal", "read-wal.db", Bar::ratio(0.95, 1.0)),
            ("DELETE", "delete", "read-delete.db", Bar::ratio(0.6, 0.95)),
        ];
        for (_, mode, name, _) in cells {
            self.add_database(name, mode, "normal", READ_ROWS)?;
            if name == "read-wal.db" {
                for driver in [&mut self.native, &mut self.ours] {
                    driver.ask(&json!({"do": "pace", "name": name, "rate": 1000, "count": 1}))?;
                }
                self.wait_for_replica(name)?;
            }
            let path = self.replica.path(name);
            let open = json!({"do": "open", "name": name, "path": path, "synchronous": "normal"});
            self.on_replica.ask(&open)?;
            // The first read of a page is the disk's business.
            for driver in [&mut self.native, &mut self.ours, &mut self.on_replica] {
                driver.ask(&json!({"do": "scan", "name": name}))?;
            }
        }
        let mut rates: [[Pairs; 2]; 3] = Default::default();
        for round in 0..extent.rounds {
            progress(&format!("reads, round {} of {}", round + 1, extent.rounds));
            for (i, (_, _, name, _)) in cells.iter().enumerate() {
                let command = json!({"do": "reads", "name": name, "seconds": extent.seconds});
                let mut measured = [0.0; 3];
                for turn in 0..3 {
                    self.quiet.wait()?;
                    let who = (turn + round + i) % 3;
                    let driver = match who {
                        0 => &mut self.native,
                        1 => &mut self.ours,
                        _ => &mut self.on_replica,
                    };
                    measured[who] = rate(&driver.ask(&command)?)?;
                }
                let [native, primary, replica] = measured;
                rates[i][0].add(native, primary);
                rates[i][1].add(native, replica);
            }
        }
        report.heading("point reads/s", "native", "litefs");
        for ((title, _, _, bar), rates) in cells.iter().zip(&rates) {
            for (place, pairs) in ["primary", "replica"].iter().zip(rates) {
                report.ratio(&format!("{title}, {place}"), pairs, Some(*bar), "");
            }
        }
        Ok(())
    }

    fn latency(&mut self, extent: &Extent, report: &mut Report) -> Result<()> {
        let name = "latency.db";
        self.add_database(name, "wal", "normal", 1)?;
        let paths = [("native", self.native_dir.join(name)), ("ours", self.replica.path(name))];
        for (watched, path) in &paths {
            let open = json!({"do": "open", "name": watched, "path": path, "synchronous": "normal"});
            self.on_replica.ask(&open)?;
        }
        report.heading("commit -> visible, ms", "native", "litefs");
        for rate in LATENCY_RATES {
            // Of plain files and of the product.
            let mut latencies = [Vec::new(), Vec::new()];
            let mut achieved = Vec::new();
            for round in 0..extent.latency_rounds {
                progress(&format!("latency at {rate}/s, round {} of {}", round + 1, extent.latency_rounds));
                for ours_now in in_turn(round) {
                    self.quiet.wait()?;
                    let count = rate * extent.latency_seconds;
                    let (watched, writer) =
                        if ours_now { ("ours", &mut self.ours) } else { ("native", &mut self.native) };
                    let limit = extent.latency_seconds + PATIENCE.as_secs();
                    let watch = json!({"do": "watch", "name": watched, "count": count, "timeout": limit});
                    // The first answer tells that it is watching.
                    self.on_replica.ask(&watch)?;
                    let pace = json!({"do": "pace", "name": name, "rate": rate, "count": count});
                    let committed = writer.ask(&pace)?;
                    let seen = self.on_replica.answer(Duration::from_secs(limit) + PATIENCE)?;
                    latencies[usize::from(ours_now)].extend(milliseconds_between(&committed, &seen)?);
                    if ours_now {
                        achieved.push(count as f64 / number(&committed["seconds"])?);
                    }
                }
            }
            let [native, ours] = latencies;
            let note = format!("{}/s were made", thousands(median(&achieved)));
            for (what, percent) in [("p50", 50.0), ("p99", 99.0)] {
                let bar = (rate == 1000 && what == "p99").then(|| Bar::at_most(10.0, 2.0));
                let row = format!("{what} at {}/s", thousands(rate as f64));
                report.figure(
                    &row,
                    Some(percentile(&native, percent)),
                    percentile(&ours, percent),
                    bar,
                    &note,
                );
            }
        }
        Ok(())
    }
}

/// A late joiner's snapshot of a large database, and what both agents keep in memory then.
fn large(litefs: &Path, dir: &Path, script: &Path, extent: &Extent, report: &mut Report) -> Result<()> {
    let (name, dir) = ("large.db", dir.join("large"));
    fs::create_dir_all(&dir)?;
    progress(&format!("making a database of {} MiB", extent.large_bytes >> 20));
    let source = dir.join(name);
    let mut driver = Driver::start(script)?;
    let create = json!({"do": "create_large", "path": source, "bytes": extent.large_bytes});
    driver.tell(&create)?;
    let bytes = number(&driver.answer(LARGE_PATIENCE)?["bytes"])?;

    progress("copying it natively");
    let mut native = Vec::new();
    for _ in 0..extent.latency_rounds {
        let copy = dir.join("copy.db");
        let begin = Instant::now();
        fs::copy(&source, &copy)?;
        File::open(&copy)?.sync_all()?;
        native.push(bytes / 1e6 / begin.elapsed().as_secs_f64());
        fs::remove_file(&copy)?;
    }

    progress("importing it");
    let mut primary = Agent::start(litefs, &dir, "primary", None)?;
    primary.wait_until_ready()?;
    let begin = Instant::now();
    let source_text = source.to_str().context("a path that is not UTF-8")?;
    run::output(&mut primary.command(&["import", name, source_text]))?;
    let import = bytes / 1e6 / begin.elapsed().as_secs_f64();

    progress("a replica joins");
    let mut pairs = Pairs::default();
    let mut replica = None;
    for native in native {
        // Each joins with nothing; the last one stays.
        if let Some(joined) = replica.take() {
            drop::<Agent>(joined);
            fs::remove_dir_all(dir.join("replica"))?;
        }
        let begin = Instant::now();
        let mut joining = Agent::start(litefs, &dir, "replica", Some(&primary))?;
        let position = primary.position(name).context("the primary has no position of the large database")?;
        while joining.position(name).as_ref() != Some(&position) {
            joining.check_running()?;
            primary.check_running()?;
            process::check_interrupted()?;
            anyhow::ensure!(begin.elapsed() < LARGE_PATIENCE, "no snapshot; the log:\n{}", joining.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        pairs.add(native, bytes / 1e6 / begin.elapsed().as_secs_f64());
        joining.wait_until_ready()?;
        replica = Some(joining);
    }
    let replica = replica.context("no round")?;

    progress("memory");
    let path = primary.path(name);
    driver.ask(&json!({"do": "open", "name": name, "path": path, "synchronous": "normal"}))?;
    driver.ask(&json!({"do": "commits", "name": name, "seconds": extent.seconds}))?;
    driver.ask(&json!({"do": "close", "name": name}))?;
    wait_for("the replica has the last commits", || {
        Ok((primary.position(name) == replica.position(name)).then_some(()))
    })?;

    let mib = (bytes / MIB).round();
    report.heading(&format!("{mib} MiB database, MB/s"), "cp, fsync", "litefs");
    report.ratio("snapshot to a late joiner", &pairs, None, "");
    report.line(&format!("  {:<34} {:>11} {:>11}", "litefs import", "", thousands(import)));
    report.heading("RSS with it, MiB", "", "litefs");
    for (who, agent) in [("primary", &primary), ("replica", &replica)] {
        let now = agent.memory_kib("VmRSS")? as f64 / 1024.0;
        let peak = agent.memory_kib("VmHWM")? as f64 / 1024.0;
        // The bar is for 1 GiB.
        let bar = (extent.large_bytes >= 1 << 30).then(|| Bar::at_most(40.0, 20.0));
        report.figure(who, None, now, bar, &format!("peak {peak:.1}"));
    }
    Ok(())
}

/// Whether it is the product's turn: both sides take turns in going first.
fn in_turn(round: usize) -> [bool; 2] {
    let ours_first = round % 2 == 1;
    [ours_first, !ours_first]
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("not a number: {value}"))
}

fn rate(answer: &Value) -> Result<f64> {
    Ok(number(&answer["count"])? / number(&answer["seconds"])?)
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
