//! A primary and a replica as processes of this machine, without any configuration file.

use super::{CREATE, INSERT, Interrupt, SELECT, heading};
use crate::run::{self, cargo, show};
use crate::setup;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::{self, File};
use std::io::IsTerminal;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long an agent may take to start, and a transaction to arrive. A working one needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Shows the main job.
pub fn run() -> Result<()> {
    setup::can_mount()?;
    heading("build");
    run::run(&mut cargo(&["build", "--release", "--package", "litefs-agent"]))?;
    let litefs = binary()?;

    // From here on Ctrl-C ends the demo in order, so that everything is taken down again.
    let stop = Interrupt::new()?;
    let dir = tempfile::Builder::new().prefix("litefs-demo-").tempdir()?;
    let (port_a, port_b) = free_ports()?;

    heading("start a primary and a replica");
    let mut primary = Agent::start(&litefs, dir.path(), "primary", port_a, &[])?;
    primary.wait_until_ready(&stop)?;
    let url = format!("lease.primary-url=http://127.0.0.1:{port_a}");
    let mut replica = Agent::start(&litefs, dir.path(), "replica", port_b, &["lease.role=replica", &url])?;
    replica.wait_until_ready(&stop)?;

    heading("write on the primary with sqlite3");
    sqlite3(&primary.database(), CREATE)?;
    sqlite3(&primary.database(), INSERT)?;
    let position = primary.position()?.context("the primary does not show demo.db in its status")?;

    heading("read on the replica");
    let what = format!("demo.db did not reach {position} on the replica");
    replica.wait(&stop, &what, |replica| Ok(replica.position()?.as_deref() == Some(position.as_str())))?;
    let rows = sqlite3(&replica.database(), SELECT)?;
    if rows != sqlite3_quietly(&primary.database(), SELECT)? {
        bail!("the replica shows other rows than the primary: {rows:?}");
    }

    heading("equal positions");
    for agent in [&primary, &replica] {
        let mut status = agent.command(&["status"]);
        println!("$ {}", show(&status));
        println!("{}", run::output(&mut status)?);
    }

    heading("a replica refuses writes");
    let mut write = sqlite3_command(&replica.database(), "DELETE FROM greeting;");
    println!("$ {}", show(&write));
    let refused = write.output().context("cannot run sqlite3")?;
    print!("{}", String::from_utf8_lossy(&refused.stderr));
    if refused.status.success() {
        bail!("the replica took a write");
    }

    println!("\nboth hosts have demo.db at {position}");
    if std::io::stdin().is_terminal() {
        try_next(&primary, &replica);
        stop.wait_for_enter()?;
    } else {
        println!("run this on a terminal to try more; README.md says how to set up two hosts");
    }
    replica.stop()?;
    primary.stop()?;
    dir.close().context("cannot remove the directory of the demo")
}

fn try_next(primary: &Agent, replica: &Agent) {
    heading("try next, in another terminal");
    println!("sqlite3 {}", primary.database().display());
    println!("sqlite3 {} '{SELECT}'", replica.database().display());
    println!("{}", show(&replica.command(&["status"])));
    println!("{}", show(&primary.command(&["export", "demo.db", "/tmp/copy.db"])));
    println!("curl {}/metrics", primary.url);
    println!("curl -N {}/events", replica.url);
    println!("README.md says how to set up two hosts\n\npress Enter to end the demo and remove its files");
}

/// The program that was built just now.
fn binary() -> Result<PathBuf> {
    let metadata = run::output(&mut cargo(&["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cannot read cargo metadata")?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(Path::new(target).join("release/litefs"))
}

/// Two ports that nobody uses: both are held until both are known.
fn free_ports() -> Result<(u16, u16)> {
    let (a, b) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok((a.local_addr()?.port(), b.local_addr()?.port()))
}

fn sqlite3_command(database: &Path, sql: &str) -> Command {
    let mut command = Command::new("sqlite3");
    command.arg(database).arg(sql);
    command
}

fn sqlite3_quietly(database: &Path, sql: &str) -> Result<String> {
    run::output(&mut sqlite3_command(database, sql))
}

/// Runs SQL in the shell of SQLite, and shows both.
fn sqlite3(database: &Path, sql: &str) -> Result<String> {
    println!("$ {}", show(&sqlite3_command(database, sql)));
    let rows = sqlite3_quietly(database, sql)?;
    print!("{rows}");
    Ok(rows)
}

/// A running agent with all its files in one directory.
struct Agent {
    name: &'static str,
    litefs: PathBuf,
    dir: PathBuf,
    url: String,
    child: Child,
    stopped: bool,
}

impl Agent {
    fn start(litefs: &Path, demo: &Path, name: &'static str, port: u16, settings: &[&str]) -> Result<Agent> {
        let dir = demo.join(name);
        fs::create_dir_all(&dir)?;
        let mut command = Command::new(litefs);
        command.arg("agent");
        let own = [
            format!("node.name={name}"),
            format!("data.dir={}", dir.join("data").display()),
            format!("mount.dir={}", dir.join("mount").display()),
            format!("socket.path={}", dir.join("control.sock").display()),
            format!("http.listen=127.0.0.1:{port}"),
            format!("http.advertise-url=http://127.0.0.1:{port}"),
        ];
        for setting in own.iter().map(String::as_str).chain(settings.iter().copied()) {
            command.args(["--set", setting]);
        }
        println!("$ {} &", show(&command));
        let log = File::create(dir.join("agent.log"))?;
        // A process group of its own: Ctrl-C ends the demo, and the demo ends the agent.
        command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot run {}", show(&command)))?;
        let url = format!("http://127.0.0.1:{port}");
        Ok(Agent { name, litefs: litefs.to_path_buf(), dir, url, child, stopped: false })
    }

    fn mount(&self) -> PathBuf {
        self.dir.join("mount")
    }

    fn database(&self) -> PathBuf {
        self.mount().join("demo.db")
    }

    /// A client command for this agent.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.litefs);
        command.arg("--socket").arg(self.dir.join("control.sock")).args(args);
        command
    }

    /// Waits until `litefs status` says that all is well.
    fn wait_until_ready(&mut self, stop: &Interrupt) -> Result<()> {
        let what = format!("the {} did not get ready", self.name);
        self.wait(stop, &what, |agent| {
            Ok(agent.command(&["status"]).output().context("cannot run litefs status")?.status.success())
        })?;
        println!("the {} is ready", self.name);
        Ok(())
    }

    /// Waits until something is true of the agent.
    fn wait(
        &mut self,
        stop: &Interrupt,
        what: &str,
        mut is_true: impl FnMut(&Agent) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.stopped = true;
                self.unmount()?;
                bail!("the {} ended with {status}; its log says:\n{}", self.name, self.log());
            }
            if is_true(self)? {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "{what} within {} s; the log of the {} says:\n{}",
                    PATIENCE.as_secs(),
                    self.name,
                    self.log()
                );
            }
            stop.pause(Duration::from_millis(20))?;
        }
    }

    /// The end of the agent's log.
    fn log(&self) -> String {
        let log = fs::read(self.dir.join("agent.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Position of the demo's database by the agent's status.
    fn position(&self) -> Result<Option<String>> {
        let output = self.command(&["status", "--json"]).output().context("cannot run litefs status")?;
        let status: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("no status: {}", String::from_utf8_lossy(&output.stderr)))?;
        let databases = status["databases"].as_array().into_iter().flatten();
        let mut found = databases.filter(|database| database["name"] == "demo.db");
        Ok(found.next().and_then(|database| {
            Some(format!("{}/{}", database["txid"].as_str()?, database["checksum"].as_str()?))
        }))
    }

    /// Takes down the mount of an agent that is gone, and says whether there was one. Removing the directory of the
    /// demo would otherwise go into it.
    fn unmount(&self) -> Result<bool> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
        let mount = self.mount();
        let mounted = mounts.lines().any(|line| line.split(' ').nth(1) == mount.to_str());
        if mounted {
            run::run(Command::new("umount").arg("--lazy").arg(mount))?;
        }
        Ok(mounted)
    }

    /// Stops the agent and says so if it does not go cleanly.
    fn stop(&mut self) -> Result<()> {
        self.stopped = true;
        let pid = Pid::from_raw(self.child.id().try_into()?);
        if self.child.try_wait()?.is_none() {
            kill(pid, Signal::SIGTERM)?;
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break Some(status),
                None if Instant::now() > deadline => break None,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        if status.is_none() {
            self.child.kill()?;
            self.child.wait()?;
        }
        let left_mounted = self.unmount()?;
        match status {
            Some(status) if status.success() && !left_mounted => Ok(()),
            Some(status) => {
                bail!("the {} did not stop cleanly ({status}); its log says:\n{}", self.name, self.log())
            }
            None => bail!("the {} did not stop within 10 s; its log says:\n{}", self.name, self.log()),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !self.stopped
            && let Err(error) = self.stop()
        {
            eprintln!("{error:#}");
        }
    }
}
