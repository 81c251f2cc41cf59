//! `litefs completions` and `litefs man`.

use super::failure::{self, Failure};
use super::generate_bus;
use crate::config::{HOOK_KEYS, KEYS, SYNC_RULE_KEYS};
use clap_mangen::roff::{Roff, bold, italic, roman};
use std::io::{self, Write};
use std::path::Path;

/// Where the pages come from, in their footer.
const SOURCE: &str = concat!("litefs ", env!("CARGO_PKG_VERSION"));

pub fn completions(
    mut command: clap::Command,
    shell: clap_complete::Shell,
    out: &mut dyn Write,
) -> Result<u8, Failure> {
    // The generator panics when it cannot write, so it writes to memory.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "litefs", &mut script);
    out.write_all(&script).map_err(failure::stdout)?;
    Ok(0)
}

/// Without a directory prints `litefs(1)`; else writes it, a page per command, `litefs.toml(5)` and
/// `io.litefs.LiteFS1(5)`.
pub fn man(command: clap::Command, dir: Option<&Path>, out: &mut dyn Write) -> Result<u8, Failure> {
    let Some(dir) = dir else {
        clap_mangen::Man::new(command).render(out).map_err(failure::stdout)?;
        return Ok(0);
    };
    let failed = |error| Failure::file(failure::CANNOT_CREATE, dir, error);
    std::fs::create_dir_all(dir).map_err(failed)?;
    let mut command = command.disable_help_subcommand(true);
    command.build();
    command_pages(&command, dir).map_err(failed)?;
    std::fs::write(dir.join("litefs.toml.5"), configuration_page()).map_err(failed)?;
    std::fs::write(dir.join("io.litefs.LiteFS1.5"), generate_bus::page(SOURCE)).map_err(failed)?;
    Ok(0)
}

/// A page for a command and one for each of its commands that is not hidden.
fn command_pages(command: &clap::Command, dir: &Path) -> io::Result<()> {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        command_pages(inner, dir)?;
    }
    clap_mangen::Man::new(command.clone()).source(SOURCE).generate_to(dir).map(|_| ())
}

/// `litefs.toml(5)`, from the table of keys.
fn configuration_page() -> String {
    let mut page = Roff::new();
    page.control("TH", ["litefs.toml", "5", "", SOURCE]);
    page.control("SH", ["NAME"]);
    page.text([roman("litefs.toml - configuration of a litefs agent")]);
    page.control("SH", ["SYNOPSIS"]);
    page.text([italic("/etc/litefs/<cluster>.toml")]);
    page.control("br", []);
    page.text([italic("/etc/litefs/<cluster>.toml.d/*.toml")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(
        "TOML. Every key has a default, so that no file is needed. Later layers win, key by key: the defaults, the \
         file (or the one that --config names), its drop-ins in the order of their names, and --set KEY=VALUE on the \
         command line. A key table.name is written as name under [table]. Sizes are \"512KiB\", \"64MiB\", \"2GiB\" \
         or a number of bytes; durations \"100ms\", \"5s\", \"10m\", \"24h\"; paths are absolute; URLs are \
         http://host:port.",
    )]);
    page.text([
        roman("Unknown keys and bad values are errors; "),
        bold("litefs config check"),
        roman(" reports all of them, and "),
        bold("litefs config show"),
        roman(" prints the effective configuration."),
    ]);
    page.control("SH", ["KEYS"]);
    for key in KEYS {
        page.control("TP", []);
        page.text([bold(key.path), roman(" (default: "), roman(key.default), roman(")")]);
        page.text([roman(key.doc.replace('`', ""))]);
    }
    page.control("SH", ["SYNCHRONOUS DATABASES"]);
    page.text([roman(
        "Each [[sync-rule]] table says something else than [sync] for some databases. The first rule that names a \
         database is for it.",
    )]);
    for (name, default, doc) in SYNC_RULE_KEYS {
        page.control("TP", []);
        page.text([bold(name), roman(" (default: "), roman(default.replace('`', "")), roman(")")]);
        page.text([roman(doc.replace('`', ""))]);
    }
    page.control("SH", ["HOOKS"]);
    page.text([roman(
        "Each [[on-change]] table is a hook: a unit or a command that runs when a database changed on this host, on the \
         primary after the commit, on a replica after it was applied. A hook has one run at a time; what changes during a \
         run gets a run afterwards, and a start runs it for what changed while the agent was down. A run that fails is \
         tried again, with growing pauses, until it succeeds. A hook of a later file replaces one of the same name.",
    )]);
    for (name, default, doc) in HOOK_KEYS {
        page.control("TP", []);
        page.text([bold(name), roman(" (default: "), roman(default), roman(")")]);
        page.text([roman(doc.replace('`', ""))]);
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([bold("litefs"), roman("(1), "), bold("io.litefs.LiteFS1"), roman("(5)")]);
    page.to_roff()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_and_the_configuration_get_a_page() {
        let dir = tempfile::tempdir().unwrap();
        man(crate::cli::Cli::command(), Some(dir.path()), &mut Vec::new()).unwrap();
        for page in
            ["litefs.1", "litefs-agent.1", "litefs-status.1", "litefs-config-check.1", "litefs.toml.5"]
        {
            assert!(dir.path().join(page).exists(), "{page}");
        }
        let page = std::fs::read_to_string(dir.path().join("litefs.toml.5")).unwrap();
        assert!(page.contains("lease.primary\\-url"), "{page}");
    }

    #[test]
    fn completions_know_the_commands() {
        let mut out = Vec::new();
        completions(crate::cli::Cli::command(), clap_complete::Shell::Bash, &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("completions"));
    }
}
