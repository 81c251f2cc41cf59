//! `litefs diverged`: what this host had alone when it took another host's history. Reads files only, so it needs no
//! agent.

use super::export::{Copy, NotFinished, cannot_write};
use super::failure::{self, Failure};
use super::ltx::{shown, table, timestamp};
use super::printable;
use crate::DatabaseName;
use crate::config::{Config, Source};
use crate::database::diverged::{COPY, COPY_WAL, Kept};
use crate::status::database_file;
use clap::Subcommand;
use indicatif::BinaryBytes;
use ltx::{Decoder, Header};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};

/// What to do with what is kept.
#[derive(Debug, Subcommand)]
pub enum DivergedCommand {
    /// List what is kept, with position, epoch, transactions and pages
    ///
    /// Exits with 65 if something of it is damaged; it is listed too.
    List {
        /// Databases to list [default: all]
        #[arg(value_parser = super::database_name, value_name = "DATABASE")]
        databases: Vec<DatabaseName>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show what is kept of a database, transaction by transaction
    Show {
        /// Database, as `litefs diverged list` shows it
        #[arg(value_parser = super::database_name)]
        name: DatabaseName,
        /// Position, or its beginning without leading zeros [default: all that are kept]
        #[arg(long, value_name = "POSITION")]
        at: Option<String>,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Write the database as it was on this host, or the transactions that only this host had
    ///
    /// The copy is checked against its position, and takes the place of PATH when it is complete. It is an ordinary
    /// SQLite file; to see which rows differ, compare it with an export of the database (`sqldiff`).
    Export {
        /// Database, as `litefs diverged list` shows it
        #[arg(value_parser = super::database_name)]
        name: DatabaseName,
        /// File to write, or with --ltx the directory
        path: PathBuf,
        /// Position, or its beginning without leading zeros [default: the only one that is kept]
        #[arg(long, value_name = "POSITION")]
        at: Option<String>,
        /// Write the transactions, as LTX files, instead of the database
        #[arg(long)]
        ltx: bool,
    },
}

/// Runs the command and prints to `out`.
pub fn run(command: DivergedCommand, source: &Source, out: &mut dyn Write) -> Result<u8, Failure> {
    let config = Config::load(source).map_err(|error| Failure::new(failure::CONFIG, error))?;
    let dir = config.data.dir.join("diverged");
    match command {
        DivergedCommand::List { databases, json } => {
            let found = find(&dir, |name| databases.is_empty() || databases.contains(name))?;
            print_list(&found, json, out)?;
            Ok(if found.iter().any(|one| one.damage.is_some()) { failure::DATA } else { 0 })
        }
        DivergedCommand::Show { name, at, json } => {
            let found = of_database(&dir, &name, at.as_deref())?;
            print_details(&found, json, out)?;
            Ok(if found.iter().any(|one| one.damage.is_some()) { failure::DATA } else { 0 })
        }
        DivergedCommand::Export { name, path, at, ltx } => {
            let mut found = of_database(&dir, &name, at.as_deref())?;
            let one = found.pop().filter(|_| found.is_empty());
            let Some(one) = one else {
                return Err(Failure::new(
                    failure::USAGE,
                    format_args!(
                        "more than one state of {name} is kept: choose one of `litefs diverged list {name}` with --at"
                    ),
                ));
            };
            if ltx { export_transactions(&one, &path, out) } else { export_copy(&one, &path, out) }
        }
    }
}

/// One state of a database that is kept.
#[derive(Serialize)]
struct Diverged {
    database: String,
    txid: String,
    checksum: String,
    /// Epochs of its transactions, the newest one; nothing without transactions.
    epoch: Option<u64>,
    /// Transactions that only this host had, as far as its log still had them.
    transactions: u64,
    /// Pages that they changed.
    pages: usize,
    /// Last transaction that the histories share, position and epoch of the one that took its place, and when.
    common_txid: Option<String>,
    upstream_position: Option<String>,
    upstream_epoch: Option<u64>,
    kept_unix_ms: Option<i64>,
    /// What there is of the database itself.
    copy: CopyKind,
    copy_bytes: u64,
    /// Why the database had been set aside.
    set_aside: Option<String>,
    directory: PathBuf,
    files: Vec<Transactions>,
    /// What is wrong with it.
    damage: Option<String>,
}

#[derive(Serialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum CopyKind {
    /// A database file at the position.
    Consistent,
    /// Files as they were when the database was set aside.
    AsFound,
    /// None: it had been removed.
    None,
}

/// A file of transactions.
#[derive(Serialize)]
struct Transactions {
    min_txid: String,
    max_txid: String,
    epoch: u64,
    timestamp_ms: i64,
    pages: usize,
    commit: u32,
    path: PathBuf,
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> Failure + '_ {
    move |error| match error.kind() {
        io::ErrorKind::PermissionDenied => Failure::file(
            failure::NO_PERMISSION,
            path,
            format_args!("cannot read it: {error}; run the command as root or as the user of the agent"),
        ),
        _ => Failure::file(failure::IO, path, format_args!("cannot read it: {error}")),
    }
}

/// Names below a directory in order; none where there is no directory.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let list = match dir.read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        list => list.map_err(unreadable(dir))?,
    };
    let mut paths = Vec::new();
    for entry in list {
        paths.push(entry.map_err(unreadable(dir))?.path());
    }
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn find(dir: &Path, wanted: impl Fn(&DatabaseName) -> bool) -> Result<Vec<Diverged>, Failure> {
    let mut found = Vec::new();
    for of_database in entries(dir)? {
        let Ok(name) = DatabaseName::from_escaped(file_name(&of_database)) else { continue };
        if !wanted(&name) {
            continue;
        }
        for directory in entries(&of_database)? {
            let position = file_name(&directory).replace('-', "/");
            if position.parse::<ltx::Pos>().is_ok() {
                found.push(look(&name, &position, directory)?);
            }
        }
    }
    Ok(found)
}

fn of_database(dir: &Path, name: &DatabaseName, at: Option<&str>) -> Result<Vec<Diverged>, Failure> {
    let mut found = find(dir, |other| other == name)?;
    if let Some(at) = at {
        let wanted = at.replace('-', "/");
        let wanted = wanted.trim_start_matches('0');
        found.retain(|one| one.position().trim_start_matches('0').starts_with(wanted));
    }
    if found.is_empty() {
        let at = at.map(|at| format!(" at {at}")).unwrap_or_default();
        return Err(Failure::new(
            failure::NO_INPUT,
            format_args!("nothing of {name}{at} is kept in {}; see `litefs diverged list`", dir.display()),
        ));
    }
    Ok(found)
}

/// Reads all that is kept of one state.
fn look(name: &DatabaseName, position: &str, directory: PathBuf) -> Result<Diverged, Failure> {
    let (txid, checksum) = position.split_once('/').unwrap_or_default();
    let mut one = Diverged {
        database: name.to_string(),
        txid: txid.to_owned(),
        checksum: checksum.to_owned(),
        epoch: None,
        transactions: 0,
        pages: 0,
        common_txid: None,
        upstream_position: None,
        upstream_epoch: None,
        kept_unix_ms: None,
        copy: CopyKind::None,
        copy_bytes: 0,
        set_aside: None,
        directory,
        files: Vec::new(),
        damage: None,
    };
    match Kept::read(&one.directory) {
        Ok(Some(kept)) => {
            one.common_txid = kept.common_txid;
            one.upstream_position = Some(kept.upstream_position);
            one.upstream_epoch = Some(kept.upstream_epoch);
            one.kept_unix_ms = Some(kept.kept_unix_ms);
            one.set_aside = kept.set_aside;
        }
        Ok(None) => one.damaged(
            "it is incomplete: the agent stopped while it kept it, and does so again when it follows".into(),
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(unreadable(&one.directory)(error));
        }
        Err(error) => one.damaged(format!("kept.json: {error}")),
    }
    let mut pages = BTreeSet::new();
    for path in entries(&one.directory)? {
        if path.extension().is_none_or(|extension| extension != "ltx") {
            continue;
        }
        match read_transactions(&path, &mut pages) {
            Ok((header, changed)) => {
                one.epoch = one.epoch.max(Some(header.epoch));
                one.transactions += header.max_txid.0 - header.min_txid.0 + 1;
                one.files.push(Transactions {
                    min_txid: header.min_txid.to_string(),
                    max_txid: header.max_txid.to_string(),
                    epoch: header.epoch,
                    timestamp_ms: header.timestamp_ms,
                    pages: changed,
                    commit: header.commit,
                    path,
                });
            }
            Err(ltx::Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                return Err(unreadable(&path)(source));
            }
            Err(error) => {
                one.damaged(format!("{}: {:#}", file_name(&path), anyhow::Error::new(error)));
            }
        }
    }
    one.pages = pages.len();
    if let Ok(metadata) = one.directory.join(COPY).metadata() {
        one.copy_bytes = metadata.len();
        let found = one.set_aside.is_some() || one.directory.join(COPY_WAL).exists();
        one.copy = if found { CopyKind::AsFound } else { CopyKind::Consistent };
    }
    Ok(one)
}

/// Reads and checks a file of transactions; says how many pages it has.
fn read_transactions(path: &Path, pages: &mut BTreeSet<u32>) -> Result<(Header, usize), ltx::Error> {
    let file = File::open(path).map_err(|source| ltx::Error::Io { offset: 0, source })?;
    let mut decoder = Decoder::new(BufReader::with_capacity(64 << 10, file))?;
    let header = decoder.header().clone();
    let (mut page, mut count) = (Vec::new(), 0);
    while let Some(pgno) = decoder.next_page(&mut page)? {
        pages.insert(pgno);
        count += 1;
    }
    decoder.finish()?;
    Ok((header, count))
}

impl Diverged {
    fn position(&self) -> String {
        format!("{}/{}", self.txid, self.checksum)
    }

    /// The first damage is the one that is told.
    fn damaged(&mut self, what: String) {
        self.damage.get_or_insert(what);
    }
}

fn json(found: &[Diverged], out: &mut dyn Write) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(found).map_err(|error| Failure::new(failure::SOFTWARE, error))?;
    writeln!(out, "{text}").map_err(failure::stdout)
}

fn or_none(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| printable(&value.to_string()))
}

fn print_list(found: &[Diverged], as_json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    if as_json {
        return json(found, out);
    }
    let header = ["DATABASE", "POSITION", "EPOCH", "TRANSACTIONS", "PAGES", "COPY", "KEPT", "DIRECTORY"];
    let mut rows = table(&header, &[2, 3, 4]);
    for one in found {
        rows.add_row([
            printable(&one.database),
            one.position(),
            or_none(one.epoch),
            one.transactions.to_string(),
            one.pages.to_string(),
            match (&one.damage, one.copy) {
                (Some(_), _) => "damaged".to_owned(),
                (None, CopyKind::Consistent) => BinaryBytes(one.copy_bytes).to_string(),
                (None, CopyKind::AsFound) => "as found".to_owned(),
                (None, CopyKind::None) => "none".to_owned(),
            },
            or_none(one.kept_unix_ms.map(timestamp)),
            shown(&one.directory),
        ]);
    }
    writeln!(out, "{}", rows.trim_fmt()).map_err(failure::stdout)
}

fn print_details(found: &[Diverged], as_json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    if as_json {
        return json(found, out);
    }
    let mut text = String::new();
    for one in found {
        let copy = match one.copy {
            CopyKind::Consistent => format!("{}, as of the position", BinaryBytes(one.copy_bytes)),
            CopyKind::AsFound => format!("as it was found: {}", or_none(one.set_aside.as_deref())),
            CopyKind::None => "none: the database had been removed".to_owned(),
        };
        let upstream = match one.upstream_epoch {
            Some(epoch) => format!("{}, epoch {epoch}", or_none(one.upstream_position.as_deref())),
            None => "-".to_owned(),
        };
        let lines = [
            ("database", printable(&one.database)),
            ("position", one.position()),
            ("common up to", or_none(one.common_txid.as_deref())),
            ("replaced by", upstream),
            ("kept", or_none(one.kept_unix_ms.map(timestamp))),
            ("transactions", one.transactions.to_string()),
            ("pages", one.pages.to_string()),
            ("copy", copy),
            ("directory", shown(&one.directory)),
        ];
        for (label, value) in lines {
            text.push_str(&format!("{label:<13} {value}\n"));
        }
        if let Some(damage) = &one.damage {
            text.push_str(&format!("DAMAGED       {}\n", printable(damage)));
        }
        let mut rows = table(&["TXID", "EPOCH", "TIMESTAMP", "PAGES", "COMMIT"], &[1, 3, 4]);
        for file in &one.files {
            let range = if file.min_txid == file.max_txid {
                file.min_txid.clone()
            } else {
                format!("{}-{}", file.min_txid, file.max_txid)
            };
            rows.add_row([
                range,
                file.epoch.to_string(),
                timestamp(file.timestamp_ms),
                file.pages.to_string(),
                file.commit.to_string(),
            ]);
        }
        if !one.files.is_empty() {
            text.push_str(&format!("\n{}\n", rows.trim_fmt()));
        }
        text.push('\n');
    }
    writeln!(out, "{}", text.trim_end()).map_err(failure::stdout)
}

fn export_copy(one: &Diverged, path: &Path, out: &mut dyn Write) -> Result<u8, Failure> {
    let database = printable(&one.database);
    let no_copy = |why: String| {
        Failure::new(
            failure::DATA,
            format_args!("there is no consistent copy of {database}: {why}; --ltx writes its transactions"),
        )
    };
    match one.copy {
        CopyKind::Consistent => {}
        CopyKind::AsFound => {
            let why = one.set_aside.as_deref().unwrap_or("it has a WAL beside it");
            let found = shown(&one.directory.join(COPY));
            return Err(no_copy(format!("{}, and {found} is as it was found", printable(why))));
        }
        CopyKind::None => return Err(no_copy("it had been removed".to_owned())),
    }
    let from = one.directory.join(COPY);
    let damaged = |what: String| Failure::file(failure::DATA, &from, format_args!("is damaged: {what}"));
    let mut source = File::open(&from).map_err(unreadable(&from))?;
    database_file::shape(&source).map_err(|error| damaged(error.to_string()))?;
    let mut copy = Copy::begin(path)?;
    let size = io::copy(&mut source, copy.file()).map_err(|error| cannot_write(path, &error))?;
    copy.finish(size, &one.position()).map_err(|failed| match failed {
        NotFinished::Damaged(what) => damaged(what),
        NotFinished::Failed(failure) => failure,
    })?;
    writeln!(out, "exported {database} at {}, {size} bytes, to {}", one.position(), path.display())
        .map_err(failure::stdout)?;
    Ok(0)
}

fn export_transactions(one: &Diverged, dir: &Path, out: &mut dyn Write) -> Result<u8, Failure> {
    if let Some(damage) = &one.damage {
        return Err(Failure::file(failure::DATA, &one.directory, damage));
    }
    if one.files.is_empty() {
        return Err(Failure::file(failure::DATA, &one.directory, "there are no transactions in it"));
    }
    std::fs::create_dir_all(dir).map_err(|error| cannot_write(dir, &error))?;
    for file in &one.files {
        let to = dir.join(file_name(&file.path));
        let failed = |error: io::Error| cannot_write(&to, &error);
        let mut source = File::open(&file.path).map_err(unreadable(&file.path))?;
        let mut copy = File::create_new(&to).map_err(failed)?;
        io::copy(&mut source, &mut copy).and_then(|_| copy.sync_all()).map_err(failed)?;
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| cannot_write(dir, &error))?;
    let (count, database) = (one.transactions, printable(&one.database));
    let word = if count == 1 { "transaction" } else { "transactions" };
    writeln!(out, "exported {count} {word} of {database} to {}", dir.display()).map_err(failure::stdout)?;
    Ok(0)
}
