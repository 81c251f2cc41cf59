//! Who goes first when the lease is free.

use super::{Peer, Term};
use crate::DatabaseName;
use crate::ship::engine::Epoch;
use crate::sync::quorum::{self, Promise, Unheard};
use ltx::Pos;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How far a node is. The order is that of elections: more is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Standing {
    /// Epoch of the newest record in the node's log.
    pub record_epoch: Epoch,
    /// Transactions of all databases that are durable there: the sum of their TXIDs.
    pub transactions: u64,
}

impl Standing {
    /// Whether the node has no data at all.
    pub fn is_empty(&self) -> bool {
        self.transactions == 0
    }
}

/// How far a node is with one database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Epoch of its newest record, also when that is no longer kept.
    pub epoch: Epoch,
    /// Where it is, durably.
    #[serde(with = "position")]
    pub position: Pos,
}

impl Progress {
    /// Whether a node that is here has everything that one at `other` has.
    fn reaches(&self, other: &Progress) -> bool {
        self.position == other.position
            || (self.epoch, self.position.txid.0) > (other.epoch, other.position.txid.0)
    }
}

/// How far a node is with each database.
pub type Databases = BTreeMap<DatabaseName, Progress>;

/// What a node says when it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Who it is.
    #[serde(flatten)]
    pub peer: Peer,
    /// Whether it may become primary, and could now.
    pub can_stand: bool,
    /// Newest epoch that it knows.
    pub epoch: Epoch,
    /// How far it is.
    #[serde(flatten)]
    pub standing: Standing,
    /// With each database, when that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub databases: Option<Databases>,
}

/// What a candidate does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// It claims the lease.
    Stand,
    /// This one is further and goes first.
    LetGoFirst(Peer),
    /// It lacks transactions that the last primary had. Another one may come up.
    Behind,
    /// It has none of the data of the last term, or of any: it must not become primary by itself.
    Stale,
    /// Too few members were heard: commits that were acknowledged may be unknown.
    Unheard {
        /// Who was not heard.
        members: Vec<String>,
        /// So many of them are needed.
        needed: usize,
    },
    /// This one has everything that this candidate has, and an acknowledged commit that it lacks.
    CatchUp(Peer),
    /// An acknowledged commit of this database is with this node, which lacks others.
    Lacks {
        /// The database.
        database: DatabaseName,
        /// Who has it.
        with: Peer,
    },
}

/// Chooses for the candidate `own`, which has asked all others; `last` is how far the last holder was.
pub fn choose(own: (u64, Standing), last: Option<Standing>, answers: &[Answer]) -> Choice {
    let best = answers.iter().filter(|a| a.can_stand).max_by_key(|a| (a.standing, a.peer.node_id));
    if let Some(best) = best
        && (best.standing, best.peer.node_id) > (own.1, own.0)
    {
        return Choice::LetGoFirst(best.peer.clone());
    }
    match last {
        Some(last) if !last.is_empty() => {
            if own.1.is_empty() || own.1.record_epoch < last.record_epoch {
                Choice::Stale
            } else if own.1 < last {
                Choice::Behind
            } else {
                Choice::Stand
            }
        }
        _ => Choice::Stand,
    }
}

/// Whether the candidate `own` has every commit that was acknowledged to an application under `promises`: among those
/// it heard is one that has it, and nobody it heard is further than itself with such a database. `last`: what the last
/// primary wrote into the lease.
///
/// # Errors
/// What it does instead of standing.
pub fn proves_all_acknowledged(
    own: &Answer,
    last: Option<&Term>,
    answers: &[Answer],
    promises: &[Promise],
) -> Result<(), Choice> {
    let had_data = last.is_some_and(|term| !term.standing.is_empty());
    // A host that came back with an empty disk cannot tell what it had acknowledged.
    let tells = |answer: &&Answer| answer.databases.is_some() && !(had_data && answer.standing.is_empty());
    let told: Vec<&Answer> = std::iter::once(own).chain(answers).filter(tells).collect();
    let mut heard: BTreeSet<&str> = told.iter().map(|answer| &*answer.peer.name).collect();
    let last_primary = last.map(|term| &term.holder);
    if let Some(primary) = last_primary
        && !told.iter().any(|answer| answer.peer.node_id == primary.node_id)
    {
        // Not another host of its name.
        heard.remove(&*primary.name);
    }
    for promise in promises {
        quorum::knows_all_acknowledged(promise, &heard, last_primary.map(|primary| &*primary.name))
            .map_err(|Unheard { members, needed }| Choice::Unheard { members, needed })?;
    }
    let progress = |answer: &Answer, name: &DatabaseName| {
        answer.databases.as_ref().and_then(|all| all.get(name)).copied().unwrap_or_default()
    };
    for other in &told {
        for (name, theirs) in other.databases.iter().flatten() {
            if !Promise::is_made_for(name.as_str(), promises) || progress(own, name).reaches(theirs) {
                continue;
            }
            // Following it must not cost anything that this node has, also of other databases.
            let covers = |other: &&&Answer| {
                own.databases.iter().flatten().all(|(name, mine)| progress(other, name).reaches(mine))
            };
            return Err(
                match told.iter().filter(|other| progress(other, name).reaches(theirs)).find(covers) {
                    Some(other) => Choice::CatchUp(other.peer.clone()),
                    None => Choice::Lacks { database: name.clone(), with: other.peer.clone() },
                },
            );
        }
    }
    Ok(())
}

mod position {
    use ltx::Pos;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(position: &Pos, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(position)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Pos, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ltx::{Checksum, Txid};

    fn standing(record_epoch: u64, transactions: u64) -> Standing {
        Standing { record_epoch: Epoch(record_epoch), transactions }
    }

    fn answer(node_id: u64, can_stand: bool, standing: Standing) -> Answer {
        let peer = Peer { node_id, name: format!("n{node_id}"), url: String::new() };
        Answer { peer, can_stand, epoch: Epoch(9), standing, databases: None }
    }

    #[test]
    fn the_most_advanced_candidate_goes_first_and_a_newer_epoch_counts_more() {
        let others = [answer(2, true, standing(3, 50)), answer(3, true, standing(2, 900))];
        assert!(
            matches!(choose((1, standing(3, 49)), None, &others), Choice::LetGoFirst(p) if p.node_id == 2)
        );
        assert_eq!(choose((1, standing(3, 51)), None, &others), Choice::Stand);
        // Equals: the same one for everybody.
        assert!(matches!(choose((1, standing(3, 50)), None, &others), Choice::LetGoFirst(_)));
        assert_eq!(choose((4, standing(3, 50)), None, &others), Choice::Stand);
    }

    #[test]
    fn one_that_cannot_stand_is_not_waited_for() {
        let others = [answer(2, false, standing(9, 900))];
        assert_eq!(choose((1, standing(3, 1)), None, &others), Choice::Stand);
    }

    #[test]
    fn an_empty_or_stale_node_never_wins_over_data() {
        let last = Some(standing(5, 100));
        assert_eq!(choose((1, standing(0, 0)), last, &[]), Choice::Stale);
        assert_eq!(choose((1, standing(4, 500)), last, &[]), Choice::Stale);
        assert_eq!(choose((1, standing(5, 99)), last, &[]), Choice::Behind);
        assert_eq!(choose((1, standing(5, 100)), last, &[]), Choice::Stand);
        assert_eq!(choose((1, standing(6, 1)), last, &[]), Choice::Stand);
        // Where nobody ever had data somebody has to begin.
        assert_eq!(choose((1, standing(0, 0)), Some(standing(0, 0)), &[]), Choice::Stand);
        assert_eq!(choose((1, standing(0, 0)), None, &[]), Choice::Stand);
    }

    fn has(node_id: u64, databases: &[(&str, u64, u64)]) -> Answer {
        let entry = |&(name, epoch, txid): &(&str, u64, u64)| {
            let position = Pos { txid: Txid(txid), checksum: Checksum(epoch << 32 | txid) };
            (DatabaseName::new(name).unwrap(), Progress { epoch: Epoch(epoch), position })
        };
        let transactions = databases.iter().map(|(.., txid)| txid).sum();
        let databases = Some(databases.iter().map(entry).collect());
        Answer { databases, ..answer(node_id, false, Standing { transactions, record_epoch: Epoch(5) }) }
    }

    fn prove(own: &Answer, last: u64, answers: &[Answer]) -> Result<(), Choice> {
        let promise = |databases: &[&str], acks| Promise {
            databases: databases.iter().map(|&d| d.to_owned()).collect(),
            acks,
            members: ["n1", "n2", "n3"].map(str::to_owned).to_vec(),
        };
        let holder = Peer { node_id: last, name: format!("n{}", last % 10), url: String::new() };
        let term = Term {
            holder,
            epoch: Epoch(5),
            standing: standing(5, 9),
            released: false,
            beat: 1,
            sync: vec![],
        };
        proves_all_acknowledged(own, Some(&term), answers, &[promise(&["cache"], 0), promise(&[], 1)])
    }

    #[test]
    fn a_candidate_must_hear_enough_members_to_know_every_acknowledged_commit() {
        let own = has(1, &[("app", 5, 9)]);
        let unheard = |members: &[&str]| {
            Err(Choice::Unheard { members: members.iter().map(|&m| m.into()).collect(), needed: 1 })
        };
        // The last primary n3 is dead: this one or n2 has what it acknowledged.
        assert_eq!(prove(&own, 3, &[]), unheard(&["n2", "n3"]));
        assert_eq!(prove(&own, 3, &[has(2, &[("app", 5, 9)])]), Ok(()));
        // One that lost its disk cannot tell.
        assert_eq!(prove(&own, 3, &[has(2, &[])]), unheard(&["n2", "n3"]));
        // The last primary itself knows, but not another host of its name.
        assert_eq!(prove(&own, 3, &[has(3, &[("app", 5, 9)])]), Ok(()));
        assert_eq!(prove(&own, 13, &[has(3, &[("app", 5, 9)])]), unheard(&["n2", "n3"]));
        assert_eq!(prove(&own, 1, &[]), Ok(()));
    }

    #[test]
    fn a_candidate_gets_what_it_lacks_from_one_that_has_everything() {
        let own = has(1, &[("app", 5, 9), ("cache", 5, 7)]);
        let further = has(2, &[("app", 5, 10), ("cache", 5, 7)]);
        assert_eq!(prove(&own, 3, std::slice::from_ref(&further)), Err(Choice::CatchUp(further.peer)));
        let newer = has(2, &[("app", 6, 2), ("cache", 5, 8)]);
        assert_eq!(prove(&own, 3, std::slice::from_ref(&newer)), Err(Choice::CatchUp(newer.peer)));
        // It lacks something, and following it would cut that off.
        let incomparable = has(2, &[("app", 5, 10), ("cache", 5, 6)]);
        let lacks =
            Choice::Lacks { database: DatabaseName::new("app").unwrap(), with: incomparable.peer.clone() };
        assert_eq!(prove(&own, 3, &[incomparable]), Err(lacks));
        // Nothing is promised of a cache.
        assert_eq!(prove(&own, 3, &[has(2, &[("app", 5, 9), ("cache", 5, 8)])]), Ok(()));
        // A record that is no longer kept: the position tells that it is the same.
        let mut idle = has(2, &[("app", 5, 9)]);
        idle.databases.as_mut().unwrap().values_mut().for_each(|progress| progress.epoch = Epoch(0));
        assert_eq!(prove(&own, 3, &[idle]), Ok(()));
    }
}
