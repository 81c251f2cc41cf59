//! How the mount goes from one agent to the next: from the store of systemd, where systemd runs the agent, else from the
//! guard of the agent that died.

use super::Identity;
use crate::config::{Config, DoorKind};
use crate::systemd::fds;
use anyhow::Context;
use fuse_session::{AfterDeath, Connection, Guard, GuardOptions, Inherited, MountError, claim};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// Names in systemd's store.
const DEVICE: &str = "fuse-device";
const HANDLES: &str = "fuse-handles";

/// The agent's hold on its mount.
#[derive(Debug)]
pub struct MountHold {
    /// `None`: there is no mount. Why there is no connection is told when the door is opened.
    connection: Option<Result<Connection, MountError>>,
    served: AtomicBool,
}

impl MountHold {
    /// Takes over what another agent has left, or prepares a mount, and has it guarded. On the main thread, before there
    /// are others: see [`Guard::start`].
    pub fn begin(config: &Config, identity: &Identity) -> anyhow::Result<(MountHold, Option<Guard>)> {
        if config.door == DoorKind::Preload {
            return Ok((MountHold { connection: None, served: AtomicBool::new(false) }, None));
        }
        let socket = config.data.dir.join("keeper.sock");
        let stored = (fds::take(DEVICE), fds::take(HANDLES));
        let inherited = match stored {
            (Some(device), Some(table)) => Some(Inherited::from_manager(device, table)),
            (None, None) => claim(&socket).context("cannot ask for the mount of the last agent")?,
            _ => None,
        };
        let taken_over = inherited.as_ref().map(|inherited| inherited.connect(&config.mount.dir));
        let connection = match taken_over {
            Some(Ok(connection)) => Ok(connection),
            Some(Err(error)) => {
                tracing::warn!(%error, "cannot go on with the mount of the last agent; applications get errors");
                forget_stored();
                Connection::new()
            }
            None => Connection::new(),
        };
        let after_death = if config.mount.takeover_wait.is_zero() {
            AfterDeath::Abort
        } else if fds::is_service() {
            AfterDeath::LeaveToManager
        } else {
            AfterDeath::Keep { socket, wait: config.mount.takeover_wait }
        };
        let guard = match &connection {
            Ok(connection) => {
                let options = GuardOptions {
                    dir: &config.mount.dir,
                    connection,
                    lock: Some(identity.lock()),
                    after_death: after_death.clone(),
                };
                Some(Guard::start(&options).context("cannot start the mount's guard")?)
            }
            Err(_) => None,
        };
        if let Some(inherited) = inherited {
            inherited
                .taken()
                .context("cannot tell the guard of the last agent that its mount is taken over")?;
        }
        if let (Ok(connection), AfterDeath::LeaveToManager) = (&connection, &after_death) {
            let [device, table] = connection.descriptors();
            fds::store(DEVICE, device);
            fds::store(HANDLES, table);
        }
        Ok((MountHold { connection: Some(connection), served: AtomicBool::new(false) }, guard))
    }

    /// Whether applications have outlived another agent and wait for this one.
    pub fn is_taken_over(&self) -> bool {
        matches!(&self.connection, Some(Ok(connection)) if connection.is_taken_over())
    }

    /// The connection to mount, or to go on with.
    pub fn connection(&self) -> anyhow::Result<&Connection> {
        match &self.connection {
            Some(Ok(connection)) => Ok(connection),
            Some(Err(error)) => anyhow::bail!("{error}"),
            None => anyhow::bail!("this agent has no mount"),
        }
    }

    /// The mount is served by this process.
    pub fn is_served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }

    /// The agent ends. It has taken the mount away, unless it never came to serve one that it took over: that is for the
    /// next one.
    pub fn end(&self, guard: Option<Guard>) {
        match guard {
            Some(guard) if self.is_taken_over() && !self.served.load(Ordering::Relaxed) => {
                guard.leave_mount()
            }
            guard => {
                forget_stored();
                drop(guard);
            }
        }
    }
}

fn forget_stored() {
    if fds::is_service() {
        fds::forget(DEVICE);
        fds::forget(HANDLES);
    }
}

/// Whether systemd stops this service in order to start it again: then the mount is for the next process.
pub fn is_restarting() -> bool {
    let Some(unit) = fds::is_service().then(own_unit).flatten() else { return false };
    let jobs =
        Command::new("systemctl").args(["list-jobs", "--plain", "--no-legend", "--full", &unit]).output();
    match jobs {
        Ok(jobs) => {
            let jobs = String::from_utf8_lossy(&jobs.stdout).into_owned();
            // "JOB UNIT TYPE STATE"
            jobs.lines().any(|job| {
                let mut words = job.split_whitespace().skip(1);
                words.next() == Some(&unit) && words.next() == Some("restart")
            })
        }
        Err(error) => {
            tracing::warn!(%error, "cannot ask systemd whether this is a restart; taken for a stop");
            false
        }
    }
}

/// The unit that this process belongs to, by its control group.
fn own_unit() -> Option<String> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let named = groups.lines().filter_map(|line| {
        let (_, controllers_and_path) = line.split_once(':')?;
        let (controllers, path) = controllers_and_path.split_once(':')?;
        matches!(controllers, "" | "name=systemd").then_some(path)
    });
    let mut units = named.filter_map(|path| path.rsplit('/').find(|part| part.ends_with(".service")));
    units.next().map(str::to_owned)
}
