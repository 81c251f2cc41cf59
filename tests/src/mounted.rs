//! File systems that a test mounts.

use crate::run;
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mount that the test made; taken away at its end. Declared before the hosts that use it.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// A file system in memory.
    pub fn tmpfs(dir: &Path, size: &str) -> Mounted {
        fs::create_dir_all(dir).expect("the temporary directory is writable");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(dir));
        Mounted(dir.to_owned())
    }

    /// A directory that can only be read.
    pub fn read_only(dir: &Path) -> Mounted {
        fs::create_dir_all(dir).expect("the temporary directory is writable");
        run(Command::new("mount").arg("--bind").arg(dir).arg(dir));
        let mounted = Mounted(dir.to_owned());
        run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(dir));
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
