//! Processes that do not outlive the test, and commands that have to succeed.

use anyhow::{Context, Result, anyhow, bail};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

type Order = (Command, Sender<std::io::Result<Child>>);

/// Starts a command that gets SIGKILL when this process ends, however it ends.
///
/// The kernel sends the signal when the *thread* that started the command ends, so one that never does starts them all.
pub fn spawn_bound(program: &str, args: &[&str], prepare: impl FnOnce(&mut Command)) -> Result<Child> {
    static STARTER: OnceLock<Sender<Order>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, queue) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                let _ = answer.send(command.spawn());
            }
        });
        orders
    });
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]).args(args);
    prepare(&mut command);
    let (answer, answered) = channel();
    starter.send((command, answer)).map_err(|_| anyhow!("the thread that starts processes is gone"))?;
    answered.recv()?.with_context(|| format!("cannot run {program}"))
}

/// Runs a command and returns what it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} ended with {}:\n{stdout}{stderr}", output.status);
    }
    Ok(stdout)
}
