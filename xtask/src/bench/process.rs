//! Processes of the benchmark: agents and drivers, which are gone when it ends, however it ends.

use super::door::Door;
use crate::run::{self, show};
use anyhow::{Context, Result, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::Pid;
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long anything may take that should take no time.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Set by Ctrl-C and SIGTERM.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C and SIGTERM end the benchmark in order, so that everything is taken down again.
pub fn handle_interrupts() -> Result<()> {
    extern "C" fn note(_: i32) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.context("cannot handle signals")?;
    }
    Ok(())
}

/// Fails once the benchmark was interrupted.
pub fn check_interrupted() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// Waits until `is_true` gives a value.
pub fn wait_for<T>(what: &str, mut is_true: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        check_interrupted()?;
        if let Some(value) = is_true()? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(POLL);
    }
}

/// Starts a process that does not get this terminal's Ctrl-C, and is told to end should this one be killed.
fn spawn(command: &mut Command) -> Result<Child> {
    command.process_group(0);
    // SAFETY: prctl(2) is async-signal-safe, and nothing is allocated.
    unsafe { command.pre_exec(|| set_pdeathsig(Signal::SIGTERM).map_err(Into::into)) };
    command.spawn().with_context(|| format!("cannot run {}", show(command)))
}

/// A running agent with all its files in one directory.
pub struct Agent {
    name: &'static str,
    litefs: PathBuf,
    dir: PathBuf,
    url: String,
    child: Child,
}

impl Agent {
    /// Starts an agent; with an `upstream`, a replica of it.
    pub fn start(
        litefs: &Path,
        door: Door,
        parent: &Path,
        name: &'static str,
        upstream: Option<&Agent>,
    ) -> Result<Agent> {
        let dir = parent.join(name);
        fs::create_dir_all(&dir)?;
        // Free now; that somebody takes it before the agent does would be reported by the agent.
        let listen = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let url = format!("http://{listen}");
        let mut settings = vec![
            format!("node.name={name}"),
            format!("data.dir={}", dir.join("data").display()),
            format!("mount.dir={}", dir.join("mount").display()),
            format!("socket.path={}", dir.join("control.sock").display()),
            format!("http.listen={listen}"),
            format!("http.advertise-url={url}"),
        ];
        if let Some(upstream) = upstream {
            settings.extend(["lease.role=replica".to_owned(), format!("lease.primary-url={}", upstream.url)]);
        }
        settings.extend(door.settings());
        let mut command = Command::new(litefs);
        command.arg("agent");
        for setting in &settings {
            command.args(["--set", setting]);
        }
        let log = File::create(dir.join("agent.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = spawn(&mut command)?;
        Ok(Agent { name, litefs: litefs.to_path_buf(), dir, url, child })
    }

    /// The path of a database for applications.
    pub fn path(&self, database: &str) -> PathBuf {
        self.dir.join("mount").join(database)
    }

    /// A client command for this agent.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.litefs);
        command.arg("--socket").arg(self.dir.join("control.sock")).args(args);
        command
    }

    /// Waits until `litefs status` says that all is well; gives the status.
    pub fn wait_until_ready(&mut self) -> Result<Value> {
        wait_for(&format!("the {} gets ready", self.name), || {
            self.check_running()?;
            self.status()
        })
    }

    /// What `litefs status` says; `None` unless all is well.
    fn status(&self) -> Result<Option<Value>> {
        let status = self.command(&["status", "--json"]).output().context("cannot run litefs status")?;
        Ok(if status.status.success() { serde_json::from_slice(&status.stdout).ok() } else { None })
    }

    /// Fails with its log if the agent has ended.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the {} ended with {status}; its log says:\n{}", self.name, self.log());
        }
        Ok(())
    }

    /// The position of a database; `None` while there is no such database, or something is not well.
    pub fn position(&self, database: &str) -> Result<Option<String>> {
        let status = self.status()?;
        let databases = status.as_ref().and_then(|status| status["databases"].as_array());
        let mut found = databases.into_iter().flatten().filter(|found| found["name"] == database);
        Ok(found
            .next()
            .and_then(|found| Some(format!("{}/{}", found["txid"].as_str()?, found["checksum"].as_str()?))))
    }

    /// A line of `/proc/PID/status` in KiB.
    pub fn memory_kib(&self, line: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let found = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
        let number = found.and_then(|text| text.trim().split(' ').next()?.parse().ok());
        number.with_context(|| format!("no {line} in {path}"))
    }

    /// The end of the agent's log.
    pub fn log(&self) -> String {
        let log = fs::read(self.dir.join("agent.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM)?;
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                eprintln!("the {} did not stop; its log says:\n{}", self.name, self.log());
            }
            std::thread::sleep(POLL);
        }
        // Removing the directory of the benchmark would otherwise go into the mount of an agent that was killed.
        let mount = self.dir.join("mount");
        let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
        if mounts.lines().any(|line| line.split(' ').nth(1) == mount.to_str()) {
            run::run(Command::new("umount").arg("--lazy").arg(mount))?;
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("cannot stop the {}: {error:#}", self.name);
        }
    }
}

/// The preload library: `$LITEFS_SHIM`, or the one that was built for this run.
pub fn library() -> Result<PathBuf> {
    match std::env::var_os("LITEFS_SHIM") {
        Some(path) => Ok(path.into()),
        None => Ok(run::target_directory()?.join("shim/liblitefs.so")),
    }
}

/// A running application: `driver.py`.
pub struct Driver {
    child: Child,
    commands: ChildStdin,
    answers: mpsc::Receiver<std::io::Result<String>>,
}

impl Driver {
    /// Starts the program at `script` for plain files.
    pub fn start(script: &Path) -> Result<Driver> {
        Self::start_with(script, Vec::new())
    }

    /// Starts it to go through a door of the agents in directories below `hosts`.
    pub fn start_through(script: &Path, door: Door, hosts: &Path) -> Result<Driver> {
        Self::start_with(script, door.environment(hosts, &library()?))
    }

    fn start_with(script: &Path, environment: Vec<(OsString, OsString)>) -> Result<Driver> {
        let mut command = Command::new("python3");
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.envs(environment);
        let mut child = spawn(&mut command)?;
        let (commands, output) = (child.stdin.take(), child.stdout.take());
        let commands = commands.context("no input of the driver")?;
        let output = output.context("no output of the driver")?;
        let (send, answers) = mpsc::channel();
        // Ends with the driver.
        std::thread::spawn(move || BufReader::new(output).lines().try_for_each(|line| send.send(line)));
        Ok(Driver { child, commands, answers })
    }

    /// Gives a command.
    pub fn tell(&mut self, command: &Value) -> Result<()> {
        writeln!(self.commands, "{command}").context("the driver has ended")
    }

    /// Waits for an answer, at most `limit`.
    pub fn answer(&mut self, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        let line = loop {
            check_interrupted()?;
            match self.answers.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => break line.context("cannot read from the driver")?,
                Err(RecvTimeoutError::Disconnected) => bail!("the driver has ended"),
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                    bail!("the driver did not answer within {} s", limit.as_secs())
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        let answer: Value = serde_json::from_str(&line).with_context(|| format!("not an answer: {line}"))?;
        match answer.get("error") {
            Some(error) => bail!("the driver failed: {}", error.as_str().unwrap_or_default()),
            None => Ok(answer),
        }
    }

    /// Gives a command and waits for its answer.
    pub fn ask(&mut self, command: &Value) -> Result<Value> {
        self.tell(command)?;
        self.answer(PATIENCE).with_context(|| format!("at {command}"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
