//! The functions that are taken over, as the next library in line has them: usually the C library, or another library that
//! was preloaded.

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use core::mem::transmute;
use core::sync::atomic::{AtomicPtr, Ordering};

struct Symbol {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Symbol {
    const fn new(name: &'static CStr) -> Self {
        Symbol { name, address: AtomicPtr::new(core::ptr::null_mut()) }
    }

    /// Its address; null where no other library has it.
    fn get(&self) -> *mut c_void {
        let known = self.address.load(Ordering::Relaxed);
        if !known.is_null() { known } else { self.find() }
    }

    #[cold]
    fn find(&self) -> *mut c_void {
        // SAFETY: the name ends with a zero, and the call only reads it.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.address.store(found, Ordering::Relaxed);
        found
    }
}

macro_rules! functions {
    ($($name:ident ( $($arg:ident : $type:ty),* ) -> $result:ty;)*) => {
        mod symbols {
            use super::Symbol;
            $(
                #[allow(non_upper_case_globals)]
                pub static $name: Symbol = {
                    // SAFETY: there is one zero, at the end.
                    Symbol::new(unsafe {
                        super::CStr::from_bytes_with_nul_unchecked(concat!(stringify!($name), "\0").as_bytes())
                    })
                };
            )*
        }

        /// Looks all of them up.
        pub fn resolve() {
            $(symbols::$name.get();)*
        }

        $(
            /// # Safety
            /// As for the C library's function of this name: pointers are what that one asks for.
            #[inline]
            pub unsafe fn $name($($arg: $type),*) -> $result {
                let address = symbols::$name.get();
                if address.is_null() {
                    crate::sys::set_errno(libc::ENOSYS);
                    return -1;
                }
                // SAFETY: it is not null, and the function of this name has this type in every C library; the caller keeps its rules.
                unsafe { transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $result>(address)($($arg),*) }
            }
        )*
    };
}

// The functions with `...` take their third or fourth argument in the same place as ordinary ones on the
// architectures this is built for.
functions! {
    open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    openat(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    openat64(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    creat(path: *const c_char, mode: c_uint) -> c_int;
    creat64(path: *const c_char, mode: c_uint) -> c_int;
    __open_2(path: *const c_char, flags: c_int) -> c_int;
    __open64_2(path: *const c_char, flags: c_int) -> c_int;
    __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    access(path: *const c_char, mode: c_int) -> c_int;
    close(fd: c_int) -> c_int;
    close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int;
    dup(fd: c_int) -> c_int;
    dup2(fd: c_int, to: c_int) -> c_int;
    dup3(fd: c_int, to: c_int, flags: c_int) -> c_int;
    fcntl(fd: c_int, command: c_int, arg: usize) -> c_int;
    fcntl64(fd: c_int, command: c_int, arg: usize) -> c_int;
    write(fd: c_int, data: *const c_void, len: usize) -> isize;
    pwrite(fd: c_int, data: *const c_void, len: usize, offset: i64) -> isize;
    pwrite64(fd: c_int, data: *const c_void, len: usize, offset: i64) -> isize;
    fsync(fd: c_int) -> c_int;
    fdatasync(fd: c_int) -> c_int;
    ftruncate(fd: c_int, len: i64) -> c_int;
    ftruncate64(fd: c_int, len: i64) -> c_int;
    truncate(path: *const c_char, len: i64) -> c_int;
    truncate64(path: *const c_char, len: i64) -> c_int;
    unlink(path: *const c_char) -> c_int;
    unlinkat(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    remove(path: *const c_char) -> c_int;
    rename(from: *const c_char, to: *const c_char) -> c_int;
    renameat(from_dir: c_int, from: *const c_char, to_dir: c_int, to: *const c_char) -> c_int;
    renameat2(from_dir: c_int, from: *const c_char, to_dir: c_int, to: *const c_char, flags: c_uint) -> c_int;
    ioctl(fd: c_int, request: usize, arg: usize) -> c_int;
    stat(path: *const c_char, to: *mut libc::stat) -> c_int;
    stat64(path: *const c_char, to: *mut libc::stat) -> c_int;
    lstat(path: *const c_char, to: *mut libc::stat) -> c_int;
    lstat64(path: *const c_char, to: *mut libc::stat) -> c_int;
    fstatat(dir: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int) -> c_int;
    fstatat64(dir: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int) -> c_int;
    statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, to: *mut libc::statx) -> c_int;
}

/// The functions that give a stream; null where no other library has them.
macro_rules! stream_functions {
    ($($name:ident = $symbol:literal;)*) => {$(
        /// # Safety
        /// As for the C library's function of this name: both are strings that end with a zero.
        pub unsafe fn $name(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
            static SYMBOL: Symbol = Symbol::new($symbol);
            let address = SYMBOL.get();
            if address.is_null() {
                crate::sys::set_errno(libc::ENOSYS);
                return core::ptr::null_mut();
            }
            type Function = unsafe extern "C" fn(*const c_char, *const c_char) -> *mut libc::FILE;
            // SAFETY: it is not null, and the function of this name has this type in every C library; the caller keeps its rules.
            unsafe { transmute::<*mut c_void, Function>(address)(path, mode) }
        }
    )*};
}

stream_functions! {
    fopen = c"fopen";
    fopen64 = c"fopen64";
}

/// Address of the real `dlopen`, for the interposed one to jump to.
pub extern "C" fn dlopen_address() -> *mut c_void {
    static DLOPEN: Symbol = Symbol::new(c"dlopen");
    DLOPEN.get()
}
