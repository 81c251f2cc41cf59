//! Programs of a test that run beside it, and are told what to do.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

/// A program that answers a line with some.
#[derive(Debug)]
pub struct Client {
    child: Child,
    /// Until it is ended by the end of its input.
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
}

impl Client {
    /// Starts it.
    pub fn start(command: &mut Command) -> Client {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the program runs");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        Client { child, input, output }
    }

    /// Says `go`; reads so many lines.
    pub fn ask(&mut self, lines: usize) -> Vec<String> {
        self.send("go");
        self.lines(lines)
    }

    /// Says something.
    pub fn send(&mut self, line: &str) {
        let input = self.input.as_mut().expect("it is open");
        writeln!(input, "{line}").expect("the program reads");
    }

    /// Reads a line.
    pub fn line(&mut self) -> String {
        self.lines(1).pop().expect("the program answers")
    }

    /// Says something; reads a line.
    pub fn tell(&mut self, line: &str) -> String {
        self.send(line);
        self.line()
    }

    /// Says something; reads what comes before a line like `last`.
    pub fn tell_until(&mut self, line: &str, last: &str) -> Vec<String> {
        self.send(line);
        let mut said = Vec::new();
        loop {
            let line = self.line();
            if line == last {
                return said;
            }
            said.push(line);
        }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("it is our child")
    }

    /// Ends its input, and waits until it has ended well.
    #[track_caller]
    pub fn finish(mut self) {
        self.input = None;
        assert!(self.wait().success());
    }

    /// Ends it with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("the program runs");
        self.child.wait().expect("the program was killed");
    }

    /// Reads so many lines.
    pub fn lines(&mut self, lines: usize) -> Vec<String> {
        self.output.by_ref().take(lines).map(|line| line.expect("text")).collect()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
