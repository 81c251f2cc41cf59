//! Finds the last transaction that this node's history shares with the upstream's.

use super::connection::{FollowError, accepted, small_text};
use super::database::Trouble;
use super::{Session, Shared};
use crate::DatabaseName;
use crate::ship::peer::{RefusalCode, percent_encode};
use crate::ship::server::CHECKSUM_PATH;
use ltx::{Checksum, Pos, Txid};
use std::sync::Arc;

/// Transactions compared at most. A plain search needs 64; more only where one side has merged records, and so
/// forgotten checksums between.
const PROBES_MAX: usize = 256;

/// The last common transaction, among those that this node keeps; `None` when none is known to be.
pub(super) async fn common(
    shared: &Arc<Shared>,
    session: &Session,
    name: &DatabaseName,
    there: Option<Pos>,
) -> Result<Option<Txid>, Trouble> {
    let of = name.clone();
    let Some((oldest, newest)) =
        shared.with_database(move |sink| sink.kept(&of)).await.map_err(Trouble::Own)?
    else {
        return Ok(None);
    };
    let newest = there.map_or(newest, |there| newest.min(there.txid));
    let mut search = Search::new(oldest.0, newest.0);
    for _ in 0..PROBES_MAX {
        let Some(txid) = search.next() else {
            break;
        };
        let (of, at) = (name.clone(), Txid(txid));
        let own =
            shared.with_database(move |sink| sink.checksum_at(&of, at)).await.map_err(Trouble::Own)??;
        let theirs = match (own, there) {
            (None, _) => None,
            (_, Some(there)) if there.txid == at => Some(there.checksum),
            _ => ask(session, name, at).await?,
        };
        search.learn(txid, own.zip(theirs).map(|(own, theirs)| own == theirs));
    }
    Ok(search.best.map(Txid))
}

/// The upstream's checksum of a transaction, while it keeps its record.
async fn ask(session: &Session, name: &DatabaseName, txid: Txid) -> Result<Option<Checksum>, FollowError> {
    let path = format!("{CHECKSUM_PATH}?name={}&txid={txid}", percent_encode(name.as_str()));
    match accepted(&session.upstream, session.get(&path).await?).await {
        Ok(body) => {
            let text = small_text(body).await.unwrap_or_default();
            let invalid = |_| FollowError::Invalid {
                upstream: session.upstream.to_string(),
                why: format!("{:?} as a checksum of {name}", text.chars().take(32).collect::<String>()),
            };
            text.parse().map(Some).map_err(invalid)
        }
        Err(FollowError::Refused { code: Some(RefusalCode::NotKept), .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Binary search for the last transaction that is common, where some transactions cannot be compared.
struct Search {
    /// Ranges to look at, best one last.
    ranges: Vec<(u64, u64)>,
    best: Option<u64>,
    first: bool,
}

impl Search {
    fn new(oldest: u64, newest: u64) -> Self {
        Search { ranges: vec![(oldest, newest)], best: None, first: true }
    }

    /// The transaction to compare next.
    fn next(&mut self) -> Option<u64> {
        self.ranges.retain(|(low, high)| low <= high && *low > 0);
        let (low, high) = *self.ranges.last()?;
        // The newest one first: often one side is only ahead of the other.
        Some(if std::mem::take(&mut self.first) { high } else { low + (high - low) / 2 })
    }

    /// What comparing `txid` came to; `None` when it cannot be compared.
    fn learn(&mut self, txid: u64, equal: Option<bool>) {
        let (low, high) = self.ranges.pop().expect("learn follows next");
        match equal {
            Some(true) => {
                self.best = Some(txid);
                self.ranges = vec![(txid + 1, high)];
            }
            Some(false) => self.ranges.push((low, txid - 1)),
            None => {
                self.ranges.push((low, txid - 1));
                self.ranges.push((txid + 1, high));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(oldest: u64, newest: u64, compare: impl Fn(u64) -> Option<bool>) -> (Option<u64>, usize) {
        let mut search = Search::new(oldest, newest);
        let mut probes = 0;
        while let Some(txid) = search.next() {
            search.learn(txid, compare(txid));
            probes += 1;
        }
        (search.best, probes)
    }

    #[test]
    fn the_last_common_transaction_is_found_wherever_it_is() {
        for common in 0..=100 {
            let expected = (common >= 7).then_some(common);
            let (found, probes) = search(7, 100, |txid| Some(txid <= common));
            assert_eq!(found, expected, "common {common}");
            assert!(probes <= 8, "{probes} probes");
        }
        assert_eq!(search(1, u64::MAX - 1, |txid| Some(txid <= 12345)).0, Some(12345));
    }

    #[test]
    fn transactions_that_cannot_be_compared_do_not_hide_those_that_can() {
        for common in 1..=64 {
            // Only every eighth transaction is still known on both sides.
            let compare = |txid: u64| txid.is_multiple_of(8).then_some(txid <= common);
            let expected = (common >= 8).then_some(common / 8 * 8);
            assert_eq!(search(1, 64, compare).0, expected, "common {common}");
        }
        assert_eq!(search(1, 64, |_| None).0, None);
    }

    #[test]
    fn an_empty_range_needs_no_question() {
        assert_eq!(search(5, 4, |_| panic!("asked")), (None, 0));
    }
}
