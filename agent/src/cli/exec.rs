//! `litefs exec`: runs a program so that its commits are seen.

use super::Global;
use super::doctor::world::World;
use super::doctor::{Level, library, program};
use super::failure::{self, Failure};
use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// As env(1) and timeout(1): the program was not tried, ...
pub const NOT_TRIED: u8 = 125;
/// ... cannot be run, or not so that its commits are seen, ...
pub const CANNOT_RUN: u8 = 126;
/// ... or is not there.
pub const NOT_FOUND: u8 = 127;

/// What the loader loads before everything else (ld.so(8)).
const LD_PRELOAD: &str = "LD_PRELOAD";

/// Where the shim looks for agents by itself, and the variable that names other places.
const RUNTIME_DIR: &str = "/run/litefs";
const RUNTIME_DIRS: &str = "LITEFS_RUNTIME_DIR";

/// Becomes the program. Returns only when that fails.
pub async fn run(global: &Global, command: &[OsString]) -> Result<u8, Failure> {
    let mut command = prepare(global, command).await?;
    let error = command.exec();
    Err(cannot_run(&command, &error))
}

/// The program could not be started.
pub fn cannot_run(command: &Command, error: &std::io::Error) -> Failure {
    Failure::file(CANNOT_RUN, Path::new(command.get_program()), format_args!("cannot run it: {error}"))
}

/// The program, so that its commits are seen.
pub async fn prepare(global: &Global, command: &[OsString]) -> Result<Command, Failure> {
    let Some((name, args)) = command.split_first() else {
        return Err(Failure::new(failure::USAGE, "no program was named"));
    };
    let name = Path::new(name);
    if program::find(name).is_none() {
        return Err(Failure::file(NOT_FOUND, name, "no such program"));
    }
    let mut command = Command::new(name);
    command.args(args);
    let not_tried =
        |why: &dyn Display| Failure::new(NOT_TRIED, format_args!("not running {}: {why}", name.display()));
    let world = World::look(global).await;
    if let Err(why) = &world.agent {
        return Err(not_tried(why));
    }
    if world.uses_preload() {
        let shim = library::find().map_err(|why| not_tried(&why))?;
        refuse_invisible(name)?;
        let before = |name| std::env::var_os(name).unwrap_or_default();
        command.env(LD_PRELOAD, first(shim.as_os_str(), &before(LD_PRELOAD)));
        if !world.runtime_dir.starts_with(RUNTIME_DIR) {
            command.env(RUNTIME_DIRS, first(world.runtime_dir.as_os_str(), &before(RUNTIME_DIRS)));
        }
    }
    Ok(command)
}

/// Fails for a program whose commits would not be seen; says on stderr what else there is to know about it.
fn refuse_invisible(name: &Path) -> Result<(), Failure> {
    let findings = program::check(name, program::RunBy::Me)
        .map_err(|failure| Failure { code: CANNOT_RUN, ..failure })?;
    for finding in &findings.list {
        let (name, found) = (name.display(), &finding.found);
        let advice = finding.advice.as_deref().unwrap_or_default();
        match finding.level {
            Level::Ok => {}
            // Most interpreters load libraries, most hosts have an old SQLite: no reason for a line at each start.
            Level::Warn if matches!(finding.check, "plug-ins" | "wal-reset") => {}
            Level::Warn => eprintln!("litefs: {name}: {found}; {advice}"),
            Level::Fail => {
                let message =
                    format!("not running {name}, its commits would not be seen: {found}\n  help: {advice}");
                return Err(Failure::new(CANNOT_RUN, message));
            }
        }
    }
    Ok(())
}

/// Puts an entry at the head of a list. The shim has to see a call as the program made it; the others stay.
fn first(entry: &OsStr, before: &OsStr) -> OsString {
    let mut list = entry.to_owned();
    let before = before.to_string_lossy().into_owned();
    for other in before.split([':', ' ']).filter(|other| !other.is_empty() && OsStr::new(other) != entry) {
        list.push(":");
        list.push(other);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_comes_first_and_once() {
        let first = |before: &str| first(OsStr::new("/l/liblitefs.so"), OsStr::new(before));
        assert_eq!(first(""), "/l/liblitefs.so");
        assert_eq!(first("/a.so:/l/liblitefs.so /b.so"), "/l/liblitefs.so:/a.so:/b.so");
    }
}
