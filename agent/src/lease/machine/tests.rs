use super::*;
use crate::lease::{Answer, Record, Standing, Term};

const TTL: Duration = Duration::from_secs(10);

fn at(ms: u64) -> Time {
    Duration::from_millis(ms)
}

fn peer(node_id: u64) -> Peer {
    Peer { node_id, name: format!("n{node_id}"), url: format!("http://n{node_id}") }
}

fn standing(transactions: u64) -> Standing {
    Standing { record_epoch: Epoch(1), transactions }
}

/// Node 1 is a candidate with 5 transactions in session "s1"; so is node 2.
fn machine(candidate: bool) -> RoleMachine {
    let timing = Timing { ttl: Some(TTL), retry: Duration::from_millis(300) };
    RoleMachine::new(peer(1), candidate, Epoch(3), timing)
}

fn view(version: u64, holder: Option<(u64, Epoch)>, released: bool) -> View {
    let term = holder.map(|(id, epoch)| Term {
        holder: peer(id),
        epoch,
        standing: standing(5),
        released,
        beat: version,
        sync: Vec::new(),
    });
    let session = holder.filter(|_| !released).map(|(id, _)| format!("s{id}"));
    let member = |id| Member { peer: peer(id), candidate: true, session: format!("s{id}") };
    View {
        index: version,
        resets: 0,
        record: Record { version, taken: 0, session, term },
        members: vec![member(1), member(2)],
        session: Some("s1".into()),
    }
}

fn heard(round: u64, own: Standing, answers: Vec<Answer>) -> Event {
    let own = Answer { peer: peer(1), can_stand: true, epoch: Epoch(3), standing: own, databases: None };
    Event::Heard { round, own, answers, promises: Vec::new() }
}

/// Leads in epoch 4 with version 8, claimed at `sent`.
fn leading(sent: Time) -> RoleMachine {
    let mut m = machine(true);
    m.handle(sent, Event::Seen(view(7, Some((2, Epoch(3))), true)));
    let answers = heard(1, standing(5), Vec::new());
    let claim = Action::Claim { version: 7, from: None, epoch: Epoch(4) };
    assert_eq!(m.handle(sent, answers), [claim]);
    let actions = m.handle(sent, Event::Claimed { epoch: Epoch(4), sent, outcome: Some(Some(8)) });
    assert_eq!(actions, [Action::Lead { epoch: Epoch(4), until: Some(sent + at(9000)) }]);
    m
}

#[test]
fn a_released_lease_is_claimed_in_a_newer_epoch_than_anybody_knows() {
    let mut m = machine(true);
    let actions = m.handle(at(0), Event::Seen(view(7, Some((2, Epoch(3))), true)));
    assert_eq!(actions, [Action::Ask { round: 1, peers: vec![peer(2)] }]);
    let other =
        Answer { peer: peer(2), can_stand: true, epoch: Epoch(9), standing: standing(4), databases: None };
    let actions = m.handle(at(1), heard(1, standing(5), vec![other]));
    assert_eq!(actions, [Action::Claim { version: 7, from: None, epoch: Epoch(10) }]);
}

#[test]
fn a_holder_that_renews_is_followed_and_a_silent_one_is_robbed_after_the_ttl() {
    let mut m = machine(true);
    let actions = m.handle(at(0), Event::Seen(view(7, Some((2, Epoch(3))), false)));
    assert_eq!(actions, [Action::Follow(Some(peer(2)))]);
    assert_eq!(m.handle(at(6000), Event::Seen(view(8, Some((2, Epoch(3))), false))), []);
    assert_eq!(m.wake_at(), Some(at(16_000)));
    assert_eq!(m.handle(at(15_999), Event::Tick), []);
    assert!(matches!(m.handle(at(16_000), Event::Tick)[..], [Action::Ask { .. }]));
    // It renews after all while the others are asked.
    m.handle(at(16_001), Event::Seen(view(9, Some((2, Epoch(3))), false)));
    assert_eq!(m.handle(at(16_002), heard(1, standing(5), vec![])), []);
    let actions = m.handle(at(26_001), Event::Tick);
    assert!(matches!(actions[..], [Action::Ask { round: 2, .. }]));
    let actions = m.handle(at(26_002), heard(2, standing(5), vec![]));
    assert_eq!(actions, [Action::Claim { version: 9, from: Some("s2".into()), epoch: Epoch(4) }]);
}

#[test]
fn one_that_waited_says_so_no_more_when_whom_it_follows_goes_on() {
    let mut m = machine(true);
    m.handle(at(0), Event::Seen(view(7, Some((2, Epoch(3))), false)));
    assert!(matches!(m.handle(at(10_000), Event::Tick)[..], [Action::Ask { .. }]));
    let further =
        Answer { peer: peer(2), can_stand: true, epoch: Epoch(3), standing: standing(6), databases: None };
    let goes_first = Choice::LetGoFirst(peer(2));
    assert_eq!(m.handle(at(10_001), heard(1, standing(5), vec![further])), [Action::Waits(goes_first)]);
    assert_eq!(m.handle(at(10_002), Event::Seen(view(8, Some((2, Epoch(4))), false))), [Action::WaitsNoMore]);
}

#[test]
fn one_that_is_no_candidate_never_stands() {
    let mut m = machine(false);
    m.handle(at(0), Event::Seen(view(7, Some((2, Epoch(3))), false)));
    assert_eq!(m.handle(at(60_000), Event::Tick), []);
    assert_eq!(m.handle(at(60_001), Event::Seen(view(8, Some((2, Epoch(3))), true))), []);
    assert_eq!(m.handle(at(60_002), Event::Force), []);
}

#[test]
fn an_empty_node_waits_until_it_is_forced() {
    let mut m = machine(true);
    m.handle(at(0), Event::Seen(view(7, Some((2, Epoch(3))), true)));
    let empty = |round| heard(round, Standing::default(), vec![]);
    assert_eq!(m.handle(at(1), empty(1)), [Action::Waits(Choice::Stale)]);
    m.handle(at(90_000), Event::Tick);
    assert_eq!(m.handle(at(90_001), empty(2)), []);
    assert!(matches!(m.handle(at(90_002), Event::Force)[..], [Action::Ask { round: 3, .. }]));
    assert!(matches!(m.handle(at(90_003), empty(3))[..], [Action::Claim { .. }]));
}

#[test]
fn a_primary_is_fenced_before_the_ttl_ends_when_the_store_hangs() {
    let mut m = leading(at(1000));
    assert_eq!(m.handle(at(3500), Event::Tick), [Action::Renew { version: 8, epoch: Epoch(4) }]);
    assert_eq!(m.leads(at(9999)), Some(Epoch(4)));
    // By the clock alone, before anything is told to it.
    assert_eq!(m.leads(at(10_000)), None);
    assert_eq!(m.handle(at(10_000), Event::Tick), [Action::StopWrites]);
    // An answer counts from when the question was sent: this one comes too late to help.
    let late = Event::Renewed { epoch: Epoch(4), sent: at(3500), outcome: Some(Some(9)) };
    assert!(
        matches!(m.handle(at(12_000), late)[..], [Action::Lead { until, .. }, ..] if until == Some(at(12_500)))
    );
    assert_eq!(m.leads(at(12_500)), None);
}

#[test]
fn a_robbed_primary_stops_and_old_views_do_not_bring_it_back() {
    let mut m = leading(at(0));
    assert_eq!(m.handle(at(2500), Event::Tick), [Action::Renew { version: 8, epoch: Epoch(4) }]);
    let actions = m.handle(at(2600), Event::Renewed { epoch: Epoch(4), sent: at(2500), outcome: Some(None) });
    assert_eq!(actions, [Action::Read]);
    assert_eq!(m.handle(at(2700), Event::Seen(view(7, Some((2, Epoch(3))), true))), []);
    let actions = m.handle(at(2800), Event::Seen(view(9, Some((2, Epoch(5))), false)));
    assert_eq!(actions, [Action::StopWrites, Action::Follow(None), Action::Follow(Some(peer(2)))]);
}

#[test]
fn a_node_that_cannot_begin_its_term_releases_the_lease() {
    let mut m = leading(at(0));
    assert_eq!(m.handle(at(1), Event::CannotLead { epoch: Epoch(3) }), []);
    let actions = m.handle(at(2), Event::CannotLead { epoch: Epoch(4) });
    let release = Action::Release { version: 8, epoch: Epoch(4) };
    assert_eq!(actions, [Action::StopWrites, release, Action::Follow(None)]);
    assert_eq!(m.holds(), None);
}

#[test]
fn stopping_while_a_claim_is_under_way_releases_what_it_got() {
    let mut m = machine(true);
    m.handle(at(0), Event::Seen(view(7, Some((2, Epoch(3))), true)));
    m.handle(at(1), heard(1, standing(5), vec![]));
    assert_eq!(m.handle(at(2), Event::Stop), []);
    let actions = m.handle(at(3), Event::Claimed { epoch: Epoch(4), sent: at(1), outcome: Some(Some(8)) });
    assert!(matches!(
        actions[..],
        [Action::Lead { .. }, Action::StopWrites, Action::Release { version: 8, epoch: Epoch(4) }]
    ));
    assert_eq!(m.handle(at(4), Event::Released), [Action::Stopped]);
}

#[test]
fn a_renewal_whose_answer_was_lost_is_found_in_the_record() {
    let mut m = leading(at(0));
    let renew = |version| Action::Renew { version, epoch: Epoch(4) };
    let renewed = |sent, outcome| Event::Renewed { epoch: Epoch(4), sent, outcome };
    assert_eq!(m.handle(at(2500), Event::Tick), [renew(8)]);
    // It made version 9, which nobody told this node.
    assert_eq!(m.handle(at(4500), renewed(at(2500), None)), []);
    assert_eq!(m.handle(at(4800), Event::Tick), [renew(8)]);
    assert_eq!(m.handle(at(4900), renewed(at(4800), Some(None))), [Action::Read]);
    assert_eq!(m.wake_at(), Some(at(9000)), "nothing can be renewed before the record is read");
    assert_eq!(m.handle(at(5000), Event::Seen(view(9, Some((1, Epoch(4))), false))), [renew(9)]);
    let extended = Action::Extend { until: Some(at(14_000)) };
    assert_eq!(m.handle(at(5100), renewed(at(5000), Some(Some(10)))), [extended]);
}

#[test]
fn a_release_waits_for_the_renewal_that_is_on_its_way() {
    let mut m = leading(at(0));
    assert_eq!(m.handle(at(2500), Event::Tick), [Action::Renew { version: 8, epoch: Epoch(4) }]);
    assert_eq!(m.handle(at(2501), Event::Stop), [Action::StopWrites]);
    let renewed = Event::Renewed { epoch: Epoch(4), sent: at(2500), outcome: Some(Some(9)) };
    let release = Action::Release { version: 9, epoch: Epoch(4) };
    assert_eq!(m.handle(at(2600), renewed), [Action::StopWrites, release]);
    assert_eq!(m.handle(at(2700), Event::Released), [Action::Stopped]);
}
