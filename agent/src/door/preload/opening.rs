//! A process opens a file of a database for writing that permissions keep it from, because this host is a replica: it
//! gets a descriptor, with which it can write when the host is primary, if it might write the file by rights.

use super::listener::answer;
use super::peer::{Peer, SEARCH, WRITE};
use crate::DatabaseName;
use crate::database::write_protection;
use crate::name::BESIDE;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use shim_protocol::OPEN_MAGIC;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Answers one process.
pub fn serve(socket: &OwnedFd, peer: &Peer, files: &Path, path: &[u8]) -> io::Result<()> {
    match open(files, peer, path) {
        Ok(file) => answer(socket, [OPEN_MAGIC, 0], Some(file.as_fd())),
        Err(error) => answer(socket, [OPEN_MAGIC, error.unsigned_abs()], None),
    }
}

/// Opens `path`, which is below `files`. The error is for the process.
fn open(files: &Path, peer: &Peer, path: &[u8]) -> Result<File, i32> {
    let path = std::str::from_utf8(path).map_err(|_| libc::EACCES)?;
    let named = |name: &str| DatabaseName::new(name).map_err(|_| libc::EACCES);
    let database = named(BESIDE.iter().find_map(|suffix| path.strip_suffix(suffix)).unwrap_or(path))?;
    let files = File::open(files).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    for directory in Path::new(database.as_str()).ancestors().skip(1).filter(|d| !d.as_os_str().is_empty()) {
        let directory = open_below(&files, directory, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let metadata = directory.metadata().map_err(|_| libc::EACCES)?;
        if !peer.has(&metadata, metadata.mode(), SEARCH) {
            return Err(libc::EACCES);
        }
    }
    let open = |path: &Path| open_below(&files, path, OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_NOCTTY);
    let inspect = |file: &File| file.metadata().map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
    let file = open(database.as_ref())?;
    let like = inspect(&file)?;
    let mode = write_protection::mode(&file, like.mode());
    if path == database.as_str() {
        let granted = like.is_file() && peer.has(&like, mode, WRITE);
        return if granted { Ok(file) } else { Err(libc::EACCES) };
    }
    let file = open(named(path)?.as_ref())?;
    let beside = inspect(&file)?;
    let granted = write_protection::is_made_like(&beside, &like) && peer.has(&beside, mode, WRITE);
    if granted { Ok(file) } else { Err(libc::EACCES) }
}

/// Links are not followed: they could lead anywhere.
fn open_below(files: &File, path: &Path, flags: OFlag) -> Result<File, i32> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(files.as_fd(), path, how).map(File::from).map_err(|errno| errno as i32)
}
