//! `liblitefs.so`, the preload door: it meets the agent at the commits of the SQLite that runs in this process, and is
//! out of the way of everything else.
//!
//! | module           | what it does                                                             |
//! |------------------|--------------------------------------------------------------------------|
//! | [`interpose`]    | the functions of the C library that are taken over                       |
//! | [`managed`]      | which paths are below a directory of an agent                            |
//! | [`table`]        | what is known of open descriptors and databases                          |
//! | [`opening`]      | who may open a file of a database                                        |
//! | [`writing`]      | what its writes, syncs, cuts and its close mean                          |
//! | [`removing`]     | what it means that it goes; [`rename`]: that it moves                    |
//! | [`sqlite_locks`] | what SQLite's own locks mean                                             |
//! | [`rollback`]     | transactions with a rollback journal, or without                         |
//! | [`wal`]          | commits in a WAL, held or not, and its end                               |
//! | [`transaction`]  | what the running transaction has written                                 |
//! | [`special`]      | files that the agent makes up                                            |
//! | [`directories`]  | directories of open databases, kept open                                 |
//! | [`agent`]        | the agent: connection, requests, what it allows                          |
//! | [`own`]          | this library's descriptors among the application's                       |
//! | [`process`]      | the process itself, and its standard error                               |
//! | [`lock`]         | the lock of this library's own data                                      |
//! | [`real`]         | the functions that were taken over                                       |
//! | [`sys`]          | system calls that leave `errno` alone                                    |
//!
//! Rules for all of it: no allocation, no standard library, no thread-local with a destructor, no panic. A descriptor that
//! is not a database's costs one load from a table. A file of a database is never opened, duplicated or closed here: the
//! close would drop the POSIX locks that SQLite holds in this process. State changes only in the process that owns
//! it: a child of `vfork` shares this memory.
#![cfg_attr(panic = "abort", no_std)]

mod agent;
mod directories;
mod interpose;
mod lock;
mod managed;
mod opening;
mod own;
mod process;
mod real;
mod removing;
mod rename;
mod rollback;
mod special;
mod sqlite_locks;
mod sys;
mod table;
mod transaction;
mod wal;
mod writing;

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
        process::remember();
        // SAFETY: the function has the right type and lives as long as the process.
        unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    }
    construct
};

/// Runs in the child of a fork.
extern "C" fn forked() {
    process::forked();
    managed::forked();
    agent::forked();
    directories::forked();
    table::forked();
}
