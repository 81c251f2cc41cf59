//! Files of an agent's data directory, for tests that damage them.

use crate::Host;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The page checksums of a database.
pub fn sidecar(host: &Host, database: &str) -> PathBuf {
    host.data().join("checksums").join(format!("{database}.sum"))
}

/// Flips a bit of a byte.
pub fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("the file is there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("the file reaches there");
    file.write_all_at(&[byte[0] ^ 0x40], offset).expect("the file can be written");
}

/// TXID of the mark in a sidecar: up to there the files are durable, and recovery does not replay the log.
pub fn mark(host: &Host, database: &str) -> u64 {
    let mut txid = [0; 8];
    let file = File::open(sidecar(host, database)).expect("there is a sidecar");
    file.read_exact_at(&mut txid, 16).expect("it has a header");
    u64::from_le_bytes(txid)
}

/// Commits something, kills the agent before it has marked that durable, and gives the position. Where the disk takes longer
/// than an agent waits with that, it is committed again.
pub fn kill_before_it_marks(host: &Host, database: &str, sql: &str) -> String {
    loop {
        host.sql(database, sql);
        let (position, txid) = (host.position(database).expect("it is there"), host.txid(database));
        host.kill();
        if mark(host, database) < txid {
            return position;
        }
        host.start();
    }
}

/// The segments of a log, oldest first.
pub fn segments(host: &Host) -> Vec<PathBuf> {
    let files = fs::read_dir(host.data().join("log")).expect("there is a log");
    let mut segments: Vec<PathBuf> = files
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .filter(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("spare")))
        .collect();
    segments.sort();
    segments
}
