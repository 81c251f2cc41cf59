//! The agent: keeps SQLite databases identical on every host of a fleet.
//!
//! Reading order is the way of a transaction:
//!
//! | module       | what it does                                                                      |
//! |--------------|-----------------------------------------------------------------------------------|
//! | [`door`]     | how applications reach their databases (FUSE, preload), and where a commit is seen |
//! | [`capture`]  | from a commit to an LTX record, for WAL and rollback journals                      |
//! | [`database`] | one database: its files, page checksums, recovery, imports, snapshots              |
//! | [`log`]      | the commit log: one fsync for the commits of all databases, positions, retention   |
//! | [`ship`]     | streams records and snapshots to followers, and follows an upstream                |
//! | [`apply`]    | writes a record to a database file the way an SQLite writer would                  |
//! | [`sync`]     | commits that wait until followers have them                                        |
//! | [`lease`]    | who may write: leases, elections, and the machine that decides the role            |
//! | [`node`]     | all databases of one host, its role and epoch                                      |
//! | [`status`]   | what an operator sees: status, metrics, events, the system bus                     |
//! | [`hooks`]    | what runs when a database changed on this host                                     |
//! | [`systemd`]  | the agent as a service: sockets, watchdog, status line, units per role, secrets    |
//! | [`tls`]      | certificates between hosts                                                        |
//! | `write_out`  | data on its way to the disk in small pieces, so that no sync of the log waits long   |
//! | [`config`], [`cli`] | the configuration file and the command line                                 |

pub mod apply;
pub mod capture;
pub mod cli;
pub mod config;
pub mod database;
pub mod door;
pub mod hooks;
pub mod lease;
pub mod log;
pub mod name;
pub mod node;
pub mod ship;
pub mod status;
pub mod sync;
pub mod systemd;
pub mod tls;
mod write_out;

pub use name::DatabaseName;
