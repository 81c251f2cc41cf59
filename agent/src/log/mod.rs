//! The commit log: the transactions of all databases of a node, in one sequence, made durable by one fsync for all.
//!
//! Appending writes one record to the page cache, after which it survives the death of the process. A thread, the
//! flusher, syncs whatever was appended and tells everyone who waits: many commits share one sync, and a database
//! costs no descriptor. The log is a sequence of segment files; a second thread, the keeper, makes the next one
//! ready ahead of need and sums up full ones in an index file, so that opening a log reads only its end.
//!
//! | module | what it does |
//! |--------|--------------|
//! | `record`, `error` | what is appended and read, and what can go wrong |
//! | `format`, `sealed` | the bytes of segments, records and index files (`docs/on-disk-format.md`) |
//! | `commit_log` | the log as others use it |
//! | `writer`, `external` | appending; payloads in files of their own |
//! | `flusher`, `keeper` | the two threads |
//! | `scan`, `recovery` | walking a segment; putting a log in order when it is opened |
//! | `index`, `segments`, `reading`, `retention` | finding, reading and removing records |
//! | `inspect` | looking at a segment from outside |
//! | `storage` | the file system, as narrow as the log needs it |
//!
//! What a crash may take away is only what was never reported as durable, and only from the end.

mod commit_log;
mod error;
mod external;
mod flusher;
mod format;
mod index;
mod inspect;
mod keeper;
mod reading;
mod record;
mod recovery;
mod retention;
mod scan;
mod sealed;
mod segments;
mod storage;
mod writer;

#[cfg(test)]
mod tests;

pub use commit_log::{CommitLog, Options};
pub use error::{Damage, LogError};
pub use flusher::{OnDurable, OnSync};
pub use inspect::{Inspected, inspect_segment, is_segment_name};
pub use reading::Visit;
pub use record::{Fence, Lsn, NewRecord, Payload, PayloadPlace, RecordInfo, RecordKind, WalEnd};
pub use retention::Retained;
