//! `litefs import`.

use super::client::{self, Client};
use super::failure::{self, Failure};
use crate::DatabaseName;
use crate::status::api::RoleName;
use crate::status::database_file::{self, FileError};
use crate::status::handler::Body;
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::header::CONTENT_LENGTH;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::io::AsyncReadExt;

/// Bytes in one frame of the upload.
const CHUNK: usize = 256 << 10;

pub async fn import(
    client: Client,
    name: &DatabaseName,
    path: &Path,
    out: &mut dyn Write,
) -> Result<u8, Failure> {
    let file = File::open(path)
        .map_err(|error| Failure::file(failure::NO_INPUT, path, format_args!("cannot open it: {error}")))?;
    refuse_unfinished(path)?;
    let shape = database_file::shape(&file).map_err(|error| {
        let code = if matches!(error, FileError::Io(_)) { failure::IO } else { failure::DATA };
        Failure::file(code, path, error)
    })?;
    let metadata = file
        .metadata()
        .map_err(|error| Failure::file(failure::IO, path, format_args!("cannot read it: {error}")))?;

    // Asked first, so that nobody waits for an upload that is then refused.
    let role = client.status().await?.role;
    if role.name != RoleName::Primary {
        let primary = role.upstream.map_or_else(String::new, |upstream| {
            format!("; run it on {}", upstream.hostname.unwrap_or(upstream.url))
        });
        let what = format!("import changes {name}, but this host is not the primary{primary}");
        return Err(Failure::new(failure::UNAVAILABLE, what));
    }

    let bar = progress("importing", name, metadata.len());
    let size = metadata.len();
    let body = upload(file, path.to_path_buf(), metadata, bar.clone());
    let mut request = client::request("POST", client::uri_of("/v1/import", name), body)?;
    request.headers_mut().insert(CONTENT_LENGTH, size.into());
    let sent = client.send(request).await;
    bar.finish_and_clear();
    let response = match sent {
        Ok(response) => response,
        Err(failure) => {
            // A source that changed breaks the upload off: say that, not that the connection broke.
            refuse_unfinished(path)?;
            return Err(failure);
        }
    };
    let answer: serde_json::Value = client.read_json(response).await?;
    let part = |key: &str| answer[key].as_str().unwrap_or("?").to_owned();
    let position = format!("{}/{}", part("txid"), part("checksum"));
    let pages = shape.pages;
    writeln!(out, "imported {name} at {position}, {size} bytes in {pages} pages").map_err(failure::stdout)?;
    Ok(0)
}

/// A database whose latest transactions are in a WAL, or that a crash left half-written, is not in its file alone.
fn refuse_unfinished(path: &Path) -> Result<(), Failure> {
    match unfinished(path) {
        None => Ok(()),
        Some(other) => Err(Failure::file(
            failure::DATA,
            path,
            format_args!(
                "{} holds a part of this database: close all programs that use it, then let SQLite finish it \
                 (`sqlite3 {1} 'PRAGMA wal_checkpoint(TRUNCATE)'`), or import a copy that `sqlite3 {1} '.backup COPY'` \
                 made",
                other.display(),
                path.display()
            ),
        )),
    }
}

/// The WAL or journal that belongs to a database file, if there is anything in it.
fn unfinished(path: &Path) -> Option<PathBuf> {
    let wal = beside(path, "-wal");
    if wal.metadata().is_ok_and(|metadata| metadata.len() > 0) {
        return Some(wal);
    }
    let journal = beside(path, "-journal");
    let hot = File::open(&journal).and_then(|file| sqlite_file::journal::is_hot(&file)).unwrap_or(false);
    hot.then_some(journal)
}

/// The path with something appended to its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut other = path.as_os_str().to_owned();
    other.push(suffix);
    other.into()
}

/// The file as a body. Before its last bytes go out it is looked at once more: if somebody wrote to it meanwhile the
/// upload breaks off, and the agent imports nothing.
fn upload(file: File, path: PathBuf, before: Metadata, bar: ProgressBar) -> Body {
    let left = before.len();
    let state = (tokio::fs::File::from_std(file), left, path, before, bar);
    let frames = stream::try_unfold(state, |(mut file, left, path, before, bar)| async move {
        if left == 0 {
            return Ok(None);
        }
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let read = (&mut file).take(left.min(CHUNK as u64)).read_buf(&mut chunk).await? as u64;
        let changed = read == 0 || (read == left && has_changed(&file.metadata().await?, &before, &path));
        if changed {
            return Err(io::Error::other("the file changed while it was read"));
        }
        bar.inc(read);
        Ok(Some((Frame::data(Bytes::from(chunk)), (file, left - read, path, before, bar))))
    });
    StreamBody::new(frames).boxed_unsync()
}

fn has_changed(now: &Metadata, before: &Metadata, path: &Path) -> bool {
    let stamp = |metadata: &Metadata| (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    stamp(now) != stamp(before) || unfinished(path).is_some()
}

/// A progress bar on stderr, when that is a terminal.
pub fn progress(verb: &str, name: &DatabaseName, bytes: u64) -> ProgressBar {
    let template =
        "{msg} {bar:30} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style).with_message(format!("{verb} {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fake;
    use std::fs::{self, OpenOptions};

    #[tokio::test]
    async fn a_file_that_changes_while_it_is_read_breaks_the_upload_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        fs::write(&path, fake::database(4096, 100)).unwrap();
        let body = || {
            let file = File::open(&path).unwrap();
            let before = file.metadata().unwrap();
            upload(file, path.clone(), before, ProgressBar::hidden())
        };
        assert_eq!(body().collect().await.unwrap().to_bytes().len(), 409_600);

        let mut appended = body();
        appended.frame().await.unwrap().unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&[0; 4096]).unwrap();
        assert!(appended.frame().await.unwrap().unwrap_err().to_string().contains("changed"));

        let mut opened = body();
        opened.frame().await.unwrap().unwrap();
        fs::write(beside(&path, "-wal"), b"frames").unwrap();
        assert!(opened.frame().await.unwrap().unwrap_err().to_string().contains("changed"));
    }

    #[test]
    fn only_a_journal_with_a_header_is_hot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let journal = beside(&path, "-journal");
        for (content, hot) in [
            (&[][..], false),
            // What journal_mode=PERSIST leaves behind.
            (&[0; 512][..], false),
            (&[0xd9; 512][..], true),
        ] {
            fs::write(&journal, content).unwrap();
            assert_eq!(unfinished(&path).is_some(), hot);
        }
    }
}
