//! `cargo xtask test`: everything that has to pass before a change is taken.

use crate::run::{self, cargo};
use crate::{clients, generated, setup};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

/// A name, and what it does; the text it returns is shown in the summary.
type Step = (&'static str, fn() -> Result<String>);

/// Whole-system tests that run through the preload door too. Those of recovery, of a mount that is taken over and of plain
/// files are about what the FUSE door does; `preload` has its counterparts and chooses the doors itself.
const BOTH_DOORS: [&str; 12] = [
    "access",
    "elections",
    "failover",
    "halt_lock",
    "lock_file",
    "operations",
    "replication",
    "sqlite_behaviour",
    "sync",
    "torture",
    "watch",
    "workload",
];

const STEPS: [Step; 10] = [
    // The tests of the whole system mount.
    ("mounting", || setup::can_mount().map(|()| String::new())),
    ("format", || quiet(&mut cargo(&["fmt", "--all", "--check"]))),
    ("dependencies", || {
        // Advisories need a download of their database on every run; they are a task for a schedule, not for a change.
        let mut command = Command::new(setup::cargo_deny()?);
        command
            .args(["--log-level", "error", "check", "bans", "licenses", "sources"])
            .current_dir(run::root());
        quiet(&mut command)
    }),
    // With the features that the tests are built with, so that nothing is built twice.
    ("build and lints", || quiet(&mut cargo(&["build", "--quiet", "--workspace", "--all-targets"]))),
    ("generated files", || generated::check().map(|()| String::new())),
    // The root was begun with the first step; making it mostly waits for the disk.
    ("fleet root", || fleet::prepare().map(|root| root.display().to_string())),
    ("clients", || setup::test_packages().and_then(|()| clients::install()).map(|()| String::new())),
    ("consul", || setup::consul().map(|path| path.display().to_string())),
    ("tests", || tests(&mut cargo(&["test", "--workspace", "--no-fail-fast"]))),
    ("preload door", through_the_preload_door),
];

/// Runs all steps, also after one has failed, and prints a summary.
pub fn run() -> Result<()> {
    setup::packages()?;
    setup::rust_components()?;
    run::lint_builds()?;
    // Its result is asked for in the step of that name.
    std::thread::spawn(fleet::prepare);
    let mut summary = String::new();
    let mut failed = Vec::new();
    for (name, step) in STEPS {
        println!("\n== {name}");
        let start = Instant::now();
        let done = step();
        let seconds = start.elapsed().as_secs_f32();
        let result = match &done {
            Ok(result) => format!("ok      {name:<16} {seconds:>6.1} s  {result}"),
            Err(_) => format!("FAILED  {name:<16} {seconds:>6.1} s"),
        };
        summary.push_str(result.trim_end());
        summary.push('\n');
        if let Err(error) = done {
            println!("{error:#}");
            failed.push(name);
        }
    }
    println!("\n== summary\n{summary}");
    if !failed.is_empty() {
        bail!("{}", failed.join(", "));
    }
    Ok(())
}

fn quiet(command: &mut Command) -> Result<String> {
    run::run(command).map(|()| String::new())
}

/// Runs tests of the whole system again, as applications with the library.
fn through_the_preload_door() -> Result<String> {
    // As it is shipped.
    let mut build = cargo(&["build", "--quiet", "--profile", "shim", "--package", "preload-shim"]);
    run::run(build.env_remove(run::WRAPPER))?;
    let library = run::target_directory()?.join("shim/liblitefs.so");
    let agents = tempfile::tempdir()?;
    let mut command = cargo(&["test", "--workspace", "--no-fail-fast"]);
    for name in BOTH_DOORS {
        command.args(["--test", name]);
    }
    // The library is for the test programs, not for cargo.
    let runner = format!("CARGO_TARGET_{}_UNKNOWN_LINUX_GNU_RUNNER", std::env::consts::ARCH.to_uppercase());
    command.env(runner, format!("env LD_PRELOAD={}", library.display()));
    command.env("LITEFS_SHIM", &library).env("LITEFS_RUNTIME_DIR", agents.path());
    command.env("LITEFS_TEST_DOOR", "preload");
    tests(&mut command)
}

/// Runs tests, passes their output on and counts them.
fn tests(command: &mut Command) -> Result<String> {
    // Most tests of the whole system wait: for an agent to start, for the end of a lease.
    let processors = std::thread::available_parallelism().context("cannot count the processors")?;
    command.env("RUST_TEST_THREADS", (processors.get() * 2).to_string());
    command.stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", run::show(command)))?;
    let stdout = child.stdout.take().context("no output of cargo")?;
    let mut counts = Counts::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counts.add(&line);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{} ended with {status}: {counts}", run::show(command));
    }
    Ok(counts.to_string())
}

#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    /// Adds a line such as `test result: ok. 5 passed; 0 failed; 1 ignored; ...`.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let words: Vec<&str> =
            result.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<u64>() else { continue };
            match pair[1] {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_add_up() {
        let mut counts = Counts::default();
        counts.add("running 3 tests");
        counts.add(
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.13s",
        );
        counts.add("test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s");
        assert_eq!(counts.to_string(), "7 passed, 3 failed, 1 ignored");
    }
}
