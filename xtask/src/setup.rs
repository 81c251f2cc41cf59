//! Installs what building and testing need on a Debian machine, as far as it is missing.

use crate::run::{self, cargo};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program that has to be there, and the Debian package that brings it.
const PROGRAMS: [(&str, &str); 11] = [
    // SQLite is compiled into some tests.
    ("cc", "build-essential"),
    // The unmodified application of the demo and the tests.
    ("sqlite3", "sqlite3"),
    // Another one, and the driver of the benchmark.
    ("python3", "python3"),
    // Makes the root of the hosts that the fleet tests boot.
    ("mmdebstrap", "mmdebstrap"),
    // Packages and their repository.
    ("rpmbuild", "rpm"),
    ("apt-ftparchive", "apt-utils"),
    ("gpg", "gpg"),
    // What looks at them.
    ("lintian", "lintian"),
    ("rpmlint", "rpmlint"),
    // A bus of their own for the tests of the D-Bus service, and a client.
    ("dbus-daemon", "dbus"),
    ("busctl", "systemd"),
];

/// Pinned, so that a check does not begin to fail by itself.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// What the tests need besides, by Debian package: other kinds of programs to look at, and clients of SQLite.
const TEST_PACKAGES: [&str; 10] = [
    "musl-tools",
    "libcap2-bin",
    "libsqlite3-dev",
    "python3-venv",
    "libdbd-sqlite3-perl",
    "php-cli",
    "php-sqlite3",
    "ruby",
    "ruby-sqlite3",
    "perl",
];

/// Installs missing packages that building and the demo need.
pub fn packages() -> Result<()> {
    let missing =
        PROGRAMS.iter().filter(|(program, _)| run::which(program).is_none()).map(|(_, package)| *package);
    install(&missing.collect::<Vec<_>>())
}

/// Installs missing packages that the tests need.
pub fn test_packages() -> Result<()> {
    let mut missing: Vec<&str> = TEST_PACKAGES.into_iter().filter(|package| !is_installed(package)).collect();
    // Also comes with Node.js from elsewhere.
    if run::which("npm").is_none() {
        missing.push("npm");
    }
    install(&missing)
}

/// Installs those of these packages that are missing.
pub fn missing_packages(packages: &[&'static str]) -> Result<()> {
    install(&packages.iter().copied().filter(|package| !is_installed(package)).collect::<Vec<_>>())
}

fn is_installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Status}", package]);
    query.output().is_ok_and(|output| output.stdout == b"installed")
}

fn install(missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get update && apt-get install -y {}", missing.join(" "));
    if run::which("apt-get").is_none() {
        bail!("missing: {}; install them with this system's package manager", missing.join(", "));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("missing: {}; run as root: {by_hand}", missing.join(", "));
    }
    println!("installing {}", missing.join(", "));
    run::run(Command::new("apt-get").args(["update", "-qq"]))?;
    run::run(
        Command::new("apt-get")
            .args(["-o", "DPkg::Lock::Timeout=300", "install", "-y", "-qq", "--no-install-recommends"])
            .args(missing)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
    .with_context(|| format!("cannot install packages; try by hand: {by_hand}"))
}

/// Installs rustfmt and clippy where a minimal toolchain has left them out.
pub fn rust_components() -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if cargo(&[subcommand, "--version"]).output().is_ok_and(|output| output.status.success()) {
            continue;
        }
        println!("installing {component}");
        run::run(Command::new("rustup").args(["component", "add", component]).current_dir(run::root()))
            .with_context(|| {
                format!("{component} is missing; install the toolchain with its default components")
            })?;
    }
    Ok(())
}

/// The path of cargo-deny, installed below `target/tools` when it is missing.
pub fn cargo_deny() -> Result<PathBuf> {
    if let Some(path) = run::which("cargo-deny") {
        return Ok(path);
    }
    let tools = run::root().join("target/tools");
    let path = tools.join("bin/cargo-deny");
    if !path.is_file() {
        println!(
            "installing cargo-deny {CARGO_DENY_VERSION} below {}; this takes some minutes",
            tools.display()
        );
        let version = format!("cargo-deny@{CARGO_DENY_VERSION}");
        // Building it takes longer than all its runs.
        let mut install = cargo(&["install", "--quiet", "--debug", "--locked", "--root"]);
        install.env("CARGO_PROFILE_DEV_DEBUG", "0").env_remove(run::WRAPPER);
        run::run(install.arg(&tools).arg(version))?;
    }
    Ok(path)
}

/// Version of Consul that the tests run: the last one that Debian shipped.
const CONSUL_VERSION: &str = "1.8.7";

/// Puts Consul below `target/tools/consul`, out of Debian's "bullseye", without touching the machine's own sources.
pub fn consul() -> Result<PathBuf> {
    let prefix = run::root().join("target/tools/consul");
    let program = prefix.join("usr/bin/consul");
    if program.is_file() {
        return Ok(program);
    }
    let by_hand = "put a Consul server at target/tools/consul/usr/bin/consul, or name it in LITEFS_CONSUL";
    if let Some(path) = std::env::var_os("LITEFS_CONSUL") {
        return Ok(path.into());
    }
    println!("installing Consul {CONSUL_VERSION} below {}", prefix.display());
    let work = tempfile::tempdir()?;
    let path = |name: &str| work.path().join(name);
    std::fs::create_dir_all(path("lists/partial"))?;
    std::fs::create_dir_all(path("cache/archives/partial"))?;
    let source = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bullseye main";
    std::fs::write(path("sources.list"), format!("{source}\n"))?;
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.args(["-qq", "-o", "Acquire::Check-Valid-Until=false", "-o", "Dir::Etc::sourceparts=/dev/null"]);
        // Also where the user that downloads cannot see the directory.
        apt.args(["-o", "APT::Sandbox::User=root"]);
        for (option, name) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            apt.arg("-o").arg(format!("{option}={}", path(name).display()));
        }
        apt.current_dir(work.path());
        apt
    };
    run::run(apt().arg("update")).context(by_hand)?;
    run::run(apt().args(["download", "consul"])).context(by_hand)?;
    let packages = std::fs::read_dir(work.path())?.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let package = packages.into_iter().find(|path| path.extension().is_some_and(|end| end == "deb"));
    let package = package.context("apt-get download left no package")?;
    std::fs::create_dir_all(&prefix)?;
    run::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&prefix))?;
    Ok(program)
}

/// Fails with advice where an agent could not mount.
pub fn can_mount() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("mounting needs root: run this as root");
    }
    let device = Path::new("/dev/fuse");
    if !device.exists() {
        // Loads the module where it is not built in; what comes of it is looked at below.
        let _ = Command::new("modprobe").arg("fuse").status();
    }
    match std::fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(error) => bail!(
            "cannot open /dev/fuse: {error}; load the kernel module (modprobe fuse), or give the container the device \
             and CAP_SYS_ADMIN (docker run --device /dev/fuse --cap-add SYS_ADMIN)"
        ),
    }
}
