//! `litefs run`: runs a program once this host may write.

use super::Global;
use super::client::{self, Client};
use super::exec;
use super::failure::{self, Failure};
use super::role;
use super::wait::{self, Conditions};
use crate::DatabaseName;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// When to run a program.
#[derive(clap::Args, Debug)]
pub struct Run {
    /// Make this host the primary first
    #[arg(long, conflicts_with_all = ["on_primary", "with_halt_lock_on"])]
    promote: bool,
    /// Wait until this host is the primary
    #[arg(long, conflicts_with = "with_halt_lock_on")]
    on_primary: bool,
    /// Get the halt lock of a database first (its path, or its name in `litefs list`): writers on the primary wait, the
    /// program may write it here, and each of its commits is on the primary before it returns. Programs that get it
    /// themselves open the file DATABASE-lock for writing
    #[arg(long, value_name = "DATABASE")]
    with_halt_lock_on: Option<PathBuf>,
    /// Longest time to wait before the program is run, such as 30s [default: for ever]
    #[arg(long, value_parser = wait::duration)]
    timeout: Option<Duration>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

/// Runs the program; returns its exit code, or does not return because this process became the program.
pub async fn run(global: &Global, run: Run) -> Result<u8, Failure> {
    let mut command = exec::prepare(global, &run.command).await?;
    let client = global.client();
    if let Some(database) = &run.with_halt_lock_on {
        return with_halt_lock(&client, database, run.timeout, command).await;
    }
    if run.promote {
        role::change(global.client(), "/v1/promote", &[]).await?;
    }
    if run.promote || run.on_primary {
        wait::wait(&client, &Conditions::primary(run.timeout)).await?;
    }
    let error = command.exec();
    Err(exec::cannot_run(&command, &error))
}

/// The name of a database that is given as such, or as a path below the mount.
fn name_of(database: &Path, mount: &Path) -> Result<DatabaseName, Failure> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let absolute = std::path::absolute(database).unwrap_or_else(|_| database.to_owned());
    let canonical = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let (absolute, mount) = (canonical(&absolute), canonical(mount));
    let name = match absolute.strip_prefix(&mount) {
        Ok(below) => text(below),
        Err(_) => text(database),
    };
    DatabaseName::new(&name).map_err(|error| Failure::file(failure::USAGE, database, error))
}

async fn with_halt_lock(
    client: &Client,
    database: &Path,
    timeout: Option<Duration>,
    command: Command,
) -> Result<u8, Failure> {
    let name = name_of(database, &client.status().await?.mount.dir)?;
    let asking = async {
        let request = client::request("POST", client::uri_of("/v1/halt", &name), client::empty())?;
        client.send(request).await
    };
    let response = match tokio::time::timeout(timeout.unwrap_or(Duration::MAX), asking).await {
        Ok(response) => response?,
        Err(_) => {
            let limit = crate::config::show_duration(timeout.unwrap_or_default());
            let message = format!(
                "no halt lock on {name} within {limit}: somebody else has it, or the primary is away"
            );
            return Err(Failure::new(failure::TRY_AGAIN, message));
        }
    };
    let mut lock = response.into_body();
    let mut child = Program::start(command)?;
    let mut lost = None;
    let status = loop {
        tokio::select! {
            ended = child.ended() => break ended?,
            why = until_lost(&mut lock), if lost.is_none() => {
                eprintln!("litefs: the halt lock on {name} is lost: {why}; nothing more can be written here");
                lost = Some(why);
            }
        }
    };
    // The lock ends with the answer to the request.
    drop(lock);
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(u8::MAX),
        // As shells say it.
        (None, signal) => 128 + signal.and_then(|signal| u8::try_from(signal).ok()).unwrap_or_default(),
    };
    // A program that noticed nothing may have been done before: its commits are on the primary then.
    Ok(code)
}

/// Ends when the lock does; says why.
async fn until_lost(lock: &mut Incoming) -> String {
    let mut line = Vec::new();
    while let Some(Ok(frame)) = lock.frame().await {
        line.extend(frame.into_data().unwrap_or_default().iter().filter(|byte| **byte != b'\n'));
        if line.len() > 4096 {
            break;
        }
    }
    match String::from_utf8_lossy(&line).trim() {
        "" => "the agent has ended".to_owned(),
        why => super::printable(why),
    }
}

/// The program while it runs. What this process is told to do, it is told.
struct Program {
    child: tokio::process::Child,
    signals: Vec<(Signal, tokio::signal::unix::Signal)>,
}

impl Program {
    fn start(command: Command) -> Result<Program, Failure> {
        let failed =
            |error: std::io::Error| Failure::new(failure::SOFTWARE, format_args!("no signals: {error}"));
        let mut signals = Vec::new();
        for (number, kind) in [
            (Signal::SIGTERM, SignalKind::terminate()),
            (Signal::SIGINT, SignalKind::interrupt()),
            (Signal::SIGHUP, SignalKind::hangup()),
        ] {
            signals.push((number, signal(kind).map_err(failed)?));
        }
        let mut command = tokio::process::Command::from(command);
        let child = command.spawn().map_err(|error| exec::cannot_run(command.as_std(), &error))?;
        Ok(Program { child, signals })
    }

    /// May be given up and asked again.
    async fn ended(&mut self) -> Result<ExitStatus, Failure> {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
        let [terminate, interrupt, hangup] = &mut self.signals[..] else {
            return Err(Failure::new(failure::SOFTWARE, "no signals"));
        };
        loop {
            let told = tokio::select! {
                status = self.child.wait() => {
                    return status.map_err(|error| Failure::new(failure::SOFTWARE, format_args!("cannot wait: {error}")));
                }
                _ = terminate.1.recv() => terminate.0,
                // A terminal tells both.
                _ = interrupt.1.recv() => continue,
                _ = hangup.1.recv() => hangup.0,
            };
            if let Some(pid) = pid {
                // It may have ended just now.
                let _ = kill(pid, told);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_named_by_its_path_or_its_name() {
        let mount = Path::new("/srv/litefs/db");
        let name = |text: &str| name_of(Path::new(text), mount).map(|name| name.to_string());
        assert_eq!(name("/srv/litefs/db/shop/a.db").unwrap(), "shop/a.db");
        assert_eq!(name("shop/a.db").unwrap(), "shop/a.db");
        assert_eq!(name("/elsewhere/a.db").unwrap_err().code, failure::USAGE);
        assert_eq!(name("../a.db").unwrap_err().code, failure::USAGE);
    }
}
