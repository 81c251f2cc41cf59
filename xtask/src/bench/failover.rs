//! `cargo xtask bench --failover`: changes of the primary, with real agents and a real Consul on this host.
//!
//! The measurements are tests that are ignored otherwise: they have the fleet and the clients. This runs them with what is
//! shipped, and prints their rows as one table beside what has to be reached.

use crate::run::{self, cargo};
use crate::setup;
use anyhow::{Context, Result, bail};
use std::path::Path;

/// Rows by their names in the tests, what has to be reached, and what LiteFS 0.5.14 was measured at.
const BARS: [(&str, &str, &str); 5] = [
    ("planned handoff, writers stalled", "p99 ≤ 50 ms, no error", "14–78 ms, I/O errors, lost commits"),
    ("service stop, other host writable", "≤ 100 ms, no error", "1.0 s, errors"),
    ("agent crash, same host writable again", "≤ 1 s, no error", "remount, errors"),
    ("agent crash that stays down, other host writable", "≤ 2 s", "18–19 s"),
    ("host death, other host writable", "≤ TTL (10 s) + 2 s", "18–19 s"),
];

/// Measures and prints.
pub fn run(faults: u32, litefs: Option<&Path>) -> Result<()> {
    let consul = setup::consul()?;
    let litefs = match litefs {
        Some(litefs) => std::fs::canonicalize(litefs).with_context(|| litefs.display().to_string())?,
        None => {
            run::run(&mut cargo(&["build", "--release", "--package", "litefs-agent"]))?;
            run::target_directory()?.join("release/litefs")
        }
    };
    let test = |name: &str, case: &str, ignored: bool| {
        let mut command =
            cargo(&["test", "--quiet", "--package", "litefs-tests", "--test", name, "--", case]);
        command.args(["--exact", "--nocapture", "--test-threads=1"]);
        if ignored {
            command.arg("--ignored");
        }
        command.env("LITEFS_BIN", &litefs).env("LITEFS_CONSUL", &consul);
        command.env("LITEFS_FAULTS", faults.to_string()).env("LITEFS_TEST_HANGS_AFTER", "7200");
        command
    };
    let times = run::output(&mut test("failover_times", "how_long_writers_wait", true))?;
    println!("| what | median | p99 | longest | times | | at least | LiteFS |");
    println!("|---|---:|---:|---:|---:|---|---|---|");
    for (name, bar, litefs) in BARS {
        let row = times.lines().find(|line| line.strip_prefix("| ").is_some_and(|row| row.starts_with(name)));
        match row {
            Some(row) => println!("{row} {bar} | {litefs} |"),
            None => bail!("the measurement has no row {name:?}:\n{times}"),
        }
    }
    if faults == 0 {
        return Ok(());
    }
    let case = "whatever_goes_wrong_no_acknowledged_append_is_lost_and_all_hosts_have_one_list";
    // It fails if anything acknowledged was lost, or if writers of two terms overlapped.
    let mut judged = test("partitions", case, false);
    let output = judged.output().with_context(|| format!("cannot run {}", run::show(&judged)))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{} ended with {}:\n{said}", run::show(&judged), output.status);
    }
    let summary = said.lines().find(|line| line.starts_with(&format!("{faults} faults")));
    println!("\nacks = 1, three hosts: 0 acknowledged commits lost, 0 writers in an older term");
    println!("{}", summary.unwrap_or("(no summary)"));
    Ok(())
}
