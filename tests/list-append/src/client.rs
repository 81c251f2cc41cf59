//! A running client.

use crate::History;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// The client's program, which is built now. Its arguments: the database, and the client's name.
///
/// # Panics
/// If it cannot be built.
pub fn program() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // Tests are at target/<profile>/deps/<name>.
        let test = std::env::current_exe().expect("a program has a path");
        let profile = test.parent().and_then(Path::parent).expect("tests lie two levels below target/");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "list-append"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if profile.ends_with("release") {
            build.arg("--release");
        }
        let path = profile.join("append_client");
        let status = build.status().expect("cargo runs");
        assert!(status.success() && path.exists(), "cannot build {}", path.display());
        path
    })
}

/// A running client that appends and reads, until it is told to end, or dies with its host.
#[derive(Debug)]
pub struct ListClient {
    child: Child,
    name: String,
    output: PathBuf,
}

impl ListClient {
    /// Runs [`program`], wherever the command does that. The name is the client's alone, also among those that have
    /// ended; the directory keeps what it prints.
    ///
    /// # Panics
    /// If it does not run.
    pub fn start(mut command: Command, name: &str, scratch: &Path) -> ListClient {
        let output = scratch.join(format!("{name}.history"));
        let file = File::create(&output).expect("the scratch directory is writable");
        let child = command.stdin(Stdio::piped()).stdout(file).spawn().expect("the client runs");
        ListClient { child, name: name.to_owned(), output }
    }

    fn printed(&self) -> String {
        std::fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// Appends that have succeeded so far.
    pub fn acknowledged(&self) -> usize {
        self.printed().lines().filter(|line| line.starts_with("append") && line.contains(" ok ")).count()
    }

    /// Ends it, and takes in what it saw.
    ///
    /// # Panics
    /// If it has failed.
    pub fn end(mut self, history: &mut History) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().expect("it is our child").success(), "the client {} failed", self.name);
        history.read(&self.name, &self.printed());
    }

    /// Takes in what it saw before its host died.
    ///
    /// # Panics
    /// If it has not died.
    pub fn end_dead(mut self, history: &mut History) {
        assert!(!self.child.wait().expect("it is our child").success(), "the client {} lives", self.name);
        let printed = self.printed();
        // It may have died while it printed.
        let whole = printed.rfind('\n').map_or(0, |end| end + 1);
        history.read(&self.name, &printed[..whole]);
    }
}

impl Drop for ListClient {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
