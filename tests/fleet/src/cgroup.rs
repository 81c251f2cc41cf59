//! Control groups of hosts: one each, below the root of the unified hierarchy.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Where cgroup2 is mounted: alone, or beside the older hierarchies.
fn mounted() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let dir = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(dir))
    });
    found.context("no cgroup2 hierarchy is mounted here")
}

/// Makes a control group and returns its directory.
pub fn create(name: &str) -> Result<PathBuf> {
    let dir = mounted()?.join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Removes a control group with all below it. Processes that were killed just now may still be leaving.
pub fn remove(dir: &Path) {
    crate::wait::until(std::time::Duration::from_secs(10), || remove_tree(dir).ok());
}

/// Removes the control groups whose name begins like this.
pub fn remove_all(prefix: &str) -> Result<()> {
    for entry in fs::read_dir(mounted()?)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            remove(&entry.path());
        }
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}
