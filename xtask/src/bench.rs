//! `cargo xtask bench`: this product and plain SQLite side by side, on this machine, in one run.
//!
//! What is measured natively and what is measured behind each door takes turns in short rounds, so that a machine that
//! is busy with other things for a while is unfair to all; the median of the rounds' ratios counts. The application is
//! a Python program on the `sqlite3` module with one connection per database, open all the time. One replica is
//! connected throughout.

mod door;
mod failover;
mod fleet;
mod large;
mod machine;
mod process;
mod report;
mod rows;

use crate::run::{self, cargo};
use crate::setup;
use anyhow::{Context, Result};
use clap::ValueEnum;
use door::Door;
use fleet::Fleet;
use process::Driver;
use report::Report;
use rows::Row;
use serde_json::{Value, json};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Measure changes of the primary instead: how long writers wait, and what is lost
    #[arg(long)]
    failover: bool,
    /// With --failover: so many things go wrong while commits wait for replicas
    #[arg(long, default_value_t = 200)]
    faults: u32,
    /// Only these rows
    #[arg(long, value_enum, value_delimiter = ',')]
    rows: Vec<Row>,
    /// The doors to measure, a column each
    #[arg(long, value_enum, value_delimiter = ',', default_value = "fuse")]
    door: Vec<Door>,
    /// Seconds of each measurement; latencies are measured twice as long
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// Rounds; of latencies and snapshots half as many
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// MiB of the large database; the bar for memory is for 1024
    #[arg(long, default_value_t = 1024)]
    large: u64,
    /// Put the databases, native and replicated, below this directory
    #[arg(long, default_value = "/srv")]
    dir: PathBuf,
    /// Measure this program instead of building one
    #[arg(long)]
    litefs: Option<PathBuf>,
    /// Seconds to wait, before each measurement (of reads and files: each round), for a machine that is busy with other things
    #[arg(long, default_value_t = 1)]
    patience: u64,
}

/// How much of everything.
struct Extent {
    rounds: usize,
    seconds: f64,
    /// Of what takes long.
    long_rounds: usize,
    large_bytes: u64,
}

impl Options {
    fn extent(&self) -> Extent {
        Extent {
            rounds: self.rounds,
            seconds: self.seconds,
            long_rounds: self.rounds.div_ceil(2),
            large_bytes: self.large << 20,
        }
    }

    /// The rows to measure of which `is` is true.
    fn rows(&self, is: impl Fn(Row) -> bool) -> Vec<Row> {
        let wanted = |row: &&Row| (self.rows.is_empty() || self.rows.contains(row)) && is(**row);
        Row::value_variants().iter().filter(wanted).copied().collect()
    }
}

/// Runs the benchmark.
pub fn run(options: Options) -> Result<()> {
    setup::packages()?;
    setup::can_mount()?;
    if options.failover {
        return failover::run(options.faults, options.litefs.as_deref());
    }
    let target = run::target_directory()?;
    let litefs = match &options.litefs {
        Some(litefs) => fs::canonicalize(litefs).with_context(|| litefs.display().to_string())?,
        None => {
            run::run(&mut cargo(&["build", "--release", "--package", "litefs-agent"]))?;
            target.join("release/litefs")
        }
    };
    if options.door.iter().any(|door| door.needs_library()) && std::env::var_os("LITEFS_SHIM").is_none() {
        run::run(&mut cargo(&["build", "--profile", "shim", "--package", "preload-shim"]))?;
    }
    process::handle_interrupts()?;
    let dir = tempfile::Builder::new().prefix("bench-").tempdir_in(&options.dir);
    let dir = dir.with_context(|| format!("cannot make a directory in {}", options.dir.display()))?;
    // Agents and drivers are started below here, so they are gone before the directory goes.
    let mut report = Report::new(&options.door);
    let measured = measure(&options, &litefs, &fs::canonicalize(dir.path())?, &mut report);
    // What was measured before something failed is worth seeing.
    println!("{}", report.finish());
    measured?;
    dir.close().context("cannot remove the directory of the benchmark")
}

fn measure(options: &Options, litefs: &Path, dir: &Path, report: &mut Report) -> Result<()> {
    let script = dir.join("driver.py");
    fs::write(&script, include_str!("bench/driver.py"))?;
    let extent = options.extent();
    let versions = Driver::start(&script)?.ask(&json!({"do": "version"}))?;
    for (name, fact) in machine::facts(dir, &versions, litefs)? {
        report.line(&format!("{name:<12} {fact}"));
    }
    let commits = options.rows(|row| row.commits().is_some());
    let reads = options.rows(|row| row.reads().is_some());
    let latencies = options.rows(|row| row.latency().is_some());
    let files = options.rows(|row| row == Row::PlainFiles);
    let large = options.rows(|row| matches!(row, Row::Snapshot | Row::Rss));
    if !(commits.is_empty() && reads.is_empty() && latencies.is_empty() && files.is_empty()) {
        let quiet = Quiet::new(Duration::from_secs(options.patience));
        let mut fleet = Fleet::start(litefs, &options.door, dir, &script, quiet, report)?;
        if !commits.is_empty() {
            fleet.commits(&commits, &extent, report)?;
        }
        if !reads.is_empty() {
            fleet.reads(&reads, &extent, report)?;
        }
        if !files.is_empty() {
            fleet.plain_files(&extent, report)?;
        }
        if !latencies.is_empty() {
            fleet.latency(&latencies, &extent, report)?;
        }
        report.line("");
        report.line(&fleet.disturbed());
    }
    if !large.is_empty() {
        large::measure(litefs, &options.door, dir, &script, &large, &extent, report)?;
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
    fn new(patience: Duration) -> Self {
        Quiet { patience, measured: Cell::default(), busy: Cell::default() }
    }

    fn wait(&self) -> Result<()> {
        // What was written before goes to the disk now, and not during the syncs of what is measured next.
        nix::unistd::sync();
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

    fn disturbed(&self) -> String {
        let (busy, all) = (self.busy.get(), self.measured.get());
        format!("{busy} of {all} measurements began on a machine that was busy with other things")
    }
}

fn progress(text: &str) {
    eprintln!("{text}");
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("not a number: {value}"))
}

fn rate(answer: &Value) -> Result<f64> {
    Ok(number(&answer["count"])? / number(&answer["seconds"])?)
}
