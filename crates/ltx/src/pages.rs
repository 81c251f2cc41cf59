//! Which page may come next in an LTX file: the rules that reader and writer share.

use crate::checksum::{lock_page, page_checksum};
use crate::error::Error;
use crate::header::Header;
use crate::position::Checksum;

/// Follows the pages of one file.
pub(crate) struct PageSequence {
    commit: u32,
    lock_page: u32,
    snapshot: bool,
    previous: u32,
    /// Rolling checksum of the pages so far, kept for snapshots that carry checksums.
    rolling: Option<Checksum>,
}

impl PageSequence {
    pub(crate) fn new(header: &Header) -> Self {
        let snapshot = header.is_snapshot();
        PageSequence {
            commit: header.commit,
            lock_page: lock_page(header.page_size),
            snapshot,
            previous: 0,
            rolling: (snapshot && header.has_checksums()).then_some(Checksum::EMPTY),
        }
    }

    /// Accepts `pgno`, whose page header is at `offset`, as the next page.
    pub(crate) fn accept(&mut self, pgno: u32, offset: u64) -> Result<(), Error> {
        if pgno <= self.previous {
            return Err(Error::PageOrder { pgno, previous: self.previous, offset });
        }
        if pgno > self.commit {
            return Err(Error::PageBeyondCommit { pgno, commit: self.commit, offset });
        }
        if pgno == self.lock_page {
            return Err(Error::LockPage { pgno, offset });
        }
        if self.snapshot && u64::from(pgno) != self.successor() {
            return Err(self.gap(offset));
        }
        self.previous = pgno;
        Ok(())
    }

    /// Takes the content of the page that was accepted last.
    pub(crate) fn add_content(&mut self, data: &[u8]) {
        if let Some(rolling) = &mut self.rolling {
            *rolling = rolling.xor(page_checksum(self.previous, data));
        }
    }

    /// Accepts the end of the pages at `offset`.
    pub(crate) fn end(&self, offset: u64) -> Result<(), Error> {
        if self.snapshot && self.successor() <= u64::from(self.commit) {
            return Err(self.gap(offset));
        }
        Ok(())
    }

    /// Checks the stated rolling checksum against the pages of a snapshot.
    pub(crate) fn check_rolling(&self, stated: Checksum) -> Result<(), Error> {
        match self.rolling {
            Some(computed) if computed != stated => Err(Error::SnapshotChecksum { computed, stated }),
            _ => Ok(()),
        }
    }

    /// The page that follows the last one in a snapshot.
    fn successor(&self) -> u64 {
        let next = u64::from(self.previous) + 1;
        if next == u64::from(self.lock_page) { next + 1 } else { next }
    }

    fn gap(&self, offset: u64) -> Error {
        // A successor up to the end of the database fits a page number.
        Error::SnapshotGap { missing: self.successor() as u32, commit: self.commit, offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Txid;

    fn sequence(commit: u32, first: u64) -> PageSequence {
        PageSequence::new(&Header {
            flags: 0,
            page_size: 65536,
            commit,
            min_txid: Txid(first),
            max_txid: Txid(first),
            timestamp_ms: 0,
            pre_apply: if first == 1 { Checksum(0) } else { Checksum::EMPTY },
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: 0,
            epoch: 0,
            owner: None,
        })
    }

    #[test]
    fn snapshot_skips_exactly_the_lock_page() {
        let mut pages = sequence(16_386, 1);
        for pgno in (1..=16_384).chain([16_386]) {
            assert!(matches!(pages.end(0), Err(Error::SnapshotGap { missing, .. }) if missing == pgno));
            pages.accept(pgno, 0).unwrap();
        }
        pages.end(0).unwrap();
        assert!(matches!(pages.accept(16_387, 0), Err(Error::PageBeyondCommit { .. })));
    }

    #[test]
    fn snapshot_may_end_at_the_lock_page() {
        let mut pages = sequence(16_385, 1);
        for pgno in 1..=16_384 {
            pages.accept(pgno, 0).unwrap();
        }
        assert!(matches!(pages.accept(16_385, 0), Err(Error::LockPage { .. })));
        pages.end(0).unwrap();
    }

    #[test]
    fn snapshot_with_a_gap_is_refused_and_other_files_may_have_gaps() {
        let mut pages = sequence(9, 1);
        pages.accept(1, 0).unwrap();
        assert!(matches!(pages.accept(3, 7), Err(Error::SnapshotGap { missing: 2, offset: 7, .. })));
        let mut pages = sequence(u32::MAX, 2);
        for pgno in [3, 16_384, 16_386, u32::MAX] {
            pages.accept(pgno, 0).unwrap();
            assert!(matches!(pages.accept(pgno, 0), Err(Error::PageOrder { .. })));
        }
        pages.end(0).unwrap();
    }
}
