//! The doors that can be measured: how an agent opens one, and how an application goes through it.

use std::ffi::OsString;
use std::path::Path;

/// A way from an application to the agent. Each has a primary, a replica and applications of its own in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Door {
    /// The agent mounts the directory
    Fuse,
    /// A library in the application; commits in WAL mode wait for nobody
    Preload,
    /// The same, but commits in WAL mode wait until the log has them
    PreloadHeld,
}

impl Door {
    /// Its column's title, and the name of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Door::Fuse => "fuse",
            Door::Preload => "preload",
            Door::PreloadHeld => "held",
        }
    }

    /// Settings (`KEY=VALUE`) of an agent with this door.
    pub fn settings(self) -> Vec<String> {
        let settings: &[&str] = match self {
            Door::Fuse => &["door=fuse"],
            Door::Preload => &["door=preload", "preload.hold=never"],
            Door::PreloadHeld => &["door=preload", "preload.hold=always"],
        };
        settings.iter().map(ToString::to_string).collect()
    }

    /// Whether applications need the library.
    pub fn needs_library(self) -> bool {
        self != Door::Fuse
    }

    /// What the environment of an application that goes through this door needs. The agents' sockets are in directories
    /// below `hosts`.
    pub fn environment(self, hosts: &Path, library: &Path) -> Vec<(OsString, OsString)> {
        if !self.needs_library() {
            return Vec::new();
        }
        vec![("LD_PRELOAD".into(), library.into()), ("LITEFS_RUNTIME_DIR".into(), hosts.into())]
    }
}
