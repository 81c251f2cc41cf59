//! Manual pages and shell completions: written by the program itself, kept in `packaging/`.

use crate::run::{self, cargo};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Shells, and what distributions call their completion files.
const SHELLS: [(&str, &str); 3] = [("bash", "litefs"), ("zsh", "_litefs"), ("fish", "litefs.fish")];

fn man_dir() -> PathBuf {
    run::root().join("packaging/man")
}

fn completions_dir() -> PathBuf {
    run::root().join("packaging/completions")
}

/// Writes `packaging/man`.
pub fn write_man() -> Result<()> {
    replace(&man_dir(), man_pages()?)
}

/// Writes `packaging/completions`.
pub fn write_completions() -> Result<()> {
    replace(&completions_dir(), completions()?)
}

/// Writes `packaging/dbus/interfaces`; the agent's tests compare them with its objects.
pub fn write_interfaces() -> Result<()> {
    let mut test = cargo(&[
        "test",
        "--quiet",
        "--package",
        "litefs-agent",
        "--lib",
        "--",
        "status::dbus::introspection",
    ]);
    run::run(test.env("LITEFS_WRITE_GENERATED", "1"))
}

/// Fails if a generated file is not what the program would write now.
pub fn check() -> Result<()> {
    for (dir, expected, task) in
        [(man_dir(), man_pages()?, "man"), (completions_dir(), completions()?, "completions")]
    {
        let kept = if dir.exists() { read_dir(&dir)? } else { BTreeMap::new() };
        let mut stale: Vec<&String> = expected
            .iter()
            .filter(|(name, text)| kept.get(*name) != Some(text))
            .map(|(name, _)| name)
            .collect();
        stale.extend(kept.keys().filter(|name| !expected.contains_key(*name)));
        if !stale.is_empty() {
            bail!("{} is out of date ({stale:?}): run `cargo xtask {task}` and commit it", dir.display());
        }
    }
    Ok(())
}

fn man_pages() -> Result<BTreeMap<String, String>> {
    let dir = tempfile::tempdir()?;
    run::run(litefs(&["man", "--dir"])?.arg(dir.path()))?;
    read_dir(dir.path())
}

fn completions() -> Result<BTreeMap<String, String>> {
    SHELLS
        .iter()
        .map(|(shell, file)| Ok(((*file).to_owned(), run::output(&mut litefs(&["completions", shell])?)?)))
        .collect()
}

fn litefs(args: &[&str]) -> Result<std::process::Command> {
    let mut command = std::process::Command::new(run::as_in_tests("litefs")?);
    command.args(args);
    Ok(command)
}

fn read_dir(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        files.insert(name, text);
    }
    Ok(files)
}

/// Makes these files the only ones of a directory.
fn replace(dir: &Path, files: BTreeMap<String, String>) -> Result<()> {
    fs::create_dir_all(dir)?;
    for old in read_dir(dir)?.keys().filter(|name| !files.contains_key(*name)) {
        fs::remove_file(dir.join(old))?;
    }
    for (name, text) in &files {
        fs::write(dir.join(name), text)
            .with_context(|| format!("cannot write {name} in {}", dir.display()))?;
    }
    println!("wrote {} files to {}", files.len(), dir.display());
    Ok(())
}
