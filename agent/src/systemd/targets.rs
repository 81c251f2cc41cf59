//! `litefs-primary@<cluster>.target` and `litefs-replica@<cluster>.target`: one of them is active, by the role of this
//! host. A service that belongs to one of them (`WantedBy=` and `PartOf=`) runs only there.

use super::jobs::systemctl;
use crate::status::api::RoleName;
use std::process::Command;
use std::time::Duration;

/// How long the agent waits for the services of its role to stop, before it stops itself.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// The targets of the unit that this process is the main process of.
#[derive(Debug)]
pub struct Targets {
    cluster: String,
    /// What was asked for last.
    role: Option<RoleName>,
}

impl Targets {
    /// `None` unless this process runs as `litefs@<cluster>.service`.
    pub fn of(cluster: &str) -> Option<Targets> {
        let cgroups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        is_in_unit(&cgroups, cluster).then(|| Targets { cluster: cluster.to_owned(), role: None })
    }

    /// Starts the target of a role, which stops the other. Blocks for as long as asking systemd takes.
    pub fn follow(&mut self, role: RoleName) {
        if self.role == Some(role) {
            return;
        }
        let mut command = Command::new("systemctl");
        // The job waits for this service to be ready, so nobody may wait for the job.
        command.args(["--no-block", "--no-ask-password"]).args(arguments(&self.cluster, role));
        match command.output() {
            Ok(output) if output.status.success() => self.role = Some(role),
            Ok(output) => tracing::warn!(
                role = role.as_str(),
                error = %String::from_utf8_lossy(&output.stderr).trim_end(),
                "systemd did not take the job that starts the target of this role"
            ),
            Err(error) => tracing::warn!(%error, "cannot run systemctl"),
        }
    }
}

fn arguments(cluster: &str, role: RoleName) -> Vec<String> {
    let target = |role: &str| format!("litefs-{role}@{cluster}.target");
    match role {
        RoleName::Primary => vec!["start".into(), target("primary")],
        RoleName::Replica => vec!["start".into(), target("replica")],
        RoleName::None => vec!["stop".into(), target("primary"), target("replica")],
    }
}

/// Stops the targets of the cluster, and waits for what belongs to them: applications stop while the agent still serves
/// them. Not for an agent that is only being restarted.
///
/// (No dependency of units does this: those that would stop the targets with the agent also stop them when it is
/// restarted or dies.)
pub async fn stop(cluster: &str) {
    if Targets::of(cluster).is_none() {
        return;
    }
    let stop = arguments(cluster, RoleName::None);
    let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
    match tokio::time::timeout(STOP_PATIENCE, systemctl(&stop)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(error, "cannot stop the services of this host's role"),
        Err(_) => tracing::warn!("stopping although services of this host's role still run"),
    }
}

/// Whether `/proc/<pid>/cgroup` is that of the cluster's service.
fn is_in_unit(cgroups: &str, cluster: &str) -> bool {
    let unit = format!("/litefs@{cluster}.service");
    cgroups.lines().any(|line| line.ends_with(&unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cluster_s_own_unit_has_targets() {
        let cgroups = "12:cpu:/\n0::/system.slice/system-litefs.slice/litefs@db.service\n";
        assert!(is_in_unit(cgroups, "db"));
        assert!(!is_in_unit(cgroups, "b") && !is_in_unit(cgroups, "shop"));
        assert!(!is_in_unit("0::/user.slice/user-0.slice/session-1.scope\n", "db"));
        assert!(!is_in_unit("0::/system.slice/app.service/litefs@db.service/child\n", "db"));
    }

    #[test]
    fn a_host_without_a_role_is_in_neither_target() {
        assert_eq!(arguments("db", RoleName::Primary), ["start", "litefs-primary@db.target"]);
        assert_eq!(arguments("db", RoleName::Replica), ["start", "litefs-replica@db.target"]);
        let none = ["stop", "litefs-primary@db.target", "litefs-replica@db.target"];
        assert_eq!(arguments("db", RoleName::None), none);
    }
}
