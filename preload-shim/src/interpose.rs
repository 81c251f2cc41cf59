//! The functions of the C library that are taken over. Each does the real thing at once for what is not a database's.
//!
//! Not among them: reading and `mmap` (nothing depends on them), `fallocate` (SQLite's header says how many pages
//! count), `writev` and its kin (no SQLite uses them; another program's writes are found by the agent).

use crate::managed::{self, Managed};
use crate::table::{self, DESCRIPTORS, File};
use crate::{directories, opening, own, real, removing, rename, special, sqlite_locks, sys, writing};
use core::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// F2FS's question what it can do: its atomic writes have no journal.
const F2FS_IOC_GET_FEATURES: usize = 0x8004_f50c;

fn find(path: *const c_char) -> Option<Managed> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the application gives a string that ends with a zero.
    managed::find(unsafe { CStr::from_ptr(path) })
}

/// Whether a path is known to be nobody's business.
#[inline]
fn is_unmanaged(path: *const c_char) -> bool {
    // SAFETY: the application gives a string that ends with a zero.
    !path.is_null() && managed::is_unmanaged(unsafe { CStr::from_ptr(path) })
}

/// What all kinds of `open` do with a path that may be managed.
#[cold]
#[inline(never)]
fn opened(path: *const c_char, flags: c_int, real: &dyn Fn(c_int) -> c_int) -> c_int {
    match find(path) {
        Some(managed) => {
            // SAFETY: it is managed, so it is not null; the application gives a string that ends with a zero.
            let fd = opening::open(unsafe { CStr::from_ptr(path) }, &managed, flags, real);
            own::check(fd);
            fd
        }
        None => opened_unmanaged(real(flags)),
    }
}

/// A new descriptor of what is nobody's business: its number may have been closed in a way that was not seen.
#[inline]
fn opened_unmanaged(fd: c_int) -> c_int {
    own::check(fd);
    table::closed(fd);
    fd
}

/// Another descriptor of the same file.
fn duplicated(fd: c_int, copy: c_int) {
    if copy != fd {
        own::check(copy);
        table::duplicated(fd, copy);
    }
}

macro_rules! openers {
    ($($name:ident ( $($before:ident : $type:ty),* ; $path:ident ; $($mode:ident)? );)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($before: $type,)* $path: *const c_char, flags: c_int $(, $mode: c_uint)?
        ) -> c_int {
            if is_unmanaged($path) {
                // SAFETY: the arguments are the caller's.
                return opened_unmanaged(unsafe { real::$name($($before,)* $path, flags $(, $mode)?) });
            }
            // SAFETY: the arguments are the caller's.
            opened($path, flags, &move |flags| unsafe { real::$name($($before,)* $path, flags $(, $mode)?) })
        }
    )*};
}

openers! {
    open(; path; mode);
    open64(; path; mode);
    openat(dir: c_int; path; mode);
    openat64(dir: c_int; path; mode);
    __open_2(; path; );
    __open64_2(; path; );
    __openat_2(dir: c_int; path; );
    __openat64_2(dir: c_int; path; );
}

macro_rules! creators {
    ($($name:ident)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, mode: c_uint) -> c_int {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
            // SAFETY: the arguments are the caller's.
            opened(path, flags, &move |_| unsafe { real::$name(path, mode) })
        }
    )*};
}

creators! { creat creat64 }

/// As in the C library; a journal whose creation was refused is not there.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    if mode == libc::F_OK
        && opening::was_refused()
        && find(path).is_some_and(|managed| opening::take_refusal(&managed))
    {
        return sys::fail(libc::ENOENT);
    }
    // SAFETY: the arguments are the caller's.
    unsafe { real::access(path, mode) }
}

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if own::owns(fd) {
        // Some programs close all that they did not open.
        return sys::fail(libc::EBADF);
    }
    if let Some(file) = table::file(fd) {
        closing(fd, file);
    }
    // SAFETY: the arguments are the caller's.
    unsafe { real::close(fd) }
}

/// A descriptor of a database's file is about to be closed.
#[cold]
#[inline(never)]
fn closing(fd: c_int, file: &File) {
    writing::closing(file);
    // Before the number can be another thread's.
    table::closed(fd);
}

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if flags as c_uint & libc::CLOSE_RANGE_CLOEXEC == 0 {
        for fd in first..=last.min(DESCRIPTORS as c_uint - 1) {
            if let Some(file) = table::file(fd as c_int) {
                closing(fd as c_int, file);
            }
        }
    }
    let mut first = first;
    while let Some(own) = own::next(first).filter(|own| *own <= last) {
        if own > first {
            // SAFETY: the arguments are the caller's.
            let done = unsafe { real::close_range(first, own - 1, flags) };
            if done != 0 {
                return done;
            }
        }
        if own == last {
            return 0;
        }
        first = own + 1;
    }
    // SAFETY: the arguments are the caller's.
    unsafe { real::close_range(first, last, flags) }
}

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: the arguments are the caller's.
    let _ = unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
}

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    let copy = unsafe { real::dup(fd) };
    duplicated(fd, copy);
    copy
}

/// A file that the agent makes up and that this path names, at its beginning.
#[cold]
fn special(path: *const c_char, flags: c_int) -> Result<c_int, c_int> {
    find(path).map_or(Err(libc::ENOENT), |managed| special::find(&managed, flags))
}

/// Whether a path may name such a file: costs nothing to ask.
fn may_be_special(path: *const c_char) -> bool {
    // SAFETY: the application gives a string that ends with a zero.
    !path.is_null() && special::ends_like_special(unsafe { CStr::from_ptr(path) }.to_bytes())
}

macro_rules! streams {
    ($($name:ident)*) => {$(
        /// As in the C library, but for files that the agent makes up; database files are opened in other ways.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
            if may_be_special(path) && !mode.is_null() {
                // SAFETY: the application gives a string that ends with a zero.
                let letters = unsafe { CStr::from_ptr(mode) }.to_bytes();
                let reads = letters.first() == Some(&b'r') && !letters.contains(&b'+');
                let flags = if letters.contains(&b'e') { libc::O_CLOEXEC } else { 0 }
                    | if reads { libc::O_RDONLY } else { libc::O_RDWR };
                // SAFETY: as above.
                let is_lock = special::is_lock(unsafe { CStr::from_ptr(path) }.to_bytes());
                let fd = if reads || is_lock { special(path, flags) } else { Err(libc::ENOENT) };
                match fd {
                    Ok(fd) => {
                        // SAFETY: the descriptor is new, and the mode the caller's.
                        let stream = unsafe { libc::fdopen(fd, mode) };
                        if stream.is_null() {
                            sys::close(fd);
                        }
                        return stream;
                    }
                    Err(error) if is_lock && error != libc::ENOENT => {
                        sys::set_errno(error);
                        return core::ptr::null_mut();
                    }
                    Err(_) => {}
                }
            }
            // SAFETY: the arguments are the caller's.
            unsafe { real::$name(path, mode) }
        }
    )*};
}

streams! { fopen fopen64 }

/// Whether this is a file that the agent makes up, where the real thing has found nothing.
#[inline]
fn may_be_special_after(result: c_int, path: *const c_char) -> bool {
    result != 0 && sys::errno() == libc::ENOENT && may_be_special(path)
}

/// Status of a file that the agent makes up; as of a file that is not there, if there is none.
#[cold]
#[inline(never)]
fn status_of(path: *const c_char, of_special: &dyn Fn(c_int) -> c_int) -> c_int {
    let Ok(fd) = special(path, libc::O_CLOEXEC) else {
        return sys::fail(libc::ENOENT);
    };
    let result = of_special(fd);
    sys::close(fd);
    result
}

/// What may be done with a file that the agent makes up.
const SPECIAL_MODE: c_uint = libc::S_IFREG | 0o444;

/// Status of such a file, which has no name of its own.
///
/// # Safety
/// `to` points to memory that a `stat` may be written to; what is there before does not matter.
unsafe fn status_of_special(fd: c_int, to: *mut libc::stat) -> c_int {
    match sys::fstat(fd) {
        Ok(mut stat) => {
            stat.st_mode = SPECIAL_MODE;
            stat.st_nlink = 1;
            // SAFETY: the caller promises that `to` may be written; nothing is read from it or dropped.
            unsafe { to.write(stat) };
            0
        }
        Err(error) => sys::fail(error),
    }
}

macro_rules! stats {
    ($($name:ident ( $($dir:ident)? ; $($flags:ident)? ) $(or $at:ident)?;)*) => {$(
        /// As in the C library, also for files that the agent makes up.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($dir: c_int,)? path: *const c_char, to: *mut libc::stat $(, $flags: c_int)?
        ) -> c_int {
            $(
                // SAFETY: the name is the end of the caller's path, and there is room for what was asked for.
                if let Some(result) = directories::look(path, |dir, name| unsafe { real::$at(dir, name, to, 0) }) {
                    return result;
                }
            )?
            // SAFETY: the arguments are the caller's.
            let result = unsafe { real::$name($($dir,)? path, to $(, $flags)?) };
            if may_be_special_after(result, path) {
                // SAFETY: the application gives room for a `stat`: on these architectures that of the functions with 64 is the same.
                return status_of(path, &move |fd| unsafe { status_of_special(fd, to) });
            }
            result
        }
    )*};
}

stats! {
    stat(;) or fstatat;
    stat64(;) or fstatat64;
    lstat(;);
    lstat64(;);
    fstatat(dir; flags);
    fstatat64(dir; flags);
}

/// As in the C library, also for files that the agent makes up.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn statx(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    to: *mut libc::statx,
) -> c_int {
    // SAFETY: the arguments are the caller's.
    let result = unsafe { real::statx(dir, path, flags, mask, to) };
    if !may_be_special_after(result, path) {
        return result;
    }
    status_of(path, &move |fd| {
        // SAFETY: an empty path means the descriptor; the application gives room for the answer.
        unsafe {
            let result = real::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, to);
            if result == 0 {
                (*to).stx_mode = SPECIAL_MODE as u16;
                (*to).stx_nlink = 1;
            }
            result
        }
    })
}

fn before_dup_to(fd: c_int, to: c_int) {
    if fd != to && own::owns(to) {
        own::give_up(to);
    }
}

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    before_dup_to(fd, to);
    // SAFETY: the arguments are the caller's.
    let copy = unsafe { real::dup2(fd, to) };
    duplicated(fd, copy);
    copy
}

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    before_dup_to(fd, to);
    // SAFETY: the arguments are the caller's.
    let copy = unsafe { real::dup3(fd, to, flags) };
    duplicated(fd, copy);
    copy
}

macro_rules! fcntls {
    ($($name:ident)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int, command: c_int, arg: usize) -> c_int {
            if matches!(command, libc::F_SETLK | libc::F_SETLKW)
                && arg != 0
                && let Some(file) = table::file(fd)
            {
                // SAFETY: the arguments are the caller's.
                let real = move || unsafe { real::$name(fd, command, arg) };
                // SAFETY: these commands take a lock.
                return sqlite_locks::lock(fd, file, unsafe { &*(arg as *const libc::flock) }, &real);
            }
            // SAFETY: the arguments are the caller's.
            let result = unsafe { real::$name(fd, command, arg) };
            if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
                duplicated(fd, result);
            }
            result
        }
    )*};
}

fcntls! { fcntl fcntl64 }

/// The application's buffer.
///
/// # Safety
/// As for `write`: `data` is null or points to `len` bytes, which stay as they are for `'a`: until the call that gave them
/// returns.
unsafe fn buffer<'a>(data: *const c_void, len: usize) -> &'a [u8] {
    if data.is_null() {
        return &[];
    }
    // SAFETY: it is not null, and the caller promises `len` bytes that nobody changes meanwhile.
    unsafe { core::slice::from_raw_parts(data.cast(), len) }
}

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, data: *const c_void, len: usize) -> isize {
    if let Some(file) = table::file(fd)
        && file.is_still(fd)
        && let Ok(offset) = sys::position(fd)
    {
        // SAFETY: the arguments are the caller's.
        let real = move || unsafe { real::write(fd, data, len) };
        // SAFETY: the arguments are the caller's.
        return written(fd, file, unsafe { buffer(data, len) }, offset, &real);
    }
    // SAFETY: the arguments are the caller's.
    unsafe { real::write(fd, data, len) }
}

/// A write to a database's file. A function of its own, so that a write to any other file is a jump to the C library.
#[inline(never)]
fn written(fd: c_int, file: &File, data: &[u8], offset: u64, real: &dyn Fn() -> isize) -> isize {
    writing::write(fd, file, data, offset, real)
}

macro_rules! pwrites {
    ($($name:ident)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int, data: *const c_void, len: usize, offset: i64) -> isize {
            if let Some(file) = table::file(fd)
                && offset >= 0
            {
                // SAFETY: the arguments are the caller's.
                let real = move || unsafe { real::$name(fd, data, len, offset) };
                // SAFETY: the arguments are the caller's.
                return written(fd, file, unsafe { buffer(data, len) }, offset as u64, &real);
            }
            // SAFETY: the arguments are the caller's.
            unsafe { real::$name(fd, data, len, offset) }
        }
    )*};
}

pwrites! { pwrite pwrite64 }

macro_rules! syncs {
    ($($name:ident)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int) -> c_int {
            if let Some(file) = table::file(fd) {
                // SAFETY: the arguments are the caller's.
                return writing::sync(file, &move || unsafe { real::$name(fd) });
            }
            // SAFETY: the arguments are the caller's.
            unsafe { real::$name(fd) }
        }
    )*};
}

syncs! { fsync fdatasync }

macro_rules! truncates {
    ($($name:ident)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int, len: i64) -> c_int {
            if let Some(file) = table::file(fd)
                && file.is_still(fd)
            {
                // SAFETY: the arguments are the caller's.
                return writing::truncate(file, len, &move || unsafe { real::$name(fd, len) });
            }
            // SAFETY: the arguments are the caller's.
            unsafe { real::$name(fd, len) }
        }
    )*};
}

truncates! { ftruncate ftruncate64 }

macro_rules! truncates_by_path {
    ($($name:ident)*) => {$(
        /// As in the C library; never how SQLite cuts a file.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, len: i64) -> c_int {
            if find(path).is_some_and(|managed| table::Kind::of(managed.name.bytes()).is_some()) {
                return sys::fail(libc::EPERM);
            }
            // SAFETY: the arguments are the caller's.
            unsafe { real::$name(path, len) }
        }
    )*};
}

truncates_by_path! { truncate truncate64 }

/// What removing a path that may be managed is.
#[cold]
#[inline(never)]
fn removed(path: *const c_char, real: &dyn Fn() -> c_int) -> c_int {
    match find(path) {
        Some(managed) => removing::unlink(&managed, real),
        None => real(),
    }
}

macro_rules! removers {
    ($($name:ident ( $($dir:ident)? ; $($flags:ident)? );)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($dir: c_int,)? path: *const c_char $(, $flags: c_int)?) -> c_int {
            if is_unmanaged(path) $(|| $flags & libc::AT_REMOVEDIR != 0)? {
                // SAFETY: the arguments are the caller's.
                return unsafe { real::$name($($dir,)? path $(, $flags)?) };
            }
            // SAFETY: the arguments are the caller's.
            removed(path, &move || unsafe { real::$name($($dir,)? path $(, $flags)?) })
        }
    )*};
}

removers! {
    unlink(;);
    unlinkat(dir; flags);
    remove(;);
}

fn renamed(from: *const c_char, to: *const c_char, real: &dyn Fn() -> c_int) -> c_int {
    match (find(from), find(to)) {
        (None, None) => real(),
        (from, to) => rename::rename(from, to, real),
    }
}

macro_rules! renamers {
    ($($name:ident ( $($from_dir:ident)? ; $($to_dir:ident)? ; $($flags:ident)? );)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($from_dir: c_int,)? from: *const c_char, $($to_dir: c_int,)? to: *const c_char $(, $flags: c_uint)?
        ) -> c_int {
            // SAFETY: the arguments are the caller's.
            renamed(from, to, &move || unsafe { real::$name($($from_dir,)? from, $($to_dir,)? to $(, $flags)?) })
        }
    )*};
}

renamers! {
    rename(;;);
    renameat(from_dir; to_dir;);
    renameat2(from_dir; to_dir; flags);
}

/// As in the C library; no file of a database is on a file system with atomic writes.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: usize, arg: usize) -> c_int {
    if request == F2FS_IOC_GET_FEATURES && table::file(fd).is_some() {
        return sys::fail(libc::ENOTTY);
    }
    // SAFETY: the arguments are the caller's.
    unsafe { real::ioctl(fd, request, arg) }
}

/// As in the C library, without `RTLD_DEEPBIND`: with it a library would find the C library's functions before these.
/// Jumps, so that the dynamic linker sees who called.
#[cfg(target_arch = "x86_64")]
// SAFETY: it keeps the two arguments and the stack's alignment over the call, and leaves them to `dlopen`, to which it jumps
// with the return address on top of the stack.
#[unsafe(naked)]
// SAFETY: the symbol takes the C library's place, and does what that one promises.
#[unsafe(no_mangle)]
pub extern "C" fn dlopen() {
    core::arch::naked_asm!(
        "push rdi",
        "push rsi",
        "sub rsp, 8",
        "call {real}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "and esi, -9",
        "jmp rax",
        real = sym real::dlopen_address,
    )
}

/// As in the C library, without `RTLD_DEEPBIND`: with it a library would find the C library's functions before these.
/// Jumps, so that the dynamic linker sees who called.
#[cfg(target_arch = "aarch64")]
// SAFETY: it keeps the two arguments and the return address over the call, and the stack's alignment; then it jumps to
// `dlopen` with all of them as they came.
#[unsafe(naked)]
// SAFETY: the symbol takes the C library's place, and does what that one promises.
#[unsafe(no_mangle)]
pub extern "C" fn dlopen() {
    core::arch::naked_asm!(
        "stp x29, x30, [sp, #-32]!",
        "stp x0, x1, [sp, #16]",
        "bl {real}",
        "mov x16, x0",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #32",
        "and w1, w1, #-9",
        "br x16",
        real = sym real::dlopen_address,
    )
}
