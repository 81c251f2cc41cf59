//! Hosts of a fleet: each has a directory with data, mount, socket and log, a port, and an agent that runs or not.

use crate::binary::litefs;
use crate::door::{self, Place};
use crate::ports::Port;
use crate::shell::{run, sqlite3, try_run, try_sqlite3};
use crate::wait::{PATIENCE, wait_for};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// After this long a test hangs: its mounts are broken, which ends every wait for them with an error.
fn hangs_after() -> Duration {
    let set = std::env::var("LITEFS_TEST_HANGS_AFTER").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(set.unwrap_or(150))
}

/// Lines of a log that are shown when a test fails.
const LINES_SHOWN: usize = 60;

/// Makes hosts, in one temporary directory.
#[derive(Debug)]
pub struct Fleet {
    dir: Arc<TempDir>,
}

/// What a host is told to be.
#[derive(Debug, Clone, Copy)]
pub enum Role<'a> {
    /// Takes writes.
    Primary,
    /// Follows another host: the primary, or a replica of it.
    ReplicaOf(&'a Host),
    /// Takes part in choosing a primary by a lease at these addresses of Consul.
    Candidate(&'a str),
}

/// One host. All methods may be called from several threads.
#[derive(Debug)]
pub struct Host {
    name: String,
    dir: PathBuf,
    /// Where its agent meets the library, when all hosts have the preload door.
    place: Option<Place>,
    port: Port,
    settings: Mutex<Vec<String>>,
    environment: Mutex<Vec<(String, String)>>,
    binary: Mutex<PathBuf>,
    agent: Arc<Mutex<Option<Child>>>,
    expected_errors: Mutex<Vec<String>>,
    /// Dropped to call off the watchdog.
    _watch: mpsc::Sender<()>,
    /// Kept until all hosts are gone.
    _fleet: Arc<TempDir>,
}

impl Default for Fleet {
    fn default() -> Self {
        Fleet::new()
    }
}

impl Fleet {
    /// No hosts yet.
    pub fn new() -> Fleet {
        let dir = tempfile::Builder::new().prefix("litefs-test-").tempdir().expect("a temporary directory");
        Fleet { dir: Arc::new(dir) }
    }

    /// A directory for the test's own files, outside of all mounts.
    pub fn scratch(&self) -> PathBuf {
        let dir = self.dir.path().join("scratch");
        fs::create_dir_all(&dir).expect("the temporary directory is writable");
        dir
    }

    /// A host that does not run yet.
    pub fn host(&self, name: &str, role: Role<'_>) -> Host {
        let dir = self.dir.path().join(name);
        fs::create_dir(&dir).expect("each host has a name of its own");
        let agent: Arc<Mutex<Option<Child>>> = Arc::default();
        let (watch, called_off) = mpsc::channel::<()>();
        let mount = dir.join("mount");
        std::thread::spawn(move || {
            let limit = hangs_after();
            if called_off.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("a test runs for {limit:?}: breaking its mount {}", mount.display());
                abort_mount(&mount);
            }
        });
        let host = Host {
            name: name.to_owned(),
            dir,
            place: door::is_preload().then(Place::take),
            port: Port::reserve(),
            settings: Mutex::default(),
            environment: Mutex::default(),
            binary: Mutex::new(litefs().to_owned()),
            agent,
            expected_errors: Mutex::default(),
            _watch: watch,
            _fleet: self.dir.clone(),
        };
        host.write_role(role);
        // Tests break connections on purpose and wait for the next one.
        host.set("replication.reconnect-max=200ms");
        if door::is_preload() {
            host.set("door=preload");
        }
        // The machine's own bus is no place for tests; those that want one bring it.
        host.set("dbus.bus=off");
        host
    }

    /// A running primary.
    pub fn primary(&self, name: &str) -> Host {
        let host = self.host(name, Role::Primary);
        host.start();
        host
    }

    /// A running replica that is connected.
    pub fn replica(&self, name: &str, upstream: &Host) -> Host {
        let host = self.host(name, Role::ReplicaOf(upstream));
        host.start();
        host.wait_connected();
        host
    }

    /// A running primary `a` and a connected replica `b`.
    pub fn pair(&self) -> (Host, Host) {
        let primary = self.primary("a");
        let replica = self.replica("b", &primary);
        (primary, replica)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Its name, as others see it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets a configuration key (`KEY=VALUE`) from the next start on.
    pub fn set(&self, setting: &str) -> &Host {
        lock(&self.settings).push(setting.to_owned());
        self
    }

    /// Sets a variable of the agent's environment from the next start on.
    pub fn env(&self, name: &str, value: &str) -> &Host {
        lock(&self.environment).push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds to the configuration file, for what `KEY=VALUE` cannot say.
    pub fn configure(&self, toml: &str) -> &Host {
        let file = File::options().append(true).open(self.config_file());
        let mut file = file.expect("the file is there");
        file.write_all(toml.as_bytes()).expect("the temporary directory is writable");
        self
    }

    /// Announces that ERROR lines with this text are right in this test.
    pub fn expect_error(&self, text: &str) -> &Host {
        lock(&self.expected_errors).push(text.to_owned());
        self
    }

    /// Where applications find the databases.
    pub fn mount(&self) -> PathBuf {
        self.dir.join("mount")
    }

    /// A path in the mount.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.mount().join(name)
    }

    /// The agent's own directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The file that a path in the mount stands for: looked at there, the agent does not see it.
    pub fn stored(&self, name: impl AsRef<Path>) -> PathBuf {
        if door::is_preload() { self.path(name) } else { self.data().join("files").join(name) }
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.place.as_ref().map_or(self.dir.as_path(), Place::path).join("control.sock")
    }

    /// The port for followers, metrics and events.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// `http://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port.number)
    }

    /// Process id of the running agent.
    pub fn pid(&self) -> u32 {
        lock(&self.agent).as_ref().map(Child::id).expect("the agent was started")
    }

    fn config_file(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    fn write_role(&self, role: Role<'_>) {
        let lease = match role {
            Role::Primary => "[lease]\nrole = \"primary\"\n".to_owned(),
            Role::Candidate(address) => format!(
                "[lease]\ntype = \"consul\"\nttl = \"2s\"\n[consul]\naddress = \"{address}\"\ntimeout = \"500ms\"\n"
            ),
            Role::ReplicaOf(upstream) => {
                format!("[lease]\nrole = \"replica\"\nprimary-url = \"{}\"\n", upstream.url())
            }
        };
        fs::write(self.config_file(), lease).expect("the temporary directory is writable");
    }

    /// The command that runs the agent, for tests that start it in their own way.
    pub fn agent_command(&self) -> Command {
        let mut command = Command::new(&*lock(&self.binary));
        command.arg("agent").arg("--config").arg(self.config_file()).env_remove("LD_PRELOAD");
        command.envs(lock(&self.environment).iter().cloned());
        let own = [
            format!("node.name={}", self.name),
            format!("data.dir={}", self.data().display()),
            format!("mount.dir={}", self.mount().display()),
            format!("socket.path={}", self.socket().display()),
            format!("http.listen=127.0.0.1:{}", self.port.number),
            format!("http.advertise-url={}", self.url()),
            // A killed agent is gone, unless a test is about the next one.
            "mount.takeover-wait=0s".to_owned(),
            "log-output.format=human".to_owned(),
        ];
        for setting in own.iter().chain(lock(&self.settings).iter()) {
            command.args(["--set", setting]);
        }
        for setting in std::env::var("LITEFS_TEST_SET").unwrap_or_default().split_whitespace() {
            command.args(["--set", setting]);
        }
        command
    }

    /// Starts the agent and waits until it answers and has mounted.
    #[track_caller]
    pub fn start(&self) -> &Host {
        self.start_without_waiting();
        self.wait_for("the agent is ready", || {
            self.assert_running();
            self.try_status().is_some()
        });
        self
    }

    /// Starts the agent; it may fail to start.
    pub fn start_without_waiting(&self) -> &Host {
        let mut agent = lock(&self.agent);
        assert!(agent.is_none(), "the agent of {} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.log_file());
        let log = log.expect("the temporary directory is writable");
        let mut command = self.agent_command();
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
        *agent = Some(command.spawn().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}")));
        self
    }

    /// Panics when the agent has ended by itself.
    #[track_caller]
    pub fn assert_running(&self) {
        let mut agent = lock(&self.agent);
        let agent = agent.as_mut().unwrap_or_else(|| panic!("the agent of {} was not started", self.name));
        let ended = agent.try_wait().expect("it is our child");
        assert!(ended.is_none(), "the agent of {} ended with {ended:?}", self.name);
    }

    /// Waits until the agent ends by itself.
    #[track_caller]
    pub fn wait_ended(&self) -> ExitStatus {
        let mut agent = lock(&self.agent).take().expect("the agent was started");
        let status = wait_for("the agent ends", PATIENCE, || agent.try_wait().expect("it is our child"));
        self.unmount();
        status
    }

    /// Sends a signal to the agent.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).expect("the agent runs");
    }

    /// Stops the agent in order: SIGTERM, exit code 0, nothing left mounted.
    #[track_caller]
    pub fn stop(&self) -> &Host {
        self.signal(Signal::SIGTERM);
        let mut agent = lock(&self.agent).take().expect("the agent was started");
        let status = wait_for("the agent stops", PATIENCE, || agent.try_wait().expect("it is our child"));
        let left_mounted = self.unmount();
        assert!(status.success(), "the agent of {} stopped with {status}", self.name);
        assert!(!left_mounted, "the agent of {} left its mount behind", self.name);
        self
    }

    /// Kills the agent with SIGKILL; its mount stays, and answers with errors.
    pub fn kill(&self) -> &Host {
        let mut agent = lock(&self.agent).take().expect("the agent was started");
        agent.kill().expect("the agent runs");
        assert!(self.reap(&mut agent), "the agent of {} does not die of SIGKILL", self.name);
        self
    }

    /// Waits for the end of an agent that was killed. One that waits for its own mount would wait for ever: breaks
    /// the mount then, and says `false`.
    fn reap(&self, agent: &mut Child) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while agent.try_wait().expect("it is our child").is_none() {
            if Instant::now() > deadline {
                abort_mount(&self.mount());
                agent.wait().expect("it is our child");
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Has the agent leave its mount to the next one (SIGUSR2), and waits until it has ended.
    #[track_caller]
    pub fn leave(&self) -> &Host {
        self.signal(Signal::SIGUSR2);
        let mut agent = lock(&self.agent).take().expect("the agent was started");
        let status = wait_for("the agent leaves", PATIENCE, || agent.try_wait().expect("it is our child"));
        assert!(status.success(), "the agent of {} left with {status}", self.name);
        self
    }

    /// Runs another binary from the next start on.
    pub fn use_binary(&self, path: &Path) -> &Host {
        // What has just been written cannot be run while a process that was forked meanwhile has it open.
        wait_for("the program can be run", PATIENCE, || match Command::new(path).arg("--version").output() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => None,
            other => Some(other.expect("the program runs")),
        });
        *lock(&self.binary) = path.to_owned();
        self
    }

    /// Stops and starts.
    #[track_caller]
    pub fn restart(&self) -> &Host {
        self.stop().start()
    }

    /// Gives the host another role in its configuration; takes effect with a start or [`Host::reload`].
    pub fn set_role(&self, role: Role<'_>) -> &Host {
        self.write_role(role);
        self
    }

    /// Has the agent read its configuration again (SIGHUP).
    pub fn reload(&self) -> &Host {
        self.signal(Signal::SIGHUP);
        self
    }

    /// What `litefs status --json` prints; `None` while no agent answers.
    pub fn try_status(&self) -> Option<Value> {
        let body = self.get("/v1/status").ok()?;
        serde_json::from_slice(&body).ok()
    }

    /// What `litefs status --json` prints.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.try_status().unwrap_or_else(|| panic!("the agent of {} does not answer", self.name))
    }

    /// Body of a `GET` on the control socket: without a process for each look.
    pub fn get(&self, path: &str) -> io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n");
        let body = end.map(|end| answer.split_off(end + 4)).ok_or(io::ErrorKind::UnexpectedEof)?;
        if answer.starts_with(b"HTTP/1.1 200 ") { Ok(body) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// A database in the status.
    #[track_caller]
    pub fn database(&self, name: &str) -> Option<Value> {
        let status = self.status();
        let databases = status["databases"].as_array().expect("a status lists databases");
        databases.iter().find(|db| db["name"] == name).cloned()
    }

    /// Waits until a database is in this state of the status.
    #[track_caller]
    pub fn wait_database(&self, name: &str, state: &str) {
        let is = || self.database(name).is_some_and(|database| database["state"] == state);
        self.wait_for(&format!("{name} is {state}"), is);
    }

    /// `TXID/checksum` of a database; `None` when it is not there.
    #[track_caller]
    pub fn position(&self, name: &str) -> Option<String> {
        let db = self.database(name)?;
        Some(format!("{}/{}", db["txid"].as_str()?, db["checksum"].as_str()?))
    }

    /// TXID of a database; 0 when it is not there.
    #[track_caller]
    pub fn txid(&self, name: &str) -> u64 {
        let position = self.position(name);
        let txid = position.as_deref().and_then(|p| p.split_once('/')).map_or("0", |(txid, _)| txid);
        u64::from_str_radix(txid, 16).expect("a TXID is hexadecimal")
    }

    /// Files of the mount that stay on this host.
    #[track_caller]
    pub fn files_not_replicated(&self) -> Vec<String> {
        let status = self.status();
        let files = status["files_not_replicated"].as_array().expect("a status lists files");
        files.iter().map(|file| file.as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Waits until something is true; says what when it does not happen.
    #[track_caller]
    pub fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        wait_for(&format!("{what} ({})", self.name), PATIENCE, || condition().then_some(()));
    }

    /// Waits until the stream from the upstream is up.
    #[track_caller]
    pub fn wait_connected(&self) {
        self.wait_for("the replica is connected", || self.status()["role"]["upstream"]["connected"] == true);
    }

    /// Waits until another host is where this one is; returns the position.
    #[track_caller]
    pub fn wait_position_equal(&self, other: &Host, database: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = (self.position(database), other.position(database));
            if let (Some(here), Some(there)) = &seen
                && here == there
            {
                return here.clone();
            }
            let ((here, there), (a, b)) = (&seen, (&self.name, &other.name));
            assert!(Instant::now() < deadline, "{database} is at {here:?} on {a} and at {there:?} on {b}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until a database is gone.
    #[track_caller]
    pub fn wait_gone(&self, database: &str) {
        self.wait_for(&format!("{database} is gone"), || {
            self.database(database).is_none() && !self.path(database).exists()
        });
    }

    /// A `litefs` command for this host's agent.
    pub fn litefs(&self, args: &[&str]) -> Command {
        let mut command = Command::new(litefs());
        command.args(args).arg("--socket").arg(self.socket()).env_remove("LD_PRELOAD");
        command
    }

    /// `litefs export`; returns the position.
    #[track_caller]
    pub fn export(&self, database: &str, to: &Path) -> String {
        let mut command = self.litefs(&["export", database]);
        let said = run(command.arg(to));
        let position = said.split(" at ").nth(1).and_then(|rest| rest.split(',').next());
        position.unwrap_or_else(|| panic!("no position in {said:?}")).to_owned()
    }

    /// `litefs import`.
    #[track_caller]
    pub fn import(&self, database: &str, from: &Path) -> String {
        match self.try_import(database, from) {
            Ok(said) => said,
            Err(error) => panic!("import of {database} on {} failed: {error}", self.name),
        }
    }

    /// `litefs import`, which may fail.
    pub fn try_import(&self, database: &str, from: &Path) -> Result<String, String> {
        let mut command = self.litefs(&["import", database]);
        try_run(command.arg(from))
    }

    /// Runs SQL in a `sqlite3` of its own; returns the rows.
    #[track_caller]
    pub fn sql(&self, database: &str, sql: &str) -> String {
        sqlite3(&self.path(database), sql)
    }

    /// Runs SQL in a `sqlite3` of its own; returns the rows or the error.
    pub fn try_sql(&self, database: &str, sql: &str) -> Result<String, String> {
        try_sqlite3(&self.path(database), sql)
    }

    /// Waits until SQL gives these rows.
    #[track_caller]
    pub fn wait_sql(&self, database: &str, sql: &str, rows: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = if self.path(database).exists() {
                self.try_sql(database, sql)
            } else {
                Err("no file".into())
            };
            if seen.as_deref() == Ok(rows) {
                return;
            }
            assert!(Instant::now() < deadline, "{sql:?} gives {seen:?} instead of {rows:?} on {}", self.name);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A connection of this process, which waits for others as long as the tests do.
    #[track_caller]
    pub fn open(&self, database: &str) -> rusqlite::Connection {
        let connection = rusqlite::Connection::open(self.path(database)).expect("the database opens");
        connection.busy_timeout(PATIENCE).expect("a timeout can be set");
        connection
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// Everything the agent has said, over all its starts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    /// Lines in which the agent reports an error that the test did not announce, or a panic.
    pub fn unexpected_errors(&self) -> Vec<String> {
        let expected = lock(&self.expected_errors);
        self.log()
            .lines()
            .filter(|line| line.contains("ERROR") || line.contains("panicked at"))
            .filter(|line| !expected.iter().any(|text| line.contains(text)))
            .map(str::to_owned)
            .collect()
    }

    /// Panics when the agent has reported an error that the test did not announce.
    #[track_caller]
    pub fn assert_no_errors(&self) {
        let errors = self.unexpected_errors();
        assert!(errors.is_empty(), "the agent of {} reported errors:\n{}", self.name, errors.join("\n"));
    }

    /// Takes away what is mounted; says whether something was.
    fn unmount(&self) -> bool {
        let mut any = false;
        while umount2(&self.mount(), MntFlags::MNT_DETACH).is_ok() {
            any = true;
        }
        any
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let mut died = true;
        if let Some(mut agent) = lock(&self.agent).take() {
            let _ = agent.kill();
            died = self.reap(&mut agent);
        }
        self.unmount();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let shown = lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n");
            eprintln!("--- log of {}:\n{shown}\n---", self.name);
        } else {
            assert!(died, "the agent of {} did not die of SIGKILL", self.name);
            self.assert_no_errors();
        }
    }
}

/// Ends all waiting for a mount with errors, and takes it away.
fn abort_mount(mount: &Path) {
    // MNT_FORCE aborts the connection also where it then says that the mount is busy.
    let _ = umount2(mount, MntFlags::MNT_FORCE);
    let _ = umount2(mount, MntFlags::MNT_DETACH);
}
