//! Names of databases: a path below the cluster's directory.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Longest escaped name in bytes: the sidecar `<escaped>.sum` must fit in one directory entry (255 bytes).
pub const ESCAPED_BYTES_MAX: usize = 240;

/// Ends of the names of files that SQLite keeps beside a database while it is in use.
pub const BESIDE: [&str; 3] = ["-wal", "-shm", "-journal"];

/// A database's path relative to the cluster's directory, such as `app/config.db`: UTF-8, no empty, `.` or
/// `..` component, never absolute. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatabaseName(Arc<str>);

/// Why a path cannot name a database.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// Not a plain relative UTF-8 path.
    #[error("database name {0:?} is not a plain relative UTF-8 path")]
    NotPlain(String),
    /// Longer than [`ESCAPED_BYTES_MAX`] once escaped.
    #[error("database name {0:?} is longer than {ESCAPED_BYTES_MAX} bytes (each '/' and '%' counts three)")]
    TooLong(String),
}

impl TryFrom<String> for DatabaseName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        DatabaseName::new(text)
    }
}

impl From<DatabaseName> for String {
    fn from(name: DatabaseName) -> String {
        name.0.as_ref().to_owned()
    }
}

impl DatabaseName {
    /// Checks a relative path.
    pub fn new(path: impl AsRef<Path>) -> Result<Self, NameError> {
        let path = path.as_ref();
        let not_plain = || NameError::NotPlain(path.to_string_lossy().into_owned());
        let text = path.to_str().ok_or_else(not_plain)?;
        let plain = !text.is_empty()
            && !text.contains('\0')
            && path.components().all(|c| matches!(c, Component::Normal(_)))
            && path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
        if !plain {
            return Err(not_plain());
        }
        let name = DatabaseName(text.into());
        if name.escaped().len() > ESCAPED_BYTES_MAX {
            return Err(NameError::TooLong(text.into()));
        }
        Ok(name)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// One directory entry that stands for the name: `/` is written `%2F` and `%` is written `%25`.
    pub fn escaped(&self) -> String {
        self.0.replace('%', "%25").replace('/', "%2F")
    }

    /// Undoes [`DatabaseName::escaped`].
    pub fn from_escaped(entry: &str) -> Result<Self, NameError> {
        Self::new(entry.replace("%2F", "/").replace("%25", "%"))
    }
}

impl AsRef<Path> for DatabaseName {
    fn as_ref(&self) -> &Path {
        Path::new(&*self.0)
    }
}

impl fmt::Display for DatabaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DatabaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_paths_are_names() {
        for good in ["a", "a.db", "app/config.db", "100%.db", "a%2Fb"] {
            let name = DatabaseName::new(good).unwrap();
            assert_eq!(DatabaseName::from_escaped(&name.escaped()).unwrap(), name);
        }
        for bad in ["", "/a", "../a", "a/../b", "./a", "a//b", "a/", "a\0b", "."] {
            assert!(DatabaseName::new(bad).is_err(), "{bad:?}");
        }
        assert!(matches!(DatabaseName::new("x".repeat(241)), Err(NameError::TooLong(_))));
    }
}
