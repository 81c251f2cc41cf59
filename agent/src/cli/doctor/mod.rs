//! `litefs doctor`: whether programs, processes and this host fit, and what to do where they do not.

mod elf;
mod finding;
mod host;
mod libraries;
pub mod library;
mod process;
pub mod program;
#[cfg(test)]
mod tests;
pub mod world;

use super::Global;
use super::failure::Failure;
pub use finding::Level;
use std::io::Write;
use std::path::Path;
use world::World;

/// All is well.
const OK: u8 = 0;
/// Something works, but needs a look, or cannot be told.
const WARN: u8 = 1;
/// Something does not work.
const FAIL: u8 = 2;

/// Looks at a program or process, or at the host when none is named.
pub async fn run(
    global: &Global,
    target: Option<&Path>,
    json: bool,
    out: &mut dyn Write,
) -> Result<u8, Failure> {
    let findings = match target {
        None => host::check(&World::look(global).await),
        Some(target) => match pid(target) {
            Some(pid) => process::check(pid, &World::look(global).await)?,
            None => program::check(target, program::RunBy::Anyone)?,
        },
    }
    .list;
    if json {
        finding::print_json(&findings, out)?;
    } else {
        finding::print_table(&findings, out)?;
    }
    Ok(match finding::worst(&findings) {
        Level::Ok => OK,
        Level::Warn => WARN,
        Level::Fail => FAIL,
    })
}

/// A number is a process; a program with such a name is given with its directory.
fn pid(target: &Path) -> Option<i32> {
    target.to_str()?.parse().ok().filter(|pid| *pid > 0)
}
