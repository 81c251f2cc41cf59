//! What an ELF file says about how it is loaded, what it calls, and which SQLite is inside.

use object::Endianness;
use object::elf::{DT_NEEDED, DT_RPATH, DT_RUNPATH, FileHeader32, FileHeader64, PT_INTERP};
use object::read::elf::{Dyn, FileHeader, ProgramHeader, Sym};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// An ELF file of a kind that this program can read.
#[derive(Debug, Default)]
pub struct Elf {
    /// 64 bits wide.
    pub is_64: bool,
    /// `e_machine`.
    pub machine: object::elf::Machine,
    /// The dynamic loader that it asks for; none in libraries and static programs.
    pub interpreter: Option<PathBuf>,
    /// Names of libraries that are loaded with it.
    pub needed: Vec<String>,
    /// Where these are looked for first, `$ORIGIN` not yet replaced.
    pub library_path: Vec<String>,
    /// Names that it takes from other files when it runs.
    pub imports: HashSet<String>,
    /// What its bytes give away.
    pub marks: Marks,
}

/// Texts that stand in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// SQLite itself is compiled in.
    pub sqlite: Option<SqliteBuild>,
    /// A Go program with an SQLite that was translated to Go: the name of the package.
    pub go_sqlite: Option<&'static str>,
    /// Written in Go.
    pub go: bool,
    /// A library that does I/O through io_uring: its name.
    pub io_uring: Option<&'static str>,
}

/// An SQLite library, from its texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqliteBuild {
    /// `3.x.y`, where exactly one text of this form is there.
    pub version: Option<String>,
    /// Date of its source, `YYYY-MM-DD`.
    pub date: String,
}

impl SqliteBuild {
    /// Whether its source has the WAL-reset bug: since 3.7.0, whose date is the first one, until the fix in 3.52.0
    /// and 3.51.3, which 3.50.7 and 3.44.6 got later. The date tells for all of them; a distribution may have
    /// mended an older source.
    /// <https://sqlite.org/wal.html#walresetbug>
    pub fn has_wal_reset_bug(&self) -> bool {
        ("2010-07-21".."2026-03-06").contains(&self.date.as_str())
    }
}

impl std::fmt::Display for SqliteBuild {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.version {
            Some(version) => write!(f, "SQLite {version} of {}", self.date),
            None => write!(f, "SQLite of {}", self.date),
        }
    }
}

/// Pure-Go translations of SQLite and drivers that stand on them.
const GO_SQLITE: [&str; 4] = [
    "modernc.org/sqlite",
    "github.com/ncruces/go-sqlite3",
    "zombiezen.com/go/sqlite",
    "github.com/glebarez/sqlite",
];

/// Names of libraries that use io_uring, as their file names and registry paths show them.
const IO_URING: [&str; 5] = ["turso_core", "limbo_core", "io-uring-0", "tokio-uring", "rio-0"];

impl Elf {
    /// Reads a file; `None` when it is no ELF file.
    pub fn read(path: &Path) -> io::Result<Option<Elf>> {
        let file = File::open(path)?;
        if file.metadata()?.len() < 64 {
            return Ok(None);
        }
        // SAFETY: the map is read as bytes only; a program that is replaced meanwhile is a new file, and one that is
        // truncated under our eyes ends this command with SIGBUS, which harms nobody.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Elf::parse(&map).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Reads the bytes of a file; `None` when they are no ELF file.
    pub fn parse(bytes: &[u8]) -> Result<Option<Elf>, object::read::Error> {
        if !bytes.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        match bytes.get(4) {
            Some(2) => parse::<FileHeader64<Endianness>>(bytes).map(Some),
            _ => parse::<FileHeader32<Endianness>>(bytes).map(Some),
        }
    }

    /// Whether it can ask a loader for symbols at all.
    pub fn is_dynamic(&self) -> bool {
        self.interpreter.is_some()
    }

    /// Whether it imports one of these.
    pub fn imports_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.imports.contains(*name))
    }
}

fn parse<H: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Result<Elf, object::read::Error> {
    let header = H::parse(bytes)?;
    let endian = header.endian()?;
    let mut elf = Elf { is_64: header.is_type_64(), machine: header.e_machine(endian), ..Elf::default() };
    for segment in header.program_headers(endian, bytes)? {
        if segment.p_type(endian) == PT_INTERP
            && let Ok(name) = segment.data(endian, bytes)
        {
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            elf.interpreter = Some(OsString::from_vec(name.to_vec()).into());
        }
    }
    let sections = header.sections(endian, bytes)?;
    if let Some((entries, link)) = sections.dynamic(endian, bytes)? {
        let strings = sections.strings(endian, bytes, link)?;
        for entry in entries {
            let tag = entry.tag(endian);
            if ![DT_NEEDED, DT_RPATH, DT_RUNPATH].contains(&tag) {
                continue;
            }
            let text = entry.string(endian, strings)?;
            let text = String::from_utf8_lossy(text);
            if tag == DT_NEEDED {
                elf.needed.push(text.into_owned());
            } else {
                elf.library_path.extend(text.split(':').filter(|dir| !dir.is_empty()).map(str::to_owned));
            }
        }
    }
    let symbols = sections.symbols(endian, bytes, object::elf::SHT_DYNSYM)?;
    for symbol in symbols.iter() {
        if symbol.is_undefined(endian)
            && let Ok(name) = symbols.symbol_name(endian, symbol)
        {
            elf.imports.insert(String::from_utf8_lossy(name).into_owned());
        }
    }
    let go = sections.section_by_name(endian, b".go.buildinfo").is_some();
    elf.marks = Marks::find(bytes, go);
    Ok(elf)
}

impl Marks {
    /// Looks through a file.
    fn find(bytes: &[u8], go: bool) -> Marks {
        let has = |text: &str| memmem(bytes, text.as_bytes());
        // Programs that only recognise databases have the first of these texts; the second is in the library alone.
        let texts = ["SQLite format 3\0", "cannot start a transaction within a transaction"];
        let sqlite = texts.into_iter().all(has).then(|| build(bytes)).flatten();
        Marks {
            sqlite,
            go,
            go_sqlite: GO_SQLITE.into_iter().find(|name| go && has(name)),
            io_uring: IO_URING.into_iter().find(|name| has(name)),
        }
    }
}

fn memmem(bytes: &[u8], text: &[u8]) -> bool {
    memchr::memmem::find(bytes, text).is_some()
}

/// Finds `SQLITE_SOURCE_ID` (`YYYY-MM-DD HH:MM:SS` and a hash of 40 or 64 digits) and the version.
fn build(bytes: &[u8]) -> Option<SqliteBuild> {
    const SHAPE: &[u8] = b"dddd-dd-dd dd:dd:dd hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh";
    let is_source_id = |text: &[u8]| {
        text.iter().zip(SHAPE).all(|(byte, shape)| match shape {
            b'd' => byte.is_ascii_digit(),
            b'h' => byte.is_ascii_hexdigit(),
            _ => byte == shape,
        })
    };
    let date = memchr::memmem::find_iter(bytes, b"\x0020").find_map(|at| {
        let text = bytes.get(at + 1..at + 1 + SHAPE.len())?;
        is_source_id(text).then(|| String::from_utf8_lossy(&text[..10]).into_owned())
    })?;
    let mut versions = HashSet::new();
    for at in memchr::memmem::find_iter(bytes, b"\x003.") {
        let rest = &bytes[at + 1..bytes.len().min(at + 12)];
        let Some(end) = rest.iter().position(|byte| *byte == 0) else { continue };
        let parts: Vec<&[u8]> = rest[..end].split(|byte| *byte == b'.').collect();
        let number = |part: &&[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
        if parts.len() == 3 && parts.iter().all(number) {
            versions.insert(String::from_utf8_lossy(&rest[..end]).into_owned());
        }
    }
    let version = if versions.len() == 1 { versions.into_iter().next() } else { None };
    Some(SqliteBuild { version, date })
}
