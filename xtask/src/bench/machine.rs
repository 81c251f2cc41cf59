//! What a measurement was taken on.

use crate::run;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Facts to print above the figures. `dir` is where all files of the run are.
pub fn facts(dir: &Path, versions: &Value, litefs: &Path) -> Result<Vec<(&'static str, String)>> {
    let text = |name: &str| versions[name].as_str().unwrap_or("unknown").to_owned();
    Ok(vec![
        ("kernel", run::output(Command::new("uname").args(["-srm"]))?.trim().to_owned()),
        ("processors", processors()?),
        ("memory", memory()?),
        ("file system", file_system(dir)?),
        ("SQLite", format!("{} in Python {}", text("sqlite"), text("python"))),
        ("program", program(litefs)?),
        ("load before", load()?),
    ])
}

/// Runnable processes in the last minute, other people's included.
pub fn load() -> Result<String> {
    let load = fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    Ok(load.split(' ').next().unwrap_or_default().to_owned())
}

/// The share of all processors' time that is used by anybody while this waits.
pub fn busy(time: Duration) -> Result<f64> {
    let sample = || -> Result<(f64, f64)> {
        let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let ticks: Vec<f64> =
            stat.lines().next().unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
        // proc(5): user, nice, system, idle, iowait, ...
        let idle = ticks.iter().skip(3).take(2).sum();
        Ok((ticks.iter().sum(), idle))
    };
    let (total, idle) = sample()?;
    std::thread::sleep(time);
    let (total, idle) = {
        let now = sample()?;
        (now.0 - total, now.1 - idle)
    };
    Ok(if total > 0.0 { 1.0 - idle / total } else { 0.0 })
}

fn processors() -> Result<String> {
    let cores = std::thread::available_parallelism().context("cannot count the processors")?;
    let info = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Ok(format!("{cores} x {}", model.map_or("unknown", |(_, name)| name)))
}

fn memory() -> Result<String> {
    let info = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next());
    let kib: u64 = total.and_then(|kib| kib.parse().ok()).context("no MemTotal in /proc/meminfo")?;
    Ok(format!("{} GiB", (kib + (1 << 19)) >> 20))
}

fn file_system(dir: &Path) -> Result<String> {
    let mut df = Command::new("df");
    let table = run::output(df.args(["--output=fstype,source"]).arg(dir))?;
    let words: Vec<&str> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    Ok(words.join(" on "))
}

fn program(litefs: &Path) -> Result<String> {
    let version = run::output(Command::new(litefs).arg("--version"))?.trim().to_owned();
    let mut git = Command::new("git");
    // A checkout without git is measured all the same.
    let commit = git.args(["describe", "--always", "--dirty"]).current_dir(run::root()).output();
    Ok(match commit {
        Ok(output) if output.status.success() => {
            format!("{version}, {}", String::from_utf8_lossy(&output.stdout).trim())
        }
        _ => version,
    })
}
