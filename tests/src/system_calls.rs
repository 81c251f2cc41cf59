//! Programs some of whose system calls the kernel does not make.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A kind of system call.
#[derive(Debug, Clone, Copy)]
pub struct SystemCall {
    /// Its number.
    pub number: libc::c_long,
    /// Only those with this second argument.
    pub second: Option<u32>,
}

/// In place of these calls of the program (and of its children) the kernel does what `action` says: a `SECCOMP_RET_*`,
/// with the error number for `SECCOMP_RET_ERRNO`.
pub fn replace_system_calls<'c>(
    command: &'c mut Command,
    calls: &[SystemCall],
    action: u32,
) -> &'c mut Command {
    // Offsets in seccomp_data (seccomp(2)): the number, and the lower half of the second argument.
    const NUMBER: u32 = 0;
    const SECOND: u32 = if cfg!(target_endian = "little") { 24 } else { 28 };
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |at| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at);
    let skip_unless = |value: u32, skipped: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skipped,
        k: value,
    };
    let mut filter = Vec::new();
    for call in calls {
        filter.extend([
            load(NUMBER),
            skip_unless(call.number as u32, if call.second.is_some() { 3 } else { 1 }),
        ]);
        if let Some(second) = call.second {
            filter.extend([load(SECOND), skip_unless(second, 1)]);
        }
        filter.push(statement(libc::BPF_RET | libc::BPF_K, action));
    }
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    let install = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: prctl(2) with these arguments reads `program` and the filter it points to, which live until it
        // returns; it is async-signal-safe, so it may be called between fork and exec.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(install) }
}
