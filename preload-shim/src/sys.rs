//! System calls that leave the application's `errno` alone and that nobody else has interposed.

use core::sync::atomic::AtomicU32;

/// A system call's result: an error number is not negated here.
pub type Result<T> = core::result::Result<T, i32>;

/// Six arguments, whatever the call takes of them.
///
/// # Safety
/// What the call asks for: addresses among the arguments are memory that it may read or write as it does, for as long as
/// it takes, and it takes nothing away that is in use (a mapping, somebody's descriptor).
#[cfg(target_arch = "x86_64")]
pub unsafe fn syscall(number: libc::c_long, args: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the x86-64 system call convention: the kernel changes rax, rcx and r11 and what the caller has allowed, no
    // stack is used, and memory counts as changed.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Six arguments, whatever the call takes of them.
///
/// # Safety
/// What the call asks for: addresses among the arguments are memory that it may read or write as it does, for as long as
/// it takes, and it takes nothing away that is in use (a mapping, somebody's descriptor).
#[cfg(target_arch = "aarch64")]
pub unsafe fn syscall(number: libc::c_long, args: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the AArch64 system call convention: the kernel changes x0 and what the caller has allowed, no stack is used,
    // and memory counts as changed.
    unsafe {
        core::arch::asm!(
            "svc 0",
            in("x8") number as usize,
            inlateout("x0") args[0] => result,
            in("x1") args[1], in("x2") args[2], in("x3") args[3], in("x4") args[4], in("x5") args[5],
            options(nostack),
        );
    }
    result
}

fn checked(result: isize) -> Result<usize> {
    if result < 0 { Err(-result as i32) } else { Ok(result as usize) }
}

macro_rules! sys {
    ($number:ident $(, $arg:expr)*) => {{
        let mut args = [0usize; 6];
        let given = [$($arg as usize),*];
        let mut i = 0;
        while i < given.len() {
            args[i] = given[i];
            i += 1;
        }
        checked(syscall(libc::$number, args))
    }};
}

/// What tells this thread from all others of the process.
pub fn thread() -> u64 {
    let thread: u64;
    // SAFETY: reads where the thread's control block is (its first word points to itself on x86-64).
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly, preserves_flags));
    }
    // SAFETY: reads where the thread's control block is.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        core::arch::asm!("mrs {}, tpidr_el0", out(reg) thread, options(nostack, nomem, preserves_flags));
    }
    thread
}

/// Opens for reading.
pub fn open_read(path: &core::ffi::CStr, flags: i32) -> Result<i32> {
    // SAFETY: the path ends with a zero.
    unsafe { sys!(SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC | flags, 0) }
        .map(|fd| fd as i32)
}

/// Closes a descriptor of this library.
pub fn close(fd: i32) {
    // SAFETY: no memory is touched.
    let _ = unsafe { sys!(SYS_close, fd) };
}

/// Reads.
pub fn read(fd: i32, buf: &mut [u8]) -> Result<usize> {
    // SAFETY: the buffer is as long as is said.
    unsafe { sys!(SYS_read, fd, buf.as_mut_ptr(), buf.len()) }
}

/// Reads at an offset.
pub fn pread(fd: i32, buf: &mut [u8], offset: u64) -> Result<usize> {
    // SAFETY: the buffer is as long as is said.
    unsafe { sys!(SYS_pread64, fd, buf.as_mut_ptr(), buf.len(), offset) }
}

/// Writes at an offset.
pub fn pwrite(fd: i32, buf: &[u8], offset: u64) -> Result<usize> {
    // SAFETY: the buffer is as long as is said.
    unsafe { sys!(SYS_pwrite64, fd, buf.as_ptr(), buf.len(), offset) }
}

/// Changes a POSIX lock that this process has.
pub fn set_lock(fd: i32, lock: &libc::flock) {
    // SAFETY: the lock is readable.
    let _ = unsafe { sys!(SYS_fcntl, fd, libc::F_SETLK, &raw const *lock) };
}

/// Writes.
pub fn write(fd: i32, buf: &[u8]) -> Result<usize> {
    // SAFETY: the buffer is as long as is said.
    unsafe { sys!(SYS_write, fd, buf.as_ptr(), buf.len()) }
}

/// Directory entries.
pub fn getdents(fd: i32, buf: &mut [u8]) -> Result<usize> {
    // SAFETY: the buffer is as long as is said.
    unsafe { sys!(SYS_getdents64, fd, buf.as_mut_ptr(), buf.len()) }
}

fn empty_stat() -> libc::stat {
    // SAFETY: a plain C struct of integers.
    unsafe { core::mem::zeroed() }
}

/// Status of a path.
pub fn stat(path: &core::ffi::CStr) -> Result<libc::stat> {
    let mut stat = empty_stat();
    // SAFETY: the path ends with a zero, and `stat` is the kernel's struct on both architectures.
    unsafe { sys!(SYS_newfstatat, libc::AT_FDCWD, path.as_ptr(), &raw mut stat, 0) }.map(|_| stat)
}

/// Status of a name in a directory.
pub fn stat_at(dir: i32, name: *const libc::c_char) -> Result<libc::stat> {
    let mut stat = empty_stat();
    // SAFETY: as for `stat`; the name ends with a zero.
    unsafe { sys!(SYS_newfstatat, dir, name, &raw mut stat, 0) }.map(|_| stat)
}

/// Status of a descriptor.
pub fn fstat(fd: i32) -> Result<libc::stat> {
    let mut stat = empty_stat();
    // SAFETY: as for `stat`.
    unsafe { sys!(SYS_fstat, fd, &raw mut stat) }.map(|_| stat)
}

/// Position of a descriptor.
pub fn position(fd: i32) -> Result<u64> {
    // SAFETY: no memory is touched.
    unsafe { sys!(SYS_lseek, fd, 0, libc::SEEK_CUR) }.map(|at| at as u64)
}

/// Process, without the cache of the C library.
pub fn getpid() -> i32 {
    // SAFETY: no memory is touched.
    unsafe { syscall(libc::SYS_getpid, [0; 6]) as i32 }
}

/// Thread.
pub fn gettid() -> i32 {
    // SAFETY: no memory is touched.
    unsafe { syscall(libc::SYS_gettid, [0; 6]) as i32 }
}

/// Ends the process.
#[cfg_attr(not(panic = "abort"), allow(dead_code))]
pub fn abort() -> ! {
    loop {
        // SAFETY: no memory is touched.
        unsafe {
            let _ = sys!(SYS_tgkill, getpid(), gettid(), libc::SIGABRT);
            let _ = sys!(SYS_exit_group, 134);
        }
    }
}

fn clock(id: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable. The C library's function reads the clock without a system call.
    unsafe { libc::clock_gettime(id, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Nanoseconds since some moment.
pub fn now_ns() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// Nanoseconds since the host started, also while it slept: the clock of the primary's lease.
pub fn lease_now_ns() -> u64 {
    clock(libc::CLOCK_BOOTTIME)
}

/// The same as [`now_ns`], cheaper and a few milliseconds old.
pub fn coarse_now_ns() -> u64 {
    clock(libc::CLOCK_MONOTONIC_COARSE)
}

/// A file without a name that has this content, at its beginning.
pub fn file_with(content: &[u8], close_on_exec: bool) -> Result<i32> {
    let flags = if close_on_exec { libc::MFD_CLOEXEC } else { 0 };
    // SAFETY: the name ends with a zero.
    let fd = unsafe { sys!(SYS_memfd_create, c"litefs".as_ptr(), flags) }? as i32;
    match pwrite(fd, content, 0) {
        Ok(_) => Ok(fd),
        Err(error) => {
            close(fd);
            Err(error)
        }
    }
}

/// Sleeps.
pub fn sleep_ms(ms: u64) {
    let time = libc::timespec { tv_sec: (ms / 1000) as i64, tv_nsec: (ms % 1000 * 1_000_000) as i64 };
    // SAFETY: `time` is readable.
    let _ = unsafe { sys!(SYS_nanosleep, &raw const time, 0) };
}

/// Waits while the word is `expected`, at most `ms`.
pub fn futex_wait(word: &AtomicU32, expected: u32, ms: u64) {
    let time = libc::timespec { tv_sec: (ms / 1000) as i64, tv_nsec: (ms % 1000 * 1_000_000) as i64 };
    // SAFETY: the word is valid memory, and `time` readable.
    let _ = unsafe { sys!(SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const time, 0, 0) };
}

/// Wakes who waits.
pub fn futex_wake(word: &AtomicU32, count: i32) {
    // SAFETY: the word is valid memory.
    let _ = unsafe { sys!(SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count, 0, 0, 0) };
}

/// A sequenced-packet socket that does not block, with a high number if it can be.
pub fn socket() -> Result<i32> {
    // An agent that is stopped accepts nobody: connecting to it must fail, not wait.
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is touched.
    let fd = unsafe { sys!(SYS_socket, libc::AF_UNIX, kind, 0) }? as i32;
    Ok(with_high_number(fd).unwrap_or(fd))
}

/// The same descriptor with a high number, unless the limit is lower: applications like the low ones.
fn with_high_number(fd: i32) -> Result<i32> {
    // SAFETY: no memory is touched.
    let high = unsafe { sys!(SYS_fcntl, fd, libc::F_DUPFD_CLOEXEC, 700) }? as i32;
    close(fd);
    Ok(high)
}

/// A directory, for looks into it; with a high number, or not at all.
pub fn open_directory(path: &core::ffi::CStr) -> Result<i32> {
    let fd = open_read(path, libc::O_PATH | libc::O_DIRECTORY)?;
    with_high_number(fd).inspect_err(|_| close(fd))
}

/// Connects.
pub fn connect(fd: i32, path: &[u8]) -> Result<()> {
    // SAFETY: a plain C struct.
    let mut address: libc::sockaddr_un = unsafe { core::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    if path.len() >= address.sun_path.len() {
        return Err(libc::ENAMETOOLONG);
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the address is as long as is said.
    unsafe { sys!(SYS_connect, fd, &raw const address, size_of::<libc::sockaddr_un>()) }.map(|_| ())
}

/// Sends one message.
pub fn send(fd: i32, data: &[u8]) -> Result<usize> {
    // SAFETY: the buffer is as long as is said.
    unsafe { sys!(SYS_sendto, fd, data.as_ptr(), data.len(), libc::MSG_NOSIGNAL, 0, 0) }
}

/// What happens to a descriptor within `ns`; 0: nothing.
fn poll(fd: i32, events: i16, ns: u64) -> Result<i16> {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    let time = libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
    // SAFETY: one entry; no signal mask.
    unsafe { sys!(SYS_ppoll, &raw mut poll, 1, &raw const time, 0, 0) }.map(|_| poll.revents)
}

/// Waits for a message, also while the application gets signals.
pub fn readable(fd: i32, ms: u64) -> bool {
    let deadline = now_ns() + ms * 1_000_000;
    loop {
        let left = deadline.saturating_sub(now_ns());
        match poll(fd, libc::POLLIN, left) {
            Err(libc::EINTR) if left > 0 => {}
            happened => return happened.is_ok_and(|events| events != 0),
        }
    }
}

/// Whether the other side of a connection has gone. A signal, or a want of memory, says nothing of that.
pub fn hung_up(fd: i32) -> bool {
    poll(fd, libc::POLLRDHUP, 0).is_ok_and(|events| events != 0)
}

/// Makes a descriptor wait for what it is asked.
pub fn make_waiting(fd: i32) -> Result<()> {
    // SAFETY: no memory is touched.
    let flags = unsafe { sys!(SYS_fcntl, fd, libc::F_GETFL, 0) }? as i32;
    // SAFETY: no memory is touched.
    unsafe { sys!(SYS_fcntl, fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) }.map(|_| ())
}

/// Has a descriptor survive `execve`.
pub fn keep_on_exec(fd: i32) -> Result<()> {
    // SAFETY: no memory is touched.
    unsafe { sys!(SYS_fcntl, fd, libc::F_SETFD, 0) }.map(|_| ())
}

/// Receives a message, and at most one descriptor.
pub fn receive(fd: i32, data: &mut [u8]) -> Result<(usize, Option<i32>)> {
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: a plain C struct.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: the message describes the buffers above.
    let count = unsafe { sys!(SYS_recvmsg, fd, &raw mut message, libc::MSG_CMSG_CLOEXEC) }?;
    // SAFETY: the kernel has filled the control buffer as far as `msg_controllen` says.
    let received = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_RIGHTS
        {
            Some(libc::CMSG_DATA(header).cast::<i32>().read_unaligned())
        } else {
            None
        }
    };
    Ok((count, received))
}

/// Maps a file's start, shared, or anonymous memory where `fd` is -1.
pub fn map(fd: i32, len: usize) -> Result<*mut u8> {
    let flags = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    // SAFETY: a new mapping where nothing is.
    unsafe { sys!(SYS_mmap, 0, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) }
        .map(|at| at as *mut u8)
}

/// Moves anonymous memory to a larger place.
///
/// # Safety
/// `at` is a mapping of `len` bytes, and nobody keeps a pointer into it.
pub unsafe fn grow(at: *mut u8, len: usize, new: usize) -> Result<*mut u8> {
    // SAFETY: as the caller promises.
    unsafe { sys!(SYS_mremap, at, len, new, libc::MREMAP_MAYMOVE, 0) }.map(|at| at as *mut u8)
}

/// The application's error number.
pub fn errno() -> i32 {
    // SAFETY: the address is this thread's.
    unsafe { *libc::__errno_location() }
}

/// Sets it.
pub fn set_errno(error: i32) {
    // SAFETY: the address is this thread's.
    unsafe { *libc::__errno_location() = error }
}

/// What a function of the C library answers that fails.
pub fn fail(error: i32) -> i32 {
    set_errno(error);
    -1
}
