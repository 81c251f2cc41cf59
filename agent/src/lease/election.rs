//! Who goes first when the lease is free.

use super::Peer;
use crate::ship::engine::Epoch;
use serde::{Deserialize, Serialize};

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

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(record_epoch: u64, transactions: u64) -> Standing {
        Standing { record_epoch: Epoch(record_epoch), transactions }
    }

    fn answer(node_id: u64, can_stand: bool, standing: Standing) -> Answer {
        let peer = Peer { node_id, name: format!("n{node_id}"), url: String::new() };
        Answer { peer, can_stand, epoch: Epoch(9), standing }
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
}
