//! `cargo xtask package`: .deb and .rpm of the agent and of the preload library, below `target/packages`.

mod deb;
mod manifest;
mod repository;
mod rpm;
mod stage;

pub use repository::{Options as RepositoryOptions, run as repository};

use crate::run::{self, cargo};
use anyhow::{Context, Result};
use manifest::{Binary, PACKAGES};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kind of package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Debian's.
    Deb,
    /// RPM.
    Rpm,
}

/// Options of `cargo xtask package`.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Package what `cargo build` makes, for tests: it is built in seconds
    #[arg(long)]
    pub dev: bool,
    /// Revision of the packages of this version
    #[arg(long, default_value_t = 1)]
    pub revision: u32,
    /// Directory to write to [default: target/packages]
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// Only .deb
    #[arg(long)]
    pub deb_only: bool,
}

/// What all packages of a run have in common.
struct Build {
    version: String,
    revision: u32,
    /// Seconds since 1970 that all files get: that of the last commit, or `$SOURCE_DATE_EPOCH`.
    epoch: String,
    /// Quick compression.
    dev: bool,
    /// Where the packages go.
    output: PathBuf,
}

/// Builds all packages.
pub fn run(options: &Options) -> Result<Vec<PathBuf>> {
    let (target, version) = metadata()?;
    let output = options.output.clone().unwrap_or_else(|| target.join("packages"));
    let build = Build {
        version,
        revision: options.revision,
        epoch: epoch()?,
        dev: options.dev,
        output: output.clone(),
    };
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let mut made = Vec::new();
    for package in PACKAGES {
        let compiled = package.binaries.iter().map(|binary| compile(binary, &target, options.dev));
        let compiled = compiled.collect::<Result<Vec<_>>>()?;
        made.push(deb::build(package, &compiled, &build)?);
        if !options.deb_only {
            made.push(rpm::build(package, &compiled, &build)?);
        }
    }
    for package in &made {
        println!("{}", package.display());
    }
    Ok(made)
}

/// Has cargo build what is packaged, and returns its path. No path of this machine gets into what is given away.
fn compile(binary: &Binary, target: &Path, dev: bool) -> Result<PathBuf> {
    if dev {
        return run::as_in_tests(binary.file);
    }
    let mut command = cargo(&["build", "--quiet", "--package", binary.cargo_package]);
    let target = target.join("package-build");
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cargo"))?;
    let flags = format!(
        "--remap-path-prefix={}=/usr/src/litefs\u{1f}--remap-path-prefix={home}=/usr/src/cargo",
        run::root().display()
    );
    command.args(["--locked", "--profile", binary.profile]).arg("--target-dir").arg(&target);
    run::run(command.env("CARGO_ENCODED_RUSTFLAGS", flags))?;
    Ok(target.join(binary.profile).join(binary.file))
}

fn metadata() -> Result<(PathBuf, String)> {
    let metadata = run::output(&mut cargo(&["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cannot read cargo metadata")?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let agent = packages.iter().find(|package| package["name"] == "litefs-agent");
    let version = agent.and_then(|agent| agent["version"].as_str()).context("the agent has no version")?;
    Ok((PathBuf::from(target), version.to_owned()))
}

fn epoch() -> Result<String> {
    if let Ok(epoch) = std::env::var("SOURCE_DATE_EPOCH") {
        return Ok(epoch);
    }
    let last = run::output(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(run::root()))?;
    Ok(last.trim().to_owned())
}
