//! How a command fails: an exit code from sysexits(3) and a message.

use std::fmt::{self, Display};
use std::path::Path;

/// Something is wrong with what was asked about, as `litefs status` says.
pub const TROUBLE: u8 = 1;
/// `litefs status`: no agent answers.
pub const NO_AGENT: u8 = 3;
/// EX_USAGE: the command line makes no sense.
pub const USAGE: u8 = 64;
/// EX_DATAERR: the data is not what it should be.
pub const DATA: u8 = 65;
/// EX_NOINPUT: what was named is not there.
pub const NO_INPUT: u8 = 66;
/// EX_UNAVAILABLE: the agent is not there or cannot do it now.
pub const UNAVAILABLE: u8 = 69;
/// EX_SOFTWARE: the agent failed.
pub const SOFTWARE: u8 = 70;
/// EX_CANTCREAT: the output cannot be written.
pub const CANNOT_CREATE: u8 = 73;
/// EX_IOERR: reading or writing failed on the way.
pub const IO: u8 = 74;
/// EX_TEMPFAIL: it has not happened yet.
pub const TRY_AGAIN: u8 = 75;
/// EX_NOPERM: not allowed.
pub const NO_PERMISSION: u8 = 77;
/// EX_CONFIG: the configuration is wrong.
pub const CONFIG: u8 = 78;

/// Why a command ends with another code than 0.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: u8,
    /// What happened, to what, and what to do about it.
    pub message: String,
}

impl Failure {
    /// A failure with a message.
    pub fn new(code: u8, message: impl Display) -> Failure {
        Failure { code, message: message.to_string() }
    }

    /// A file of the user cannot be worked with.
    pub fn file(code: u8, path: &Path, what: impl Display) -> Failure {
        Failure::new(code, format_args!("{}: {what}", path.display()))
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Writing to stdout failed. Whoever reads it may leave early (`litefs list | head`): that is no failure.
pub fn stdout(error: std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure { code: 0, message: String::new() },
        _ => Failure::new(IO, format_args!("cannot write the output: {error}")),
    }
}
