//! SQLite's sources as Debian has them, and the interpreter of its tests built from them, below `target/sqlite-tests`.

use crate::run;
use crate::setup;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian keeps what building against Tcl needs.
const TCL: &str = "/usr/lib/tcl8.6";

/// What is run at the head of every test file, in place of a line that would move SQLite's lock bytes to where nobody
/// else looks for them. A mount lists its special files, which tests do not expect beside a database.
const PREPARATION: &str = "rename glob sqlite_glob\n\
    proc glob {args} { lsearch -all -inline -not -glob [uplevel sqlite_glob $args] *-pos }\n";
const MOVES_LOCK_BYTES: &str = "sqlite3_test_control_pending_byte 0x0010000\n";

/// SQLite's tests, ready to run.
pub struct Suite {
    /// `target/sqlite-tests`.
    pub dir: PathBuf,
    /// Directory of the test files.
    pub tests: PathBuf,
    /// Their interpreter.
    pub testfixture: PathBuf,
}

/// Fetches and builds what is missing.
pub fn prepare() -> Result<Suite> {
    let dir = run::root().join("target/sqlite-tests");
    let build = dir.join("build");
    fs::create_dir_all(&build).with_context(|| format!("cannot make {}", build.display()))?;
    setup::missing_packages(&["build-essential", "dpkg-dev", "tcl", "tcl-dev", "zlib1g-dev"])?;
    let source = match unpacked(&dir)? {
        Some(source) => source,
        None => {
            fetch(&dir)?;
            unpacked(&dir)?.context("apt-get fetched no sources of sqlite3")?
        }
    };
    let tests = source.join("test");
    adapt(&tests.join("tester.tcl"))?;
    let testfixture = build.join("testfixture");
    if !testfixture.exists() {
        println!("building SQLite's testfixture in {}; this takes some minutes", build.display());
        run::output(
            Command::new(source.join("configure")).arg(format!("--with-tcl={TCL}")).current_dir(&build),
        )?;
        run::output(Command::new("make").arg("testfixture").current_dir(&build))?;
    }
    Ok(Suite { dir, tests, testfixture })
}

fn unpacked(dir: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.join("test/tester.tcl").exists() {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Gets the sources from where this machine gets its packages, without changing what apt knows.
fn fetch(dir: &Path) -> Result<()> {
    let (mut deb822, mut lines) = (String::new(), String::new());
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => {
                for line in text.lines() {
                    deb822 += if line.starts_with("Types:") { "Types: deb-src" } else { line };
                    deb822.push('\n');
                }
                deb822.push('\n');
            }
            Some("list") => {
                for line in text.lines().filter_map(|line| line.strip_prefix("deb ")) {
                    lines += &format!("deb-src {line}\n");
                }
            }
            _ => {}
        }
    }
    if deb822.is_empty() && lines.is_empty() {
        bail!("/etc/apt names no package sources: unpack SQLite's sources below {} by hand", dir.display());
    }
    let parts = dir.join("apt");
    let lists = dir.join("lists");
    fs::create_dir_all(&parts)?;
    fs::create_dir_all(lists.join("partial"))?;
    fs::write(parts.join("source.sources"), deb822)?;
    fs::write(parts.join("source.list"), lines)?;
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(["-o", "Dir::Etc::sourcelist=/dev/null", "-o"]);
        command.arg(format!("Dir::Etc::sourceparts={}", parts.display())).arg("-o");
        command.arg(format!("Dir::State::lists={}", lists.display())).args(arguments).current_dir(dir);
        run::output(&mut command)
    };
    println!("fetching the sources of sqlite3");
    apt(&["update", "-qq"])?;
    apt(&["source", "-qq", "sqlite3"])?;
    Ok(())
}

/// See [`PREPARATION`].
fn adapt(tester: &Path) -> Result<()> {
    let text = fs::read_to_string(tester)?;
    if text.contains(PREPARATION) {
        return Ok(());
    }
    if !text.contains(MOVES_LOCK_BYTES) {
        bail!("{} is not as expected: it does not move SQLite's lock bytes", tester.display());
    }
    Ok(fs::write(tester, text.replacen(MOVES_LOCK_BYTES, PREPARATION, 1))?)
}
