//! A consistent state of a database as one LTX file, for whoever keeps it elsewhere.

use super::Database;
use super::install::fold_file;
use crate::capture::unix_ms;
use crate::ship::engine::EngineError;
use ltx::{Checksum, Pos, Txid};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

impl Database {
    /// Writes `<dir>/<escaped name>/<first TXID>-<last TXID>.ltx` with all pages, durable, and returns path and position.
    ///
    /// # Errors
    /// As [`Database::copy_consistently`], or the file cannot be written.
    pub fn write_snapshot(&self, dir: &Path) -> Result<(PathBuf, Pos), EngineError> {
        let failed = |error: std::io::Error| {
            EngineError::Other(format!(
                "cannot write a snapshot of {} below {}: {error}",
                self.name,
                dir.display()
            ))
        };
        let staging = &self.shared.dirs.staging;
        let copy =
            tempfile::Builder::new().prefix("export-").tempfile_in(staging).map_err(failed)?.into_temp_path();
        let position = self.copy_consistently(&copy)?;
        let pages = File::open(&copy).map_err(failed)?;
        let dir = dir.join(self.name.escaped());
        std::fs::create_dir_all(&dir).map_err(failed)?;
        let mut file = tempfile::Builder::new().prefix(".snapshot-").tempfile_in(&dir).map_err(failed)?;
        self.encode_snapshot(&pages, position, file.as_file_mut()).map_err(|error| {
            EngineError::Other(format!("cannot write a snapshot of {}: {error}", self.name))
        })?;
        file.as_file().sync_all().map_err(failed)?;
        let path = dir.join(format!("{}-{}.ltx", Txid(1), position.txid));
        file.persist(&path).map_err(|error| failed(error.error))?;
        File::open(&dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        Ok((path, position))
    }

    fn encode_snapshot(&self, pages: &File, position: Pos, to: &mut File) -> Result<(), ltx::Error> {
        let io = |offset| move |source| ltx::Error::Io { offset, source };
        let page_size = self.state().page_size;
        let bytes = pages.metadata().map_err(io(0))?.len();
        let commit = (bytes / u64::from(page_size)) as u32;
        let header = ltx::Header {
            flags: 0,
            page_size,
            commit,
            min_txid: Txid(1),
            max_txid: position.txid,
            timestamp_ms: unix_ms(),
            pre_apply: Checksum(0),
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: self.shared.node_id,
            epoch: self.shared.epoch().0,
            owner: None,
        };
        let mut encoder = ltx::Encoder::new(BufWriter::with_capacity(1 << 20, to), header)?;
        let mut page = vec![0; page_size as usize];
        let lock_page = ltx::lock_page(page_size);
        for pgno in (1..=commit).filter(|pgno| *pgno != lock_page) {
            let offset = u64::from(pgno - 1) * u64::from(page_size);
            pages.read_exact_at(&mut page, offset).map_err(io(offset))?;
            encoder.encode_page(pgno, &page)?;
        }
        let sum = fold_file(pages, page_size, commit).map_err(io(0))?;
        let (_, mut writer) = encoder.finish(sum)?;
        writer.flush().map_err(io(bytes))
    }
}
