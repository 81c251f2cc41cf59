use super::*;
use crate::config::UnitVerb;
use crate::status::fake::FakeNode;
use ltx::Txid;
use std::path::Path;

const LONG: Duration = Duration::from_secs(30);

struct Running {
    node: Arc<FakeNode>,
    dir: tempfile::TempDir,
    hooks: Option<Hooks>,
}

/// A hook that appends `TXID` to `runs` and then does `script`.
fn hook(dir: &Path, script: &str) -> HookConfig {
    let runs = dir.join("runs");
    let script = format!("echo $LITEFS_DATABASE $LITEFS_TXID >> {}; {script}", runs.display());
    HookConfig {
        name: "test".into(),
        databases: vec!["*.db".into()],
        action: HookAction::Command(vec!["/bin/sh".into(), "-c".into(), script]),
        debounce: Duration::from_millis(10),
        timeout: LONG,
    }
}

impl Running {
    fn new(make: impl FnOnce(&Path) -> HookConfig) -> Running {
        let dir = tempfile::tempdir().unwrap();
        let config = make(dir.path());
        let mut running = Running { node: Arc::new(FakeNode::new()), dir, hooks: None };
        running.start(&config);
        running
    }

    fn start(&mut self, config: &HookConfig) {
        let dirs =
            HookDirs { memory: self.dir.path().join("memory"), environment: self.dir.path().join("env") };
        let hooks = std::slice::from_ref(config);
        self.hooks = Some(Hooks::spawn(self.node.clone(), hooks, &dirs, &CancellationToken::new()));
    }

    async fn stop(&mut self) {
        self.hooks.take().unwrap().stop().await;
    }

    fn set(&self, txid: u64) {
        self.node.status.lock().databases[0].txid = Txid(txid);
    }

    fn commit(&self, txid: u64) {
        self.set(txid);
        self.node.feed.database(&DatabaseName::new("a.db").unwrap());
    }

    fn runs(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("runs")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let waited = tokio::time::timeout(LONG, async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(waited.await.is_ok(), "{what} did not happen; runs: {:?}", self.runs());
    }

    async fn until_runs(&self, runs: &[&str]) {
        self.until(&format!("{runs:?}"), || self.runs() == runs).await;
    }

    fn remembered(&self) -> Option<String> {
        Memory::new(self.dir.path().join("memory/test")).get(&DatabaseName::new("a.db").unwrap())
    }
}

#[tokio::test]
async fn runs_at_the_start_after_changes_and_not_for_what_it_has_run_for() {
    let mut running = Running::new(|dir| hook(dir, ""));
    running.until_runs(&["a.db 000000000000002a"]).await;
    running.commit(43);
    running.until_runs(&["a.db 000000000000002a", "a.db 000000000000002b"]).await;
    running
        .until("it is remembered", || {
            running.remembered().is_some_and(|position| position.starts_with("000000000000002b/"))
        })
        .await;

    // Stopped and started: nothing moved, no run. The next change proves that it looked.
    running.stop().await;
    let config = hook(running.dir.path(), "");
    running.start(&config);
    running.commit(44);
    running.until_runs(&["a.db 000000000000002a", "a.db 000000000000002b", "a.db 000000000000002c"]).await;

    // It moved while nobody looked.
    running
        .until("it is remembered", || {
            running.remembered().is_some_and(|position| position.starts_with("000000000000002c/"))
        })
        .await;
    running.stop().await;
    running.set(50);
    running.start(&config);
    running
        .until("the run for what was missed", || {
            running.runs().last().is_some_and(|run| run == "a.db 0000000000000032")
        })
        .await;
    assert_eq!(running.runs().len(), 4);
    running.stop().await;
}

#[tokio::test]
async fn many_changes_are_few_runs_one_at_a_time_and_the_last_is_seen() {
    let mut running = Running::new(|dir| {
        // Two at a time would see each other's directory.
        let busy = dir.join("busy");
        let script = format!("mkdir {0} || exit 1; sleep 0.05; rmdir {0}", busy.display());
        hook(dir, &script)
    });
    for txid in 43..=400 {
        running.commit(txid);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    running
        .until("the last change", || {
            running.remembered().is_some_and(|position| position.starts_with("0000000000000190/"))
        })
        .await;
    let runs = running.runs();
    assert!(runs.len() < 100, "{} runs for 358 changes", runs.len());
    let status = running.node.status.lock().clone();
    let metrics = running.node.metrics.render(status, 0);
    assert!(
        metrics
            .contains(&format!("litefs_hook_run_count{{hook=\"test\",result=\"success\"}} {}", runs.len())),
        "{metrics}"
    );
    assert!(!metrics.contains("result=\"failure\""), "{metrics}");
    running.stop().await;
}

#[tokio::test]
async fn a_failed_run_is_tried_again_until_it_succeeds() {
    let mut running = Running::new(|dir| {
        let flag = dir.join("broken");
        std::fs::write(&flag, "").unwrap();
        hook(dir, &format!("test ! -e {0} || {{ rm {0}; exit 3; }}", flag.display()))
    });
    running.until("success", || running.remembered().is_some()).await;
    assert_eq!(running.runs().len(), 2);
    let status = running.node.status.lock().clone();
    let metrics = running.node.metrics.render(status, 0);
    assert!(metrics.contains("litefs_hook_run_count{hook=\"test\",result=\"failure\"} 1"), "{metrics}");
    running.stop().await;
}

#[tokio::test]
async fn a_run_that_hangs_is_ended_with_all_its_processes() {
    let mut running = Running::new(|dir| {
        let child = dir.join("child");
        let script = format!("sleep 1000 & echo $! > {}; wait", child.display());
        HookConfig { timeout: Duration::from_millis(300), ..hook(dir, &script) }
    });
    let failed = || {
        let status = running.node.status.lock().clone();
        running.node.metrics.render(status, 0).contains("result=\"failure\"} 1")
    };
    running.until("the timeout", failed).await;
    let child = std::fs::read_to_string(running.dir.path().join("child")).unwrap();
    let gone = || {
        let state = std::fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        state.is_empty() || state.contains(") Z ")
    };
    running.until("its child is gone", gone).await;
    assert!(running.remembered().is_none());
    running.stop().await;
}

#[tokio::test]
async fn a_database_that_stands_aside_runs_when_it_is_healed() {
    let mut running = Running::new(|dir| hook(dir, ""));
    running.until_runs(&["a.db 000000000000002a"]).await;
    running.node.status.lock().databases[0].state = DatabaseState::Quarantined;
    running.commit(43);
    let mut other = running.node.status.lock().databases[0].clone();
    (other.name, other.state) = ("b.db".into(), DatabaseState::Ok);
    running.node.status.lock().databases.push(other);
    running.node.feed.database(&DatabaseName::new("b.db").unwrap());
    running.until_runs(&["a.db 000000000000002a", "b.db 000000000000002b"]).await;
    running.node.status.lock().databases[0].state = DatabaseState::Ok;
    running.commit(44);
    running.until_runs(&["a.db 000000000000002a", "b.db 000000000000002b", "a.db 000000000000002c"]).await;
    running.stop().await;
}

#[tokio::test]
async fn stopping_ends_a_run() {
    let mut running = Running::new(|dir| hook(dir, "exec sleep 1000"));
    running.until("the run", || running.runs().len() == 1).await;
    tokio::time::timeout(LONG, running.stop()).await.expect("the run is ended");
    assert!(running.remembered().is_none(), "a run that was ended is no success");
}

#[tokio::test]
async fn databases_that_no_pattern_names_do_not_matter() {
    let mut running = Running::new(|dir| HookConfig { databases: vec!["b*.db".into()], ..hook(dir, "") });
    running.commit(43);
    let mut other = running.node.status.lock().databases[0].clone();
    other.name = "b1.db".into();
    running.node.status.lock().databases.push(other);
    running.node.feed.database(&DatabaseName::new("b1.db").unwrap());
    running.until_runs(&["b1.db 000000000000002b"]).await;
    running.stop().await;
}

#[tokio::test]
async fn a_unit_without_a_bus_fails_by_name_and_its_environment_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let config = HookConfig {
        action: HookAction::Unit { unit: "nginx.service".into(), verb: UnitVerb::Reload },
        ..hook(dir.path(), "")
    };
    let change = Change {
        name: DatabaseName::new("a.db").unwrap(),
        status: crate::status::fake::status().databases[0].clone(),
    };
    let variables = variables(&config, &FakeNode::new(), &change);
    unit::write_environment(&dir.path().join("env/test.env"), &variables).await.unwrap();
    let text = std::fs::read_to_string(dir.path().join("env/test.env")).unwrap();
    assert!(text.contains("LITEFS_PATH=\"/srv/litefs/db/a.db\"\n"), "{text}");
    assert!(text.contains("LITEFS_POSITION=\"000000000000002a/ffffffffffffffff\"\n"), "{text}");
    assert!(text.contains("LITEFS_ROLE=\"primary\"\n"), "{text}");
}
