//! The command line.

mod agent;
mod client;
mod config;
mod diverged;
mod doctor;
mod exec;
mod export;
mod failure;
mod generate;
mod generate_bus;
mod import;
pub mod logging;
mod ltx;
mod reload;
mod role;
mod run;
mod status;
mod wait;
mod watch;

use crate::DatabaseName;
use crate::config::{Config, Source};
use clap::{Args, CommandFactory, Parser, Subcommand};
use client::Client;
use failure::Failure;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Keeps SQLite databases identical on every host of a fleet.
///
/// One agent per host and cluster shows a directory of ordinary SQLite databases to applications. One host is the
/// primary and takes writes; all others are replicas: live and readable.
#[derive(Debug, Parser)]
#[command(name = "litefs", version, disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,

    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Args, Debug, Clone)]
struct Global {
    /// Name of the cluster [default: db]
    #[arg(short, long, global = true, value_name = "NAME")]
    cluster: Option<String>,

    /// Configuration file [default: /etc/litefs/<cluster>.toml, if there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Set a configuration key, such as http.listen=0.0.0.0:20202; may be repeated
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Control socket of the agent [default: socket.path of the configuration]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground
    Agent,
    /// Show role, databases, lag and followers of this host
    ///
    /// Exits with 0 when all is well, 1 when a database is quarantined or the upstream is not connected, and 3 when
    /// no agent answers.
    Status {
        /// Print JSON instead of tables
        #[arg(long)]
        json: bool,
    },
    /// Read the configuration of the running agent again, and wait until it is taken over
    ///
    /// A configuration with mistakes is an error and changes nothing.
    Reload,
    /// Make this host the primary
    ///
    /// The present primary hands its lease over: its writers wait for some milliseconds, and nothing is lost. Where there
    /// is no primary because none of the running hosts has all data, --force makes this one primary with what it has.
    ///
    /// Exits with 65 when this host did not become the primary.
    Promote {
        /// Also without a primary to take over from, and although transactions may be missing here
        #[arg(long)]
        force: bool,
    },
    /// Make another host the primary in place of this one
    ///
    /// The candidate that is farthest takes over. Exits with 65 when none did; this host stays primary then.
    Demote,
    /// Hand the lease of this host over to another one
    ///
    /// Exits with 65 when it did not take it; this host stays primary then.
    Handoff {
        /// Name of the host [default: the one that is farthest]
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
    },
    /// Let go of the lease of an agent that died, so that another host takes over at once
    ///
    /// systemd does this when it gives the agent up (litefs-release-lease@.service). It does nothing to the lease of an agent that lives (exit code 65).
    ReleaseLease,
    /// Print the role and positions of this host, and each change of them, one per line
    ///
    /// Lines are "role ROLE [PRIMARY]", "position NAME TXID/CHECKSUM", "quarantined NAME REASON", "diverged NAME
    /// DIRECTORY" and "halt-lock NAME [HOST]", without a host when the lock has ended. It begins with what is, follows the agent through restarts, and ends when nobody reads it.
    Watch {
        /// Print JSON instead, one object per line, in the form of /events
        #[arg(long)]
        json: bool,
        /// Databases to print, and nothing else: names, or patterns with *, ? and **
        #[arg(value_name = "DATABASE")]
        databases: Vec<String>,
    },
    /// Wait until this host is what is asked for, also for its agent to start
    ///
    /// All conditions that are given have to be true at the same time. Exits with 75 when they are not within the
    /// timeout.
    Wait(wait::Conditions),
    /// List the databases with their positions and sizes
    List,
    /// Copy a database to a file, as of one transaction, and check the copy
    ///
    /// The file is written beside PATH and takes its place when it is complete and checked.
    Export {
        /// Database, as `litefs list` shows it
        #[arg(value_parser = database_name)]
        name: DatabaseName,
        /// File to write
        path: PathBuf,
    },
    /// Make a file the content of a database, as one transaction (primary only)
    ///
    /// The database is created, or replaced while it is in use: open connections see the new content.
    Import {
        /// Database
        #[arg(value_parser = database_name)]
        name: DatabaseName,
        /// SQLite file to read; it must not be in use
        path: PathBuf,
    },
    /// Run a program so that the agent sees its commits
    ///
    /// Where the agent has the preload door, the program is started with the library that meets the agent
    /// (LD_PRELOAD); one that cannot be intercepted is not started. Behind the FUSE door the program is just run.
    ///
    /// The exit code is the program's, or 125 when the agent or the library is not there, 126 when the program cannot
    /// be run or intercepted, and 127 when there is no such program.
    Exec {
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
        command: Vec<OsString>,
    },
    /// Run a program once this host may write
    ///
    /// With --promote or --on-primary this host is the primary, and takes writes, when the program begins; nothing keeps
    /// it so. With --with-halt-lock-on the program may write one database wherever the primary is: the lock is renewed
    /// while the program runs and ends with it. A lock that is lost makes further commits of the program fail.
    ///
    /// The exit code is the program's (128 and its number if a signal ended it), or as of `litefs exec` when it was not
    /// run, 65 or 69 when this host may not write, and 75 when not within the timeout.
    Run(run::Run),
    /// Say whether a program, a process or this host fits, and what to do
    ///
    /// Without PROGRAM or PID it looks at the host. A PROGRAM is looked at for the preload door: whether the library
    /// can be loaded before it and sees its SQLite. A PID tells more, as programs load libraries while they run.
    ///
    /// Exits with 0 when all is OK, 1 when something is to be looked at (WARN), and 2 when something does not work
    /// (FAIL).
    Doctor {
        /// A program, or the number of a process
        #[arg(value_name = "PROGRAM|PID")]
        target: Option<PathBuf>,
        /// Print JSON instead of tables
        #[arg(long)]
        json: bool,
    },
    /// Look at files of transactions
    #[command(subcommand)]
    Ltx(ltx::LtxCommand),
    /// Look at what this host had alone when another one led, and get it back
    ///
    /// When a primary comes back that had transactions nobody else had got, it follows the new primary and keeps its
    /// own state as files. The command reads these files; it needs no agent.
    #[command(subcommand)]
    Diverged(diverged::DivergedCommand),
    /// Check or show the configuration
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Print the version
    Version,
    /// Print a completion script for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page of litefs, or write all pages to a directory
    #[command(hide = true)]
    Man {
        /// Directory to write to
        #[arg(long)]
        dir: Option<PathBuf>,
    },
}

fn database_name(text: &str) -> Result<DatabaseName, crate::name::NameError> {
    DatabaseName::new(text)
}

impl Global {
    fn source(&self) -> Source {
        Source {
            file: self.config.clone(),
            cluster: self.cluster.clone(),
            set: self.set.clone(),
            ..Source::default()
        }
    }

    fn client(&self) -> Client {
        if let Some(socket) = &self.socket {
            return Client::new(socket.clone(), None);
        }
        match Config::load(&self.source()) {
            Ok(config) => Client::new(config.socket.path, None),
            // A running agent can be asked although somebody broke its configuration, or may read it alone.
            Err(error) => {
                let cluster = self.cluster.as_deref().unwrap_or(crate::config::DEFAULT_CLUSTER);
                let socket = PathBuf::from(format!("/run/litefs/{cluster}/control.sock"));
                Client::new(socket, Some(error.to_string()))
            }
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { failure::USAGE } else { 0 };
            // Help and mistakes are both for people; if nobody reads them there is nobody to tell.
            let _ = error.print();
            return code.into();
        }
    };
    let mut out = std::io::stdout().lock();
    let done = cli.run(&mut out).and_then(|code| out.flush().map(|()| code).map_err(failure::stdout));
    match done {
        Ok(code) => code.into(),
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("litefs: {failure}");
            }
            failure.code.into()
        }
    }
}

impl Cli {
    /// Runs the command and returns its exit code.
    fn run(self, out: &mut dyn Write) -> Result<u8, Failure> {
        let global = &self.global;
        match self.command {
            Command::Agent => agent::run(&global.source()),
            Command::Status { json } => block_on(status::status(global.client(), json, out)),
            Command::Reload => block_on(reload::reload(global.client())),
            Command::Promote { force } => {
                let query: &[(&str, &str)] = if force { &[("force", "true")] } else { &[] };
                block_on(role::change(global.client(), "/v1/promote", query))
            }
            Command::Demote => block_on(role::change(global.client(), "/v1/demote", &[])),
            Command::Handoff { to } => {
                let query: Vec<(&str, &str)> = to.iter().map(|to| ("to", &**to)).collect();
                block_on(role::change(global.client(), "/v1/handoff", &query))
            }
            Command::ReleaseLease => block_on(role::release(&global.source(), out)),
            Command::Watch { json, databases } => {
                block_on(watch::watch(global.client(), &databases, json, out))
            }
            Command::Wait(conditions) => block_on(wait::wait(&global.client(), &conditions)),
            Command::List => block_on(status::list(global.client(), out)),
            Command::Export { name, path } => block_on(export::export(global.client(), &name, &path, out)),
            Command::Import { name, path } => block_on(import::import(global.client(), &name, &path, out)),
            Command::Exec { command } => block_on(exec::run(global, &command)),
            Command::Run(run) => block_on(run::run(global, run)),
            Command::Doctor { target, json } => block_on(doctor::run(global, target.as_deref(), json, out)),
            Command::Ltx(command) => match ltx::run(command, out) {
                Ok(()) => Ok(0),
                Err(error) => match error.root_cause().downcast_ref::<std::io::Error>() {
                    Some(io) if io.kind() == std::io::ErrorKind::BrokenPipe => Ok(0),
                    _ => Err(Failure::new(failure::DATA, format_args!("{error:#}"))),
                },
            },
            Command::Diverged(command) => diverged::run(command, &global.source(), out),
            Command::Config(command) => config::run(command, &global.source(), out),
            Command::Version => {
                writeln!(out, "litefs {}", env!("CARGO_PKG_VERSION")).map_err(failure::stdout)?;
                Ok(0)
            }
            Command::Completions { shell } => generate::completions(Cli::command(), shell, out),
            Command::Man { dir } => generate::man(Cli::command(), dir.as_deref(), out),
        }
    }
}

/// Runs a client command. One thread is enough for one connection.
fn block_on<F: Future<Output = Result<u8, Failure>>>(future: F) -> Result<u8, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(failure::SOFTWARE, format_args!("cannot start: {error}")))?
        .block_on(future)
}

/// Text from elsewhere without what could steer a terminal.
fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod socket_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn database_names_are_checked_before_anything_is_done() {
        let error = Cli::try_parse_from(["litefs", "export", "../a", "out"]).unwrap_err();
        assert!(error.to_string().contains("not a plain relative UTF-8 path"), "{error}");
    }

    #[test]
    fn global_options_may_follow_the_command() {
        let cli = Cli::try_parse_from(["litefs", "agent", "-c", "shop", "--set", "mount.threads=2"]).unwrap();
        let source = cli.global.source();
        assert_eq!(source.cluster.as_deref(), Some("shop"));
        assert_eq!(source.set, ["mount.threads=2"]);
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_printed() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a\u{fffd}[2Jb\u{fffd}c");
    }
}
