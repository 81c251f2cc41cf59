//! What the agent and the preload shim say to each other: a handshake on a Unix socket, then memory that both map.
//!
//! ```text
//!   shim                                       agent
//!   connect  <runtime>/<cluster>/preload.sock
//!   Hello    ------------------------------>
//!            <------------------------------  Welcome, and the descriptor of a [`Page`]
//!   map it                                     map it, one thread waits on its doorbell
//! ```
//!
//! Requests go through the [`Slot`]s of the page and need no system call unless somebody sleeps. The socket stays open
//! and says by its end that the other side is gone. Every request may be asked again of a new agent: what is done
//! already is answered in the same way.
//!
//! Everything is in the byte order of the host and `repr(C)`; [`VERSION`] changes with every change of it.
#![no_std]

use core::sync::atomic::{AtomicU32, AtomicU64};

/// Version of everything in this crate.
pub const VERSION: u32 = 8;
/// First word of handshake and page: `LFSH`.
pub const MAGIC: u32 = 0x4853_464c;
/// First word of the message by which a shim that opens `NAME-lock` for writing asks for the halt lock, on a connection of its
/// own: the path below the managed directory follows. The answer, an [`Opened`], may take long. `LFLK`.
pub const LOCK_FILE_MAGIC: u32 = 0x4b4c_464c;
/// The same of one that cannot open a file of a database for writing, because permissions keep writers out on a replica: answered
/// with a descriptor that can write. `LFOP`.
pub const OPEN_MAGIC: u32 = 0x504f_464c;
/// File, beside the agent's socket, that names the managed directory: see [`Registration`].
pub const REGISTRATION: &str = "preload";
/// The agent's socket (`SOCK_SEQPACKET`).
pub const SOCKET: &str = "preload.sock";
/// Where clusters have their directories of the two files above.
pub const RUNTIME_DIR: &str = "/run/litefs";
/// Environment variable: other places for them, separated by colons.
pub const RUNTIME_DIR_VARIABLE: &str = "LITEFS_RUNTIME_DIR";
/// Environment variable: milliseconds that an application waits for an agent that does not answer.
pub const WAIT_VARIABLE: &str = "LITEFS_WAIT_MS";
/// The default of it.
pub const WAIT_MS: u64 = 10_000;

/// Bytes of a WAL that a process may be ahead of the agent. A writer that is farther waits before its next transaction:
/// else a fast one could outrun the agent without limit.
pub const AHEAD_BYTES: u64 = 4 << 20;
/// Requests of one process that can be under way at once.
pub const SLOTS: usize = 32;
/// Databases of one cluster that one process can have open at once.
pub const DATABASES: usize = 1024;
/// Words of a request's data.
pub const DATA_WORDS: usize = 500;

/// What the registration file says: `litefs-preload <version> <device> <inode>` in decimal, and a newline. The
/// directory is told by device and inode because applications may know it by other names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Protocol version of the agent.
    pub version: u32,
    /// Device of the managed directory.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// First word of the registration file.
pub const REGISTRATION_WORD: &str = "litefs-preload";

impl Registration {
    /// Reads the file's content.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = core::str::from_utf8(text).ok()?;
        let mut words = text.split_ascii_whitespace();
        if words.next() != Some(REGISTRATION_WORD) {
            return None;
        }
        let version = words.next()?.parse().ok()?;
        let device = words.next()?.parse().ok()?;
        let inode = words.next()?.parse().ok()?;
        Some(Registration { version, device, inode })
    }
}

impl core::fmt::Display for Registration {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        writeln!(f, "{REGISTRATION_WORD} {} {} {}", self.version, self.device, self.inode)
    }
}

/// First message of the shim.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`VERSION`].
    pub version: u32,
}

/// The answer to who opens a file; with a descriptor of it where there is no error. A halt lock ends when the descriptor of
/// `NAME-lock` and all copies of it are closed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// [`LOCK_FILE_MAGIC`] or [`OPEN_MAGIC`].
    pub magic: u32,
    /// 0, or an error number. `ENOENT`: the name is not that of a lock file.
    pub error: u32,
}

/// The agent's answer; with a descriptor of a [`Page`] where the versions agree.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Welcome {
    /// [`MAGIC`].
    pub magic: u32,
    /// The agent's version.
    pub version: u32,
}

/// [`Page::mode`]: applications may write here.
pub const MODE_WRITABLE: u32 = 1;
/// [`Page::mode`]: commits in WAL mode are held until the agent has them, and the log's sync stands for the file's.
pub const MODE_HELD: u32 = 2;

/// [`Page::access`]: applications may write this database though the host is no primary, under a halt lock. Its commits are
/// held whatever [`MODE_HELD`] says.
pub const ACCESS_BORROWED: u32 = 1;
/// [`Page::access`]: another host writes this database now; writers wait.
pub const ACCESS_LENT: u32 = 2;
/// [`Page::access`]: this host is no primary, and the agent gets a halt lock when a writer asks ([`WANTED`]) and waits.
pub const ACCESS_ON_DEMAND: u32 = 4;

/// [`Page::asleep`]: the agent looks by itself.
pub const AWAKE: u32 = 0;
/// [`Page::asleep`]: the agent looks soon; only a request must wake it.
pub const NAPPING: u32 = 1;
/// [`Page::asleep`]: the agent must be woken.
pub const ASLEEP: u32 = 2;

/// [`Page::changed`]: it has commits to look at.
pub const CHANGED: u32 = 1;
/// [`Page::changed`]: the process has closed it; its number is the agent's again.
pub const CLOSED: u32 = 2;
/// [`Page::changed`]: a writer was told to wait: see [`ACCESS_ON_DEMAND`].
pub const WANTED: u32 = 4;
/// [`Page::changed`]: the process syncs its WAL, which the agent's syncs must not hold up. It rings no bell for this.
pub const SYNCED: u32 = 8;

/// The memory that agent and one process share.
#[repr(C)]
pub struct Page {
    /// [`MAGIC`].
    pub magic: AtomicU32,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// `MODE_*` bits, set by the agent.
    pub mode: AtomicU32,
    /// Counted up by the shim when there is something to look at; the agent waits on it (futex).
    pub doorbell: AtomicU32,
    /// Whether it does.
    pub asleep: AtomicU32,
    /// Keeps what follows aligned.
    pub reserved: AtomicU32,
    /// Writes begin only before this moment (`CLOCK_BOOTTIME`, nanoseconds: a lease ends also while the host sleeps): the
    /// primary's lease as far as it is known.
    pub write_until_ns: AtomicU64,
    /// Commits in WAL mode between the shim's look at [`Page::mode`] and their publication. The agent ends a term by
    /// clearing [`MODE_WRITABLE`] and waiting until there are none.
    pub committing: AtomicU32,
    /// Counted up by the agent when it has caught up with something; writers that are too far ahead wait on it (futex).
    pub caught_up: AtomicU32,
    /// One word for each attached database: [`CHANGED`], [`CLOSED`], [`WANTED`] and [`SYNCED`], set by the shim, taken by
    /// the agent, which passes over bits that it does not know.
    pub changed: [AtomicU32; DATABASES],
    /// For each attached database: bytes that this process has written to its WAL. Counted by the shim before
    /// [`CHANGED`] is set.
    pub written: [AtomicU64; DATABASES],
    /// What of `written` the agent has looked at: see [`AHEAD_BYTES`].
    pub captured: [AtomicU64; DATABASES],
    /// For each attached database: not 0 while the agent cannot take its commits (it is quarantined), set by the agent.
    pub refused: [AtomicU32; DATABASES],
    /// `ACCESS_*` bits of each attached database, set by the agent.
    pub access: [AtomicU32; DATABASES],
    /// Requests.
    pub slots: [Slot; SLOTS],
}

/// [`Slot::state`]: nobody's.
pub const FREE: u32 = 0;
/// [`Slot::state`]: a thread of the application fills it.
pub const TAKEN: u32 = 1;
/// [`Slot::state`]: a request.
pub const POSTED: u32 = 2;
/// [`Slot::state`]: the agent works on it.
pub const SERVED: u32 = 3;
/// [`Slot::state`]: answered; the thread gives it back.
pub const DONE: u32 = 4;
/// [`Slot::state`]: the agent is done with it and waits for followers, without limit.
pub const WAITING: u32 = 5;
/// [`Slot::state`]: the thread has given up while the agent worked on it; the agent frees it when it is done.
pub const ABANDONED: u32 = 6;

/// One request and its answer. The state says whose the other fields are.
#[repr(C)]
pub struct Slot {
    /// One of the above; the requesting thread waits on it (futex).
    pub state: AtomicU32,
    /// An [`Op`].
    pub op: AtomicU32,
    /// Number that [`Op::Attach`] gave.
    pub database: AtomicU32,
    /// `FLAG_*` bits.
    pub flags: AtomicU32,
    /// Words of `data` that count, or bytes for [`Op::Attach`] and [`Op::Special`].
    pub count: AtomicU32,
    /// Answer: 0, or an error number.
    pub error: AtomicU32,
    /// Answer of [`Op::Attach`] and [`Op::Special`].
    pub answer: AtomicU32,
    /// Keeps what follows aligned.
    pub reserved: AtomicU32,
    /// Depends on the request.
    pub data: [AtomicU64; DATA_WORDS],
}

/// What is asked.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A database is used: `data` is its path below the managed directory. Answers its number, from now on in
    /// [`Page::changed`]. `EINVAL`: no database can have this name; the file is nobody's business.
    Attach = 1,
    /// More of the writes that the next [`Op::Commit`] is about.
    Written = 2,
    /// A transaction without WAL is about to end: `data` are the writes to the database file ([`write_word`]). Answered
    /// when the log has it, or, with [`FLAG_SYNCED`], has it durably.
    Commit = 3,
    /// The WAL is about to begin anew or go: answered when the log has all of it, with [`FLAG_SYNCED`] durably.
    WalEnd = 4,
    /// A commit frame is held: `data` is its offset in the WAL and the 24 bytes of its header; its page is in the file.
    /// Answered when the log has the transaction.
    WalCommit = 5,
    /// The WAL is synced: answered when the log is durable.
    WalSync = 6,
    /// The database file is about to be removed.
    Drop = 7,
    /// It was removed: answered when the log has it.
    Dropped = 8,
    /// The database file is about to be renamed, or another one to take its place. `EBUSY`: others have it open.
    Move = 9,
    /// Another file has taken its place: answered when the log has it.
    Moved = 10,
    /// A file that the agent makes up is read (`.primary`, `.lag`, `NAME-pos`): `data` is its path below the managed
    /// directory. Answers how many bytes `data` then has. `ENOENT`: there is none of this name now.
    Special = 11,
}

impl Op {
    /// The operation of a number.
    pub fn from_number(number: u32) -> Option<Op> {
        use Op::*;
        [Attach, Written, Commit, WalEnd, WalCommit, WalSync, Drop, Dropped, Move, Moved, Special]
            .into_iter()
            .find(|op| *op as u32 == number)
    }
}

/// [`Op::Commit`]: the application has synced a file of this transaction. [`Op::WalEnd`]: it syncs this database.
pub const FLAG_SYNCED: u32 = 1;
/// [`Op::Commit`]: there may have been other writes.
pub const FLAG_UNKNOWN: u32 = 2;
/// [`Op::Commit`]: there was no journal; the transaction is over.
pub const FLAG_UNJOURNALED: u32 = 4;

/// [`Op::Commit`]: the journal of a process that died was played back; nobody's transaction ends.
pub const FLAG_PLAYBACK: u32 = 8;

/// Unit of offsets and lengths: the smallest page.
pub const UNIT: u64 = 512;
/// Largest length of one write word.
pub const WRITE_BYTES_MAX: u64 = 0xffff * UNIT;

/// A write of `len` bytes at `offset` as one word; `None` where it is not in whole units or too long.
pub fn write_word(offset: u64, len: u64) -> Option<u64> {
    let whole = offset.is_multiple_of(UNIT) && len.is_multiple_of(UNIT);
    (whole && len > 0 && len <= WRITE_BYTES_MAX && offset / UNIT < 1 << 48)
        .then_some(((offset / UNIT) << 16) | (len / UNIT))
}

/// Offset and length of a word.
pub fn write_of(word: u64) -> (u64, u64) {
    ((word >> 16) * UNIT, (word & 0xffff) * UNIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;

    #[test]
    fn writes_fit_into_words() {
        for (offset, len) in [(0, 512), (65536, 4096), (1 << 47, WRITE_BYTES_MAX), (512, 65536)] {
            assert_eq!(write_word(offset, len).map(write_of), Some((offset, len)));
        }
        for (offset, len) in [(1, 512), (0, 100), (0, 0), (0, WRITE_BYTES_MAX + 512)] {
            assert_eq!(write_word(offset, len), None);
        }
    }

    #[test]
    fn a_registration_reads_as_it_was_written() {
        let registration = Registration { version: VERSION, device: 65024, inode: 1 << 60 };
        assert_eq!(Registration::parse(std::format!("{registration}").as_bytes()), Some(registration));
        for bad in ["", "litefs-preload 1 2", "other 1 2 3", "litefs-preload a b c"] {
            assert_eq!(Registration::parse(bad.as_bytes()), None);
        }
    }

    #[test]
    fn operations_have_their_numbers() {
        assert_eq!(Op::from_number(3), Some(Op::Commit));
        assert_eq!(Op::from_number(0), None);
        assert_eq!(Op::from_number(12), None);
    }
}
