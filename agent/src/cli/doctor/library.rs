//! Where the shim is.

use super::elf::Elf;
use super::program::same_kind;
use std::path::{Path, PathBuf};

/// Its file name.
pub const FILE: &str = "liblitefs.so";

/// Names it when it is elsewhere.
pub const VARIABLE: &str = "LITEFS_SHIM";

/// Where packages put it: Debian's, and others'.
fn installed() -> [PathBuf; 2] {
    let debian = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    [debian.as_str(), "/usr/lib64"].map(|dir| Path::new(dir).join(FILE))
}

/// Finds the shim and checks that the loader will take it: one that it cannot load it leaves out, with a line on
/// stderr that nobody may read.
///
/// # Errors
/// Why it cannot be used, and what to do.
pub fn find() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        return usable(Path::new(&path)).map_err(|why| format!("{why} (named by {VARIABLE})"));
    }
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(|dir| dir.join(FILE));
    for path in beside.into_iter().chain(installed()) {
        if path.exists() {
            return usable(&path);
        }
    }
    let [debian, others] = installed();
    let (debian, others) = (debian.display(), others.display());
    Err(format!(
        "neither {debian} nor {others} is there; install the package liblitefs, or name it with {VARIABLE}"
    ))
}

fn usable(path: &Path) -> Result<PathBuf, String> {
    let shown = path.display();
    let path = path.canonicalize().map_err(|error| format!("cannot find {shown}: {error}"))?;
    // Colons and spaces separate the entries of LD_PRELOAD.
    let text = path.to_string_lossy();
    if text.contains([':', ' ']) {
        return Err(format!("{text}: LD_PRELOAD cannot name a path with a colon or a space"));
    }
    match Elf::read(&path) {
        Ok(Some(elf)) if same_kind(&elf) => Ok(path),
        Ok(_) => Err(format!("{text} is not a library of this machine's kind; install it again")),
        Err(error) => Err(format!("cannot read {text}: {error}")),
    }
}
