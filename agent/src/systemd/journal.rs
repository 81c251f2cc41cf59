//! Messages to the journal, with every field of an event as a field of the entry. The text that `journalctl` shows names
//! them too: an operator sees why something failed without asking for all fields.
//!
//! The protocol is systemd's "Native Journal Protocol": one datagram per entry, `NAME=value` lines, and for values with
//! line breaks the name, a line break, 64 bits of length, little-endian, and the value.

use std::fmt::Write;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::layer::{Context, Layer};

const SOCKET: &str = "/run/systemd/journal/socket";

/// Longer values are cut, so that an entry fits into a datagram.
const VALUE_BYTES_MAX: usize = 16 << 10;

/// Writes events to the journal. `F` makes the text of an entry.
pub struct Journal<F> {
    socket: UnixDatagram,
    format: F,
}

impl<F> Journal<F> {
    /// # Errors
    /// There is no journal.
    pub fn connect(format: F) -> io::Result<Self> {
        Self::connect_to(Path::new(SOCKET), format)
    }

    fn connect_to(path: &Path, format: F) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        Ok(Journal { socket, format })
    }
}

impl<S, F> Layer<S> for Journal<F>
where
    S: Subscriber,
    F: for<'w> FormatFields<'w> + 'static,
{
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.format.format_fields(Writer::new(&mut text), event);
        let mut entry = Entry::default();
        entry.put("MESSAGE", &text);
        let metadata = event.metadata();
        entry.put("PRIORITY", priority(metadata.level()));
        entry.put("SYSLOG_IDENTIFIER", "litefs");
        entry.put("TARGET", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            entry.put("CODE_FILE", file);
            entry.put("CODE_LINE", &line.to_string());
        }
        event.record(&mut entry);
        // If the journal takes nothing there is nobody to tell.
        let _ = self.socket.send(&entry.0);
    }
}

/// As in syslog.
fn priority(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        _ => "7",
    }
}

/// The bytes of one entry.
#[derive(Default)]
struct Entry(Vec<u8>);

impl Entry {
    fn put(&mut self, name: &str, value: &str) {
        let mut end = value.len().min(VALUE_BYTES_MAX);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        let value = &value.as_bytes()[..end];
        self.0.extend(name.as_bytes());
        if value.contains(&b'\n') {
            self.0.push(b'\n');
            self.0.extend((value.len() as u64).to_le_bytes());
        } else {
            self.0.push(b'=');
        }
        self.0.extend(value);
        self.0.push(b'\n');
    }

    fn put_field(&mut self, field: &Field, value: &str) {
        // The text has it already.
        if field.name() != "message" {
            self.put(&field_name(field.name()), value);
        }
    }
}

/// Names of the journal have upper-case letters, digits and underscores, and a letter first.
fn field_name(name: &str) -> String {
    let mut upper = String::with_capacity(name.len());
    for c in name.trim_start_matches(|c: char| !c.is_ascii_alphabetic()).chars() {
        upper.push(if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    }
    upper
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put_field(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        self.put_field(field, &text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::fmt::format::DefaultFields;
    use tracing_subscriber::prelude::*;

    fn entry(log: impl FnOnce()) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        let layer = Journal::connect_to(&path, DefaultFields::new()).unwrap();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let mut bytes = vec![0; 1 << 20];
        let length = journal.recv(&mut bytes).unwrap();
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn text_and_fields_say_both_what_and_why() {
        let bytes = entry(|| {
            tracing::error!(error = %"no such host", database = "app.db", epoch = 3, MESSAGE_ID = "ab", "cannot follow");
        });
        let text = String::from_utf8(bytes).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("MESSAGE=cannot follow error=no such host database=\"app.db\" epoch=3"),
            "{text}"
        );
        for line in ["PRIORITY=3", "ERROR=no such host", "DATABASE=app.db", "EPOCH=3", "MESSAGE_ID=ab"] {
            assert!(lines.contains(&line), "{line} is not in {text}");
        }
    }

    #[test]
    fn a_value_with_line_breaks_is_sent_with_its_length() {
        let bytes = entry(|| tracing::warn!(error = "line 1\nline 2"));
        let mut expected = b"ERROR\n".to_vec();
        expected.extend(13u64.to_le_bytes());
        expected.extend(b"line 1\nline 2\n");
        assert!(bytes.windows(expected.len()).any(|part| part == expected), "{bytes:?}");
    }

    #[test]
    fn a_value_that_does_not_fit_is_cut_between_characters() {
        let long = "ä".repeat(VALUE_BYTES_MAX);
        let bytes = entry(|| tracing::info!(text = %long));
        assert!(bytes.len() < 3 * VALUE_BYTES_MAX && String::from_utf8(bytes).is_ok());
    }
}
