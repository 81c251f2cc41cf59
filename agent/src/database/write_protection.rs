//! Behind the preload door a replica's databases lose their write permission: a program without the library opens them for
//! reading only, and SQLite tells it "attempt to write a readonly database". Those with the library get a descriptor
//! from the agent. What permissions a file has by rights is kept beside it, in an extended attribute, so that an agent
//! that comes later, as a primary or with another door, can give them back.
//!
//! Root is not kept out by permissions; what it writes is found and undone as before.

use super::{Database, Shared};
use crate::name::BESIDE;
use nix::sys::stat::{Mode, fchmod};
use parking_lot::Mutex;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::LazyLock;
use xattr::FileExt;

/// The write permissions that a file had, three octal digits. Whoever owns the file may change it, and the file's mode too.
const ATTRIBUTE: &str = "user.litefs.write-permissions";
const WRITE_BITS: u32 = 0o222;
/// Bit of `CAP_DAC_OVERRIDE` (linux/capability.h).
const CAP_DAC_OVERRIDE: u32 = 1;

/// Whether it is in force on this node.
#[derive(Debug, Default)]
pub struct WriteProtection {
    on: Mutex<bool>,
}

impl WriteProtection {
    /// From now on, for all databases. Nothing happens on a primary, and where this process could not write them itself.
    pub fn begin(&self, shared: &Shared) {
        let mut on = self.on.lock();
        if *on || shared.is_writable() || !*MAY_WRITE_ANYTHING {
            return;
        }
        *on = true;
        shared.known().iter().for_each(|db| protect(db));
    }

    /// No longer: before applications are told that they may write.
    pub fn end(&self, shared: &Shared) {
        let mut on = self.on.lock();
        *on = false;
        for db in shared.known() {
            if let Err(error) = restore(&db.paths().database) {
                tracing::error!(
                    database = %db.name(),
                    path = %db.paths().database.display(),
                    %error,
                    "its write permissions cannot be given back: use chmod"
                );
            }
        }
    }

    /// For a file that has come meanwhile.
    pub fn cover(&self, db: &Database) {
        let on = self.on.lock();
        if *on {
            protect(db);
        }
    }
}

fn protect(db: &Database) {
    let path = &db.paths().database;
    match remove_permissions(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(
            database = %db.name(),
            path = %path.display(),
            %error,
            "its write permissions cannot be taken away: programs without the preload library can write it here, \
             which is undone when it is noticed"
        ),
    }
}

/// Whether permissions do not matter to this process.
static MAY_WRITE_ANYTHING: LazyLock<bool> = LazyLock::new(|| {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .is_some_and(|bits| bits >> CAP_DAC_OVERRIDE & 1 == 1)
});

/// Not through a link: it could lead anywhere.
fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

fn change_mode(file: &File, mode: u32) -> io::Result<()> {
    Ok(fchmod(file, Mode::from_bits_truncate(mode & 0o7777))?)
}

/// The write permissions that were taken from it.
fn kept(file: &File) -> io::Result<Option<u32>> {
    let value = file.get_xattr(ATTRIBUTE)?;
    let digits = value.and_then(|value| String::from_utf8(value).ok());
    Ok(digits.and_then(|digits| u32::from_str_radix(&digits, 8).ok()).map(|bits| bits & WRITE_BITS))
}

fn remove_permissions(path: &Path) -> io::Result<()> {
    let file = open(path)?;
    let mode = file.metadata()?.mode();
    if mode & WRITE_BITS == 0 {
        return Ok(());
    }
    // First what they are: whoever finds both gives back nothing that is not there.
    file.set_xattr(ATTRIBUTE, format!("{:03o}", mode & WRITE_BITS).as_bytes())?;
    change_mode(&file, mode & !WRITE_BITS)
}

/// Gives a database file what [`WriteProtection`] has taken from it, and the same to the files that SQLite made like it.
pub fn restore(path: &Path) -> io::Result<()> {
    let file = match open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let Some(bits) = kept(&file)? else { return Ok(()) };
    let like = file.metadata()?;
    // Otherwise somebody has given it others meanwhile.
    if like.mode() & WRITE_BITS == 0 {
        for suffix in BESIDE {
            let mut beside = path.as_os_str().to_owned();
            beside.push(suffix);
            let Ok(beside) = open(Path::new(&beside)) else { continue };
            let metadata = beside.metadata()?;
            if is_made_like(&metadata, &like) {
                change_mode(&beside, metadata.mode() | bits)?;
            }
        }
        change_mode(&file, like.mode() | bits)?;
    }
    file.remove_xattr(ATTRIBUTE)
}

/// Whether SQLite may have made a file beside a database, with that one's permissions, and nobody has brought it: another
/// user's file, with a name that leads here.
pub fn is_made_like(beside: &Metadata, database: &Metadata) -> bool {
    beside.is_file() && beside.nlink() == 1 && beside.mode() & 0o7777 == database.mode() & 0o777
}

/// Mode by rights of a database file that has this mode now.
pub fn mode(file: &File, mode: u32) -> u32 {
    if mode & WRITE_BITS != 0 {
        return mode;
    }
    // A file system without attributes has none that were kept.
    mode | kept(file).ok().flatten().unwrap_or(0)
}

/// The same of the file with this path, or of the directory that it would be in.
pub fn mode_at(path: &Path, now: u32) -> u32 {
    let file = if now & WRITE_BITS == 0 { open(path).ok() } else { None };
    file.map_or(now, |file| mode(&file, now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn permissions_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        let mode_of = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
        let mode_by_rights = |path: &Path| {
            let file = File::open(path).unwrap();
            mode(&file, file.metadata().unwrap().mode()) & 0o7777
        };
        for mode in [0o640, 0o664, 0o666, 0o600, 0o4755, 0o444] {
            File::create(&path).unwrap().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
            // Again and again, as agents that are killed in between would.
            for _ in 0..2 {
                remove_permissions(&path).unwrap();
                assert_eq!(mode_of(&path), mode & !WRITE_BITS);
                assert_eq!(mode_by_rights(&path), mode);
            }
            for _ in 0..2 {
                restore(&path).unwrap();
                assert_eq!(mode_of(&path), mode);
            }
            assert!(File::open(&path).unwrap().get_xattr(ATTRIBUTE).unwrap().is_none());
            std::fs::remove_file(&path).unwrap();
        }
        restore(&path).unwrap();
    }

    #[test]
    fn only_what_sqlite_made_beside_it_gets_them_too() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let make = |name: &str, mode: u32| {
            File::create(at(name)).unwrap().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        };
        make("app.db", 0o664);
        remove_permissions(&at("app.db")).unwrap();
        make("app.db-wal", 0o444);
        // Moved or linked here by somebody who could not have read or written it.
        make("app.db-shm", 0o400);
        make("other", 0o444);
        std::fs::hard_link(at("other"), at("app.db-journal")).unwrap();
        restore(&at("app.db")).unwrap();
        let modes = ["app.db", "app.db-wal", "app.db-shm", "app.db-journal"]
            .map(|name| at(name).metadata().unwrap().mode() & 0o7777);
        assert_eq!(modes, [0o664, 0o664, 0o400, 0o444]);
    }

    #[test]
    fn permissions_that_somebody_gave_meanwhile_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        File::create(&path).unwrap().set_permissions(std::fs::Permissions::from_mode(0o666)).unwrap();
        remove_permissions(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        restore(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        assert!(File::open(&path).unwrap().get_xattr(ATTRIBUTE).unwrap().is_none());
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("app.db"));
        File::create(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(remove_permissions(&link).is_err());
        assert!(restore(&link).is_err());
        assert_ne!(target.metadata().unwrap().mode() & WRITE_BITS, 0);
    }
}
