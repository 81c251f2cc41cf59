//! Fixtures: a primary written by SQLite, a replica written by the [`Applier`], readers in other processes.

mod concurrent;
mod faults;
mod kill;
mod random;
mod rollback_mode;
mod wal_mode;

use super::*;
use ltx::{Checksum, Encoder, Header, Txid, lock_page, page_checksum};
use rusqlite::Connection;
use sqlite_file::wal::{CommittedWal, FRAME_HEADER_BYTES, frame_offset};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use tempfile::TempDir;

/// Long enough that only a bug reaches it.
pub const LONG: Duration = Duration::from_secs(20);

/// What a reader of the database would see, page after page.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Image {
    pub page_size: u32,
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pages of {}", self.page_count(), self.page_size)
    }
}

impl Image {
    /// The file at `path` with the committed frames of its WAL over it.
    pub fn read(path: &Path) -> Self {
        let Ok(mut bytes) = std::fs::read(path) else { return Image::default() };
        let Ok(header) = DatabaseHeader::parse(&bytes) else {
            assert!(bytes.is_empty(), "no database header");
            return Image::default();
        };
        let mut page_size = header.page_size;
        if let Ok(wal) = File::open(format!("{}-wal", path.display()))
            && let Some(committed) = CommittedWal::read(&wal).unwrap()
            && committed.end.frames > 0
        {
            use std::os::unix::fs::FileExt;
            page_size = committed.header.page_size;
            let size = page_size as usize;
            bytes.resize(committed.end.commit as usize * size, 0);
            for (pgno, frame) in committed.newest {
                let at = (pgno as usize - 1) * size;
                let from = frame_offset(frame, page_size) + FRAME_HEADER_BYTES as u64;
                wal.read_exact_at(&mut bytes[at..at + size], from).unwrap();
            }
        }
        Image { page_size, bytes }
    }

    pub fn page_count(&self) -> u32 {
        if self.page_size == 0 { 0 } else { (self.bytes.len() / self.page_size as usize) as u32 }
    }

    pub fn shape(&self) -> DatabaseShape {
        let wal_mode = is_wal(&self.bytes);
        DatabaseShape { page_size: self.page_size, page_count: self.page_count(), wal_mode }
    }

    fn page(&self, pgno: u32) -> Option<&[u8]> {
        let size = self.page_size as usize;
        let at = (pgno as usize - 1) * size;
        self.bytes.get(at..at + size)
    }

    fn checksum(&self) -> Checksum {
        (1..=self.page_count())
            .filter(|pgno| *pgno != lock_page(self.page_size))
            .fold(Checksum::EMPTY, |sum, pgno| sum.xor(page_checksum(pgno, self.page(pgno).unwrap())))
    }

    /// The transaction from `before` to `self` as an LTX file.
    pub fn transaction_after(&self, before: &Image, txid: u64) -> Vec<u8> {
        let header = Header {
            flags: 0,
            page_size: self.page_size.max(512),
            commit: self.page_count(),
            min_txid: Txid(txid),
            max_txid: Txid(txid),
            timestamp_ms: 0,
            pre_apply: if txid == 1 { Checksum(0) } else { before.checksum() },
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: 1,
            epoch: 1,
            owner: None,
        };
        let mut encoder = Encoder::new(Vec::new(), header).unwrap();
        for pgno in (1..=self.page_count()).filter(|p| *p != lock_page(self.page_size)) {
            let page = self.page(pgno).unwrap();
            if txid == 1 || before.page_size != self.page_size || before.page(pgno) != Some(page) {
                encoder.encode_page(pgno, page).unwrap();
            }
        }
        encoder.finish(self.checksum()).unwrap().1
    }
}

/// A database that SQLite writes, and its transactions.
pub struct Primary {
    _dir: TempDir,
    pub path: PathBuf,
    pub db: Connection,
    pub image: Image,
    txid: u64,
}

impl Primary {
    pub fn new(page_size: u32, mode: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("primary.db");
        let db = Connection::open(&path).unwrap();
        db.pragma_update(None, "page_size", page_size).unwrap();
        db.pragma_update(None, "journal_mode", mode).unwrap();
        db.execute_batch("pragma synchronous=off; pragma cache_size=20;").unwrap();
        Primary { _dir: dir, path, db, image: Image::default(), txid: 0 }
    }

    /// What has changed since the last call, as a transaction; `None` if nothing has.
    pub fn capture(&mut self) -> Option<Vec<u8>> {
        let image = Image::read(&self.path);
        if image == self.image {
            return None;
        }
        self.txid += 1;
        let file = image.transaction_after(&self.image, self.txid);
        self.image = image;
        Some(file)
    }

    pub fn exec(&mut self, sql: &str) -> Vec<u8> {
        self.db.execute_batch(sql).unwrap();
        self.capture().expect("the statement changes the database")
    }

    /// Inserts rows of random bytes as one transaction.
    pub fn insert(&mut self, rows: u32, bytes: u32) -> Vec<u8> {
        self.exec(&insert_sql(rows, bytes))
    }
}

pub fn insert_sql(rows: u32, bytes: u32) -> String {
    format!(
        "with recursive n(i) as (select 1 union all select i+1 from n where i<{rows})
         insert into t(b) select randomblob({bytes}) from n;"
    )
}

pub const CREATE: &str = "create table t(a integer primary key, b);";

/// A database that the applier writes.
pub struct Replica {
    pub dir: TempDir,
    pub path: PathBuf,
    pub applier: Applier,
    pub shape: DatabaseShape,
}

impl Replica {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("replica.db");
        let applier = Applier::new(path.clone(), DatabaseName::new("replica.db").unwrap());
        Replica { dir, path, applier, shape: DatabaseShape::default() }
    }

    pub fn try_apply(&mut self, files: &[Vec<u8>], bound: Duration) -> Result<(), ApplyError> {
        let mut source = LtxTransactions::new(files.iter().map(|f| &f[..]));
        self.shape = self.applier.apply(self.shape, &mut source, bound)?;
        Ok(())
    }

    pub fn apply(&mut self, files: &[Vec<u8>]) {
        self.try_apply(files, LONG).unwrap();
    }

    pub fn file(&self, suffix: &str) -> PathBuf {
        PathBuf::from(format!("{}{suffix}", self.path.display()))
    }

    /// That the replica is page for page the primary, and the shape says so.
    #[track_caller]
    pub fn assert_equals(&self, image: &Image) {
        let ours = Image::read(&self.path);
        assert_eq!(self.shape, image.shape());
        assert!(ours == *image, "replica {ours:?}, primary {image:?}");
    }

    /// That after letting go the file alone is byte for byte the primary, and SQLite finds nothing wrong with it.
    #[track_caller]
    pub fn assert_file_equals(&mut self, image: &Image) {
        assert!(self.applier.detach().unwrap(), "somebody is still connected");
        assert!(!self.file("-wal").exists() && !self.file("-journal").exists());
        assert!(std::fs::read(&self.path).unwrap() == image.bytes);
        assert_eq!(Sqlite::open(&self.path).ask("pragma integrity_check;"), "ok");
    }
}

/// The unmodified `sqlite3` in a process of its own.
pub struct Sqlite {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Sqlite {
    pub fn open(path: &Path) -> Self {
        let mut child = Command::new("sqlite3")
            .arg("-batch")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the sqlite3 program is installed");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Sqlite { child, input, output }
    }

    /// Runs SQL and returns what it prints.
    pub fn ask(&mut self, sql: &str) -> String {
        writeln!(self.input, "{sql}\n.print <end>").unwrap();
        self.input.flush().unwrap();
        let mut answer = String::new();
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "sqlite3 ended");
            if line == "<end>\n" {
                return answer.trim_end().to_owned();
            }
            answer.push_str(&line);
        }
    }

    /// A digest of all rows, so that two states differ.
    pub fn digest(&mut self) -> String {
        self.ask(DIGEST)
    }

    /// Kills the process, as a crash of an application would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        // Closes the database in an orderly way; after `kill` there is nobody to tell.
        let _ = writeln!(self.input, ".quit");
        let _ = self.child.wait();
    }
}

pub const DIGEST: &str = "select count(*), total(a), total(length(b)), total(unicode(hex(b)) * a) from t;";

pub fn digest_of(db: &Connection) -> String {
    db.query_row(DIGEST, [], |row| {
        let float = |i| row.get::<_, f64>(i).map(|v| format!("{v:.1}"));
        Ok(format!("{}|{}|{}|{}", row.get::<_, i64>(0)?, float(1)?, float(2)?, float(3)?))
    })
    .unwrap()
}
