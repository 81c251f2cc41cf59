//! Runs other programs and says what they were when they fail.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Names the program that cargo gives what it compiles of the workspace.
pub const WRAPPER: &str = "RUSTC_WORKSPACE_WRAPPER";

static LINTER: OnceLock<PathBuf> = OnceLock::new();

/// From here on `cargo` compiles the workspace with clippy's compiler, which makes the same programs and says more: tests and
/// `cargo clippy` would each have all dependencies compiled. A warning is an error.
pub fn lint_builds() -> Result<()> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(root()))?;
    LINTER.get_or_init(|| Path::new(sysroot.trim_end()).join("bin/clippy-driver"));
    Ok(())
}

/// `cargo` with these arguments, in the repository.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    build_alike(&mut command);
    command
}

/// Sees to it that cargo, which this is or which this runs, finds built what others have built for this program.
pub fn build_alike(command: &mut Command) {
    // What cargo says about this program: build scripts of dependencies would take it for a change, and be run again.
    for (name, _) in std::env::vars_os() {
        let about_us = ["CARGO_PKG_", "CARGO_MANIFEST_"]
            .iter()
            .any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()));
        if about_us {
            command.env_remove(name);
        }
    }
    if let Some(linter) = LINTER.get() {
        command.env(WRAPPER, linter).env("CLIPPY_ARGS", "-Dwarnings");
    }
}

/// The path of a program or library of the workspace, built as the tests build it: for a part of the workspace, or without
/// what only tests need, cargo chooses other features of dependencies, and builds them and the agent once more.
pub fn as_in_tests(file: &str) -> Result<PathBuf> {
    run(&mut cargo(&["build", "--quiet", "--workspace", "--lib", "--bins", "--test", "harness"]))?;
    Ok(target_directory()?.join("debug").join(file))
}

/// Where cargo puts what it builds.
pub fn target_directory() -> Result<PathBuf> {
    let metadata = output(&mut cargo(&["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cannot read cargo metadata")?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(target))
}

/// The command as one would type it.
pub fn show(command: &Command) -> String {
    let mut words = vec![command.get_program()];
    words.extend(command.get_args());
    let words: Vec<String> = words
        .into_iter()
        .map(|word| {
            let word = word.to_string_lossy();
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
            if !word.is_empty() && word.chars().all(plain) {
                word.into_owned()
            } else {
                format!("'{}'", word.replace('\'', "'\\''"))
            }
        })
        .collect();
    words.join(" ")
}

/// Runs a command with this terminal and fails if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", show(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", show(command));
    }
    Ok(())
}

/// Runs a command and returns what it printed; fails with all that it said if it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let output: Output = command.output().with_context(|| format!("cannot run {}", show(command)))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}:\n{stdout}{stderr}", show(command), output.status);
    }
    Ok(stdout.into_owned())
}

/// Where a program is, if it is on the path.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Gives `input` to a command and returns what it writes.
pub fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let mut stdin = tempfile::tempfile()?;
    stdin.write_all(input)?;
    stdin.rewind()?;
    let output = command.stdin(stdin).output().with_context(|| format!("cannot run {}", show(command)))?;
    if !output.status.success() {
        bail!("{} ended with {}: {}", show(command), output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}
