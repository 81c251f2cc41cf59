//! Step 1: the hot journal.

use super::super::Database;
use super::super::checksums::{Checksums, Mark};
use super::{Recovered, RecoveryError, failed, open_if_there, remove_if_there};
use crate::log::RecordKind;
use ltx::{Txid, page_checksum};
use sqlite_file::journal::{self, Journal};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

impl Database {
    /// Step 1. Returns whether there was a journal. With the checksums of the pages at a mark only pages that have them are
    /// played back: see [`play_back_known`].
    pub(in crate::database) fn recover_journal(
        &self,
        known: Option<(&Checksums, Mark)>,
        done: &mut Recovered,
    ) -> Result<bool, RecoveryError> {
        let Some(journal_file) = open_if_there(&self.paths.journal)? else { return Ok(false) };
        let hot = journal::is_hot(&journal_file).map_err(failed)?;
        if hot && let Some(database) = open_if_there(&self.paths.database)? {
            let committed = match journal::super_journal(&journal_file).map_err(failed)? {
                Some(path) => !self.backing_of(&path).exists(),
                None => false,
            };
            if !committed {
                match known {
                    Some((sums, mark)) => {
                        play_back_known(&journal_file, &database, sums, mark).map_err(failed)?
                    }
                    None => journal::rollback(&journal_file, &database).map_err(failed).map(drop)?,
                }
            } else if let Ok(Some(journal)) = Journal::open(&journal_file, None) {
                tracing::info!(
                    database = %self.name,
                    pages = journal.header().initial_pages,
                    "the journal of a commit over several databases is finished, not rolled back"
                );
            }
            done.journal = true;
            done.compare = true;
        }
        remove_if_there(&self.paths.journal)?;
        Ok(hot)
    }

    /// Whether the log has the database begin anew, or changes its page size, after a mark.
    pub(super) fn is_reset_after(&self, mark: Mark, target: Mark) -> Result<bool, RecoveryError> {
        let mut next = mark.position.txid.0 + 1;
        while next <= target.position.txid.0 {
            match self.shared.log.find(&self.name, Txid(next)).map_err(failed)? {
                Some(record) if record.kind != RecordKind::Reset && record.page_size == mark.page_size => {
                    next = record.max_txid.0 + 1;
                }
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// A super-journal is named by its path in the mount.
    fn backing_of(&self, path: &Path) -> std::path::PathBuf {
        match path.strip_prefix(&self.shared.dirs.mount) {
            Ok(below) => self.shared.dirs.files.join(below),
            Err(_) => path.to_owned(),
        }
    }
}

/// Plays back a journal of which a power failure may have left anything, because neither its records nor its removal need to
/// be on the disk (decision 0016): only pages that are as the log knows them. Pages logged after the mark are replayed
/// later. A page that is skipped is torn, and then SQLite had not begun to write to the database; or the journal is that of
/// a logged transaction.
fn play_back_known(
    journal: &File,
    database: &File,
    sums: &Checksums,
    mark: Mark,
) -> Result<(), journal::JournalError> {
    // The database is about to depend on it.
    journal.sync_data()?;
    let Some(journal) = Journal::open(journal, Some(mark.page_size))? else { return Ok(()) };
    if journal.header().page_size != mark.page_size {
        return Ok(());
    }
    for record in journal.records() {
        let record = record?;
        if record.pgno <= mark.page_count
            && sums.get(record.pgno) == Some(page_checksum(record.pgno, &record.page))
        {
            let at = u64::from(record.pgno - 1) * u64::from(mark.page_size);
            database.write_all_at(&record.page, at)?;
        }
    }
    database.sync_all()?;
    Ok(())
}
