//! `litefs export`.

use super::client::{self, Client};
use super::failure::{self, Failure};
use super::import::{beside, progress};
use crate::DatabaseName;
use crate::status::database_file;
use crate::status::handler::LITEFS_POSITION;
use http::header::CONTENT_LENGTH;
use http_body_util::BodyExt;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::NamedTempFile;

pub async fn export(
    client: Client,
    name: &DatabaseName,
    path: &Path,
    out: &mut dyn Write,
) -> Result<u8, Failure> {
    let mut copy = Copy::begin(path)?;

    let request = client::request("GET", client::uri_of("/v1/export", name), client::empty())?;
    let response = client.send(request).await?;
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let size: u64 = header(CONTENT_LENGTH).and_then(|size| size.parse().ok()).unwrap_or_default();
    let position = header(LITEFS_POSITION).ok_or_else(|| {
        Failure::new(
            failure::SOFTWARE,
            "the agent did not say the position of the export; is it another version?",
        )
    })?;

    let bar = progress("exporting", name, size);
    let mut received = 0;
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            let what = format!(
                "the export of {name} broke off after {received} of {size} bytes: {error}; try again"
            );
            Failure::new(failure::IO, what)
        })?;
        if let Ok(data) = frame.into_data() {
            copy.file().write_all(&data).map_err(|error| cannot_write(path, &error))?;
            received += data.len() as u64;
            bar.set_position(received);
        }
    }
    bar.finish_and_clear();

    copy.finish(size, &position).map_err(|failed| match failed {
        NotFinished::Damaged(what) => {
            Failure::new(failure::DATA, format_args!("the export of {name} is damaged: {what}; try again"))
        }
        NotFinished::Failed(failure) => failure,
    })?;
    writeln!(out, "exported {name} at {position}, {size} bytes, to {}", path.display())
        .map_err(failure::stdout)?;
    Ok(0)
}

pub fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::file(failure::CANNOT_CREATE, path, format_args!("cannot write it: {error}"))
}

/// A database file that is being written beside its path.
pub struct Copy<'a> {
    path: &'a Path,
    dir: &'a Path,
    file: NamedTempFile,
}

/// Why a copy did not take its place.
pub enum NotFinished {
    /// It is not what it should be.
    Damaged(String),
    /// It could not be written.
    Failed(Failure),
}

impl<'a> Copy<'a> {
    /// Begins one that is to be at `path`.
    pub fn begin(path: &'a Path) -> Result<Copy<'a>, Failure> {
        // SQLite would take them for the journal of the copy and destroy it.
        for suffix in ["-wal", "-journal"] {
            let other = beside(path, suffix);
            if other.metadata().is_ok_and(|metadata| metadata.len() > 0) {
                let what =
                    "belongs to the file that the export would replace; remove it or export to another path";
                return Err(Failure::file(failure::CANNOT_CREATE, &other, what));
            }
        }
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let file_name = path
            .file_name()
            .ok_or_else(|| Failure::file(failure::USAGE, path, "does not end with the name of a file"))?;
        let mut prefix = file_name.to_owned();
        prefix.push(".");
        let file = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".tmp")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(dir)
            .map_err(|error| cannot_write(path, &error))?;
        Ok(Copy { path, dir, file })
    }

    /// What to write to.
    pub fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Checks it, makes it durable and puts it where it belongs.
    pub fn finish(self, size: u64, position: &str) -> Result<(), NotFinished> {
        check(self.file.as_file(), size, position).map_err(NotFinished::Damaged)?;
        let failed = |error: io::Error| NotFinished::Failed(cannot_write(self.path, &error));
        self.file.as_file().sync_all().map_err(failed)?;
        self.file.persist(self.path).map_err(|error| failed(error.error))?;
        File::open(self.dir).and_then(|dir| dir.sync_all()).map_err(failed)
    }
}

/// Reads the copy back and compares it with the position that it should be at.
fn check(copy: &File, size: u64, position: &str) -> Result<(), String> {
    let written = copy.metadata().map_err(|error| error.to_string())?.len();
    if written != size {
        return Err(format!("it has {written} bytes instead of {size}"));
    }
    let shape = database_file::shape(copy).map_err(|error| error.to_string())?;
    let checksum = database_file::checksum(copy, shape).map_err(|error| error.to_string())?.to_string();
    match position.split_once('/') {
        Some((_, expected)) if expected == checksum => Ok(()),
        _ => Err(format!("its checksum is {checksum}, its position {position}")),
    }
}
