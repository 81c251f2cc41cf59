//! The packages themselves, without installing them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs `cargo xtask package` into a directory.
fn package(output: &Path) -> Vec<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["xtask", "package", "--dev", "--output"]).arg(output);
    run(cargo.current_dir(root()));
    let mut made: Vec<PathBuf> = std::fs::read_dir(output)
        .expect("there is output")
        .map(|entry| entry.expect("it is readable").path())
        .filter(|path| path.is_file())
        .collect();
    made.sort();
    made
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}\n{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn of_kind<'a>(made: &'a [PathBuf], kind: &str) -> Vec<&'a PathBuf> {
    made.iter().filter(|path| path.extension().is_some_and(|extension| extension == kind)).collect()
}

#[test]
fn they_are_in_order_and_the_same_each_time() {
    let (first, second) = (tempdir(), tempdir());
    let made = package(&first.0);
    assert_eq!(made.len(), 4, "{made:?}");
    let again = package(&second.0);
    for (one, other) in made.iter().zip(&again) {
        let same = std::fs::read(one).expect("readable") == std::fs::read(other).expect("readable");
        assert!(same, "{} and {} differ", one.display(), other.display());
    }

    run(Command::new("lintian")
        .args(["--fail-on=error,warning", "--allow-root"])
        .args(of_kind(&made, "deb")));
    let config = root().join("packaging/rpmlint.toml");
    let lint = run(Command::new("rpmlint").arg("--config").arg(config).args(of_kind(&made, "rpm")));
    assert!(lint.contains("0 errors, 0 warnings"), "{lint}");

    // Both kinds bring the same programs and units, and rpm takes its own.
    for rpm in of_kind(&made, "rpm") {
        let name = rpm.file_name().and_then(|name| name.to_str()).expect("it has a name");
        let files = run(Command::new("rpm").arg("-qpl").arg(rpm));
        let expected = match name.starts_with("lib") {
            true => vec!["/usr/lib64/liblitefs.so"],
            false => vec![
                "/usr/bin/litefs",
                "/usr/lib/systemd/system/litefs@.service",
                "/usr/lib/sysusers.d/litefs.conf",
                "/usr/share/man/man8/litefs@.service.8.gz",
                "/usr/share/zsh/site-functions/_litefs",
            ],
        };
        for file in expected {
            assert!(files.lines().any(|line| line == file), "{name} lacks {file}:\n{files}");
        }
    }
    let empty = tempdir();
    run(Command::new("rpm").args(["--initdb", "--root"]).arg(&empty.0));
    let mut install = Command::new("rpm");
    // No distribution is in there, so nothing that they need.
    install.args(["--install", "--test", "--nodeps", "--root"]).arg(&empty.0).args(of_kind(&made, "rpm"));
    run(&mut install);
    let mut install = Command::new("rpm");
    install
        .args(["--install", "--nodeps", "--noscripts", "--root"])
        .arg(&empty.0)
        .args(of_kind(&made, "rpm"));
    run(&mut install);
    assert_eq!(run(Command::new("rpm").args(["--verify", "--nodeps", "--all", "--root"]).arg(&empty.0)), "");
}

struct Temporary(PathBuf);

fn tempdir() -> Temporary {
    let made = run(Command::new("mktemp").args(["--directory", "--tmpdir", "litefs-packages-XXXXXX"]));
    Temporary(made.trim().into())
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
