//! Files that the agent makes up: `.primary`, `.lag`, `NAME-pos`, and `NAME-lock` for the halt lock. There are none of these
//! names in the directory.

use crate::managed::{self, Managed};
use crate::{agent, process, sys, table};

/// Whether it is the name of a file that the agent makes up.
pub fn is_special(name: &[u8]) -> bool {
    name == b".primary" || name == b".lag" || name.ends_with(b"-pos") || is_lock(name)
}

/// Whether a name, or a path, is that of LiteFS's file for the halt lock.
pub fn is_lock(name: &[u8]) -> bool {
    name.ends_with(b"-lock")
}

/// Whether a path ends like that of such a file.
pub fn ends_like_special(path: &[u8]) -> bool {
    [&b".primary"[..], b".lag", b"-pos", b"-lock"].iter().any(|end| path.ends_with(end))
}

/// Such a file as it is now. `ENOENT`: there is none.
pub fn find(managed: &Managed, flags: i32) -> Result<i32, i32> {
    let asked = process::is_own() && is_special(managed.name.bytes());
    if asked { open(managed, flags) } else { Err(libc::ENOENT) }
}

/// The same for a name that is known to be one of these.
pub fn open(managed: &Managed, flags: i32) -> Result<i32, i32> {
    if managed.cluster == managed::TOO_MANY {
        return Err(libc::ENFILE);
    }
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        let fd = agent::lock_file(managed.cluster, managed.name.bytes(), flags & libc::O_CLOEXEC != 0)?;
        // Its number may have been closed in a way that was not seen.
        table::closed(fd);
        return Ok(fd);
    }
    let (words, len) = agent::special(managed.cluster, managed.name.bytes())?;
    // SAFETY: the bytes of initialised words; `len` is not more than there are.
    let content = unsafe { core::slice::from_raw_parts(words.as_ptr().cast::<u8>(), len) };
    sys::file_with(content, flags & libc::O_CLOEXEC != 0)
}
