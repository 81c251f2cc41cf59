//! The door that hosts have: FUSE, or with `LITEFS_TEST_DOOR=preload` the preload door for the whole suite.
//!
//! Test programs then run with the library themselves, as every program does that they start; only agents do without.
//! The library looks for agents in the directories below `LITEFS_RUNTIME_DIR`, and knows a limited number of them: hosts
//! take one of a fixed number of places there and give it back.

use crate::wait::{PATIENCE, wait_for};
use std::fs;
use std::path::{Path, PathBuf};

/// Hosts at a time: the library in one process knows so many agents.
const PLACES: usize = 16;

/// Whether hosts have the preload door where a test does not say which.
pub fn is_preload() -> bool {
    match std::env::var("LITEFS_TEST_DOOR").as_deref() {
        Ok("preload") => true,
        Ok("fuse") | Err(_) => false,
        Ok(other) => panic!("LITEFS_TEST_DOOR={other}: there are fuse and preload"),
    }
}

/// Says whether this test has to be left out of this run, because what it is about exists behind FUSE only.
pub fn is_about_fuse(reason: &str) -> bool {
    let skipped = is_preload();
    if skipped {
        eprintln!("left out behind the preload door: {reason}");
    }
    skipped
}

/// Where a host's agent meets the library.
#[derive(Debug)]
pub struct Place(PathBuf);

impl Place {
    /// A free one; waits until another test gives one back.
    pub fn take() -> Place {
        let loaded = fs::read_to_string("/proc/self/maps").is_ok_and(|maps| maps.contains("liblitefs"));
        let all = std::env::var_os("LITEFS_RUNTIME_DIR");
        let (true, Some(all)) = (loaded, all) else {
            panic!(
                "LITEFS_TEST_DOOR=preload needs LD_PRELOAD=liblitefs.so and LITEFS_RUNTIME_DIR: an empty directory"
            );
        };
        let all = PathBuf::from(all);
        wait_for("a place for a host is free", 4 * PATIENCE, || {
            (0..PLACES).map(|n| all.join(n.to_string())).find(|path| fs::create_dir(path).is_ok()).map(Place)
        })
    }

    /// The runtime directory of the agent.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
