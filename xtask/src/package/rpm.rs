//! RPM packages, with rpmbuild.

use super::manifest::{Package, wrapped};
use super::stage::{files, lay_out, set_times};
use super::{Build, Format};
use crate::run;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds one package and returns its path.
pub fn build(package: &Package, compiled: &[PathBuf], build: &Build) -> Result<PathBuf> {
    let stage = build.output.join("stage").join(format!("{}.rpm", package.name));
    lay_out(package, compiled, Format::Rpm, &stage)?;
    set_times(&stage, build)?;
    let top = build.output.join("stage/rpmbuild");
    fs::create_dir_all(&top).with_context(|| format!("cannot make {}", top.display()))?;
    let top = top.canonicalize()?;
    let spec = top.join(format!("{}.spec", package.name));
    fs::write(&spec, spec_file(package, &stage.canonicalize()?, build)?)?;
    let arch = std::env::consts::ARCH;
    let compression = if build.dev { "w1.gzdio" } else { "w19.zstdio" };
    let defines = [
        format!("_topdir {}", top.display()),
        format!("_rpmdir {}", top.join("out").display()),
        format!("_binary_payload {compression}"),
        // The same packages from the same files, wherever and whenever.
        "_buildhost litefs".to_owned(),
        "use_source_date_epoch_as_buildtime 1".to_owned(),
        "clamp_mtime_to_source_date_epoch 1".to_owned(),
        // Everything is as it shall be already.
        "__os_install_post %{nil}".to_owned(),
        "debug_package %{nil}".to_owned(),
        "_build_id_links none".to_owned(),
    ];
    let mut command = Command::new("rpmbuild");
    command.args(["-bb", "--quiet", "--target", arch]);
    for define in &defines {
        command.args(["--define", define]);
    }
    run::output(command.arg(&spec).env("SOURCE_DATE_EPOCH", &build.epoch))?;
    let name = format!("{}-{}-{}.{arch}.rpm", package.name, build.version, build.revision);
    let made = top.join("out").join(arch).join(&name);
    let rpm = build.output.join(name);
    fs::rename(&made, &rpm).with_context(|| format!("rpmbuild did not make {}", made.display()))?;
    Ok(rpm)
}

fn spec_file(package: &Package, stage: &Path, build: &Build) -> Result<String> {
    let mut spec = format!(
        "Name: {}\nVersion: {}\nRelease: {}\nSummary: {}\nLicense: Apache-2.0\nURL: https://github.com/litefs/litefs\n",
        package.name,
        build.version,
        build.revision,
        capitalized(package.summary)
    );
    for (tag, value) in package.relations.iter().filter_map(|relation| relation.rpm) {
        let _ = writeln!(spec, "{tag}: {value}");
    }
    let description: Vec<String> =
        package.description.iter().map(|paragraph| wrapped(paragraph).join("\n")).collect();
    let _ = writeln!(spec, "\n%description\n{}", description.join("\n\n"));
    let _ =
        writeln!(spec, "\n%install\nmkdir -p %{{buildroot}}\ncp -a {}/. %{{buildroot}}/", stage.display());
    if package.scripts {
        spec.push_str(&scripts()?);
    }
    spec.push_str("\n%files\n%defattr(-,root,root,-)\n");
    for (dir, mode) in package.dirs {
        let _ = writeln!(spec, "%dir %attr({mode:04o},root,root) /{dir}");
    }
    for file in files(stage)? {
        let doc = if file.starts_with("usr/share/man/") { "%doc " } else { "" };
        let _ = writeln!(spec, "{doc}\"/{file}\"");
    }
    Ok(spec)
}

/// The parts of `packaging/scripts` under rpm's conditions: `$1` is how many versions there will be.
fn scripts() -> Result<String> {
    let part = |name: &str| -> Result<String> {
        let path = run::root().join("packaging/scripts").join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.replace('%', "%%"))
    };
    Ok(format!(
        "\n%post\nprevious=\nif [ \"$1\" -gt 1 ]; then previous=yes; fi\n{}\n%preun\nif [ \"$1\" -eq 0 ]; then\n{}fi\n\n\
         %postun\nif [ \"$1\" -eq 0 ]; then\n{}fi\n",
        part("after-install.sh")?,
        part("before-remove.sh")?,
        part("after-remove.sh")?
    ))
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
