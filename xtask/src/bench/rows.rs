//! The rows of the table, and what is demanded of each.

use super::door::Door;
use super::report::Bar;
use clap::ValueEnum;

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Row {
    WalOff,
    WalNormal,
    WalFull,
    DeleteOff,
    DeleteNormal,
    DeleteFull,
    /// Nobody has written since the database was opened: SQLite then asks for the size of the WAL at every read
    ReadWalEmpty,
    ReadWal,
    ReadDelete,
    /// From a commit's return to its visibility on the replica, at 50 commits/s
    #[value(name = "latency-50")]
    Latency50,
    #[value(name = "latency-1000")]
    Latency1000,
    /// Files that are nobody's business: made, written, read and removed
    PlainFiles,
    /// A large database, to a replica that joins
    Snapshot,
    /// Memory of the agents with a large database
    Rss,
}

impl Row {
    /// The row's title.
    pub fn title(self) -> &'static str {
        match self {
            Row::WalOff => "WAL OFF",
            Row::WalNormal => "WAL NORMAL",
            Row::WalFull => "WAL FULL",
            Row::DeleteOff => "DELETE OFF",
            Row::DeleteNormal => "DELETE NORMAL",
            Row::DeleteFull => "DELETE FULL",
            Row::ReadWalEmpty => "WAL, empty",
            Row::ReadWal => "WAL",
            Row::ReadDelete => "DELETE",
            Row::Latency50 => "at 50/s",
            Row::Latency1000 => "at 1,000/s",
            Row::PlainFiles => "files/s of no database",
            Row::Snapshot => "snapshot to a late joiner",
            Row::Rss => "RSS",
        }
    }

    /// Journal mode and `synchronous` of a row of commits, as SQLite spells them.
    pub fn commits(self) -> Option<(&'static str, &'static str)> {
        match self {
            Row::WalOff => Some(("wal", "off")),
            Row::WalNormal => Some(("wal", "normal")),
            Row::WalFull => Some(("wal", "full")),
            Row::DeleteOff => Some(("delete", "off")),
            Row::DeleteNormal => Some(("delete", "normal")),
            Row::DeleteFull => Some(("delete", "full")),
            _ => None,
        }
    }

    /// Journal mode of a row of reads.
    pub fn reads(self) -> Option<&'static str> {
        match self {
            Row::ReadWalEmpty | Row::ReadWal => Some("wal"),
            Row::ReadDelete => Some("delete"),
            _ => None,
        }
    }

    /// Commits per second of a row of latencies.
    pub fn latency(self) -> Option<u64> {
        match self {
            Row::Latency50 => Some(50),
            Row::Latency1000 => Some(1000),
            _ => None,
        }
    }

    /// What is demanded of a door: of the ratio to native, of milliseconds (p99), or of MiB.
    pub fn bar(self, door: Door) -> Option<Bar> {
        let (at_least, reach) = match (self, door) {
            (Row::WalOff | Row::WalNormal, Door::Fuse) => (0.1, 0.5),
            (Row::WalOff | Row::WalNormal, Door::Preload) => (0.8, 0.97),
            (Row::WalFull, Door::Fuse) => (0.4, 0.8),
            (Row::WalFull, Door::Preload) => (0.85, 0.98),
            (Row::WalFull, Door::PreloadHeld) => (0.4, 0.7),
            (Row::DeleteFull, Door::Fuse) => (0.4, 0.7),
            (Row::DeleteFull, Door::Preload | Door::PreloadHeld) => (0.5, 0.8),
            (Row::ReadWalEmpty | Row::ReadWal, Door::Fuse) => (0.95, 1.0),
            (Row::ReadDelete, Door::Fuse) => (0.6, 0.95),
            (Row::ReadWalEmpty | Row::ReadWal | Row::ReadDelete, _) => (0.97, 1.0),
            (Row::PlainFiles, Door::Preload | Door::PreloadHeld) => (0.99, 1.0),
            (Row::Latency1000, _) => (10.0, 2.0),
            (Row::Rss, _) => (40.0, 20.0),
            _ => return None,
        };
        Some(Bar { at_least, reach })
    }
}
