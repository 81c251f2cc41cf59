//! One host.

use crate::network::{Switch, address};
use crate::process::{output, spawn_bound};
use crate::{PATIENCE, cgroup, wait};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A command that takes longer hangs.
const COMMAND_SECONDS: &str = "120";

/// The exit code of timeout(1) when the time was over.
const TIMED_OUT: i32 = 124;

/// How long processes may take to go when they are killed.
const KILLED: Duration = Duration::from_secs(2);

/// A Debian host: on, or off after [`Host::power_off`].
#[derive(Debug)]
pub struct Host {
    name: String,
    port: usize,
    base: PathBuf,
    dir: PathBuf,
    cgroup: String,
    switch: Arc<Switch>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    /// `unshare`; its only child is the host's PID 1.
    outer: Child,
    /// PID 1 of the host, seen from outside.
    init: u32,
    cgroup: PathBuf,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Its exit code; `None` if a signal ended it. 124 if it took too long.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Outcome {
    /// Whether it ended with 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

impl Host {
    pub(crate) fn create(
        name: &str,
        port: usize,
        fleet: &[String],
        base: &Path,
        dir: PathBuf,
        cgroup: String,
        switch: Arc<Switch>,
    ) -> Result<Host> {
        for part in ["upper/etc", "work", "root", "srv"] {
            fs::create_dir_all(dir.join(part)).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        output(Command::new("cp").arg("--archive").arg(base.join("var")).arg(dir.join("var")))?;
        let hosts: String =
            fleet.iter().enumerate().map(|(port, name)| format!("{} {name}\n", address(port))).collect();
        fs::write(dir.join("upper/etc/hosts"), format!("127.0.0.1 localhost\n{hosts}"))?;
        fs::write(dir.join("upper/etc/hostname"), format!("{name}\n"))?;
        fs::write(dir.join("upper/etc/machine-id"), uuid()?.replace('-', ""))?;
        Ok(Host {
            name: name.to_owned(),
            port,
            base: base.into(),
            dir,
            cgroup,
            switch,
            running: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name, which all hosts of the fleet resolve.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        address(self.port)
    }

    /// Begins to boot.
    pub(crate) fn start(&self) -> Result<()> {
        let mut state = self.state();
        if state.is_some() {
            bail!("{} is on", self.name);
        }
        fs::write(self.dir.join("boot_id"), uuid()?)?;
        let cgroup = cgroup::create(&self.cgroup)?;
        let log = fs::File::create(self.dir.join("console.log"))?;
        // In its control group before the namespace of control groups is made.
        let script = "echo $$ > \"$1/cgroup.procs\"; shift; exec unshare --cgroup --pid --mount --uts --ipc --net --fork \
                      --kill-child bash -c \"$@\"";
        let (group, base, dir) = (text(&cgroup)?, text(&self.base)?, text(&self.dir)?);
        let args = ["-c", script, "host", group, include_str!("boot.sh"), "boot", base, dir, &self.name];
        let mut outer = spawn_bound("bash", &args, |command| {
            command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        })?;
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let init = wait::until(PATIENCE, || {
            if outer.try_wait().ok().flatten().is_some() {
                return Some(None);
            }
            let comm = fs::read_to_string(format!("/proc/{}/comm", outer.id())).ok()?;
            let children = fs::read_to_string(&children).ok()?;
            (comm.trim() == "unshare")
                .then(|| children.split_whitespace().next()?.parse::<u32>().ok().map(Some))?
        });
        let Some(Some(init)) = init else {
            let _ = outer.kill();
            let _ = outer.wait();
            bail!("cannot make namespaces for {}: {}", self.name, self.console());
        };
        let stdin = outer.stdin.take();
        *state = Some(Running { outer, init, cgroup });
        drop(state);
        self.switch.plug(self.port, init)?;
        stdin.context("no way to tell the host that its network is there")?.write_all(b"\n")?;
        Ok(())
    }

    /// Waits until systemd has done all jobs of the boot, and returns what it calls that: `running`, `degraded`.
    pub(crate) fn wait_until_booted(&self) -> Result<String> {
        let mut last = String::new();
        let done = wait::until(PATIENCE, || {
            let mut state = self.state();
            let Some(running) = state.as_mut() else { return Some(false) };
            if running.outer.try_wait().ok().flatten().is_some() {
                return Some(false);
            }
            // Before systemd has taken over, this would ask the machine's own.
            let comm = fs::read_to_string(format!("/proc/{}/comm", running.init)).ok()?;
            if comm.trim() != "systemd" {
                return None;
            }
            drop(state);
            last = self.try_run("systemctl is-system-running --wait").ok()?.stdout.trim().to_owned();
            (!matches!(last.as_str(), "" | "offline" | "initializing" | "starting")).then_some(true)
        });
        if done != Some(true) {
            bail!("{} did not boot ({last:?}): {}", self.name, self.console());
        }
        Ok(last)
    }

    /// Switches the host on again. Returns what systemd says of the boot: `running`, or `degraded` if a unit failed.
    ///
    /// # Panics
    /// If the host is on or does not boot.
    #[track_caller]
    pub fn boot(&self) -> String {
        let booted = self.start().and_then(|()| self.wait_until_booted());
        booted.unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Pulls the plug: PID 1 gets SIGKILL, and with it every process of the host. Files stay as they are.
    pub fn power_off(&self) {
        let Some(mut running) = self.state().take() else { return };
        let fuse = fuse_connections(running.init);
        let init = i32::try_from(running.init).map(nix::unistd::Pid::from_raw);
        if let Ok(init) = init {
            // It may be gone already.
            let _ = nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL);
        }
        // A thread that waits for a mount which its own process serves is not killed before that is answered. With real
        // hosts the kernel goes too.
        let gone = wait::until(KILLED, || running.outer.try_wait().ok().flatten());
        if gone.is_none() {
            abort_fuse(&fuse);
            let _ = running.outer.wait();
        }
        cgroup::remove(&running.cgroup);
    }

    /// Cuts the host off from all others.
    ///
    /// # Panics
    /// If `ip` fails.
    pub fn cut(&self) {
        self.switch.set_up(self.port, false).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Connects the host again.
    ///
    /// # Panics
    /// If `ip` fails.
    pub fn heal(&self) {
        self.switch.set_up(self.port, true).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Hosts that are apart reach those that are not, but not each other.
    ///
    /// # Panics
    /// If `ip` fails.
    pub fn set_apart(&self, apart: bool) {
        self.switch.set_apart(self.port, apart).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// From the next boot on there is no `/dev/fuse`.
    ///
    /// # Panics
    /// If that cannot be noted.
    pub fn remove_fuse(&self) {
        fs::write(self.dir.join("no-fuse"), "").expect("the host's directory is writable");
    }

    /// A shell command inside the host, as root, ready to be spawned; nothing limits its time.
    ///
    /// # Panics
    /// If the host is off.
    #[track_caller]
    pub fn command(&self, script: &str) -> Command {
        self.enter(&["bash", "-c", script]).expect("the host is on")
    }

    /// What opens a shell inside the host from this machine.
    ///
    /// # Panics
    /// If the host is off.
    #[track_caller]
    pub fn shell(&self) -> String {
        let init = self.state().as_ref().expect("the host is on").init;
        format!("nsenter --all --target {init} bash")
    }

    fn enter(&self, args: &[&str]) -> Result<Command> {
        let init = match &*self.state() {
            Some(running) => running.init.to_string(),
            None => bail!("{} is off", self.name),
        };
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", &init]).args(args);
        command.env_clear().envs([
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("DEBIAN_FRONTEND", "noninteractive"),
        ]);
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a shell command and returns how it ended.
    ///
    /// # Errors
    /// The host is off, or the command cannot be started.
    pub fn try_run(&self, script: &str) -> Result<Outcome> {
        let mut command =
            self.enter(&["timeout", "--kill-after=5", COMMAND_SECONDS, "bash", "-c", script])?;
        let output = command.output().with_context(|| format!("cannot run {script:?} on {}", self.name))?;
        Ok(Outcome {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a shell command, which has to succeed, and returns what it printed.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn run(&self, script: &str) -> String {
        let outcome = self.try_run(script).unwrap_or_else(|error| panic!("{error:#}"));
        if !outcome.success() {
            let Outcome { code, stdout, stderr } = outcome;
            let processes = if code == Some(TIMED_OUT) { self.processes() } else { String::new() };
            panic!(
                "{}: {script}\nended with {code:?}\n{stdout}{stderr}{processes}\n{}",
                self.name,
                self.journal()
            );
        }
        outcome.stdout
    }

    /// Runs a shell command until it succeeds, and returns what it printed then.
    ///
    /// # Panics
    /// If it never does.
    #[track_caller]
    pub fn wait_for(&self, script: &str) -> String {
        let mut last = None;
        let done = wait::until(PATIENCE, || {
            let outcome = self.try_run(script).unwrap_or_else(|error| panic!("{error:#}"));
            let success = outcome.success();
            last = Some(outcome);
            success.then_some(())
        });
        let outcome = last.expect("it was run at least once");
        if done.is_none() {
            panic!("{}: never succeeded: {script}\n{outcome:?}\n{}", self.name, self.journal());
        }
        outcome.stdout
    }

    /// What its processes wait for, for the message of a failed test.
    fn processes(&self) -> String {
        self.try_run("ps -eLo pid,lwp,stat,wchan:30,args --no-headers")
            .map_or_else(|error| format!("{error:#}"), |outcome| outcome.stdout)
    }

    /// The end of the host's journal, for the message of a failed test.
    pub fn journal(&self) -> String {
        self.try_run("journalctl --no-pager --lines 100 --output short-monotonic")
            .map_or_else(|error| format!("{error:#}"), |outcome| outcome.stdout)
    }

    /// Writes a file of the host.
    ///
    /// # Panics
    /// If the host is off or the file cannot be written.
    #[track_caller]
    pub fn push(&self, path: &str, content: impl AsRef<[u8]>) {
        let mut command =
            self.enter(&["bash", "-c", "mkdir -p \"${0%/*}\" && cat > \"$0\"", path]).expect("on");
        let mut child = command.stdin(Stdio::piped()).spawn().expect("nsenter runs");
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin.write_all(content.as_ref()).expect("the host takes the file");
        drop(stdin);
        assert!(child.wait().is_ok_and(|status| status.success()), "{}: cannot write {path}", self.name);
    }

    /// Reads a file of the host.
    ///
    /// # Panics
    /// If that is not possible.
    #[track_caller]
    pub fn pull(&self, path: &str) -> Vec<u8> {
        let output = self.enter(&["cat", path]).and_then(|mut command| Ok(command.output()?));
        let output = output.unwrap_or_else(|error| panic!("{error:#}"));
        assert!(output.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Installs a package file of this machine with apt.
    ///
    /// # Panics
    /// If apt fails.
    #[track_caller]
    pub fn install(&self, deb: &Path) {
        let name = deb.file_name().and_then(|name| name.to_str()).expect("a package has a name");
        let there = format!("/tmp/{name}");
        self.push(&there, fs::read(deb).unwrap_or_else(|error| panic!("{}: {error}", deb.display())));
        self.run(&format!("apt-get install -y --allow-downgrades {there} && rm {there}"));
    }

    fn console(&self) -> String {
        fs::read_to_string(self.dir.join("console.log")).unwrap_or_default()
    }
}

/// FUSE connections of a host: their numbers are those of the mounts' devices.
fn fuse_connections(init: u32) -> Vec<String> {
    let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap_or_default();
    let fuse = mounts.lines().filter(|line| line.contains(" - fuse"));
    // The third field is `0:<number>`; `fusectl` itself is no connection, and has a directory for none.
    fuse.filter_map(|line| Some(line.split(' ').nth(2)?.strip_prefix("0:")?.to_owned())).collect()
}

/// Ends FUSE connections that nobody serves any more.
fn abort_fuse(connections: &[String]) {
    let script = "mount -t fusectl fusectl /sys/fs/fuse/connections && cd /sys/fs/fuse/connections && \
                  for number; do [ ! -d $number ] || echo 1 > $number/abort; done";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).args(connections);
    if let Err(error) = output(&mut command) {
        eprintln!("cannot abort FUSE connections: {error:#}");
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn uuid() -> Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot read a random id")
}
