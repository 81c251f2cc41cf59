//! What systemd is about to do with this service.

use std::time::Duration;
use tokio::process::Command;

/// A service manager that does not answer for so long is not waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Whether systemd stops this service in order to start it again. When that cannot be found out it is taken for a stop,
/// and the journal says why.
pub async fn is_restarting() -> bool {
    let Some(unit) = super::fds::is_service().then(own_unit).flatten() else { return false };
    match tokio::time::timeout(PATIENCE, systemctl(&["list-jobs", "--plain", "--no-legend", "--full"])).await
    {
        Ok(Ok(jobs)) => has_restart(&jobs, &unit),
        Ok(Err(error)) => {
            tracing::warn!(error, "cannot ask systemd whether this is a restart; taken for a stop");
            false
        }
        Err(_) => {
            tracing::warn!(
                "systemd did not say within {} s whether this is a restart; taken for a stop",
                PATIENCE.as_secs()
            );
            false
        }
    }
}

/// Runs `systemctl` and returns what it printed, or why it failed.
pub(super) async fn systemctl(arguments: &[&str]) -> Result<String, String> {
    run("systemctl", &[&["--no-ask-password"], arguments].concat()).await
}

/// Runs a program of systemd and returns what it printed, or why it failed.
pub(super) async fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).kill_on_drop(true).output().await;
    let output = output.map_err(|error| format!("cannot run {program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim_end().to_owned()),
    }
}

/// Whether `systemctl list-jobs` (`JOB UNIT TYPE STATE` in each line) has a restart of the unit.
fn has_restart(jobs: &str, unit: &str) -> bool {
    jobs.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(unit) && words.next() == Some("restart")
    })
}

/// The unit that this process belongs to, by its control group.
pub(super) fn own_unit() -> Option<String> {
    unit_of(&std::fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// The service in a `/proc/<pid>/cgroup`.
fn unit_of(cgroups: &str) -> Option<String> {
    let named = cgroups.lines().filter_map(|line| {
        let (_, controllers_and_path) = line.split_once(':')?;
        let (controllers, path) = controllers_and_path.split_once(':')?;
        matches!(controllers, "" | "name=systemd").then_some(path)
    });
    let mut units = named.filter_map(|path| path.rsplit('/').find(|part| part.ends_with(".service")));
    units.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_told_from_a_stop() {
        let jobs = "1234 litefs@db.service restart running\n1300 litefs@shop.service stop running\n";
        assert!(has_restart(jobs, "litefs@db.service"));
        assert!(!has_restart(jobs, "litefs@shop.service"));
        assert!(!has_restart("", "litefs@db.service"));
    }

    #[test]
    fn the_unit_is_the_innermost_service_of_systemd_s_hierarchy() {
        let cgroups = "12:cpu:/a.service\n0::/system.slice/system-litefs.slice/litefs@db.service\n";
        assert_eq!(unit_of(cgroups).as_deref(), Some("litefs@db.service"));
        let legacy = "12:cpu:/\n1:name=systemd:/system.slice/litefs@db.service/child\n0::/\n";
        assert_eq!(unit_of(legacy).as_deref(), Some("litefs@db.service"));
        assert_eq!(unit_of("0::/user.slice/session-1.scope\n"), None);
    }
}
