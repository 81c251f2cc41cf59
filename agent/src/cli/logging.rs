//! Where the agent's messages go: text on a terminal, fields in the journal under systemd, JSON on request.

use crate::config::{LogFormat, LogLevel, LogOutputConfig};
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Layer, Registry, fmt, reload};

/// Changes the level of the running process.
static LEVEL: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Our own crates; others only report what needs attention.
const OWN: [&str; 5] = ["litefs_agent", "litefs", "fuse_session", "sqlite_file", "ltx"];

/// Begins to write messages; to be called once.
///
/// # Errors
/// The journal was asked for and cannot be reached, or messages are already written.
pub fn init(output: LogOutputConfig) -> Result<(), String> {
    let format = match output.format {
        LogFormat::Auto if stderr_is_journal() => LogFormat::Journal,
        LogFormat::Auto => LogFormat::Human,
        format => format,
    };
    let layer = match format {
        LogFormat::Journal => tracing_journald::layer()
            .map_err(|error| {
                format!(
                    "cannot reach the journal: {error}; set log-output.format = \"human\" or start journald"
                )
            })?
            // A prefix would hide MESSAGE_ID and our own fields from `journalctl FIELD=`.
            .with_field_prefix(None)
            .with_syslog_identifier("litefs".to_owned())
            .boxed(),
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed(),
        LogFormat::Human | LogFormat::Auto => {
            let color = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            fmt::layer().with_ansi(color).with_target(false).with_writer(io::stderr).boxed()
        }
    };
    let (filter, handle) = reload::Layer::new(filter(output.level));
    tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init()
        .map_err(|error| format!("cannot begin to write messages: {error}"))?;
    let _ = LEVEL.set(handle);
    Ok(())
}

/// Changes the least important level that is shown, after a reload.
pub fn set_level(level: LogLevel) {
    if let Some(handle) = LEVEL.get() {
        // It fails only when the subscriber is gone, and then nothing is shown at all.
        let _ = handle.reload(filter(level));
    }
}

fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new()
        .with_default(LevelFilter::WARN.min(level))
        .with_targets(OWN.map(|target| (target, level)))
        // It reports as an error that a killed application no longer wants its answer.
        .with_target("fuser", LevelFilter::OFF)
}

/// Whether systemd connected stderr to the journal: it says so as `device:inode` (systemd.exec(5)), and the
/// variable is inherited by processes that send stderr elsewhere.
fn stderr_is_journal() -> bool {
    let Ok(stat) = nix::sys::stat::fstat(io::stderr().as_fd()) else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn the_level_is_for_our_own_messages_and_others_only_warn() {
        let filter = filter(LogLevel::Debug);
        assert!(filter.would_enable("litefs_agent::ship", &Level::DEBUG));
        assert!(!filter.would_enable("litefs_agent::ship", &Level::TRACE));
        assert!(filter.would_enable("h2::proto", &Level::WARN));
        assert!(!filter.would_enable("h2::proto", &Level::INFO));
        let quiet = super::filter(LogLevel::Error);
        assert!(!quiet.would_enable("h2::proto", &Level::WARN));
    }
}
