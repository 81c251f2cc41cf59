//! Random workloads on the primary; after every transaction the replica is compared page for page.

use super::*;
use fastrand::Rng;

fn statement(random: &mut Rng) -> String {
    let n = random.u64(..9) + 2;
    match random.u64(..20) {
        0..=6 => insert_sql(random.u32(..60) + 1, random.u32(..2500)),
        7..=10 => format!("update t set b = randomblob({}) where a % {n} = 1", random.u64(..1500)),
        11..=13 => format!("delete from t where a % {n} = 0"),
        14 => format!("create table if not exists t{n}(x); insert into t{n} values(randomblob(3000))"),
        15 => format!("drop table if exists t{n}"),
        16 => format!("begin; {} savepoint s; delete from t; rollback to s; commit", insert_sql(200, 700)),
        17 => format!("create index if not exists i{n} on t(b); drop index if exists i{}", n + 1),
        18 => "vacuum".to_owned(),
        _ => format!("pragma incremental_vacuum({n})"),
    }
}

fn run(seed: u64, switch_modes: bool) {
    let mut random = Rng::with_seed(seed);
    let page_size = 512 << random.u64(..8);
    let mut primary = Primary::new(page_size, if random.u64(..2) == 0 { "wal" } else { "delete" });
    let vacuum = random.choice(["none", "full", "incremental"]).unwrap();
    primary.db.execute_batch(&format!("pragma auto_vacuum={vacuum}; vacuum;")).unwrap();
    let mut replica = Replica::new();
    replica.apply(&[primary.exec(CREATE)]);
    let mut idle = Sqlite::open(&replica.path);
    let mut snapshot: Option<(Sqlite, String)> = None;
    let mut waiting = Vec::new();
    for _ in 0..60 {
        if switch_modes && random.u64(..10) == 0 {
            let mode = random.choice(["wal", "delete", "truncate", "persist"]).unwrap();
            primary.db.execute_batch(&format!("pragma journal_mode={mode}")).unwrap();
        } else {
            primary.db.execute_batch(&statement(&mut random)).unwrap();
        }
        waiting.extend(primary.capture());
        if random.u64(..3) == 0 {
            continue;
        }
        // In rollback mode a reader in a transaction is in the way, as it would be of any writer.
        if !primary.image.shape().wal_mode || !replica.shape.wal_mode {
            snapshot = None;
        }
        replica.apply(&std::mem::take(&mut waiting));
        replica.assert_equals(&primary.image);
        assert_eq!(idle.digest(), digest_of(&primary.db));
        if let Some((reader, before)) = &mut snapshot {
            assert_eq!(reader.digest(), *before);
        }
        match random.u64(..6) {
            0 => {
                replica.applier.checkpoint(Durability::Log).unwrap();
                replica.assert_equals(&primary.image);
            }
            1 => assert!(!replica.shape.wal_mode || !replica.applier.detach().unwrap()),
            2 => snapshot = None,
            3 if snapshot.is_none() && replica.shape.wal_mode => {
                let mut reader = Sqlite::open(&replica.path);
                let before = reader.ask(&format!("begin; {DIGEST}"));
                snapshot = Some((reader, before));
            }
            4 => {
                let kind = random.choice(["passive", "full", "restart", "truncate"]).unwrap();
                Sqlite::open(&replica.path).ask(&format!("pragma wal_checkpoint({kind});"));
            }
            _ => {
                idle = Sqlite::open(&replica.path);
                idle.digest();
            }
        }
    }
    replica.apply(&waiting);
    assert_eq!(idle.ask("pragma integrity_check;"), "ok");
    drop((idle, snapshot));
    replica.assert_file_equals(&primary.image);
}

#[test]
fn random_workloads_in_one_mode_stay_identical() {
    (1..=6).for_each(|seed| run(seed, false));
}

#[test]
fn random_workloads_that_switch_modes_stay_identical() {
    (101..=106).for_each(|seed| run(seed, true));
}
