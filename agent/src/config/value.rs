//! Values as they are written: sizes, durations, and the types of TOML.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use toml::de::DeValue;

/// A value as it was given, before anything is known of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// A TOML string.
    Text(String),
    /// A TOML integer.
    Integer(i64),
    /// A TOML array of strings.
    Texts(Vec<String>),
    /// A TOML boolean.
    Boolean(bool),
    /// From the command line, where nothing tells a number from a text.
    Bare(String),
    /// Any other TOML type, by its name.
    Other(&'static str),
}

impl Value {
    pub(super) fn from_toml(value: &DeValue<'_>) -> Value {
        match value {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Boolean(boolean) => Value::Boolean(*boolean),
            DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(integer) => Value::Integer(integer),
                Err(_) => Value::Other("integer that does not fit 64 bits"),
            },
            DeValue::Array(values) => {
                let texts = values.iter().map(|value| match value.get_ref() {
                    DeValue::String(text) => Some(text.to_string()),
                    _ => None,
                });
                texts.collect::<Option<_>>().map_or(Value::Other("array of other than strings"), Value::Texts)
            }
            other => Value::Other(other.type_str()),
        }
    }

    fn is(&self) -> String {
        match self {
            Value::Text(text) | Value::Bare(text) => format!("{text:?}"),
            Value::Integer(integer) => integer.to_string(),
            Value::Texts(_) => "a TOML array".to_owned(),
            Value::Boolean(boolean) => boolean.to_string(),
            Value::Other(kind) => format!("a TOML {kind}"),
        }
    }

    /// A string, or an array of strings; on the command line, words with commas between them.
    pub(super) fn texts(&self) -> Result<Vec<String>, String> {
        match self {
            Value::Texts(texts) => Ok(texts.clone()),
            Value::Text(text) => Ok(vec![text.clone()]),
            Value::Bare(text) => {
                let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
                Ok(words.map(str::to_owned).collect())
            }
            _ => Err(format!("must be an array of strings, is {}", self.is())),
        }
    }

    pub(super) fn text(&self) -> Result<&str, String> {
        match self {
            Value::Text(text) | Value::Bare(text) => Ok(text),
            _ => Err(format!("must be a string in quotes, is {}", self.is())),
        }
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self) -> Result<bool, String> {
        match self {
            Value::Boolean(boolean) => Ok(*boolean),
            Value::Bare(text) if text == "true" || text == "false" => Ok(text == "true"),
            _ => Err(format!("must be true or false, is {}", self.is())),
        }
    }

    /// An integer from `min` to `max`.
    pub(super) fn integer(&self, min: i64, max: i64) -> Result<i64, String> {
        let integer = match self {
            Value::Integer(integer) => Some(*integer),
            Value::Bare(text) => text.parse().ok(),
            _ => None,
        };
        integer
            .filter(|integer| (min..=max).contains(integer))
            .ok_or_else(|| format!("must be a number from {min} to {max}, is {}", self.is()))
    }

    /// A number of bytes that is at least `min`: `"64MiB"`, or an integer.
    pub(super) fn size(&self, min: u64) -> Result<u64, String> {
        let size = match self {
            Value::Integer(integer) => u64::try_from(*integer).ok(),
            Value::Text(text) | Value::Bare(text) => parse_size(text),
            Value::Texts(_) | Value::Boolean(_) | Value::Other(_) => None,
        };
        let size = size.ok_or_else(|| {
            format!("must be a size such as \"512KiB\", \"64MiB\" or \"2GiB\", is {}", self.is())
        })?;
        if size < min {
            return Err(format!("must be at least \"{}\", is {}", show_size(min), self.is()));
        }
        Ok(size)
    }

    /// A duration that is at least `min`: `"100ms"`, `"10m"`, `"1h 30m"`.
    pub(super) fn duration(&self, min: Duration) -> Result<Duration, String> {
        static PARSER: jiff::fmt::friendly::SpanParser = jiff::fmt::friendly::SpanParser::new();
        let duration = match self {
            Value::Text(text) | Value::Bare(text) => PARSER.parse_unsigned_duration(text).ok(),
            _ => None,
        };
        let duration = duration.ok_or_else(|| {
            format!("must be a duration such as \"100ms\", \"5s\", \"10m\" or \"24h\", is {}", self.is())
        })?;
        if duration < min {
            return Err(format!("must be at least \"{}\", is {}", show_duration(min), self.is()));
        }
        Ok(duration)
    }
}

/// Units of sizes, largest first.
const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = unit.trim();
    let factor = if unit.is_empty() { 1 } else { UNITS.iter().find(|(name, _)| *name == unit)?.1 };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// A size the way it is read: the largest unit that shows it exactly.
pub(super) fn show_size(size: u64) -> String {
    let (name, factor) =
        UNITS.into_iter().find(|(_, factor)| size > 0 && size.is_multiple_of(*factor)).unwrap_or(("B", 1));
    format!("{}{name}", size / factor)
}

/// A duration the way it is read.
pub fn show_duration(duration: Duration) -> String {
    jiff::fmt::friendly::SpanPrinter::new().unsigned_duration_to_string(&duration)
}

/// An absolute path without `.` and `..`, or what is wrong with it.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path: PathBuf = Path::new(text).components().filter(|part| *part != Component::CurDir).collect();
    if !path.is_absolute()
        || path.components().any(|part| part == Component::ParentDir)
        || text.contains('\0')
    {
        return Err(format!("must be an absolute path without \"..\", is {text:?}"));
    }
    if path.parent().is_none() {
        return Err("must not be the root directory".to_owned());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown_in_binary_units() {
        for (text, bytes) in [("0", 0), ("1B", 1), ("3KiB", 3072), ("64MiB", 64 << 20), ("2 GiB", 2 << 30)] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
            assert_eq!(parse_size(&show_size(bytes)), Some(bytes));
        }
        for text in ["", "MiB", "1MB", "1.5MiB", "-1", "99999999999999999999", "16777216TiB", "1mib"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
        assert_eq!(show_size(32 << 20), "32MiB");
        assert_eq!(show_size(1025), "1025B");
    }

    #[test]
    fn durations_are_read_and_shown() {
        let read = |text: &str| Value::Text(text.into()).duration(Duration::ZERO);
        for (text, millis) in [("100ms", 100), ("1s", 1000), ("10m", 600_000), ("1h 30m", 5_400_000)] {
            assert_eq!(read(text).unwrap().as_millis(), millis, "{text}");
            assert_eq!(read(&show_duration(read(text).unwrap())).unwrap().as_millis(), millis);
        }
        for text in ["", "10", "-1s", "soon", "1 fortnight"] {
            assert!(read(text).is_err(), "{text}");
        }
        assert!(Value::Integer(5).duration(Duration::ZERO).unwrap_err().contains("is 5"));
        assert_eq!(
            Value::Text("1ms".into()).duration(Duration::from_millis(50)).unwrap_err(),
            "must be at least \"50ms\", is \"1ms\""
        );
    }

    #[test]
    fn a_value_of_the_wrong_type_says_what_it_is() {
        assert_eq!(Value::Integer(7).text().unwrap_err(), "must be a string in quotes, is 7");
        assert!(Value::Other("array").size(0).unwrap_err().contains("a TOML array"));
        assert_eq!(Value::Bare("7".into()).integer(1, 9), Ok(7));
        assert!(Value::Text("7".into()).integer(1, 9).is_err());
        assert!(Value::Integer(10).integer(1, 9).unwrap_err().contains("from 1 to 9"));
    }
}
