//! Runs a program in a process group of its own, and ends all of it after the timeout.

use super::HookError;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

/// Between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// A process group; killed when it is dropped before its program has ended.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // It may just have ended.
            let _ = killpg(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

/// Runs a program to its end, at most for `timeout` and until `stop`. Its output goes where the agent's goes.
pub async fn run(
    command: &[String],
    variables: &[(&'static str, String)],
    timeout: Duration,
    stop: &CancellationToken,
) -> Result<(), HookError> {
    let (program, arguments) =
        command.split_first().expect("the configuration checks that there is a program");
    let mut child = Command::new(program)
        .args(arguments)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|source| HookError::Start { program: program.clone(), source })?;
    let mut group = Group(child.id().map(|id| Pid::from_raw(id as i32)));
    let ended = tokio::select! {
        status = child.wait() => Ok(status),
        () = tokio::time::sleep(timeout) => Err(HookError::Timeout(timeout)),
        () = stop.cancelled() => Err(HookError::Stopped),
    };
    let status = match ended {
        Ok(status) => status.map_err(|source| HookError::Start { program: program.clone(), source })?,
        Err(why) => {
            end(&mut child, &group).await;
            return Err(why);
        }
    };
    // What it left running on purpose goes on.
    group.0 = None;
    if status.success() { Ok(()) } else { Err(HookError::Status { program: program.clone(), status }) }
}

async fn end(child: &mut Child, group: &Group) {
    group.signal(Signal::SIGTERM);
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        group.signal(Signal::SIGKILL);
        let _ = child.wait().await;
    }
}
