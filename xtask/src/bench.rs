//! `cargo xtask bench`.

use anyhow::{Result, bail};

/// What to measure.
#[derive(clap::Args)]
pub struct Options {}

/// Runs the benchmark.
pub fn run(_options: Options) -> Result<()> {
    bail!("the benchmark is not part of this checkout yet")
}
