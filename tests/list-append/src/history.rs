//! What clients on all hosts saw of one list, and whether that can be true of one list.

use std::collections::{HashMap, HashSet};

#[derive(Debug)]
struct Append {
    begin: u128,
    end: u128,
    value: String,
}

#[derive(Debug)]
struct Observation {
    connection: (String, u32),
    id: u64,
    value: String,
}

/// All that clients saw.
#[derive(Debug, Default)]
pub struct History {
    acknowledged: Vec<Append>,
    unknown: usize,
    /// In the order of each client.
    reads: Vec<Observation>,
}

/// What a history was like.
#[derive(Debug)]
pub struct Summary {
    /// Appends that succeeded.
    pub acknowledged: usize,
    /// Appends of which nobody knows: they failed half-way.
    pub unknown: usize,
    /// Reads.
    pub reads: usize,
    /// Reads that saw an append which nobody acknowledged, and which is not there in the end.
    pub vanished: usize,
}

impl History {
    /// Takes in what a client printed.
    pub(crate) fn read(&mut self, client: &str, text: &str) {
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |i: usize| words[i].parse::<u128>().expect("a number");
            match words[..] {
                ["append", _, _, "ok", value] => {
                    self.acknowledged.push(Append { begin: number(1), end: number(2), value: value.into() });
                }
                ["append", ..] => self.unknown += 1,
                ["read", _, _, _, _, value] => self.reads.push(Observation {
                    connection: (client.into(), number(1) as u32),
                    id: number(4) as u64,
                    value: value.into(),
                }),
                _ => panic!("{client} printed {line:?}"),
            }
        }
    }

    /// Proves from the list at the end, `(id, value)` by id, that
    ///
    /// - every append that succeeded is in it, once: nothing acknowledged was lost;
    /// - appends that did not overlap are in it in the order in which they happened: nobody wrote in an older term
    ///   once there was a newer one;
    /// - every read saw a beginning of it, unless its last entry was never acknowledged: hosts did not diverge;
    /// - no connection saw less than it had seen before.
    #[track_caller]
    pub fn check(&self, list: &[(u64, String)]) -> Summary {
        let ids: HashMap<&str, u64> = list.iter().map(|(id, value)| (&**value, *id)).collect();
        assert_eq!(ids.len(), list.len(), "an append is in the list twice");
        let by_id: HashMap<u64, &str> = list.iter().map(|(id, value)| (*id, &**value)).collect();
        let lost: Vec<&str> =
            self.acknowledged.iter().map(|a| &*a.value).filter(|value| !ids.contains_key(value)).collect();
        assert!(lost.is_empty(), "acknowledged appends are lost: {lost:?}");

        let mut by_begin: Vec<&Append> = self.acknowledged.iter().collect();
        by_begin.sort_by_key(|append| append.begin);
        let mut by_end = by_begin.clone();
        by_end.sort_by_key(|append| append.end);
        let (mut ended, mut newest) = (by_end.iter().peekable(), None::<&Append>);
        for append in by_begin {
            while let Some(before) = ended.next_if(|other| other.end < append.begin) {
                newest = newest.into_iter().chain([*before]).max_by_key(|other| ids[&*other.value]);
            }
            if let Some(before) = newest {
                assert!(
                    ids[&*before.value] < ids[&*append.value],
                    "{before:?} ended before {append:?} began, but is behind it in the list"
                );
            }
        }

        let acknowledged: HashSet<&str> = self.acknowledged.iter().map(|a| &*a.value).collect();
        let mut seen: HashMap<&(String, u32), u64> = HashMap::new();
        let mut vanished = 0;
        for read in &self.reads {
            if by_id.get(&read.id) != Some(&&*read.value) {
                assert!(
                    !acknowledged.contains(&*read.value),
                    "{read:?} is no beginning of the list, which has {:?} there",
                    by_id.get(&read.id)
                );
                vanished += 1;
            }
            let before = seen.insert(&read.connection, read.id).unwrap_or(0);
            assert!(before <= read.id, "{read:?} after the same connection had seen {before}");
        }
        Summary {
            acknowledged: self.acknowledged.len(),
            unknown: self.unknown,
            reads: self.reads.len(),
            vanished,
        }
    }
}
