//! Where the agent's messages go: text on a terminal, fields in the journal under systemd, JSON on request.

use crate::config::{LogFormat, LogLevel, LogOutputConfig};
use crate::systemd::journal::Journal;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::field::{RecordFields, VisitOutput};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultVisitor, Writer};
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
        LogFormat::Journal => Journal::connect(ForPeople)
            .map_err(|error| {
                format!(
                    "cannot reach the journal: {error}; set log-output.format = \"human\" or start journald"
                )
            })?
            .boxed(),
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed(),
        LogFormat::Human | LogFormat::Auto => {
            let color = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            fmt::layer()
                .fmt_fields(ForPeople)
                .with_ansi(color)
                .with_target(false)
                .with_writer(io::stderr)
                .boxed()
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

/// Fields as tracing writes them, without what only the journal wants.
struct ForPeople;

/// The journal's name for the kind of a message.
const MESSAGE_ID: &str = "MESSAGE_ID";

impl<'writer> FormatFields<'writer> for ForPeople {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> std::fmt::Result {
        let mut visitor = WithoutId(DefaultVisitor::new(writer, true));
        fields.record(&mut visitor);
        visitor.0.finish()
    }
}

struct WithoutId<'a>(DefaultVisitor<'a>);

impl Visit for WithoutId<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != MESSAGE_ID {
            self.0.record_str(field, value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.0.record_error(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() != MESSAGE_ID {
            self.0.record_debug(field, value);
        }
    }
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
    fn ids_are_for_the_journal_and_not_for_people() {
        #[derive(Clone, Default)]
        struct Sink(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
        impl io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let writer = sink.clone();
        let layer = fmt::layer()
            .fmt_fields(ForPeople)
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::info!(MESSAGE_ID = "0123", epoch = 3, role = %"primary", "role changed");
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, " INFO role changed epoch=3 role=primary\n");
    }

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
