//! Hooks: what runs when a database changed on this host (`[[on-change]]` of the configuration).
//!
//! A change is seen when applications can see it: on the primary after the commit, on a replica after it was applied.
//! Each hook has a task of its own and one run at a time; what changes during a run gets a run afterwards. What was
//! run for is remembered below `<data.dir>/hooks`, one small file per database, so that a start sees what changed
//! while the agent was down. A run that fails is tried again until it succeeds or the database changes once more:
//! every change is followed by at least one successful run.

mod command;
mod memory;
mod unit;

use crate::DatabaseName;
use crate::config::{HookAction, HookConfig};
use crate::status::api::{DatabaseState, DatabaseStatus};
use crate::status::changes::Subscription;
use crate::status::dbus::BusView;
use crate::status::messages;
use memory::Memory;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// After a run that failed; doubles with each further one.
const RETRY_MIN: Duration = Duration::from_secs(1);

/// Longest pause after runs that failed.
const RETRY_MAX: Duration = Duration::from_secs(300);

/// Where hooks keep and leave things.
#[derive(Clone, Debug)]
pub struct HookDirs {
    /// What was run for: `<data.dir>/hooks`.
    pub memory: PathBuf,
    /// Environment files for units: `/run/litefs/<cluster>/hooks`.
    pub environment: PathBuf,
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The program could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Program.
        program: String,
        /// Reason.
        source: std::io::Error,
    },
    /// It ended with an error.
    #[error("{program} ended with {status}")]
    Status {
        /// Program.
        program: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// It took too long.
    #[error("it took longer than its timeout of {0:?}, and is not waited for any more")]
    Timeout(Duration),
    /// The agent stops, or its hooks change.
    #[error("it was ended because the agent stops or takes over other hooks")]
    Stopped,
    /// systemd did not do it.
    #[error("systemd did not {verb} {unit}: {reason}")]
    Unit {
        /// Unit.
        unit: String,
        /// What was asked for.
        verb: &'static str,
        /// systemd's or the bus's answer.
        reason: String,
    },
    /// The environment file of a unit could not be written.
    #[error("cannot write {path}: {source}", path = .path.display())]
    Environment {
        /// File.
        path: PathBuf,
        /// Reason.
        source: std::io::Error,
    },
}

/// The running hooks of a configuration.
#[derive(Debug)]
pub struct Hooks {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Hooks {
    /// Starts one task for each hook; they end when `stop` does, or with [`Hooks::stop`].
    pub fn spawn(
        view: Arc<dyn BusView>,
        hooks: &[HookConfig],
        dirs: &HookDirs,
        stop: &CancellationToken,
    ) -> Hooks {
        let (stop, tasks) = (stop.child_token(), TaskTracker::new());
        for config in hooks {
            // Before the comparison at the start: nothing that changes in between is lost.
            let changes = view.feed().subscribe();
            let memory = Memory::new(dirs.memory.join(&config.name));
            let environment = dirs.environment.join(format!("{}.env", config.name));
            let hook = Hook {
                config: config.clone(),
                view: view.clone(),
                changes,
                memory,
                environment,
                waiting: BTreeMap::new(),
            };
            let ends = stop.clone();
            tasks.spawn(async move { hook.run(ends).await });
        }
        tasks.close();
        Hooks { stop, tasks }
    }

    /// Ends runs and tasks, and waits for them.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

/// When a database's run is due, and how many have failed.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    failed: u32,
}

struct Hook {
    config: HookConfig,
    view: Arc<dyn BusView>,
    changes: Arc<Subscription>,
    memory: Memory,
    environment: PathBuf,
    waiting: BTreeMap<DatabaseName, Due>,
}

/// What a run is told.
#[derive(Clone, Debug)]
struct Change {
    name: DatabaseName,
    status: DatabaseStatus,
}

impl Change {
    fn position(&self) -> String {
        format!("{}/{}", self.status.txid, self.status.checksum)
    }
}

impl Hook {
    async fn run(mut self, stop: CancellationToken) {
        self.catch_up().await;
        loop {
            let next = self.waiting.values().map(|due| due.at).min();
            tokio::select! {
                () = stop.cancelled() => return,
                set = self.changes.next() => self.note(set.databases),
                () = sleep_until(next) => self.run_due(&stop).await,
            }
        }
    }

    fn note(&mut self, databases: std::collections::BTreeSet<DatabaseName>) {
        let at = Instant::now() + self.config.debounce;
        for name in databases.into_iter().filter(|name| self.config.is_for(name.as_str())) {
            let due = self.waiting.entry(name).or_insert(Due { at, failed: 0 });
            if due.failed > 0 {
                // A new change is a new chance.
                *due = Due { at: due.at.min(at), failed: 0 };
            }
        }
    }

    /// What changed while nobody looked.
    async fn catch_up(&mut self) {
        let (view, memory, config) = (self.view.clone(), self.memory.clone(), self.config.clone());
        let moved = tokio::task::spawn_blocking(move || {
            let remembered = memory.all();
            let mut names: std::collections::BTreeSet<DatabaseName> = view.names().into_iter().collect();
            names.extend(remembered.keys().cloned());
            names.retain(|name| {
                config.is_for(name.as_str())
                    && view.database(name).is_some_and(|status| {
                        let change = Change { name: name.clone(), status };
                        remembered.get(name) != Some(&change.position())
                    })
            });
            names
        });
        match moved.await {
            Ok(names) => self.note(names),
            Err(error) => tracing::error!(hook = self.config.name, %error, "cannot compare databases"),
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

impl Hook {
    /// Runs for what is due: a plain unit once for all, anything else for one database.
    async fn run_due(&mut self, stop: &CancellationToken) {
        let now = Instant::now();
        let mut due: Vec<(Instant, &DatabaseName)> =
            self.waiting.iter().filter(|(_, due)| due.at <= now).map(|(name, due)| (due.at, name)).collect();
        due.sort();
        if !is_plain_unit(&self.config.action) {
            due.truncate(1);
        }
        let names: Vec<DatabaseName> = due.into_iter().map(|(_, name)| name.clone()).collect();
        let changes = self.news(names.clone()).await;
        let Some(newest) = changes.iter().max_by_key(|change| change.status.last_change_unix_ms) else {
            self.waiting.retain(|name, _| !names.contains(name));
            return;
        };
        let done = self.execute(newest, stop).await;
        let (hook, database, position) = (&self.config.name, &newest.name, newest.position());
        match done {
            Ok(()) => {
                self.view.metrics().hook_ran(hook, true);
                tracing::info!(hook, %database, position, "the hook ran");
                for change in &changes {
                    if let Err(error) = self.memory.remember(&change.name, &change.position()) {
                        let database = &change.name;
                        tracing::warn!(
                            hook, %database, %error,
                            "cannot remember that the hook ran: it runs again after a restart"
                        );
                    }
                }
                self.waiting.retain(|name, _| !names.contains(name));
            }
            // Nothing is remembered: it runs after the next start.
            Err(HookError::Stopped) => {}
            Err(error) => {
                self.view.metrics().hook_ran(hook, false);
                let before =
                    names.iter().filter_map(|name| self.waiting.get(name)).map(|due| due.failed).max();
                let failed = before.unwrap_or(0) + 1;
                let pause = RETRY_MIN.saturating_mul(1 << (failed - 1).min(16)).min(RETRY_MAX);
                tracing::warn!(
                    MESSAGE_ID = messages::HOOK_FAILED,
                    hook,
                    %database,
                    position,
                    "the hook failed: {error}; trying again in {} s",
                    pause.as_secs()
                );
                let at = Instant::now() + pause;
                self.waiting.extend(names.into_iter().map(|name| (name, Due { at, failed })));
            }
        }
    }

    /// Those that are not at the position that the hook has run for. A database that stands aside is no news: it
    /// cannot be opened, and changes when it is healed.
    async fn news(&self, names: Vec<DatabaseName>) -> Vec<Change> {
        let (view, memory) = (self.view.clone(), self.memory.clone());
        let changes = tokio::task::spawn_blocking(move || {
            let changes = names.into_iter().filter_map(|name| {
                let status = view.database(&name).filter(|status| status.state == DatabaseState::Ok)?;
                let change = Change { name, status };
                (memory.get(&change.name) != Some(change.position())).then_some(change)
            });
            changes.collect()
        });
        changes.await.unwrap_or_default()
    }

    async fn execute(&self, change: &Change, stop: &CancellationToken) -> Result<(), HookError> {
        let (timeout, variables) = (self.config.timeout, variables(&self.config, &*self.view, change));
        match &self.config.action {
            HookAction::Command(command) => command::run(command, &variables, timeout, stop).await,
            HookAction::Unit { unit, verb } => {
                let unit = unit::instance_of(unit, &change.name);
                unit::write_environment(&self.environment, &variables).await?;
                // systemd goes on with a job that nobody waits for any more.
                tokio::select! {
                    done = unit::run(&unit, *verb) => done,
                    () = tokio::time::sleep(timeout) => Err(HookError::Timeout(timeout)),
                    () = stop.cancelled() => Err(HookError::Stopped),
                }
            }
        }
    }
}

fn is_plain_unit(action: &HookAction) -> bool {
    matches!(action, HookAction::Unit { unit, .. } if !unit::is_template(unit))
}

fn variables(config: &HookConfig, view: &dyn BusView, change: &Change) -> Vec<(&'static str, String)> {
    let constants = view.constants();
    vec![
        ("LITEFS_HOOK", config.name.clone()),
        ("LITEFS_CLUSTER", constants.cluster),
        ("LITEFS_DATABASE", change.name.to_string()),
        ("LITEFS_PATH", constants.mount.join(&change.name).to_string_lossy().into_owned()),
        ("LITEFS_TXID", change.status.txid.to_string()),
        ("LITEFS_POSITION", change.position()),
        ("LITEFS_ROLE", view.role().name.as_str().to_owned()),
    ]
}

#[cfg(test)]
mod tests;
