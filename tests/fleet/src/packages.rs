//! The packages under test, in a signed apt repository.

use crate::process::output;
use crate::root::fleet_dir;
use crate::{Host, Outcome};
use anyhow::Result;
use nix::fcntl::{Flock, FlockArg};
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

/// An apt repository with this revision of the packages, built from this tree by `cargo xtask apt-repository`, once per
/// test program.
///
/// # Errors
/// They cannot be built.
pub fn repository(revision: u32) -> Result<PathBuf> {
    static BUILT: LazyLock<Mutex<HashMap<u32, PathBuf>>> = LazyLock::new(Mutex::default);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(dir) = built.get(&revision) {
        return Ok(dir.clone());
    }
    fs::create_dir_all(fleet_dir())?;
    let lock = File::create(fleet_dir().join("packages.lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let dir = fleet_dir().join(format!("apt-{revision}"));
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["xtask", "apt-repository", "--dev", "--revision", &revision.to_string(), "--output"])
        .arg(&dir);
    output(cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")))?;
    built.insert(revision, dir.clone());
    Ok(dir)
}

impl Host {
    /// Gives the host an apt repository of this revision, as the only one besides older revisions, and updates its lists.
    ///
    /// # Panics
    /// If the packages cannot be built or apt does not take them.
    #[track_caller]
    pub fn offer_packages(&self, revision: u32) {
        let dir = repository(revision).unwrap_or_else(|error| panic!("no packages: {error:#}"));
        let mut tar = Command::new("tar");
        tar.args(["--create", "pool", "dists", "litefs.asc"]).current_dir(&dir);
        let tar = tar.output().unwrap_or_else(|error| panic!("cannot run tar: {error}"));
        assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
        self.push("/opt/apt.tar", tar.stdout);
        let sources = "Types: deb\nURIs: file:/opt/apt\nSuites: stable\nComponents: main\nSigned-By: \
                       /etc/apt/keyrings/litefs.asc\n";
        self.push("/etc/apt/sources.list.d/litefs.sources", sources);
        self.run(
            "rm -rf /opt/apt && mkdir /opt/apt && tar -xf /opt/apt.tar -C /opt/apt && rm /opt/apt.tar && \
             install -D -m 644 /opt/apt/litefs.asc /etc/apt/keyrings/litefs.asc && apt-get update -qq",
        );
    }

    /// `apt install` of packages that were offered.
    ///
    /// # Panics
    /// If apt fails.
    #[track_caller]
    pub fn apt_install(&self, packages: &str) {
        self.run(&format!("apt-get install -y -qq {packages}"));
    }

    /// Offers revision 1 of the packages and installs the agent. Nothing runs yet: `systemctl start litefs@db`.
    ///
    /// # Panics
    /// If that fails.
    #[track_caller]
    pub fn install_litefs(&self) {
        self.offer_packages(1);
        self.apt_install("litefs");
    }

    /// Starts the cluster `db` here, following `primary` if there is one.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_litefs(&self, primary: Option<&Host>) {
        let lease = match primary {
            Some(primary) => {
                format!("[lease]\nrole = \"replica\"\nprimary-url = \"http://{}:20202\"\n", primary.name())
            }
            None => String::new(),
        };
        self.push("/etc/litefs/db.toml", format!("[http]\nlisten = \"0.0.0.0:20202\"\n{lease}"));
        let Outcome { code, stdout, stderr } =
            self.try_run("systemctl enable --now litefs@db").unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(code, Some(0), "{}: {stdout}{stderr}\n{}", self.name(), self.journal());
    }
}
