//! What a name in the mount stands for. SQLite derives the names of a database's companions from its own
//! (`-journal`, `-wal`, `-shm`, and `-mjXXXXXXXXX` for the super-journal of a commit over several databases).

use std::path::{Path, PathBuf};

/// Kind of a regular file, told by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A database, or any other plain file.
    Main,
    /// A rollback journal.
    Journal,
    /// A write-ahead log.
    Wal,
    /// A wal-index.
    Shm,
    /// A super-journal: kept like a plain file, never a database.
    SuperJournal,
}

/// Suffix of the special file that shows a database's position.
pub const POSITION_SUFFIX: &str = "-pos";

/// Splits a path below the mount into its kind and the path of the database it belongs to.
pub fn classify(path: &Path) -> (Kind, PathBuf) {
    let Some(text) = path.to_str() else { return (Kind::Main, path.to_owned()) };
    for (suffix, kind) in [("-journal", Kind::Journal), ("-wal", Kind::Wal), ("-shm", Kind::Shm)] {
        if let Some(base) = text.strip_suffix(suffix)
            && !base.is_empty()
            && !base.ends_with('/')
        {
            return (kind, PathBuf::from(base));
        }
    }
    if let Some((base, digits)) = text.rsplit_once("-mj")
        && digits.len() == 9
        && digits.bytes().all(|b| b.is_ascii_hexdigit())
    {
        return (Kind::SuperJournal, PathBuf::from(base));
    }
    (Kind::Main, path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_are_told_from_databases() {
        let of = |p: &str| {
            let (kind, base) = classify(Path::new(p));
            (kind, base.to_str().unwrap().to_owned())
        };
        assert_eq!(of("app/x.db"), (Kind::Main, "app/x.db".into()));
        assert_eq!(of("app/x.db-journal"), (Kind::Journal, "app/x.db".into()));
        assert_eq!(of("x.db-wal"), (Kind::Wal, "x.db".into()));
        assert_eq!(of("x.db-shm"), (Kind::Shm, "x.db".into()));
        assert_eq!(of("x.db-mj0123ABCD9"), (Kind::SuperJournal, "x.db".into()));
        assert_eq!(of("x.db-mj0123"), (Kind::Main, "x.db-mj0123".into()));
        assert_eq!(of("app/-wal"), (Kind::Main, "app/-wal".into()));
    }
}
