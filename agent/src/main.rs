//! The `litefs` command.

fn main() -> std::process::ExitCode {
    litefs_agent::cli::main()
}
