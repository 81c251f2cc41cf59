//! What a hook has run for: one small file per database, with the position.
//!
//! Nothing is synced: what a power failure takes away is run for once more.

use crate::DatabaseName;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

/// The files of one hook.
#[derive(Clone, Debug)]
pub struct Memory {
    dir: PathBuf,
}

impl Memory {
    /// Files below `dir`, which is made when there is something to remember.
    pub fn new(dir: PathBuf) -> Memory {
        Memory { dir }
    }

    /// Everything that is remembered. A file that cannot be read is as good as none.
    pub fn all(&self) -> HashMap<DatabaseName, String> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| DatabaseName::from_escaped(entry.file_name().to_str()?).ok());
        names.filter_map(|name| Some((name.clone(), self.get(&name)?))).collect()
    }

    /// The position that the hook ran for.
    pub fn get(&self, name: &DatabaseName) -> Option<String> {
        let text = std::fs::read_to_string(self.dir.join(name.escaped())).ok()?;
        Some(text.trim_end().to_owned())
    }

    /// The hook ran for this position.
    pub fn remember(&self, name: &DatabaseName, position: &str) -> io::Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        // Escaped names have no slash; this one is no escaped name.
        let temporary = self.dir.join("%new");
        std::fs::write(&temporary, format!("{position}\n"))?;
        std::fs::rename(temporary, self.dir.join(name.escaped()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_remembered_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::new(dir.path().join("hook"));
        let (a, b) = (DatabaseName::new("a.db").unwrap(), DatabaseName::new("app/%b.db").unwrap());
        assert!(memory.all().is_empty());
        memory.remember(&a, "1/2").unwrap();
        memory.remember(&a, "2/3").unwrap();
        memory.remember(&b, "7/8").unwrap();
        let again = Memory::new(dir.path().join("hook"));
        assert_eq!(again.all(), HashMap::from([(a, "2/3".to_owned()), (b.clone(), "7/8".to_owned())]));
        assert_eq!(again.get(&b).as_deref(), Some("7/8"));
    }
}
