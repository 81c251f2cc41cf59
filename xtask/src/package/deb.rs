//! Debian packages, with dpkg-deb.

use super::manifest::{Package, wrapped};
use super::stage::{files, gzip, lay_out, put, set_times};
use super::{Build, Format};
use crate::run;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const MAINTAINER: &str = "LiteFS maintainers <maintainers@litefs.io>";
const HOMEPAGE: &str = "https://github.com/litefs/litefs";

/// Builds one package and returns its path.
pub fn build(package: &Package, compiled: &[PathBuf], build: &Build) -> Result<PathBuf> {
    let arch = run::output(Command::new("dpkg").arg("--print-architecture"))?.trim().to_owned();
    let version = format!("{}-{}", build.version, build.revision);
    let stage = build.output.join("stage").join(format!("{}.deb", package.name));
    lay_out(package, compiled, Format::Deb, &stage)?;
    let doc = stage.join("usr/share/doc").join(package.name);
    put(&gzip(changelog(package, &version, build)?.as_bytes())?, &doc.join("changelog.Debian.gz"), 0o644)?;
    put(copyright().as_bytes(), &doc.join("copyright"), 0o644)?;
    let overrides = run::root().join("packaging/lintian").join(package.name);
    put(&fs::read(&overrides)?, &stage.join("usr/share/lintian/overrides").join(package.name), 0o644)?;

    let installed = files(&stage)?;
    let sums = run::output(Command::new("md5sum").args(&installed).current_dir(&stage))?;
    let size = run::output(
        Command::new("du").args(["--summarize", "--block-size=1024", "--apparent-size"]).arg(&stage),
    )?;
    let size = size.split_whitespace().next().context("du prints a size")?;
    let libraries = libraries(&stage.join(super::manifest::place(package.binaries[0].to, Format::Deb)))?;
    let control = stage.join("DEBIAN");
    let text = control_file(package, &version, &arch, size, &libraries);
    put(text.as_bytes(), &control.join("control"), 0o644)?;
    put(sums.as_bytes(), &control.join("md5sums"), 0o644)?;
    if package.scripts {
        for (name, text) in scripts()? {
            put(text.as_bytes(), &control.join(name), 0o755)?;
        }
    }
    if package.multi_arch {
        put(b"activate-noawait ldconfig\n", &control.join("triggers"), 0o644)?;
    }
    set_times(&stage, build)?;
    let deb = build.output.join(format!("{}_{version}_{arch}.deb", package.name));
    let compression = if build.dev { ["-Zgzip", "-z1"] } else { ["-Zxz", "-z6"] };
    run::output(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "--build"])
            .args(compression)
            .arg(&stage)
            .arg(&deb)
            .env("SOURCE_DATE_EPOCH", &build.epoch),
    )?;
    Ok(deb)
}

fn control_file(package: &Package, version: &str, arch: &str, size: &str, libraries: &str) -> String {
    let mut text = format!(
        "Package: {}\nVersion: {version}\nArchitecture: {arch}\nMaintainer: {MAINTAINER}\nInstalled-Size: {size}\n",
        package.name
    );
    let mut depends = libraries.to_owned();
    let mut others = String::new();
    for relation in package.relations {
        match relation.deb {
            ("Depends", more) => depends = format!("{depends}, {more}"),
            (field, value) => others.push_str(&format!("{field}: {value}\n")),
        }
    }
    let _ = writeln!(text, "Depends: {depends}");
    text.push_str(&others);
    let _ = writeln!(text, "Section: {}\nPriority: optional", package.section);
    if package.multi_arch {
        text.push_str("Multi-Arch: same\n");
    }
    let _ = writeln!(text, "Homepage: {HOMEPAGE}\nDescription: {}", package.summary);
    for (i, paragraph) in package.description.iter().enumerate() {
        if i > 0 {
            text.push_str(" .\n");
        }
        for line in wrapped(paragraph) {
            let _ = writeln!(text, " {line}");
        }
    }
    text
}

/// Packages that bring the shared libraries of a program, as `dpkg-shlibdeps` finds them.
fn libraries(binary: &Path) -> Result<String> {
    // It insists on a source package around it.
    let dir = tempfile::tempdir()?;
    put(
        b"Source: litefs\n\nPackage: litefs\nArchitecture: any\n",
        &dir.path().join("debian/control"),
        0o644,
    )?;
    let found = run::output(
        Command::new("dpkg-shlibdeps").args(["-O"]).arg(binary.canonicalize()?).current_dir(dir.path()),
    )?;
    let found = found.trim().strip_prefix("shlibs:Depends=").context("dpkg-shlibdeps names no packages")?;
    Ok(found.to_owned())
}

/// The parts of `packaging/scripts` under dpkg's conditions.
fn scripts() -> Result<Vec<(&'static str, String)>> {
    let part = |name: &str| -> Result<String> {
        let path = run::root().join("packaging/scripts").join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let script = |condition: &str, body: &str| format!("#!/bin/sh\nset -e\nif {condition}; then\n{body}fi\n");
    let postinst = script("[ \"$1\" = configure ]", &format!("previous=$2\n{}", part("after-install.sh")?));
    let prerm = script("[ \"$1\" = remove ]", &part("before-remove.sh")?);
    let removed = script("[ \"$1\" = remove ]", &part("after-remove.sh")?);
    let purged = script("[ \"$1\" = purge ]", &part("after-purge.sh")?);
    let postrm = removed + purged.trim_start_matches("#!/bin/sh\nset -e\n");
    Ok(vec![("postinst", postinst), ("prerm", prerm), ("postrm", postrm)])
}

fn changelog(package: &Package, version: &str, build: &Build) -> Result<String> {
    let date = run::output(
        Command::new("date").args(["--utc", "--rfc-email", "--date"]).arg(format!("@{}", build.epoch)),
    )?;
    Ok(format!(
        "{} ({version}) unstable; urgency=medium\n\n  * See the history of the repository.\n\n -- {MAINTAINER}  {date}",
        package.name
    ))
}

fn copyright() -> String {
    format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: LiteFS\nSource: {HOMEPAGE}\n\n\
         Files: *\nCopyright: 2026 The LiteFS authors\nLicense: Apache-2.0\n \
         On Debian systems, the full text of the Apache License, Version 2.0, is in\n \
         /usr/share/common-licenses/Apache-2.0.\n"
    )
}
