//! Events of the journal that have a stable `MESSAGE_ID`, as in `/usr/lib/systemd/catalog/litefs.catalog`.
//!
//! An id is given to an event by the field `MESSAGE_ID`; the journal's own names (`DATABASE`, `EPOCH`, ...) come from
//! the event's other fields. An id is never changed or used for something else.

/// The role of this host changed.
pub const ROLE_CHANGED: &str = "97599f13c5304e66b906fde5f7c54bf5";
/// The stream from the upstream is up.
pub const UPSTREAM_CONNECTED: &str = "bde8628e7dbb43c6bcecddfbb2ede195";
/// The stream from the upstream ended.
pub const UPSTREAM_LOST: &str = "5c8cae4deb764a9fa45e3534b997d814";
/// A follower's stream ended.
pub const FOLLOWER_LOST: &str = "783f74193d374ed7bb7baf90dcf742e6";
/// A database had transactions that the primary does not have.
pub const DIVERGED: &str = "55d29e5d7c3e49179975503000847957";
/// A database cannot be trusted and stands aside.
pub const QUARANTINED: &str = "6a63a52442824009bcd654faf778575c";
/// A part of the commit log cannot be read.
pub const LOG_DAMAGED: &str = "c7805d2afaa240dcb682cc5cb7d717f3";
/// A database was taken in anew: its history is gone.
pub const HISTORY_LOST: &str = "2fc03b11b9e7465db087ff119d982bc6";
/// A write was refused because the disk is full.
pub const DISK_FULL: &str = "0b4c790e2d744fc89e3f28b5f3600d5e";
/// Records were removed that a follower has not taken yet.
pub const RETENTION_CUT: &str = "292b5cf3a8444850a9b5999d29a5d9c3";
/// A reload found mistakes in the configuration.
pub const CONFIGURATION_REFUSED: &str = "2e7c72dc445f4cfcb160c4d532a172aa";
/// Commits of synchronous databases fare differently now.
pub const SYNC_STATE: &str = "ef3e8d97d71d472b860af993e39f154c";
/// A hook failed.
pub const HOOK_FAILED: &str = "fb2a8ecb3cd64ed69db43252a34bae9d";

/// All of them: name in this module, and id.
#[cfg(test)]
const ALL: [(&str, &str); 13] = [
    ("ROLE_CHANGED", ROLE_CHANGED),
    ("UPSTREAM_CONNECTED", UPSTREAM_CONNECTED),
    ("UPSTREAM_LOST", UPSTREAM_LOST),
    ("FOLLOWER_LOST", FOLLOWER_LOST),
    ("DIVERGED", DIVERGED),
    ("QUARANTINED", QUARANTINED),
    ("LOG_DAMAGED", LOG_DAMAGED),
    ("HISTORY_LOST", HISTORY_LOST),
    ("DISK_FULL", DISK_FULL),
    ("RETENTION_CUT", RETENTION_CUT),
    ("CONFIGURATION_REFUSED", CONFIGURATION_REFUSED),
    ("SYNC_STATE", SYNC_STATE),
    ("HOOK_FAILED", HOOK_FAILED),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn here() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn the_catalogue_has_each_id_and_no_other() {
        let catalogue = fs::read_to_string(here().join("../packaging/catalog/litefs.catalog")).unwrap();
        let entries: Vec<&str> = catalogue.lines().filter_map(|line| line.strip_prefix("-- ")).collect();
        let known: BTreeSet<&str> = entries.iter().copied().collect();
        assert_eq!(known.len(), entries.len(), "an id is there twice");
        assert_eq!(known, ALL.iter().map(|(_, id)| *id).collect::<BTreeSet<_>>());
        for id in known {
            assert!(
                id.len() == 32 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)),
                "{id}"
            );
        }
    }

    /// The fields that an entry names in `@...@` are given to the event, somewhere.
    #[test]
    fn each_id_is_used_with_the_fields_that_its_entry_names() {
        let mut sources = Vec::new();
        collect(&here().join("src"), &mut sources);
        let catalogue = fs::read_to_string(here().join("../packaging/catalog/litefs.catalog")).unwrap();
        for (name, id) in ALL {
            let name = format!("messages::{name}");
            let events: Vec<&str> = sources
                .iter()
                .flat_map(|text| text.split("MESSAGE_ID = ").skip(1))
                .map(|event| event.split(");\n").next().unwrap_or_default())
                .filter(|event| {
                    event
                        .lines()
                        .next()
                        .is_some_and(|first| first.split([',', ')']).any(|word| word.ends_with(&name)))
                })
                .collect();
            assert!(!events.is_empty(), "no event has {name}");
            let entry = catalogue.split(&format!("-- {id}\n")).nth(1).unwrap().split("\n-- ").next().unwrap();
            let is_field = |word: &&str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_uppercase());
            for field in entry.split('@').filter(is_field).map(str::to_lowercase) {
                for event in &events {
                    assert!(event.contains(&field), "an event with {name} has no {field}: {event}");
                }
            }
        }
    }

    fn collect(dir: &Path, sources: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, sources);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !path.ends_with("messages.rs")
            {
                sources.push(fs::read_to_string(&path).unwrap());
            }
        }
    }
}
