//! `cargo xtask apt-repository`: a signed apt repository of the packages, in a directory.

use super::{Options as PackageOptions, stage};
use crate::run;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Options of `cargo xtask apt-repository`.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Take what `cargo build` makes, for tests
    #[arg(long)]
    pub dev: bool,
    /// Revision of the packages of this version
    #[arg(long, default_value_t = 1)]
    pub revision: u32,
    /// Directory to write to [default: target/apt]
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// Sign with this key of your own GnuPG; else with one that is made and kept in target/apt-key
    #[arg(long)]
    pub key: Option<String>,
}

const SUITE: &str = "stable";

/// Makes the repository.
pub fn run(options: &Options) -> Result<()> {
    let target = run::root().join("target");
    let output = options.output.clone().unwrap_or_else(|| target.join("apt"));
    let packages = super::run(&PackageOptions {
        dev: options.dev,
        revision: options.revision,
        output: Some(output.join("build")),
        deb_only: true,
    })?;
    let output = output.canonicalize()?;
    for old in ["pool", "dists"] {
        if output.join(old).exists() {
            fs::remove_dir_all(output.join(old))?;
        }
    }
    for package in &packages {
        let name = package.file_name().context("a package without a name")?;
        stage::put(&fs::read(package)?, &output.join("pool").join(name), 0o644)?;
    }
    let arch = run::output(Command::new("dpkg").arg("--print-architecture"))?.trim().to_owned();
    let dist = output.join("dists").join(SUITE);
    let index = dist.join(format!("main/binary-{arch}"));
    let list = run::output(Command::new("apt-ftparchive").args(["packages", "pool"]).current_dir(&output))?;
    stage::put(list.as_bytes(), &index.join("Packages"), 0o644)?;
    stage::put(&stage::gzip(list.as_bytes())?, &index.join("Packages.gz"), 0o644)?;
    let mut release = Command::new("apt-ftparchive");
    for (field, value) in [
        ("Origin", "LiteFS"),
        ("Suite", SUITE),
        ("Codename", SUITE),
        ("Architectures", &arch),
        ("Components", "main"),
    ] {
        release.args(["-o", &format!("APT::FTPArchive::Release::{field}={value}")]);
    }
    let release = run::output(release.args(["release", "."]).current_dir(&dist))?;
    stage::put(release.as_bytes(), &dist.join("Release"), 0o644)?;
    sign(&output, &dist, options.key.as_deref())?;
    let source = format!(
        "Types: deb\nURIs: file:{}\nSuites: {SUITE}\nComponents: main\nSigned-By: /etc/apt/keyrings/litefs.asc\n",
        output.display()
    );
    stage::put(source.as_bytes(), &output.join("litefs.sources"), 0o644)?;
    println!(
        "\nto use it on this host, as root:\n  install -D -m 644 {0}/litefs.asc /etc/apt/keyrings/litefs.asc\n  \
         cp {0}/litefs.sources /etc/apt/sources.list.d/\n  apt update && apt install litefs\n\
         for other hosts, serve the directory over HTTP and change URIs in litefs.sources",
        output.display()
    );
    Ok(())
}

/// Writes `InRelease`, `Release.gpg`, and the public key beside the repository.
fn sign(output: &Path, dist: &Path, key: Option<&str>) -> Result<()> {
    let home = run::root().join("target/apt-key");
    let gpg = || {
        let mut gpg = Command::new("gpg");
        gpg.args(["--batch", "--yes", "--quiet"]);
        match key {
            Some(key) => gpg.args(["--local-user", key]),
            None => gpg.arg("--homedir").arg(&home),
        };
        gpg
    };
    if key.is_none() && !home.join("pubring.kbx").exists() {
        fs::create_dir_all(&home)?;
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700))?;
        let identity = "LiteFS local repository <root@localhost>";
        let made = run::output(gpg().args([
            "--passphrase",
            "",
            "--quick-generate-key",
            identity,
            "ed25519",
            "sign",
            "never",
        ]));
        made.context("cannot make a key to sign with")?;
    }
    let release = dist.join("Release");
    run::output(gpg().args(["--clearsign", "--output"]).arg(dist.join("InRelease")).arg(&release))?;
    run::output(
        gpg().args(["--armor", "--detach-sign", "--output"]).arg(dist.join("Release.gpg")).arg(&release),
    )?;
    let mut export = gpg();
    export.args(["--armor", "--export"]).args(key);
    let public = run::output(&mut export)?;
    if public.is_empty() {
        bail!("gpg has no such key");
    }
    if key.is_none() {
        // The agent that gpg started for this key only.
        let _ = Command::new("gpgconf").arg("--homedir").arg(&home).args(["--kill", "gpg-agent"]).status();
    }
    stage::put(public.as_bytes(), &output.join("litefs.asc"), 0o644)
}
