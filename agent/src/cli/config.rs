//! `litefs config`.

use super::failure::{self, Failure};
use crate::config::{Config, Source};
use clap::Subcommand;
use std::io::Write;

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Report everything that is wrong with the configuration
    Check,
    /// Print the effective configuration and where its values come from
    Show,
}

pub fn run(command: ConfigCommand, source: &Source, out: &mut dyn Write) -> Result<u8, Failure> {
    let config =
        Config::load(source).map_err(|error| Failure { code: failure::CONFIG, message: listed(&error) })?;
    match command {
        ConfigCommand::Check => {
            let from = match config.origins.len() {
                0 => "all keys have their defaults".to_owned(),
                1 => "1 key is set".to_owned(),
                n => format!("{n} keys are set"),
            };
            writeln!(out, "the configuration of cluster {} is good: {from}", config.cluster)
        }
        ConfigCommand::Show => out.write_all(config.to_toml().as_bytes()),
    }
    .map_err(failure::stdout)?;
    Ok(0)
}

/// Problems below one line that says how many there are.
fn listed(error: &crate::config::ConfigError) -> String {
    let problems = match error.problems.len() {
        1 => "1 problem".to_owned(),
        n => format!("{n} problems"),
    };
    format!("{problems} in the configuration\n{error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn source(file: Option<PathBuf>) -> Source {
        Source { file, dir: "/nonexistent".into(), ..Source::default() }
    }

    #[test]
    fn show_prints_and_check_counts() {
        let mut source = source(None);
        source.set = vec!["mount.threads=2".into()];
        let mut out = Vec::new();
        assert_eq!(run(ConfigCommand::Show, &source, &mut out).unwrap(), 0);
        let shown = String::from_utf8(out).unwrap();
        assert!(shown.contains("\nthreads = 2  # command line, --set mount.threads=2\n"), "{shown}");
        let mut out = Vec::new();
        run(ConfigCommand::Check, &source, &mut out).unwrap();
        assert_eq!(out, b"the configuration of cluster db is good: 1 key is set\n");
    }

    #[test]
    fn a_bad_configuration_exits_with_78_and_lists_everything() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.toml");
        std::fs::write(&file, "a = 1\nb = 2\n").unwrap();
        let failure = run(ConfigCommand::Check, &source(Some(file)), &mut Vec::new()).unwrap_err();
        assert_eq!(failure.code, 78);
        assert!(failure.message.starts_with("2 problems in the configuration\n"), "{failure}");
        assert!(failure.message.contains("a.toml:2:1: unknown key b"), "{failure}");
    }
}
