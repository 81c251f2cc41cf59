//! Which commits wait for which followers. A plain value: told what happens, asked what may go on.

use crate::DatabaseName;
use crate::config::{OnTimeout, SyncPolicy, SyncRule};
use crate::log::Lsn;
use ltx::Pos;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A commit that is held, as the doors know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// The database's position after it.
    pub position: Pos,
    /// End of its record in the log.
    pub end: Lsn,
    /// The application asked for durability: it is durable here before it is answered, whatever followers do.
    pub durable: bool,
}

/// Why a held commit was not acknowledged: this node may no longer commit. Whether the next primary has it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fenced;

/// Why a commit may not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Nobody could acknowledge it.
    #[error(
        "{connected} of {acks} members that have to acknowledge it are connected, and sync.on-timeout is \"refuse\""
    )]
    TooFewConnected {
        /// Connected members.
        connected: usize,
        /// Needed ones.
        acks: usize,
    },
    /// Earlier ones were not acknowledged.
    #[error(
        "{acks} members have not acknowledged earlier commits in time, and sync.on-timeout is \"refuse\": again when they have"
    )]
    Late {
        /// Needed members.
        acks: usize,
    },
}

/// What is called when a held commit may go on, or must not.
pub type OnDecided = Box<dyn FnOnce(Result<(), Fenced>) + Send>;

/// Whom to call, and with what.
pub type Decided = (OnDecided, Result<(), Fenced>);

/// How commits under a rule fare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleState {
    /// Enough members are connected, and acknowledge in time.
    Synchronous,
    /// Commits wait longer than the time-out, or would: too few members are connected.
    Waiting,
    /// Commits succeed without acknowledgements.
    Degraded,
    /// Commits fail before they begin.
    Refusing,
}

impl RuleState {
    /// Its name in status, metrics and on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            RuleState::Synchronous => "synchronous",
            RuleState::Waiting => "waiting",
            RuleState::Degraded => "degraded",
            RuleState::Refusing => "refusing",
        }
    }
}

/// What the board must know of the node.
pub trait World {
    /// Everything before this is durable here.
    fn durable(&self) -> Lsn;
    /// Whether this node may still let commits through: its term has not ended, by its own clock.
    fn may_publish(&self) -> bool;
    /// Whether a position is in the database's history here.
    fn in_history(&self, name: &DatabaseName, position: Pos) -> bool;
}

/// A state of a rule that others should hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Patterns of the rule; none for the general one.
    pub databases: Vec<String>,
    /// What it is now.
    pub state: RuleState,
    /// Needed members.
    pub acks: usize,
    /// Members that are connected.
    pub connected: usize,
}

/// Who has to acknowledge commits of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// So many of them.
    pub acks: usize,
    /// All whose acknowledgements count; none: those of every follower do.
    pub named: Vec<String>,
    /// Those that are connected.
    pub connected: Vec<String>,
}

/// A rule for an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleView {
    /// Patterns; none for the general one.
    pub databases: Vec<String>,
    /// What it says.
    pub policy: SyncPolicy,
    /// How commits fare.
    pub state: RuleState,
    /// Members that are connected, by name.
    pub connected: Vec<String>,
    /// Commits that wait now.
    pub waiting: usize,
    /// How long the oldest has waited.
    pub oldest: Option<Duration>,
}

#[derive(Debug)]
struct Rule {
    /// `None`: for all that no other is for.
    databases: Option<SyncRule>,
    policy: SyncPolicy,
    state: RuleState,
    told: RuleState,
    /// Degraded: what was committed without acknowledgements, newest position of each database.
    owed: HashMap<DatabaseName, Pos>,
    /// Of that, what has to be acknowledged for an end of this state: what was owed when enough members were connected.
    targets: Option<HashMap<DatabaseName, Pos>>,
}

struct Waiter {
    rule: usize,
    name: DatabaseName,
    hold: Hold,
    since: Instant,
    then: OnDecided,
}

#[derive(Debug)]
struct Member {
    name: String,
    acknowledged: HashMap<DatabaseName, Pos>,
}

/// All rules, members and waiting commits.
#[derive(Default)]
pub struct Board {
    rules: Vec<Rule>,
    /// Connected followers by node id.
    members: HashMap<u64, Member>,
    waiters: Vec<Waiter>,
    /// The term has ended: nothing that waits is let through.
    fenced: bool,
}

impl Board {
    /// Takes over a configuration. Commits that wait are judged by it from now on.
    pub fn configure(&mut self, general: &SyncPolicy, rules: &[SyncRule]) {
        let rule = |databases: Option<SyncRule>, policy: &SyncPolicy| Rule {
            databases,
            policy: policy.clone(),
            state: RuleState::Synchronous,
            told: RuleState::Synchronous,
            owed: HashMap::new(),
            targets: None,
        };
        self.rules = rules.iter().map(|r| rule(Some(r.clone()), &r.policy)).collect();
        self.rules.push(rule(None, general));
        for i in 0..self.waiters.len() {
            self.waiters[i].rule = self.rule_of(&self.waiters[i].name).unwrap_or(self.rules.len() - 1);
        }
    }

    /// Whether some rule asks for acknowledgements.
    pub fn is_used(&self) -> bool {
        self.rules.iter().any(|rule| rule.policy.acks > 0)
    }

    fn rule_of(&self, name: &DatabaseName) -> Option<usize> {
        self.rules.iter().position(|rule| rule.databases.as_ref().is_none_or(|r| r.is_for(name.as_str())))
    }

    /// A commit begins: `true` if it has to be held.
    ///
    /// # Errors
    /// The rule says that it must not begin now.
    pub fn admit(&self, name: &DatabaseName) -> Result<bool, Refused> {
        let Some(rule) = self.rule_of(name).map(|i| &self.rules[i]).filter(|rule| rule.policy.acks > 0)
        else {
            return Ok(false);
        };
        let acks = rule.policy.acks;
        if rule.policy.on_timeout == OnTimeout::Refuse {
            let connected = self.connected(&rule.policy).count();
            if connected < acks {
                return Err(Refused::TooFewConnected { connected, acks });
            }
            if rule.state == RuleState::Refusing {
                return Err(Refused::Late { acks });
            }
        }
        Ok(true)
    }

    /// Who has to acknowledge commits of a database; `None`: nobody.
    pub fn members_of(&self, name: &DatabaseName) -> Option<Members> {
        let policy = &self.rules[self.rule_of(name)?].policy;
        (policy.acks > 0).then(|| Members {
            acks: policy.acks,
            named: policy.members.clone(),
            connected: self.connected(policy).map(|member| member.name.clone()).collect(),
        })
    }

    /// A commit is in the log and waits.
    pub fn wait(&mut self, name: DatabaseName, hold: Hold, now: Instant, then: OnDecided) {
        let rule = self.rule_of(&name).unwrap_or_default();
        self.waiters.push(Waiter { rule, name, hold, since: now, then });
    }

    /// A follower is connected.
    pub fn joined(&mut self, node: u64, name: &str) {
        self.members.insert(node, Member { name: name.to_owned(), acknowledged: HashMap::new() });
    }

    /// A follower has the database durably in its log up to here.
    pub fn acknowledged(&mut self, node: u64, name: &DatabaseName, position: Pos) {
        if let Some(member) = self.members.get_mut(&node) {
            match member.acknowledged.get_mut(name) {
                Some(known) => *known = position,
                None => drop(member.acknowledged.insert(name.clone(), position)),
            }
        }
    }

    /// A follower is gone. What it acknowledged stays acknowledged for those who were answered; others wait on.
    pub fn left(&mut self, node: u64) {
        self.members.remove(&node);
    }

    /// The term has ended, or a new one begins.
    pub fn fence(&mut self, fenced: bool) {
        self.fenced = fenced;
        if !fenced {
            for rule in &mut self.rules {
                (rule.state, rule.targets) = (RuleState::Synchronous, None);
                rule.owed.clear();
            }
        }
    }

    /// Whether no commit waits.
    pub fn is_idle(&self) -> bool {
        self.waiters.is_empty()
    }

    /// Whether an acknowledgement can change anything.
    pub fn cares_for_acknowledgements(&self) -> bool {
        !self.waiters.is_empty() || self.rules.iter().any(|rule| rule.state != RuleState::Synchronous)
    }

    /// Whether somebody has to look even if nothing is told.
    pub fn next_look(&self, now: Instant) -> Option<Duration> {
        let left = |waiter: &Waiter| {
            let timeout = self.rules[waiter.rule].policy.timeout;
            timeout.saturating_sub(now.saturating_duration_since(waiter.since))
        };
        // Also when all are late: the end of a lease is not told.
        self.waiters
            .iter()
            .map(left)
            .filter(|left| !left.is_zero())
            .min()
            .or_else(|| (!self.waiters.is_empty()).then_some(Duration::from_millis(100)))
    }

    fn connected<'a>(&'a self, policy: &'a SyncPolicy) -> impl Iterator<Item = &'a Member> {
        self.members.values().filter(|member| policy.counts(&member.name))
    }

    fn has_enough(&self, rule: &Rule, name: &DatabaseName, position: Pos, world: &dyn World) -> bool {
        let has = |member: &&Member| {
            member.acknowledged.get(name).is_some_and(|acknowledged| {
                *acknowledged == position
                    || acknowledged.txid > position.txid && world.in_history(name, *acknowledged)
            })
        };
        self.connected(&rule.policy).filter(has).count() >= rule.policy.acks
    }

    /// Decides what can be decided: commits to let go or to fail, and rules whose state is another.
    pub fn settle(&mut self, now: Instant, world: &dyn World) -> (Vec<Decided>, Vec<Report>) {
        let fenced = self.fenced || !world.may_publish();
        let mut late = vec![false; self.rules.len()];
        let mut decided = Vec::new();
        let mut rules = std::mem::take(&mut self.rules);
        for waiter in std::mem::take(&mut self.waiters) {
            let rule = &mut rules[waiter.rule];
            if fenced {
                decided.push((waiter.then, Err(Fenced)));
                continue;
            }
            if self.has_enough(rule, &waiter.name, waiter.hold.position, world) {
                decided.push((waiter.then, Ok(())));
                continue;
            }
            if now.saturating_duration_since(waiter.since) >= rule.policy.timeout {
                late[waiter.rule] = true;
                match rule.policy.on_timeout {
                    OnTimeout::Wait => {}
                    OnTimeout::Degrade => rule.state = RuleState::Degraded,
                    OnTimeout::Refuse => rule.state = RuleState::Refusing,
                }
            }
            let here = !waiter.hold.durable || world.durable() >= waiter.hold.end;
            if rule.state == RuleState::Degraded && here {
                rule.owed.insert(waiter.name, waiter.hold.position);
                decided.push((waiter.then, Ok(())));
                continue;
            }
            self.waiters.push(waiter);
        }
        // A rule that became degraded lets those go, too, that were looked at before.
        let degraded = |waiter: &mut Waiter| {
            rules[waiter.rule].state == RuleState::Degraded
                && (!waiter.hold.durable || world.durable() >= waiter.hold.end)
        };
        for waiter in self.waiters.extract_if(.., degraded).collect::<Vec<_>>() {
            rules[waiter.rule].owed.insert(waiter.name, waiter.hold.position);
            decided.push((waiter.then, Ok(())));
        }
        let mut reports = Vec::new();
        for (number, rule) in rules.iter_mut().enumerate().filter(|(_, rule)| rule.policy.acks > 0) {
            let waits = self.waiters.iter().any(|waiter| waiter.rule == number);
            self.recover(rule, waits, world);
            let connected = self.connected(&rule.policy).count();
            if matches!(rule.state, RuleState::Synchronous | RuleState::Waiting) {
                rule.state = if late[number] { RuleState::Waiting } else { RuleState::Synchronous };
            }
            if rule.state != rule.told && !fenced {
                rule.told = rule.state;
                let databases = rule.databases.as_ref().map(|r| r.databases.clone()).unwrap_or_default();
                reports.push(Report { databases, state: rule.state, acks: rule.policy.acks, connected });
            }
        }
        self.rules = rules;
        (decided, reports)
    }

    /// Ends a rule's bad state when enough members have what it is about.
    fn recover(&self, rule: &mut Rule, waits: bool, world: &dyn World) {
        let enough = self.connected(&rule.policy).count() >= rule.policy.acks;
        match rule.state {
            RuleState::Refusing if enough && !waits => rule.state = RuleState::Synchronous,
            RuleState::Degraded if !enough => rule.targets = None,
            RuleState::Degraded => {
                let mut targets = rule.targets.take().unwrap_or_else(|| rule.owed.clone());
                targets.retain(|name, position| !self.has_enough(rule, name, *position, world));
                if targets.is_empty() {
                    rule.state = RuleState::Synchronous;
                    rule.owed.clear();
                } else {
                    rule.targets = Some(targets);
                }
            }
            _ => {}
        }
    }

    /// All rules that ask for acknowledgements.
    pub fn view(&self, now: Instant) -> Vec<RuleView> {
        let rules = self.rules.iter().enumerate().filter(|(_, rule)| rule.policy.acks > 0);
        rules
            .map(|(number, rule)| {
                let waiters = || self.waiters.iter().filter(|waiter| waiter.rule == number);
                let mut connected: Vec<_> = self.connected(&rule.policy).map(|m| m.name.clone()).collect();
                connected.sort();
                let short = connected.len() < rule.policy.acks;
                let state = match rule.state {
                    RuleState::Synchronous if short && rule.policy.on_timeout == OnTimeout::Refuse => {
                        RuleState::Refusing
                    }
                    RuleState::Synchronous if short => RuleState::Waiting,
                    state => state,
                };
                RuleView {
                    databases: rule.databases.as_ref().map(|r| r.databases.clone()).unwrap_or_default(),
                    policy: rule.policy.clone(),
                    state,
                    connected,
                    waiting: waiters().count(),
                    oldest: waiters().map(|waiter| now.saturating_duration_since(waiter.since)).max(),
                }
            })
            .collect()
    }
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Board");
        out.field("rules", &self.rules).field("members", &self.members).field("waiting", &self.waiters.len());
        out.finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "board_tests.rs"]
mod tests;
