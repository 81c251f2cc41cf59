use super::*;
use ltx::{Checksum, Txid};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn name(name: &str) -> DatabaseName {
    DatabaseName::new(name).unwrap()
}

fn pos(txid: u64) -> Pos {
    Pos { txid: Txid(txid), checksum: Checksum(txid << 8 | 1 << 63) }
}

/// A node whose history is `pos(1)`, `pos(2)`, ...
struct Node {
    durable: Lsn,
    publishes: bool,
}

impl World for Node {
    fn durable(&self) -> Lsn {
        self.durable
    }

    fn may_publish(&self) -> bool {
        self.publishes
    }

    fn in_history(&self, _: &DatabaseName, position: Pos) -> bool {
        position == pos(position.txid.0)
    }
}

struct Case {
    board: Board,
    node: Node,
    start: Instant,
    now_ms: u64,
    reports: Vec<RuleState>,
}

/// 0 while it waits, 1 when it was let go, 2 when it failed.
#[derive(Clone, Default)]
struct Fate(Arc<AtomicU64>);

impl Fate {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Case {
    fn new(acks: usize, members: &[&str], on_timeout: OnTimeout) -> Case {
        let members = members.iter().map(|m| (*m).to_owned()).collect();
        let policy = SyncPolicy { acks, members, on_timeout, ..SyncPolicy::default() };
        let mut board = Board::default();
        board.configure(&policy, &[]);
        let node = Node { durable: Lsn(1000), publishes: true };
        Case { board, node, start: Instant::now(), now_ms: 0, reports: Vec::new() }
    }

    fn commit(&mut self, txid: u64) -> Fate {
        let fate = Fate::default();
        let told = fate.clone();
        let then = Box::new(move |result: Result<(), Fenced>| {
            told.0.store(if result.is_ok() { 1 } else { 2 }, Ordering::Relaxed);
        });
        let hold = Hold { position: pos(txid), end: Lsn(txid), durable: true };
        self.board.wait(name("a.db"), hold, self.now(), then);
        self.settle();
        fate
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.now_ms)
    }

    fn settle(&mut self) {
        let (decided, reports) = self.board.settle(self.now(), &self.node);
        decided.into_iter().for_each(|(then, result)| then(result));
        self.reports.extend(reports.into_iter().map(|report| report.state));
    }

    fn ack(&mut self, node: u64, txid: u64) {
        self.board.acknowledged(node, &name("a.db"), pos(txid));
        self.settle();
    }

    fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.settle();
    }
}

#[test]
fn a_commit_goes_on_with_enough_acknowledgements_of_members() {
    let mut case = Case::new(2, &["a", "b", "c"], OnTimeout::Wait);
    for (node, name) in [(2, "b"), (3, "c"), (4, "stranger")] {
        case.board.joined(node, name);
    }
    let commit = case.commit(7);
    case.ack(2, 7);
    case.ack(2, 7);
    case.ack(4, 7);
    case.ack(3, 6);
    assert_eq!(commit.get(), 0, "one member twice, a stranger, and one that is behind");
    case.ack(3, 7);
    assert_eq!(commit.get(), 1);
    let earlier = case.commit(8);
    case.ack(2, 9);
    case.ack(3, 8);
    assert_eq!(earlier.get(), 1, "who has a later one has it");
}

#[test]
fn another_history_acknowledges_nothing() {
    let mut case = Case::new(1, &[], OnTimeout::Wait);
    case.board.joined(2, "b");
    let commit = case.commit(7);
    for txid in [7, 9] {
        let other = Pos { txid: Txid(txid), checksum: Checksum(5) };
        case.board.acknowledged(2, &name("a.db"), other);
        case.settle();
        assert_eq!(commit.get(), 0);
    }
    case.ack(2, 7);
    assert_eq!(commit.get(), 1);
}

#[test]
fn an_acknowledgement_may_come_before_the_commit_waits_and_goes_with_the_member() {
    let mut case = Case::new(1, &[], OnTimeout::Wait);
    case.board.joined(2, "b");
    case.ack(2, 7);
    assert_eq!(case.commit(7).get(), 1);
    case.ack(2, 8);
    case.board.left(2);
    let commit = case.commit(8);
    assert_eq!(commit.get(), 0, "it may come back with another disk");
    case.board.joined(2, "b");
    case.settle();
    assert_eq!(commit.get(), 0);
    case.ack(2, 8);
    assert_eq!(commit.get(), 1);
}

#[test]
fn waiting_lasts_and_is_told_once() {
    let mut case = Case::new(1, &[], OnTimeout::Wait);
    let commit = case.commit(1);
    assert_eq!(case.board.next_look(case.now()), Some(Duration::from_secs(5)));
    for _ in 0..5 {
        case.pass(5000);
    }
    assert_eq!((commit.get(), &case.reports[..]), (0, &[RuleState::Waiting][..]));
    case.board.joined(2, "b");
    case.ack(2, 1);
    assert_eq!((commit.get(), &case.reports[..]), (1, &[RuleState::Waiting, RuleState::Synchronous][..]));
}

#[test]
fn a_degraded_rule_lets_commits_go_once_they_are_durable_here_and_recovers_with_what_it_owes() {
    let mut case = Case::new(1, &[], OnTimeout::Degrade);
    case.node.durable = Lsn(0);
    let first = case.commit(1);
    case.pass(4999);
    assert_eq!(first.get(), 0);
    case.pass(1);
    assert_eq!(first.get(), 0, "it is not durable here");
    case.node.durable = Lsn(1);
    case.settle();
    assert_eq!((first.get(), &case.reports[..]), (1, &[RuleState::Degraded][..]));
    case.node.durable = Lsn(1000);
    assert_eq!(case.commit(2).get(), 1, "at once now");
    case.board.joined(2, "b");
    case.ack(2, 1);
    assert_eq!(case.commit(3).get(), 1, "still: 2 is owed");
    case.ack(2, 2);
    assert_eq!(case.reports, [RuleState::Degraded, RuleState::Synchronous]);
    let again = case.commit(4);
    assert_eq!(again.get(), 0);
    case.ack(2, 4);
    assert_eq!(again.get(), 1);
}

#[test]
fn a_member_that_leaves_while_it_catches_up_owes_all_of_it_again() {
    let mut case = Case::new(1, &[], OnTimeout::Degrade);
    case.commit(1);
    case.pass(5000);
    case.board.joined(2, "b");
    case.settle();
    case.board.left(2);
    assert_eq!(case.commit(2).get(), 1);
    case.board.joined(2, "b");
    case.ack(2, 1);
    assert_eq!(case.reports, [RuleState::Degraded], "2 was committed while nobody was there");
    case.ack(2, 2);
    assert_eq!(case.reports, [RuleState::Degraded, RuleState::Synchronous]);
}

#[test]
fn a_refusing_rule_fails_commits_before_they_begin_and_keeps_those_that_were_sent() {
    let mut case = Case::new(1, &["b"], OnTimeout::Refuse);
    let too_few = Refused::TooFewConnected { connected: 0, acks: 1 };
    assert_eq!(case.board.admit(&name("a.db")), Err(too_few));
    case.board.joined(2, "b");
    assert_eq!(case.board.admit(&name("a.db")), Ok(true));
    let sent = case.commit(1);
    case.pass(5000);
    assert_eq!(case.board.admit(&name("a.db")), Err(Refused::Late { acks: 1 }));
    assert_eq!(sent.get(), 0);
    case.ack(2, 1);
    assert_eq!(sent.get(), 1);
    assert_eq!(case.board.admit(&name("a.db")), Ok(true));
    assert_eq!(case.reports, [RuleState::Refusing, RuleState::Synchronous]);
}

#[test]
fn the_end_of_a_term_fails_what_waits() {
    let mut case = Case::new(1, &[], OnTimeout::Degrade);
    case.board.joined(2, "b");
    let by_clock = case.commit(1);
    case.node.publishes = false;
    case.ack(2, 1);
    assert_eq!(by_clock.get(), 2, "an acknowledgement after the lease's end proves nothing");
    case.node.publishes = true;
    let by_decision = case.commit(2);
    case.board.fence(true);
    case.settle();
    assert_eq!(by_decision.get(), 2);
    case.board.fence(false);
    let commit = case.commit(3);
    case.ack(2, 3);
    assert_eq!(commit.get(), 1);
}

#[test]
fn the_first_rule_that_names_a_database_is_for_it() {
    let rule = |databases: &str, acks| SyncRule {
        databases: vec![databases.to_owned()],
        policy: SyncPolicy { acks, ..SyncPolicy::default() },
    };
    let mut board = Board::default();
    board.configure(&SyncPolicy::default(), &[rule("x/**", 0), rule("**", 1)]);
    assert!(board.is_used());
    assert_eq!(board.admit(&name("x/a.db")), Ok(false));
    assert_eq!(board.admit(&name("a.db")), Ok(true));
    board.configure(&SyncPolicy::default(), &[]);
    assert!(!board.is_used());
    assert_eq!(board.admit(&name("a.db")), Ok(false));
}

#[test]
fn members_of_a_database_are_those_of_its_rule() {
    let mut case = Case::new(2, &["b", "c"], OnTimeout::Wait);
    case.board.joined(2, "b");
    case.board.joined(4, "d");
    let members = case.board.members_of(&name("app.db")).unwrap();
    assert_eq!((members.acks, members.connected), (2, vec!["b".to_owned()]));
    assert_eq!(members.named, ["b", "c"]);
    assert_eq!(Case::new(0, &[], OnTimeout::Wait).board.members_of(&name("app.db")), None);
}
