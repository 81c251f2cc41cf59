//! A private system bus with the policy that packages install, and `busctl` on it.

use crate::shell::try_run;
use crate::wait::{PATIENCE, wait_for};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use tempfile::TempDir;

/// As `/usr/share/dbus-1/system.conf` has it, and names of other services for the tests to own.
const POLICY: &str = r#"
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <policy user="root">
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow own="org.freedesktop.systemd1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.systemd1"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Monitoring"/>
  </policy>
"#;

/// A bus; it ends with this value.
#[derive(Debug)]
pub struct Bus {
    dir: TempDir,
    daemon: Mutex<Option<Child>>,
}

impl Default for Bus {
    fn default() -> Self {
        Bus::new()
    }
}

impl Bus {
    /// A running bus.
    pub fn new() -> Bus {
        let bus = Bus::not_running();
        bus.start();
        bus
    }

    /// A bus that has an address but does not run yet.
    pub fn not_running() -> Bus {
        let dir = tempfile::Builder::new().prefix("litefs-bus-").tempdir().expect("a temporary directory");
        // Other users come here too.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("it is ours");
        let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/dbus/io.litefs.LiteFS1.conf");
        let config = format!(
            "<busconfig>\n  <type>system</type>\n  <listen>unix:path={0}/socket</listen>\n  <auth>EXTERNAL</auth>\n\
             {POLICY}  <include>{1}</include>\n</busconfig>\n",
            dir.path().display(),
            policy.canonicalize().expect("the policy is there").display()
        );
        fs::write(dir.path().join("bus.conf"), config).expect("the temporary directory is writable");
        Bus { dir, daemon: Mutex::default() }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// For `DBUS_SYSTEM_BUS_ADDRESS`.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.socket().display())
    }

    /// Starts it.
    pub fn start(&self) {
        let log = fs::File::create(self.dir.path().join("log")).expect("the temporary directory is writable");
        let daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", self.dir.path().join("bus.conf").display()))
            .args(["--nofork", "--nopidfile", "--nosyslog"])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("dbus-daemon runs");
        *self.daemon.lock().expect("no panic") = Some(daemon);
        wait_for("the bus listens", PATIENCE, || UnixStream::connect(self.socket()).ok());
    }

    /// Kills it; all connections break.
    pub fn kill(&self) {
        let mut daemon = self.daemon.lock().expect("no panic").take().expect("it runs");
        daemon.kill().expect("it runs");
        daemon.wait().expect("it is our child");
    }

    /// `busctl` with arguments.
    pub fn busctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("busctl");
        command.arg(format!("--address={}", self.address())).args(arguments).env("NO_COLOR", "1");
        command
    }

    /// What `busctl` prints, or its error.
    pub fn busctl(&self, arguments: &[&str]) -> Result<String, String> {
        try_run(&mut self.busctl_command(arguments))
    }

    /// The same as another user, who is nobody.
    pub fn busctl_as_nobody(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "busctl"]);
        command.arg(format!("--address={}", self.address())).args(arguments);
        try_run(&mut command)
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        if let Ok(mut daemon) = self.daemon.lock()
            && let Some(mut daemon) = daemon.take()
        {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
