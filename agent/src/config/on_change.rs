//! `[[on-change]]`: what runs when a database changed on this host.
//!
//! Each file adds its hooks to those of the files before it; one of the same name replaces the earlier one.

use super::problem::{Origin, Problem, nearest};
use super::value::{Value, show_duration};
use glob::{MatchOptions, Pattern};
use std::fmt::Write;
use std::time::Duration;
use toml::Spanned;
use toml::de::DeValue;

/// Name of the array of tables.
pub const TABLE: &str = "on-change";

/// Keys of a hook: name, default, and what it means.
pub const HOOK_KEYS: [(&str, &str, &str); 7] = [
    (
        "name",
        "unit, or file name of command",
        "Name of the hook: in messages, metrics and below `<data.dir>/hooks`.",
    ),
    (
        "databases",
        "required",
        "Databases: names and patterns with `*`, `?` and `[...]`, which do not match '/', and `**`, which does.",
    ),
    (
        "unit",
        "none",
        "Unit of systemd, such as \"nginx.service\", that is started or reloaded over the system bus. A template such as \
         \"refresh@.service\" gets the database's name, escaped as by systemd-escape(1), as its instance. \
         `EnvironmentFile=-/run/litefs/<cluster>/hooks/<hook>.env` gives a unit the variables of a command.",
    ),
    (
        "verb",
        "\"reload-or-restart\"",
        "What is done with the unit, as in systemctl(1): \"start\", \"restart\", \"try-restart\", \"reload\", \
         \"reload-or-restart\" or \"try-reload-or-restart\".",
    ),
    (
        "command",
        "none",
        "Program, by its absolute path, and arguments. It has LITEFS_HOOK, LITEFS_CLUSTER, LITEFS_DATABASE, LITEFS_PATH, \
         LITEFS_TXID, LITEFS_POSITION and LITEFS_ROLE in its environment, and runs as the agent's user.",
    ),
    (
        "debounce",
        "\"500ms\"",
        "A run begins this long after the first change, so that what changes meanwhile is one run.",
    ),
    ("timeout", "\"1m\"", "A run that takes longer is ended and has failed."),
];

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookConfig {
    /// Its name.
    pub name: String,
    /// Names and patterns of databases.
    pub databases: Vec<String>,
    /// What runs.
    pub action: HookAction,
    /// Between the first change and the run.
    pub debounce: Duration,
    /// Longest run.
    pub timeout: Duration,
}

/// What a hook runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookAction {
    /// A unit of systemd.
    Unit {
        /// Its name.
        unit: String,
        /// What is done with it.
        verb: UnitVerb,
    },
    /// A program and its arguments.
    Command(Vec<String>),
}

/// What is done with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitVerb {
    /// `start`
    Start,
    /// `restart`
    Restart,
    /// `try-restart`
    TryRestart,
    /// `reload`
    Reload,
    /// `reload-or-restart`
    ReloadOrRestart,
    /// `try-reload-or-restart`
    TryReloadOrRestart,
}

impl UnitVerb {
    /// All of them, by their names in systemctl.
    const ALL: [(&str, UnitVerb); 6] = [
        ("start", UnitVerb::Start),
        ("restart", UnitVerb::Restart),
        ("try-restart", UnitVerb::TryRestart),
        ("reload", UnitVerb::Reload),
        ("reload-or-restart", UnitVerb::ReloadOrRestart),
        ("try-reload-or-restart", UnitVerb::TryReloadOrRestart),
    ];

    /// Its name in systemctl.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(_, verb)| *verb == self).map_or("", |(name, _)| name)
    }
}

impl HookConfig {
    /// Whether it is for a database.
    pub fn is_for(&self, database: &str) -> bool {
        self.databases.iter().any(|pattern| pattern_matches(pattern, database))
    }

    /// The hook as TOML.
    pub(super) fn to_toml(&self) -> String {
        let text = |text: &str| toml::Value::from(text).to_string();
        let list = |list: &[String]| toml::Value::from(list.to_vec()).to_string();
        let mut out = format!("\n[[{TABLE}]]\nname = {}\n", text(&self.name));
        let _ = writeln!(out, "databases = {}", list(&self.databases));
        let _ = match &self.action {
            HookAction::Unit { unit, verb } => {
                writeln!(out, "unit = {}\nverb = {}", text(unit), text(verb.as_str()))
            }
            HookAction::Command(command) => writeln!(out, "command = {}", list(command)),
        };
        let _ = writeln!(out, "debounce = {}", text(&show_duration(self.debounce)));
        let _ = writeln!(out, "timeout = {}", text(&show_duration(self.timeout)));
        out
    }
}

/// As in a shell, but for files that begin with a dot: those are databases like others.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// Whether a name or pattern of the command line or the configuration is for a database.
pub fn pattern_matches(pattern: &str, database: &str) -> bool {
    Pattern::new(pattern).is_ok_and(|pattern| pattern.matches_with(database, MATCHING))
}

/// Reads the `[[on-change]]` tables of one file.
pub(super) fn read(
    tables: &[Spanned<DeValue<'_>>],
    at: &dyn Fn(usize) -> Origin,
    hooks: &mut Vec<HookConfig>,
    problems: &mut Vec<Problem>,
) {
    for table in tables {
        let origin = at(table.span().start);
        let DeValue::Table(keys) = table.get_ref() else {
            problems.push(Problem {
                origin: Some(origin),
                message: format!("{TABLE} is not a table"),
                help: Some(format!("write [[{TABLE}]] and its keys below it")),
            });
            continue;
        };
        let before = problems.len();
        let mut hook = Reading::default();
        for (key, value) in keys {
            if let Err(message) = hook.read_key(key.get_ref(), value.get_ref()) {
                problems.push(Problem { origin: Some(at(value.span().start)), message, help: None });
            }
        }
        if problems.len() > before {
            continue;
        }
        match hook.finish() {
            Ok(hook) => {
                hooks.retain(|earlier| earlier.name != hook.name);
                hooks.push(hook);
            }
            Err(message) => problems.push(Problem { origin: Some(origin), message, help: None }),
        }
    }
}

/// `[on-change]`, or `on-change = ...`, instead of `[[on-change]]`.
pub(super) fn not_an_array(origin: Origin) -> Problem {
    Problem {
        origin: Some(origin),
        message: format!("{TABLE} is not an array of tables"),
        help: Some(format!("write [[{TABLE}]] and the keys of a hook below it, once for each hook")),
    }
}

#[derive(Default)]
struct Reading {
    name: Option<String>,
    databases: Option<Vec<String>>,
    unit: Option<String>,
    verb: Option<UnitVerb>,
    command: Option<Vec<String>>,
    debounce: Option<Duration>,
    timeout: Option<Duration>,
}

impl Reading {
    fn read_key(&mut self, key: &str, value: &DeValue<'_>) -> Result<(), String> {
        let bad = |message: String| format!("{TABLE}.{key} {message}");
        let text = || Value::from_toml(value).text().map(str::to_owned).map_err(bad);
        let duration = |min| Value::from_toml(value).duration(min).map_err(bad);
        match key {
            "name" => self.name = Some(text().and_then(|name| check_name(name).map_err(bad))?),
            "databases" => {
                let patterns = Value::from_toml(value).texts().map_err(bad)?;
                if patterns.is_empty() {
                    return Err(bad("is empty: name at least one database, or \"**\" for all".into()));
                }
                for pattern in &patterns {
                    Pattern::new(pattern)
                        .map_err(|error| bad(format!("has a bad pattern {pattern:?}: {error}")))?;
                }
                self.databases = Some(patterns);
            }
            "unit" => self.unit = Some(text().and_then(|unit| check_unit(unit).map_err(bad))?),
            "verb" => {
                let text = text()?;
                let found = UnitVerb::ALL.iter().find(|(name, _)| *name == text);
                let names: Vec<&str> = UnitVerb::ALL.iter().map(|(name, _)| *name).collect();
                let (_, verb) =
                    found.ok_or_else(|| bad(format!("must be one of {}, is {text:?}", names.join(", "))))?;
                self.verb = Some(*verb);
            }
            "command" => {
                let command = Value::from_toml(value).texts().map_err(bad)?;
                if !command.first().is_some_and(|program| program.starts_with('/')) {
                    return Err(bad("must begin with the absolute path of a program".into()));
                }
                if command.iter().any(|word| word.contains('\0')) {
                    return Err(bad("contains a NUL".into()));
                }
                self.command = Some(command);
            }
            "debounce" => self.debounce = Some(duration(Duration::ZERO)?),
            "timeout" => self.timeout = Some(duration(Duration::from_millis(100))?),
            _ => {
                let near = nearest(key, HOOK_KEYS.iter().map(|(name, _, _)| *name));
                let near = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                return Err(format!("unknown key {TABLE}.{key}{near}"));
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<HookConfig, String> {
        let action = match (self.unit, self.command, self.verb) {
            (Some(unit), None, verb) => {
                HookAction::Unit { unit, verb: verb.unwrap_or(UnitVerb::ReloadOrRestart) }
            }
            (None, Some(command), None) => HookAction::Command(command),
            (None, Some(_), Some(_)) => {
                return Err(format!("{TABLE}.verb is for units; a command is just run"));
            }
            _ => return Err(format!("{TABLE} needs a unit or a command, and not both")),
        };
        let own_name = || {
            let name = match &action {
                HookAction::Unit { unit, .. } => unit.clone(),
                HookAction::Command(command) => command[0].rsplit('/').next().unwrap_or_default().to_owned(),
            };
            check_name(name)
                .map_err(|message| format!("{TABLE} needs a name: that of what it runs {message}"))
        };
        Ok(HookConfig {
            name: self.name.map_or_else(own_name, Ok)?,
            databases: self.databases.ok_or_else(|| format!("{TABLE} needs databases"))?,
            action,
            debounce: self.debounce.unwrap_or(Duration::from_millis(500)),
            timeout: self.timeout.unwrap_or(Duration::from_secs(60)),
        })
    }
}

/// A hook's name is a file name and the value of a metric's label.
fn check_name(name: String) -> Result<String, String> {
    let plain = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= 100
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c));
    if plain { Ok(name) } else { Err(format!("must be letters, digits, '-', '_', '.' and '@', is {name:?}")) }
}

/// See systemd.unit(5).
fn check_unit(unit: String) -> Result<String, String> {
    const TYPES: [&str; 7] = ["service", "socket", "target", "timer", "path", "mount", "slice"];
    let plain = unit.len() <= 255
        && unit.chars().all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c))
        && unit.rsplit_once('.').is_some_and(|(name, kind)| !name.is_empty() && TYPES.contains(&kind));
    if plain { Ok(unit) } else { Err(format!("must be a unit such as \"nginx.service\", is {unit:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ConfigError, Source};

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(&Source { file: Some(file), ..Source::default() })
    }

    fn mistake(text: &str) -> String {
        load(text).unwrap_err().to_string()
    }

    #[test]
    fn hooks_are_read_with_their_defaults_and_shown_as_they_are() {
        let config = load(
            "[[on-change]]\ndatabases = [\"app.db\", \"conf/*.db\"]\nunit = \"nginx.service\"\n\
             [[on-change]]\nname = \"all\"\ndatabases = \"**\"\ncommand = [\"/bin/echo\", \"a b\"]\ndebounce = \"0s\"\n\
             timeout = \"2s\"\n",
        )
        .unwrap();
        let unit = HookAction::Unit { unit: "nginx.service".into(), verb: UnitVerb::ReloadOrRestart };
        assert_eq!(config.on_change[0].action, unit);
        assert_eq!(config.on_change[0].name, "nginx.service");
        assert_eq!(config.on_change[0].debounce, Duration::from_millis(500));
        assert_eq!(config.on_change[1].action, HookAction::Command(vec!["/bin/echo".into(), "a b".into()]));
        let shown = load(&config.to_toml()).unwrap();
        assert_eq!(shown.on_change, config.on_change);
    }

    #[test]
    fn patterns_are_those_of_a_shell() {
        let hook = load(
            "[[on-change]]\ndatabases = [\"app.db\", \"conf/*.db\", \"x/**/y.db\"]\nunit = \"a.service\"\n",
        );
        let hook = hook.unwrap().on_change.remove(0);
        for yes in ["app.db", "conf/a.db", "conf/.a.db", "x/y.db", "x/a/b/y.db"] {
            assert!(hook.is_for(yes), "{yes}");
        }
        for no in ["App.db", "conf/a/b.db", "conf/a.sqlite", "sub/app.db"] {
            assert!(!hook.is_for(no), "{no}");
        }
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let unit = "[[on-change]]\ndatabases = \"a\"\nunit = \"a.service\"\n";
        assert!(
            mistake(&format!("{unit}verbs = \"start\""))
                .contains(":4:9: unknown key on-change.verbs; did you mean verb?")
        );
        assert!(mistake(&format!("{unit}verb = \"stop\"")).contains("must be one of start, restart"));
        assert!(
            mistake(&format!("{unit}command = [\"/bin/a\"]")).contains("a unit or a command, and not both")
        );
        assert!(
            mistake("[[on-change]]\ndatabases = \"a\"").contains(":1:1: on-change needs a unit or a command")
        );
        assert!(mistake("[[on-change]]\nunit = \"a.service\"").contains("needs databases"));
        assert!(mistake("[[on-change]]\ndatabases = []\nunit = \"a.service\"").contains("is empty"));
        assert!(mistake("[[on-change]]\ndatabases = \"[\"\nunit = \"a.service\"").contains("bad pattern"));
        assert!(mistake("[[on-change]]\ndatabases = \"a\"\nunit = \"nginx\"").contains("must be a unit"));
        assert!(mistake("[[on-change]]\ndatabases = \"a\"\ncommand = [\"ls\"]").contains("absolute path"));
        assert!(mistake("[[on-change]]\ndatabases = 5\nunit = \"a.service\"").contains("is 5"));
        assert!(mistake("[on-change]\ndatabases = \"a\"").contains("write [[on-change]]"));
        assert!(mistake("on-change = 5").contains("on-change"));
    }

    #[test]
    fn a_later_file_replaces_the_hook_of_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.toml");
        std::fs::write(&file, "[[on-change]]\ndatabases = \"a\"\nunit = \"a.service\"\n").unwrap();
        std::fs::create_dir(dir.path().join("f.toml.d")).unwrap();
        let more = "[[on-change]]\ndatabases = \"b\"\nunit = \"a.service\"\n\
                    [[on-change]]\ndatabases = \"c\"\nunit = \"c.service\"\n";
        std::fs::write(dir.path().join("f.toml.d/more.toml"), more).unwrap();
        let config = Config::load(&Source { file: Some(file), ..Source::default() }).unwrap();
        let hooks: Vec<_> =
            config.on_change.iter().map(|hook| (hook.name.as_str(), hook.databases[0].as_str())).collect();
        assert_eq!(hooks, [("a.service", "b"), ("c.service", "c")]);
    }
}
