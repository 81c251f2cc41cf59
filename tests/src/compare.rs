//! Whether two hosts have the same database, page for page.

use crate::host::Host;
use crate::shell::sqlite3;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of page 1 that SQLite's backup sets in its copy: journal mode, change counter, schema cookie, and the version
/// that changed it.
const SET_BY_BACKUP: [std::ops::Range<usize>; 4] = [18..20, 24..28, 40..44, 92..100];

/// Waits until both hosts are at the same position of a database, and proves that they have the same database:
///
/// - their exports are equal, byte for byte, and the checksum of the position is that of the pages;
/// - what SQLite reads through each mount is equal to the export, page for page;
/// - `PRAGMA integrity_check` is content.
///
/// Nobody may write meanwhile. Returns the position.
#[track_caller]
pub fn assert_equal(primary: &Host, replica: &Host, database: &str) -> String {
    take_up_what_the_dead_left(primary, database);
    let position = primary.wait_position_equal(replica, database);
    let dir = tempfile::tempdir().expect("a directory");
    let (a, b) = (dir.path().join("primary.db"), dir.path().join("replica.db"));
    assert_eq!(primary.export(database, &a), position, "somebody writes to {database} on the primary");
    assert_eq!(replica.export(database, &b), position, "{database} moved on the replica");
    compare_files(&a, &b, database);
    assert_eq!(
        checksum_of(&a),
        position.split_once('/').map(|(_, checksum)| checksum.to_owned()).unwrap_or_default(),
        "checksum of the position and of the pages of {database}"
    );
    for (host, export) in [(primary, &a), (replica, &b)] {
        compare_with_mount(host, database, export, &dir.path().join("backup.db"));
    }
    integrity_check(&a, database);
    position
}

/// Proves that no host had a transaction that the others do not have.
#[track_caller]
pub fn assert_nothing_diverged(hosts: &[&Host]) {
    for host in hosts {
        let kept = std::fs::read_dir(host.data().join("diverged")).expect("it is there").count();
        assert_eq!(kept, 0, "{} had transactions of its own", host.name());
    }
}

/// Proves that what SQLite reads through a host's mount is what the host exports, and is sound.
#[track_caller]
pub fn assert_sane(host: &Host, database: &str) -> String {
    take_up_what_the_dead_left(host, database);
    let dir = tempfile::tempdir().expect("a directory");
    let export = dir.path().join("export.db");
    let position = host.export(database, &export);
    compare_with_mount(host, database, &export, &dir.path().join("backup.db"));
    integrity_check(&export, database);
    position
}

/// A writer that was killed after its commit was in the WAL, and before it was published, has left it to the next
/// connection: if that is the only one, it publishes the commit.
#[track_caller]
fn take_up_what_the_dead_left(host: &Host, database: &str) {
    sqlite3(&host.path(database), "SELECT count(*) FROM sqlite_schema");
}

/// `PRAGMA integrity_check` of a file that nobody else uses.
#[track_caller]
pub fn integrity_check(file: &Path, what: &str) {
    // Immutable: nothing is created beside it, and nothing is looked for there.
    let uri = format!("file:{}?immutable=1", file.display());
    let result = sqlite3(Path::new(&uri), "PRAGMA integrity_check");
    assert_eq!(result, "ok", "integrity_check of {what}");
}

#[track_caller]
fn compare_with_mount(host: &Host, database: &str, export: &Path, backup: &Path) {
    sqlite3(&host.path(database), &format!(".backup '{}'", backup.display()));
    let (mut seen, mut exported) = (read(backup), read(export));
    for page_1 in [&mut seen, &mut exported] {
        for range in SET_BY_BACKUP {
            page_1[range].fill(0);
        }
    }
    fs::remove_file(backup).expect("the backup was made");
    let what = format!("{database}: what SQLite sees and what {} exports", host.name());
    compare(&seen, &exported, &what);
}

/// Panics with the first pages that differ.
#[track_caller]
pub fn compare_files(a: &Path, b: &Path, what: &str) {
    compare(&read(a), &read(b), what);
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
}

#[track_caller]
fn compare(a: &[u8], b: &[u8], what: &str) {
    if a == b {
        return;
    }
    let size = page_size(a) as usize;
    let pages = |bytes: &[u8]| bytes.len() / size;
    let differing: Vec<usize> = a
        .chunks(size)
        .zip(b.chunks(size))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(i, _)| i + 1)
        .collect();
    let first: Vec<_> = differing.iter().take(20).collect();
    panic!(
        "{what} differ: {} and {} pages of {size} bytes, {} of them differ: {first:?}",
        pages(a),
        pages(b),
        differing.len()
    );
}

fn page_size(database: &[u8]) -> u32 {
    match database.get(16..18) {
        Some(&[0, 1]) => 65_536,
        Some(&[high, low]) => u32::from(high) << 8 | u32::from(low),
        _ => 512,
    }
    .max(512)
}

/// The checksum of a position, from the pages of a file that nobody writes to.
pub fn checksum_of(file: &Path) -> String {
    let mut database = File::open(file).unwrap_or_else(|e| panic!("cannot open {}: {e}", file.display()));
    let mut header = [0; 100];
    database.read_exact_at(&mut header, 0).expect("a database has a header");
    let mut page = vec![0; page_size(&header) as usize];
    let lock_page = ltx::lock_page(page_size(&header));
    let pages = database.metadata().expect("the file is open").len() / page.len() as u64;
    let mut rolling = ltx::Checksum::EMPTY;
    for pgno in 1..=u32::try_from(pages).expect("page numbers have 32 bits") {
        database.read_exact(&mut page).expect("the file is as long as it was");
        if pgno != lock_page {
            rolling = rolling.xor(ltx::page_checksum(pgno, &page));
        }
    }
    rolling.to_string()
}
