//! Whether the shim sees what a program does with its databases, from the program's files.

use super::elf::Elf;
use super::finding::Findings;
use super::libraries::Loader;
use crate::cli::failure::{self, Failure};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Scripts may be run by scripts; the kernel follows four.
const SCRIPTS_MAX: usize = 5;

/// What is said where only this door is shut.
const OTHER_DOOR: &str = "use the FUSE door (door = \"fuse\"), which needs nothing of the program";

/// Who will run the program, as far as it matters for set-user-ID bits and capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunBy {
    /// Any user.
    Anyone,
    /// This process.
    Me,
}

/// Finds a program as `execvp` does.
pub fn find(program: &Path) -> Option<PathBuf> {
    if program.as_os_str().as_bytes().contains(&b'/') {
        return program.exists().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

/// Looks at a program, and at the interpreters that run it when it is a script.
pub fn check(program: &Path, run_by: RunBy) -> Result<Findings, Failure> {
    let mut findings = Findings::about(program.display());
    let mut path = find(program).ok_or_else(|| {
        Failure::file(failure::NO_INPUT, program, "no such program; give its path, or a name that PATH has")
    })?;
    for _ in 0..SCRIPTS_MAX {
        let unreadable = |error| Failure::file(failure::NO_INPUT, &path, error);
        let meta = fs::metadata(&path).map_err(unreadable)?;
        if !meta.is_file() {
            return Err(Failure::file(failure::NO_INPUT, &path, "not a program"));
        }
        match interpreter_of(&path).map_err(unreadable)? {
            Some((interpreter, line)) => {
                let Some(found) = find(&interpreter) else {
                    findings.fail(
                        "script",
                        format!("{} begins with {line}: there is no such program", path.display()),
                        "install it, or mend the first line",
                    );
                    return Ok(findings);
                };
                findings.ok("script", format!("{} is run by {}", path.display(), found.display()));
                path = found;
            }
            None => {
                binary(&mut findings, &path, &meta, run_by);
                return Ok(findings);
            }
        }
    }
    findings.fail("script", "scripts that are run by scripts, without an end", "name the program itself");
    Ok(findings)
}

/// The program that runs a script, and its first line; `None` for what is no script.
fn interpreter_of(path: &Path) -> io::Result<Option<(PathBuf, String)>> {
    let mut head = Vec::new();
    File::open(path)?.take(256).read_to_end(&mut head)?;
    let Some(line) = head.strip_prefix(b"#!") else { return Ok(None) };
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line).trim().to_owned();
    let mut words = line.split_whitespace();
    let first = words.next().unwrap_or_default();
    // `env` looks for what it is given: options and settings come first.
    let is_env = Path::new(first).file_name().is_some_and(|name| name == "env");
    let named = words.find(|word| !word.starts_with('-') && !word.contains('='));
    let interpreter = if is_env { named.unwrap_or(first) } else { first };
    Ok(Some((interpreter.into(), format!("#!{line}"))))
}

/// Looks at the file that the kernel runs.
fn binary(findings: &mut Findings, path: &Path, meta: &Metadata, run_by: RunBy) {
    let elf = match Elf::read(path) {
        Ok(Some(elf)) => elf,
        Ok(None) => {
            let found = format!("{} is neither an ELF file nor a script", path.display());
            return findings.fail("format", found, "name the program that runs it");
        }
        Err(error) => {
            let found = format!("cannot read {}: {error}", path.display());
            return findings.fail("format", found, OTHER_DOOR);
        }
    };
    if !same_kind(&elf) {
        let found = format!(
            "{} is a {}-bit program for machine {}, this is a {}-bit litefs for another",
            path.display(),
            if elf.is_64 { 64 } else { 32 },
            elf.machine.0,
            usize::BITS
        );
        return findings.fail("kind", found, format!("install a litefs of its kind, or {OTHER_DOOR}"));
    }
    findings.ok("kind", format!("{} is a program of this machine's kind", path.display()));
    loading(findings, &elf);
    privileges(findings, path, meta, run_by);
    sqlite(findings, path, &elf);
}

/// Whether a file is of the kind that this program is, so that the one's libraries fit the other.
pub fn same_kind(elf: &Elf) -> bool {
    let machine = match std::env::consts::ARCH {
        "x86_64" => object::elf::EM_X86_64,
        "aarch64" => object::elf::EM_AARCH64,
        "x86" => object::elf::EM_386,
        "arm" => object::elf::EM_ARM,
        "riscv64" => object::elf::EM_RISCV,
        "powerpc64" => object::elf::EM_PPC64,
        "s390x" => object::elf::EM_S390,
        _ => object::elf::EM_NONE,
    };
    elf.machine == machine && elf.is_64 == (usize::BITS == 64)
}

/// Whether a dynamic loader runs, and which.
fn loading(findings: &mut Findings, elf: &Elf) {
    match &elf.interpreter {
        None if elf.marks.go => findings.fail(
            "static",
            "a Go program without libc (CGO_ENABLED=0): no library can be loaded before it",
            format!("build it with cgo and a driver such as mattn/go-sqlite3, or {OTHER_DOOR}"),
        ),
        None => findings.fail(
            "static",
            "linked statically: no library can be loaded before it",
            format!("link it dynamically, or {OTHER_DOOR}"),
        ),
        Some(loader) if loader.to_string_lossy().contains("ld-musl") => findings.fail(
            "libc",
            format!("loaded by {}: linked with musl, the library needs glibc", loader.display()),
            format!("build it for glibc, or {OTHER_DOOR}"),
        ),
        Some(loader) => findings.ok("libc", format!("linked dynamically, loaded by {}", loader.display())),
    }
}

/// Whether the kernel makes the loader ignore LD_PRELOAD.
fn privileges(findings: &mut Findings, path: &Path, meta: &Metadata, run_by: RunBy) {
    let mode = meta.mode();
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let me = run_by == RunBy::Me;
    let advice = format!("run it from an account that needs no such bit, or {OTHER_DOOR}");
    if mode & 0o4000 != 0 && !(me && meta.uid() == uid.as_raw()) {
        findings.fail("privileges", "set-user-ID: the loader ignores LD_PRELOAD", advice);
    // Without the group's x bit this is mandatory locking, not set-group-ID.
    } else if mode & 0o2010 == 0o2010 && !(me && meta.gid() == gid.as_raw()) {
        findings.fail("privileges", "set-group-ID: the loader ignores LD_PRELOAD", advice);
    } else if has_capabilities(path) && !(me && uid.is_root()) {
        findings.fail(
            "privileges",
            "has file capabilities: the loader ignores LD_PRELOAD, except for root",
            format!("give them with AmbientCapabilities= of its unit and run setcap -r, or {OTHER_DOOR}"),
        );
    } else {
        findings.ok("privileges", "gets none from its file");
    }
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: both strings end with NUL, and nothing is written to a buffer of length 0.
    let length =
        unsafe { libc::getxattr(path.as_ptr(), c"security.capability".as_ptr(), std::ptr::null_mut(), 0) };
    length > 0
}

/// Which SQLite the program comes with, and whether that does its I/O through libc.
fn sqlite(findings: &mut Findings, path: &Path, elf: &Elf) {
    if let Some(package) = elf.marks.go_sqlite {
        return findings.fail(
            "sqlite",
            format!("has {package}: an SQLite in Go, which calls the kernel without libc"),
            format!("use a driver on the C library such as mattn/go-sqlite3, or {OTHER_DOOR}"),
        );
    }
    let (libraries, missing) = Loader::of_this_host().closure(path, elf);
    if !missing.is_empty() {
        findings.warn(
            "libraries",
            format!("not found: {}", missing.join(", ")),
            "install them; what they do cannot be told",
        );
    }
    let mut any = false;
    for (place, file) in
        std::iter::once((path, elf)).chain(libraries.iter().map(|(path, elf)| (path.as_path(), elf)))
    {
        if let Some(build) = &file.marks.sqlite {
            any = true;
            let found = format!("{build} in {}", place.display());
            // A program that has no loader has no imports either: that has been said.
            if elf.is_dynamic() && !does_io_through_libc(file) {
                findings.fail(
                    "sqlite",
                    format!("{found}, which does not call libc for its I/O"),
                    format!("link libc dynamically, or {OTHER_DOOR}"),
                );
            } else {
                findings.ok("sqlite", found);
            }
            wal_reset_bug(findings, build);
        }
        if let Some(library) = file.marks.io_uring.or(imports_io_uring(file)) {
            findings.warn(
                "io_uring",
                format!("{} has {library}, which can read and write without libc", place.display()),
                format!("if it does so for databases, {OTHER_DOOR}; SQLite itself never does"),
            );
        }
    }
    if elf.is_dynamic() && !any {
        let loads = elf.imports_any(&["dlopen", "dlmopen"])
            || libraries
                .iter()
                .any(|(path, library)| !is_libc(path) && library.imports_any(&["dlopen", "dlmopen"]));
        if loads {
            findings.warn(
                "plug-ins",
                "no SQLite yet; it loads libraries while it runs",
                "run it, then ask again with its process id: litefs doctor PID",
            );
        } else {
            findings.ok("sqlite", "none: it opens no databases itself, but may run programs that do");
        }
    }
}

/// libc itself loads libraries, for name services and character sets.
fn is_libc(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "libc.so.6")
}

/// Whether the calls that the shim must see can be intercepted.
fn does_io_through_libc(elf: &Elf) -> bool {
    elf.imports_any(&["pwrite64", "pwrite", "write"]) && elf.imports_any(&["fcntl64", "fcntl"])
}

fn imports_io_uring(elf: &Elf) -> Option<&'static str> {
    elf.imports.iter().any(|name| name.starts_with("io_uring_")).then_some("liburing")
}

/// Says whether this SQLite can damage a database by itself.
pub fn wal_reset_bug(findings: &mut Findings, build: &super::elf::SqliteBuild) {
    if build.has_wal_reset_bug() {
        findings.warn(
            "wal-reset",
            format!("{build} has the WAL-reset bug (3.7.0 to 3.51.2), which can damage a database in WAL mode"),
            "update to SQLite 3.51.3 or newer (or 3.50.7, 3.44.6), unless your distribution has mended this one",
        );
    } else {
        findings.ok("wal-reset", format!("{build} has no WAL-reset bug"));
    }
}
