//! A scope of its own for the mount's guard. `systemctl kill`, the end of a stop that takes too long, and the kernel when memory
//! runs out kill all processes of a service at once; but a dead agent goes away only when the guard lets it go.

use super::jobs::{PATIENCE, own_unit, run};

/// Moves the guard out of this service's control group. Without that, which the journal tells of, all goes on as well as it can.
pub async fn separate(guard: u32) {
    let Some(unit) = super::fds::is_service().then(own_unit).flatten() else { return };
    let (name, guard) = (scope_of(&unit, guard), guard.to_string());
    // Stopped after the service, and not by a shutdown: it ends with the agent.
    let properties: [&[&str]; 5] = [
        &["PIDs", "au", "1", &guard],
        &["Before", "as", "1", &unit],
        &["DefaultDependencies", "b", "false"],
        &["CollectMode", "s", "inactive-or-failed"],
        &["Description", "s", "Guard of a LiteFS mount"],
    ];
    let count = properties.len().to_string();
    let method: [&[&str]; 2] = [
        &[
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
        ],
        &["StartTransientUnit", "ssa(sv)a(sa(sv))", &name, "fail", &count],
    ];
    let arguments = [method.concat(), properties.concat(), vec!["0"]].concat();
    let why = match tokio::time::timeout(PATIENCE, run("busctl", &arguments)).await {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => error,
        Err(_) => format!("systemd did not answer within {} s", PATIENCE.as_secs()),
    };
    tracing::warn!(
        error = why,
        "the mount's guard stays in this service's control group: if all of it is killed at once, applications may wait \
         for minutes until systemd starts the agent again"
    );
}

fn scope_of(unit: &str, guard: u32) -> String {
    let service = unit.strip_suffix(".service").unwrap_or(unit);
    format!("{}-guard-{guard}.scope", service.replace('@', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_named_after_services() {
        assert_eq!(scope_of("litefs@db.service", 7), "litefs-db-guard-7.scope");
    }
}
