//! Programs that are built for this, and running ones.

use super::elf::{Elf, SqliteBuild};
use super::finding::{Finding, Level, worst};
use super::process;
use super::program::{RunBy, check};
use super::world::World;
use crate::cli::failure::{self, Failure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// A program that writes a file as SQLite does, in C.
const WRITES: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <unistd.h>
int main(int argc, char **argv) {
    if (argc < 2) return 0;
    int fd = open(argv[1], O_RDWR);
    struct flock lock = { F_RDLCK, SEEK_SET, 0, 1 };
    return fcntl(fd, F_SETLK, &lock) + pwrite(fd, "x", 1, 0);
}
"#;

/// The texts of an SQLite library of a date.
fn sqlite_texts(date: &str) -> String {
    let hash = "0123456789abcdef".repeat(4);
    format!(
        "const char *const texts[] = {{ \"SQLite format 3\", \"{date} 12:00:00 {hash}\", \"3.45.6\", \
         \"cannot start a transaction within a transaction\" }};\n"
    )
}

struct Workshop {
    dir: TempDir,
}

impl Workshop {
    fn new() -> Workshop {
        Workshop { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Compiles C.
    fn build(&self, name: &str, compiler: &str, source: &str, flags: &[&str]) -> PathBuf {
        let file = self.path(&format!("{name}.c"));
        fs::write(&file, source).unwrap();
        let program = self.path(name);
        let mut command = Command::new(compiler);
        command.arg(&file).arg("-o").arg(&program).args(flags);
        let output = command.output().unwrap_or_else(|error| panic!("cannot run {compiler}: {error}"));
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        program
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

fn look(program: &Path) -> Vec<Finding> {
    check(program, RunBy::Anyone).unwrap().list
}

/// The one finding of a check.
fn of<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
    let mut found = findings.iter().filter(|finding| finding.check == check);
    match (found.next(), found.next()) {
        (Some(finding), None) => finding,
        _ => panic!("not one finding of {check}: {findings:#?}"),
    }
}

#[test]
fn an_ordinary_program_is_fine() {
    let workshop = Workshop::new();
    let program = workshop.build("app", "cc", WRITES, &[]);
    let findings = look(&program);
    assert_eq!(worst(&findings), Level::Ok, "{findings:#?}");
    assert!(of(&findings, "sqlite").found.starts_with("none"), "{findings:#?}");
}

#[test]
fn static_programs_fail_of_either_kind() {
    let workshop = Workshop::new();
    for flag in ["-static", "-static-pie"] {
        let program = workshop.build("app", "cc", WRITES, &[flag]);
        let finding = of(&look(&program), "static").clone();
        assert_eq!(finding.level, Level::Fail, "{flag}");
        assert!(finding.advice.is_some_and(|advice| advice.contains("FUSE door")), "{flag}");
    }
}

#[test]
fn a_program_for_musl_fails() {
    let workshop = Workshop::new();
    let program = workshop.build("app", "musl-gcc", WRITES, &[]);
    let findings = look(&program);
    assert_eq!(of(&findings, "libc").level, Level::Fail, "{findings:#?}");
    assert!(of(&findings, "libc").found.contains("musl"));
}

#[test]
fn a_program_of_another_kind_fails() {
    let workshop = Workshop::new();
    let program = workshop.build("app", "cc", WRITES, &[]);
    let mut bytes = fs::read(&program).unwrap();
    // e_machine: PowerPC, as a program that came with the wrong package.
    bytes[18] = 21;
    fs::write(&program, &bytes).unwrap();
    assert_eq!(of(&look(&program), "kind").level, Level::Fail);
    // And one that is cut off.
    fs::write(&program, &bytes[..100]).unwrap();
    assert_eq!(worst(&look(&program)), Level::Fail);
}

#[test]
fn set_user_id_and_set_group_id_fail_for_others() {
    let workshop = Workshop::new();
    let program = workshop.build("app", "cc", WRITES, &[]);
    for (mode, fails) in [(0o4755, true), (0o2755, true), (0o2745, false), (0o755, false)] {
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
        let level = if fails { Level::Fail } else { Level::Ok };
        assert_eq!(of(&look(&program), "privileges").level, level, "{mode:o}");
        // Its owner gains nothing by the bit, so the loader follows LD_PRELOAD.
        let own = check(&program, RunBy::Me).unwrap().list;
        assert_eq!(of(&own, "privileges").level, Level::Ok, "{mode:o}");
    }
}

#[test]
fn file_capabilities_fail() {
    let workshop = Workshop::new();
    let program = workshop.build("app", "cc", WRITES, &[]);
    let set = Command::new("setcap").arg("cap_net_bind_service=ep").arg(&program).status().unwrap();
    assert!(set.success(), "setcap needs root and a file system with extended attributes");
    let finding = of(&look(&program), "privileges").clone();
    assert_eq!(finding.level, Level::Fail);
    assert!(finding.found.contains("capabilities"), "{finding:?}");
}

#[test]
fn an_sqlite_that_does_not_call_libc_fails() {
    let workshop = Workshop::new();
    let texts = sqlite_texts("2026-05-01");
    let raw =
        workshop.build("raw", "cc", &format!("{texts} int main(void) {{ return !texts[0]; }}"), &["-O0"]);
    let finding = of(&look(&raw), "sqlite").clone();
    assert_eq!(finding.level, Level::Fail, "{finding:?}");
    assert!(finding.found.contains("does not call libc"));
    // The same texts in a program that does.
    let calls = workshop.build("calls", "cc", &format!("{texts} {WRITES}"), &[]);
    let findings = look(&calls);
    assert_eq!(worst(&findings), Level::Ok, "{findings:#?}");
    assert!(of(&findings, "sqlite").found.contains("SQLite 3.45.6 of 2026-05-01"), "{findings:#?}");
}

#[test]
fn an_sqlite_in_a_library_beside_the_program_is_found() {
    let workshop = Workshop::new();
    let texts = sqlite_texts("2024-03-01");
    workshop.build(
        "libdata.so",
        "cc",
        &format!("{texts} const char *first(void) {{ return texts[0]; }}\n{WRITES}"),
        &["-shared", "-fPIC"],
    );
    let beside = format!("-L{}", workshop.dir.path().display());
    let program = workshop.build(
        "app",
        "cc",
        "const char *first(void); int main(void) { return !first(); }",
        &[&beside, "-ldata", "-Wl,-rpath,$ORIGIN"],
    );
    let findings = look(&program);
    assert!(of(&findings, "sqlite").found.contains("libdata.so"), "{findings:#?}");
    assert_eq!(of(&findings, "sqlite").level, Level::Ok);
    assert_eq!(of(&findings, "wal-reset").level, Level::Warn);
    fs::remove_file(workshop.path("libdata.so")).unwrap();
    assert!(of(&look(&program), "libraries").found.contains("libdata.so"));
}

#[test]
fn an_sqlite_in_go_fails() {
    let workshop = Workshop::new();
    let source = "__attribute__((section(\".go.buildinfo\"), used)) static const char info[] = \"dep\\tmodernc.org/sqlite\\tv1.38.0\";\n\
                  int main(void) { return 0; }";
    let program = workshop.build("app", "cc", source, &["-static"]);
    let findings = look(&program);
    assert_eq!(of(&findings, "sqlite").level, Level::Fail, "{findings:#?}");
    assert!(of(&findings, "sqlite").found.contains("modernc.org/sqlite"));
    assert!(of(&findings, "static").found.contains("Go"));
}

#[test]
fn scripts_are_followed_to_the_program_that_runs_them() {
    let workshop = Workshop::new();
    let program = workshop.build("interpreter", "cc", WRITES, &["-static"]);
    let direct = workshop.script("direct", &format!("#! {} -x\n", program.display()));
    assert_eq!(of(&look(&direct), "static").level, Level::Fail);
    let twice = workshop.script("twice", &format!("#!{}\n", direct.display()));
    assert_eq!(look(&twice).iter().filter(|finding| finding.check == "script").count(), 2);
    let env = workshop.script("env", "#!/usr/bin/env -S LANG=C sh -e\n");
    assert!(of(&look(&env), "script").found.ends_with("/sh"), "{:#?}", look(&env));
    let missing = workshop.script("missing", "#!/no/such/interpreter\n");
    assert_eq!(of(&look(&missing), "script").level, Level::Fail);
    let endless = workshop.script("endless", "#!placeholder\n");
    fs::write(&endless, format!("#!{}\n", endless.display())).unwrap();
    assert_eq!(worst(&look(&endless)), Level::Fail);
}

#[test]
fn what_is_no_program_is_said() {
    let workshop = Workshop::new();
    let text = workshop.script("text", "hello");
    assert_eq!(of(&look(&text), "format").level, Level::Fail);
    let failed = |path: &Path| check(path, RunBy::Anyone).unwrap_err();
    assert_eq!(failed(&workshop.path("missing")).code, failure::NO_INPUT);
    assert_eq!(failed(workshop.dir.path()).code, failure::NO_INPUT);
    assert_eq!(failed(Path::new("no-such-command-in-path")).code, failure::NO_INPUT);
}

#[test]
fn programs_that_load_libraries_are_asked_again_while_they_run() {
    let workshop = Workshop::new();
    let source = "#include <dlfcn.h>\nint main(int c, char **v) { return !dlopen(v[c - 1], RTLD_NOW); }";
    let findings = look(&workshop.build("app", "cc", source, &[]));
    assert_eq!(of(&findings, "plug-ins").level, Level::Warn, "{findings:#?}");
}

#[test]
fn real_programs_have_the_sqlite_that_they_say() {
    // This one has SQLite compiled in.
    let own = Elf::read(&std::env::current_exe().unwrap()).unwrap().unwrap().marks.sqlite.unwrap();
    assert!(!own.has_wal_reset_bug(), "{own:?}");
    let ask = "SELECT substr(sqlite_source_id(), 1, 10)";
    let compiled_in = rusqlite::Connection::open_in_memory().unwrap();
    let date: String = compiled_in.query_row(ask, [], |row| row.get(0)).unwrap();
    assert_eq!(own.date, date);
    // The shell of this machine has it in a library.
    let findings = look(Path::new("sqlite3"));
    let output = Command::new("sqlite3").args([":memory:", "SELECT sqlite_version()", ask]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let (version, date) = said.trim().split_once('\n').unwrap();
    let found = &of(&findings, "sqlite").found;
    assert!(found.starts_with(&format!("SQLite {version} of {date} in ")), "{findings:#?}");
}

#[test]
fn the_wal_reset_bug_is_told_by_the_date_of_the_source() {
    for (date, has) in [
        ("2009-12-07", false),
        ("2010-07-22", true),
        ("2022-12-28", true),
        ("2026-01-09", true),
        ("2026-03-06", false),
        ("2026-03-13", false),
    ] {
        let build = SqliteBuild { version: None, date: date.to_owned() };
        assert_eq!(build.has_wal_reset_bug(), has, "{date}");
    }
}

/// A process that is ended.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A cluster with the preload door, without asking an agent.
fn world(directory: &Path) -> World {
    let mut status = crate::status::fake::status();
    status.mount.door = "preload".to_owned();
    World { directory: directory.to_owned(), runtime_dir: directory.to_owned(), agent: Ok(status) }
}

/// Runs `sqlite3` with a database open, under other libraries.
fn shell(database: &Path, preload: &str) -> Running {
    let mut command = Command::new("sqlite3");
    command
        .arg("-batch")
        .arg(database)
        .env("LD_PRELOAD", preload)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"BEGIN; CREATE TABLE t(x);\n.print ready\n").unwrap();
    // Stays open, or the shell would end.
    std::mem::forget(input);
    let mut ready = [0; 5];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    Running(child)
}

#[test]
fn a_process_with_databases_open_needs_the_shim() {
    let workshop = Workshop::new();
    let (managed, elsewhere) = (workshop.path("managed"), workshop.path("elsewhere"));
    fs::create_dir_all(&managed).unwrap();
    fs::create_dir_all(&elsewhere).unwrap();
    let shim = workshop.build("liblitefs.so", "cc", "int litefs_test;", &["-shared", "-fPIC"]);
    let shim = shim.to_str().unwrap();
    let shim_of = |database: PathBuf, preload: &str| {
        let process = shell(&database, preload);
        let findings = process::check(process.0.id().cast_signed(), &world(&managed)).unwrap().list;
        assert_eq!(of(&findings, "privileges").level, Level::Ok);
        assert_eq!(of(&findings, "sandbox").level, Level::Ok);
        assert!(of(&findings, "sqlite").found.contains("libsqlite3"), "{findings:#?}");
        of(&findings, "shim").level
    };
    assert_eq!(shim_of(managed.join("a.db"), ""), Level::Fail);
    assert_eq!(shim_of(managed.join("b.db"), shim), Level::Ok);
    assert_eq!(shim_of(elsewhere.join("a.db"), ""), Level::Warn);

    // Replaced while it is loaded, as an update does.
    let process = shell(&managed.join("c.db"), shim);
    fs::remove_file(shim).unwrap();
    let findings = process::check(process.0.id().cast_signed(), &world(&managed)).unwrap().list;
    assert_eq!(of(&findings, "shim").level, Level::Warn, "{findings:#?}");

    // Behind the other door nobody needs it.
    let mut world = world(&managed);
    world.agent = Err(Failure::new(failure::NO_AGENT, "none"));
    let process = shell(&managed.join("d.db"), "");
    let findings = process::check(process.0.id().cast_signed(), &world).unwrap().list;
    assert_eq!(of(&findings, "shim").level, Level::Ok);
}

#[test]
fn a_process_that_is_not_there_is_said() {
    let workshop = Workshop::new();
    // Above the highest process id.
    let failed = process::check(i32::MAX, &world(workshop.dir.path())).unwrap_err();
    assert_eq!(failed.code, failure::NO_INPUT);
}

#[test]
fn a_filter_of_system_calls_is_seen() {
    // Strict enough: no new privileges, and a filter that allows everything.
    let source = r#"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>
int main(void) {
    struct sock_filter allow = { BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW };
    struct sock_fprog program = { 1, &allow };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 1;
    puts("ready");
    fflush(stdout);
    pause();
}
"#;
    let workshop = Workshop::new();
    let program = workshop.build("app", "cc", source, &[]);
    let mut process = Running(Command::new(program).stdout(Stdio::piped()).spawn().unwrap());
    let mut ready = [0; 5];
    std::io::Read::read_exact(process.0.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let findings = process::check(process.0.id().cast_signed(), &world(workshop.dir.path())).unwrap().list;
    assert_eq!(of(&findings, "sandbox").level, Level::Warn, "{findings:#?}");
}
