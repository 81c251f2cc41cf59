//! Clocks of single processes that jump, as they do when a host has slept or somebody sets its time.

use crate::shell::run;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The library that moves the clocks of a process that loads it; made in this directory.
pub fn library(dir: &Path) -> PathBuf {
    let library = dir.join("clocks.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/clocks.c");
    run(Command::new("cc").args(["-O1", "-shared", "-fPIC", source, "-o"]).arg(&library));
    library
}

/// Clocks of the processes that were started with them.
#[derive(Debug)]
pub struct Clocks {
    library: PathBuf,
    moved: PathBuf,
}

impl Clocks {
    /// Clocks that are right. The directory is the test's own.
    pub fn new(dir: &Path) -> Clocks {
        let moved = dir.join("clocks");
        std::fs::write(&moved, [0; 16]).expect("the scratch directory is writable");
        Clocks { library: library(dir), moved }
    }

    /// What a process has to have in its environment.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        [("LD_PRELOAD", self.library.display().to_string()), ("CLOCKS", self.moved.display().to_string())]
    }

    /// `CLOCK_BOOTTIME` has gone on, and `CLOCK_MONOTONIC` has not.
    pub fn sleep(&self, slept: Duration) {
        self.set(8, slept.as_nanos().try_into().expect("less than centuries"));
    }

    fn set(&self, at: u64, nanoseconds: i64) {
        let file = File::options().write(true).open(&self.moved).expect("it was made");
        file.write_all_at(&nanoseconds.to_ne_bytes(), at).expect("the scratch directory is writable");
    }
}
