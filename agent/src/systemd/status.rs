//! The line that `systemctl status` shows, and the messages of starting and reloading.

use super::targets::Targets;
use super::{fds, watchdog};
use crate::status::api::{RoleName, RoleStatus};
use sd_notify::NotifyState;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between looks at what the line says. A change of role is told at once.
const EVERY: Duration = Duration::from_secs(2);

/// What the line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// What the host may do.
    pub role: RoleStatus,
    /// Databases that have had a transaction.
    pub databases: usize,
    /// Those of them that are set aside.
    pub quarantined: usize,
    /// Nodes that follow this one now.
    pub followers: usize,
    /// On a replica, how long something has been missing.
    pub lag: Duration,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let role = &self.role;
        match (role.name, &role.upstream) {
            (RoleName::Replica, Some(upstream)) => {
                let name = upstream.hostname.as_deref().unwrap_or(&upstream.url);
                write!(f, "replica of {name}, epoch {}", role.epoch)?;
                if upstream.connected {
                    write!(f, ", {} ms behind", self.lag.as_millis())?;
                } else {
                    write!(f, ", NOT CONNECTED")?;
                }
            }
            (name, _) => write!(f, "{}, epoch {}", name.as_str(), role.epoch)?,
        }
        write!(f, "; {}", counted(self.databases, "database"))?;
        if self.quarantined > 0 {
            write!(f, ", {} QUARANTINED", self.quarantined)?;
        }
        write!(f, ", {}", counted(self.followers, "follower"))
    }
}

fn counted(count: usize, what: &str) -> String {
    match count {
        0 => format!("no {what}s"),
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    }
}

/// Says that a reload has begun; [`ready`] ends it.
pub fn reloading() {
    let states = [Some(NotifyState::Reloading), NotifyState::monotonic_usec_now().ok()];
    let _ = sd_notify::notify(&states.into_iter().flatten().collect::<Vec<_>>());
}

/// Says that the mount is there and everything is served.
pub fn ready(service: &impl Service) {
    fds::close_unclaimed();
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&service.summary().to_string())]);
}

/// Says that the agent stops.
pub fn stopping() {
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
}

/// What the service manager is told while the agent runs.
pub trait Service: Send + Sync + 'static {
    /// For the status line.
    fn summary(&self) -> Summary;
    /// Goes the way of a request through all parts of the agent; returns when all have answered.
    fn probe(&self);
}

/// Keeps systemd informed until `stop`: status line, watchdog, targets of the role. `roles` wakes it.
pub fn keep_informed<S: Service, R: Send + Sync + 'static>(
    service: Arc<S>,
    cluster: &str,
    mut roles: watch::Receiver<R>,
    stop: CancellationToken,
) {
    if !fds::is_service() {
        return;
    }
    let probed = service.clone();
    tokio::spawn(watchdog::run(Arc::new(move || probed.probe()), stop.clone()));
    let mut targets = Targets::of(cluster);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut shown = String::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = roles.changed() => if changed.is_err() { return },
                _ = ticks.tick() => {}
            }
            roles.mark_unchanged();
            let service = service.clone();
            let work = tokio::task::spawn_blocking(move || {
                let summary = service.summary();
                if let Some(targets) = &mut targets {
                    targets.follow(summary.role.name);
                }
                (summary.to_string(), targets)
            });
            let Ok((line, kept)) = work.await else { return };
            targets = kept;
            if line != shown {
                let _ = sd_notify::notify(&[NotifyState::Status(&line)]);
                shown = line;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::api::UpstreamStatus;

    fn primary() -> Summary {
        let role =
            RoleStatus { name: RoleName::Primary, epoch: 3, since_unix_ms: 0, upstream: None, waits: None };
        Summary { role, databases: 2, quarantined: 0, followers: 1, lag: Duration::ZERO }
    }

    #[test]
    fn the_line_says_what_matters_for_each_role() {
        assert_eq!(primary().to_string(), "primary, epoch 3; 2 databases, 1 follower");
        let mut replica = primary();
        replica.role.name = RoleName::Replica;
        replica.role.upstream = Some(UpstreamStatus {
            url: "http://host-a:20202".into(),
            hostname: Some("host-a".into()),
            connected: true,
            last_heartbeat_unix_ms: None,
        });
        replica.lag = Duration::from_millis(12);
        replica.followers = 0;
        let text = replica.to_string();
        assert_eq!(text, "replica of host-a, epoch 3, 12 ms behind; 2 databases, no followers");
        replica.quarantined = 1;
        replica.role.upstream.as_mut().unwrap().connected = false;
        replica.role.upstream.as_mut().unwrap().hostname = None;
        let text = replica.to_string();
        let expected = "replica of http://host-a:20202, epoch 3, NOT CONNECTED; 2 databases, 1 QUARANTINED, no followers";
        assert_eq!(text, expected);
    }
}
