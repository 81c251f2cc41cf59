//! How many members of a sync set a candidate must hear, to know every commit that was acknowledged.
//!
//! An acknowledged commit is with the primary and with `acks` other members. So among `heard` members, this candidate
//! included, is one that has it as soon as those that were not heard are too few to be all who have it. The candidate
//! needs the position of each database from all it heard: that with the newest epoch and the most transactions has
//! every acknowledged commit of that database. What was reported while the primary was degraded is not covered.

use crate::config::{SyncPolicy, SyncRule, pattern_matches};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What a primary promises of some databases: a commit counts only when so many members have it. The lease says it, so
/// that it holds in an election whatever the configuration of those who stand is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// Names and patterns; none: all that no earlier promise is for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub databases: Vec<String>,
    /// So many members besides the primary; 0: nothing is promised.
    pub acks: usize,
    /// Who counts.
    pub members: Vec<String>,
}

impl Promise {
    /// What a configuration promises, the first that names a database being for it; none where nothing is.
    pub fn all_of(general: &SyncPolicy, rules: &[SyncRule]) -> Vec<Promise> {
        let promise = |databases: Vec<String>, policy: &SyncPolicy| Promise {
            databases,
            acks: policy.acks,
            members: policy.members.clone(),
        };
        let mut all: Vec<Promise> =
            rules.iter().map(|rule| promise(rule.databases.clone(), &rule.policy)).collect();
        all.push(promise(Vec::new(), general));
        if all.iter().all(|promise| promise.acks == 0) { Vec::new() } else { all }
    }

    fn is_for(&self, database: &str) -> bool {
        self.databases.is_empty() || self.databases.iter().any(|pattern| pattern_matches(pattern, database))
    }

    /// Whether one of `promises` is made for a database.
    pub fn is_made_for(database: &str, promises: &[Promise]) -> bool {
        promises.iter().find(|promise| promise.is_for(database)).is_some_and(|promise| promise.acks > 0)
    }
}

/// What an election still lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unheard {
    /// Members that were not heard.
    pub members: Vec<String>,
    /// So many of them must be heard as well.
    pub needed: usize,
}

/// Whether a candidate that heard these hosts, itself among them, knows every commit that was acknowledged under a
/// promise. `last_primary`: who led the newest term, when that is known.
///
/// # Errors
/// Who is missing. A promise without members counts whoever follows, so nothing can be proven without the last primary.
pub fn knows_all_acknowledged(
    promise: &Promise,
    heard: &BTreeSet<&str>,
    last_primary: Option<&str>,
) -> Result<(), Unheard> {
    if promise.acks == 0 || last_primary.is_some_and(|primary| heard.contains(primary)) {
        return Ok(());
    }
    let members: BTreeSet<&str> = promise.members.iter().map(String::as_str).collect();
    let is_member = |primary: &str| members.contains(primary);
    // Members that have the commit: a primary that is itself a member is one more.
    let have = promise.acks + usize::from(last_primary.is_some_and(is_member));
    let unheard: Vec<String> = members.difference(heard).map(|member| (*member).to_owned()).collect();
    if members.is_empty() {
        return Err(Unheard { members: last_primary.map(str::to_owned).into_iter().collect(), needed: 1 });
    }
    match unheard.len().checked_sub(have.saturating_sub(1)) {
        Some(needed @ 1..) => Err(Unheard { members: unheard, needed }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise(acks: usize, members: &[&str]) -> Promise {
        let members = members.iter().map(|m| (*m).to_owned()).collect();
        Promise { databases: Vec::new(), acks, members }
    }

    const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

    fn subset(of: usize, bits: usize) -> BTreeSet<&'static str> {
        (0..of).filter(|i| bits >> i & 1 == 1).map(|i| NAMES[i]).collect()
    }

    /// Exactly when no set of hosts that can have acknowledged is wholly unheard.
    #[test]
    fn it_is_known_exactly_when_every_possible_quorum_was_heard() {
        for size in 1..=5 {
            for acks in 1..size {
                let promise = promise(acks, &NAMES[..size]);
                for heard_bits in 0..1 << size {
                    let heard = subset(size, heard_bits);
                    for (primary, name) in NAMES.iter().enumerate().take(size) {
                        let escaped = (0..1usize << size).any(|bits| {
                            let have = subset(size, bits | 1 << primary);
                            bits >> primary & 1 == 0 && have.len() == acks + 1 && have.is_disjoint(&heard)
                        });
                        let known = knows_all_acknowledged(&promise, &heard, Some(name));
                        assert_eq!(known.is_ok(), !escaped, "{size} {acks} {heard:?} {primary}");
                        if let Err(Unheard { members, needed }) = known {
                            let with: BTreeSet<&str> = heard
                                .iter()
                                .copied()
                                .chain(members.iter().take(needed).map(String::as_str))
                                .collect();
                            assert!(knows_all_acknowledged(&promise, &with, Some(name)).is_ok());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_first_rule_that_names_a_database_is_for_it() {
        let rule = |pattern: &str, acks| SyncRule {
            databases: vec![pattern.into()],
            policy: SyncPolicy { acks, ..SyncPolicy::default() },
        };
        assert_eq!(Promise::all_of(&SyncPolicy::default(), &[rule("a*", 0)]), []);
        let all = Promise::all_of(&SyncPolicy::default(), &[rule("cache/*", 0), rule("**", 1)]);
        assert!(!Promise::is_made_for("cache/x", &all) && Promise::is_made_for("app.db", &all));
    }

    #[test]
    fn a_primary_that_is_no_member_or_not_known_adds_nothing() {
        let two_of_three = promise(2, &["a", "b", "c"]);
        let heard = |names: &[&'static str]| names.iter().copied().collect::<BTreeSet<_>>();
        assert!(knows_all_acknowledged(&two_of_three, &heard(&["b", "c"]), None).is_ok());
        let missing = knows_all_acknowledged(&two_of_three, &heard(&["b"]), Some("x")).unwrap_err();
        assert_eq!(missing, Unheard { members: vec!["a".into(), "c".into()], needed: 1 });
        assert!(knows_all_acknowledged(&two_of_three, &heard(&["b"]), Some("a")).is_ok());
        assert!(knows_all_acknowledged(&two_of_three, &heard(&["x"]), Some("x")).is_ok());
        assert!(knows_all_acknowledged(&promise(1, &[]), &heard(&["b"]), Some("a")).is_err());
        assert!(knows_all_acknowledged(&promise(0, &["a"]), &heard(&[]), None).is_ok());
    }
}
