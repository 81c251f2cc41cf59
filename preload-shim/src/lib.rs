//! `liblitefs.so`, the preload door: it meets the agent at the commits of the SQLite that runs in this process, and is
//! out of the way of everything else.
//!
//! | module        | what it does                                                             |
//! |---------------|--------------------------------------------------------------------------|
//! | [`interpose`] | the functions of the C library that are taken over                        |
//! | [`managed`]   | which paths are below a directory of an agent                             |
//! | [`table`]     | what is known of open descriptors and databases                           |
//! | [`commit`]    | what each write, lock and removal of a database's file means              |
//! | [`agent`]     | the connection to the agent: handshake, doorbell, requests                |
//! | [`real`]      | the functions that were taken over                                        |
//! | [`sys`]       | system calls that leave `errno` alone                                     |
//!
//! Rules for all of it: no allocation, no standard library, no thread-local with a destructor, no panic. A descriptor that
//! is not a database's costs one load from a table. A file of a database is never opened, duplicated or closed here: the
//! close would drop the POSIX locks that SQLite holds in this process. State changes only in the process that owns
//! it: a child of `vfork` shares this memory.
#![cfg_attr(panic = "abort", no_std)]

mod agent;
mod commit;
mod interpose;
mod lock;
mod managed;
mod real;
mod sys;
mod table;

#[cfg(panic = "abort")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    sys::abort()
}

/// Runs when the library is loaded, before the application's own code.
#[used]
// SAFETY: the section is a list of function pointers that the dynamic linker calls once, when it has relocated the library.
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn construct() {
        real::resolve();
        agent::remember_process();
        // SAFETY: the function has the right type and lives as long as the process.
        unsafe { libc::pthread_atfork(None, None, Some(agent::forked)) };
    }
    construct
};
