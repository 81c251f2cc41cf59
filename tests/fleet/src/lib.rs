//! Real hosts for tests: systemd as PID 1 in namespaces of its own, made from one Debian root that is kept between runs.
//!
//! A [`Fleet`] is some [`Host`]s on one switch. Everything that happens to a host happens as an operator does it: with
//! [`Host::run`]. All that a fleet made (processes, network, files) goes when it is dropped, when the test panics, and
//! when the test process is killed (files: with the next run).
//!
//! ```no_run
//! let fleet = fleet::Fleet::new(2);
//! fleet[0].run("echo hello > /srv/hello");
//! fleet[1].cut();
//! fleet[0].power_off();
//! fleet[0].boot();
//! assert_eq!(fleet[0].run("cat /srv/hello"), "hello\n");
//! ```
//!
//! Needs root, `mmdebstrap`, and the package sources that this machine's apt is configured with.

mod cgroup;
mod host;
mod network;
mod packages;
mod process;
mod root;
mod wait;

pub use host::{Host, Outcome};
pub use packages::repository;
pub use root::prepare;
pub use wait::{PATIENCE, wait_for};

use anyhow::{Context, Result};
use network::Switch;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Hosts on one switch, which nothing else can reach.
#[derive(Debug)]
pub struct Fleet {
    hosts: Vec<Host>,
    dir: PathBuf,
    _switch: Arc<Switch>,
}

impl Fleet {
    /// Boots `count` hosts: `host-a`, `host-b`, ... know each other by these names.
    ///
    /// # Panics
    /// If that is not possible here.
    #[track_caller]
    pub fn new(count: usize) -> Fleet {
        Fleet::try_new(count).unwrap_or_else(|error| panic!("no fleet: {error:#}"))
    }

    /// Boots `count` hosts (at most 26).
    ///
    /// # Errors
    /// This machine allows no namespaces, or the root cannot be made.
    pub fn try_new(count: usize) -> Result<Fleet> {
        static FLEETS: AtomicU32 = AtomicU32::new(0);
        let base = prepare()?;
        let parent = root::fleet_dir().join("hosts");
        remove_leftovers(&parent)?;
        let name = format!("{}-{}", std::process::id(), FLEETS.fetch_add(1, Ordering::Relaxed));
        let dir = parent.join(&name);
        let switch = Arc::new(Switch::start()?);
        // From here on dropping the fleet removes everything.
        let mut fleet = Fleet { hosts: Vec::new(), dir, _switch: switch.clone() };
        let names: Vec<String> = ('a'..='z').take(count).map(|letter| format!("host-{letter}")).collect();
        for (index, host) in names.iter().enumerate() {
            let cgroup = format!("litefs-fleet-{name}-{host}");
            let dir = fleet.dir.join(host);
            fleet.hosts.push(Host::create(host, index, &names, &base, dir, cgroup, switch.clone())?);
        }
        for host in &fleet.hosts {
            host.start()?;
        }
        for host in &fleet.hosts {
            let state = host.wait_until_booted()?;
            if state != "running" {
                let failed = host.try_run("systemctl --failed --no-legend")?;
                anyhow::bail!("{} is {state:?} after its first boot:\n{}", host.name(), failed.stdout);
            }
        }
        Ok(fleet)
    }

    /// All hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }
}

impl std::ops::Index<usize> for Fleet {
    type Output = Host;

    fn index(&self, index: usize) -> &Host {
        &self.hosts[index]
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for host in &self.hosts {
            if std::thread::panicking() {
                tell(host);
            }
            host.power_off();
        }
        if let Err(error) = remove_tree(&self.dir) {
            eprintln!("{error:#}");
        }
    }
}

/// What somebody needs who asks why the test failed.
fn tell(host: &Host) {
    let status = host.try_run("litefs status --json");
    let status =
        status.map_or_else(|error| format!("{error:#}\n"), |outcome| outcome.stdout + &outcome.stderr);
    eprintln!("---- {}\n{status}{}", host.name(), host.journal());
}

/// Removes what a killed test process left: its hosts died with it, their files and control groups remained.
fn remove_leftovers(hosts: &Path) -> Result<()> {
    fs::create_dir_all(hosts).with_context(|| format!("cannot make {}", hosts.display()))?;
    for entry in fs::read_dir(hosts)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let owner = name.split('-').next().unwrap_or_default();
        if Path::new("/proc").join(owner).exists() {
            continue;
        }
        cgroup::remove_all(&format!("litefs-fleet-{name}-"))?;
        remove_tree(&hosts.join(name))?;
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
