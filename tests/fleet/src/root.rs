//! The Debian root that all hosts are made from. It is made once and kept below `target/fleet`.

use crate::process::output;
use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a host has besides a minimal Debian.
const PACKAGES: [&str; 9] =
    ["systemd", "systemd-sysv", "dbus", "polkitd", "fuse3", "sqlite3", "python3", "iproute2", "procps"];

/// Changes to what is below; a root of another version is made anew.
const VERSION: u32 = 1;

/// Where roots and hosts are kept: `target/fleet`, or `$LITEFS_FLEET_DIR`.
pub fn fleet_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("LITEFS_FLEET_DIR") {
        return dir.into();
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("CARGO_TARGET_DIR").map_or(repository.join("target"), PathBuf::from).join("fleet")
}

/// Makes the root if it is not there yet, and returns it. Takes about a minute then.
///
/// # Errors
/// It cannot be made, for example because apt reaches no package source.
pub fn prepare() -> Result<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        bail!("hosts are made of namespaces: run this as root");
    }
    let dir = fleet_dir();
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = dir.canonicalize()?;
    let release = os_release("VERSION_CODENAME")?;
    let mut hasher = DefaultHasher::new();
    (PACKAGES, VERSION).hash(&mut hasher);
    let root = dir.join(format!("root-{release}-{:016x}", hasher.finish()));
    // Several test programs may start at once.
    let lock = File::create(dir.join("root.lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    if !root.exists() {
        let making = dir.join("root.new");
        if making.exists() {
            fs::remove_dir_all(&making).with_context(|| format!("cannot remove {}", making.display()))?;
        }
        make(&making, &release)?;
        fs::rename(&making, &root)?;
    }
    Ok(root)
}

fn make(root: &Path, release: &str) -> Result<()> {
    eprintln!("making the hosts' root from the Debian packages of this machine's apt; this takes a minute");
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--mode=root", "--variant=minbase", "--dpkgopt=force-unsafe-io"]);
    for option in proxies()? {
        command.arg(format!("--aptopt={option}"));
    }
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.arg(release).arg(root).args(sources(release)?);
    output(&mut command).context("cannot make a Debian root")?;
    // Nothing to download from, nobody to log in, and each host gets an identity of its own.
    for unit in ["apt-daily.timer", "apt-daily-upgrade.timer", "console-getty.service", "getty.target"] {
        std::os::unix::fs::symlink("/dev/null", root.join("etc/systemd/system").join(unit))?;
    }
    fs::write(root.join("etc/apt/sources.list"), "")?;
    fs::write(root.join("etc/machine-id"), "")?;
    Ok(())
}

/// `deb` lines of the Debian archives that apt knows here.
fn sources(release: &str) -> Result<Vec<String>> {
    let format = "$(ORIGIN)|$(CODENAME)|$(SITE)|$(RELEASE)|$(COMPONENT)";
    let targets =
        output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    let mut sources: Vec<String> = targets
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('|');
            let [origin, codename, site, suite, component] = std::array::from_fn(|_| fields.next());
            let (codename, site, suite, component) = (codename?, site?, suite?, component?);
            let ours = origin? == "Debian" && codename.split('-').next()? == release && component == "main";
            ours.then(|| format!("deb {site} {suite} {component}"))
        })
        .collect();
    sources.dedup();
    if sources.is_empty() {
        bail!("apt knows no Debian archive of {release}: run `apt-get update`");
    }
    Ok(sources)
}

/// How apt goes out on this machine.
fn proxies() -> Result<Vec<String>> {
    let dump = output(Command::new("apt-config").args(["dump", "--format", "%f \"%v\";%n"]))?;
    Ok(dump
        .lines()
        .filter(|line| line.starts_with("Acquire::") && line.contains("::Proxy "))
        .map(str::to_owned)
        .collect())
}

fn os_release(key: &str) -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    Ok(value.with_context(|| format!("/etc/os-release has no {key}"))?.trim_matches('"').to_owned())
}
