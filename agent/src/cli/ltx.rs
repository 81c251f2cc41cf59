//! `litefs ltx`: look at files of transactions, of any version of LiteFS and Litestream, and at the records of the commit log,
//! which hold the same.

use crate::log::{Inspected, PayloadPlace, RecordInfo, inspect_segment, is_segment_name};
use ::ltx::{Checksum, Decoder, Format, Header, Trailer, page_checksum};
use anyhow::{Context, bail};
use clap::Subcommand;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// Bytes read from a file at a time.
const READ_SIZE: usize = 64 << 10;

/// What to do with files of transactions.
#[derive(Debug, Subcommand)]
pub enum LtxCommand {
    /// List files with their transactions, pages and checksums
    ///
    /// Every file is read and checked in whole. Damaged ones are listed too, and make the command fail. A segment of the
    /// commit log is listed by its records, as SEGMENT#RECORD, also while its agent writes it.
    List {
        /// LTX files, segments of the commit log (*.log), or directories: all such files below them
        #[arg(required = true)]
        path: Vec<PathBuf>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show header, pages and trailer of a file, or the content of one page
    Dump {
        /// LTX file, or a record of the commit log as `list` names it: SEGMENT#RECORD
        path: PathBuf,
        /// Show the content of this page as hex
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        page: Option<u32>,
    },
    /// Check files: structure, order of pages, checksums, and that nothing follows
    ///
    /// Fails if one is damaged, and says which, where and why. A file that is named like LiteFS names them, by its first
    /// and last transaction, must hold just these; a record of the commit log what it says of itself.
    Verify {
        /// LTX files, segments of the commit log (*.log), or directories: all such files below them
        #[arg(required = true)]
        path: Vec<PathBuf>,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command and prints to `out`.
///
/// # Errors
/// If a file or directory cannot be opened, a file is damaged, or `out` cannot be written (then the root cause is the
/// [`io::Error`]).
pub fn run(command: LtxCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        LtxCommand::List { path, json } => list(&path, json, out),
        LtxCommand::Dump { path, page: None } => dump(&path, out),
        LtxCommand::Dump { path, page: Some(pgno) } => dump_page(&path, pgno, out),
        LtxCommand::Verify { path, json } => verify(&path, json, out),
    }
}

/// A file, or a record in memory.
trait ReadSeek: Read + Seek {}

impl<T: Read + Seek> ReadSeek for T {}

type Input = BufReader<Box<dyn ReadSeek>>;

/// What is known of a file, or of a record of the commit log, after reading all of it.
struct Report {
    /// Of a record: its segment, `#`, and where it starts in the log.
    path: PathBuf,
    /// What the commit log says of it.
    record: Option<RecordInfo>,
    /// Bytes the file has; those read where it is damaged.
    size: u64,
    header: Option<(Header, Format)>,
    /// Pages read.
    pages: u32,
    outcome: Result<Sums, Damage>,
}

/// What is known at the end of a good one.
struct Sums {
    post_apply: Checksum,
    /// Of the file; a record may have its payload in another one.
    file_checksum: Option<u64>,
}

impl From<Trailer> for Sums {
    fn from(trailer: Trailer) -> Self {
        Sums { post_apply: trailer.post_apply, file_checksum: Some(trailer.file_checksum) }
    }
}

/// Why a file is not a good LTX file.
struct Damage {
    offset: Option<u64>,
    problem: String,
}

/// A file in JSON. Transactions and checksums are 16 hex digits, as everywhere.
#[derive(Serialize)]
struct JsonFile {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    database: Option<String>,
    ok: bool,
    size: u64,
    #[serde(flatten)]
    header: Option<JsonHeader>,
    pages: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    post_apply: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_checksum: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct JsonHeader {
    format: String,
    min_txid: String,
    max_txid: String,
    page_size: u32,
    commit: u32,
    timestamp: String,
    timestamp_ms: i64,
    pre_apply: String,
    node_id: String,
    epoch: u64,
}

impl Report {
    fn epoch(&self) -> Option<u64> {
        let told = self.record.as_ref().map(|record| record.epoch.0);
        told.or(self.header.as_ref().map(|(header, _)| header.epoch))
    }

    /// The file that has the pages of a record.
    fn external_file(&self) -> Option<&str> {
        external_file(self.record.as_ref()?)
    }
}

fn external_file(record: &RecordInfo) -> Option<&str> {
    match &record.payload {
        PayloadPlace::External { file_name, .. } => Some(file_name),
        PayloadPlace::Inline { .. } => None,
    }
}

impl From<ltx::Error> for Damage {
    fn from(error: ltx::Error) -> Self {
        Damage { offset: error.offset(), problem: format!("{:#}", anyhow::Error::new(error)) }
    }
}

impl From<&Report> for JsonFile {
    fn from(report: &Report) -> Self {
        let (sums, damage) = match &report.outcome {
            Ok(sums) => (Some(sums), None),
            Err(damage) => (None, Some(damage)),
        };
        JsonFile {
            path: shown(&report.path),
            database: report.record.as_ref().map(|record| record.database.to_string()),
            ok: damage.is_none(),
            size: report.size,
            header: report.header.as_ref().map(|(header, format)| JsonHeader {
                format: format.to_string(),
                min_txid: header.min_txid.to_string(),
                max_txid: header.max_txid.to_string(),
                page_size: header.page_size,
                commit: header.commit,
                timestamp: timestamp(header.timestamp_ms),
                timestamp_ms: header.timestamp_ms,
                pre_apply: header.pre_apply.to_string(),
                node_id: format!("{:016x}", header.node_id),
                epoch: report.epoch().unwrap_or_default(),
            }),
            pages: report.pages,
            post_apply: sums.map(|sums| sums.post_apply.to_string()),
            file_checksum: sums.and_then(|sums| sums.file_checksum).map(|sum| format!("{sum:016x}")),
            offset: damage.and_then(|damage| damage.offset),
            error: damage.map(|damage| damage.problem.clone()),
        }
    }
}

fn list(paths: &[PathBuf], json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let reports = read_all(paths)?;
    if json {
        print_json(&reports, out)?;
    } else {
        let header = [
            "FILE",
            "DATABASE",
            "EPOCH",
            "FORMAT",
            "TXID",
            "PAGES",
            "COMMIT",
            "PAGE SIZE",
            "TIMESTAMP",
            "PRE",
            "POST",
            "SIZE",
        ];
        let mut rows = table(&header, &[2, 5, 6, 7, 11]);
        for report in &reports {
            rows.add_row(list_row(report));
        }
        writeln!(out, "{}", rows.trim_fmt())?;
    }
    fail_if_damaged(&reports)
}

fn list_row(report: &Report) -> [String; 12] {
    let none = || "-".to_owned();
    let mut row = [(); 12].map(|()| none());
    row[0] = shown(&report.path);
    if let Some(epoch) = report.epoch() {
        row[2] = epoch.to_string();
    }
    if let Some(record) = &report.record {
        row[1] = record.database.to_string();
    }
    row[3] = match (&report.header, report.external_file()) {
        (Some((_, format)), _) => format.to_string(),
        (None, Some(file_name)) => format!("in {file_name}"),
        (None, None) => none(),
    };
    let of_header = |h: &Header| (h.min_txid, h.max_txid, h.commit, h.page_size, h.timestamp_ms, h.pre_apply);
    let of_record =
        |r: &RecordInfo| (r.min_txid, r.max_txid, r.commit, r.page_size, r.timestamp_ms, r.pre_apply);
    let told = report.header.as_ref().map(|(header, _)| of_header(header));
    if let Some((min, max, commit, page_size, timestamp_ms, pre_apply)) =
        told.or(report.record.as_ref().map(of_record))
    {
        row[4] = format!("{min}-{max}");
        row[6] = commit.to_string();
        row[7] = page_size.to_string();
        row[8] = timestamp(timestamp_ms);
        row[9] = pre_apply.to_string();
    }
    if report.header.is_some() || report.record.is_none() {
        row[5] = report.pages.to_string();
    }
    row[10] = match &report.outcome {
        Ok(sums) => sums.post_apply.to_string(),
        Err(_) => "damaged".to_owned(),
    };
    row[11] = report.size.to_string();
    row
}

fn verify(paths: &[PathBuf], json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut reports = read_all(paths)?;
    for report in &mut reports {
        check_name(report);
    }
    if json {
        print_json(&reports, out)?;
    } else {
        for report in &reports {
            let path = shown(&report.path);
            match &report.outcome {
                Ok(sums) => {
                    let pages = match (report.external_file(), report.pages) {
                        (Some(file_name), _) => format!("pages in {file_name}"),
                        (None, 1) => "1 page".to_owned(),
                        (None, pages) => format!("{pages} pages"),
                    };
                    writeln!(out, "{path}: ok, {pages}, {}", sums.post_apply)?;
                }
                Err(damage) => writeln!(out, "{path}: DAMAGED: {}", damage.problem)?,
            }
        }
    }
    fail_if_damaged(&reports)
}

/// A file named by its transactions, as LiteFS does, must hold these.
fn check_name(report: &mut Report) {
    let Some((header, _)) = &report.header else { return };
    let stem = report.path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let Some((min, max)) = stem.split_once('-') else { return };
    let (Ok(min), Ok(max)) = (min.parse::<ltx::Txid>(), max.parse::<ltx::Txid>()) else { return };
    if report.outcome.is_ok() && (min, max) != (header.min_txid, header.max_txid) {
        let problem = format!(
            "it is named after transactions {min} to {max} but holds {} to {}",
            header.min_txid, header.max_txid
        );
        report.outcome = Err(Damage { offset: Some(16), problem });
    }
}

fn print_json(reports: &[Report], out: &mut dyn Write) -> io::Result<()> {
    let files: Vec<JsonFile> = reports.iter().map(JsonFile::from).collect();
    serde_json::to_writer_pretty(&mut *out, &files)?;
    writeln!(out)
}

fn fail_if_damaged(reports: &[Report]) -> anyhow::Result<()> {
    let mut damaged = reports.iter().filter_map(|report| Some((report, report.outcome.as_ref().err()?)));
    let Some((first, damage)) = damaged.next() else { return Ok(()) };
    let others = damaged.count();
    let path = shown(&first.path);
    if others == 0 {
        bail!("{path}: {}", damage.problem);
    }
    bail!("{path}: {} (and {others} more of {} files are damaged)", damage.problem, reports.len());
}

/// Reads all files that `paths` mean.
fn read_all(paths: &[PathBuf]) -> anyhow::Result<Vec<Report>> {
    let mut page = Vec::new();
    let mut reports = Vec::new();
    for path in paths {
        for file in files_of(path)? {
            match inspect_segment(&file)? {
                Some(found) => {
                    reports.extend(found.into_iter().map(|item| read_record(&file, item, &mut page)))
                }
                None => reports.push(read_file(file, &mut page)?),
            }
        }
    }
    Ok(reports)
}

/// Name of a record of the commit log.
fn record_path(segment: &Path, lsn: impl std::fmt::Display) -> PathBuf {
    let mut name = segment.as_os_str().to_owned();
    name.push(format!("#{lsn}"));
    PathBuf::from(name)
}

/// Reads and checks a record: its payload must be what the log says of it.
fn read_record(segment: &Path, item: Inspected, page: &mut Vec<u8>) -> Report {
    let (info, payload) = match item {
        Inspected::Record { info, payload } => (info, payload),
        Inspected::Damaged { lsn, len, database, reason } => {
            let of = database.map(|database| format!(" of {database}")).unwrap_or_default();
            let damage = Damage { offset: None, problem: format!("no record{of} can be read: {reason}") };
            let path = record_path(segment, lsn);
            return Report { path, record: None, size: len, header: None, pages: 0, outcome: Err(damage) };
        }
    };
    let said = Sums { post_apply: info.post_apply, file_checksum: None };
    let mut report = Report {
        path: record_path(segment, info.lsn),
        size: info.payload_bytes(),
        header: None,
        pages: 0,
        outcome: Ok(said),
        record: None,
    };
    match payload {
        Some(Ok(payload)) => {
            report.outcome = read_pages(BufReader::new(Box::new(Cursor::new(payload))), page, &mut report);
            if let (Some((header, _)), Ok(sums)) = (&report.header, &report.outcome)
                && ((header.min_txid, header.max_txid, sums.post_apply)
                    != (info.min_txid, info.max_txid, info.post_apply)
                    // A snapshot does not say what was before it.
                    || !header.is_snapshot() && header.pre_apply != info.pre_apply)
            {
                let problem = "the transaction in it is not the one that the log says".to_owned();
                report.outcome = Err(Damage { offset: None, problem });
            }
        }
        Some(Err(problem)) => report.outcome = Err(Damage { offset: None, problem: problem.to_owned() }),
        None => {}
    }
    report.record = Some(info);
    report
}

/// The file itself, or the LTX files and segments below a directory in the order of their paths. Symbolic links to directories below
/// it are not followed.
fn files_of(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let metadata = path.metadata().with_context(|| format!("cannot open {}", shown(path)))?;
    if !metadata.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        let unreadable = || format!("cannot read directory {}", shown(&directory));
        for entry in directory.read_dir().with_context(unreadable)? {
            let entry = entry.with_context(unreadable)?;
            let path = entry.path();
            if entry.file_type().with_context(unreadable)?.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "ltx") || is_segment_name(&path) {
                files.push(path);
            }
        }
    }
    if files.is_empty() {
        bail!("there are no *.ltx files and no segments of a commit log (*.log) in {}", shown(path));
    }
    files.sort();
    Ok(files)
}

fn open(path: &Path) -> anyhow::Result<Input> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match open_record(path)? {
            Some(payload) => return Ok(BufReader::new(Box::new(Cursor::new(payload)))),
            None => Err(error),
        },
        opened => opened,
    };
    let file = file.with_context(|| format!("cannot open {}", shown(path)))?;
    Ok(BufReader::with_capacity(READ_SIZE, Box::new(file)))
}

/// Payload of the record that `path` names as [`record_path`] does; `None`: it names none.
fn open_record(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let text = path.to_string_lossy();
    let Some((segment, lsn)) = text.rsplit_once('#') else { return Ok(None) };
    let segment = Path::new(segment);
    if !segment.exists() {
        return Ok(None);
    }
    for item in inspect_segment(segment)?.unwrap_or_default() {
        match item {
            Inspected::Record { info, payload } if info.lsn.to_string() == lsn => match payload {
                Some(Ok(payload)) => return Ok(Some(payload)),
                Some(Err(problem)) => bail!("{}: {problem}", shown(path)),
                None => bail!(
                    "{}: its pages are in {}, in the directory of {} below `ltx`",
                    shown(path),
                    external_file(&info).unwrap_or("another file"),
                    info.database
                ),
            },
            _ => {}
        }
    }
    bail!("{} has no record {lsn}; `litefs ltx list` shows them", shown(segment))
}

/// Reads and checks a file. Only that it cannot be opened is an error; damage is reported.
fn read_file(path: PathBuf, page: &mut Vec<u8>) -> anyhow::Result<Report> {
    let file = open(&path)?;
    let size = path.metadata().with_context(|| format!("cannot read {}", shown(&path)))?.len();
    let mut report = Report {
        path,
        record: None,
        size,
        header: None,
        pages: 0,
        outcome: Err(Damage { offset: None, problem: String::new() }),
    };
    report.outcome = read_pages(file, page, &mut report);
    Ok(report)
}

fn read_pages(file: Input, page: &mut Vec<u8>, report: &mut Report) -> Result<Sums, Damage> {
    let mut decoder = Decoder::new(file)?;
    report.header = Some((decoder.header().clone(), decoder.format()));
    while decoder.next_page(page)?.is_some() {
        report.pages += 1;
    }
    finish(decoder).map(Sums::from)
}

/// Checks the rest of a file, of which all pages were read, and that the file ends there.
fn finish(decoder: Decoder<Input>) -> Result<Trailer, Damage> {
    let (trailer, mut rest) = decoder.finish_with_reader()?;
    let end = rest.stream_position();
    match end.and_then(|end| Ok((end, io::copy(&mut rest, &mut io::sink())?))) {
        Ok((_, 0)) => Ok(trailer),
        Ok((end, extra)) => {
            let problem = format!("{extra} bytes follow the trailer, from offset {end} on");
            Err(Damage { offset: Some(end), problem })
        }
        Err(error) => {
            let problem = format!("cannot read on after the trailer: {error}");
            Err(Damage { offset: None, problem })
        }
    }
}

fn dump(path: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
    let unreadable = || shown(path);
    let mut decoder = Decoder::new(open(path)?).with_context(unreadable)?;
    print_header(decoder.header(), decoder.format(), out)?;
    writeln!(out, "\n{:>10}  {:>12}  {:>10}  CHECKSUM", "PAGE", "OFFSET", "BYTES")?;
    // Offsets inside one LZ4 frame around all pages are not those of pages.
    let has_offsets = decoder.format() != Format::V1Lz4;
    let mut page = Vec::new();
    let mut pages = 0u32;
    loop {
        let offset = decoder.offset();
        let Some(pgno) = decoder.next_page(&mut page).with_context(unreadable)? else { break };
        let (at, len) = if has_offsets {
            (offset.to_string(), (decoder.offset() - offset).to_string())
        } else {
            ("-".to_owned(), "-".to_owned())
        };
        writeln!(out, "{pgno:>10}  {at:>12}  {len:>10}  {}", page_checksum(pgno, &page))?;
        pages += 1;
    }
    let trailer = finish(decoder).map_err(|damage| anyhow::anyhow!("{}: {}", shown(path), damage.problem))?;
    writeln!(out, "\npages          {pages}")?;
    writeln!(out, "post-apply     {}", trailer.post_apply)?;
    writeln!(out, "file checksum  {:016x}", trailer.file_checksum)?;
    Ok(())
}

fn print_header(header: &Header, format: Format, out: &mut dyn Write) -> io::Result<()> {
    let kind = match header {
        Header { commit: 0, .. } => ", deletion",
        header if header.is_snapshot() => ", snapshot",
        _ => "",
    };
    writeln!(out, "format         {format}{kind}")?;
    writeln!(out, "flags          {:#x}", header.flags)?;
    writeln!(out, "page size      {}", header.page_size)?;
    writeln!(out, "commit         {} pages", header.commit)?;
    writeln!(out, "transactions   {} to {}", header.min_txid, header.max_txid)?;
    writeln!(out, "timestamp      {}", timestamp(header.timestamp_ms))?;
    writeln!(out, "pre-apply      {}", header.pre_apply)?;
    writeln!(
        out,
        "WAL            offset {}, size {}, salt {:08x} {:08x}",
        header.wal_offset, header.wal_size, header.wal_salt1, header.wal_salt2
    )?;
    writeln!(out, "node           {:016x}", header.node_id)?;
    writeln!(out, "epoch          {}", header.epoch)?;
    match header.owner {
        Some(owner) => {
            writeln!(out, "owner          uid {}, gid {}, mode {:04o}", owner.uid, owner.gid, owner.mode)
        }
        None => writeln!(out, "owner          -"),
    }
}

fn dump_page(path: &Path, wanted: u32, out: &mut dyn Write) -> anyhow::Result<()> {
    let unreadable = || shown(path);
    let mut decoder = Decoder::new(open(path)?).with_context(unreadable)?;
    let mut page = Vec::new();
    let checksum: Checksum = loop {
        match decoder.next_page(&mut page).with_context(unreadable)? {
            Some(pgno) if pgno == wanted => break page_checksum(pgno, &page),
            Some(pgno) if pgno < wanted => {}
            _ => bail!("{}: there is no page {wanted} in it", shown(path)),
        }
    };
    writeln!(out, "page {wanted}, {} bytes, checksum {checksum}", page.len())?;
    for (line, bytes) in page.chunks(16).enumerate() {
        write!(out, "{:08x} ", line * 16)?;
        for (i, byte) in bytes.iter().enumerate() {
            write!(out, "{}{byte:02x}", if i == 8 { "  " } else { " " })?;
        }
        let text = |&byte: &u8| if byte == b' ' || byte.is_ascii_graphic() { char::from(byte) } else { '.' };
        writeln!(out, "  |{}|", bytes.iter().map(text).collect::<String>())?;
    }
    // What was shown is worth looking at also if the file is damaged, but that has to be said.
    match drain(decoder) {
        Ok(()) => Ok(()),
        Err(damage) => bail!("{}: the page may be wrong: {}", shown(path), damage.problem),
    }
}

fn drain(mut decoder: Decoder<Input>) -> Result<(), Damage> {
    let mut page = Vec::new();
    while decoder.next_page(&mut page)?.is_some() {}
    finish(decoder).map(|_| ())
}

/// Columns without lines, as in `ls -l`; `right` are aligned to the right.
pub(super) fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A path without what could steer a terminal.
pub(super) fn shown(path: &Path) -> String {
    path.to_string_lossy().replace(char::is_control, "\u{fffd}")
}

/// UTC with milliseconds, or the plain number if that is no date.
pub(super) fn timestamp(ms: i64) -> String {
    match jiff::Timestamp::from_millisecond(ms) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => format!("{ms}ms"),
    }
}

#[cfg(test)]
#[path = "ltx_tests.rs"]
mod tests;
