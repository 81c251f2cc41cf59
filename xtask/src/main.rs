//! Developer tasks, run as `cargo xtask TASK`.

mod bench;
mod clients;
mod demo;
mod generated;
mod package;
mod run;
mod setup;
mod sqlite_tests;
mod test;

use clap::Parser;
use std::process::ExitCode;

/// Tasks of this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", arg_required_else_help = true)]
enum Task {
    /// Install what building and testing need, as far as it is missing: Debian packages, and clients of SQLite from
    /// PyPI and npm below target/clients
    Setup,
    /// Build, then show a primary and a replica at work on this machine
    Demo,
    /// Install what is needed and run every check and test
    Test,
    /// Write the manual pages to packaging/man
    Man,
    /// Write the shell completions to packaging/completions
    Completions,
    /// Build .deb and .rpm packages below target/packages
    Package(package::Options),
    /// Build a signed apt repository of the packages, so that `apt install litefs` works
    AptRepository(package::RepositoryOptions),
    /// Write the D-Bus interfaces to packaging/dbus/interfaces
    Dbus,
    /// Compare this product with native SQLite on this machine
    Bench(bench::Options),
    /// Run SQLite's own tests on the plain file system and in a mount, and compare
    SqliteTests(sqlite_tests::Options),
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Setup => setup::packages()
            .and_then(|()| setup::rust_components())
            .and_then(|()| setup::test_packages())
            .and_then(|()| clients::install()),
        Task::Demo => demo::run(),
        Task::Test => test::run(),
        Task::Man => generated::write_man(),
        Task::Completions => generated::write_completions(),
        Task::Package(options) => package::run(&options).map(drop),
        Task::AptRepository(options) => package::repository(&options),
        Task::Dbus => generated::write_interfaces(),
        Task::Bench(options) => bench::run(options),
        Task::SqliteTests(options) => sqlite_tests::run(options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nfailed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
