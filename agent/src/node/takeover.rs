//! How the mount goes from one agent to the next: from the store of systemd, where systemd runs the agent, else from the
//! guard of the agent that died.

use super::Identity;
use crate::config::{Config, DoorKind};
use crate::systemd::fds;
use anyhow::Context;
use fuse_session::{AfterDeath, Connection, Guard, GuardOptions, Inherited, MountError, Mounter, claim};
use std::sync::atomic::{AtomicBool, Ordering};

/// Names in systemd's store.
const DEVICE: &str = "fuse-device";
const HANDLES: &str = "fuse-handles";

/// Who mounts for this agent.
pub fn mounter(config: &Config) -> Mounter {
    config.mount.helper.clone().map_or_else(Mounter::own, Mounter::helper)
}

/// The agent's hold on its mount.
#[derive(Debug)]
pub struct MountHold {
    /// `None`: there is no mount. Why there is no connection is told when the door is opened.
    connection: Option<Result<Connection, MountError>>,
    /// Somebody keeps the mount when this process ends.
    kept: bool,
    served: AtomicBool,
}

impl MountHold {
    /// Takes over what another agent has left, or prepares a mount, and has it guarded. On the main thread, before there
    /// are others: see [`Guard::start`].
    pub fn begin(config: &Config, identity: &Identity) -> anyhow::Result<(MountHold, Option<Guard>)> {
        if config.door == DoorKind::Preload {
            return Ok((MountHold { connection: None, kept: false, served: AtomicBool::new(false) }, None));
        }
        let socket = config.data.dir.join("keeper.sock");
        let stored = (fds::take(DEVICE), fds::take(HANDLES));
        let inherited = match stored {
            (Some(device), Some(table)) => Some(Inherited::from_manager(device, table)),
            (None, None) => claim(&socket).context("cannot ask for the mount of the last agent")?,
            // systemd has dropped the device: its mount is gone.
            _ => {
                forget_stored();
                None
            }
        };
        let mounter = mounter(config);
        let taken_over = inherited.as_ref().map(|inherited| inherited.connect(&config.mount.dir, &mounter));
        let connection = match taken_over {
            Some(Ok(connection)) => Ok(connection),
            Some(Err(error)) => {
                tracing::warn!(%error, "cannot go on with the mount of the last agent; applications get errors");
                forget_stored();
                Connection::new(&mounter)
            }
            None => Connection::new(&mounter),
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
        let kept = !matches!(after_death, AfterDeath::Abort);
        Ok((MountHold { connection: Some(connection), kept, served: AtomicBool::new(false) }, guard))
    }

    /// Whether applications have outlived another agent and wait for this one.
    pub fn is_taken_over(&self) -> bool {
        matches!(&self.connection, Some(Ok(connection)) if connection.is_taken_over())
    }

    /// Whether applications can be left waiting for the next agent.
    pub fn can_be_left(&self) -> bool {
        match &self.connection {
            // There is no mount: applications go on with their files.
            None => true,
            Some(connection) => self.kept && connection.as_ref().is_ok_and(Connection::is_resumable),
        }
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
        // Not before it is mounted: systemd drops a descriptor that polls as an error.
        if let (Some(Ok(connection)), true) = (&self.connection, self.kept && fds::is_service()) {
            let [device, table] = connection.descriptors();
            fds::store(DEVICE, device);
            fds::store(HANDLES, table);
        }
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
