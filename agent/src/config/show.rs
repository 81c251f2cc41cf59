//! Prints the effective configuration.

use super::{Config, KEYS};
use std::fmt::Write;

pub(super) fn to_toml(config: &Config) -> String {
    // Strings and integers in plain structs: nothing in it that TOML cannot say.
    let values = toml::Table::try_from(config).expect("a configuration is plain TOML");
    let mut out = String::new();
    let mut current = None;
    for key in KEYS {
        let (table, name) = key.table_and_name();
        let value = match table {
            Some(table) => values.get(table).and_then(|table| table.get(name)),
            None => values.get(name),
        };
        if table != current {
            let _ = writeln!(out, "\n[{}]", table.unwrap_or_default());
            current = table;
        }
        let line = match value {
            Some(value) => format!("{name} = {value}"),
            None => format!("# {name} is not set"),
        };
        let _ = match config.origins.get(key.path) {
            Some(origin) => writeln!(out, "{line}  # {}", origin.to_string().replace(char::is_control, " ")),
            None => writeln!(out, "{line}"),
        };
    }
    for rule in &config.sync_rules {
        out.push_str(&rule.to_toml());
    }
    for hook in &config.on_change {
        out.push_str(&hook.to_toml());
    }
    out
}
