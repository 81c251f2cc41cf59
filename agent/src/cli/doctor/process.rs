//! Whether the shim is at work in a process, and what the process has open.

use super::elf::Elf;
use super::finding::Findings;
use super::library;
use super::program::{self, RunBy};
use super::world::World;
use crate::cli::failure::{self, Failure};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Tag of the auxiliary vector that says whether the loader ignored LD_PRELOAD (getauxval(3)).
const AT_SECURE: u64 = 23;

/// Looks at a running process.
pub fn check(pid: i32, world: &World) -> Result<Findings, Failure> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let unreadable = |error: io::Error| {
        let (code, what) = match error.kind() {
            io::ErrorKind::NotFound => (failure::NO_INPUT, "no such process".to_owned()),
            io::ErrorKind::PermissionDenied => (failure::NO_PERMISSION, format!("{error}; run this as root")),
            _ => (failure::IO, error.to_string()),
        };
        Failure::new(code, format_args!("PID {pid}: {what}"))
    };
    let maps = fs::read_to_string(proc.join("maps")).map_err(unreadable)?;
    let exe = fs::read_link(proc.join("exe")).map_err(unreadable)?;
    let mapped = mapped_files(&maps);
    let mut findings = Findings::about(format_args!("PID {pid}"));
    findings.ok("program", exe.display().to_string());

    // Behind the preload door the directory is a link to where the files are.
    let real = world.directory.canonicalize().unwrap_or_else(|_| world.directory.clone());
    let held = held(&proc, &real).map_err(unreadable)?;
    if held.is_empty() {
        findings.ok("open", format!("nothing below {}", world.directory.display()));
    } else {
        let names: Vec<_> = held.iter().map(|path| path.display().to_string()).collect();
        findings.ok("open", names.join(", "));
    }
    shim(&mut findings, &proc, &mapped, &held, world);
    secure(&mut findings, &proc);
    sandbox(&mut findings, &proc);
    sqlite(&mut findings, &proc, &mapped);
    Ok(findings)
}

/// Files of which the process has code in memory, each with the name of its link in `map_files`.
fn mapped_files(maps: &str) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = Vec::new();
    for line in maps.lines() {
        // START-END PERMS OFFSET DEVICE INODE PATH
        let mut fields = line.splitn(6, ' ');
        let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else { continue };
        let path = fields.nth(3).unwrap_or_default().trim();
        if permissions.contains('x') && path.starts_with('/') && !files.iter().any(|(_, known)| known == path)
        {
            files.push((range.to_owned(), path.to_owned()));
        }
    }
    files
}

/// Files below a directory that a process has open.
fn held(proc: &Path, directory: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut held = BTreeSet::new();
    for entry in fs::read_dir(proc.join("fd"))? {
        // Descriptors come and go while we look.
        if let Ok(path) = entry.and_then(|entry| fs::read_link(entry.path()))
            && path.starts_with(directory)
        {
            held.insert(path);
        }
    }
    Ok(held)
}

fn shim(
    findings: &mut Findings,
    proc: &Path,
    mapped: &[(String, String)],
    held: &BTreeSet<PathBuf>,
    world: &World,
) {
    let loaded = mapped.iter().find(|(_, path)| {
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        Path::new(path).file_name().is_some_and(|name| name == library::FILE)
    });
    let wanted = world.uses_preload();
    match loaded {
        Some((_, path)) => match path.strip_suffix(" (deleted)") {
            None => findings.ok("shim", format!("{path} is loaded")),
            Some(path) => findings.warn(
                "shim",
                format!("an older {path} is loaded; the file has been replaced"),
                "restart the program at a quiet moment",
            ),
        },
        None if !wanted => {
            findings.ok("shim", "not loaded; the FUSE door, which is open here, does not need it")
        }
        None if held.is_empty() => findings.warn(
            "shim",
            "not loaded",
            "start it with `litefs exec -- PROGRAM` before it opens a database of the cluster",
        ),
        None => {
            let preload = environment_of(proc, "LD_PRELOAD");
            let why = match preload {
                Some(value) if value.contains(library::FILE) => {
                    format!(", although its LD_PRELOAD is {value}")
                }
                _ => String::new(),
            };
            findings.fail(
                "shim",
                format!("not loaded{why}, and it has files of the cluster open: what it writes is caught late or not at all"),
                "stop it and start it with `litefs exec -- PROGRAM`",
            );
        }
    }
}

/// A variable of the environment that the process was started with.
fn environment_of(proc: &Path, name: &str) -> Option<String> {
    let environment = fs::read(proc.join("environ")).ok()?;
    environment.split(|byte| *byte == 0).find_map(|setting| {
        let setting = String::from_utf8_lossy(setting);
        setting.strip_prefix(name)?.strip_prefix('=').map(str::to_owned)
    })
}

fn secure(findings: &mut Findings, proc: &Path) {
    let Ok(vector) = fs::read(proc.join("auxv")) else {
        return findings.warn(
            "privileges",
            "cannot read its auxiliary vector",
            "run this as root to see whether the loader ignored LD_PRELOAD",
        );
    };
    const WORD: usize = size_of::<usize>();
    let word = |bytes: &[u8]| {
        let mut word = [0; WORD];
        word.copy_from_slice(bytes);
        usize::from_ne_bytes(word) as u64
    };
    let secure = vector
        .chunks_exact(2 * WORD)
        .any(|entry| word(&entry[..WORD]) == AT_SECURE && word(&entry[WORD..]) != 0);
    if secure {
        findings.fail(
            "privileges",
            "started with privileges from its file (AT_SECURE): the loader ignored LD_PRELOAD",
            "run it from an account that needs no such bit, or use the FUSE door",
        );
    } else {
        findings.ok("privileges", "the loader follows LD_PRELOAD");
    }
}

fn sandbox(findings: &mut Findings, proc: &Path) {
    let status = fs::read_to_string(proc.join("status")).unwrap_or_default();
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t").map(str::to_owned))
    };
    let no_new_privileges = field("NoNewPrivs").as_deref() == Some("1");
    match field("Seccomp").as_deref() {
        Some("0") | None => findings.ok(
            "sandbox",
            if no_new_privileges { "no system call filter; no new privileges" } else { "no system call filter" },
        ),
        Some(mode) => findings.warn(
            "sandbox",
            format!("filters system calls (seccomp mode {mode})"),
            "the filter must allow socket, connect, sendmsg, recvmsg, mmap and futex: the shim talks to the agent",
        ),
    }
}

/// Which SQLite is in memory.
fn sqlite(findings: &mut Findings, proc: &Path, mapped: &[(String, String)]) {
    let mut any = false;
    for (range, path) in mapped {
        // The link opens the very file, also one that is deleted or in another mount namespace. It may need rights
        // that reading the path does not.
        let link = proc.join("map_files").join(range);
        let Ok(Some(elf)) = Elf::read(&link).or_else(|_| Elf::read(Path::new(path))) else { continue };
        if let Some(build) = &elf.marks.sqlite {
            any = true;
            findings.ok("sqlite", format!("{build} in {path}"));
            program::wal_reset_bug(findings, build);
        }
        if let Some(package) = elf.marks.go_sqlite {
            any = true;
            findings.fail(
                "sqlite",
                format!("{path} has {package}: an SQLite in Go, which calls the kernel without libc"),
                "use a driver on the C library, or the FUSE door",
            );
        }
    }
    if !any {
        findings.ok("sqlite", "none in memory now");
        // A program may load it later; what its file says is all there is.
        if let Ok(file) = program::check(&proc.join("exe"), RunBy::Anyone) {
            findings.list.extend(file.list.into_iter().filter(|finding| finding.check == "static"));
        }
    }
}
