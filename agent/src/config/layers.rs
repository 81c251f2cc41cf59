//! Reads the files and options that make up a configuration into one list of settings, later ones winning.

use super::keys::{KEYS, Key};
use super::problem::{Origin, Problem, nearest};
use super::sync::{self, UnfinishedRule};
use super::value::Value;
use super::{CONFIG_DIR, HookConfig, SYNC_TABLE, Source, on_change};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// One key that was given a value.
pub(super) struct Setting {
    pub(super) key: &'static Key,
    pub(super) value: Value,
    pub(super) origin: Origin,
}

/// What all layers say.
#[derive(Default)]
pub(super) struct Read {
    pub(super) settings: Vec<Setting>,
    pub(super) hooks: Vec<HookConfig>,
    pub(super) sync_rules: Vec<UnfinishedRule>,
}

/// Reads all layers; what is wrong with them is added to `problems`.
pub(super) fn read(source: &Source, problems: &mut Vec<Problem>) -> Read {
    let mut all = Read::default();
    for path in files(source, problems) {
        match std::fs::read_to_string(&path) {
            Ok(text) => read_file(&path, &text, &mut all, problems),
            Err(error) => problems.push(unreadable(&path, &error)),
        }
    }
    for option in &source.set {
        read_option(option, &mut all.settings, problems);
    }
    all
}

/// The files of a source in the order in which they are read.
fn files(source: &Source, problems: &mut Vec<Problem>) -> Vec<PathBuf> {
    let main = source.main_file();
    let mut drop_in_dir = main.clone().into_os_string();
    drop_in_dir.push(".d");
    let drop_in_dir = PathBuf::from(drop_in_dir);

    let mut files = Vec::new();
    // A file that was asked for has to be there; reading it will say that it is not.
    match main.try_exists() {
        Ok(false) if source.file.is_none() => {}
        _ => files.push(main),
    }
    match std::fs::read_dir(&drop_in_dir) {
        Ok(entries) => {
            let mut drop_ins = Vec::new();
            for entry in entries {
                match entry {
                    Ok(entry) => drop_ins.push(entry.path()),
                    Err(error) => problems.push(unreadable(&drop_in_dir, &error)),
                }
            }
            drop_ins.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
            drop_ins.sort();
            files.extend(drop_ins);
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
        Err(error) => problems.push(unreadable(&drop_in_dir, &error)),
    }
    files
}

fn unreadable(path: &Path, error: &std::io::Error) -> Problem {
    let help = match error.kind() {
        ErrorKind::NotFound => Some(format!(
            "name a file that exists; without --config the agent uses {CONFIG_DIR}/<cluster>.toml if it is there"
        )),
        ErrorKind::PermissionDenied => Some("run as root or as the user of the agent".to_owned()),
        ErrorKind::InvalidData => Some("a configuration file is UTF-8 text".to_owned()),
        _ => None,
    };
    Problem { origin: None, message: format!("cannot read {}: {error}", path.display()), help }
}

fn read_file(path: &Path, text: &str, all: &mut Read, problems: &mut Vec<Problem>) {
    let Read { settings, hooks, sync_rules } = all;
    let document = match DeTable::parse(text) {
        Ok(document) => document,
        Err(error) => {
            problems.push(Problem {
                origin: Some(Origin::at(path, text, error.span().map_or(0, |span| span.start))),
                message: error.message().to_owned(),
                help: None,
            });
            return;
        }
    };
    let first = (settings.len(), problems.len());
    for (name, value) in document.get_ref() {
        let at = |offset| Origin::at(path, text, offset);
        match value.get_ref() {
            DeValue::Table(table) if is_table(name.get_ref()) => {
                for (key, value) in table {
                    let full = format!("{}.{}", name.get_ref(), key.get_ref());
                    read_key(
                        &full,
                        value.get_ref(),
                        at(key.span().start),
                        at(value.span().start),
                        settings,
                        problems,
                    );
                }
            }
            DeValue::Array(tables) if name.get_ref() == on_change::TABLE => {
                on_change::read(tables, &at, hooks, problems);
            }
            _ if name.get_ref() == on_change::TABLE => {
                problems.push(on_change::not_an_array(at(name.span().start)));
            }
            DeValue::Array(tables) if name.get_ref() == SYNC_TABLE => {
                sync::read(tables, &at, sync_rules, problems);
            }
            _ if name.get_ref() == SYNC_TABLE => {
                problems.push(sync::not_an_array(at(name.span().start)));
            }
            DeValue::Table(_) => problems.push(unknown_table(name.get_ref(), at(name.span().start))),
            _ if is_table(name.get_ref()) => problems.push(Problem {
                origin: Some(at(value.span().start)),
                message: format!("{} is a table, not a value", name.get_ref()),
                help: Some(format!("write [{}] and its keys below it", name.get_ref())),
            }),
            plain => {
                read_key(
                    name.get_ref(),
                    plain,
                    at(name.span().start),
                    at(value.span().start),
                    settings,
                    problems,
                );
            }
        }
    }
    // The parser sorts by name; people read from the top.
    settings[first.0..].sort_by_key(|setting| line(Some(&setting.origin)));
    problems[first.1..].sort_by_key(|problem| line(problem.origin.as_ref()));
}

fn line(origin: Option<&Origin>) -> (usize, usize) {
    match origin {
        Some(Origin::File { line, column, .. }) => (*line, *column),
        _ => (0, 0),
    }
}

fn read_key(
    full: &str,
    value: &DeValue<'_>,
    key_origin: Origin,
    value_origin: Origin,
    settings: &mut Vec<Setting>,
    problems: &mut Vec<Problem>,
) {
    match KEYS.iter().find(|key| key.path == full) {
        Some(key) => settings.push(Setting { key, value: Value::from_toml(value), origin: value_origin }),
        None => problems.push(unknown_key(full, key_origin)),
    }
}

fn read_option(option: &str, settings: &mut Vec<Setting>, problems: &mut Vec<Problem>) {
    let origin = Origin::CommandLine(format!("--set {option}"));
    let Some((name, value)) = option.split_once('=') else {
        problems.push(Problem {
            origin: Some(origin),
            message: "no '=' in it".to_owned(),
            help: Some("write --set KEY=VALUE, such as --set http.listen=0.0.0.0:20202".to_owned()),
        });
        return;
    };
    match KEYS.iter().find(|key| key.path == name.trim()) {
        Some(key) => settings.push(Setting { key, value: Value::Bare(value.trim().to_owned()), origin }),
        None => problems.push(unknown_key(name.trim(), origin)),
    }
}

fn tables() -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter_map(|key| key.table_and_name().0)
}

fn is_table(name: &str) -> bool {
    tables().any(|table| table == name)
}

fn unknown_table(name: &str, origin: Origin) -> Problem {
    let help = match nearest(name, tables()) {
        Some(near) => format!("did you mean [{near}]?"),
        None => "`litefs config show` prints all tables".to_owned(),
    };
    Problem { origin: Some(origin), message: format!("unknown table [{name}]"), help: Some(help) }
}

fn unknown_key(full: &str, origin: Origin) -> Problem {
    let message = format!("unknown key {full}");
    // A key's own name in another table is a likelier slip than a distant spelling.
    let name = full.rsplit('.').next().unwrap_or(full);
    let near = KEYS
        .iter()
        .find(|key| key.table_and_name().1 == name)
        .map(|key| key.path)
        .or_else(|| nearest_key(full, name));
    let help = match near {
        Some(near) => format!("did you mean {near}?"),
        None => "`litefs config show` prints all keys".to_owned(),
    };
    Problem { origin: Some(origin), message, help: Some(help) }
}

/// The nearest key: within its table when the table is known, else by its whole name.
fn nearest_key(full: &str, name: &str) -> Option<&'static str> {
    let siblings: Vec<(&str, &str)> = KEYS
        .iter()
        .filter(|key| full.split_once('.').map(|(table, _)| table) == key.table_and_name().0)
        .map(|key| (key.table_and_name().1, key.path))
        .collect();
    let near = nearest(name, siblings.iter().map(|(name, _)| *name));
    siblings
        .iter()
        .find(|(sibling, _)| Some(*sibling) == near)
        .map(|(_, path)| *path)
        .or_else(|| nearest(full, KEYS.iter().map(|key| key.path)))
}
