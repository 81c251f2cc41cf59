//! Lays the files of a package out as they will be installed.

use super::manifest::{Package, place};
use super::{Build, Format};
use crate::run;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Lays out all files of a package below `root`, which is emptied before.
pub fn lay_out(package: &Package, compiled: &[PathBuf], format: Format, root: &Path) -> Result<()> {
    if root.exists() {
        fs::remove_dir_all(root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    make_dir(root)?;
    for (dir, mode) in package.dirs {
        make_dir(&root.join(dir))?;
        fs::set_permissions(root.join(dir), fs::Permissions::from_mode(*mode))?;
    }
    for (binary, compiled) in package.binaries.iter().zip(compiled) {
        let installed = root.join(place(binary.to, format));
        // Debian has libraries not executable, others do.
        let mode = if binary.file.ends_with(".so") && format == Format::Deb { 0o644 } else { 0o755 };
        let content = fs::read(compiled).with_context(|| format!("cannot read {}", compiled.display()))?;
        put(&content, &installed, mode)?;
        run::run(
            Command::new("strip").args(["--strip-unneeded", "--remove-section=.comment"]).arg(&installed),
        )?;
    }
    for entry in package.files {
        for from in sources(entry.from)? {
            let name = from.file_name().and_then(|name| name.to_str()).context("a file without a name")?;
            let section = name.rsplit('.').next().unwrap_or_default();
            let mut to = place(entry.to, format).replace("{section}", section);
            if to.ends_with('/') {
                to.push_str(name);
            }
            let content = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            if to.starts_with("usr/share/man/") {
                put(&gzip(&content)?, &root.join(to + ".gz"), 0o644)?;
            } else {
                put(&content, &root.join(to), 0o644)?;
            }
        }
    }
    Ok(())
}

fn sources(from: &str) -> Result<Vec<PathBuf>> {
    let Some(dir) = from.strip_suffix("/*") else { return Ok(vec![run::root().join(from)]) };
    let mut files = Vec::new();
    for file in fs::read_dir(run::root().join(dir)).with_context(|| format!("cannot read {dir}"))? {
        files.push(file?.path());
    }
    files.sort();
    Ok(files)
}

/// Writes a file, and the directories that it needs.
pub fn put(content: &[u8], to: &Path, mode: u32) -> Result<()> {
    make_dir(to.parent().context("a file without a directory")?)?;
    fs::write(to, content).with_context(|| format!("cannot write {}", to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// Makes a directory with the usual permissions, whatever the umask.
pub fn make_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        make_dir(parent)?;
    }
    fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// As small as gzip can, without a name and a time.
pub fn gzip(content: &[u8]) -> Result<Vec<u8>> {
    run::filter(Command::new("gzip").args(["--best", "--no-name"]), content)
}

/// Gives all files and directories below `root` the time of the build.
pub fn set_times(root: &Path, build: &Build) -> Result<()> {
    run::run(Command::new("find").arg(root).args(["-exec", "touch", "--no-dereference", "--date"]).args([
        &format!("@{}", build.epoch),
        "{}",
        "+",
    ]))
}

/// All files below `root`, relative to it, sorted.
pub fn files(root: &Path) -> Result<Vec<String>> {
    let list = run::output(Command::new("find").args([".", "-type", "f"]).current_dir(root))?;
    let mut files: Vec<String> =
        list.lines().filter_map(|line| line.strip_prefix("./")).map(str::to_owned).collect();
    files.sort();
    Ok(files)
}
