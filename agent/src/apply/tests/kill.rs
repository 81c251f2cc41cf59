//! The agent is killed at every stage of an apply; the test binary runs itself as the agent that dies.

use super::*;

const ROLE: &str = "LITEFS_TEST_APPLY_ROLE";

/// This test binary as another agent, which applies the record at `record` to the database at `path`.
pub fn child(role: &str, path: &Path, record: &Path, limit: u64, shape: DatabaseShape) -> Command {
    // By this name it is found even after a build has replaced the file.
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", "apply::tests::kill::agent_in_another_process", "--ignored", "--nocapture"]);
    command.env(ROLE, role).env("PATH_TO_DB", path).env("RECORD", record).env("LIMIT", limit.to_string());
    command.env("SHAPE", format!("{} {} {}", shape.page_size, shape.page_count, u8::from(shape.wal_mode)));
    command
}

/// Dies by SIGKILL when it has given as many pages as it may.
struct Deadly<S> {
    inner: S,
    pages_left: u64,
}

impl<S: TransactionSource> TransactionSource for Deadly<S> {
    fn next_transaction(&mut self) -> Result<Option<TransactionHeader>, ltx::Error> {
        self.inner.next_transaction()
    }
    fn next_page(&mut self, page: &mut Vec<u8>) -> Result<Option<u32>, ltx::Error> {
        if self.pages_left == 0 {
            // SAFETY: raising a signal in the own process has no preconditions.
            unsafe { libc::raise(libc::SIGKILL) };
        }
        self.pages_left -= 1;
        self.inner.next_page(page)
    }
}

#[test]
#[ignore = "a process that other tests start"]
fn agent_in_another_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let var = |name: &str| std::env::var(name).unwrap();
    let shape: Vec<u32> = var("SHAPE").split(' ').map(|n| n.parse().unwrap()).collect();
    let shape = DatabaseShape { page_size: shape[0], page_count: shape[1], wal_mode: shape[2] == 1 };
    let limit: u64 = var("LIMIT").parse().unwrap();
    let record = std::fs::read(var("RECORD")).unwrap();
    let mut applier = Applier::new(var("PATH_TO_DB").into(), DatabaseName::new("replica.db").unwrap());
    let source = LtxTransactions::new([&record[..]]);
    match role.as_str() {
        "die" => {
            let mut source = Deadly { inner: source, pages_left: limit };
            applier.apply(shape, &mut source, LONG).unwrap();
        }
        "limit" => {
            let size = libc::rlimit { rlim_cur: limit, rlim_max: limit };
            // SAFETY: the limit outlives the call; ignoring SIGXFSZ makes writes fail with EFBIG instead.
            unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &size), 0);
            }
            let mut source = source;
            let error = applier.apply(shape, &mut source, LONG).unwrap_err();
            assert!(matches!(error, ApplyError::Io { .. }), "{error}");
            assert!(error.to_string().contains("replica.db"), "{error}");
        }
        other => panic!("no role {other}"),
    }
}

/// Kills an apply of `file` after `pages` pages and returns whether it got that far.
fn kill_after(replica: &Replica, file: &[u8], pages: u64) -> bool {
    let record = replica.dir.path().join("record");
    std::fs::write(&record, file).unwrap();
    let status = child("die", &replica.path, &record, pages, replica.shape).output().unwrap().status;
    std::os::unix::process::ExitStatusExt::signal(&status) == Some(libc::SIGKILL)
}

fn page_count(file: &[u8]) -> u64 {
    let mut decoder = ltx::Decoder::new(file).unwrap();
    let (mut count, mut page) = (0, Vec::new());
    while decoder.next_page(&mut page).unwrap().is_some() {
        count += 1;
    }
    count
}

#[test]
fn readers_see_the_old_state_after_a_kill_and_the_record_can_be_applied_again() {
    for mode in ["delete", "wal"] {
        for change in ["grow", "shrink", "page size", "create"] {
            let mut primary = Primary::new(512, mode);
            let mut replica = Replica::new();
            let mut files = vec![primary.exec(CREATE), primary.insert(4000, 800)];
            let file = match change {
                "grow" => primary.exec("update t set b = randomblob(900)"),
                "shrink" => {
                    files.push(primary.exec("delete from t where a % 5 = 0"));
                    primary.exec("vacuum")
                }
                "page size" if mode == "delete" => primary.exec("pragma page_size=2048; vacuum"),
                "page size" => continue,
                _ => primary.image.transaction_after(&Image::default(), 1),
            };
            if change != "create" {
                replica.apply(&files);
            }
            assert!(replica.applier.detach().unwrap());
            let before = Image::read(&replica.path);
            // Several batches of 1 MiB, so that some kills find pages in the file.
            let mut touched = false;
            let count = page_count(&file);
            for pages in [0, 1, 10, count / 2, count - 1, count] {
                assert!(kill_after(&replica, &file, pages), "{mode} {change}: killed after {pages} pages");
                let raw = std::fs::read(&replica.path).unwrap_or_default();
                touched |=
                    raw != before.bytes || replica.file("-wal").metadata().is_ok_and(|m| m.len() > 100_000);
                let mut reader = Sqlite::open(&replica.path);
                if change == "create" {
                    assert_eq!(reader.ask("select count(*) from sqlite_schema;"), "0");
                } else {
                    assert_eq!(reader.ask("pragma integrity_check;"), "ok");
                }
                drop(reader);
                assert_eq!(Image::read(&replica.path).bytes, before.bytes, "{mode} {change} {pages}");
            }
            assert!(touched, "{mode} {change}: the record is too small for this test");
            // Without a reader in between it is the next apply that cleans up.
            assert!(kill_after(&replica, &file, count - 1));
            replica.apply(&[file]);
            replica.assert_equals(&primary.image);
            replica.assert_file_equals(&primary.image);
        }
    }
}

#[test]
fn a_reader_that_was_there_keeps_reading_when_the_agent_is_killed() {
    let mut primary = Primary::new(512, "wal");
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE), primary.insert(3000, 400)]);
    let mut long = Sqlite::open(&replica.path);
    let before = long.ask(&format!("begin; {DIGEST}"));
    let mut short = Sqlite::open(&replica.path);
    let file = primary.exec("update t set b = randomblob(410)");
    for pages in [1, page_count(&file) / 2, page_count(&file)] {
        // The other agent connects beside this one, as a new one would while the old one is still going.
        assert!(kill_after(&replica, &file, pages));
        assert_eq!(long.digest(), before);
        assert_eq!(short.digest(), before);
    }
    replica.apply(&[file]);
    assert_eq!(long.digest(), before);
    assert_eq!(short.digest(), digest_of(&primary.db));
    drop((long, short));
    replica.assert_file_equals(&primary.image);
}
