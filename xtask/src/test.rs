//! `cargo xtask test`: everything that has to pass before a change is taken.

mod counts;
mod programs;

use crate::run::{self, cargo};
use crate::{clients, generated, setup};
use anyhow::{Context, Result, anyhow, bail};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// A name, and what it does; the text it returns is shown in the summary.
type Step = (&'static str, fn() -> Result<String>);

const STEPS: [Step; 7] = [
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
    ("build and lints", || programs::build().map(|()| String::new())),
    ("generated files", || generated::check().map(|()| String::new())),
    ("set-up", prepared),
    ("tests", programs::run_all),
];

/// Makes ready what the tests need besides programs, while those are compiled: it mostly waits for downloads and the disk.
static PREPARING: Mutex<Option<JoinHandle<Result<()>>>> = Mutex::new(None);

fn prepare() -> Result<()> {
    fleet::prepare()?;
    setup::test_packages()?;
    clients::install()?;
    setup::consul().map(drop)
}

/// Waits until it is ready.
fn prepared() -> Result<String> {
    let preparing = PREPARING.lock().unwrap_or_else(PoisonError::into_inner).take();
    let done = preparing.context("the set-up was not begun")?.join();
    done.map_err(|_| anyhow!("the set-up panicked"))?.map(|()| String::new())
}

/// Runs all steps, also after one has failed, and prints a summary.
pub fn run() -> Result<()> {
    setup::packages()?;
    setup::rust_components()?;
    run::lint_builds()?;
    *PREPARING.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::spawn(prepare));
    let mut summary = String::new();
    let mut failed = Vec::new();
    for (name, step) in STEPS {
        println!("\n== {name}");
        let start = Instant::now();
        let done = step();
        let seconds = start.elapsed().as_secs_f32();
        let result = match done {
            Ok(result) => format!("ok      {name:<16} {seconds:>6.1} s  {result}"),
            Err(error) => {
                let error = format!("{error:#}");
                println!("{error}");
                failed.push(name);
                let beginning: Vec<&str> = error.lines().take(20).collect();
                format!("FAILED  {name:<16} {seconds:>6.1} s  {}", beginning.join("\n        "))
            }
        };
        summary.push_str(result.trim_end());
        summary.push('\n');
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
