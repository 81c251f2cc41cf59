//! Asks systemd over the system bus to start or reload a unit, and waits for the job.

use super::HookError;
use crate::DatabaseName;
use crate::config::UnitVerb;
use futures_util::StreamExt;
use std::fmt::Write;
use std::path::Path;
use zbus::{OwnedObjectPath, proxy};

#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Systemd {
    fn subscribe(&self) -> zbus::Result<()>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn try_restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reload_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reload_or_restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reload_or_try_restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: zbus::ObjectPath<'_>, unit: &str, result: &str) -> zbus::Result<()>;
}

/// Whether a unit's name wants an instance.
pub fn is_template(unit: &str) -> bool {
    unit.contains("@.")
}

/// The unit for a database: a template's instance, or the unit itself.
pub fn instance_of(unit: &str, database: &DatabaseName) -> String {
    match unit.split_once("@.") {
        Some((prefix, kind)) => format!("{prefix}@{}.{kind}", escape(database.as_str())),
        None => unit.to_owned(),
    }
}

/// As systemd-escape(1).
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'/' => escaped.push('-'),
            b'.' if at == 0 => escaped.push_str("\\x2e"),
            b':' | b'_' | b'.' => escaped.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => escaped.push(char::from(byte)),
            _ => {
                // Writing to a string does not fail.
                let _ = write!(escaped, "\\x{byte:02x}");
            }
        }
    }
    escaped
}

/// Writes variables as an `EnvironmentFile=` of systemd.exec(5).
pub async fn write_environment(path: &Path, variables: &[(&'static str, String)]) -> Result<(), HookError> {
    let mut text = String::new();
    for (name, value) in variables {
        let mut quoted = String::with_capacity(value.len());
        for c in value.chars() {
            if matches!(c, '"' | '\\' | '$' | '`') {
                quoted.push('\\');
            }
            quoted.push(c);
        }
        let _ = writeln!(text, "{name}=\"{quoted}\"");
    }
    let to = path.to_owned();
    let written = tokio::task::spawn_blocking(move || {
        if let Some(dir) = to.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let new = to.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, to)
    });
    let written = written.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    written.map_err(|source| HookError::Environment { path: path.to_owned(), source })
}

/// Has a job done and waits for its end.
pub async fn run(unit: &str, verb: UnitVerb) -> Result<(), HookError> {
    let failed = |reason: String| HookError::Unit { unit: unit.to_owned(), verb: verb.as_str(), reason };
    let result = job(unit, verb).await.map_err(|error| failed(error.to_string()))?;
    if result == "done" { Ok(()) } else { Err(failed(format!("the job's result is {result:?}"))) }
}

async fn job(unit: &str, verb: UnitVerb) -> zbus::Result<String> {
    let connection = zbus::Connection::system().await?;
    let systemd = SystemdProxy::new(&connection).await?;
    systemd.subscribe().await?;
    // Listening before asking: a job may be over before its name is known.
    let mut removed = systemd.receive_job_removed().await?;
    let mode = "replace";
    let job = match verb {
        UnitVerb::Start => systemd.start_unit(unit, mode).await,
        UnitVerb::Restart => systemd.restart_unit(unit, mode).await,
        UnitVerb::TryRestart => systemd.try_restart_unit(unit, mode).await,
        UnitVerb::Reload => systemd.reload_unit(unit, mode).await,
        UnitVerb::ReloadOrRestart => systemd.reload_or_restart_unit(unit, mode).await,
        UnitVerb::TryReloadOrRestart => systemd.reload_or_try_restart_unit(unit, mode).await,
    }?;
    while let Some(signal) = removed.next().await {
        let args = signal.args()?;
        if args.job.as_str() == job.as_str() {
            return Ok(args.result.to_owned());
        }
    }
    Err(zbus::Error::Failure("the bus went away while the job was running".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(name: &str) -> DatabaseName {
        DatabaseName::new(name).unwrap()
    }

    #[test]
    fn a_template_gets_the_database_as_its_instance() {
        assert_eq!(instance_of("nginx.service", &database("a.db")), "nginx.service");
        assert_eq!(instance_of("r@.service", &database("app/a-b.db")), "r@app-a\\x2db.db.service");
        assert_eq!(instance_of("r@.service", &database(".a")), "r@\\x2ea.service");
        assert!(!is_template("r@one.service"));
    }

    #[tokio::test]
    async fn an_environment_file_quotes_what_systemd_would_take_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hooks/h.env");
        let variables = [("LITEFS_HOOK", "h".to_owned()), ("LITEFS_DATABASE", "a \"b\" $c\\.db".to_owned())];
        write_environment(&path, &variables).await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "LITEFS_HOOK=\"h\"\nLITEFS_DATABASE=\"a \\\"b\\\" \\$c\\\\.db\"\n");
    }
}
