//! The program under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Path of `litefs`: `$LITEFS_BIN`, or the one beside the tests, which is built when it is missing.
pub fn litefs() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("LITEFS_BIN") {
            return path.into();
        }
        // Tests are at target/<profile>/deps/<name>.
        let test = std::env::current_exe().expect("a program has a path");
        let profile = test.parent().and_then(Path::parent).expect("tests lie two levels below target/");
        let path = profile.join("litefs");
        if !path.exists() {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet", "--package", "litefs-agent"]);
            build.current_dir(env!("CARGO_MANIFEST_DIR"));
            if profile.ends_with("release") {
                build.arg("--release");
            }
            let status = build.status().expect("cargo runs");
            assert!(status.success() && path.exists(), "cannot build {}", path.display());
        }
        path
    })
}

/// Path of `liblitefs.so` as it is shipped: `$LITEFS_SHIM`, or built now.
pub fn liblitefs() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("LITEFS_SHIM") {
            return path.into();
        }
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "preload-shim", "--profile", "shim"]);
        build.current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(build.status().expect("cargo runs").success(), "cannot build liblitefs.so");
        let test = std::env::current_exe().expect("a program has a path");
        let target = test.ancestors().nth(3).expect("tests lie three levels below the target directory");
        target.join("shim/liblitefs.so")
    })
}
