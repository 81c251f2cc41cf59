//! Test programs, several at a time: most tests of the whole system wait, for an agent to start or for the end of a lease.

use super::counts::Counts;
use crate::run::{self, cargo};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Whole-system tests that run through the preload door too. Those of recovery, of a mount that is taken over and of plain
/// files are about what the FUSE door does; `preload` has its counterparts and chooses the doors itself.
const BOTH_DOORS: [&str; 15] = [
    "access",
    "elections",
    "failover",
    "file_names",
    "halt_lock",
    "journal_modes",
    "lock_file",
    "operations",
    "replication",
    "role_changes",
    "sqlite_behaviour",
    "sync",
    "torture",
    "watch",
    "workload",
];

/// What takes longest, begun first, so that nothing long is left for the end.
const LONGEST: [&str; 14] = [
    "operator",
    "faults",
    "sqlite_behaviour",
    "litefs_agent",
    "sync",
    "replication",
    "failover",
    "preload_bystanders",
    "preload",
    "clients",
    "full_disk",
    "role_changes",
    "operations",
    "torture",
];

/// Programs at a time, each with as many tests at a time as there are processors.
const LANES: usize = 3;

/// Runs before all others: some of its tests have to be done before an agent syncs databases, as it does every few seconds.
const ALONE: &str = "power_failure";

/// Where the hosts with systemd are tested, which are many processes each: one such program at a time.
const FLEET: &str = "tests/fleet";

/// A program with tests, as cargo has built it.
struct Program {
    /// Its target of cargo.
    name: String,
    /// Its package, from the root of the repository.
    package: PathBuf,
    executable: PathBuf,
}

/// Something to run.
struct Run {
    /// Names it in messages, and its file of output.
    label: String,
    command: Command,
    /// Boots hosts.
    fleet: bool,
    /// Its place in [`LONGEST`].
    rank: usize,
}

/// Builds the workspace and all tests, with the features that the tests are built with, so that nothing is built twice.
pub fn build() -> Result<()> {
    run::run(&mut cargo(&["build", "--quiet", "--workspace", "--all-targets"]))
}

/// Runs all tests through both doors. What each program says is shown when it has ended; until then it is in a file.
pub fn run_all() -> Result<String> {
    // As it is shipped.
    let mut shim = cargo(&["build", "--quiet", "--profile", "shim", "--package", "preload-shim"]);
    run::run(shim.env_remove(run::WRAPPER))?;
    let target = run::target_directory()?;
    let library = target.join("shim/liblitefs.so");
    let output = target.join("test-output");
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let processors = std::thread::available_parallelism().context("cannot count the processors")?.get();

    let agents = tempfile::tempdir()?;
    let (mut alone, mut runs) = (Vec::new(), Vec::new());
    for program in programs()? {
        if program.name == ALONE {
            alone.push(program.run("", &library, 2 * processors));
            continue;
        }
        runs.push(program.run("", &library, processors));
        if program.package == Path::new("tests") && BOTH_DOORS.contains(&program.name.as_str()) {
            let mut run = program.run(" through the preload door", &library, processors);
            // Of its own: the library looks at all agents there, also at those that a test has stopped.
            let runtime = agents.path().join(&program.name);
            fs::create_dir(&runtime)?;
            run.command.env("LD_PRELOAD", &library).env("LITEFS_RUNTIME_DIR", runtime);
            run.command.env("LITEFS_TEST_DOOR", "preload");
            runs.push(run);
        }
    }
    let documentation = cargo(&["test", "--workspace", "--doc", "--no-fail-fast"]);
    let label = "examples in the documentation".to_owned();
    // First: they are compiled now.
    runs.push(Run { label, command: documentation, fleet: false, rank: 0 });
    runs.sort_by_key(|run| run.rank);

    println!("until a program has ended, what it says is in {}", output.display());
    let done = Mutex::new(Done::default());
    let run = |mut run: Run| {
        let start = Instant::now();
        let result = run.run(&output);
        let seconds = start.elapsed().as_secs_f32();
        done.lock().unwrap_or_else(PoisonError::into_inner).add(&run.label, seconds, result);
    };
    alone.into_iter().for_each(run);
    let queue = Mutex::new(VecDeque::from(runs));
    std::thread::scope(|scope| {
        for lane in 0..LANES {
            let (queue, run) = (&queue, &run);
            scope.spawn(move || {
                while let Some(next) = next(queue, lane == 0) {
                    run(next);
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner).result()
}

/// What to run now. Only one lane takes programs that boot hosts, and takes them first: together they last as long as the rest.
fn next(queue: &Mutex<VecDeque<Run>>, boots_hosts: bool) -> Option<Run> {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    let at = queue.iter().position(|run| run.fleet == boots_hosts);
    let at = at.or_else(|| queue.iter().position(|run| !run.fleet))?;
    queue.remove(at)
}

/// All test programs of the workspace. They have been built.
fn programs() -> Result<Vec<Program>> {
    let build =
        ["build", "--quiet", "--workspace", "--all-targets", "--message-format", "json-render-diagnostics"];
    let messages = run::output(&mut cargo(&build))?;
    let mut programs = Vec::new();
    for message in messages.lines() {
        let message: Value = serde_json::from_str(message).context("cannot read what cargo has built")?;
        if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
            continue;
        }
        let text = |value: &Value| value.as_str().map(str::to_owned).context("cargo names no test program");
        let manifest = PathBuf::from(text(&message["manifest_path"])?);
        let package = manifest.parent().and_then(|package| package.strip_prefix(run::root()).ok());
        programs.push(Program {
            name: text(&message["target"]["name"])?,
            package: package.context("a package is outside of the repository")?.to_owned(),
            executable: text(&message["executable"])?.into(),
        });
    }
    if programs.is_empty() {
        bail!("cargo has built no test programs");
    }
    Ok(programs)
}

impl Program {
    /// Runs it as cargo does.
    fn run(&self, door: &str, library: &Path, threads: usize) -> Run {
        let package = run::root().join(&self.package);
        let mut command = Command::new(&self.executable);
        run::build_alike(&mut command);
        command.current_dir(&package).env("CARGO_MANIFEST_DIR", package);
        command.env("RUST_TEST_THREADS", threads.to_string()).env("LITEFS_SHIM", library);
        Run {
            label: format!("{}: {}{door}", self.package.display(), self.name),
            command,
            fleet: self.package == Path::new(FLEET),
            rank: LONGEST.iter().position(|name| *name == self.name).unwrap_or(LONGEST.len()),
        }
    }
}

impl Run {
    /// Runs it to its end; gives what it said, and whether it succeeded.
    fn run(&mut self, output: &Path) -> Result<(String, bool)> {
        let file: String =
            self.label.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let path = output.join(file + ".log");
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        self.command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let status =
            self.command.status().with_context(|| format!("cannot run {}", run::show(&self.command)))?;
        let mut said = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        if !status.success() {
            let _ = writeln!(said, "{} ended with {status}", run::show(&self.command));
        }
        Ok((said, status.success()))
    }
}

/// What has ended.
#[derive(Default)]
struct Done {
    counts: Counts,
    failed: Vec<String>,
}

impl Done {
    fn add(&mut self, label: &str, seconds: f32, result: Result<(String, bool)>) {
        let (said, succeeded) = result.unwrap_or_else(|error| (format!("{error:#}"), false));
        println!("\n-- {label} ({seconds:.1} s)\n{}", said.trim());
        said.lines().for_each(|line| self.counts.add(line));
        if !succeeded {
            let tests =
                said.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
            let tests: Vec<&str> = tests.collect();
            self.failed.push(format!(
                "{label}: {}",
                if tests.is_empty() { "ended badly".into() } else { tests.join(", ") }
            ));
        }
    }

    fn result(self) -> Result<String> {
        if !self.failed.is_empty() {
            bail!("{}\n{}", self.counts, self.failed.join("\n"));
        }
        Ok(self.counts.to_string())
    }
}
