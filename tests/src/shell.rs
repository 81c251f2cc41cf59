//! Other processes: the SQLite shell, once or as a conversation, and anything else.

use crate::door::is_preload;
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Runs a program; returns what it printed, or what it printed on stderr when it failed.
pub fn try_run(command: &mut Command) -> Result<String, String> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot run {shown}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{} ({})", text(&output.stderr), output.status))
    }
}

/// Runs a program that must succeed; returns what it printed.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    match try_run(command) {
        Ok(output) => output,
        Err(error) => panic!("{command:?} failed: {error}"),
    }
}

/// How long shells wait for other writers. Behind the preload door a write that is refused waits as long.
fn busy_timeout() -> &'static str {
    if is_preload() { ".timeout 4000" } else { ".timeout 20000" }
}

fn shell_command(database: &Path) -> Command {
    let mut command = Command::new("sqlite3");
    // Without the user's ~/.sqliterc; errors end it; it waits for others as applications do.
    command.args(["-batch", "-bail", "-init", "/dev/null", "-cmd", busy_timeout()]).arg(database);
    command
}

/// Runs SQL (and dot commands, each on a line of its own) in a shell of its own; returns rows or the error.
pub fn try_sqlite3(database: &Path, sql: &str) -> Result<String, String> {
    let mut command = shell_command(database);
    // Dot commands have to be alone.
    let mut statements = String::new();
    for line in sql.lines() {
        if line.trim_start().starts_with('.') {
            if !statements.is_empty() {
                command.arg(std::mem::take(&mut statements));
            }
            command.arg(line.trim());
        } else {
            statements.push_str(line);
            statements.push('\n');
        }
    }
    if !statements.is_empty() {
        command.arg(statements);
    }
    try_run(&mut command)
}

/// Runs SQL that must succeed in a shell of its own; returns the rows.
#[track_caller]
pub fn sqlite3(database: &Path, sql: &str) -> String {
    match try_sqlite3(database, sql) {
        Ok(rows) => rows,
        Err(error) => panic!("{sql:?} on {} failed: {error}", database.display()),
    }
}

/// A running SQLite shell with a connection of its own, in a process of its own.
#[derive(Debug)]
pub struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<PipeReader>,
}

/// Printed after each answer.
const END: &str = "-- end of the answer --";

impl Shell {
    /// Opens a database.
    pub fn open(database: &Path) -> Shell {
        let (output, writer) = std::io::pipe().expect("a pipe");
        let mut command = Command::new("sqlite3");
        command.args(["-batch", "-init", "/dev/null", "-cmd", busy_timeout()]).arg(database);
        command.stdin(Stdio::piped()).stdout(writer.try_clone().expect("a pipe")).stderr(writer);
        let mut child = command.spawn().expect("sqlite3 runs");
        let input = child.stdin.take().expect("stdin was piped");
        Shell { child, input, output: BufReader::new(output) }
    }

    /// Sends SQL or dot commands without waiting.
    pub fn send(&mut self, sql: &str) {
        writeln!(self.input, "{sql}").expect("the shell reads");
    }

    /// Runs SQL; returns rows and errors as they are printed.
    pub fn ask(&mut self, sql: &str) -> String {
        self.send(sql);
        self.send(&format!(".print {END}"));
        let mut answer = String::new();
        loop {
            let before = answer.len();
            let read = self.output.read_line(&mut answer).expect("the shell prints UTF-8");
            assert!(read > 0, "the shell ended in {sql:?}: {answer}");
            if answer[before..].trim_end() == END {
                answer.truncate(before);
                return answer.trim_end().to_owned();
            }
        }
    }

    /// Runs SQL that must print nothing but rows.
    #[track_caller]
    pub fn run(&mut self, sql: &str) -> String {
        let answer = self.ask(sql);
        assert!(!answer.contains("Error:") && !answer.contains("error near"), "{sql:?} failed: {answer}");
        answer
    }

    /// Ends it, which closes the database.
    pub fn end(mut self) {
        self.send(".quit");
        self.child.wait().expect("the shell runs");
    }

    /// Ends it with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("the shell runs");
        self.child.wait().expect("the shell was killed");
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // Its stdin is still open; a shell that is in the middle of something is not waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Inserts 1, 2, 3, ... into `t` until the connection fails; gives the last number that was acknowledged.
pub fn insert_until_it_fails(
    database: &Path,
    synchronous: &str,
    acknowledged: &AtomicU64,
    done: &AtomicBool,
) -> u64 {
    let mut shell = Shell::open(database);
    shell.run(&format!("PRAGMA synchronous={synchronous};"));
    let mut last = 0;
    while !done.load(Ordering::Relaxed) {
        let answer = shell.ask(&format!("INSERT INTO t VALUES ({});", last + 1));
        if !answer.is_empty() {
            break;
        }
        last += 1;
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    last
}
