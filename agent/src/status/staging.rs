//! Receives a file that is to be imported.

use super::database_file::{self, FileError, Shape};
use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use tempfile::TempPath;
use tokio::io::AsyncWriteExt;

/// Why an upload was not staged.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// The sender went away.
    #[error("the upload broke off after {received} bytes: {reason}")]
    BrokeOff {
        /// Bytes until then.
        received: u64,
        /// Why.
        reason: String,
    },
    /// The file is not a whole database.
    #[error("the file cannot be imported: {0}")]
    BadFile(FileError),
    /// It cannot be stored.
    #[error("cannot store the upload in {}: {error}", .dir.display())]
    Store {
        /// Staging directory.
        dir: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Writes a body to a new file in `dir`, checks that it is a whole database, and makes it durable. The file is
/// removed when the path is dropped.
pub async fn receive<B>(mut body: B, dir: &Path) -> Result<(TempPath, Shape), StagingError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let store = |error| StagingError::Store { dir: dir.to_path_buf(), error };
    fs::create_dir_all(dir).map_err(store)?;
    let (file, path) =
        tempfile::Builder::new().prefix("import-").tempfile_in(dir).map_err(store)?.into_parts();
    let mut file = tokio::fs::File::from_std(file);
    let mut received = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| StagingError::BrokeOff { received, reason: error.to_string() })?;
        if let Ok(data) = frame.into_data() {
            file.write_all(&data).await.map_err(store)?;
            received += data.len() as u64;
        }
    }
    file.flush().await.map_err(store)?;
    let file = file.into_std().await;
    let checked = tokio::task::spawn_blocking(move || {
        let shape = database_file::shape(&file);
        file.sync_all().map(|()| shape)
    });
    let shape = checked.await.map_err(io::Error::other).and_then(|synced| synced).map_err(store)?;
    Ok((path, shape.map_err(StagingError::BadFile)?))
}
