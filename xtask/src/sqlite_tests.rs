//! `cargo xtask sqlite-tests`: SQLite's own test programs, on the plain file system and in a mount, side by side.

mod source;

use crate::run::{self, cargo, show};
use crate::setup;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long an agent may take to mount.
const PATIENCE: Duration = Duration::from_secs(30);

/// What runs when no file is named: whatever has to do with files, locks, journals and recovery.
const FILES: &str = "wal wal2 wal3 wal4 wal5 wal6 wal7 wal8 wal9 walbak walblock walcksum walhook walmode walnoshm \
    waloverwrite walpersist walprotocol walro walro2 walshared wal64k journal1 journal2 journal3 pager1 pager2 pager4 \
    pagesize vacuum vacuum2 vacuum3 vacuum4 vacuum5 vacuum-into incrvacuum incrvacuum2 autovacuum attach2 attach3 \
    attach4 savepoint savepoint2 savepoint4 savepoint5 savepoint6 savepoint7 lock lock2 lock3 lock4 lock5 lock6 lock7 \
    mmap1 mmap2 mmap3 mmap4 mmapwarm backup backup2 backup4 backup5 crash2 crash3 crash4 crash5 crash7 crash8 io ioerr2 \
    exclusive exclusive2 delete_db tempdb trans trans2 trans3 avtrans rollback rollback2 nolock unixexcl symlink \
    symlink2 superlock sync sync2 shared zerodamage e_vacuum e_walauto filectrl multiplex uri quota corrupt corrupt2 \
    select1 insert";

/// Runs SQLite's own tests.
#[derive(clap::Args)]
pub struct Options {
    /// Names of test files, without `.test`; about a hundred when none is given
    files: Vec<String>,
    /// Seconds that one file may take
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    limit: u64,
}

/// What came of one file.
struct Outcome {
    /// `ok`, or what went wrong.
    summary: String,
    /// Names of tests that failed.
    failed: BTreeSet<String>,
    /// It ran to its end.
    finished: bool,
}

impl Outcome {
    fn passed(&self) -> bool {
        self.finished && self.failed.is_empty()
    }
}

/// Builds what is missing, runs the files in both places, and prints both; fails when a file fails in the mount only.
pub fn run(options: Options) -> Result<()> {
    setup::can_mount()?;
    let suite = source::prepare()?;
    run::run(&mut cargo(&["build", "--package", "litefs-agent"]))?;
    let root = suite.dir.join("run");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    let agent = Agent::start(&root)?;
    let named: Vec<&str> = options.files.iter().map(String::as_str).collect();
    let files = if named.is_empty() { FILES.split_whitespace().collect() } else { named };
    let limit = Duration::from_secs(options.limit);

    println!("{:<14} {:<42} in the mount", "file", "on the file system");
    let (mut worse, mut native_passes, mut mount_passes) = (Vec::new(), 0, 0);
    for file in &files {
        let native =
            run_file(&suite, file, &root.join("native"), &root.join(format!("{file}.native")), limit)?;
        let mount = run_file(&suite, file, &agent.mount, &root.join(format!("{file}.mount")), limit)?;
        println!("{file:<14} {:<42} {}", native.summary, mount.summary);
        native_passes += usize::from(native.passed());
        mount_passes += usize::from(mount.passed());
        let only_here: Vec<&String> = mount.failed.difference(&native.failed).collect();
        if !only_here.is_empty() || native.finished && !mount.finished {
            worse.push(format!("{file}: {only_here:?}"));
        }
    }
    println!(
        "\nof {} files {native_passes} pass on the file system and {mount_passes} in the mount; what they said is in {}",
        files.len(),
        root.display()
    );
    if !worse.is_empty() {
        println!("\nonly in the mount fail:");
        worse.iter().for_each(|line| println!("  {line}"));
        println!("docs/sqlite-tests.md says what is expected");
    }
    Ok(())
}

/// Runs one file in a directory of its own below `parent`.
fn run_file(
    suite: &source::Suite,
    file: &str,
    parent: &Path,
    output: &Path,
    limit: Duration,
) -> Result<Outcome> {
    let script = suite.tests.join(format!("{file}.test"));
    if !script.exists() {
        bail!("{} does not exist", script.display());
    }
    let dir = parent.join(file);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let log = File::create(output)?;
    let mut command = Command::new(&suite.testfixture);
    command.arg(&script).current_dir(&dir).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A group of its own, since some files start further processes.
    command.process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot run {}", show(&command)))?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = kill(Pid::from_raw(-(child.id() as i32)), Signal::SIGKILL);
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let said = String::from_utf8_lossy(&fs::read(output)?).into_owned();
    let failed: BTreeSet<String> = said
        .lines()
        .filter_map(|line| line.strip_prefix("!Failures on these tests:"))
        .flat_map(str::split_whitespace)
        .map(str::to_owned)
        .collect();
    let counts = said.lines().find(|line| line.contains(" errors out of "));
    let finished = counts.is_some() && status.is_some();
    let summary = match (counts, status) {
        (Some(line), Some(_)) => line.split(" on ").next().unwrap_or(line).to_owned(),
        (_, None) => format!("not done after {} s", limit.as_secs()),
        (None, Some(status)) => format!("broke off: {status}"),
    };
    if let Err(error) = fs::remove_dir_all(&dir) {
        println!("{file}: cannot remove {}: {error}", dir.display());
    }
    Ok(Outcome { summary, failed, finished })
}

/// The agent whose mount the tests run in.
struct Agent {
    mount: PathBuf,
    child: Child,
}

impl Agent {
    fn start(root: &Path) -> Result<Agent> {
        let mount = root.join("mount");
        fs::create_dir_all(&mount)?;
        let listen = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Command::new(run::root().join("target/debug/litefs"));
        command.arg("agent");
        for setting in [
            format!("data.dir={}", root.join("data").display()),
            format!("mount.dir={}", mount.display()),
            format!("socket.path={}", root.join("control.sock").display()),
            format!("http.listen={listen}"),
        ] {
            command.args(["--set", &setting]);
        }
        let log = root.join("agent.log");
        let file = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot run {}", show(&command)))?;
        let mut agent = Agent { mount, child };
        let deadline = Instant::now() + PATIENCE;
        // Only a mount has it.
        while !agent.mount.join(".lag").exists() {
            if let Some(status) = agent.child.try_wait()? {
                bail!("the agent ended with {status}; {} says why", log.display());
            }
            if Instant::now() > deadline {
                bail!("the agent does not mount; {} says more", log.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(agent)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
