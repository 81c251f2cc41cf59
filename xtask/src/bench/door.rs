//! The doors that can be measured: how an agent opens one, and how an application goes through it.

use std::ffi::OsString;

/// A way from an application to the agent. Each has a primary, a replica and applications of its own in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Door {
    /// The agent mounts the directory
    Fuse,
}

impl Door {
    /// Its column's title, and the name of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Door::Fuse => "fuse",
        }
    }

    /// Settings (`KEY=VALUE`) of an agent with this door.
    pub fn settings(self) -> Vec<String> {
        match self {
            Door::Fuse => Vec::new(),
        }
    }

    /// What the environment of an application that goes through this door needs.
    pub fn environment(self) -> Vec<(OsString, OsString)> {
        match self {
            Door::Fuse => Vec::new(),
        }
    }
}
