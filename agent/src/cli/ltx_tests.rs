use super::*;
use crate::log::{CommitLog, NewRecord, Options, RecordKind};
use crate::ship::engine::Epoch;
use ::ltx::{Encoder, Owner, Txid};
use clap::Parser;
use std::time::Duration;
use tempfile::TempDir;

/// The command as a command line gives it.
#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: LtxCommand,
}

fn litefs_ltx(args: &[&str]) -> (String, anyhow::Result<()>) {
    let line = Line::try_parse_from([&["ltx"], args].concat()).unwrap();
    let mut out = Vec::new();
    let result = run(line.command, &mut out);
    (String::from_utf8(out).unwrap(), result)
}

fn failure(args: &[&str]) -> String {
    format!("{:#}", litefs_ltx(args).1.unwrap_err())
}

/// Two transactions on a database of two pages: a snapshot, and a change of page 2.
fn two_files() -> (TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let snapshot = Header {
        flags: 0,
        page_size: 512,
        commit: 2,
        min_txid: Txid(1),
        max_txid: Txid(1),
        timestamp_ms: 1_700_000_000_123,
        pre_apply: Checksum(0),
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0xabc,
        epoch: 7,
        owner: Some(Owner { uid: 1000, gid: 100, mode: 0o640 }),
    };
    let unchanged = page_checksum(1, &[1; 512]);
    let before = unchanged.xor(page_checksum(2, &[2; 512]));
    let change =
        Header { min_txid: Txid(2), max_txid: Txid(2), pre_apply: before, owner: None, ..snapshot.clone() };
    let write = |header: Header, pages: &[(u32, u8)], post_apply| {
        let name = format!("{}-{}.ltx", header.min_txid, header.max_txid);
        let mut encoder = Encoder::new(Vec::new(), header).unwrap();
        for &(pgno, fill) in pages {
            encoder.encode_page(pgno, &[fill; 512]).unwrap();
        }
        let path = directory.path().join(name);
        std::fs::write(&path, encoder.finish(post_apply).unwrap().1).unwrap();
        path
    };
    let first = write(snapshot, &[(1, 1), (2, 2)], before);
    let second = write(change, &[(2, 3)], unchanged.xor(page_checksum(2, &[3; 512])));
    (directory, first, second)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn list_shows_each_file_of_a_directory_in_order() {
    let (directory, first, second) = two_files();
    std::fs::write(directory.path().join("notes.txt"), "no LTX file").unwrap();
    let (out, result) = litefs_ltx(&["list", text(directory.path())]);
    result.unwrap();
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{out}");
    let size = |path: &Path| path.metadata().unwrap().len().to_string();
    assert_eq!(
        lines[1],
        [
            text(&first),
            "-",
            "7",
            "v3",
            "0000000000000001-0000000000000001",
            "2",
            "2",
            "512",
            "2023-11-14T22:13:20.123Z",
            "0000000000000000",
            "ad2dffe333333333",
            &size(&first),
        ]
    );
    assert_eq!(lines[2][0], text(&second));
    assert_eq!(lines[2][9], "ad2dffe333333333", "applies to what the first left");
    assert_eq!(lines[2][11], size(&second));
}

#[test]
fn list_as_json_has_the_same_and_more() {
    let (_directory, first, second) = two_files();
    let (out, result) = litefs_ltx(&["list", "--json", text(&second), text(&first)]);
    result.unwrap();
    let files: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(files[0]["path"], text(&second));
    let first = &files[1];
    assert_eq!(first["ok"], true);
    assert_eq!(first["format"], "v3");
    assert_eq!(first["min_txid"], "0000000000000001");
    assert_eq!(first["timestamp_ms"], 1_700_000_000_123_i64);
    assert_eq!(first["node_id"], "0000000000000abc");
    assert_eq!(first["epoch"], 7);
    assert_eq!(first["post_apply"], "ad2dffe333333333");
    assert!(first.get("error").is_none());
}

#[test]
fn dump_shows_header_pages_and_trailer() {
    let (_directory, first, second) = two_files();
    let (out, result) = litefs_ltx(&["dump", text(&first)]);
    result.unwrap();
    for part in [
        "format         v3, snapshot\n",
        "page size      512\n",
        "commit         2 pages\n",
        "transactions   0000000000000001 to 0000000000000001\n",
        "node           0000000000000abc\n",
        "epoch          7\n",
        "owner          uid 1000, gid 100, mode 0640\n",
        "  e4e4aaa102377eee\n",
        "  c9c9554231044ddd\n",
        "pages          2\n",
        "post-apply     ad2dffe333333333\n",
    ] {
        assert!(out.contains(part), "{part:?} is not in\n{out}");
    }
    let pages: Vec<Vec<&str>> = out
        .lines()
        .filter(|line| line.starts_with(' '))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(pages[0], ["PAGE", "OFFSET", "BYTES", "CHECKSUM"]);
    assert_eq!(pages[1][..2], ["1", "100"]);
    let end = 100 + pages[1][2].parse::<u64>().unwrap();
    assert_eq!(pages[2][..2], ["2", end.to_string().as_str()]);

    let (out, result) = litefs_ltx(&["dump", text(&second)]);
    result.unwrap();
    assert!(out.contains("format         v3\n") && out.contains("owner          -\n"), "{out}");
}

#[test]
fn dump_of_a_page_shows_all_its_bytes() {
    let (_directory, first, _) = two_files();
    let (out, result) = litefs_ltx(&["dump", text(&first), "--page", "2"]);
    result.unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "page 2, 512 bytes, checksum c9c9554231044ddd");
    assert_eq!(lines.len(), 1 + 512 / 16);
    assert_eq!(lines[32], "000001f0  02 02 02 02 02 02 02 02  02 02 02 02 02 02 02 02  |................|");
    assert!(failure(&["dump", text(&first), "--page", "3"]).contains("no page 3"));
    assert!(Line::try_parse_from(["ltx", "dump", "x", "--page", "0"]).is_err());
}

#[test]
fn verify_passes_good_files() {
    let (directory, first, second) = two_files();
    let (out, result) = litefs_ltx(&["verify", text(directory.path())]);
    result.unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], format!("{}: ok, 2 pages, ad2dffe333333333", text(&first)));
    assert!(lines[1].starts_with(&format!("{}: ok, 1 page, ", text(&second))), "{out}");
}

#[test]
fn verify_names_damaged_files_and_the_place() {
    let (directory, first, second) = two_files();
    let mut bytes = std::fs::read(&first).unwrap();
    bytes[104] = 0x80;
    std::fs::write(&first, bytes).unwrap();
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() - 5]).unwrap();

    let (out, result) = litefs_ltx(&["verify", text(directory.path())]);
    let message = format!("{:#}", result.unwrap_err());
    assert!(message.starts_with(text(&first)) && message.contains("1 more of 2 files"), "{message}");
    assert_eq!(out.matches(": DAMAGED: ").count(), 2, "{out}");

    let (out, result) = litefs_ltx(&["verify", "--json", text(&second)]);
    assert!(format!("{:#}", result.unwrap_err()).contains("truncated"));
    let files: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(files[0]["ok"], false);
    assert_eq!(files[0]["offset"], bytes.len() - 16, "the trailer is cut");
    assert_eq!(files[0]["max_txid"], "0000000000000002");
    assert!(files[0]["error"].as_str().unwrap().contains("trailer"));

    let (out, result) = litefs_ltx(&["list", text(&second)]);
    assert!(result.is_err());
    assert!(out.contains("damaged"), "{out}");
    assert!(failure(&["dump", text(&second)]).contains("truncated"));
    assert!(failure(&["dump", "--page", "2", text(&second)]).contains("the page may be wrong"));
}

#[test]
fn verify_finds_what_is_not_ltx_what_is_too_long_and_what_is_misnamed() {
    let (directory, first, second) = two_files();
    let path = directory.path().join("not.ltx");
    std::fs::write(&path, [b'x'; 200]).unwrap();
    assert!(failure(&["verify", text(&path)]).contains("not an LTX file"));
    std::fs::write(&path, b"").unwrap();
    assert!(failure(&["verify", text(&path)]).contains("inside its header"));

    let longer = [std::fs::read(&first).unwrap(), vec![0; 3]].concat();
    std::fs::write(&path, &longer).unwrap();
    let expected = format!("3 bytes follow the trailer, from offset {} on", longer.len() - 3);
    assert!(failure(&["verify", text(&path)]).contains(&expected));

    std::fs::copy(&first, &second).unwrap();
    let message = failure(&["verify", text(&second)]);
    assert!(message.contains("named after transactions 0000000000000002"), "{message}");
    litefs_ltx(&["list", text(&second)]).1.unwrap();
}

#[test]
fn what_is_not_there_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none.ltx");
    for command in ["list", "dump", "verify"] {
        let message = failure(&[command, text(&path)]);
        assert!(message.starts_with(&format!("cannot open {}: No such file", text(&path))), "{message}");
    }
    assert!(
        failure(&["verify", text(directory.path())]).contains("there are no *.ltx files and no segments")
    );
}

/// The log of a node with the two transactions of [`two_files`]: the segment they are in.
fn log_with_records(directory: &TempDir, files: [&Path; 2]) -> PathBuf {
    let dir = directory.path().join("data/log");
    let options = Options {
        segment_bytes: 64 << 10,
        inline_bytes_max: 4 << 10,
        retention_age: Duration::from_secs(3600),
        retention_bytes: 1 << 30,
        idle_mark: None,
    };
    let log = CommitLog::open(&dir, options).unwrap();
    let database = crate::DatabaseName::new("sub/app.db").unwrap();
    for path in files {
        let bytes = std::fs::read(path).unwrap();
        let mut decoder = Decoder::new(&bytes[..]).unwrap();
        let header = decoder.header().clone();
        let mut page = Vec::new();
        while decoder.next_page(&mut page).unwrap().is_some() {}
        let record = NewRecord {
            database: &database,
            kind: RecordKind::Transaction,
            epoch: Epoch(9),
            min_txid: header.min_txid,
            max_txid: header.max_txid,
            pre_apply: if header.is_snapshot() { Checksum(1 << 63) } else { header.pre_apply },
            post_apply: decoder.finish().unwrap().post_apply,
            page_size: header.page_size,
            commit: header.commit,
            timestamp_ms: header.timestamp_ms,
            wal: None,
            fence: None,
        };
        log.append(&record, &bytes).unwrap();
    }
    log.wait_durable(log.appended()).unwrap();
    // As when its agent is killed: nothing more is written.
    std::mem::forget(log);
    let segments = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
    segments.filter(|path| is_segment_name(path)).min().unwrap()
}

#[test]
fn the_records_of_a_commit_log_are_listed_dumped_and_verified() {
    let (directory, first, second) = two_files();
    let segment = log_with_records(&directory, [&first, &second]);
    let (out, result) = litefs_ltx(&["list", text(&directory.path().join("data"))]);
    result.unwrap();
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{out}");
    assert!(lines[1][0].starts_with(&format!("{}#", text(&segment))), "{out}");
    assert_eq!(lines[2][1..5], ["sub/app.db", "9", "v3", "0000000000000002-0000000000000002"]);
    assert_eq!(lines[2][9], "ad2dffe333333333");

    let record = lines[2][0];
    let (of_record, result) = litefs_ltx(&["dump", record]);
    result.unwrap();
    let (of_file, _) = litefs_ltx(&["dump", text(&second)]);
    assert_eq!(of_record, of_file);
    let missing = format!("{}#0000000000000007", text(&segment));
    assert!(failure(&["dump", &missing]).contains("has no record 0000000000000007"));

    let (out, result) = litefs_ltx(&["verify", text(&segment)]);
    result.unwrap();
    assert_eq!(out.lines().filter(|line| line.contains(": ok, ")).count(), 2, "{out}");
    // A bit flips in the payload of the first record.
    let mut bytes = std::fs::read(&segment).unwrap();
    let payload = std::fs::read(&first).unwrap();
    let at = bytes.windows(payload.len()).position(|window| window == payload).unwrap();
    bytes[at + 150] ^= 4;
    std::fs::write(&segment, bytes).unwrap();
    let (out, result) = litefs_ltx(&["verify", text(&segment)]);
    let problem = format!("{:#}", result.unwrap_err());
    assert!(problem.contains(lines[1][0]) && problem.contains("not what was written"), "{problem}");
    assert!(out.lines().any(|line| line.starts_with(record) && line.contains(": ok, ")), "{out}");
}
