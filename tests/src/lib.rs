//! Whole-system tests: real `sqlite3`, real agents, real mounts. The harness is here, the tests in `tests/`.
//!
//! ```no_run
//! use litefs_tests::Fleet;
//!
//! let fleet = Fleet::new();
//! let primary = fleet.primary("a");
//! let replica = fleet.replica("b", &primary);
//! primary.sql("app.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1);");
//! litefs_tests::assert_equal(&primary, &replica, "app.db");
//! assert_eq!(replica.sql("app.db", "SELECT * FROM t"), "1");
//! ```
//!
//! Every test has a directory of its own. When a [`Host`] is dropped its agent is killed and its mount is taken away,
//! also after a panic; then its log is looked at: an ERROR line that no [`Host::expect_error`] announced fails the
//! test.
//!
//! `LITEFS_TEST_SET` sets configuration keys of all agents (`mount.passthrough=off log-output.level=debug`), `LITEFS_BIN`
//! the program under test. `LITEFS_TEST_DOOR=preload` gives all hosts the preload door.
//!
//! POSIX locks belong to a process: two connections of this process do exclude each other (SQLite sees to that), but
//! reading a database that this process has open by other means than SQLite would drop its locks. For a second process
//! there are [`Host::sql`], [`Shell`] and `python3`.

mod binary;
mod bus;
mod certificates;
mod client;
mod clocks;
mod compare;
mod connection;
mod consul;
pub mod data_files;
mod door;
pub mod halt_locks;
mod host;
pub mod library;
mod mounted;
mod network;
mod ports;
mod roles;
mod shell;
mod system_calls;
mod wait;

pub use binary::{liblitefs, litefs};
pub use bus::Bus;
pub use certificates::{Authority, Identity};
pub use client::Client;
pub use clocks::Clocks;
pub use compare::{
    assert_equal, assert_nothing_diverged, assert_sane, checksum_of, compare_files, integrity_check,
};
pub use connection::{
    COUNT, CREATE_DELETE, CREATE_WAL, FILL, JOURNAL_MODES, ask, exec, set_journal_mode, try_exec, wait_seen,
};
pub use consul::Consul;
pub use door::{is_about_fuse, is_preload};
pub use host::{Fleet, Host, Role};
pub use mounted::Mounted;
pub use network::Network;
pub use ports::Port;
pub use shell::{Shell, insert_until_it_fails, run, sqlite3, try_run, try_sqlite3};
pub use system_calls::{SystemCall, replace_system_calls};
pub use wait::{PATIENCE, wait_for};
